"""A folder of DICOM files -> the series in it: slices in order, their grid, and what is wrong with them.

Headers only. Files that are not DICOM are set aside; DICOM files that cannot be parsed condemn the series that lie
beside them, because one of their slices may be missing.
"""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pydicom

from transforms.dicom_checks import background_of, kind_findings, pixel_findings
from transforms.dicom_findings import Finding, names
from transforms.dicom_header import PARSE_FAULTS, Header, is_dicom, quiet_pydicom, read_header
from transforms.dicom_placing import frame_findings, place_slices
from transforms.dicom_stacks import series_findings
from transforms.errors import DicomError
from transforms.geometry import Geometry

_LISTED = 20
_NOT_IMAGES = {"no-pixels", "segmentation"}


@dataclass(frozen=True, eq=False)
class DicomSeries:
    """One series of a folder. `slices` are in order along the normal when `geometry` is known.

    `description` is the scanner's or the technician's free text about the protocol; it is no identity.
    """

    series_uid: str
    study_uid: str
    modality: str
    description: str
    series_number: int | None
    slices: tuple[Header, ...]
    geometry: Geometry | None
    findings: tuple[Finding, ...]

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files in slice order."""
        return tuple(header.path for header in self.slices)

    @property
    def slice_count(self) -> int:
        """Files that belong to the volume."""
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
        """Whether it holds images at all, readable or not."""
        return bool(self.slices) and not any(finding.name in _NOT_IMAGES for finding in self.problems)

    def describe(self) -> str:
        """One line: modality, description, slices, identifier, and the first problem if there is one."""
        title = f"{self.modality or 'no modality'} '{self.description}'" if self.slices else "damaged files"
        problem = f" (not readable: {self.problems[0].name})" if self.problems else ""
        return f"{title}, {self.slice_count} slices, {self.series_uid or 'no SeriesInstanceUID'}{problem}"


def index_series(folder: Path) -> list[DicomSeries]:
    """The series in a folder and the folders below it, or in one DICOM file, by series number and identifier.

    Reads headers only. A series that cannot be read is listed with its problems; damaged files that lie beside no
    series are listed as a series without slices.

    Raises:
        DicomError: `folder` does not exist or cannot be listed.
    """
    headers: list[Header] = []
    damaged: dict[Path, str] = {}
    for path in _files(folder):
        try:
            header = read_header(path) if is_dicom(path) else None
        except OSError as fault:
            damaged[path] = f"cannot be opened: {fault.strerror}"
        except DicomError:
            damaged[path] = "cannot be parsed as DICOM: cut short or damaged"
        else:
            if header is not None and (header.series_uid or header.rows):
                headers.append(header)
            elif header is not None:
                damaged[path] = "names no series and no image size: cut short"
    groups: defaultdict[tuple[object, ...], list[Header]] = defaultdict(list)
    for header in headers:
        groups[_series_key(header)].append(header)
    series = [_series(group, damaged) for group in groups.values()]
    homes = {header.path.parent for header in headers}
    series += _orphans({path: why for path, why in damaged.items() if path.parent not in homes})
    return sorted(series, key=_listing_order)


def choose_series(listed: Sequence[DicomSeries], *, series: str | None, folder: Path) -> DicomSeries:
    """The one image series, or the one that `series` names: its number in the listing (from 1) or the beginning of
    its SeriesInstanceUID.

    Raises:
        DicomError: none or several fit; the message lists the choices.
    """
    if series is None:
        images = [candidate for candidate in listed if candidate.is_image]
        if len(images) == 1:
            return images[0]
        if not images:
            raise DicomError(f"{folder}: no DICOM image series; found {_listing(listed) or 'no DICOM files'}")
        raise DicomError(
            f"{folder}: {len(images)} image series, name one by number or SeriesInstanceUID: {_listing(listed)}"
        )
    if series.isdecimal() and 1 <= int(series) <= len(listed):
        return listed[int(series) - 1]
    fitting = [candidate for candidate in listed if candidate.series_uid.startswith(series) and series]
    exact = [candidate for candidate in fitting if candidate.series_uid == series]
    if len(fitting) != 1 and len(exact) != 1:
        how_many = f"{len(fitting)} series begin with" if fitting else "no series has the number or identifier"
        raise DicomError(f"{folder}: {how_many} '{series}': {_listing(listed) or 'no DICOM files'}")
    return (exact or fitting)[0]


def _files(folder: Path) -> list[Path]:
    if folder.is_file():
        return [folder]
    if not folder.is_dir():
        raise DicomError(f"{folder}: no such file or folder")
    faults: list[OSError] = []
    files = [Path(root) / name for root, _, found in os.walk(folder, onerror=faults.append) for name in sorted(found)]
    if faults:
        raise DicomError(f"{faults[0].filename}: cannot be listed: {faults[0].strerror}")
    return [path for path in files if path.is_file()]


def _series_key(header: Header) -> tuple[object, ...]:
    """SeriesInstanceUID; where an anonymiser has removed it, the folder and what describes the series."""
    if header.series_uid:
        return (header.series_uid,)
    return "", header.path.parent, header.modality, header.description, header.series_number


def _series(headers: Iterable[Header], damaged: dict[Path, str]) -> DicomSeries:
    kept, findings = _without_localizers(sorted(headers, key=lambda header: str(header.path)))
    kept, dropped = _without_copies(kept)
    findings += [*dropped, *series_findings(kept)]
    if not _refused(findings):
        findings += kind_findings(kept)
    beside = {header.path.parent for header in kept}
    findings += _damage({path: why for path, why in damaged.items() if path.parent in beside})
    geometry = None
    if not _refused(findings):
        findings += pixel_findings(kept) + frame_findings(kept)
    if not _refused(findings):
        kept, geometry, placed = place_slices(kept)
        findings += placed
    first = kept[0]
    return DicomSeries(
        series_uid=first.series_uid,
        study_uid=first.study_uid,
        modality=first.modality,
        description=first.description,
        series_number=first.series_number,
        slices=tuple(kept),
        geometry=geometry,
        findings=tuple(findings),
    )


def _refused(findings: Iterable[Finding]) -> bool:
    return any(finding.outcome != "mend" for finding in findings)


def _without_localizers(headers: Sequence[Header]) -> tuple[Sequence[Header], list[Finding]]:
    """Set planning images (PS3.3 C.8.2.1.1.1, ImageType value 3) aside when they lie among others."""
    scouts = {header: None for header in headers if "LOCALIZER" in header.image_type[2:3]}
    rest = [header for header in headers if header not in scouts]
    if not scouts or not rest:
        return headers, []
    return rest, [
        Finding("localizer", "mend", f"planning images set aside: {names([header.path for header in scouts])}")
    ]


def _without_copies(headers: Sequence[Header]) -> tuple[Sequence[Header], list[Finding]]:
    """Drop files that repeat the same instance: identifier, place, rescaling and pixels."""
    by_instance: defaultdict[tuple[object, ...], list[Header]] = defaultdict(list)
    for header in headers:
        key = (header.sop_uid or str(header.path), header.plane, header.slope, header.intercept)
        by_instance[key].append(header)
    copies: dict[Header, None] = {}
    for twins in by_instance.values():
        if len(twins) > 1:
            first = _pixel_digest(twins[0].path)
            same = [twin for twin in twins[1:] if first is not None and _pixel_digest(twin.path) == first]
            copies.update(dict.fromkeys(same))
    if not copies:
        return headers, []
    kept = [header for header in headers if header not in copies]
    return kept, [
        Finding(
            "duplicate", "mend", f"copies of the same instance dropped: {names([header.path for header in copies])}"
        )
    ]


def _pixel_digest(path: Path) -> bytes | None:
    try:
        with quiet_pydicom():
            pixels = pydicom.dcmread(path, specific_tags=["PixelData"], force=True).get("PixelData")
    except PARSE_FAULTS:
        return None
    return hashlib.sha256(pixels).digest() if isinstance(pixels, bytes) and pixels else None


def _damage(damaged: dict[Path, str]) -> list[Finding]:
    reasons: defaultdict[str, list[Path]] = defaultdict(list)
    for path, why in damaged.items():
        reasons[why].append(path)
    return [Finding("damaged-file", "refuse", f"{names(paths)} {why}") for why, paths in reasons.items()]


def _orphans(damaged: dict[Path, str]) -> list[DicomSeries]:
    if not damaged:
        return []
    return [DicomSeries("", "", "", "", None, (), None, tuple(_damage(damaged)))]


def _listing_order(series: DicomSeries) -> tuple[float, str, str]:
    number = float("inf") if series.series_number is None else series.series_number
    return number, series.series_uid, str(series.paths[0]) if series.paths else ""


def _listing(listed: Sequence[DicomSeries]) -> str:
    shown = [f"{n}: {series.describe()}" for n, series in enumerate(listed[:_LISTED], start=1)]
    rest = len(listed) - len(shown)
    return "; ".join(shown) + (f"; and {rest} more" if rest else "")
