"""A bundle's network as an ONNX file, with what its user needs inside it and in a JSON beside it."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.bundle import ModelBundle, load_bundle
from pipeline.errors import ExportError, RunError
from pipeline.files import atomic_path, write_json
from pipeline.interop.model_card import INPUT, OUTPUT, model_card
from pipeline.interop.network_graph import (
    TOLERANCE,
    Difference,
    Run,
    difference,
    example_of,
    for_recording,
    has_free_sides,
    quiet_recording,
    recording_shape,
)
from pipeline.plan import Plan

OPSET = 18
"""Of the operators that the file asks for (December 2022): what runtimes of the last years all know."""

CARD = "volseg"
"""Under this name the file's metadata hold the card."""

FATAL = 4
"""ONNX Runtime's severity for its log: nothing below it; what fails is raised too."""


def export_onnx(folder: Path, out: Path, *, force: bool) -> list[str]:
    """Write the network of the bundle `folder` to `out` (.onnx), its card beside it (.onnx.json); what to tell of it.

    The file is run by ONNX Runtime and compared with the bundle before it takes its name.

    Raises:
        BundleError: `folder` is none, or damaged.
        ExportError: a package is missing, or the file's output is not the bundle's.
        RunError: `out` has another suffix, exists and `force` was not given, or cannot be written.
    """
    require_new(out, ".onnx", force=force)
    bundle = load_bundle(folder)
    content = onnx_model(bundle)
    found = difference(bundle, onnx_run(content))
    require_same(found, out)
    card = model_card(bundle, found)
    with atomic_path(out) as temporary:
        temporary.write_bytes(_with_card(content, card))
        require_same(difference(bundle, onnx_run(temporary.read_bytes())), out)
    write_json(card_path(out), card)
    return told(out, bundle, found)


def onnx_model(bundle: ModelBundle) -> bytes:
    """The network as ONNX; batches may be of any size, and so may sides where the network lets them.

    Raises:
        ExportError: the package onnx is not installed.
    """
    _require_onnx()
    network, example = for_recording(bundle), _example(bundle)
    axes = {0: "batch"}
    if has_free_sides(bundle.plan):
        axes |= {2 + axis: "ijk"[axis] for axis in range(3) if axis != bundle.plan.slice_axis}
    buffer = io.BytesIO()
    with quiet_recording():
        # torch's newer exporter would need the package onnxscript besides.
        torch.onnx.export(
            network,
            (example,),
            buffer,  # type: ignore[arg-type]  # as that exporter takes it
            dynamo=False,
            opset_version=OPSET,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_axes={INPUT: axes, OUTPUT: axes},
        )
    return buffer.getvalue()


def onnx_run(content: bytes, *, threads: int | None = None) -> Run:
    """What ONNX Runtime makes of a model on the CPU, with torch's number of threads unless told.

    Raises:
        ExportError: ONNX Runtime is not installed.
    """
    try:
        import onnxruntime  # type: ignore[import-untyped]
    except ImportError as error:
        raise ExportError('ONNX Runtime is not installed; pip install "volseg[onnx]"') from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = FATAL
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])

    def run(image: Tensor) -> Tensor:
        return torch.from_numpy(session.run([OUTPUT], {INPUT: image.contiguous().numpy()})[0])

    return run


def require_new(out: Path, suffix: str, *, force: bool) -> None:
    """Raise RunError unless `out` has that suffix and, but for `force`, is not there."""
    if out.suffix != suffix:
        raise RunError(f"{out}: expected a name that ends in {suffix}, as {out.with_suffix(suffix)}")
    for path in (out, card_path(out)):
        if path.exists() and not force:
            raise RunError(f"{path} exists already; give --force to replace it, or another name")


def card_path(out: Path) -> Path:
    """Of the card beside an exported file."""
    return out.with_name(out.name + ".json")


def require_same(found: Difference, out: Path) -> None:
    """Raise ExportError when the exported network's logits are not the bundle's."""
    if not found.passes:
        raise ExportError(
            f"{out}: logits differ by {found.largest:.2g} from the bundle's own, which reach {found.peak:.2g}; "
            f"expected at most {TOLERANCE:g} of that, so nothing was written"
        )


def told(out: Path, bundle: ModelBundle, found: Difference) -> list[str]:
    """What the command prints."""
    return [
        f"{out}: logits differ by at most {found.largest:.2g} from the bundle's own (up to {found.peak:.2g})",
        f"tiles: {_sides(bundle.plan)}; any batch",
        f"{card_path(out)}: how to prepare its input and read its output",
    ]


def _sides(plan: Plan) -> str:
    patch = "x".join(map(str, plan.patch_shape))
    if not has_free_sides(plan):
        return patch
    free = [axis for axis in range(3) if axis != plan.slice_axis]
    divisors = "x".join(str(plan.factor[axis]) for axis in free)
    if plan.slice_axis is None:
        return f"{patch}, or any divisible by {divisors}"
    along = " and ".join("ijk"[axis] for axis in free)
    return f"{patch}, or any divisible by {divisors} along {along}, always 1 along {'ijk'[plan.slice_axis]}"


def _example(bundle: ModelBundle) -> Tensor:
    plan = bundle.plan
    return example_of((2, len(plan.channels), *recording_shape(plan)))


def _require_onnx() -> None:
    """torch's exporter needs it too, and says so in another way."""
    try:
        import onnx  # noqa: F401
    except ImportError as error:
        raise ExportError('the package onnx is not installed; pip install "volseg[onnx]"') from error


def _with_card(content: bytes, card: dict[str, Any]) -> bytes:
    import onnx

    model = onnx.load_from_string(content)
    onnx.helper.set_model_props(model, {CARD: json.dumps(card, ensure_ascii=False)})
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())
