"""The images of a study: opened first, which tells their grids, then read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import DicomError, SeveralSeries
from pipeline.export import Source
from pipeline.plan import Plan
from pipeline.predict import refuse_missing, refuse_modality
from pipeline.studies import EVERY_SERIES, Study
from transforms.geometry import Geometry
from transforms.volume import Volume, read_grid, read_volume

if TYPE_CHECKING:
    from transforms.dicom import DicomSeries

FILE_BYTES, DICOM_BYTES = 21, 6
"""What reading a voxel takes at most: of NRRD and MetaImage twice as it is stored (up to 8 bytes each), in float32 (4)
and whether it is finite (1). NIfTI takes 5, and DICOM, whose slices are scaled one by one, 6."""


@dataclass(frozen=True, eq=False)
class Opened:
    """An image whose grid is known and whose voxels are not read."""

    path: Path
    grid: Geometry
    series: DicomSeries | None = None

    def read(self) -> Source:
        """The image.

        Raises:
            VolumeError: see `transforms.volume.read_volume`.
        """
        if self.series is None:
            return Source(read_volume(self.path))
        from transforms.dicom import read_voxels

        modality = self.series.modality or None
        return Source(Volume(read_voxels(self.series), self.grid, modality, self.series.background), self.series)


def open_source(path: Path, *, series: str | None = None, resample_uneven: bool = False) -> Opened:
    """The image at a path, and its DICOM series where it is one.

    Raises:
        VolumeError: see `transforms.volume.read_volume`; what only the voxels tell is not seen.
    """
    grid = read_grid(path)
    if grid is not None:
        return Opened(path, grid)
    from transforms.dicom import open_series

    chosen, grid = open_series(path, series=series, resample_uneven=resample_uneven)
    return Opened(path, grid, chosen)


def read_source(path: Path, *, series: str | None = None, resample_uneven: bool = False) -> Source:
    """The image at a path, read.

    Raises:
        VolumeError: see `transforms.volume.read_volume`.
    """
    return open_source(path, series=series, resample_uneven=resample_uneven).read()


def open_study(study: Study, plan: Plan, *, series: str | None, resample_uneven: bool) -> list[Opened]:
    """The study's image, or one for each channel that it has.

    Raises:
        VolumeError: as `open_source`, or the study lacks a channel that the model needs, or is of another modality.
    """
    refuse_missing(study.missing, plan)
    if study.series is not None:
        refuse_modality(study.series.modality or None, plan.channels[0])
        return [_opened_series(study.series, study.paths[0])]
    chosen = None if series == EVERY_SERIES else series
    try:
        return [open_source(path, series=chosen, resample_uneven=resample_uneven) for path in study.paths]
    except SeveralSeries as several:
        raise SeveralSeries(f"{several}; or give --series {EVERY_SERIES} to segment each") from None


def reading_bytes(images: list[Opened]) -> int:
    """What reading a study takes at most: the largest image while it is read, and the others."""
    sizes = [math.prod(image.grid.shape) for image in images]
    most = max(n * (FILE_BYTES if x.series is None else DICOM_BYTES) for n, x in zip(sizes, images, strict=True))
    return most + 4 * (sum(sizes) - max(sizes))


def _opened_series(series: DicomSeries, path: Path) -> Opened:
    if series.problems or series.geometry is None:
        faults = "; ".join(str(problem) for problem in series.problems)
        raise DicomError(f"not readable: {faults}")
    return Opened(path, series.geometry, series)
