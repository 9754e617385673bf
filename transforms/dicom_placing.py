"""Where the slices of a DICOM stack lie, and what can be wrong with that, each by its name.

A check sees the headers of one stack and gives findings; nothing is guessed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from transforms.dicom_findings import NAMED, Finding, Headers, ask, files, mend, refuse, slice_name, where
from transforms.dicom_header import Header, Plane
from transforms.geometry import Geometry
from transforms.sanity import MAX_VOXELS

Floats = npt.NDArray[np.float64]
Places = npt.NDArray[np.int64]

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

USUAL_GAP = 0.1
"""A gap that this part of all gaps have is a usual one."""

SLICE_TAG = 0.01
"""SpacingBetweenSlices is reported when it is off by more than this part of the real distance."""

MAX_TILT_DEG = 45.0
"""A stack that leans more than this is no tilted scan; gantries tilt by 30 degrees at most."""

FARTHEST_MM = 1e5
"""No slice lies farther from the origin, none has larger pixels or is deeper: 100 m."""

SMALLEST_MM = 1e-5
"""No pixel is smaller: 10 nm."""

MOST_FILLED = 20
"""Uneven slices are put on an even grid of at most this many planes a slice."""

_OPTION = "--resample-uneven interpolates between the slices that are there"


@dataclass(frozen=True, eq=False)
class Placement:
    """Slices in order along the normal and the grid that they make, None where a finding refuses it.

    `slice_positions_k` is where each slice lies on the grid's k axis; None when the slices are its planes.
    """

    slices: tuple[Header, ...]
    geometry: Geometry | None
    slice_positions_k: tuple[float, ...] | None
    findings: tuple[Finding, ...]


def plane_findings(headers: Headers) -> Iterator[Finding]:
    """Whether each slice has a place, and rows that are perpendicular to its columns."""
    if lost := where(headers, lambda header: header.plane is None):
        yield refuse(
            "no-position",
            f"ImagePositionPatient, ImageOrientationPatient or PixelSpacing is missing or malformed in {files(lost)}",
        )
        return
    if absurd := where(headers, lambda header: header.plane is not None and not _is_sensible(header.plane)):
        far = f"beyond {FARTHEST_MM:g} mm, or pixels smaller than {SMALLEST_MM:g} mm"
        yield refuse("absurd-position", f"{files(absurd)} has a position or a spacing {far}; is the header damaged?")
        return
    errors = _cosine_errors(headers)
    worst = float(errors.max())
    if worst > COSINE_TOLERANCE:
        crooked = [header for header, error in zip(headers, errors, strict=True) if error > COSINE_TOLERANCE]
        yield refuse("not-orthonormal", f"direction cosines of {files(crooked)} are off by {worst:.2g}")
    elif worst > REPORTED_COSINES:
        yield mend("cosines-rounded", f"direction cosines were off by {worst:.2g} and made orthonormal")


def place_numbers(headers: Headers) -> Places:
    """Which place along the normal each slice is at, counted from 0; rounded positions are one place.

    The headers must have passed `plane_findings` and be of one orientation.
    """
    along_mm = _along_mm(headers)
    order = np.argsort(along_mm, kind="stable")
    starts = np.diff(along_mm[order]) >= _same_place_mm(np.diff(along_mm[order]), _pixel_mm(headers))
    numbers = np.empty(len(along_mm), dtype=np.int64)
    numbers[order] = np.concatenate(([0], np.cumsum(starts)))
    return numbers


def place_slices(headers: Headers, *, resample_uneven: bool = False) -> Placement:
    """The grid of slices of one matrix, orientation and pixel spacing that passed `plane_findings`.

    Index i runs along rows, j down columns, k with the normal, so the grid is right-handed (PS3.3 C.7.6.2.1.1). The
    k axis of a tilted stack follows its slices, so that grid is sheared. With `resample_uneven`, slices with gaps
    are placed where they are on an even grid, whose step is the smallest usual gap.
    """
    if len(headers) == 1:
        return _single_slice(headers[0])
    along_mm = _along_mm(headers)
    order = sorted(range(len(headers)), key=lambda n: (along_mm[n], headers[n].sop_uid, slice_name(headers[n])))
    ordered = tuple(headers[n] for n in order)
    positions, along_mm = _positions(ordered), along_mm[order] - along_mm[order[0]]
    repeats = np.diff(along_mm) < _same_place_mm(np.diff(along_mm), _pixel_mm(ordered))
    if repeats.any():
        return Placement(ordered, None, None, (_same_position(ordered, repeats),))
    line, findings = _line(positions - positions[0], along_mm, ordered)
    if not findings or findings[0].outcome == "mend":
        return _on_grid(ordered, along_mm, line, findings, resample_uneven=resample_uneven)
    return Placement(ordered, None, None, (*findings, *_uneven(ordered, along_mm)))


def _on_grid(
    ordered: tuple[Header, ...], along_mm: Floats, line: Floats, findings: list[Finding], *, resample_uneven: bool
) -> Placement:
    step_mm, places_k = float(along_mm[-1]) / (len(ordered) - 1), None
    planes = len(ordered)
    if uneven := list(_uneven(ordered, along_mm)):
        step_mm = _usual_gap_mm(ordered, along_mm)
        planes = round(along_mm[-1] / step_mm) + 1
        limit = min(MOST_FILLED * len(ordered), MAX_VOXELS // (ordered[0].rows * ordered[0].columns))
        if not resample_uneven or planes > limit:
            return Placement(ordered, None, None, (*findings, *uneven))
        places_k = tuple(np.round(along_mm / step_mm, 6).tolist())
        findings = [*findings, _resampled(uneven[0], ordered, planes, step_mm)]
    geometry = _grid(ordered, line * step_mm, planes)
    return Placement(ordered, geometry, places_k, (*findings, *_slice_tag(ordered, step_mm)))


def _single_slice(header: Header) -> Placement:
    extent_mm = next((mm for mm in (header.thickness_mm, header.slice_spacing_tag_mm) if mm is not None and mm > 0), 0)
    if not SMALLEST_MM <= extent_mm <= FARTHEST_MM:
        lone = refuse("single-slice", "one slice of unknown thickness; give the folder of the whole series")
        return Placement((header,), None, None, (lone,))
    normal = _axes((header,))[2]
    found = mend("single-slice", f"one slice, taken to be as deep as the scanner says: {extent_mm:g} mm")
    return Placement((header,), _grid((header,), normal * extent_mm, 1), None, (found,))


def _grid(ordered: Headers, step_lps_mm: Floats, planes: int) -> Geometry:
    row, column, _ = _axes(ordered)
    first, plane = ordered[0], _planes(ordered[:1])[0]
    affine = np.eye(4)
    affine[:3, 0] = row * plane.column_spacing_mm
    affine[:3, 1] = column * plane.row_spacing_mm
    affine[:3, 2] = step_lps_mm
    affine[:3, 3] = plane.position_lps_mm
    return Geometry.from_lps((first.columns, first.rows, planes), affine)


def _is_sensible(plane: Plane) -> bool:
    sides = (plane.row_spacing_mm, plane.column_spacing_mm)
    cosines = (*plane.row_cosines_lps, *plane.column_cosines_lps)
    largest = max(*map(abs, plane.position_lps_mm), *sides)
    return largest <= FARTHEST_MM and min(sides) >= SMALLEST_MM and max(map(abs, cosines)) <= FARTHEST_MM


def _cosine_errors(headers: Headers) -> Floats:
    cosines = np.array([(plane.row_cosines_lps, plane.column_cosines_lps) for plane in _planes(headers)])
    lengths = np.abs(np.linalg.norm(cosines, axis=2) - 1.0).max(axis=1)
    return np.asarray(np.maximum(lengths, np.abs((cosines[:, 0] * cosines[:, 1]).sum(axis=1))))


def _axes(headers: Headers) -> tuple[Floats, Floats, Floats]:
    """Unit vectors along rows, down columns and along the normal, LPS; the same for any order of the files."""
    row, column = min((plane.row_cosines_lps, plane.column_cosines_lps) for plane in _planes(headers))
    along_row = np.array(row) / np.linalg.norm(row)
    down_column = np.array(column) - (np.array(column) @ along_row) * along_row
    down_column /= np.linalg.norm(down_column)
    return along_row, down_column, np.cross(along_row, down_column)


def _positions(headers: Headers) -> Floats:
    return np.array([plane.position_lps_mm for plane in _planes(headers)])


def _along_mm(headers: Headers) -> Floats:
    return np.asarray(_positions(headers) @ _axes(headers)[2])


def _pixel_mm(headers: Headers) -> float:
    (plane,) = _planes(headers[:1])
    return min(plane.row_spacing_mm, plane.column_spacing_mm)


def _same_place_mm(gaps_mm: Floats, pixel_mm: float) -> float:
    """Below this a gap is what rounding leaves of none: small beside a pixel, and beside the gaps between slices."""
    large = gaps_mm[gaps_mm > gaps_mm.max(initial=0.0) / 10]
    between_mm = float(np.median(large)) if len(large) else 0.0
    return max(SAME_PLACE * pixel_mm, min(OFF_LINE * pixel_mm, OFF_STEP * between_mm))


def _same_position(ordered: Headers, repeats: npt.NDArray[np.bool_]) -> Finding:
    places = len(ordered) - int(repeats.sum())
    kinds = [{**dict(header.kinds), "transfer syntax": header.transfer_syntax.encode()} for header in ordered]
    differing = [kind for kind in kinds[0] if kind != "instance number" and len({k.get(kind) for k in kinds}) > 1]
    what = f"they differ in {', '.join(differing)}" if differing else "nothing in the headers tells them apart"
    first = int(np.argmax(repeats))
    return ask(
        "same-position",
        f"{len(ordered)} slices at {places} positions, {files(ordered[first : first + 2])} among them; {what}; "
        "leave the slices of one volume in the folder",
    )


def _line(offsets_lps_mm: Floats, along_mm: Floats, ordered: Headers) -> tuple[Floats, list[Finding]]:
    """Where the stack goes for each millimetre along the normal, LPS, and whether it is straight and upright."""
    normal, pixel_mm = _axes(ordered)[2], _pixel_mm(ordered)
    sideways = offsets_lps_mm - along_mm[:, None] * normal
    end = sideways[-1]
    bend_mm = float(np.linalg.norm(sideways - (along_mm / along_mm[-1])[:, None] * end, axis=1).max())
    drift_mm = float(np.linalg.norm(end))
    if bend_mm > OFF_LINE * pixel_mm:
        shifted = f"slices are shifted sideways against each other by up to {bend_mm:.3g} mm"
        return normal, [refuse("shifted-slices", shifted)]
    if drift_mm <= max(OFF_LINE * pixel_mm, COSINE_TOLERANCE * along_mm[-1]):
        return normal, []
    degrees = float(np.degrees(np.arctan2(drift_mm, along_mm[-1])))
    leans = f"the stack is tilted by {degrees:.2f} degrees against its slices"
    if degrees > MAX_TILT_DEG:
        return normal, [refuse("gantry-tilt", f"{leans}, more than any scanner tilts")]
    return normal + end / along_mm[-1], [mend("gantry-tilt", f"{leans}; the grid is sheared like it")]


def _uneven(ordered: Headers, along_mm: Floats) -> Iterator[Finding]:
    gaps = np.diff(along_mm)
    step = along_mm[-1] / len(gaps)
    tag = _two_slices_tag_mm(ordered, along_mm)
    if tag:
        yield refuse(
            "uneven-spacing",
            f"two slices {step:.4g} mm apart, but SpacingBetweenSlices is {tag:g}: slices between may be missing; "
            f"{_OPTION}",
        )
    if np.abs(along_mm - step * np.arange(len(ordered))).max() <= OFF_STEP * step:
        return
    usual = float(np.percentile(gaps, 50, method="lower"))
    multiples = np.rint(gaps / usual)
    if (np.abs(gaps / usual - multiples) <= WHOLE_GAP).all() and multiples.max() > 1:
        holes = np.flatnonzero(multiples > 1)
        places = [f"{gaps[n]:.4g} mm after {slice_name(ordered[n])}" for n in holes[:NAMED]]
        more = [f"{len(holes) - NAMED} more gaps"] if len(holes) > NAMED else []
        missing = int((multiples - 1).sum())
        where_ = ", ".join(places + more)
        yield refuse("missing-slices", f"{missing} missing where slices are {usual:.4g} mm apart: {where_}; {_OPTION}")
    else:
        common = Counter(f"{gap:.4g} mm" for gap in gaps).most_common(NAMED)
        seen = ", ".join(f"{count} gaps of {mm}" if count > 1 else f"one of {mm}" for mm, count in common)
        yield refuse("uneven-spacing", f"slices are {gaps.min():.4g} to {gaps.max():.4g} mm apart: {seen}; {_OPTION}")


def _two_slices_tag_mm(ordered: Headers, along_mm: Floats) -> float:
    """SpacingBetweenSlices of two slices that lie farther apart; otherwise 0."""
    tag = abs(ordered[0].slice_spacing_tag_mm or 0.0)
    return tag if len(ordered) == 2 and tag < (1 - SLICE_TAG) * along_mm[-1] else 0.0


def _usual_gap_mm(ordered: Headers, along_mm: Floats) -> float:
    """The smallest gap that a good part of all gaps share."""
    gaps = np.sort(np.diff(along_mm))
    tag_mm = _two_slices_tag_mm(ordered, along_mm)
    if tag_mm:
        return tag_mm
    alike = np.searchsorted(gaps, gaps * (1 + WHOLE_GAP)) - np.arange(len(gaps))
    usual = np.flatnonzero(alike >= max(2, USUAL_GAP * len(gaps)))
    if not len(usual):
        return float(np.percentile(gaps, 50, method="lower"))
    first = int(usual[0])
    return float(np.median(gaps[first : first + int(alike[first])]))


def _resampled(fault: Finding, ordered: Headers, planes: int, step_mm: float) -> Finding:
    why = fault.evidence.removesuffix(f"; {_OPTION}")
    done = f"{len(ordered)} slices interpolated linearly onto {planes} planes {step_mm:.4g} mm apart"
    return mend("resampled", f"{done}, because of {fault.name}: {why}")


def _slice_tag(ordered: Headers, step_mm: float) -> Iterator[Finding]:
    tag = ordered[0].slice_spacing_tag_mm
    if tag is not None and abs(tag - step_mm) > SLICE_TAG * step_mm:
        yield mend("slice-spacing-tag", f"SpacingBetweenSlices is {tag:g}, positions are {step_mm:.4g} mm apart")


def _planes(headers: Headers) -> list[Plane]:
    return [header.plane for header in headers if header.plane is not None]
