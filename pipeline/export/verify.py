"""An exported file, read back by code that did not write it, is compared with what was to be written.

A mirrored or shifted segmentation looks right to validators and viewers; only this comparison finds it. A reader
(`verify_seg`, `verify_nifti`) shares no code with the writer: it gives the voxels of each label as points in LPS+ mm
by the file's own numbers. Here they are placed on the source grid and compared, voxel by voxel.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.errors import ExportError
from pipeline.metrics import confusion_counts
from pipeline.segmentation import Segmentation
from transforms.geometry import Geometry
from transforms.labels import MAX_LABEL_ID, LabelSchema

Floats = npt.NDArray[np.float64]

VOLUME_PART = 5e-3
"""How far a volume by the file's own spacings may be off, as a part of it."""


@dataclass(frozen=True, eq=False)
class Piece:
    """Voxels in a file: the id of their label, one for all or (N,) one each, their centres (N, 3) in LPS+ mm, and
    the volume of one.
    """

    label_id: int | npt.NDArray[Any]
    points_lps_mm: Floats
    voxel_volume_mm3: float


@dataclass(frozen=True)
class LabelFigures:
    """One label as read back. `dice` is None where it is in neither map, the distance where it is not in both."""

    id: int
    name: str
    voxels: int
    volume_mm3: float
    reference_volume_mm3: float
    dice: float | None
    centroid_distance_mm: float | None


@dataclass(frozen=True)
class Verification:
    """How a file reads back. `offset_voxels`: the farthest that a voxel lies from a centre of the source grid."""

    reader: str
    offset_voxels: float
    labels: tuple[LabelFigures, ...]

    def to_json(self) -> dict[str, Any]:
        """For the report beside the exported files."""
        return asdict(self)


def compare(
    pieces: Iterable[Piece],
    segmentation: Segmentation,
    *,
    reader: str,
    placing_voxels: float,
    least_dice: float = 1.0,
    volume_part: float = VOLUME_PART,
) -> Verification:
    """Place the pieces of a file on the grid of `segmentation`, and refuse any difference.

    Args:
        pieces: all labelled voxels of the file.
        segmentation: what was to be written.
        reader: what read the file, for the report.
        placing_voxels: how far a voxel may lie from a centre of the grid, in voxels, below one half.
        least_dice: 1 for formats that hold voxels; less for those that hold surfaces.
        volume_part: how far a volume may be off, as a part of it.

    Raises:
        ExportError: a label, a volume or a place differs.
    """
    found = _place(pieces, segmentation)
    verification = Verification(reader, found.offset_voxels, _figures(found, segmentation))
    limits = _Limits(placing_voxels, min(segmentation.geometry.spacing_mm), least_dice, volume_part)
    fault = _fault(verification, limits)
    if fault:
        raise ExportError(f"{fault}; this is a fault of volseg, please report it")
    return verification


def indices_of(points_lps_mm: Floats, geometry: Geometry) -> Floats:
    """(N, 3) LPS+ mm to (N, 3) voxel indices with fractions."""
    affine = geometry.affine_lps
    return np.asarray(np.linalg.solve(affine[:3, :3], (points_lps_mm - affine[:3, 3]).T).T)


@dataclass(frozen=True)
class _Limits:
    """What still counts as the same."""

    placing_voxels: float
    voxel_side_mm: float
    least_dice: float
    volume_part: float


@dataclass(frozen=True, eq=False)
class _Found:
    """A file's voxels on the source grid, and per class what its own numbers say."""

    label_map: npt.NDArray[Any]
    voxels: npt.NDArray[np.int64]
    volumes_mm3: Floats
    sums_lps_mm: Floats
    offset_voxels: float = 0.0


def _place(pieces: Iterable[Piece], segmentation: Segmentation) -> _Found:
    schema, geometry = segmentation.schema, segmentation.geometry
    found = _Found(
        label_map=np.zeros_like(segmentation.label_map),
        voxels=np.zeros(schema.class_count, dtype=np.int64),
        volumes_mm3=np.zeros(schema.class_count),
        sums_lps_mm=np.zeros((schema.class_count, 3)),
    )
    offset, classes = 0.0, _ClassTable(schema)
    for piece in pieces:
        _count(piece, classes, found)
        indices = indices_of(piece.points_lps_mm, geometry)
        nearest = np.rint(indices).astype(np.int64)
        offset = max(offset, float(np.abs(indices - nearest).max(initial=0.0)))
        # What lies outside the grid, or where another label lies already, is in no voxel: it lowers the Dice.
        is_inside = ((nearest >= 0) & (nearest < geometry.shape)).all(axis=1)
        ids = piece.label_id if isinstance(piece.label_id, int) else piece.label_id[is_inside]
        found.label_map[tuple(nearest[is_inside].T)] = ids
    return replace(found, offset_voxels=offset)


class _ClassTable:
    """Classes by label id; an id that the schema does not know is an ExportError."""

    def __init__(self, schema: LabelSchema) -> None:
        self._classes = np.zeros(MAX_LABEL_ID + 1, dtype=np.int64)
        self._classes[list(schema.ids)] = range(1, schema.class_count)

    def of(self, label_ids: int | npt.NDArray[Any]) -> npt.NDArray[np.int64]:
        ids = np.asarray(label_ids)
        found = self._classes[np.where((ids >= 0) & (ids <= MAX_LABEL_ID), ids, 0)]
        if not found.all():
            raise ExportError(f"it holds label {ids[found == 0].min()}, which the schema does not know")
        return found


def _count(piece: Piece, classes: _ClassTable, found: _Found) -> None:
    """Add a piece's voxels to what the file's own numbers say of their classes."""
    if isinstance(piece.label_id, int):
        # Files of many small pieces would be slow if each were counted over all classes.
        c, count = int(classes.of(piece.label_id)), len(piece.points_lps_mm)
        found.voxels[c] += count
        found.volumes_mm3[c] += count * piece.voxel_volume_mm3
        found.sums_lps_mm[c] += piece.points_lps_mm.sum(axis=0)
        return
    numbers = classes.of(piece.label_id)
    counts = np.bincount(numbers, minlength=len(found.voxels))
    found.voxels[:] += counts
    found.volumes_mm3[:] += counts * piece.voxel_volume_mm3
    for axis in range(3):
        found.sums_lps_mm[:, axis] += np.bincount(
            numbers, weights=piece.points_lps_mm[:, axis], minlength=len(found.voxels)
        )


def _figures(found: _Found, segmentation: Segmentation) -> tuple[LabelFigures, ...]:
    schema, geometry = segmentation.schema, segmentation.geometry
    reference = schema.classes_from_ids(segmentation.label_map)
    counts = confusion_counts(schema.classes_from_ids(found.label_map), reference, schema.class_count)
    centroids_lps_mm = _centroids_lps_mm(reference, schema.class_count, geometry)
    figures = []
    for c, label in enumerate(schema.labels, start=1):
        voxels, expected = int(found.voxels[c]), int(counts.reference[c])
        distance_mm = np.linalg.norm(found.sums_lps_mm[c] / max(voxels, 1) - centroids_lps_mm[c])
        figures.append(
            LabelFigures(
                id=label.id,
                name=label.name,
                voxels=voxels,
                volume_mm3=float(found.volumes_mm3[c]),
                reference_volume_mm3=expected * geometry.voxel_volume_mm3,
                dice=2 * int(counts.overlap[c]) / (voxels + expected) if voxels + expected else None,
                centroid_distance_mm=float(distance_mm) if voxels and expected else None,
            )
        )
    return tuple(figures)


def _centroids_lps_mm(classes: npt.NDArray[Any], class_count: int, geometry: Geometry) -> Floats:
    """(class_count, 3); meaningless for a class that does not occur."""
    voxels, sums_ijk = np.zeros(class_count), np.zeros((class_count, 3))
    for i, plane in enumerate(classes):
        j, k = np.nonzero(plane)
        values = plane[j, k]
        counted = np.bincount(values, minlength=class_count)
        voxels += counted
        sums_ijk[:, 0] += i * counted
        sums_ijk[:, 1] += np.bincount(values, weights=j, minlength=class_count)
        sums_ijk[:, 2] += np.bincount(values, weights=k, minlength=class_count)
    means_ijk = sums_ijk / np.maximum(voxels, 1)[:, None]
    return np.asarray(means_ijk @ geometry.affine_lps[:3, :3].T + geometry.affine_lps[:3, 3])


def _fault(verification: Verification, limits: _Limits) -> str | None:
    """The first difference in words, or None."""
    expected = "1" if limits.least_dice == 1 else f"at least {limits.least_dice:g}"
    for label in verification.labels:
        distance_mm = label.centroid_distance_mm or 0.0
        is_off = label.dice is not None and label.dice < limits.least_dice
        if is_off or distance_mm > limits.placing_voxels * limits.voxel_side_mm:
            return (
                f"label '{label.name}' reads back with Dice {label.dice:.4f} ({expected} expected) "
                f"and its centre {distance_mm:.2f} mm away"
            )
        if abs(label.volume_mm3 - label.reference_volume_mm3) > limits.volume_part * label.reference_volume_mm3:
            return (
                f"label '{label.name}' reads back with {label.volume_mm3:.1f} mm3 "
                f"({label.reference_volume_mm3:.1f} expected)"
            )
    if verification.offset_voxels > limits.placing_voxels:
        return f"voxels read back up to {verification.offset_voxels:.2f} voxels beside the source grid"
    return None
