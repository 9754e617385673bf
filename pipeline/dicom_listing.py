"""What `volseg dicom ls` and `volseg info` say of a folder of DICOM files: rows, a summary, and everything as JSON.

A patient is a salted hash, a file is named as it lies below the folder. Nothing heavy is imported.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise, takewhile
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import ConfigError, VolumeError
from transforms.dicom_index import DicomSeries, FolderIndex, Progress, index_folder
from transforms.geometry import Geometry

JSON_FORMAT = "volseg-dicom-listing/1"
SALT_BYTES = 32
SHORTEST_UID = 4
"""Digits of an identifier that are shown at least."""

SHORTEST_KEY = 4
"""Digits of a patient's key that are shown at least."""

OBLIQUE_DEG = 0.5
"""An orientation that is farther than this from a patient's plane is shown with its angle."""

ALONE = 3
"""More volumes of one series than this, alike but for their phase, share a row."""

_PLANES = ("sagittal", "coronal", "axial")


@dataclass(frozen=True)
class ListingRow:
    """One line of the listing: a volume, or volumes of one series that are alike. `numbers` is what --series takes.

    `findings` are the names of what was mended, or of what keeps the volume from being used; `problems` says more of
    the latter. `is_usable` is None for what is no image.
    """

    numbers: str
    patient: str
    study: str
    series: str
    series_uid: str
    modality: str
    description: str
    size: str
    spacing_mm: str
    orientation: str
    is_usable: bool | None
    findings: tuple[str, ...]
    problems: tuple[str, ...]


def index_tree(
    folder: Path, *, resample_uneven: bool = False, salt_file: Path | None = None, progress: Progress | None = None
) -> FolderIndex:
    """The index of a folder, with patient keys that stay the same as long as `salt_file` does.

    Raises:
        VolumeError: the folder does not exist, cannot be listed or holds no DICOM file.
        ConfigError: `salt_file` is none.
    """
    salt = None if salt_file is None else read_salt(salt_file)
    index = index_folder(folder, resample_uneven=resample_uneven, salt=salt, progress=progress)
    if not index.series:
        raise VolumeError(f"{folder}: no DICOM file among {_count(index.file_count, 'file')}")
    return index


def read_salt(path: Path) -> bytes:
    """What patients are hashed with; made when the file is missing, for its owner alone to read.

    Raises:
        ConfigError: the file is too short to be a salt, or cannot be read or written.
    """
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(SALT_BYTES) + "\n")
    except FileExistsError:
        pass
    except OSError as fault:
        raise ConfigError(f"--salt {path}: cannot be written: {fault.strerror}") from None
    try:
        salt = path.read_bytes().strip()
    except OSError as fault:
        raise ConfigError(f"--salt {path}: cannot be read: {fault.strerror}") from None
    if not SALT_BYTES <= len(salt) <= 32 * SALT_BYTES:
        raise ConfigError(f"--salt {path}: holds {len(salt)} bytes, expected {SALT_BYTES} to {32 * SALT_BYTES}")
    return salt


def listing_rows(index: FolderIndex) -> list[ListingRow]:
    """The rows of the listing, in its order."""
    short = _Short.of(index.series)
    numbered = list(enumerate(index.series, start=1))
    rows = []
    for _, group in groupby(numbered, key=lambda item: _alike(*item)):
        volumes = list(group)
        together = [volumes] if len(volumes) > ALONE else [[volume] for volume in volumes]
        rows += [_row(part, short) for part in together]
    return rows


def is_usable(volume: DicomSeries) -> bool | None:
    """Whether a volume can be segmented; None for what is no image and is not meant to be."""
    if volume.slices and not volume.is_image:
        return None
    return not volume.problems


def summary(index: FolderIndex) -> str:
    """One line, as '12 series: 9 usable, 2 not, 1 not an image; 3 files set aside'."""
    states = [is_usable(volume) for volume in index.series]
    series = len({volume.series_uid or n for n, volume in enumerate(index.series)})
    what = f"{series} series" if series == len(states) else f"{len(states)} volumes in {series} series"
    counts = [f"{states.count(True)} usable"]
    counts += [f"{states.count(False)} not"] if False in states else []
    counts += [f"{states.count(None)} not an image"] if None in states else []
    aside = f"; {_count(len(index.set_aside), 'file')} set aside" if index.set_aside else ""
    return f"{what}: {', '.join(counts)}{aside}"


def listing_json(index: FolderIndex, folder: Path) -> dict[str, Any]:
    """Everything that was found, with full identifiers and paths below `folder`."""
    return {
        "format": JSON_FORMAT,
        "summary": summary(index),
        "file_count": index.file_count,
        "series": [_volume_json(number, volume, folder) for number, volume in enumerate(index.series, start=1)],
        "set_aside": [{"file": _below(aside.path, folder), "reason": aside.reason} for aside in index.set_aside],
    }


@dataclass(frozen=True)
class _Short:
    """Identifiers cut so that those of the listing still differ."""

    patients: dict[str, str]
    studies: dict[str, str]
    series: dict[str, str]

    @classmethod
    def of(cls, volumes: Sequence[DicomSeries]) -> _Short:
        keys = _beginnings((v.patient_key for v in volumes), SHORTEST_KEY)
        studies, series = (_ends(uids) for uids in ([v.study_uid for v in volumes], [v.series_uid for v in volumes]))
        return cls(keys, studies, series)


def _beginnings(values: Iterable[str], shortest: int) -> dict[str, str]:
    """Each value cut as short as tells it from all others; '-' for none."""
    known = sorted(set(values))
    lengths = [shortest] * len(known)
    for n, (before, after) in enumerate(pairwise(known)):
        # In sorted order, the value that is most alike stands beside.
        alike = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(before, after, strict=False))) + 1
        lengths[n], lengths[n + 1] = max(lengths[n], alike), max(lengths[n + 1], alike)
    return {value: value[:length] or "-" for value, length in zip(known, lengths, strict=True)}


def _ends(uids: Iterable[str]) -> dict[str, str]:
    """Each identifier by as many of its last digits as tell it from all others."""
    backwards = _beginnings((uid[::-1] for uid in uids), SHORTEST_UID)
    return {
        uid[::-1]: (uid[::-1] or "-") if len(uid) <= len(end) + 1 else "…" + end[::-1] for uid, end in backwards.items()
    }


def _alike(number: int, volume: DicomSeries) -> tuple[object, ...]:
    """What volumes share a row by; its number for one that shares it with none."""
    if not volume.stack or not volume.series_uid:
        return (number,)
    spacing = volume.geometry.spacing_mm if volume.geometry else ()
    kinds = tuple(finding.name for finding in volume.findings)
    return volume.series_uid, _matrix(volume), volume.slice_count, spacing, kinds, _stack_kind(volume)


def _stack_kind(volume: DicomSeries) -> str:
    """The words of what sets a volume apart, without the number at the end."""
    return volume.stack.rstrip("0123456789. ms")


def _row(volumes: Sequence[tuple[int, DicomSeries]], short: _Short) -> ListingRow:
    (first, volume), (last, end) = volumes[0], volumes[-1]
    stack = volume.stack if first == last else f"{volume.stack} to {end.stack.removeprefix(_stack_kind(end)).strip()}"
    state = is_usable(volume)
    return ListingRow(
        numbers=str(first) if first == last else f"{first}-{last}",
        patient=short.patients[volume.patient_key],
        study=short.studies[volume.study_uid],
        series=short.series[volume.series_uid],
        series_uid=volume.series_uid,
        modality=volume.modality or "-",
        description=", ".join(filter(None, (volume.description, stack))) or "-",
        size=f"{_matrix(volume)}x{volume.slice_count}" if _sizes(volume) else "-",
        spacing_mm=_spacing_mm(volume),
        orientation=_orientation(volume),
        is_usable=state,
        findings=tuple(dict.fromkeys(f.name for f in (volume.findings if state else volume.problems))),
        problems=tuple(str(problem) for problem in volume.problems) if state is False else (),
    )


def _matrix(volume: DicomSeries) -> str:
    sizes = _sizes(volume)
    return "-" if not sizes else "mixed" if len(sizes) > 1 else f"{sizes[0][0]}x{sizes[0][1]}"


def _sizes(volume: DicomSeries) -> list[tuple[int, int]]:
    """Columns and rows."""
    return sorted({(header.columns, header.rows) for header in volume.slices if header.rows})


def _spacing_mm(volume: DicomSeries) -> str:
    """Between columns, rows and slices; what is not known is left out."""
    planes = [header.plane for header in volume.slices if header.plane is not None]
    sides = sorted({(_mm(plane.column_spacing_mm), _mm(plane.row_spacing_mm)) for plane in planes})
    if len(sides) != 1:
        return "mixed" if sides else "-"
    return "x".join([*sides[0], _mm(volume.geometry.spacing_mm[2]) if volume.geometry else "?"])


def _orientation(volume: DicomSeries) -> str:
    """The patient's plane that the slices are nearest to, and by how much they are turned from it."""
    planes = [header.plane for header in volume.slices if header.plane is not None]
    normals = np.array([np.cross(plane.row_cosines_lps, plane.column_cosines_lps) for plane in planes])
    if not len(normals) or not np.linalg.norm(normals, axis=1).all():
        return "-"
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    axes = np.abs(normals).argmax(axis=1)
    if len(set(axes.tolist())) > 1:
        return "mixed"
    degrees = np.degrees(np.arccos(np.clip(np.abs(normals).max(axis=1), 0, 1))).max()
    return _PLANES[axes[0]] + (f" {degrees:.0f}°" if degrees > OBLIQUE_DEG else "")


def _mm(value: float) -> str:
    return f"{value:.3g}"


def _volume_json(number: int, volume: DicomSeries, folder: Path) -> dict[str, Any]:
    several = f"#{volume.stack_number}" if volume.stack else ""
    return {
        "number": number,
        "choice": f"{volume.series_uid}{several}" if volume.series_uid else str(number),
        "patient": volume.patient_key,
        "study_uid": volume.study_uid,
        "series_uid": volume.series_uid,
        "series_number": volume.series_number,
        "stack": volume.stack,
        "stack_number": volume.stack_number,
        "modality": volume.modality,
        "description": volume.description,
        "is_image": volume.is_image,
        "is_localizer": volume.is_localizer,
        "usable": is_usable(volume) is True,
        "matrix": _sizes(volume)[0] if len(_sizes(volume)) == 1 else None,
        "slice_count": volume.slice_count,
        "orientation": _orientation(volume),
        "geometry": _geometry_json(volume.geometry),
        "slice_positions_k": volume.slice_positions_k,
        "findings": [{"name": f.name, "outcome": f.outcome, "evidence": f.evidence} for f in volume.findings],
        "files": list(dict.fromkeys(_below(path, folder) for path in volume.paths)),
        "frames": [header.frame for header in volume.slices if header.frame is not None],
        "transfer_syntaxes": sorted({header.transfer_syntax for header in volume.slices}),
    }


def _geometry_json(geometry: Geometry | None) -> dict[str, Any] | None:
    if geometry is None:
        return None
    return {**geometry.to_json(), "spacing_mm": geometry.spacing_mm, "axis_codes": geometry.axis_codes}


def _below(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix() if path != folder else path.name


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
