"""A file or DICOM folder -> Volume. The reader is picked by what the file holds, not by how it is called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt

from transforms.dicom_magic import is_dicom
from transforms.errors import DicomError, VolumeError
from transforms.geometry import Geometry


@dataclass(frozen=True)
class _Reader:
    read: Callable[..., tuple[npt.NDArray[Any], Geometry]]
    read_grid: Callable[[Path], Geometry]


@dataclass(frozen=True, eq=False)
class Volume:
    """Voxels (I, J, K) on a grid.

    `modality` is DICOM's code (CT, MR, PT) where the file says so. `background` is the value of what was not
    measured: the modality's for DICOM, otherwise the lowest value present; 0 for labels.
    """

    voxels: npt.NDArray[Any]
    geometry: Geometry
    modality: str | None
    background: float

    def __post_init__(self) -> None:
        if self.voxels.shape != self.geometry.shape:
            raise ValueError(f"voxels of {self.voxels.shape} on a grid of {self.geometry.shape}")


def read_volume(path: Path, *, series: str | None = None, resample_uneven: bool = False) -> Volume:
    """An image: NIfTI, NRRD or MetaImage file, DICOM file or folder. Voxels are float32, in HU for CT.

    Args:
        path: the file or folder.
        series: which one of several DICOM series: its number in the listing, or the start of its identifier.
        resample_uneven: interpolate DICOM slices with uneven gaps onto an even grid instead of refusing them.

    Raises:
        VolumeError: the file is missing, of no known format, damaged, or not one volume; the message says which.
        DicomError: the same for DICOM.
    """
    path = Path(path)
    reader = None if path.is_dir() else _reader_of(path)
    if reader is None:
        return _read_dicom(path, series, resample_uneven)
    voxels, geometry = reader.read(path)
    return Volume(voxels, geometry, None, float(voxels.min()))


def read_grid(path: Path) -> Geometry | None:
    """The grid of a NIfTI, NRRD or MetaImage file by its header alone; None for DICOM, which its index tells.

    Raises:
        VolumeError: see `read_volume`; what only the voxels tell is not seen.
    """
    path = Path(path)
    reader = None if path.is_dir() else _reader_of(path)
    return None if reader is None else reader.read_grid(path)


def read_label(path: Path) -> Volume:
    """A label map: NIfTI, NRRD or MetaImage file. Voxels are of the narrowest signed or 8-bit integer type.

    Floating-point files are accepted when every value is whole.

    Raises:
        VolumeError: as `read_volume`, and for fractions (their count and an example) and DICOM input.
    """
    path = Path(path)
    reader = None if path.is_dir() else _reader_of(path)
    if reader is None:
        raise DicomError(f"{path}: labels are not read from DICOM; convert them to NIfTI or NRRD on the image's grid")
    voxels, geometry = reader.read(path, labels=True)
    return Volume(voxels, geometry, None, 0.0)


def _read_dicom(path: Path, series: str | None, resample_uneven: bool) -> Volume:
    from transforms.dicom import read_series

    voxels, geometry, found = read_series(path, series=series, resample_uneven=resample_uneven)
    return Volume(voxels, geometry, found.modality or None, found.background)


def _reader_of(path: Path) -> _Reader | None:
    """The reader for a file's content; None for DICOM."""
    if not path.exists():
        raise VolumeError(f"{path}: no such file or folder")
    try:
        if path.stat().st_size == 0:
            raise VolumeError(f"{path}: the file is empty; fetch it again")
        return _by_content(path)
    except OSError as fault:
        raise VolumeError(f"{path}: cannot be read: {fault.strerror or fault}") from None


def _by_content(path: Path) -> _Reader | None:
    """As `_reader_of`; libraries of formats that the file is not are left alone, since importing them takes time."""
    from transforms.nifti import is_gzip, is_nifti, read_nifti, read_nifti_grid

    # What is packed by gzip is read as NIfTI, so that a stream cut short is called that.
    if is_nifti(path) or is_gzip(path):
        return _Reader(read_nifti, read_nifti_grid)
    from transforms.itk_files import is_itk, read_itk, read_itk_grid

    if is_itk(path):
        return _Reader(read_itk, read_itk_grid)
    if is_dicom(path):
        return None
    raise VolumeError(f"{path}: neither NIfTI, NRRD, MetaImage nor DICOM by its content")
