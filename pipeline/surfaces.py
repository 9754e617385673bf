"""Distances between the surfaces of two masks, in mm: surface Dice, Hausdorff and average distances.

A surface is made of elements, one for each cube of 2x2x2 voxels that holds both inside and outside: it lies at the
cube's centre and has the area of the triangles that marching cubes puts there (Nikolov et al., Deep learning to
achieve clinically applicable segmentation of head and neck anatomy for radiotherapy, arXiv:1809.04430, section 2.4).
Figures over a surface are weighted by area, so they do not depend on how finely it is sampled. DeepMind's package
surface-distance has the same convention and the same figures. MONAI and SimpleITK take the centres of border voxels,
each counting the same: their Hausdorff distance differs by up to a voxel's diagonal, and every share and mean with
the number of voxels that lie where the surface is oblique.

Arrays in, numbers out. NaN stands for "not defined": a distance to a surface that is not there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.spatial import KDTree

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]

_CODES = 256
_NEAR_VOXELS = 120
"""Size of the ball around an element that is searched step by step; what two good readers differ by lies within."""


@dataclass(frozen=True, eq=False)
class SurfaceDistances:
    """From each element of one surface to the nearest of the other, both ways: distances (mm) and areas (mm2).

    Both empty where the masks are; infinite distances where one of them is.
    """

    to_reference_mm: Floats
    prediction_areas_mm2: Floats
    to_prediction_mm: Floats
    reference_areas_mm2: Floats

    def surface_dice(self, tolerance_mm: float) -> float:
        """Share of both surfaces that lies within the tolerance of the other one, by area; 0 to 1.

        NaN when both masks are empty, 0 when one is. Source: Nikolov et al., as above.
        """
        near = [
            float(areas[distances <= tolerance_mm].sum()) for distances, areas in (self._prediction, self._reference)
        ]
        whole = float(self.prediction_areas_mm2.sum() + self.reference_areas_mm2.sum())
        return sum(near) / whole if whole else float("nan")

    def hausdorff_mm(self, percentile: float = 100.0) -> float:
        """The larger of the two directed distances that this part (%) of the surface does not exceed.

        100 is the Hausdorff distance, 95 the usual robust one (HD95). NaN unless both masks hold something.
        Source: Huttenlocher et al., IEEE PAMI 15 (1993) 850-863.
        """
        if not self._is_defined:
            return float("nan")
        return max(_percentile(*self._prediction, percentile), _percentile(*self._reference, percentile))

    def average_mm(self) -> float:
        """Average symmetric surface distance: the mean over both surfaces, by area. NaN unless both hold something.

        Source: Heimann et al., IEEE TMI 28 (2009) 1251-1265.
        """
        if not self._is_defined:
            return float("nan")
        sums = sum(float((distances * areas).sum()) for distances, areas in (self._prediction, self._reference))
        return sums / float(self.prediction_areas_mm2.sum() + self.reference_areas_mm2.sum())

    @property
    def _prediction(self) -> tuple[Floats, Floats]:
        return self.to_reference_mm, self.prediction_areas_mm2

    @property
    def _reference(self) -> tuple[Floats, Floats]:
        return self.to_prediction_mm, self.reference_areas_mm2

    @property
    def _is_defined(self) -> bool:
        return bool(self.to_reference_mm.size and self.to_prediction_mm.size)


def surface_distances(prediction: Array, reference: Array, spacing_mm: Sequence[float]) -> SurfaceDistances:
    """Distances between the surfaces of two masks (I, J, K); what is not 0 belongs to them.

    A mask that touches the border of the volume ends there: it has a surface on that side too. Cost grows with the
    surfaces, and with the volume only where it is not cropped to what the masks hold.

    Raises:
        ValueError: the shapes differ, are not three axes, or a spacing is not positive.
    """
    inside, expected = np.asarray(prediction) != 0, np.asarray(reference) != 0
    if inside.shape != expected.shape or inside.ndim != 3:
        raise ValueError(f"two masks of three axes are compared, found {inside.shape} and {expected.shape}")
    spacing = np.array([float(s) for s in spacing_mm])
    codes, their_codes = _cube_codes(inside), _cube_codes(expected)
    cubes, their_cubes = _surface_cubes(codes), _surface_cubes(their_codes)
    areas = _areas_mm2(*spacing.tolist())
    return SurfaceDistances(
        _nearest_mm(cubes, their_cubes, codes.shape, spacing),
        areas[codes.reshape(-1)[cubes]],
        _nearest_mm(their_cubes, cubes, codes.shape, spacing),
        areas[their_codes.reshape(-1)[their_cubes]],
    )


def _cube_codes(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint8]:
    """(I + 1, J + 1, K + 1): which of the eight voxels of each cube belong to the mask, a bit each.

    Cube n of an axis lies between voxels n - 1 and n, of which those beyond the volume are outside the mask. Bit
    4 a + 2 b + c stands for the voxel at corner (a, b, c), where corner 0 of cube n is voxel n - 1.
    """
    codes = mask.view(np.uint8)
    for axis, bits in ((2, 1), (1, 2), (0, 4)):
        codes = _joined_along(codes, axis, np.uint8(bits))
    return codes


def _joined_along(codes: npt.NDArray[np.uint8], axis: int, bits: np.uint8) -> npt.NDArray[np.uint8]:
    """One longer along the axis: each code, and that of its next neighbour shifted by so many bits."""
    joined = np.zeros([n + (a == axis) for a, n in enumerate(codes.shape)], dtype=np.uint8)
    before, after = (tuple(s if a == axis else slice(None) for a in range(3)) for s in (slice(1, None), slice(-1)))
    joined[before] = codes
    joined[after] |= codes << bits
    return joined


def _surface_cubes(codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.intp]:
    """Flat indices of the cubes that hold both inside and outside: of neither code 0 nor 255, which wraps to 0."""
    return np.flatnonzero(codes + np.uint8(1) > 1)


@lru_cache(maxsize=32)
def _areas_mm2(i_mm: float, j_mm: float, k_mm: float) -> Floats:
    """(256,) area of the triangles of marching cubes in a cube of each code (Lorensen and Cline 1987).

    A code of more than four voxels has the area of its complement, as in the original table of 15 cubes: a mask and
    what is left of the world have the same surface.
    """
    if min(i_mm, j_mm, k_mm) <= 0:
        raise ValueError(f"a spacing is positive, found {i_mm:g}, {j_mm:g} and {k_mm:g} mm")
    codes, corners = _triangles()
    edges_mm = np.diff(corners, axis=1) * (i_mm, j_mm, k_mm)
    triangles_mm2 = 0.5 * np.linalg.norm(np.cross(edges_mm[:, 0], edges_mm[:, 1]), axis=1)
    areas: Floats = np.zeros(_CODES)
    np.add.at(areas, codes, triangles_mm2)
    is_full = np.array([code.bit_count() > 4 for code in range(_CODES)])
    areas[is_full] = areas[::-1][is_full]
    areas.setflags(write=False)
    return areas


@lru_cache(maxsize=1)
def _triangles() -> tuple[npt.NDArray[np.intp], Floats]:
    """Of all codes in a cube of side 1: the code of each triangle (T,), and its corners (T, 3, 3)."""
    from skimage.measure import marching_cubes

    codes, corners = [], []
    for code in range(1, _CODES - 1):
        cube = np.array([(code >> bit) & 1 for bit in range(8)], dtype=np.float32).reshape(2, 2, 2)
        vertices, faces, *_ = marching_cubes(cube, 0.5, method="lorensen")
        codes.append(np.full(len(faces), code))
        corners.append(vertices[faces].astype(np.float64))
    return np.concatenate(codes), np.concatenate(corners)


def _nearest_mm(
    cubes: npt.NDArray[np.intp], others: npt.NDArray[np.intp], shape: tuple[int, ...], spacing_mm: Floats
) -> Floats:
    """From each cube's centre to the nearest of the others; 0 for those that are among them.

    Asked only where the surfaces lie: first the near places around each cube, in the order of their distances, then
    a tree for what has no neighbour there. Both beat a distance transform of the box.
    """
    if not (cubes.size and others.size):
        return np.full(cubes.size, np.inf)
    steps, steps_mm = _near_steps(*spacing_mm.tolist())
    margin = np.abs(steps).max(axis=0)
    padded = tuple(int(n) for n in np.array(shape) + 2 * margin)
    places, other_places = _places(cubes, shape), _places(others, shape)
    is_other = np.zeros(math.prod(padded), dtype=np.bool_)
    is_other[np.ravel_multi_index(tuple((other_places + margin).T), padded)] = True
    distances_mm = np.zeros(cubes.size)
    left, at = np.arange(cubes.size), np.ravel_multi_index(tuple((places + margin).T), padded)
    strides = np.array([padded[1] * padded[2], padded[2], 1])
    for step, step_mm in zip((steps @ strides).tolist(), steps_mm.tolist(), strict=True):
        is_far = ~is_other[at + step]
        distances_mm[left] = step_mm
        left, at = left[is_far], at[is_far]
        if not left.size:
            return distances_mm
    distances_mm[left] = _far_mm(places[left], other_places, spacing_mm)
    return distances_mm


def _far_mm(places: npt.NDArray[np.intp], others: npt.NDArray[np.intp], spacing_mm: Floats) -> Floats:
    tree = KDTree(others * spacing_mm, leafsize=16, balanced_tree=False, compact_nodes=False)
    _, nearest = tree.query(places * spacing_mm)
    # From whole steps, so that a tolerance of a few voxels holds what is as many voxels away.
    steps_mm = (places - others[nearest]) * spacing_mm
    return np.asarray(np.sqrt(np.einsum("ij,ij->i", steps_mm, steps_mm)))


@lru_cache(maxsize=32)
def _near_steps(i_mm: float, j_mm: float, k_mm: float) -> tuple[npt.NDArray[np.intp], Floats]:
    """All steps (S, 3) from a voxel to those within a ball of `_NEAR_VOXELS`, nearest first, and their lengths (S,)."""
    spacing_mm = np.array([i_mm, j_mm, k_mm])
    limit_mm = float((0.75 / math.pi * _NEAR_VOXELS * spacing_mm.prod()) ** (1 / 3))
    reach = [int(limit_mm / side_mm) for side_mm in spacing_mm]
    steps = np.stack(np.meshgrid(*[np.arange(-n, n + 1) for n in reach], indexing="ij"), axis=-1).reshape(-1, 3)
    lengths_mm = np.sqrt(((steps * spacing_mm) ** 2).sum(axis=1))
    order = np.argsort(lengths_mm, kind="stable")
    order = order[lengths_mm[order] <= limit_mm]
    return steps[order], lengths_mm[order]


def _places(cubes: npt.NDArray[np.intp], shape: tuple[int, ...]) -> npt.NDArray[np.intp]:
    return np.stack(np.unravel_index(cubes, shape), axis=1)


def _percentile(values: Floats, weights: Floats, percentile: float) -> float:
    """The least value (of none below 0) that at least this part (%) of the weight does not exceed."""
    if percentile == 100:
        return float(values.max())
    # Where two surfaces are one, which is most of them, nothing has to be put in order.
    apart = np.flatnonzero(values)
    order = apart[np.argsort(values[apart])]
    whole = float(weights.sum())
    reached = whole - float(weights[order].sum()) + np.cumsum(weights[order])
    # Rounding of the sums must not push out the element at the limit.
    wanted = whole * (percentile / 100.0 - 1e-12)
    if not order.size or whole - float(weights[order].sum()) >= wanted:
        return 0.0
    index = int(np.searchsorted(reached, wanted))
    return float(values[order[min(index, len(order) - 1)]])
