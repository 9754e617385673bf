"""A result and its image -> what the page shows: voxels, labels, where they lie. No identity comes through here:
only voxels, affines, the modality and the schema's names leave the readers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from pipeline.errors import GeometryMismatch, ManifestError, VolumeError
from pipeline.manifest import load_dataset
from pipeline.references import SCHEMA_FILE
from pipeline.results import Result
from transforms.dicom_header import is_dicom
from transforms.geometry import Geometry
from transforms.labels import Label, LabelSchema, require_ids, schema_from_names
from transforms.volume import Volume, read_label, read_volume

Array = npt.NDArray[Any]
Point = tuple[float, float, float]
Box = tuple[slice, slice, slice]

MM3_PER_ML = 1000.0

WINDOW_PERCENTILES = (0.5, 99.5)
EMPTY_PART = 0.02
"""Values within this part of the range above the lowest are air, and decide on no window."""

SAMPLED_VOXELS = 2_000_000

CT_WINDOWS: dict[str, tuple[float, float]] = {
    "Soft tissue": (40.0, 400.0),
    "Brain": (40.0, 80.0),
    "Lung": (-600.0, 1500.0),
    "Bone": (400.0, 1800.0),
}
"""Level and width in HU."""


@dataclass(frozen=True)
class ShownLabel:
    """A label of the schema. `value` is its voxel value in the page's map, None where it does not occur."""

    label: Label
    value: int | None
    volume_ml: float
    centre_ras_mm: Point | None


@dataclass(frozen=True, eq=False)
class Scene:
    """An image, and on its grid the values (I, J, K) of the labels that occur, counted 1, 2, ... in their order."""

    name: str
    image: Volume
    values: Array
    labels: tuple[ShownLabel, ...]
    boxes: tuple[Box, ...]
    """Per value from 1, the part of the grid that it lies in."""

    def mask_of(self, value: int) -> tuple[npt.NDArray[np.bool_], Geometry]:
        """Where a value that occurs is, within its box."""
        box = self.boxes[value - 1]
        mask = self.values[box] == value
        return mask, self.image.geometry.window([side.start for side in box], mask.shape)

    def facts(self) -> dict[str, Any]:
        """What the page is told, as JSON."""
        geometry = self.image.geometry
        low, high = window(self.image)
        return {
            "name": self.name,
            "modality": self.image.modality,
            "grid": {
                "shape": list(geometry.shape),
                "spacing_mm": [round(s, 4) for s in geometry.spacing_mm],
                "axis_codes": geometry.axis_codes,
                "tilt_degrees": round(_tilt_degrees(geometry), 1),
            },
            "window": {"low": low, "high": high},
            "range": {"low": float(self.image.voxels.min()), "high": float(self.image.voxels.max())},
            "presets": [
                {"name": name, "low": level - width / 2, "high": level + width / 2}
                for name, (level, width) in (CT_WINDOWS if self.image.modality == "CT" else {}).items()
            ],
            "labels": [
                {
                    "id": x.label.id,
                    "name": x.label.name,
                    "colour": list(x.label.colour),
                    "value": x.value,
                    "volume_ml": x.volume_ml,
                    "centre_ras_mm": x.centre_ras_mm,
                }
                for x in self.labels
            ],
        }


def read_scene(
    result: Result, *, image: Path | None = None, schema: Path | None = None, series: str | None = None
) -> Scene:
    """Read a result and its image.

    Args:
        result: a label map file or DICOM SEG.
        image: the image, if it is not the one recorded with the result.
        schema: a manifest or labels.json, if it is not the one beside the result.
        series: which one of several DICOM series the image is; for a DICOM SEG, the one that it refers to.

    Raises:
        VolsegError: a file cannot be read, no image is known, or the two lie on different grids.
    """
    path = _image_path(result, image)
    if result.labels.is_file() and is_dicom(result.labels):
        from pipeline.export.seg_reader import read_seg

        seg = read_seg(result.labels)
        volume = read_volume(path, series=series or seg.series_uid)
        known = seg.schema
        label_map = _placed(seg.label_map, seg.geometry, volume.geometry)
    else:
        found = read_label(result.labels)
        volume = _image_of(found.geometry, path, series)
        if difference := volume.geometry.difference(found.geometry):
            raise GeometryMismatch(f"the label map does not lie on the grid of its image: {difference}")
        known = _schema(result.labels, schema, found.voxels)
        label_map = found.voxels
    return _scene(result.name, volume, label_map, known)


def nifti_bytes(voxels: Array, geometry: Geometry, *, is_label_map: bool = False) -> bytes:
    """A NIfTI-1 file in memory: the voxels, the affine, and nothing else."""
    import nibabel as nib

    image = nib.Nifti1Image(voxels, None)
    image.set_sform(geometry.affine_ras, code=1)
    image.set_qform(None, code=0)
    image.header["pixdim"][1:4] = geometry.spacing_mm
    image.header.set_xyzt_units(xyz="mm")
    if is_label_map:
        # Viewers interpolate what is not called a label.
        image.header.set_intent("label")
    return bytes(image.to_bytes())


def image_voxels(image: Volume) -> Array:
    """Voxels in as few bytes as hold them exactly."""
    voxels = image.voxels
    if float(voxels.min()) >= -32768 and float(voxels.max()) <= 32767:
        whole = voxels.astype(np.int16)
        if np.array_equal(whole, voxels):
            return whole
    return voxels.astype(np.float32, copy=False)


def window(image: Volume) -> tuple[float, float]:
    """The grey values that become black and white: soft tissue for CT, otherwise percentiles of what is not air."""
    if image.modality == "CT":
        level, width = CT_WINDOWS["Soft tissue"]
        return level - width / 2, level + width / 2
    step = max(1, round((image.voxels.size / SAMPLED_VOXELS) ** (1 / 3)))
    values = image.voxels[::step, ::step, ::step].ravel()
    lowest, highest = float(values.min()), float(values.max())
    inside = values[values > lowest + EMPTY_PART * (highest - lowest)]
    low, high = (float(v) for v in np.percentile(inside if inside.size else values, WINDOW_PERCENTILES))
    return low, max(high, low + 1e-6)


def to_json(value: Any) -> bytes:
    """UTF-8, refusing what JSON has no word for."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode()


def _image_path(result: Result, image: Path | None) -> Path:
    if image is not None:
        return image
    if not result.labels.exists():
        raise VolumeError(f"{result.labels}: no such file or folder")
    if not result.images:
        raise VolumeError(f"{result.labels}: no record says which image it was made from; name it by --image")
    if not result.images[0].exists():
        raise VolumeError(f"{result.labels}: the image that it was made from has moved; name it by --image")
    return result.images[0]


def _image_of(geometry: Geometry, path: Path, series: str | None) -> Volume:
    """The image at a path; among several DICOM series, the only one that lies on `geometry`, if it is the only one."""
    if path.is_dir() and series is None:
        from transforms.dicom import index_series, read_voxels

        fitting = [
            (found, found.geometry)
            for found in index_series(path)
            if found.geometry is not None and not found.problems and not geometry.difference(found.geometry)
        ]
        if len(fitting) == 1:
            ((one, its_geometry),) = fitting
            return Volume(read_voxels(one), its_geometry, one.modality or None, one.background)
    # A map that was made without interpolating uneven slices does not lie on their grid, and is refused for it.
    return read_volume(path, series=series, resample_uneven=True)


def _schema(labels: Path, given: Path | None, label_map: Array) -> LabelSchema:
    path = given or labels.parent / SCHEMA_FILE
    if given is None and not path.is_file():
        require_ids(label_map, labels)
        ids = [int(i) for i in np.unique(label_map) if i != 0]
        return schema_from_names({i: f"label {i}" for i in ids or [1]})
    try:
        return LabelSchema.model_validate_json(path.read_bytes())
    except OSError as fault:
        raise ManifestError(f"{path}: cannot be read: {fault.strerror or fault}") from None
    except ValidationError:
        return load_dataset(path).manifest.labels


def _placed(label_map: Array, source: Geometry, target: Geometry) -> Array:
    """Copy a label map onto a grid that shares its voxels; it may be turned, flipped or smaller.

    Raises:
        GeometryMismatch: the grids share no voxels, or something would be lost.
    """
    try:
        axes = source.axis_map(target)
    except ValueError as fault:
        raise GeometryMismatch(f"the segmentation does not lie on the grid of the image: {fault}") from None
    first = np.rint(axes.offsets).astype(int)
    steps = np.sign(axes.scales).astype(int)
    if np.abs(np.abs(axes.scales) - 1).max() > 1e-3 or np.abs(axes.offsets - first).max() > 0.1:
        raise GeometryMismatch(
            f"the segmentation does not lie on the image's voxels: {source.describe()} against {target.describe()}"
        )
    turned = label_map.transpose(axes.source_axes)
    placed = np.zeros(target.shape, dtype=label_map.dtype)
    to_target, from_source = [], []
    for count, target_count, start, step in zip(turned.shape, target.shape, first, steps, strict=True):
        targets = [t for t in range(target_count) if 0 <= start + step * t < count]
        to_target.append(targets)
        from_source.append([start + step * t for t in targets])
    placed[np.ix_(*to_target)] = turned[np.ix_(*from_source)]
    if np.count_nonzero(placed) != np.count_nonzero(label_map):
        raise GeometryMismatch("the segmentation reaches beyond the image; is it the image that it was made from?")
    return placed


def _scene(name: str, image: Volume, label_map: Array, schema: LabelSchema) -> Scene:
    from scipy.ndimage import find_objects

    try:
        classes = schema.classes_from_ids(label_map)
    except ValueError as fault:
        raise VolumeError(f"the label map cannot be shown: {fault}") from fault
    counts = np.bincount(classes.ravel(), minlength=schema.class_count)
    present = [c for c in range(1, schema.class_count) if counts[c]]
    ranks = np.zeros(schema.class_count, dtype=np.uint8 if len(present) <= 255 else np.uint16)
    ranks[present] = range(1, len(present) + 1)
    values = ranks[classes]
    boxes = tuple(find_objects(values))
    voxel_ml = image.geometry.voxel_volume_mm3 / MM3_PER_ML
    labels = tuple(
        ShownLabel(
            label,
            int(ranks[c]) if counts[c] else None,
            float(counts[c]) * voxel_ml,
            _centre_ras_mm(values, int(ranks[c]), boxes, image.geometry) if counts[c] else None,
        )
        for c, label in enumerate(schema.labels, start=1)
    )
    return Scene(name, image, values, labels, boxes)


def _centre_ras_mm(values: Array, value: int, boxes: Sequence[Box], geometry: Geometry) -> Point:
    """The voxel of a label that lies nearest to its centroid: the centre of a ring would be outside."""
    box = boxes[value - 1]
    indices = np.argwhere(values[box] == value)
    nearest = indices[np.square(indices - indices.mean(axis=0)).sum(axis=1).argmin()]
    x, y, z = geometry.ras_from_ijk([nearest + [side.start for side in box]])[0]
    return float(x), float(y), float(z)


def _tilt_degrees(geometry: Geometry) -> float:
    cosines = np.abs(geometry.direction_ras).max(axis=0)
    return float(np.degrees(np.arccos(np.clip(cosines.min(), -1.0, 1.0))))
