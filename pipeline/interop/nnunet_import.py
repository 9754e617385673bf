"""A trained nnU-Net v2 model as volseg bundles, one a fold; nothing of nnU-Net is imported or run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.bundle import BundleFacts, refuse_to_replace, save_bundle
from pipeline.errors import BundleError
from pipeline.files import atomic_folder, safe_name
from pipeline.interop.nnunet_checkpoint import NnunetCheckpoint, read_checkpoint
from pipeline.interop.nnunet_folder import ALL, TrainedFolder, checkpoints_of, open_trained, unfinished
from pipeline.interop.nnunet_network import (
    BATCH_STATISTICS,
    architecture,
    spec_of_nnunet,
    turned,
    weights_from_nnunet,
)
from pipeline.interop.nnunet_plan import axes_of_nnunet, configuration_of, plan_of_nnunet, schema_of_nnunet
from pipeline.interop.nnunet_trainers import builds_as_planned
from pipeline.models.cost import patch_flops, step_gb, weight_count
from pipeline.models.registry import build_network
from pipeline.models.shape import Shape, receptive_field
from pipeline.models.slices import as_volume_network
from pipeline.models.spec import UNetSpec
from pipeline.plan import Plan
from pipeline.provenance import provenance_tags

TILE_STEP = 0.5
"""Of nnU-Net's predictor."""

LARGEST_GROWTH = 2
"""By which a network may have more weights than its checkpoint, which can leave out some of normalisations."""

SECTION = "nnunet"
"""Key in an imported bundle's config (JSON, which is YAML) of what the model was trained with."""


def import_nnunet(
    folder: Path,
    out: Path,
    *,
    folds: Sequence[str] | None = None,
    configuration: str | None = None,
    as_planned: bool = False,
    force: bool = False,
) -> list[Path]:
    """Write the bundle of a model of one fold to `out`, those of several to `out`/fold_N/bundle; their paths.

    `folds` as in `checkpoints_of`, `configuration` as in `open_trained`. Where the training of folds did not end, the
    bundles' provenance says which were left out or taken as they were at their best. `as_planned` says of a trainer
    that is not known here that its network is the one of the plans.

    Raises:
        BundleError: `folder` is no trained model, has what cannot be imported, or comes from a trainer whose network
            is not known; it is named.
        PlanError: its plans ask for preprocessing that is not known here.
        RunError: `out` exists and `force` was not given, or cannot be written.
    """
    trained = open_trained(folder, configuration)
    chosen = checkpoints_of(trained, folds)
    refuse_to_replace(out)
    places = {fold: "." if len(chosen) == 1 else f"fold_{fold}/bundle" for fold in chosen}
    note = unfinished(trained, chosen, asked=folds is not None)
    plan: Plan | None = None
    with atomic_folder(out, force=force) as temporary:
        for fold, path in chosen.items():
            checkpoint = read_checkpoint(path)
            if configuration not in (None, checkpoint.configuration):
                raise BundleError(f"{path}: trained as '{checkpoint.configuration}', expected '{configuration}'")
            if not as_planned:
                _check_trainer(checkpoint, path)
            plan = plan or plan_of_checkpoint(trained, checkpoint)
            provenance = _provenance(trained, checkpoint, path) | ({"nnunet_unfinished": note} if note else {})
            _save(temporary / places[fold], trained, checkpoint, plan=plan, checkpoint_path=path, origin=provenance)
    return [out / place for place in places.values()]


def plan_of_checkpoint(trained: TrainedFolder, checkpoint: NnunetCheckpoint) -> Plan:
    """The whole plan: preprocessing from the plans, the network from them and from what the trainer made of it.

    Raises:
        BundleError, PlanError: see `import_nnunet`.
    """
    fields = plan_of_nnunet(trained.plans, trained.dataset, checkpoint.configuration)
    unet = _spec(trained, checkpoint)
    shape = tuple(n for axis, n in enumerate(fields["patch_shape"]) if axis != fields["slice_axis"])
    try:
        costs = {
            "memory_gb": step_gb("unet", unet, shape, fields["batch_size"]),
            "patch_gflop": patch_flops("unet", unet, shape) / 1e9,
        }
    except ValueError as error:
        raise BundleError(f"{trained.path}: patch_size and network do not fit: {error}") from error
    seen_mm = _seen_mm(unet, fields["spacing_mm"], fields["slice_axis"])
    network = {"network": "unet", "unet": unet, "receptive_field_mm": seen_mm}
    return Plan(**(fields | costs | network | {"mirror_axes": _mirror_axes(trained, checkpoint)}))


def network_axes(plans: dict[str, Any], dimensions: int) -> tuple[int, ...]:
    """For each axis of our network the one of nnU-Net's: its own, after slices were left out."""
    files = axes_of_nnunet(plans)[3 - dimensions :]
    return tuple(files.index(axis) for axis in sorted(files))


def _spec(trained: TrainedFolder, checkpoint: NnunetCheckpoint) -> UNetSpec:
    source = str(trained.path / "plans.json")
    name, arguments = architecture(configuration_of(trained.plans, checkpoint.configuration), source)
    channels = trained.dataset.get("channel_names", trained.dataset.get("modality", {}))
    spec = spec_of_nnunet(
        name,
        arguments,
        channels=(len(channels), schema_of_nnunet(trained.dataset).output_count),
        source=source,
        batch_normalised=any(key.endswith(BATCH_STATISTICS) for key in checkpoint.weights),
    )
    return turned(spec, network_axes(trained.plans, spec.dimensions))


def _mirror_axes(trained: TrainedFolder, checkpoint: NnunetCheckpoint) -> tuple[int, ...]:
    """Ours of the volume, from those of nnU-Net's network, which in 2D has no axis across slices."""
    chosen = configuration_of(trained.plans, checkpoint.configuration)
    files = axes_of_nnunet(trained.plans)[3 - len(chosen["patch_size"]) :]
    if any(axis not in range(len(files)) for axis in checkpoint.mirror_axes):
        raise BundleError(f"{trained.path}: mirror axes {checkpoint.mirror_axes} of a network of {len(files)} axes")
    return tuple(sorted(files[axis] for axis in checkpoint.mirror_axes))


def _seen_mm(unet: UNetSpec, spacing_mm: Sequence[float], slice_axis: int | None) -> tuple[float, ...]:
    field: Shape = receptive_field(unet)
    if slice_axis is not None:
        field = (*field[:slice_axis], 1, *field[slice_axis:])
    return tuple(voxels * mm for voxels, mm in zip(field, spacing_mm, strict=True))


def _check_trainer(checkpoint: NnunetCheckpoint, path: Path) -> None:
    if not builds_as_planned(checkpoint.trainer):
        raise BundleError(
            f"{path}: trainer_name: found '{checkpoint.trainer}', expected a trainer of nnU-Net v2 that builds the "
            "network of its plans; what this one builds is not known, and weights do not tell; if you know that it "
            "builds the same network, give --as-planned"
        )


def _check_size(plan: Plan, checkpoint: NnunetCheckpoint, path: Path) -> None:
    """Raise BundleError before a network is built that is far larger than the checkpoint, however large that is."""
    planned, found = weight_count(plan.network, plan.unet), sum(value.numel() for value in checkpoint.weights.values())
    if planned > LARGEST_GROWTH * found:
        raise BundleError(
            f"{path}: found {found} weights, expected {planned} for the network of plans.json; they are of another "
            "training, or its arch_kwargs are wrong"
        )


def _save(
    place: Path,
    trained: TrainedFolder,
    checkpoint: NnunetCheckpoint,
    *,
    plan: Plan,
    checkpoint_path: Path,
    origin: dict[str, Any],
) -> None:
    _check_size(plan, checkpoint, checkpoint_path)
    shape = tuple(n for axis, n in enumerate(plan.patch_shape) if axis != plan.slice_axis)
    network = build_network(plan.network, plan.unet, shape)
    axes = network_axes(trained.plans, plan.unet.dimensions)
    weights = weights_from_nnunet(
        checkpoint.weights, network.state_dict(), plan.unet, axes=axes, source=str(checkpoint_path)
    )
    network.load_state_dict(weights, strict=True)
    fold = checkpoint_path.parent.name.removeprefix("fold_")
    facts = BundleFacts(
        name=safe_name(f"{trained.plans.get('dataset_name', 'nnunet')}_{checkpoint.configuration}"),
        fold=int(fold) if fold != ALL else None,
        mirror=bool(plan.mirror_axes),
        tile_step=TILE_STEP,
        plan=plan,
        schema=schema_of_nnunet(trained.dataset),
        config_yaml=_config(trained, checkpoint),
        provenance={**provenance_tags(), **origin},
    )
    save_bundle(place, as_volume_network(network, plan.slice_axis).state_dict(), facts)


def _provenance(trained: TrainedFolder, checkpoint: NnunetCheckpoint, path: Path) -> dict[str, Any]:
    return {
        "imported_from": "nnU-Net v2",
        "nnunet_dataset": trained.plans.get("dataset_name"),
        "nnunet_plans": trained.plans.get("plans_name"),
        "nnunet_configuration": checkpoint.configuration,
        "nnunet_trainer": checkpoint.trainer,
        "nnunet_epochs": checkpoint.epochs,
        "nnunet_checkpoint": f"{path.parent.name}/{path.name}",
        "nnunet_checkpoint_sha256": checkpoint.sha256,
    }


def _config(trained: TrainedFolder, checkpoint: NnunetCheckpoint) -> str:
    """What the model was trained with, of the one configuration; the export to nnU-Net gives it back."""
    chosen = {
        k: v for k, v in configuration_of(trained.plans, checkpoint.configuration).items() if k != "inherits_from"
    }
    section = {
        "configuration": checkpoint.configuration,
        "trainer": checkpoint.trainer,
        "plans": trained.plans | {"configurations": {checkpoint.configuration: chosen}},
        "dataset": trained.dataset,
    }
    return json.dumps({SECTION: section}, indent=2, ensure_ascii=False) + "\n"
