"""Reading volumes inside a MONAI Compose; the reading itself is in `transforms.volume`."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from monai.config import KeysCollection, PathLike
from monai.data.image_reader import ImageReader
from monai.data.meta_tensor import MetaTensor
from monai.transforms.transform import MapTransform
from monai.utils import MetaKeys, SpaceKeys, ensure_tuple

from transforms.dicom import DicomSeries, read_series
from transforms.errors import GeometryMismatch
from transforms.geometry import Geometry
from transforms.volume import Volume, read_label, read_volume

__all__ = [
    "DicomSeriesReader",
    "LoadVolumed",
    "Volume",
    "as_metatensor",
    "geometry_of",
    "read_label",
    "read_volume",
]


class LoadVolumed(MapTransform):
    """Paths to MetaTensors (C, I, J, K): float32 for images, integers for labels.

    An entry is a path, or a list of paths that become channels. The affine is RAS+ mm, float64. Metadata holds the
    grid only: no file name and nothing from the file's header.

    Args:
        keys: entries to load.
        label_keys: which entries are label maps; keys named only here are loaded as well.
        series: which DICOM series of a folder, as in `read_volume`.
        allow_missing_keys: pass over entries that are absent.

    Raises:
        VolumeError: a file cannot be read right.
        GeometryMismatch: channels, or a label and the first image, do not share a grid.
    """

    def __init__(
        self,
        keys: KeysCollection,
        *,
        label_keys: KeysCollection = (),
        series: str | None = None,
        allow_missing_keys: bool = False,
    ) -> None:
        labels = ensure_tuple(label_keys)
        super().__init__(tuple(dict.fromkeys((*ensure_tuple(keys), *labels))), allow_missing_keys)
        self.label_keys = labels
        self.series = series

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """`data` with its paths replaced by MetaTensors."""
        loaded = dict(data)
        image: tuple[str, Geometry] | None = None
        for key in sorted(self.key_iterator(loaded), key=lambda key: key in self.label_keys):
            is_label = key in self.label_keys
            channels, geometry = _read_channels(loaded[key], is_label=is_label, series=self.series)
            where = str(ensure_tuple(loaded[key])[0])
            if is_label and image is not None:
                _refuse_other_grid("image", *image, "label", where, geometry)
            elif image is None and not is_label:
                image = where, geometry
            loaded[key] = as_metatensor(channels, geometry)
        return loaded


class DicomSeriesReader(ImageReader):
    """The DICOM gate as a reader for MONAI's own loader.

    Hand it over in the call, `LoadImage()(folder, reader=DicomSeriesReader())`, or with `register()`. Given to
    `LoadImage(reader=...)` a refusal would not end the reading: MONAI then tries its other readers, which guess.
    """

    def __init__(self, series: str | None = None) -> None:
        super().__init__()
        self.series = series

    def verify_suffix(self, filename: Sequence[PathLike] | PathLike) -> bool:
        """True: DICOM is known by its content, and reading says what is wrong."""
        return True

    def read(self, data: Sequence[PathLike] | PathLike, **_: Any) -> tuple[npt.NDArray[Any], Geometry, DicomSeries]:
        """The series in a folder or file.

        Raises:
            DicomError: as `transforms.dicom.read_series`.
            ValueError: more than one path.
        """
        paths = ensure_tuple(data)
        if len(paths) != 1:
            raise ValueError(f"a series is one folder or file, found {len(paths)} paths")
        return read_series(Path(paths[0]), series=self.series)

    def get_data(self, img: tuple[npt.NDArray[Any], Geometry, DicomSeries]) -> tuple[npt.NDArray[Any], dict[str, Any]]:
        """Voxels (I, J, K) without a channel axis, and MONAI's description of their grid."""
        voxels, geometry, _ = img
        return voxels, {
            MetaKeys.AFFINE: geometry.affine_ras.copy(),
            MetaKeys.ORIGINAL_AFFINE: geometry.affine_ras.copy(),
            MetaKeys.SPATIAL_SHAPE: np.asarray(geometry.shape),
            MetaKeys.SPACE: SpaceKeys.RAS,
            MetaKeys.ORIGINAL_CHANNEL_DIM: float("nan"),
        }


def as_metatensor(voxels: torch.Tensor | npt.NDArray[Any], geometry: Geometry) -> MetaTensor:
    """Voxels (C, I, J, K) as a MetaTensor whose affine is the grid's, RAS+ mm, float64.

    Raises:
        ValueError: the voxels do not have the grid's shape.
    """
    tensor = torch.as_tensor(voxels)
    if tuple(tensor.shape[1:]) != geometry.shape:
        raise ValueError(f"voxels of shape {tuple(tensor.shape[1:])} on a grid of {geometry.shape}")
    affine = torch.from_numpy(geometry.affine_ras.copy())
    return MetaTensor(tensor, affine=affine, meta={MetaKeys.SPACE: SpaceKeys.RAS})


def geometry_of(tensor: MetaTensor) -> Geometry:
    """The grid of a MetaTensor (C, I, J, K)."""
    shape = tensor.shape[1:]
    return Geometry((shape[0], shape[1], shape[2]), tensor.affine.numpy(force=True))


def _read_channels(entry: Any, *, is_label: bool, series: str | None) -> tuple[npt.NDArray[Any], Geometry]:
    paths = [Path(path) for path in ensure_tuple(entry)]
    if not paths or (is_label and len(paths) > 1):
        raise ValueError(f"a label is one file and an image at least one, found {len(paths)} paths")
    volumes = [read_label(path) if is_label else read_volume(path, series=series) for path in paths]
    for path, volume in zip(paths[1:], volumes[1:], strict=True):
        _refuse_other_grid("channel", str(paths[0]), volumes[0].geometry, "channel", str(path), volume.geometry)
    return np.stack([volume.voxels for volume in volumes]), volumes[0].geometry


def _refuse_other_grid(
    what: str, where: str, grid: Geometry, other: str, other_where: str, other_grid: Geometry
) -> None:
    if unlike := grid.difference(other_grid):
        raise GeometryMismatch(
            f"{what} {where} and {other} {other_where} do not share a voxel grid: {unlike}; resample one to the other"
        )
