"""The ways out of volseg for a trained model, by the name that `volseg bundle export --to` knows them by."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Protocol

from pipeline.errors import ExportError


class Exporter(Protocol):
    """Writes `model` (a bundle, or a folder of a run with one a fold) to `out` and compares it with the bundle's own
    output before it is called done. Gives the lines to tell of it.
    """

    def __call__(self, model: Path, out: Path, *, force: bool) -> list[str]: ...


def export_model(model: Path, out: Path, *, to: str, force: bool) -> list[str]:
    """Write `model` in the format `to`, a key of `EXPORTERS`; the lines to tell of it.

    Raises:
        ExportError: there is no such format, or the model cannot be said in it.
        BundleError: `model` is no bundle.
        RunError: `out` exists and `force` was not given, or cannot be written.
    """
    if to not in EXPORTERS:
        near = difflib.get_close_matches(to, EXPORTERS, n=1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise ExportError(f"--to {to}: no such format; {hint}known are {', '.join(EXPORTERS)}")
    return [*EXPORTERS[to](model, out, force=force), *_left_out(model)]


def one_bundle(model: Path) -> Path:
    """The only bundle of `model`, for formats that hold one network.

    Raises:
        BundleError: there is none, or one a fold.
    """
    from pipeline.bundle import find_bundles
    from pipeline.errors import BundleError

    bundles = find_bundles(model)
    if len(bundles) > 1:
        raise BundleError(f"{model}: found {len(bundles)} folds, expected one model; give one of them, as {bundles[0]}")
    return bundles[0]


def _left_out(model: Path) -> list[str]:
    """What a network elsewhere does not do."""
    from pipeline.bundle import find_bundles, load_bundle
    from pipeline.postprocessing import described

    found = load_bundle(find_bundles(model)[0]).postprocessing
    if found is None:
        return []
    return [f"not part of it: the post-processing that volseg does afterwards ({described(found.actions)}); do it too"]


def _to_nnunet(model: Path, out: Path, *, force: bool) -> list[str]:
    from pipeline.interop.nnunet_export import export_nnunet

    return export_nnunet(model, out, force=force)


def _to_onnx(model: Path, out: Path, *, force: bool) -> list[str]:
    from pipeline.interop.onnx_export import export_onnx

    return export_onnx(one_bundle(model), out, force=force)


def _to_torchscript(model: Path, out: Path, *, force: bool) -> list[str]:
    from pipeline.interop.torchscript_export import export_torchscript

    return export_torchscript(one_bundle(model), out, force=force)


def _to_monai(model: Path, out: Path, *, force: bool) -> list[str]:
    from pipeline.interop.monai_export import export_monai

    return export_monai(one_bundle(model), out, force=force)


EXPORTERS: dict[str, Exporter] = {
    "nnunet": _to_nnunet,
    "monai": _to_monai,
    "onnx": _to_onnx,
    "torchscript": _to_torchscript,
}
"""Each imports what it needs when it is called."""
