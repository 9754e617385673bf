"""The intake gate: a DICOM series -> voxels, their grid, and the findings. What it cannot read right, it refuses.

`index_series` says what a folder holds, `read_series` reads one series of it. Nothing here reads, logs or raises
anything that identifies a patient.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from transforms.dicom_findings import Finding
from transforms.dicom_index import DicomSeries, choose_series, index_series
from transforms.dicom_pixels import fill_slices
from transforms.dicom_uneven import fill_planes
from transforms.errors import DicomError
from transforms.geometry import Geometry

__all__ = ["DicomSeries", "Finding", "choose_series", "index_series", "open_series", "read_series", "read_voxels"]


def read_series(
    folder: Path, *, series: str | None = None, resample_uneven: bool = False
) -> tuple[npt.NDArray[np.float32], Geometry, DicomSeries]:
    """Voxels (I, J, K) float32 in the modality's unit (HU for CT), their grid, and what was found.

    i runs along rows, j down columns, k with the slice normal. Rescaling is done slice by slice; unmeasured voxels
    (PixelPaddingValue) become the modality's background. Memory: the volume, and one slice a decoding thread.

    Args:
        folder: a folder, searched with all below it, or one file.
        series: which one of several: its number in `index_series` (from 1), the beginning of its identifier, or
            that with # and the number of the volume in the series.
        resample_uneven: interpolate slices with uneven gaps onto an even grid instead of refusing them.

    Raises:
        DicomError: no or several series fit, or the one that does cannot be read right; the fault is named.
    """
    chosen, geometry = open_series(folder, series=series, resample_uneven=resample_uneven)
    return read_voxels(chosen), geometry, chosen


def open_series(
    folder: Path, *, series: str | None = None, resample_uneven: bool = False
) -> tuple[DicomSeries, Geometry]:
    """One series and its grid, by the headers alone; the voxels are `read_voxels`'s. Arguments as in `read_series`.

    Raises:
        DicomError: see `read_series`; what only the pixels tell is not seen.
    """
    chosen = choose_series(index_series(folder, resample_uneven=resample_uneven), series=series, folder=folder)
    if chosen.problems or chosen.geometry is None:
        faults = "; ".join(str(problem) for problem in chosen.problems)
        kind = chosen.modality or "unnamed"
        raise DicomError(f"{folder}: {kind} series '{chosen.description}' is not readable: {faults}")
    return chosen, chosen.geometry


def read_voxels(series: DicomSeries) -> npt.NDArray[np.float32]:
    """The voxels (I, J, K) of a series without problems, as `read_series` gives them.

    Raises:
        DicomError: a slice's pixels cannot be decoded, or its file has changed since it was indexed.
    """
    first = series.slices[0]
    if series.geometry is not None and series.slice_positions_k is not None:
        planes = np.empty((series.geometry.shape[2], first.rows, first.columns), dtype=np.float32)
        fill_planes(planes, lambda n: _one(series, n), series.slice_positions_k)
        return planes.transpose(2, 1, 0)
    stack = np.empty((len(series.slices), first.rows, first.columns), dtype=np.float32)
    fill_slices(stack, series.slices, background=series.background)
    return stack.transpose(2, 1, 0)


def _one(series: DicomSeries, number: int) -> npt.NDArray[np.float64]:
    """Slice `number` (rows, columns)."""
    header = series.slices[number]
    values = np.empty((1, header.rows, header.columns), dtype=np.float32)
    fill_slices(values, [header], background=series.background)
    return values.reshape(header.rows, header.columns).astype(np.float64)
