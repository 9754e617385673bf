"""What `volseg predict` is to segment: the studies that its inputs stand for."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.console import Console
from pipeline.errors import VolumeError
from pipeline.files import safe_name
from pipeline.manifest import Channel, Dataset, load_dataset
from pipeline.manifest_formats import VOLUME_SUFFIXES, volume_stem
from pipeline.plan import ChannelPlan
from transforms.dicom_magic import is_dicom

if TYPE_CHECKING:
    from transforms.dicom import DicomSeries

EVERY_SERIES = "all"
"""In place of one series' number or identifier: each image volume of a DICOM tree is a study."""

_LONGEST_PART = 40


@dataclass(frozen=True, eq=False)
class Study:
    """One thing to segment: its name for results, and a path a channel, but for those that are `missing` by name.

    `series` is set where one of several volumes of a DICOM tree is meant, readable or not.
    """

    name: str
    paths: tuple[Path, ...]
    series: DicomSeries | None = None
    missing: tuple[str, ...] = ()


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

    Of files with nnU-Net's channel suffixes (_0000, _0001), given one by one or as a folder, those of a case belong
    together. A manifest names its channels, so they are put in the order of the model's. With `EVERY_SERIES` a DICOM
    tree is indexed here, once, and each image volume in it is a study. A file or DICOM folder that does not say which
    channel it is, is the only one that the model cannot do without. Studies may lack channels, needed ones as well:
    `pipeline.predict.refuse_missing` judges each.

    Raises:
        VolumeError: a path is missing or holds nothing to segment, two studies would have one name, two files are
            of one case and channel, or the channels of a manifest are not the model's.
    """
    numbered = [path for path in inputs if len(wanted.channels) > 1 and path.is_file() and _channel_file(path)]
    studies = _grouped(numbered, wanted.channels)
    studies += [study for path in inputs if path not in numbered for study in _studies_at(path, wanted, console)]
    twice = sorted(name for name, count in Counter(study.name for study in studies).items() if count > 1)
    if twice:
        raise VolumeError(f"two inputs would be named {twice[0]} in the output; predict them into different folders")
    return studies


def _studies_at(path: Path, wanted: Wanted, console: Console) -> list[Study]:
    channel_count = len(wanted.channels)
    if not path.exists():
        raise VolumeError(f"{path}: no such file or folder")
    if path.suffix == ".json" or (path / "dataset.json").is_file():
        return _cases_of(load_dataset(path, wanted.root), wanted.channels, path)
    if path.is_file():
        missing = _beside_the_only_one(wanted.channels)
        if missing is None:
            raise VolumeError(
                f"{path}: one file, the model wants {channel_count} channels; give the folder of NAME_0000, NAME_0001 "
                "and so on, or a manifest"
            )
        if wanted.series == EVERY_SERIES and is_dicom(path):
            return _every_series(path, wanted, console)
        name = safe_name(path.stem if path.suffix.lower() == ".dcm" else volume_stem(path))
        return [Study(name, (path,), missing=missing)]
    files = sorted(p for p in path.iterdir() if p.is_file() and p.name.lower().endswith(VOLUME_SUFFIXES))
    if not any(p.is_file() for p in path.rglob("*")):
        raise VolumeError(f"{path}: no file in this folder; expected a DICOM series or {', '.join(VOLUME_SUFFIXES)}")
    if not files and wanted.series == EVERY_SERIES:
        return _every_series(path, wanted, console)
    if not files:
        # No volume files, so the folder is a DICOM series; the reader says what is wrong if it is not.
        return [Study(safe_name(path.resolve().name), (path,), missing=_beside_the_only_one(wanted.channels) or ())]
    if channel_count == 1 and not all(volume_stem(p).endswith("_0000") for p in files):
        return [Study(safe_name(volume_stem(p)), (p,)) for p in files]
    return _grouped(files, wanted.channels)


def _every_series(path: Path, wanted: Wanted, console: Console) -> list[Study]:
    """The image volumes of a tree, and what is damaged in it; planning images and other objects are passed over."""
    if len(wanted.channels) > 1:
        raise VolumeError(
            f"{path}: --series {EVERY_SERIES} takes each series for a study, the model wants {len(wanted.channels)} "
            "channels in one; give a manifest that says which belong together"
        )
    from transforms.dicom import choose_series
    from transforms.dicom_index import index_folder

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


def _cases_of(dataset: Dataset, wanted: Sequence[ChannelPlan], source: Path) -> list[Study]:
    order = _channel_order(dataset.manifest.channels, wanted, source)
    return [
        _study(case.case_id, [None if n is None else paths[n] for n in order], wanted)
        for case, paths in ((case, dataset.channel_paths(case)) for case in dataset.manifest.cases)
    ]


def _channel_order(found: Sequence[Channel], wanted: Sequence[ChannelPlan], source: Path) -> list[int | None]:
    """Where each of the model's channels stands in a manifest, if it does: by name, but a single one fits a single one.

    A manifest may do without channels that the model can do without, but has no others. Where the model's modality is
    unknown, any fits.
    """
    places: dict[str, int | None] = {channel.name.casefold(): n for n, channel in enumerate(found)}
    order = [places.get(channel.name.casefold()) for channel in wanted]
    if len(wanted) == len(found) == 1:
        order = [0]
    pairs = [(None if n is None else found[n], channel) for n, channel in zip(order, wanted, strict=True)]
    fits = all(c.optional if f is None else c.modality in (None, f.modality) for f, c in pairs)
    if not fits or len(found) > len({n for n in order if n is not None}):
        here = ", ".join(f"{c.name} ({c.modality})" for c in found)
        there = ", ".join(channel.described for channel in wanted)
        raise VolumeError(f"{source}: its channels are {here}, the model wants {there}; choose the model for these")
    return order


def _study(name: str, paths: Sequence[Path | None], wanted: Sequence[ChannelPlan]) -> Study:
    """`paths` are one a channel of the model, None where it is missing."""
    missing = tuple(channel.name for path, channel in zip(paths, wanted, strict=True) if path is None)
    return Study(name, tuple(path for path in paths if path is not None), missing=missing)


def _beside_the_only_one(wanted: Sequence[ChannelPlan]) -> tuple[str, ...] | None:
    """The model's other channels, where an image can only be of one of them; None where it could be of several."""
    needed = [channel.name for channel in wanted if not channel.optional]
    if len(wanted) == 1:
        return ()
    return tuple(channel.name for channel in wanted if channel.optional) if len(needed) == 1 else None


def _channel_file(path: Path) -> tuple[str, str] | None:
    """The case and the channel's four digits of a name such as case_0001.nii.gz; None for any other."""
    stem, _, number = volume_stem(path).rpartition("_")
    return (stem, number) if stem and number.isdecimal() and len(number) == 4 else None


def _grouped(files: Sequence[Path], wanted: Sequence[ChannelPlan]) -> list[Study]:
    groups: dict[tuple[Path, str], dict[str, Path]] = {}
    for file in files:
        split = _channel_file(file)
        if split is None:
            raise VolumeError(f"{file}: expected a channel number at the end of the name, as in case_0000.nii.gz")
        stem, number = split
        taken = groups.setdefault((file.parent, stem), {}).setdefault(number, file)
        if taken != file:
            raise VolumeError(
                f"two inputs would be named {safe_name(stem)} in the output: {taken} and {file} are both its channel "
                f"{number}; keep one of them, or predict them into different folders"
            )
    numbers = [f"{n:04d}" for n in range(len(wanted))]
    for (folder, stem), found in groups.items():
        absent = [number for number in numbers if number not in found]
        if set(found) - set(numbers) or any(not wanted[int(number)].optional for number in absent):
            raise VolumeError(f"{folder}: {stem} has the channels {sorted(found)}, the model wants {_told(wanted)}")
    return [
        _study(safe_name(stem), [found.get(number) for number in numbers], wanted)
        for (_, stem), found in sorted(groups.items())
    ]


def _told(wanted: Sequence[ChannelPlan]) -> str:
    if not any(channel.optional for channel in wanted):
        return str([f"{n:04d}" for n in range(len(wanted))])
    return ", ".join(f"{n:04d} = {channel.described}" for n, channel in enumerate(wanted))
