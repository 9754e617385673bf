"""Measures labels anew, from points in mm and without a hull, to judge what a report says.

The longest distance between any two points of a body is its greatest width over all directions. Widths need only the
extreme points in a direction, so no pairs are compared and no hull is built: many directions give the greatest width
to a part in a thousand, and turning the best of them towards the two extreme points makes it exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk

from transforms.geometry import Geometry

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

_DIRECTIONS, _REFINED, _ANGLES = 400, 6, 60


@dataclass(frozen=True, eq=False)
class Body:
    """Voxels: (N, 3) indices of the first and last of every row, sorted by slice, on their grid."""

    ends_ijk: Indices
    geometry: Geometry

    @property
    def points_mm(self) -> Floats:
        """Centres of the voxels, LPS+ mm."""
        return placed_mm(self.ends_ijk, self.geometry)

    @property
    def steps_mm(self) -> Floats:
        """(3, 3): row a is the way from a voxel to the next along axis a."""
        return self.geometry.affine_lps[:3, :3].T

    def on_slice(self, k: int) -> Body:
        """The voxels on one slice."""
        return Body(self.ends_ijk[self.ends_ijk[:, 2] == k], self.geometry)


def placed_mm(points_ijk: npt.NDArray[Any], geometry: Geometry) -> Floats:
    """(N, 3) voxel indices to LPS+ mm."""
    return np.asarray(geometry.affine_lps[:3, 3] + points_ijk @ geometry.affine_lps[:3, :3].T)


def intensities(values: npt.NDArray[Any]) -> dict[str, float]:
    """Mean, deviation, minimum and maximum of the values (N,)."""
    ordered = np.sort(values.astype(np.float64))
    mean = float(np.sum(ordered) / len(ordered))
    deviation = float(np.linalg.norm(ordered - mean) / np.sqrt(len(ordered)))
    return {"mean": mean, "deviation": deviation, "minimum": float(ordered[0]), "maximum": float(ordered[-1])}


def largest_bodies(mask: npt.NDArray[np.bool_], geometry: Geometry) -> Iterator[Body]:
    """The largest connected piece, and all others of the same size."""
    start_ijk = [int(np.flatnonzero(mask.any(axis=axes))[0]) for axes in ((1, 2), (0, 2), (0, 1))]
    stop_ijk = [int(np.flatnonzero(mask.any(axis=axes))[-1]) + 1 for axes in ((1, 2), (0, 2), (0, 1))]
    cut = mask[tuple(slice(a, b) for a, b in zip(start_ijk, stop_ijk, strict=True))]
    pieces = sitk.GetArrayFromImage(sitk.ConnectedComponent(sitk.GetImageFromArray(cut.T.astype(np.uint8)), True))
    counts = np.bincount(pieces.ravel())
    counts[0] = 0
    for number in np.flatnonzero(counts == counts.max()):
        yield Body(_row_ends(pieces == number) + np.array(start_ijk), geometry)


def _row_ends(mask_kji: npt.NDArray[np.bool_]) -> Indices:
    """(N, 3) indices i, j, k of the first and last voxel in each row, sorted by slice."""
    k, j, i = np.nonzero(mask_kji)
    row = k * mask_kji.shape[1] + j
    is_first = np.diff(row, prepend=-1) != 0
    is_last = np.diff(row, append=-1) != 0
    return np.asarray(np.stack([i, j, k], axis=1)[is_first | is_last])


def longest_mm(body: Body) -> float:
    """The longest distance between the faces' centres of a body's voxels."""
    # Evenly over the half sphere (Fibonacci lattice).
    n = np.arange(_DIRECTIONS)
    height, turn = (n + 0.5) / _DIRECTIONS, n * np.pi * (3 - np.sqrt(5))
    radius = np.sqrt(1 - height**2)
    directions = np.stack([radius * np.cos(turn), radius * np.sin(turn), height], axis=1)
    return _refined_mm(body.points_mm, body.steps_mm, directions)


def longest_in_plane_mm(body: Body) -> float:
    """The same for voxels of one slice, within the slice."""
    return _refined_mm(body.points_mm, body.steps_mm[:2], _in_plane_directions(body))


def widths_mm(body: Body) -> Floats:
    """Per slice that the body meets, its greatest width within the slice over some directions: almost the longest."""
    starts = np.flatnonzero(np.diff(body.ends_ijk[:, 2], prepend=-1))
    points_mm, steps_mm = body.points_mm, body.steps_mm[:2]
    widest_mm = np.zeros(len(starts))
    for direction in _in_plane_directions(body):
        places_mm = points_mm @ direction
        spans_mm = np.maximum.reduceat(places_mm, starts) - np.minimum.reduceat(places_mm, starts)
        widest_mm = np.maximum(widest_mm, spans_mm + np.abs(steps_mm @ direction).max())
    return widest_mm


def _in_plane_directions(body: Body) -> Floats:
    along, other = body.steps_mm[:2]
    along = along / np.linalg.norm(along)
    across = other - (other @ along) * along
    across = across / np.linalg.norm(across)
    angles = np.arange(_ANGLES) * np.pi / _ANGLES
    return np.asarray(np.outer(np.cos(angles), along) + np.outer(np.sin(angles), across))


def _refined_mm(points_mm: Floats, steps_mm: Floats, directions: Floats) -> float:
    spans_mm = np.array([_span(points_mm, steps_mm, direction) for direction in directions])
    best = np.argsort(np.linalg.norm(spans_mm, axis=1))[-_REFINED:]
    return max(_turned_mm(points_mm, steps_mm, spans_mm[n]) for n in best)


def _span(points_mm: Floats, steps_mm: Floats, direction: Floats) -> Floats:
    """From the least to the most extreme face centre in a direction."""
    places_mm = points_mm @ direction
    leaning_mm = steps_mm @ direction
    side = int(np.abs(leaning_mm).argmax())
    faces_mm = steps_mm[side] * np.sign(leaning_mm[side])
    return np.asarray(points_mm[places_mm.argmax()] - points_mm[places_mm.argmin()] + faces_mm)


def _turned_mm(points_mm: Floats, steps_mm: Floats, span_mm: Floats) -> float:
    """Turn towards the extreme points until they stay the same."""
    while True:
        length_mm = float(np.linalg.norm(span_mm))
        span_mm = _span(points_mm, steps_mm, span_mm / length_mm)
        if np.linalg.norm(span_mm) <= length_mm * (1 + 1e-12):
            return length_mm


def crossings_mm(outline_mm: Floats, along: Floats) -> float:
    """The longest line inside a convex outline (N, 3) at right angles to the unit vector `along`."""
    t_mm = outline_mm @ along
    across_mm = outline_mm - np.outer(t_mm, along)
    following_mm, following_t = np.roll(across_mm, -1, axis=0), np.roll(t_mm, -1)
    longest = 0.0
    for place in t_mm:
        meets = (np.minimum(t_mm, following_t) <= place) & (place <= np.maximum(t_mm, following_t))
        steps = np.where(np.abs(following_t - t_mm) < 1e-9, 1.0, following_t - t_mm)[meets]
        part = ((place - t_mm[meets]) / steps)[:, None]
        crossed = across_mm[meets] + part * (following_mm[meets] - across_mm[meets])
        longest = max(longest, float(np.linalg.norm(crossed[:, None] - crossed[None], axis=2).max(initial=0.0)))
    return longest
