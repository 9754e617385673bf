"""Closed surfaces of labels, in mm of the patient, by marching cubes (Lorensen and Cline, 1987).

A surface lies between each pair of neighbouring voxel centres of which one is the label's, and nowhere else: it
separates the label's voxel centres from all others, exactly, and each of its edges belongs to two triangles.
Voxels that touch at an edge or a corner only are not joined. The grid may be oblique, sheared or left-handed.

Smoothing keeps this: a point moves only on the line between the two voxel centres that it separates.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage, sparse
from scipy.sparse.csgraph import connected_components
from skimage.measure import marching_cubes

from pipeline.segmentation import Segmentation
from transforms.geometry import Geometry
from transforms.labels import Label

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

TAUBIN = (0.5, -0.53)
"""The two steps of a round of smoothing, towards the neighbours' mean and back (Taubin, SIGGRAPH 1995)."""

REACH_VOXELS = 0.4
"""How far smoothing moves a point from the middle between two voxel centres; half would reach a centre."""

_VOLUME_STEPS = 20


@dataclass(frozen=True, eq=False)
class Surface:
    """A closed surface: points (V, 3) in LPS+ mm, and triangles (T, 3) of points, counter-clockwise from outside."""

    points_lps_mm: Floats
    triangles: Ints


def surfaces(segmentation: Segmentation, *, smoothing: int = 0) -> Iterator[tuple[Label, Surface]]:
    """The surface of each label that occurs, in the schema's order.

    Args:
        segmentation: the label map.
        smoothing: rounds of smoothing, 0 for none. Each connected surface keeps its volume.
    """
    classes = segmentation.schema.classes_from_ids(segmentation.label_map)
    boxes = ndimage.find_objects(classes, max_label=len(segmentation.schema.labels))
    for c, (label, box) in enumerate(zip(segmentation.schema.labels, boxes, strict=True), start=1):
        if box is not None:
            start_ijk = tuple(axis.start for axis in box)
            yield label, surface_of(classes[box] == c, start_ijk, segmentation.geometry, smoothing=smoothing)


def surface_of(
    mask: npt.NDArray[np.bool_], start_ijk: tuple[int, ...], geometry: Geometry, *, smoothing: int = 0
) -> Surface:
    """The surface of a mask (I, J, K) that is not empty, whose first voxel is `start_ijk` of the grid."""
    # What ends at the box's border, or the volume's, is closed there.
    padded = np.pad(mask, 1).astype(np.float32)
    points, triangles, _, _ = marching_cubes(padded, 0.5, method="lorensen", gradient_direction="ascent")
    # All points are middles between two centres; rounding takes away what 32-bit floats added.
    middles = np.rint(points.astype(np.float64) * 2) / 2
    steps_lps_mm = geometry.affine_lps[:3, :3]
    if np.linalg.det(steps_lps_mm) < 0:
        triangles = triangles[:, ::-1]
    net = _Net(middles, triangles.astype(np.int64), steps_lps_mm)
    if smoothing:
        middles = net.placed(_smoothed(net, _outwards(net, padded), smoothing))
    first_lps_mm = steps_lps_mm @ (np.array(start_ijk) - 1) + geometry.affine_lps[:3, 3]
    return Surface(middles @ steps_lps_mm.T + first_lps_mm, net.triangles)


@dataclass(frozen=True, eq=False)
class _Net:
    """Points (V, 3) in voxels, each in the middle between two centres; `steps_lps_mm` are a voxel's sides."""

    middles: Floats
    triangles: Ints
    steps_lps_mm: Floats

    @property
    def axes(self) -> Ints:
        """(V,): the axis on which a point lies between two centres."""
        return np.asarray(np.argmax(self.middles % 1.0, axis=1))

    def placed(self, shifts: Floats) -> Floats:
        """(V, 3): the points after a shift (V,) along their axes, in voxels."""
        moved = self.middles.copy()
        moved[np.arange(len(moved)), self.axes] += shifts
        return moved


def _outwards(net: _Net, padded: npt.NDArray[np.float32]) -> Floats:
    """(V,): 1 where the label's centre comes first on a point's axis, -1 where it comes last."""
    before = np.floor(net.middles).astype(np.int64)
    return np.where(padded[tuple(before.T)] > 0, 1.0, -1.0)


def _smoothed(net: _Net, outwards: Floats, rounds: int) -> Floats:
    """(V,): how far each point moves along its axis, in voxels."""
    count = len(net.middles)
    a, b, c = net.triangles.T
    rows, columns = np.concatenate([a, b, c]), np.concatenate([b, c, a])
    # Each edge is one of two triangles that run through it in opposite directions.
    neighbours = sparse.csr_array((np.ones(len(rows)), (rows, columns)), shape=(count, count))
    share = 1.0 / np.bincount(rows, minlength=count)
    directions_mm = net.steps_lps_mm.T[net.axes]
    lengths2 = (directions_mm**2).sum(axis=1)
    shifts = np.zeros(count)
    for step in TAUBIN * rounds:
        points_mm = net.placed(shifts) @ net.steps_lps_mm.T
        pull_mm = (neighbours @ points_mm) * share[:, None] - points_mm
        shifts += step * (pull_mm * directions_mm).sum(axis=1) / lengths2
        shifts = np.clip(shifts, -REACH_VOXELS, REACH_VOXELS)
    part = connected_components(neighbours, directed=False)[1]
    return _with_volumes(net, shifts, outwards, part)


def _with_volumes(net: _Net, shifts: Floats, outwards: Floats, part: Ints) -> Floats:
    """Move each part's points outwards or inwards by one distance, so that it encloses what it did without shifts."""
    wanted = _volumes(net, np.zeros_like(shifts), part)
    low, high = np.full(len(wanted), -2 * REACH_VOXELS), np.full(len(wanted), 2 * REACH_VOXELS)
    for _ in range(_VOLUME_STEPS):
        middle = (low + high) / 2
        found = _volumes(net, _offset(shifts, outwards, middle[part]), part)
        low, high = np.where(found < wanted, middle, low), np.where(found < wanted, high, middle)
    return _offset(shifts, outwards, ((low + high) / 2)[part])


def _offset(shifts: Floats, outwards: Floats, distances: Floats) -> Floats:
    return np.clip(shifts + outwards * distances, -REACH_VOXELS, REACH_VOXELS)


def _volumes(net: _Net, shifts: Floats, part: Ints) -> Floats:
    """Signed volume that each part encloses (divergence theorem), in voxels."""
    corners = net.placed(shifts)[net.triangles]
    sixfold = np.einsum("ti,ti->t", corners[:, 0], np.cross(corners[:, 1], corners[:, 2]))
    sign = np.sign(np.linalg.det(net.steps_lps_mm))
    return np.asarray(sign * np.bincount(part[net.triangles[:, 0]], weights=sixfold) / 6)
