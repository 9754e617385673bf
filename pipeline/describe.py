"""What a file or folder is, as a title and rows of facts; never whose it is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import VolumeError

if TYPE_CHECKING:
    from pipeline.manifest import Channel, Manifest
    from pipeline.plan import Plan

Facts = tuple[str, list[dict[str, Any]]]


SHOWN_CHOICES = (
    "dimensions", "block", "normalisation", "skip", "upsampling", "bottleneck", "deep_supervision", "drop_path",
    "weight_standardisation", "stem_channels", "decoder_block",
)  # fmt: skip
"""Of a network's choices, those that are told where they are not the usual ones."""


AS_STORED = "as each study is stored: right only for studies stored as those of the training were"


def facts_of(path: Path, *, resample_uneven: bool = False) -> Facts:
    """Facts of a model, a run, a manifest, a DICOM folder or a volume; `resample_uneven` as in `read_volume`.

    Raises:
        VolsegError: it is none of these, or cannot be read.
    """
    if not path.exists():
        raise VolumeError(f"{path}: no such file or folder")
    if not path.is_dir():
        return _manifest(path) if path.suffix == ".json" else _volume(path, resample_uneven)
    # Only folders can be models and runs, whose modules take seconds to load.
    from pipeline.bundle import is_bundle
    from pipeline.runs import DATASET

    if is_bundle(path):
        return _bundle(path)
    if is_bundle(path / "bundle"):
        return _bundle(path / "bundle")
    return _run(path) if (path / DATASET).is_file() else _dicom(path, resample_uneven)


def _bundle(path: Path) -> Facts:
    from pipeline.bundle import load_bundle
    from pipeline.postprocessing import described

    bundle = load_bundle(path)
    plan, index = bundle.plan, bundle.index
    rows = {
        "channels": ", ".join(channel.described for channel in plan.channels),
        "labels": ", ".join(f"{x.id} {x.name}" for x in bundle.schema.labels),
        "fold": "-" if index.fold is None else str(index.fold),
        **({"regions": ", ".join(region.name for region in bundle.schema.regions)} if bundle.schema.regions else {}),
        "network": _network(plan),
        "parameters": f"{sum(p.numel() for p in bundle.network.parameters()):,}",
        f"spacing (mm, {_axes(plan)})": " x ".join(f"{s:g}" for s in plan.spacing_mm),
        "patch": " x ".join(map(str, plan.patch_shape)),
        **({"axes": AS_STORED} if plan.takes_stored_axes else {}),
        "post-processing": described(bundle.postprocessing.actions) if bundle.postprocessing else "none",
        **{f"made with {k}": str(v) for k, v in index.provenance.items()},
        "weights sha256": bundle.digest,
    }
    return f"model bundle '{index.name}'", _rows(rows)


def _network(plan: Plan) -> str:
    """Its name, its width, and what is not as usual; of a network from MONAI all that it was given."""
    if plan.monai is not None:
        given = [f"{name} {value}" for name, value in plan.monai.arguments.items()]
        return ", ".join([f"{plan.monai.name} of MONAI", *given])
    usual = type(plan.unet).model_fields
    said = {name: getattr(plan.unet, name) for name in SHOWN_CHOICES}
    unusual = [f"{n.replace('_', ' ')} {v}" for n, v in said.items() if v != usual[n].default]
    return ", ".join([plan.network, "features " + " ".join(map(str, plan.unet.features)), *unusual])


def _axes(plan: Plan) -> str:
    """Which axes the sizes of a model are along."""
    return "axes as stored" if plan.takes_stored_axes else f"{plan.axis_codes} axes"


def _run(path: Path) -> Facts:
    from pipeline.folds import read_folds
    from pipeline.report_values import REPORT_JSON, read_report
    from pipeline.runs import DONE, FOLDS, read_done

    folds = read_folds(path / FOLDS)
    rows = {"cases": str(len(folds.cases)), "folds": str(folds.count)}
    for fold in range(folds.count):
        folder = path / f"fold_{fold}"
        rows[f"fold {fold}"] = "not finished"
        if (folder / DONE).is_file():
            done, report = read_done(folder), read_report(folder / REPORT_JSON)
            means = [*((row.label, row.mean) for row in report.summaries), ("mean", report.overall.mean)]
            dice = ", ".join(f"{label} {mean:.3f}" for label, mean in means if mean is not None)
            rows[f"fold {fold}"] = f"{done['steps']} steps in {done['seconds'] / 60:.1f} minutes; Dice {dice}"
    return f"run '{path.name}'", _rows(rows)


def _manifest(path: Path) -> Facts:
    from pipeline.manifest import load_dataset

    dataset = load_dataset(path)
    manifest = dataset.manifest
    rows = {
        "description": manifest.description,
        "source": manifest.source,
        "licence": manifest.licence,
        "channels": ", ".join(_channel_of(manifest, channel) for channel in manifest.channels),
        "labels": ", ".join(f"{x.id} {x.name}" for x in manifest.labels.labels),
        "cases": str(len(manifest.cases)),
        "annotated": str(sum(case.label is not None for case in manifest.cases)),
        "patients": str(len({case.patient_id for case in manifest.cases})),
        "root": str(dataset.root),
    }
    return f"manifest '{manifest.name}'", _rows(rows)


def _channel_of(manifest: Manifest, channel: Channel) -> str:
    if not channel.optional:
        return f"{channel.name} ({channel.modality})"
    count = sum(channel.name in case.images for case in manifest.cases)
    return f"{channel.name} ({channel.modality}, optional, {count} of {len(manifest.cases)} cases have it)"


def _dicom(path: Path, resample_uneven: bool) -> Facts:
    from pipeline.dicom_listing import listing_rows, summary
    from transforms.dicom_index import index_folder

    index = index_folder(path, resample_uneven=resample_uneven)
    if not index.series:
        raise VolumeError(f"{path}: neither a model, a run nor a folder with DICOM files")
    rows = [
        {
            "no.": row.numbers,
            "modality": row.modality,
            "description": row.description,
            "size": row.size,
            "spacing (mm)": row.spacing_mm,
            "plane": row.orientation,
            "usable": {True: "yes", False: "no", None: "not an image"}[row.is_usable],
            "findings": "; ".join(row.problems or row.findings) or "none",
            "series": row.series_uid,
        }
        for row in listing_rows(index)
    ]
    return f"DICOM in {path.name}, {summary(index)}", rows


def _volume(path: Path, resample_uneven: bool) -> Facts:
    from transforms.volume import read_volume

    volume = read_volume(path, resample_uneven=resample_uneven)
    rows = {
        "grid": volume.geometry.describe(),
        "extent": " x ".join(f"{x:.1f}" for x in volume.geometry.extent_mm) + " mm",
        "intensities": f"{float(volume.voxels.min()):g} to {float(volume.voxels.max()):g}",
        "modality": volume.modality or "not said by the file",
    }
    return f"volume {path.name}", _rows(rows)


def _rows(values: dict[str, str]) -> list[dict[str, Any]]:
    return [{"what": key, "value": value} for key, value in values.items()]
