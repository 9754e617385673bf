"""A folder of DICOM files -> the volumes in it: slices in order, their grid, and what is wrong with them.

Headers only. Files that are no DICOM objects are set aside and counted; DICOM files that cannot be parsed condemn
the series that lie beside them, because one of their slices may be missing.
"""

from __future__ import annotations

import os
import secrets
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from transforms.dicom_checks import background_of
from transforms.dicom_findings import Finding, names, refuse
from transforms.dicom_header import Header, is_dicom, quiet_pydicom, read_headers
from transforms.dicom_stacks import Stack, is_localizer, stacks_of
from transforms.errors import DicomError, SeveralSeries
from transforms.geometry import Geometry

Progress = Callable[[int, int], None]
"""Told of files done, and of all files."""

NAMED_STACKS = 3
"""So many volumes of one series are named one by one in a message."""

_LISTED = 8
# What names begin with as long as they are being written, or of a process that was killed: as in pipeline.files.
_UNFINISHED = ".writing-"
# What has rows and columns and is no image to segment: doses and other radiotherapy objects (PS3.4 B.5).
_RADIOTHERAPY = "1.2.840.10008.5.1.4.1.1.481."


@dataclass(frozen=True, eq=False)
class DicomSeries:
    """One volume: a series of a folder, or one stack of it. `slices` are in order along the normal when `geometry`
    is known.

    `description` is the scanner's or the technician's free text about the protocol; it is no identity. `stack` is
    empty, or what sets the volume apart in its series, as 'echo 2'; `stack_number` counts those from 1.
    `patient_key` stands for the patient as long as the salt is the same. `slice_positions_k` is where each slice
    lies on the grid's k axis when the volume must be interpolated; None when the slices are the grid's planes.
    """

    series_uid: str
    study_uid: str
    modality: str
    description: str
    series_number: int | None
    slices: tuple[Header, ...]
    geometry: Geometry | None
    findings: tuple[Finding, ...]
    stack: str = ""
    stack_number: int = 1
    patient_key: str = ""
    slice_positions_k: tuple[float, ...] | None = None

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files in slice order; one of several frames is named for each."""
        return tuple(header.path for header in self.slices)

    @property
    def slice_count(self) -> int:
        """Slices that belong to the volume."""
        return len(self.slices)

    @property
    def background(self) -> float:
        """The value of voxels that were not measured."""
        return background_of(self.modality)

    @property
    def problems(self) -> tuple[Finding, ...]:
        """The findings that keep the series from being read; empty when it can be."""
        return tuple(finding for finding in self.findings if finding.outcome != "mend")

    @property
    def is_image(self) -> bool:
        """Whether it holds images to segment at all, readable or not."""
        pictures = any(header.rows and header.columns for header in self.slices)
        made = any(header.sop_class.startswith(_RADIOTHERAPY) for header in self.slices[:1])
        return pictures and not made and not any(finding.name == "segmentation" for finding in self.problems)

    @property
    def is_localizer(self) -> bool:
        """Whether it is made of planning images."""
        return bool(self.slices) and all(is_localizer(header) for header in self.slices)

    def describe(self) -> str:
        """One line: modality, description, stack, slices, identifier, and the first problem if there is one."""
        title = f"{self.modality or 'no modality'} '{self.description}'" if self.slices else "damaged files"
        stack = f" {self.stack}" if self.stack else ""
        problem = f" (not readable: {self.problems[0].name})" if self.problems else ""
        return f"{title}{stack}, {self.slice_count} slices, {self.series_uid or 'no SeriesInstanceUID'}{problem}"


@dataclass(frozen=True)
class SetAside:
    """A file that is no DICOM object, and why it is none."""

    path: Path
    reason: str


@dataclass(frozen=True, eq=False)
class FolderIndex:
    """What a folder holds: volumes in listing order, files set aside, and how many files there are in all."""

    series: tuple[DicomSeries, ...]
    set_aside: tuple[SetAside, ...]
    file_count: int


def index_series(folder: Path, *, resample_uneven: bool = False) -> list[DicomSeries]:
    """The volumes of `index_folder`."""
    return list(index_folder(folder, resample_uneven=resample_uneven).series)


def index_folder(
    folder: Path, *, resample_uneven: bool = False, salt: bytes | None = None, progress: Progress | None = None
) -> FolderIndex:
    """The volumes in a folder and the folders below it, or in one DICOM file, by patient, study, series and stack.

    Reads headers only. A series that cannot be read is listed with its problems; damaged files that lie beside no
    series are listed as a series without slices.

    Args:
        folder: a folder, searched with all below it, or one file.
        resample_uneven: put slices with uneven gaps on an even grid instead of refusing them.
        salt: what patient keys are hashed with; random when None. The order of the listing does not depend on it.
        progress: called now and then.

    Raises:
        DicomError: `folder` does not exist or cannot be listed.
    """
    read = _read_all(_files(folder), secrets.token_bytes(16) if salt is None else salt, progress)
    groups: defaultdict[tuple[object, ...], list[Header]] = defaultdict(list)
    for header in read.headers:
        groups[_series_key(header)].append(header)
    series = [volume for group in groups.values() for volume in _volumes(group, read.damaged, resample_uneven)]
    homes = {header.path.parent for header in read.headers}
    series += _orphans({path: why for path, why in read.damaged.items() if path.parent not in homes})
    return FolderIndex(tuple(_in_order(series)), tuple(read.set_aside), read.file_count)


def choose_series(listed: Sequence[DicomSeries], *, series: str | None, folder: Path) -> DicomSeries:
    """The one image volume, or the one that `series` names: its number in the listing (from 1), the beginning of its
    SeriesInstanceUID, or that with # and the number of the volume in the series.

    Planning images and single slices are never chosen by themselves where another image is.

    Raises:
        DicomError: none or several fit; the message lists the choices.
    """
    if series is None:
        if not any(candidate.is_image for candidate in listed):
            found = f"{_listing(listed)}; give the images that these belong to" if listed else "no DICOM files"
            raise DicomError(f"{folder}: no DICOM image series; found {found}")
        return _only_image(listed, listed, folder)
    if series.isdecimal() and 1 <= int(series) <= len(listed):
        return listed[int(series) - 1]
    beginning, _, number = series.partition("#")
    fitting = [candidate for candidate in listed if candidate.series_uid.startswith(beginning) and beginning]
    exact = [candidate for candidate in fitting if candidate.series_uid == beginning]
    fitting = exact or fitting
    count = len({candidate.series_uid for candidate in fitting})
    if count != 1:
        how_many = f"{count} series begin with" if count else "no series has the number or identifier"
        raise DicomError(f"{folder}: {how_many} '{series}': {_listing(listed) or 'no DICOM files'}")
    if not number:
        return fitting[0] if len(fitting) == 1 else _only_image(fitting, listed, folder)
    for candidate in fitting:
        if number == str(candidate.stack_number):
            return candidate
    raise DicomError(f"{folder}: the series has no volume #{number}, but {len(fitting)}: {_listing(listed)}")


def _only_image(candidates: Sequence[DicomSeries], listed: Sequence[DicomSeries], folder: Path) -> DicomSeries:
    images = [candidate for candidate in candidates if candidate.is_image] or list(candidates)
    likely = [image for image in images if not image.is_localizer] or images
    likely = [image for image in likely if image.slice_count > 1] or likely
    if len(likely) == 1:
        return likely[0]
    series = len({image.series_uid for image in images})
    patients = len({image.patient_key for image in images})
    found = (
        f"{len(images)} image series" if series == len(images) else f"{len(images)} volumes in {series} image series"
    )
    of_whom = f" of {patients} patients" if patients > 1 else ""
    raise SeveralSeries(
        f"{folder}: {found}{of_whom}, name one by number or SeriesInstanceUID"
        f"{'' if series == len(images) else '#VOLUME'}: {_listing(listed)}"
    )


@dataclass
class _Read:
    """What the files of a folder were found to be."""

    headers: list[Header]
    damaged: dict[Path, str]
    set_aside: list[SetAside]
    file_count: int = 0


def _read_all(files: Sequence[Path], salt: bytes, progress: Progress | None) -> _Read:
    read = _Read([], {}, [], len(files))
    with quiet_pydicom():
        for done, path in enumerate(files, start=1):
            _read_one(path, salt, read)
            if progress is not None and (done % 64 == 0 or done == len(files)):
                progress(done, len(files))
    return read


def _read_one(path: Path, salt: bytes, read: _Read) -> None:
    try:
        if not is_dicom(path):
            read.set_aside.append(SetAside(path, "not DICOM" if path.stat().st_size else "empty file"))
            return
        headers = read_headers(path, salt=salt)
    except OSError as fault:
        read.damaged[path] = f"cannot be opened: {fault.strerror}"
    except DicomError:
        read.damaged[path] = "cannot be parsed as DICOM: cut short or damaged"
    else:
        if not headers:
            read.set_aside.append(SetAside(path, "media directory (DICOMDIR)"))
        elif headers[0].series_uid or headers[0].rows:
            read.headers += headers
        else:
            read.damaged[path] = "names no series and no image size: cut short"


def _files(folder: Path) -> list[Path]:
    if folder.is_file():
        return [folder]
    if not folder.is_dir():
        raise DicomError(f"{folder}: no such file or folder")
    try:
        return list(_walk(folder))
    except OSError as fault:
        raise DicomError(f"{fault.filename}: cannot be listed: {fault.strerror}") from None


def _walk(folder: Path) -> Iterator[Path]:
    """Files in order, those of a folder before those of the folders in it; links to folders are not followed.

    What is unfinished is no part of a series: it comes whole under its own name, or is fetched again.
    """
    with os.scandir(folder) as found:
        finished = (entry for entry in found if not entry.name.startswith(_UNFINISHED))
        entries = sorted(finished, key=lambda entry: entry.name)
    yield from (folder / entry.name for entry in entries if entry.is_file())
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(folder / entry.name)


def _series_key(header: Header) -> tuple[object, ...]:
    """SeriesInstanceUID; where an anonymiser has removed it, the folder and what describes the series."""
    if header.series_uid:
        return (header.series_uid,)
    return "", header.patient_key, header.path.parent, header.modality, header.description, header.series_number


def _volumes(headers: Sequence[Header], damaged: dict[Path, str], resample_uneven: bool) -> Iterator[DicomSeries]:
    ordered = sorted(headers, key=lambda header: (str(header.path), header.frame or 0))
    beside = {header.path.parent for header in ordered}
    damage = tuple(_damage({path: why for path, why in damaged.items() if path.parent in beside}))
    for number, stack in enumerate(stacks_of(ordered, resample_uneven=resample_uneven), start=1):
        yield _volume(stack, number, damage)


def _volume(stack: Stack, number: int, damage: tuple[Finding, ...]) -> DicomSeries:
    first = stack.slices[0]
    return DicomSeries(
        series_uid=first.series_uid,
        study_uid=first.study_uid,
        modality=first.modality,
        description=first.description,
        series_number=first.series_number,
        slices=stack.slices,
        geometry=None if damage else stack.geometry,
        findings=stack.findings + damage,
        stack=stack.name,
        stack_number=number,
        patient_key=first.patient_key,
        slice_positions_k=stack.slice_positions_k,
    )


def _damage(damaged: dict[Path, str]) -> Iterator[Finding]:
    reasons: defaultdict[str, list[Path]] = defaultdict(list)
    for path, why in damaged.items():
        reasons[why].append(path)
    for why, paths in reasons.items():
        yield refuse("damaged-file", f"{names(paths)} {why}")


def _orphans(damaged: dict[Path, str]) -> list[DicomSeries]:
    if not damaged:
        return []
    return [DicomSeries("", "", "", "", None, (), None, tuple(_damage(damaged)))]


def _in_order(series: Sequence[DicomSeries]) -> list[DicomSeries]:
    """By patient, study, series and stack. A patient comes where the first of his studies does, whatever the salt."""
    first_study: dict[str, str] = {}
    for volume in series:
        known = first_study.get(volume.patient_key, volume.study_uid)
        first_study[volume.patient_key] = min(known, volume.study_uid)

    def order(volume: DicomSeries) -> tuple[object, ...]:
        number = float("inf") if volume.series_number is None else volume.series_number
        patient = first_study[volume.patient_key] if volume.patient_key else volume.study_uid
        path = str(volume.paths[0]) if volume.slices and not volume.series_uid else ""
        return not volume.slices, patient, volume.study_uid, number, volume.series_uid, path, volume.stack_number

    return sorted(series, key=order)


def _listing(listed: Sequence[DicomSeries]) -> str:
    """The volumes with their numbers, all of one series together."""
    numbered = enumerate(listed, start=1)
    series = [list(group) for _, group in groupby(numbered, key=lambda item: _same_series(*item))]
    shown = [_numbered(group) for group in series[:_LISTED]]
    rest = len(listed) - sum(len(group) for group in series[:_LISTED])
    return "; ".join(shown) + (f"; and {rest} more, which `volseg dicom ls` shows" if rest else "")


def _same_series(number: int, volume: DicomSeries) -> tuple[object, ...]:
    return (volume.series_uid,) if volume.series_uid else (number,)


def _numbered(group: Sequence[tuple[int, DicomSeries]]) -> str:
    (first, volume), (last, end) = group[0], group[-1]
    if len(group) <= NAMED_STACKS:
        return "; ".join(f"{number}: {one.describe()}" for number, one in group)
    title = f"{volume.modality or 'no modality'} '{volume.description}'"
    return f"{first} to {last}: {title}, {len(group)} volumes from {volume.stack} to {end.stack}, {volume.series_uid}"
