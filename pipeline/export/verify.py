"""An exported file, read back by code that did not write it, is compared with what was to be written.

A mirrored or shifted segmentation looks right to validators and viewers; only this comparison finds it. A reader
(`verify_seg`, `verify_nifti`) shares no code with the writer: it gives the file's voxels, as points or as planes,
in LPS+ mm by the file's own numbers. Here they are placed on the source grid and compared, voxel by voxel.
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


@dataclass(frozen=True, eq=False)
class Sheet:
    """A plane of voxels in a file: label ids (rows, columns), 0 for none, and where they lie, LPS+ mm.

    `corner` is the centre of the first voxel; the steps lead to the next row and to the next column.
    """

    label_ids: npt.NDArray[Any]
    corner_lps_mm: Floats
    row_step_lps_mm: Floats
    column_step_lps_mm: Floats
    voxel_volume_mm3: float

    @property
    def steps_lps_mm(self) -> Floats:
        """(2, 3): to the next row, to the next column."""
        return np.stack([self.row_step_lps_mm, self.column_step_lps_mm])


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
    pieces: Iterable[Piece | Sheet],
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


def _place(pieces: Iterable[Piece | Sheet], segmentation: Segmentation) -> _Found:
    schema, geometry = segmentation.schema, segmentation.geometry
    found = _Found(
        label_map=np.zeros(segmentation.label_map.shape, dtype=np.uint16),
        voxels=np.zeros(schema.class_count, dtype=np.int64),
        volumes_mm3=np.zeros(schema.class_count),
        sums_lps_mm=np.zeros((schema.class_count, 3)),
    )
    offset, classes = 0.0, _ClassTable(schema)
    for piece in pieces:
        if isinstance(piece, Sheet):
            sheet = _cropped(piece)
            _count_sheet(sheet, classes, found)
            farthest = _lay(sheet, geometry, found.label_map)
        else:
            _count(piece, classes, found)
            farthest = _drop(piece.label_id, piece.points_lps_mm, geometry, found.label_map)
        offset = max(offset, farthest)
    return replace(found, offset_voxels=offset)


def _drop(
    label_ids: int | npt.NDArray[Any], points_lps_mm: Floats, geometry: Geometry, label_map: npt.NDArray[np.uint16]
) -> float:
    """Put each voxel where the nearest centre of the grid is. Gives the largest distance from one, in voxels."""
    indices = indices_of(points_lps_mm, geometry)
    nearest = np.rint(indices).astype(np.int64)
    # What lies outside the grid, or where another label lies already, is in no voxel: it lowers the Dice.
    is_inside = ((nearest >= 0) & (nearest < geometry.shape)).all(axis=1)
    label_map[tuple(nearest[is_inside].T)] = label_ids if isinstance(label_ids, int) else label_ids[is_inside]
    return float(np.abs(indices - nearest).max(initial=0.0))


def _lay(sheet: Sheet, geometry: Geometry, label_map: npt.NDArray[np.uint16]) -> float:
    """As `_drop`, and at once where the sheet's rows and columns run along axes of the grid."""
    values = sheet.label_ids
    if not values.size:
        return 0.0
    # Places are linear in row and column: what holds at the four corners holds between them.
    ends = np.array([(r, c) for r in (0, values.shape[0] - 1) for c in (0, values.shape[1] - 1)])
    indices = indices_of(sheet.corner_lps_mm + ends @ sheet.steps_lps_mm, geometry)
    steps = np.rint(sheet.steps_lps_mm @ np.linalg.inv(geometry.affine_lps[:3, :3]).T).astype(np.int64)
    nearest = np.rint(indices[0]).astype(np.int64) + ends @ steps
    offset = float(np.abs(indices - nearest).max())
    is_inside = bool(((nearest >= 0) & (nearest < geometry.shape)).all())
    if offset >= 0.5 or not is_inside or not np.array_equal(np.abs(steps) @ np.abs(steps).T, np.eye(2)):
        rows_and_columns = np.argwhere(values)
        return _drop(
            values[values != 0], sheet.corner_lps_mm + rows_and_columns @ sheet.steps_lps_mm, geometry, label_map
        )
    target = _section(label_map, nearest, steps)
    np.copyto(target, values, where=values != 0, casting="unsafe")
    return offset


def _cropped(sheet: Sheet) -> Sheet:
    """The rows and columns that hold something: the voxels of one label are few among those of a plane."""
    filled = [np.flatnonzero(sheet.label_ids.max(axis=axis, initial=0)) for axis in (1, 0)]
    first = np.array([found[0] if found.size else 0 for found in filled])
    past = [int(found[-1]) + 1 if found.size else 0 for found in filled]
    label_ids = sheet.label_ids[first[0] : past[0], first[1] : past[1]]
    return replace(sheet, label_ids=label_ids, corner_lps_mm=sheet.corner_lps_mm + first @ sheet.steps_lps_mm)


def _section(
    label_map: npt.NDArray[np.uint16], ends: npt.NDArray[np.int64], steps: npt.NDArray[np.int64]
) -> npt.NDArray[np.uint16]:
    """The part of the map between four corners, with its axes in the order and sense of the two steps."""
    low, high = ends.min(axis=0), ends.max(axis=0) + 1
    row_axis, column_axis = (int(np.flatnonzero(step)[0]) for step in steps)
    across = 3 - row_axis - column_axis
    section = label_map[tuple(slice(a, b) for a, b in zip(low, high, strict=True))]
    section = section.transpose(row_axis, column_axis, across)[:, :, 0]
    return section[:: steps[0, row_axis], :: steps[1, column_axis]]


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
    points_lps_mm = piece.points_lps_mm
    if isinstance(piece.label_id, int):
        c = int(classes.of(piece.label_id))
        kept, counts, sums_lps_mm = slice(c, c + 1), np.array([len(points_lps_mm)]), points_lps_mm.sum(axis=0)
    else:
        kept, counts, sums_lps_mm = _sums(classes.of(piece.label_id), points_lps_mm)
    _add(found, kept, counts, sums_lps_mm, piece.voxel_volume_mm3)


def _count_sheet(sheet: Sheet, classes: _ClassTable, found: _Found) -> None:
    """As `_count`, from the sums of rows and columns of each class."""
    places = np.flatnonzero(sheet.label_ids)
    rows_and_columns = np.stack(np.divmod(places, sheet.label_ids.shape[1]), axis=1)
    kept, counts, sums = _sums(classes.of(sheet.label_ids.ravel()[places]), rows_and_columns)
    sums_lps_mm = counts[:, None] * sheet.corner_lps_mm + sums @ sheet.steps_lps_mm
    _add(found, kept, counts, sums_lps_mm, sheet.voxel_volume_mm3)


def _sums(classes: npt.NDArray[np.int64], values: npt.NDArray[Any]) -> tuple[slice, npt.NDArray[np.int64], Floats]:
    """How often each class occurs, and the sums of the columns of `values` over it.

    Only of the classes from the first to the last that occur, which the slice names: most sheets hold few of many.
    """
    first = int(classes.min()) if classes.size else 0
    numbers = classes - first
    counts = np.bincount(numbers)
    sums = [np.bincount(numbers, weights=column) for column in values.T]
    return slice(first, first + counts.size), counts, np.stack(sums, axis=1)


def _add(
    found: _Found, kept: slice, counts: npt.NDArray[np.int64], sums_lps_mm: Floats, voxel_volume_mm3: float
) -> None:
    found.voxels[kept] += counts
    found.volumes_mm3[kept] += counts * voxel_volume_mm3
    found.sums_lps_mm[kept] += sums_lps_mm


def _figures(found: _Found, segmentation: Segmentation) -> tuple[LabelFigures, ...]:
    schema, geometry = segmentation.schema, segmentation.geometry
    reference = schema.classes_from_ids(segmentation.label_map)
    is_same = np.array_equal(found.label_map, segmentation.label_map)
    placed = reference if is_same else schema.classes_from_ids(found.label_map)
    counts = confusion_counts(placed, reference, schema.class_count)
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
