"""A bundle as the folder of a trained nnU-Net v2 model, which nnU-Net's own predictor loads; read again and compared.

Only preprocessing that nnU-Net has can be said in its plans: that of bundles that were imported from it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.bundle import CONFIG, ModelBundle, find_bundles, load_bundle
from pipeline.errors import ExportError
from pipeline.files import atomic_folder, refuse_foreign, write_json
from pipeline.interop.nnunet_checkpoint import read_checkpoint
from pipeline.interop.nnunet_folder import ALL, CHECKPOINTS, DATASET, PLANS, open_trained
from pipeline.interop.nnunet_import import SECTION, network_axes, plan_of_checkpoint
from pipeline.interop.nnunet_network import BLOCKS, layer_names, turned, weights_from_nnunet
from pipeline.interop.nnunet_plan import axes_of_nnunet
from pipeline.models.slices import SliceNetwork
from pipeline.models.spec import UNetSpec

LARGEST_DIFFERENCE = 1e-4
"""Of logits, as a part of the largest of them."""

_MODULES = "dynamic_network_architectures.architectures.unet"
_UNSAYABLE = {
    "bottleneck": "convolution", "padding": "same", "downsampling": "strided", "upsampling": "transposed",
    "skip": "concatenate", "weight_standardisation": False, "drop_path": 0.0,
}  # fmt: skip
"""Choices that nnU-Net's networks have at these values alone."""
_NORMALISATIONS = {"instance": "instancenorm.InstanceNorm", "batch": "batchnorm.BatchNorm"}


@dataclass(frozen=True)
class Section:
    """What an imported bundle keeps of nnU-Net's files, see `nnunet_import`."""

    configuration: str
    trainer: str
    plans: dict[str, Any]
    dataset: dict[str, Any]


def export_nnunet(model: Path, out: Path, *, force: bool) -> list[str]:
    """Write the bundles of `model` as folds of one nnU-Net model to the folder `out`; the lines to tell of it.

    Raises:
        ExportError: nnU-Net has no words for the model, or what was written did not read back the same.
        BundleError: `model` is no bundle, or damaged.
        RunError: `out` exists and `force` was not given, or is something else, or cannot be written.
    """
    paths = find_bundles(model)
    refuse_foreign(out, [PLANS, DATASET, f"fold_*/{CHECKPOINTS[0]}"], "a model that was exported")
    folds = []
    with atomic_folder(out, force=force) as temporary:
        for path in paths:
            bundle, section = load_bundle(path), read_section(path)
            fold = ALL if bundle.index.fold is None else str(bundle.index.fold)
            if fold in folds:
                raise ExportError(f"{path}: fold {fold} again; every fold once")
            folds.append(fold)
            _check_finite(bundle, path)
            _write_fold(temporary, fold, bundle, section=section)
            difference = _difference(temporary, fold, bundle)
            if not difference <= LARGEST_DIFFERENCE:  # so that a difference of nan is one
                raise ExportError(f"{out}: fold {fold} reads back with other outputs (they differ by {difference:.2g})")
    flags = " ".join(folds)
    return [
        f"{out}: a trained nnU-Net model of {section.trainer}, {section.configuration}, folds {flags}",
        "read again and compared with the bundle's own output on one patch: the same",
        f"nnUNetv2_predict_from_modelfolder -m {out} -f {flags} -i IMAGES -o RESULTS",
    ]


def read_section(bundle: Path) -> Section:
    """What the bundle in this folder was imported from.

    Raises:
        ExportError: it was not made by nnU-Net.
    """
    try:
        return Section(**json.loads((bundle / CONFIG).read_text(encoding="utf-8"))[SECTION])
    except (ValueError, KeyError, TypeError) as error:
        raise ExportError(
            f"{bundle}: was not trained by nnU-Net, whose plans cannot say its preprocessing (axes, grid, "
            "normalisation, how tiles are averaged); use --to onnx or torchscript"
        ) from error


def architecture_of(spec: UNetSpec) -> dict[str, Any]:
    """The `architecture` of plans for a spec on nnU-Net's axes.

    Raises:
        ExportError: nnU-Net's networks have not what the spec asks for; it is named.
    """
    kinds = spec.block, spec.block_of_decoder
    name = next((name for name, both in BLOCKS.items() if both == kinds), None)
    refused = [f"{key} {getattr(spec, key)}" for key, only in _UNSAYABLE.items() if getattr(spec, key) != only]
    refused += [f"normalisation {spec.normalisation}"] if spec.normalisation not in _NORMALISATIONS else []
    refused += [f"blocks {kinds[0]} and then {kinds[1]}"] if name is None else []
    refused += ["a single stage"] if spec.stages < 2 else []
    refused += ["residual blocks without a stem"] if kinds[0] == "residual" and not spec.stem_channels else []
    refused += ["plain blocks with a stem"] if kinds[0] == "plain" and spec.stem_channels else []
    if refused:
        raise ExportError(f"nnU-Net's networks have no {', no '.join(refused)}")
    plain, d = kinds[0] == "plain", spec.dimensions
    leaky = {"negative_slope": spec.leaky_slope} if spec.activation == "leaky_relu" else {}
    arguments = {
        "n_stages": spec.stages,
        "features_per_stage": list(spec.features),
        "conv_op": f"torch.nn.modules.conv.Conv{d}d",
        "kernel_sizes": [list(row) for row in spec.kernel_shapes],
        "strides": [list(row) for row in spec.strides],
        "n_conv_per_stage" if plain else "n_blocks_per_stage": list(spec.encoder_blocks),
        "n_conv_per_stage_decoder": list(spec.decoder_blocks[::-1]),
        "conv_bias": spec.biased_convolutions,
        "norm_op": f"torch.nn.modules.{_NORMALISATIONS[spec.normalisation]}{d}d",
        "norm_op_kwargs": {"eps": spec.normalisation_epsilon, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU" if leaky else "torch.nn.ReLU",
        "nonlin_kwargs": {"inplace": True, **leaky},
        **({} if plain else {"stem_channels": spec.stem_channels}),
    }
    return {
        "network_class_name": f"{_MODULES}.{name}",
        "arch_kwargs": arguments,
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }


def weights_to_nnunet(ours: Mapping[str, Tensor], spec: UNetSpec, *, axes: tuple[int, ...]) -> dict[str, Tensor]:
    """nnU-Net's weights from ours, under all the names that its modules list them by.

    Raises:
        ExportError: transposed convolutions have biases and the others none, which nnU-Net cannot say.
    """
    modules, back = dict(layer_names(spec)), tuple(axes.index(axis) for axis in range(len(axes)))
    weights: dict[str, Tensor] = {}
    for name, value in ours.items():
        module, _, kind = name.rpartition(".")
        theirs = modules[module]
        if kind == "bias" and theirs.startswith("decoder.transpconvs") and not spec.biased_convolutions:
            if value.any():
                raise ExportError("nnU-Net's networks have no biases in transposed convolutions alone")
            continue
        turned_value = value.permute(0, 1, *(2 + axis for axis in back)) if value.ndim > 2 else value
        weights |= dict.fromkeys(_copies(f"{theirs}.{kind}"), turned_value.contiguous())
    return weights


def _copies(name: str) -> Iterator[str]:
    """Every name of one weight: blocks list their layers twice, and the decoder holds the encoder."""
    layer, _, kind = name.rpartition(".")
    parent, _, last = layer.rpartition(".")
    place = {"conv": 0, "norm": 1}.get(last)
    for one in [name] if place is None else [name, f"{parent}.all_modules.{place}.{kind}"]:
        yield one
        if one.startswith("encoder."):
            yield f"decoder.{one}"


def _check_finite(bundle: ModelBundle, path: Path) -> None:
    for name, value in _inner(bundle).state_dict().items():
        if not value.isfinite().all():
            raise ExportError(
                f"{path}: {name}: found values that are not finite, expected numbers, since no prediction comes of "
                "others; train it again"
            )


def _write_fold(folder: Path, fold: str, bundle: ModelBundle, *, section: Section) -> None:
    """plans.json and dataset.json, which are those of every fold, and the fold's checkpoint."""
    spec, axes = bundle.plan.unet, network_axes(section.plans, bundle.plan.unet.dimensions)
    back = tuple(axes.index(axis) for axis in range(len(axes)))
    configuration = section.plans["configurations"][section.configuration]
    configuration = configuration | {"architecture": architecture_of(turned(spec, back))}
    plans = section.plans | {"configurations": {section.configuration: configuration}}
    if (folder / PLANS).is_file() and json.loads((folder / PLANS).read_text(encoding="utf-8")) != plans:
        raise ExportError(f"fold {fold} has other plans than the folds before it; nnU-Net keeps them once for all")
    write_json(folder / PLANS, plans)
    write_json(folder / DATASET, section.dataset)
    files = axes_of_nnunet(section.plans)[3 - len(axes) :]
    checkpoint = {
        "network_weights": weights_to_nnunet(_inner(bundle).state_dict(), spec, axes=axes),
        "trainer_name": section.trainer,
        "init_args": {"configuration": section.configuration},
        # None, not an empty list, of which nnU-Net asks the largest.
        "inference_allowed_mirroring_axes": tuple(sorted(files.index(a) for a in bundle.plan.mirror_axes)) or None,
        "current_epoch": bundle.index.provenance.get("nnunet_epochs", 0),
    }
    (folder / f"fold_{fold}").mkdir()
    torch.save(checkpoint, folder / f"fold_{fold}" / CHECKPOINTS[0])


def _difference(folder: Path, fold: str, bundle: ModelBundle) -> float:
    """Of the logits for a patch of noise, between the bundle and what was written, as a part of the largest logit.

    Raises:
        ExportError: what was written says another plan.
    """
    path = folder / f"fold_{fold}" / CHECKPOINTS[0]
    trained, checkpoint = open_trained(folder), read_checkpoint(path)
    plan = plan_of_checkpoint(trained, checkpoint)
    if plan != bundle.plan:
        raise ExportError(f"fold {fold}: the bundle's plan was changed since it came from nnU-Net; import it again")
    ours = _inner(bundle)
    axes = network_axes(trained.plans, plan.unet.dimensions)
    again = weights_from_nnunet(checkpoint.weights, ours.state_dict(), plan.unet, axes=axes, source=str(path))
    shape = tuple(n for axis, n in enumerate(plan.patch_shape) if axis != plan.slice_axis)
    patch = torch.randn(1, plan.unet.in_channels, *shape, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = ours(patch)
        found = torch.func.functional_call(ours, again, (patch,))
    smallest = torch.finfo(expected.dtype).tiny  # a network may give zeros alone
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(smallest))


def _inner(bundle: ModelBundle) -> nn.Module:
    """The network itself, which in 2D is wrapped."""
    return bundle.network.network if isinstance(bundle.network, SliceNetwork) else bundle.network
