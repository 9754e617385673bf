"""Distances between the surfaces of two masks, in mm: surface Dice, Hausdorff and average distances.

A surface is made of elements, one for each cube of 2x2x2 voxels that holds both inside and outside: it lies at the
cube's centre and has the area of the triangles that marching cubes puts there (Nikolov et al., Deep learning to
achieve clinically applicable segmentation of head and neck anatomy for radiotherapy, arXiv:1809.04430, section 2.4).
Figures over a surface are weighted by area, so they do not depend on how finely it is sampled. Other software (MONAI,
SimpleITK) takes the centres of border voxels, each counting the same: its figures differ by up to about a voxel.

Arrays in, numbers out. NaN stands for "not defined": a distance to a surface that is not there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.ndimage import find_objects
from scipy.spatial import KDTree

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
Box = tuple[slice, slice, slice]

_CORNERS = tuple((a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1))
_CODES = 256
_IS_SURFACE = np.ones(_CODES, dtype=np.bool_)
_IS_SURFACE[[0, _CODES - 1]] = False


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
        sums = sum(float(distances @ areas) for distances, areas in (self._prediction, self._reference))
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
    surfaces, and with the volume only where it is not cropped to what the masks hold (`boxes_of_labels`).

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


def boxes_of_labels(prediction: Array, reference: Array) -> dict[int, tuple[slice, slice, slice]]:
    """Per label id that occurs in either of two label maps (I, J, K), the least box that holds it in both.

    Raises:
        ValueError: the shapes differ, or a label map does not hold integers.
    """
    if prediction.shape != reference.shape or prediction.dtype.kind not in "iu" or reference.dtype.kind not in "iu":
        raise ValueError(
            f"two label maps are compared, found {prediction.shape} of {prediction.dtype} and "
            f"{reference.shape} of {reference.dtype}"
        )
    held = [box for box in (_held(prediction), _held(reference)) if box is not None]
    if not held:
        return {}
    whole = _joined(held)
    found: dict[int, Box] = {}
    for label_map in (prediction, reference):
        # The transposed copy is contiguous for files, whose first axis runs fastest.
        part = np.ascontiguousarray(label_map[whole].T)
        for label_id, box in enumerate(find_objects(part.astype(_indexable(part), copy=False)), start=1):
            if box is not None:
                placed = tuple(
                    slice(b.start + w.start, b.stop + w.start) for b, w in zip(box[::-1], whole, strict=True)
                )
                known = [found[label_id]] if label_id in found else []
                found[label_id] = _joined([*known, (placed[0], placed[1], placed[2])])
    return dict(sorted(found.items()))


def _held(label_map: Array) -> Box | None:
    """The least box outside of which all is 0. Each axis is searched in what the axes before it left over."""
    box = [slice(None)] * 3
    for axis in np.argsort([-abs(step) for step in label_map.strides], kind="stable"):
        others = tuple(other for other in range(3) if other != axis)
        held = np.flatnonzero(label_map[tuple(box)].any(axis=others))
        if not held.size:
            return None
        box[axis] = slice(int(held[0]), int(held[-1]) + 1)
    return box[0], box[1], box[2]


def _joined(boxes: Sequence[Box]) -> Box:
    i, j, k = (slice(min(b[a].start for b in boxes), max(b[a].stop for b in boxes)) for a in range(3))
    return i, j, k


def _indexable(label_map: Array) -> npt.DTypeLike:
    """What find_objects takes: signed integers, and unsigned ones of 8 bits as they are."""
    return label_map.dtype if label_map.dtype == np.uint8 or label_map.dtype.kind == "i" else np.int64


def _cube_codes(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint8]:
    """(I + 1, J + 1, K + 1): which of the eight voxels of each cube belong to the mask, a bit each.

    Cube n of an axis lies between voxels n - 1 and n, of which those beyond the volume are outside the mask.
    """
    codes = np.zeros([n + 1 for n in mask.shape], dtype=np.uint8)
    bits = mask.astype(np.uint8)
    for bit, corner in enumerate(_CORNERS):
        # The voxel at corner 0 of cube n is voxel n - 1, that at corner 1 is voxel n.
        part = tuple(slice(1, None) if c == 0 else slice(None, -1) for c in corner)
        codes[part] |= bits << np.uint8(bit)
    return codes


def _surface_cubes(codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.intp]:
    """Flat indices of the cubes that hold both inside and outside."""
    return np.flatnonzero(_IS_SURFACE[codes])


@lru_cache(maxsize=32)
def _areas_mm2(i_mm: float, j_mm: float, k_mm: float) -> Floats:
    """(256,) area of the triangles of marching cubes in a cube of each code (Lorensen and Cline 1987)."""
    from skimage.measure import marching_cubes, mesh_surface_area

    if min(i_mm, j_mm, k_mm) <= 0:
        raise ValueError(f"a spacing is positive, found {i_mm:g}, {j_mm:g} and {k_mm:g} mm")
    areas = np.zeros(_CODES)
    for code in range(1, _CODES - 1):
        cube = np.array([(code >> bit) & 1 for bit in range(8)], dtype=np.float32).reshape(2, 2, 2)
        vertices, faces, *_ = marching_cubes(cube, 0.5, spacing=(i_mm, j_mm, k_mm), method="lorensen")
        areas[code] = mesh_surface_area(vertices, faces)
    areas.setflags(write=False)
    return areas


def _nearest_mm(
    cubes: npt.NDArray[np.intp], others: npt.NDArray[np.intp], shape: tuple[int, ...], spacing_mm: Floats
) -> Floats:
    """From each cube's centre to the nearest of the others; 0 for those that are among them."""
    if not (cubes.size and others.size):
        return np.full(cubes.size, np.inf)
    distances_mm = np.zeros(cubes.size)
    is_other = np.zeros(np.prod(shape), dtype=np.bool_)
    is_other[others] = True
    apart = np.flatnonzero(~is_other[cubes])
    if apart.size:
        tree = KDTree(_centres_mm(others, shape, spacing_mm), balanced_tree=False, compact_nodes=False)
        distances_mm[apart], _ = tree.query(_centres_mm(cubes[apart], shape, spacing_mm))
    return distances_mm


def _centres_mm(cubes: npt.NDArray[np.intp], shape: tuple[int, ...], spacing_mm: Floats) -> Floats:
    return np.stack(np.unravel_index(cubes, shape), axis=1) * spacing_mm


def _percentile(values: Floats, weights: Floats, percentile: float) -> float:
    """The least value that at least this part (%) of the weight does not exceed."""
    if percentile == 100:
        return float(values.max())
    order = np.argsort(values)
    reached = np.cumsum(weights[order])
    # Rounding of the sum must not push the last element out.
    index = int(np.searchsorted(reached, reached[-1] * percentile / 100.0 * (1 - 1e-12)))
    return float(values[order[min(index, len(order) - 1)]])
