"""A bundle's network as TorchScript, which C++ programs and older PyTorch load without volseg."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from pipeline.bundle import ModelBundle, load_bundle
from pipeline.files import atomic_path, write_json
from pipeline.interop.model_card import model_card
from pipeline.interop.network_graph import difference, example_of, quiet_recording, recording_shape
from pipeline.interop.onnx_export import card_path, require_new, require_same, told

CARD = "volseg.json"
"""Under this name the archive holds the card (`_extra_files` of torch.jit.load)."""


def export_torchscript(folder: Path, out: Path, *, force: bool) -> list[str]:
    """Write the network of the bundle `folder` to `out` (.pt) and its card beside it (.pt.json); lines to tell of it.

    The file is loaded and compared with the bundle before it takes its name.

    Raises:
        BundleError: `folder` is none, or damaged.
        ExportError: the file's output is not the bundle's.
        RunError: `out` has another suffix, exists and `force` was not given, or cannot be written.
    """
    require_new(out, ".pt", force=force)
    bundle = load_bundle(folder)
    network = recorded(bundle)
    found = difference(bundle, network)
    require_same(found, out)
    card = model_card(bundle, found)
    with atomic_path(out) as temporary, quiet_recording():
        torch.jit.save(network, temporary, _extra_files={CARD: json.dumps(card, ensure_ascii=False)})
        written = torch.jit.load(temporary, map_location="cpu")  # type: ignore[no-untyped-call]
        require_same(difference(bundle, written), out)
    write_json(card_path(out), card)
    return told(out, bundle, found)


def recorded(bundle: ModelBundle) -> torch.jit.ScriptModule:
    """The network as TorchScript; batches may be of any size, and so may sides where the network lets them."""
    plan = bundle.plan
    example = example_of((2, len(plan.channels), *recording_shape(plan)))
    with quiet_recording():
        script = torch.jit.trace(bundle.network, example, check_trace=False)  # type: ignore[no-untyped-call]
    assert isinstance(script, torch.jit.ScriptModule)
    return script
