"""Files in, files out: what `volseg predict` does around `predict`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipeline.console import Console
from pipeline.dataset import Failure
from pipeline.errors import RunError, VolsegError, VolumeError
from pipeline.evaluate import SCHEMA_FILE
from pipeline.export import FORMATS, ExportedFile, Source, check_formats, export
from pipeline.files import safe_name, write_json, write_text
from pipeline.manifest import Channel, load_dataset
from pipeline.manifest_formats import VOLUME_SUFFIXES, volume_stem
from pipeline.plan import ChannelPlan
from pipeline.predict import Model, predict
from pipeline.results import RECORD, record_sources
from transforms.dicom import read_series
from transforms.dicom_header import is_dicom
from transforms.labels import LabelSchema
from transforms.volume import Volume, read_volume


@dataclass(frozen=True)
class Study:
    """One thing to segment: its name for results, and a path a channel."""

    name: str
    paths: tuple[Path, ...]


@dataclass(frozen=True)
class SegmentSettings:
    """How results are made. `mirror` None takes what the bundle says; `resample_uneven` as in `read_volume`."""

    formats: tuple[str, ...]
    mirror: bool | None
    series: str | None
    force: bool
    resample_uneven: bool = False


def find_studies(inputs: Sequence[Path], *, channels: Sequence[ChannelPlan], root: Path | None = None) -> list[Study]:
    """What the inputs stand for: volume files, folders of them, DICOM folders, manifests.

    In a folder of files with nnU-Net's channel suffixes (_0000, _0001) those of a case belong together. A
    manifest names its channels, so they are put in the order of the model's `channels`.

    Raises:
        VolumeError: a path is missing or holds nothing to segment, two studies would have one name, or the
            channels of a manifest are not the model's.
    """
    studies = [study for path in inputs for study in _studies_at(path, channels, root)]
    names = [study.name for study in studies]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise VolumeError(f"two inputs would be named {twice[0]} in the output; predict them into different folders")
    return studies


def segment_studies(
    model: Model, studies: Sequence[Study], out: Path, *, settings: SegmentSettings, console: Console
) -> tuple[list[ExportedFile], list[Failure]]:
    """Segment every study into `out`; one that fails is set aside and named, the others go on.

    Results that this model made before are kept unless `force`.

    Raises:
        RunError: `out` holds another model's results, or cannot be written.
    """
    check_formats(settings.formats)
    mirror = model.mirror if settings.mirror is None else settings.mirror
    record = _open_record(out, model, mirror=mirror, force=settings.force)
    write_text(out / SCHEMA_FILE, model.schema.model_dump_json(indent=2) + "\n")
    written: list[ExportedFile] = []
    failures: list[Failure] = []
    for done, study in enumerate(studies, start=1):
        if _is_kept(record, study, out, settings.formats):
            console.note(f"{study.name} was segmented by this model before, kept; give --force to do it again")
        else:
            try:
                files = _segment(model, study, out, mirror=mirror, settings=settings)
                written += files
                record["studies"][study.name] = sorted(f.format for f in files)
                write_json(out / RECORD, record)
                record_sources(out, study.name, study.paths)
            except RunError:
                raise
            except VolsegError as error:
                # What only the voxels tell is told without a path by `predict`, which knows none.
                known = any(str(path) in str(error) for path in study.paths)
                failures.append(Failure(study.name, str(error) if known else f"{study.paths[0]}: {error}"))
        console.progress("segmenting", done, len(studies), study.name)
    return written, failures


def _segment(model: Model, study: Study, out: Path, *, mirror: bool, settings: SegmentSettings) -> list[ExportedFile]:
    sources = [
        read_source(path, series=settings.series, resample_uneven=settings.resample_uneven) for path in study.paths
    ]
    device = next(model.bundles[0].network.parameters()).device
    segmentation = predict(model, [s.image for s in sources], mirror=mirror, device=device)
    return export(segmentation, formats=settings.formats, out=out, name=study.name, source=sources[0])


def read_source(path: Path, *, series: str | None, resample_uneven: bool = False) -> Source:
    """The image at a path, and its DICOM series where it is one.

    Raises:
        VolumeError: see `transforms.load.read_volume`.
    """
    if not path.is_dir() and (not path.exists() or not is_dicom(path)):
        return Source(read_volume(path))
    voxels, geometry, chosen = read_series(path, series=series, resample_uneven=resample_uneven)
    return Source(Volume(voxels, geometry, chosen.modality or None, chosen.background), chosen)


def schema_for(labels: Path, given: Path | None) -> LabelSchema | None:
    """The schema of a label map: of a manifest or `labels.json` that is given, else of the one beside it, if any.

    Raises:
        ManifestError: what is given is neither.
    """
    path = given or labels.parent / SCHEMA_FILE
    if given is None and not path.is_file():
        return None
    try:
        return LabelSchema.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return load_dataset(path).manifest.labels


def _studies_at(path: Path, channels: Sequence[ChannelPlan], root: Path | None) -> list[Study]:
    channel_count = len(channels)
    if not path.exists():
        raise VolumeError(f"{path}: no such file or folder")
    if path.suffix == ".json" or (path / "dataset.json").is_file():
        dataset = load_dataset(path, root)
        order = _channel_order(dataset.manifest.channels, channels, path)
        images = [(case.case_id, dataset.image_paths(case)) for case in dataset.manifest.cases]
        return [Study(case_id, tuple(paths[n] for n in order)) for case_id, paths in images]
    if path.is_file():
        if channel_count > 1:
            raise VolumeError(
                f"{path}: one file, the model wants {channel_count} channels; give the folder of NAME_0000, NAME_0001 "
                "and so on, or a manifest"
            )
        return [Study(safe_name(volume_stem(path)), (path,))]
    files = sorted(p for p in path.iterdir() if p.is_file() and p.name.lower().endswith(VOLUME_SUFFIXES))
    if not any(p.is_file() for p in path.rglob("*")):
        raise VolumeError(f"{path}: no file in this folder; expected a DICOM series or {', '.join(VOLUME_SUFFIXES)}")
    if not files:
        # No volume files, so the folder is a DICOM series; the reader says what is wrong if it is not.
        return [Study(safe_name(path.resolve().name), (path,))]
    if channel_count == 1 and not all(volume_stem(p).endswith("_0000") for p in files):
        return [Study(safe_name(volume_stem(p)), (p,)) for p in files]
    return _grouped(files, channel_count, path)


def _channel_order(found: Sequence[Channel], wanted: Sequence[ChannelPlan], source: Path) -> list[int]:
    """Where each of the model's channels stands in a manifest; several are told apart by name, a single one fits."""
    names = [channel.name.casefold() for channel in found]
    if len(wanted) == len(found) == 1:
        order = [0]
    elif sorted(names) == sorted(channel.name.casefold() for channel in wanted):
        order = [names.index(channel.name.casefold()) for channel in wanted]
    else:
        order = []
    if not order or any(found[n].modality != c.modality for n, c in zip(order, wanted, strict=True)):
        here, there = (", ".join(f"{c.name} ({c.modality})" for c in side) for side in (found, wanted))
        raise VolumeError(f"{source}: its channels are {here}, the model wants {there}; choose the model for these")
    return order


def _grouped(files: Sequence[Path], channel_count: int, folder: Path) -> list[Study]:
    groups: dict[str, dict[str, Path]] = {}
    for file in files:
        stem, _, channel = volume_stem(file).rpartition("_")
        if not (channel.isdigit() and len(channel) == 4 and stem):
            raise VolumeError(f"{file}: expected a channel number at the end of the name, as in case_0000.nii.gz")
        groups.setdefault(stem, {})[channel] = file
    wanted = [f"{n:04d}" for n in range(channel_count)]
    for stem, found in groups.items():
        if sorted(found) != wanted:
            raise VolumeError(f"{folder}: {stem} has the channels {sorted(found)}, the model wants {wanted}")
    return [Study(safe_name(stem), tuple(found[c] for c in wanted)) for stem, found in sorted(groups.items())]


def _open_record(out: Path, model: Model, *, mirror: bool, force: bool) -> dict[str, Any]:
    record: dict[str, Any] = {"model": [b.digest for b in model.bundles], "mirror": mirror, "studies": {}}
    path = out / RECORD
    if not path.exists():
        return record
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(before, dict):
            raise TypeError
    except (OSError, ValueError, TypeError):
        before = {}
    if force:
        return record
    if before.get("model") != record["model"] or before.get("mirror") != mirror:
        raise RunError(f"{out}: holds results of another model or setting; choose another --out, or give --force")
    return {**record, "studies": dict(before.get("studies", {}))}


def _is_kept(record: dict[str, Any], study: Study, out: Path, formats: Sequence[str]) -> bool:
    """Recorded, and not taken away since."""
    if not set(formats) <= set(record["studies"].get(study.name, [])):
        return False
    return all((out / f"{study.name}{FORMATS[name].suffix}").exists() for name in formats)
