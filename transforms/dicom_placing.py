"""Where the slices of a DICOM series lie, and what can be wrong with that, each by its name.

A check sees the headers of one stack and gives findings; nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from transforms.dicom_findings import NAMED, Finding, Headers, distinct, files, mend, refuse, where
from transforms.dicom_header import Header, Plane
from transforms.geometry import Geometry

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


def _no_position(headers: Headers) -> Iterator[Finding]:
    if lost := where(headers, lambda header: header.plane is None):
        yield refuse(
            "no-position",
            f"ImagePositionPatient, ImageOrientationPatient or PixelSpacing is missing or malformed in {files(lost)}",
        )


def _orthonormal(headers: Headers) -> Iterator[Finding]:
    errors = [_cosine_error(plane) for plane in _planes(headers)]
    worst = max(errors)
    if worst > COSINE_TOLERANCE:
        crooked = [header for header, error in zip(headers, errors, strict=True) if error > COSINE_TOLERANCE]
        yield refuse("not-orthonormal", f"direction cosines of {files(crooked)} are off by {worst:.2g}")
    elif worst > REPORTED_COSINES:
        yield mend("cosines-rounded", f"direction cosines were off by {worst:.2g} and made orthonormal")


def _one_frame(headers: Headers) -> Iterator[Finding]:
    sizes = distinct(headers, lambda header: f"{header.columns}x{header.rows}")
    if len(sizes) > 1:
        yield refuse("several-matrix-sizes", f"slices of {', '.join(sizes[:NAMED])} pixels in one series")
    planes = _planes(headers)
    spacings = np.array([(plane.row_spacing_mm, plane.column_spacing_mm) for plane in planes])
    if (np.ptp(spacings, axis=0) > SAME_SPACING * spacings.min(axis=0)).any():
        yield refuse("several-pixel-spacings", f"from {spacings.min():g} to {spacings.max():g} mm in one series")
    cosines = np.array([(plane.row_cosines_lps, plane.column_cosines_lps) for plane in planes])
    if np.ptp(cosines, axis=0).max() > COSINE_TOLERANCE:
        count = len({tuple(np.round(c, 2).ravel().tolist()) for c in cosines})
        yield refuse("several-orientations", f"slices of about {max(count, 2)} orientations in one series")


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
        yield refuse("single-slice", "one slice has no slice distance; give the folder of the whole series")
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
    return refuse(
        "same-position",
        f"{len(ordered)} slices at {places} positions, {files(ordered[first : first + 2])} among them; {what}",
    )


def _crooked(off_axis_mm: Floats, along_mm: Floats, pixel_mm: float) -> Iterator[Finding]:
    end = off_axis_mm[-1]
    bends = off_axis_mm - (along_mm / along_mm[-1])[:, None] * end
    bend_mm, drift_mm = float(np.linalg.norm(bends, axis=1).max()), float(np.linalg.norm(end))
    if bend_mm > OFF_LINE * pixel_mm:
        yield refuse("shifted-slices", f"slices are shifted sideways against each other by up to {bend_mm:.3g} mm")
    elif drift_mm > max(OFF_LINE * pixel_mm, COSINE_TOLERANCE * along_mm[-1]):
        degrees = np.degrees(np.arctan2(drift_mm, along_mm[-1]))
        yield refuse("gantry-tilt", f"the stack is tilted by {degrees:.2f} degrees against its slices")


def _uneven(ordered: Headers, along_mm: Floats) -> Iterator[Finding]:
    gaps = np.diff(along_mm)
    step = along_mm[-1] / len(gaps)
    tag = ordered[0].slice_spacing_tag_mm
    if len(gaps) == 1 and tag and abs(abs(tag) - step) > SLICE_TAG * step:
        yield refuse(
            "uneven-spacing",
            f"two slices {step:.4g} mm apart, but SpacingBetweenSlices is {tag:g}: slices between may be missing",
        )
    if np.abs(along_mm - step * np.arange(len(ordered))).max() <= OFF_STEP * step:
        return
    usual = float(np.percentile(gaps, 50, method="lower"))
    multiples = np.rint(gaps / usual)
    if (np.abs(gaps / usual - multiples) <= WHOLE_GAP).all() and multiples.max() > 1:
        holes = np.flatnonzero(multiples > 1)
        where = ", ".join(f"{gaps[n]:.4g} mm after {ordered[n].path.name}" for n in holes[:NAMED])
        missing = int((multiples - 1).sum())
        yield refuse("missing-slices", f"{missing} missing where slices are {usual:.4g} mm apart: {where}")
    else:
        yield refuse("uneven-spacing", f"slices are {gaps.min():.4g} to {gaps.max():.4g} mm apart")


def _slice_tag(ordered: Headers, step_mm: float) -> Iterator[Finding]:
    tag = ordered[0].slice_spacing_tag_mm
    if tag is not None and abs(tag - step_mm) > SLICE_TAG * step_mm:
        yield mend("slice-spacing-tag", f"SpacingBetweenSlices is {tag:g}, positions are {step_mm:.4g} mm apart")


def _planes(headers: Headers) -> list[Plane]:
    return [header.plane for header in headers if header.plane is not None]


_FRAME_CHECKS: tuple[Callable[[Headers], Iterator[Finding]], ...] = (_orthonormal, _one_frame)
