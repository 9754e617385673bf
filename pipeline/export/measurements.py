"""What is measured of each label: volume, intensity, longest diameters. Numbers only, no DICOM.

Volume and intensity are those of all voxels of a label. Diameters are those of its largest connected piece
(26 neighbours), so that a stray voxel elsewhere does not stretch them. They run between the centres of voxel faces
that the piece shows to the outside, where its surface crosses the lines between voxel centres: the mesh that the
Image Biomarker Standardisation Initiative measures (reference manual, maximum 3D diameter L0JK; Zwanenburg et al.,
Radiology 2020;295:328). A box of n voxels of s mm is n * s mm long, a single voxel s mm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.ndimage import find_objects
from scipy.ndimage import label as label_pieces
from scipy.spatial import ConvexHull
from scipy.spatial.distance import cdist

from pipeline.segmentation import Segmentation
from transforms.geometry import Geometry

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
Window = tuple[slice, ...]

_BLOCK = 1000
"""Points that are compared with all others at a time: at most a few thousand lie on a hull."""


@dataclass(frozen=True)
class Intensity:
    """Of the voxels of a label, in the image's own unit. `deviation` is the population's (IBSI ECT3 is its square)."""

    mean: float
    deviation: float
    minimum: float
    maximum: float


@dataclass(frozen=True, eq=False)
class Diameter:
    """A straight line; `ends_lps_mm` is (2, 3)."""

    length_mm: float
    ends_lps_mm: Floats


@dataclass(frozen=True, eq=False)
class InPlane:
    """Two diameters on slice `k`, the one where the longest of all slices lies.

    `longest` is measured as in RECIST 1.1 (Eisenhauer et al., Eur J Cancer 2009;45:228), in the plane of
    acquisition. `perpendicular` is the longest line at right angles to it inside the convex outline.
    `outline_ij` (N, 2) are the corners of that outline in voxel indices, the first an end of the longest diameter.
    """

    k: int
    longest: Diameter
    perpendicular: Diameter
    outline_ij: Floats


@dataclass(frozen=True, eq=False)
class Measures:
    """One label. A label without a voxel has a volume of 0 and nothing else."""

    label_id: int
    voxels: int
    volume_mm3: float
    intensity: Intensity | None = None
    longest: Diameter | None = None
    in_plane: InPlane | None = None

    @property
    def volume_ml(self) -> float:
        """Volume in millilitres."""
        return self.volume_mm3 / 1000


def measure(segmentation: Segmentation, voxels: npt.NDArray[Any]) -> tuple[Measures, ...]:
    """Measure all labels of the schema, in its order.

    Args:
        segmentation: the labels (I, J, K).
        voxels: the image (I, J, K) that they lie on, in the unit of its modality.

    Raises:
        ValueError: the two differ in shape, or a label is not in the schema.
    """
    if voxels.shape != segmentation.label_map.shape:
        raise ValueError(f"an image of {voxels.shape} under a label map of {segmentation.label_map.shape}")
    classes = segmentation.schema.classes_from_ids(segmentation.label_map)
    windows: Sequence[Window | None] = find_objects(classes, max_label=segmentation.schema.class_count - 1)
    return tuple(
        Measures(label_id, 0, 0.0)
        if window is None
        else _measure(label_id, classes[window] == c, voxels[window], window, segmentation.geometry)
        for c, (label_id, window) in enumerate(zip(segmentation.schema.ids, windows, strict=True), start=1)
    )


def _measure(label_id: int, mask: Mask, voxels: npt.NDArray[Any], window: Window, geometry: Geometry) -> Measures:
    inside = voxels[mask].astype(np.float64)
    start_ijk = np.array([part.start for part in window])
    piece = _largest_piece(mask)
    return Measures(
        label_id=label_id,
        voxels=len(inside),
        volume_mm3=len(inside) * geometry.voxel_volume_mm3,
        intensity=Intensity(float(inside.mean()), float(inside.std()), float(inside.min()), float(inside.max())),
        longest=_longest(_face_centres(piece) + start_ijk, geometry),
        in_plane=_longest_in_plane(piece, start_ijk, geometry),
    )


def _largest_piece(mask: Mask) -> Mask:
    """Voxels that touch by a face, an edge or a corner are of one piece; of equal pieces the first."""
    pieces, count = label_pieces(mask, structure=np.ones((3, 3, 3)))
    if count == 1:
        return mask
    return np.asarray(pieces == 1 + np.argmax(np.bincount(pieces.ravel())[1:]))


def _face_centres(mask: npt.NDArray[np.bool_]) -> Floats:
    """(N, axes) indices of the first and last outer face along every line of voxels, among which the hull's are."""
    points = []
    for axis in range(mask.ndim):
        lines = np.argwhere(mask.any(axis=axis)).astype(np.float64)
        occupied = np.moveaxis(mask, axis, -1)[tuple(lines.astype(int).T)]
        first = occupied.argmax(axis=-1)
        last = occupied.shape[-1] - 1 - occupied[:, ::-1].argmax(axis=-1)
        points += [np.insert(lines, axis, first - 0.5, axis=1), np.insert(lines, axis, last + 0.5, axis=1)]
    return np.concatenate(points)


def _longest(points_ijk: Floats, geometry: Geometry) -> Diameter:
    # The six faces of a voxel already span space, so a hull there always is.
    corners_ijk = points_ijk[np.sort(ConvexHull(points_ijk).vertices)]
    points_mm = _lps_mm(corners_ijk, geometry)
    best = (-1.0, 0, 0)
    for start in range(0, len(points_mm), _BLOCK):
        distances_mm = cdist(points_mm[start : start + _BLOCK], points_mm)
        a, b = np.unravel_index(distances_mm.argmax(), distances_mm.shape)
        best = max(best, (float(distances_mm[a, b]), start + int(a), int(b)), key=lambda found: found[0])
    length_mm, a, b = best
    return Diameter(length_mm, points_mm[[a, b]])


def _lps_mm(points_ijk: Floats, geometry: Geometry) -> Floats:
    return np.asarray(points_ijk @ geometry.affine_lps[:3, :3].T + geometry.affine_lps[:3, 3])


def _longest_in_plane(piece: Mask, start_ijk: npt.NDArray[np.int64], geometry: Geometry) -> InPlane:
    bounds_mm = _longest_possible_mm(piece, geometry)
    best: InPlane | None = None
    for k in np.argsort(-bounds_mm, kind="stable"):
        if best is not None and bounds_mm[k] <= best.longest.length_mm:
            break
        points_ij = _face_centres(piece[:, :, k]) + start_ijk[:2]
        found = _in_plane(points_ij[ConvexHull(points_ij).vertices], int(k + start_ijk[2]), geometry)
        if best is None or found.longest.length_mm > best.longest.length_mm:
            best = found
    assert best is not None
    return best


def _longest_possible_mm(piece: Mask, geometry: Geometry) -> Floats:
    """Per slice, the longer diagonal of the box around the piece; -1 where there is none of it."""
    i_mm, j_mm, _ = geometry.affine_lps[:3, :3].T
    sides = [_extents(np.asarray(piece.any(axis=axis))) for axis in (1, 0)]
    diagonals_mm = [np.outer(sides[0], i_mm) + sign * np.outer(sides[1], j_mm) for sign in (1, -1)]
    longest_mm = np.linalg.norm(diagonals_mm, axis=2).max(axis=0)
    return np.asarray(np.where(sides[0] > 0, longest_mm, -1.0))


def _extents(occupied: Mask) -> npt.NDArray[np.int64]:
    """Per column, from the first row that is occupied to the last."""
    extents = len(occupied) - occupied.argmax(axis=0) - occupied[::-1].argmax(axis=0)
    return np.asarray(np.where(occupied.any(axis=0), extents, 0))


def _in_plane(outline_ij: Floats, k: int, geometry: Geometry) -> InPlane:
    outline_mm = _lps_mm(np.insert(outline_ij, 2, k, axis=1), geometry)
    distances_mm = cdist(outline_mm, outline_mm)
    a, b = np.unravel_index(distances_mm.argmax(), distances_mm.shape)
    longest = Diameter(float(distances_mm[a, b]), outline_mm[[a, b]])
    return InPlane(k, longest, _perpendicular(longest, outline_mm), np.roll(outline_ij, -int(a), axis=0))


def _perpendicular(longest: Diameter, outline_mm: Floats) -> Diameter:
    """The longest line across a convex outline at right angles to its diameter; it begins or ends at a corner."""
    start_mm, end_mm = longest.ends_lps_mm
    along = (end_mm - start_mm) / longest.length_mm
    along_mm = (outline_mm - start_mm) @ along
    sideways = outline_mm - start_mm - np.outer(along_mm, along)
    across = sideways[np.linalg.norm(sideways, axis=1).argmax()]
    across = across / np.linalg.norm(across)
    across_mm = sideways @ across
    # The two ends of the diameter lie on both sides of the outline, whatever their last digits.
    is_end = (outline_mm == start_mm).all(axis=1) | (outline_mm == end_mm).all(axis=1)
    high, low = (_side(along_mm, across_mm, is_end | (sign * across_mm > 0)) for sign in (1, -1))
    widths_mm = high - low
    widest = int(widths_mm.argmax())
    foot_mm = start_mm + along_mm[widest] * along
    ends_mm = np.stack([foot_mm + low[widest] * across, foot_mm + high[widest] * across])
    return Diameter(float(widths_mm[widest]), ends_mm)


def _side(along_mm: Floats, across_mm: Floats, is_on: npt.NDArray[np.bool_]) -> Floats:
    """How far one side of the outline lies from the diameter, beside each of the outline's corners."""
    order = np.argsort(along_mm[is_on], kind="stable")
    return np.asarray(np.interp(along_mm, along_mm[is_on][order], across_mm[is_on][order]))
