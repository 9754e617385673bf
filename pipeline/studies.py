"""What `volseg predict` is to segment: the studies that its inputs stand for."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.console import Console
from pipeline.errors import VolumeError
from pipeline.files import safe_name
from pipeline.manifest import Channel, load_dataset
from pipeline.manifest_formats import VOLUME_SUFFIXES, volume_stem
from pipeline.plan import ChannelPlan
from transforms.dicom import DicomSeries, choose_series
from transforms.dicom_header import is_dicom
from transforms.dicom_index import index_folder

EVERY_SERIES = "all"
"""In place of one series' number or identifier: each image volume of a DICOM tree is a study."""

_LONGEST_PART = 40


@dataclass(frozen=True, eq=False)
class Study:
    """One thing to segment: its name for results, and a path a channel.

    `series` is set where one of several volumes of a DICOM tree is meant, readable or not.
    """

    name: str
    paths: tuple[Path, ...]
    series: DicomSeries | None = None


@dataclass(frozen=True)
class Wanted:
    """How inputs are understood.

    `channels` are the model's, `root` is where a manifest's paths start from, `series` and `resample_uneven` as in
    `read_volume`; `series` may be `EVERY_SERIES`.
    """

    channels: Sequence[ChannelPlan]
    root: Path | None = None
    series: str | None = None
    resample_uneven: bool = False


def find_studies(inputs: Sequence[Path], wanted: Wanted, *, console: Console) -> list[Study]:
    """What the inputs stand for: volume files, folders of them, DICOM folders, manifests.

    In a folder of files with nnU-Net's channel suffixes (_0000, _0001) those of a case belong together. A
    manifest names its channels, so they are put in the order of the model's. With `EVERY_SERIES` a DICOM tree is
    indexed here, once, and each image volume in it is a study.

    Raises:
        VolumeError: a path is missing or holds nothing to segment, two studies would have one name, or the
            channels of a manifest are not the model's.
    """
    studies = [study for path in inputs for study in _studies_at(path, wanted, console)]
    twice = sorted(name for name, count in Counter(study.name for study in studies).items() if count > 1)
    if twice:
        raise VolumeError(f"two inputs would be named {twice[0]} in the output; predict them into different folders")
    return studies


def _studies_at(path: Path, wanted: Wanted, console: Console) -> list[Study]:
    channel_count = len(wanted.channels)
    if not path.exists():
        raise VolumeError(f"{path}: no such file or folder")
    if path.suffix == ".json" or (path / "dataset.json").is_file():
        dataset = load_dataset(path, wanted.root)
        order = _channel_order(dataset.manifest.channels, wanted.channels, path)
        images = [(case.case_id, dataset.image_paths(case)) for case in dataset.manifest.cases]
        return [Study(case_id, tuple(paths[n] for n in order)) for case_id, paths in images]
    if path.is_file():
        if channel_count > 1:
            raise VolumeError(
                f"{path}: one file, the model wants {channel_count} channels; give the folder of NAME_0000, NAME_0001 "
                "and so on, or a manifest"
            )
        if wanted.series == EVERY_SERIES and is_dicom(path):
            return _every_series(path, wanted, console)
        return [Study(safe_name(path.stem if path.suffix.lower() == ".dcm" else volume_stem(path)), (path,))]
    files = sorted(p for p in path.iterdir() if p.is_file() and p.name.lower().endswith(VOLUME_SUFFIXES))
    if not any(p.is_file() for p in path.rglob("*")):
        raise VolumeError(f"{path}: no file in this folder; expected a DICOM series or {', '.join(VOLUME_SUFFIXES)}")
    if not files and wanted.series == EVERY_SERIES:
        return _every_series(path, wanted, console)
    if not files:
        # No volume files, so the folder is a DICOM series; the reader says what is wrong if it is not.
        return [Study(safe_name(path.resolve().name), (path,))]
    if channel_count == 1 and not all(volume_stem(p).endswith("_0000") for p in files):
        return [Study(safe_name(volume_stem(p)), (p,)) for p in files]
    return _grouped(files, channel_count, path)


def _every_series(path: Path, wanted: Wanted, console: Console) -> list[Study]:
    """The image volumes of a tree, and what is damaged in it; planning images and other objects are passed over."""
    if len(wanted.channels) > 1:
        raise VolumeError(
            f"{path}: --series {EVERY_SERIES} takes each series for a study, the model wants {len(wanted.channels)} "
            "channels in one; give a manifest that says which belong together"
        )
    listed = index_folder(
        path,
        resample_uneven=wanted.resample_uneven,
        progress=lambda done, total: console.progress("reading headers", done, total),
    ).series
    images = [series for series in listed if series.is_image and not series.is_localizer]
    if not images:
        # Its refusal lists what there is instead; planning images alone are tried, and refused by name.
        images = [choose_series(listed, series=None, folder=path)]
    damaged = [series for series in listed if not series.slices]
    others = [series for series in listed if series not in images and series.slices]
    if others:
        kinds = sorted({"planning images" if s.is_localizer else s.modality or "no modality" for s in others})
        console.note(f"{path}: passed over {len(others)} series without volumes ({', '.join(kinds)})")
    return [_study_of(series, path) for series in [*images, *damaged]]


def _study_of(series: DicomSeries, path: Path) -> Study:
    folders = {str(file.parent) for file in series.paths}
    return Study(_name_of(series, path), (Path(os.path.commonpath(folders)) if folders else path,), series)


def _name_of(series: DicomSeries, path: Path) -> str:
    """Readable, the same whenever the same slices are read, and another for any other slices.

    Folders below the input may be called after patients, so they are left out.
    """
    number = "" if series.series_number is None else str(series.series_number)
    said = (volume_stem(path.resolve()), number, series.modality, series.description, series.stack)
    words = [safe_name(part)[:_LONGEST_PART].strip("_") for part in said if part]
    slices = sorted((header.sop_uid or header.path.name, header.frame or 0) for header in series.slices)
    digest = hashlib.sha256(repr((series.series_uid, slices)).encode()).hexdigest()
    return "_".join([*filter(None, words), digest[:8]])


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
