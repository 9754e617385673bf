"""What can be wrong with a DICOM series, each by its name, and where its slices lie.

A check sees the headers of one series and gives findings; nothing is guessed. To handle a new kind of series, turn
its finding from "refuse" into "mend" here and read it in `transforms.dicom`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import UID

from transforms.dicom_header import NATIVE_SYNTAXES, Header, Plane, quiet_pydicom
from transforms.geometry import Geometry
from transforms.sanity import MAX_VOXELS

Outcome = Literal["mend", "ask", "refuse"]
Headers = Sequence[Header]
Floats = npt.NDArray[np.float64]

COSINE_TOLERANCE = 1e-3
"""Direction cosines may be this far from orthonormal, from each other, or the stack's axis from the normal."""

REPORTED_COSINES = 1e-4
"""Cosines that are farther than this from orthonormal are reported as mended."""

SAME_SPACING = 1e-3
"""Pixel spacings within this part of each other are one."""

SAME_PLACE = 0.01
"""Slices nearer to each other than this part of a pixel side are at one position."""

OFF_LINE = 0.1
"""Slices may lie off the stack's axis by this part of a pixel side."""

OFF_STEP = 0.05
"""Slices may lie off their place in an even stack by this part of the slice distance."""

WHOLE_GAP = 0.1
"""A gap within this of a multiple of the usual one means missing slices, otherwise uneven spacing."""

SLICE_TAG = 0.01
"""SpacingBetweenSlices is reported when it is off by more than this part of the real distance."""

MEASURED_HU = (-1000.0, 3071.0)
"""CT numbers that tissue can have: a padding value in this range would erase measurements."""

BACKGROUND = {"CT": -1024.0}
"""Value of voxels that were not measured, by modality, where it is not 0."""

_SEGMENTATIONS = ("1.2.840.10008.5.1.4.1.1.66",)
_MULTI_FRAME = {
    "1.2.840.10008.5.1.4.1.1.2.1",
    "1.2.840.10008.5.1.4.1.1.2.2",
    "1.2.840.10008.5.1.4.1.1.4.1",
    "1.2.840.10008.5.1.4.1.1.4.3",
    "1.2.840.10008.5.1.4.1.1.4.4",
    "1.2.840.10008.5.1.4.1.1.30",
    "1.2.840.10008.5.1.4.1.1.128.1",
    "1.2.840.10008.5.1.4.1.1.130",
}
_NAMED = 3


@dataclass(frozen=True, slots=True)
class Finding:
    """A named fault: mended (the volume is right), asked (the caller must choose) or refused."""

    name: str
    outcome: Outcome
    evidence: str

    def __str__(self) -> str:
        return f"{self.name}: {self.evidence}"


def kind_findings(headers: Headers) -> list[Finding]:
    """Whether these are slices of one image at all: one grey value a pixel, one slice a file."""
    findings: list[Finding] = []
    for check in _KIND_CHECKS:
        # What is no image needs no further faults to its name.
        findings += check(headers) if all(finding.outcome == "mend" for finding in findings) else []
    return findings


def pixel_findings(headers: Headers) -> list[Finding]:
    """Whether the pixels can be read as numbers, and what is done to them."""
    return [finding for check in _PIXEL_CHECKS for finding in check(headers)]


def frame_findings(headers: Headers) -> list[Finding]:
    """Whether all slices have a place, one orientation, one matrix and one pixel spacing."""
    unplaced = list(_no_position(headers))
    if unplaced:
        return unplaced
    return [finding for check in _FRAME_CHECKS for finding in check(headers)]


def place_slices(headers: Headers) -> tuple[tuple[Header, ...], Geometry | None, list[Finding]]:
    """Slices in order along the normal, the grid that they make, and what was found on the way.

    The headers must have passed `frame_findings`. Index i runs along rows, j down columns, k with the normal, so
    the grid is right-handed (PS3.3 C.7.6.2.1.1). The grid is None when a finding refuses it.
    """
    row, column, normal = _axes(headers)
    positions = np.array([plane.position_lps_mm for plane in _planes(headers)])
    along = positions @ normal
    order = sorted(range(len(headers)), key=lambda n: (along[n], headers[n].sop_uid, str(headers[n].path)))
    ordered = tuple(headers[n] for n in order)
    findings = list(_stack_faults(ordered, positions[order], normal))
    if findings:
        return ordered, None, findings
    step_mm = float(along[order[-1]] - along[order[0]]) / (len(ordered) - 1)
    first, plane = ordered[0], _planes(ordered)[0]
    affine = np.eye(4)
    affine[:3, 0] = row * plane.column_spacing_mm
    affine[:3, 1] = column * plane.row_spacing_mm
    affine[:3, 2] = normal * step_mm
    affine[:3, 3] = positions[order[0]]
    geometry = Geometry.from_lps((first.columns, first.rows, len(ordered)), affine)
    return ordered, geometry, list(_slice_tag(ordered, step_mm))


def background_of(modality: str) -> float:
    """The value of voxels that were not measured."""
    return BACKGROUND.get(modality, 0.0)


def keeps_padding(header: Header) -> bool:
    """Whether the padding value of a CT lies among its measured values, so that it must stay as it is."""
    if header.padding is None or header.modality != "CT" or header.slope is None or header.intercept is None:
        return False
    values = [stored * header.slope + header.intercept for stored in header.padding]
    return min(values) < MEASURED_HU[1] and max(values) > MEASURED_HU[0]


def names(paths: Sequence[Path]) -> str:
    """A few file names, for evidence."""
    shown = [path.name for path in paths[:_NAMED]]
    rest = len(paths) - len(shown)
    return ", ".join(shown) + (f" and {rest} more" if rest else "")


def _files(headers: Headers) -> str:
    return names([header.path for header in headers])


def _refuse(name: str, evidence: str) -> Finding:
    return Finding(name, "refuse", evidence)


def _mend(name: str, evidence: str) -> Finding:
    return Finding(name, "mend", evidence)


def _planes(headers: Headers) -> list[Plane]:
    return [header.plane for header in headers if header.plane is not None]


def _where(headers: Headers, test: Callable[[Header], bool]) -> list[Header]:
    return [header for header in headers if test(header)]


def _distinct(headers: Headers, value: Callable[[Header], object]) -> list[str]:
    return sorted({str(value(header)) for header in headers})


def _mixed(headers: Headers) -> Iterator[Finding]:
    if not headers[0].series_uid:
        yield _mend(
            "no-series-uid", f"SeriesInstanceUID was removed; the {len(headers)} like files of a folder are one"
        )
    for what, value in (
        ("StudyInstanceUID", lambda header: header.study_uid),
        ("Modality", lambda header: header.modality),
        ("FrameOfReferenceUID", lambda header: header.frame_of_reference),
    ):
        if len(_distinct(headers, value)) > 1:
            yield _refuse("mixed-series", f"one SeriesInstanceUID, but {what} differs between its files")


def _no_pixels(headers: Headers) -> Iterator[Finding]:
    if empty := _where(headers, lambda header: header.rows < 1 or header.columns < 1):
        yield _refuse("no-pixels", f"{_files(empty)} holds no image")


def _segmentation(headers: Headers) -> Iterator[Finding]:
    if headers[0].modality == "SEG" or headers[0].sop_class.startswith(_SEGMENTATIONS):
        yield _refuse("segmentation", "a DICOM segmentation object, not an image")


def _multi_frame(headers: Headers) -> Iterator[Finding]:
    if many := _where(headers, lambda header: header.frames > 1 or header.sop_class in _MULTI_FRAME):
        yield _refuse(
            "multi-frame", f"{_files(many)}: object of {many[0].frames} frames; only one slice a file is read so far"
        )


def _mosaic(headers: Headers) -> Iterator[Finding]:
    if mosaics := _where(headers, lambda header: "MOSAIC" in header.image_type):
        yield _refuse("mosaic", f"{_files(mosaics)} holds many slices side by side in one picture")


def _colour(headers: Headers) -> Iterator[Finding]:
    grey = ("MONOCHROME1", "MONOCHROME2")
    if coloured := _where(headers, lambda header: header.samples != 1 or header.photometric not in grey):
        kind = coloured[0].photometric or "no PhotometricInterpretation"
        yield _refuse("colour", f"{_files(coloured)} has {kind}; expected one grey value a pixel")


def _inverted(headers: Headers) -> Iterator[Finding]:
    if inverted := _where(headers, lambda header: header.photometric == "MONOCHROME1"):
        yield _refuse("monochrome1", f"{_files(inverted)} shows low values bright; what they measure is unclear")


def _pixel_format(headers: Headers) -> Iterator[Finding]:
    def odd(header: Header) -> bool:
        usual = header.bits_allocated in (8, 16, 32) and 0 < header.bits_stored <= header.bits_allocated
        return not usual or header.high_bit != header.bits_stored - 1

    if strange := _where(headers, odd):
        h = strange[0]
        yield _refuse(
            "pixel-format",
            f"{_files(strange)}: {h.bits_stored} bits stored of {h.bits_allocated} allocated, high bit {h.high_bit}",
        )


def _rescale(headers: Headers) -> Iterator[Finding]:
    if _where(headers, lambda header: header.has_lookup_table):
        yield _refuse("modality-lut", "values go through a lookup table (ModalityLUTSequence)")
    if broken := _where(headers, lambda header: not header.slope or header.intercept is None):
        yield _refuse("rescale", f"RescaleSlope or RescaleIntercept of {_files(broken)} is zero or no number")
        return
    slopes = sorted({header.slope or 0.0 for header in headers})
    if len(slopes) > 1:
        yield _mend("slice-rescale", f"slopes from {slopes[0]:g} to {slopes[-1]:g}, applied slice by slice")


def _padding(headers: Headers) -> Iterator[Finding]:
    padded = _where(headers, lambda header: header.padding is not None)
    if not padded:
        return
    low, high = padded[0].padding or (0, 0)
    value = str(low) if low == high else f"{low} to {high}"
    if keeps_padding(padded[0]):
        yield _mend("padding-kept", f"PixelPaddingValue {value} lies among measured CT numbers; values kept")
    else:
        background = background_of(padded[0].modality)
        yield _mend("padding", f"PixelPaddingValue {value} becomes the background {background:g}")


def _transfer_syntax(headers: Headers) -> Iterator[Finding]:
    for uid in _distinct(headers, lambda header: header.transfer_syntax):
        if uid and not _decodable(uid):
            yield _refuse("transfer-syntax", f"no decoder for {syntax_name(uid)} is installed")


def syntax_name(uid: str) -> str:
    """What a transfer syntax is called, and its identifier."""
    with quiet_pydicom():
        name = UID(uid).name
    return f"{name} ({uid})" if name != uid else uid or "no transfer syntax"


def _decodable(uid: str) -> bool:
    try:
        with quiet_pydicom():
            return uid in NATIVE_SYNTAXES or get_decoder(UID(uid)).is_available
    except NotImplementedError:
        return False


def _size(headers: Headers) -> Iterator[Finding]:
    voxels = sum(header.rows * header.columns for header in headers)
    if voxels > MAX_VOXELS:
        yield _refuse("too-large", f"{voxels} voxels, more than {MAX_VOXELS}; are the headers damaged?")

    def short(header: Header) -> bool:
        needed = header.rows * header.columns * header.bits_allocated // 8
        return header.transfer_syntax in NATIVE_SYNTAXES and header.file_bytes < needed

    if cut := _where(headers, short):
        yield _refuse("truncated", f"{_files(cut)} is shorter than its pixels; fetch it again")


def _no_position(headers: Headers) -> Iterator[Finding]:
    if lost := _where(headers, lambda header: header.plane is None):
        yield _refuse(
            "no-position",
            f"ImagePositionPatient, ImageOrientationPatient or PixelSpacing is missing or malformed in {_files(lost)}",
        )


def _orthonormal(headers: Headers) -> Iterator[Finding]:
    errors = [_cosine_error(plane) for plane in _planes(headers)]
    worst = max(errors)
    if worst > COSINE_TOLERANCE:
        crooked = [header for header, error in zip(headers, errors, strict=True) if error > COSINE_TOLERANCE]
        yield _refuse("not-orthonormal", f"direction cosines of {_files(crooked)} are off by {worst:.2g}")
    elif worst > REPORTED_COSINES:
        yield _mend("cosines-rounded", f"direction cosines were off by {worst:.2g} and made orthonormal")


def _one_frame(headers: Headers) -> Iterator[Finding]:
    sizes = _distinct(headers, lambda header: f"{header.columns}x{header.rows}")
    if len(sizes) > 1:
        yield _refuse("several-matrix-sizes", f"slices of {', '.join(sizes[:_NAMED])} pixels in one series")
    planes = _planes(headers)
    spacings = np.array([(plane.row_spacing_mm, plane.column_spacing_mm) for plane in planes])
    if (np.ptp(spacings, axis=0) > SAME_SPACING * spacings.min(axis=0)).any():
        yield _refuse("several-pixel-spacings", f"from {spacings.min():g} to {spacings.max():g} mm in one series")
    cosines = np.array([(plane.row_cosines_lps, plane.column_cosines_lps) for plane in planes])
    if np.ptp(cosines, axis=0).max() > COSINE_TOLERANCE:
        count = len({tuple(np.round(c, 2).ravel().tolist()) for c in cosines})
        yield _refuse("several-orientations", f"slices of about {max(count, 2)} orientations in one series")


def _cosine_error(plane: Plane) -> float:
    row, column = np.array(plane.row_cosines_lps), np.array(plane.column_cosines_lps)
    lengths = (abs(float(np.linalg.norm(v)) - 1.0) for v in (row, column))
    return max(*lengths, abs(float(row @ column)))


def _axes(headers: Headers) -> tuple[Floats, Floats, Floats]:
    """Unit vectors along rows, down columns and along the normal, LPS; the same for any order of the files."""
    row, column = min((plane.row_cosines_lps, plane.column_cosines_lps) for plane in _planes(headers))
    along_row = np.array(row) / np.linalg.norm(row)
    down_column = np.array(column) - (np.array(column) @ along_row) * along_row
    down_column /= np.linalg.norm(down_column)
    return along_row, down_column, np.cross(along_row, down_column)


def _stack_faults(ordered: Headers, positions: Floats, normal: Floats) -> Iterator[Finding]:
    if len(ordered) < 2:
        yield _refuse("single-slice", "one slice has no slice distance; give the folder of the whole series")
        return
    plane = _planes(ordered)[0]
    pixel_mm = min(plane.row_spacing_mm, plane.column_spacing_mm)
    along = (positions - positions[0]) @ normal
    if np.diff(along).min() < SAME_PLACE * pixel_mm:
        yield _same_position(ordered, np.diff(along) < SAME_PLACE * pixel_mm)
        return
    yield from _crooked(positions - positions[0] - along[:, None] * normal, along, pixel_mm)
    yield from _uneven(ordered, along)


def _same_position(ordered: Headers, repeats: npt.NDArray[np.bool_]) -> Finding:
    places = len(ordered) - int(repeats.sum())
    kinds = [dict(header.kinds) for header in ordered]
    differing = [kind for kind in kinds[0] if len({k[kind] for k in kinds}) > 1]
    what = f"they differ in {', '.join(differing)}" if differing else "nothing in the headers tells them apart"
    first = int(np.argmax(repeats))
    return _refuse(
        "same-position",
        f"{len(ordered)} slices at {places} positions, {_files(ordered[first : first + 2])} among them; {what}",
    )


def _crooked(off_axis_mm: Floats, along_mm: Floats, pixel_mm: float) -> Iterator[Finding]:
    end = off_axis_mm[-1]
    bends = off_axis_mm - (along_mm / along_mm[-1])[:, None] * end
    bend_mm, drift_mm = float(np.linalg.norm(bends, axis=1).max()), float(np.linalg.norm(end))
    if bend_mm > OFF_LINE * pixel_mm:
        yield _refuse("shifted-slices", f"slices are shifted sideways against each other by up to {bend_mm:.3g} mm")
    elif drift_mm > max(OFF_LINE * pixel_mm, COSINE_TOLERANCE * along_mm[-1]):
        degrees = np.degrees(np.arctan2(drift_mm, along_mm[-1]))
        yield _refuse("gantry-tilt", f"the stack is tilted by {degrees:.2f} degrees against its slices")


def _uneven(ordered: Headers, along_mm: Floats) -> Iterator[Finding]:
    gaps = np.diff(along_mm)
    step = along_mm[-1] / len(gaps)
    tag = ordered[0].slice_spacing_tag_mm
    if len(gaps) == 1 and tag and abs(abs(tag) - step) > SLICE_TAG * step:
        yield _refuse(
            "uneven-spacing",
            f"two slices {step:.4g} mm apart, but SpacingBetweenSlices is {tag:g}: slices between may be missing",
        )
    if np.abs(along_mm - step * np.arange(len(ordered))).max() <= OFF_STEP * step:
        return
    usual = float(np.percentile(gaps, 50, method="lower"))
    multiples = np.rint(gaps / usual)
    if (np.abs(gaps / usual - multiples) <= WHOLE_GAP).all() and multiples.max() > 1:
        holes = np.flatnonzero(multiples > 1)
        where = ", ".join(f"{gaps[n]:.4g} mm after {ordered[n].path.name}" for n in holes[:_NAMED])
        missing = int((multiples - 1).sum())
        yield _refuse("missing-slices", f"{missing} missing where slices are {usual:.4g} mm apart: {where}")
    else:
        yield _refuse("uneven-spacing", f"slices are {gaps.min():.4g} to {gaps.max():.4g} mm apart")


def _slice_tag(ordered: Headers, step_mm: float) -> Iterator[Finding]:
    tag = ordered[0].slice_spacing_tag_mm
    if tag is not None and abs(tag - step_mm) > SLICE_TAG * step_mm:
        yield _mend("slice-spacing-tag", f"SpacingBetweenSlices is {tag:g}, positions are {step_mm:.4g} mm apart")


_Check = Callable[[Headers], Iterator[Finding]]
_KIND_CHECKS: tuple[_Check, ...] = (_mixed, _no_pixels, _segmentation, _multi_frame, _mosaic, _colour, _inverted)
_PIXEL_CHECKS: tuple[_Check, ...] = (_pixel_format, _rescale, _padding, _transfer_syntax, _size)
_FRAME_CHECKS: tuple[_Check, ...] = (_orthonormal, _one_frame)
