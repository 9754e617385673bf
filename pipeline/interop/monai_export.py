"""A bundle as a MONAI bundle, which `python -m monai.bundle run` executes, compared with the bundle's own output.

A network that is a class of MONAI is named in the configuration with its arguments, its weights are a state dict.
Ours is not, so it is TorchScript that the configuration loads.

Source: docs/source/mb_specification.rst of Project-MONAI/MONAI, version 1.6.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.bundle import ModelBundle, load_bundle
from pipeline.errors import ExportError
from pipeline.files import atomic_folder, refuse_foreign, write_json, write_text
from pipeline.interop.monai_layout import (
    after_network,
    before_network,
    data_format,
    inferer,
    monai_network,
    wrapped,
)
from pipeline.interop.network_graph import Difference, difference, quiet_recording
from pipeline.interop.torchscript_export import recorded
from pipeline.models.monai_networks import filled_monai
from pipeline.models.monai_spec import MonaiNetwork

STATE, SCRIPT = "models/model.pt", "models/model.ts"
CONFIG, METADATA, README = "configs/inference.json", "configs/metadata.json", "docs/README.md"
WRITTEN = (STATE, SCRIPT, CONFIG, METADATA, README)


def export_monai(model: Path, out: Path, *, force: bool) -> list[str]:
    """Write the bundle `model` as the MONAI bundle `out`, a folder; the lines to tell of it.

    Raises:
        BundleError: `model` is none.
        ExportError: its preprocessing cannot be said with MONAI's transforms, or what was written gives another output.
        RunError: `out` exists and `force` was not given, or cannot be written.
    """
    bundle = load_bundle(model)
    named = monai_network(bundle.plan)
    config = _config(bundle, named)
    refuse_foreign(out, WRITTEN, "a MONAI bundle that was exported")
    with atomic_folder(out, force=force) as folder:
        (folder / "models").mkdir()
        (folder / "configs").mkdir()
        found = _write_network(bundle, named, folder)
        write_json(folder / CONFIG, config)
        write_json(folder / METADATA, _metadata(bundle))
        (folder / "docs").mkdir()
        write_text(folder / README, _readme(bundle))
    kind = f"{named.name} of MONAI" if named else "TorchScript"
    return [
        f"{out}: a MONAI bundle, its network {kind}; largest difference of a logit {found.largest:.2g} "
        f"(largest logit {found.peak:.3g})",
        f"run it with: python -m monai.bundle run --config_file {out}/configs/inference.json --bundle_root {out} "
        "--dataset_dir FOLDER",
    ]


def _write_network(bundle: ModelBundle, named: MonaiNetwork | None, folder: Path) -> Difference:
    """The network's file in `folder`, read back and compared."""
    network: nn.Module
    if named is None:
        with quiet_recording():
            torch.jit.save(recorded(bundle), folder / SCRIPT)
            network = torch.jit.load(folder / SCRIPT, map_location="cpu")  # type: ignore[no-untyped-call]
    else:
        torch.save(bundle.network.state_dict(), folder / STATE)
        network = filled_monai(named, torch.load(folder / STATE, map_location="cpu", weights_only=True))
    found = difference(bundle, network.eval())
    if not found.passes:
        raise ExportError(
            f"the network as MONAI loads it differs by {found.largest:g} from the bundle's own output (largest logit "
            f"{found.peak:g}); nothing was written"
        )
    return found


def _config(bundle: ModelBundle, named: MonaiNetwork | None) -> dict[str, Any]:
    plan = bundle.plan
    before = before_network(plan)
    after = after_network(bundle.schema, plan.inference)
    keys = before[0]["keys"]
    several = isinstance(keys, list)
    files = ", ".join(f"'{key}': c.replace('_0000.', '_{n:04d}.')" for n, key in enumerate(keys))
    study = files if several else f"'{keys}': c"
    return {
        "imports": ["$import glob", "$import torch"],
        "bundle_root": ".",
        "dataset_dir": "$@bundle_root + '/images'",
        "output_dir": "$@bundle_root + '/eval'",
        "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
        "datalist": f"$sorted(glob.glob(@dataset_dir + '/*{'_0000' if several else ''}.nii.gz'))",
        "data": f"$[{{{study}}} for c in @datalist]",
        **_network_config(bundle, named),
        "preprocessing": {"_target_": "Compose", "transforms": before},
        "dataset": {"_target_": "Dataset", "data": "@data", "transform": "@preprocessing"},
        "dataloader": {"_target_": "DataLoader", "dataset": "@dataset", "batch_size": 1, "num_workers": 0},
        "inferer": inferer(plan, bundle.index.tile_step),
        "postprocessing": {"_target_": "Compose", "transforms": [*after, _saving()]},
        "evaluator": {
            "_target_": "SupervisedEvaluator",
            "device": "@device",
            "val_data_loader": "@dataloader",
            "network": "@network",
            "inferer": "@inferer",
            "postprocessing": "@postprocessing",
            **({} if named is None else {"val_handlers": "@handlers"}),
        },
        "run": ["$@evaluator.run()"],
    }


def _network_config(bundle: ModelBundle, named: MonaiNetwork | None) -> dict[str, Any]:
    if named is None:
        script = f"torch.jit.load(@bundle_root + '/{SCRIPT}', map_location=@device).eval()"
        return {"network": wrapped(script, bundle.plan, bundle.schema)}
    return {
        "network_def": {"_target_": named.name, **named.arguments},
        "network": wrapped("@network_def", bundle.plan, bundle.schema),
        "handlers": [
            {
                "_target_": "CheckpointLoader",
                "load_path": f"$@bundle_root + '/{STATE}'",
                "load_dict": {"model": "@network_def"},
                "map_location": "@device",
            }
        ],
    }


def _saving() -> dict[str, Any]:
    return {
        "_target_": "SaveImaged",
        "keys": "pred",
        "output_dir": "@output_dir",
        "output_postfix": "seg",
        "output_dtype": "int32",
        "resample": False,
    }


def _metadata(bundle: ModelBundle) -> dict[str, Any]:
    made = bundle.index.provenance
    return {
        "name": bundle.index.name,
        "version": "1.0.0",
        "monai_version": str(made.get("monai", "1.6.0")),
        "pytorch_version": str(made.get("torch", torch.__version__)),
        "numpy_version": str(made.get("numpy", "")),
        "task": "segmentation",
        "description": f"{bundle.index.name}, exported by volseg; weights sha256 {bundle.digest}",
        "authors": "",
        "copyright": "",
        "required_packages_version": {"nibabel": "5", "pytorch-ignite": "0.5"},
        "network_data_format": data_format(bundle.plan, bundle.schema),
    }


def _readme(bundle: ModelBundle) -> str:
    channels = ", ".join(channel.described for channel in bundle.plan.channels)
    return (
        f"# {bundle.index.name}\n\n"
        f"Input: {channels}. The network's outputs are those of the volseg bundle with the weights "
        f"{bundle.digest[:16]}; they were compared when this was written.\n\n"
        "Labels differ in some voxels from volseg's own, which takes larger tiles where that spares some, spreads them "
        "evenly, pads with each channel's lowest value, averages over mirrored passes where that was found worth it, "
        "and whose grids share their centre with the study instead of their first voxel.\n"
    )
