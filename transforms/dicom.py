"""The intake gate: a DICOM series -> voxels, their grid, and the findings. What it cannot read right, it refuses.

`index_series` says what a folder holds, `read_series` reads one series of it. Nothing here reads, logs or raises
anything that identifies a patient.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pydicom
from pydicom.pixels import pixel_array
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from transforms.dicom_checks import keeps_padding, syntax_name
from transforms.dicom_findings import Finding
from transforms.dicom_header import PARSE_FAULTS, Header, quiet_pydicom
from transforms.dicom_index import DicomSeries, choose_series, index_series
from transforms.dicom_uneven import fill_planes
from transforms.errors import DicomError
from transforms.geometry import Geometry

__all__ = ["DicomSeries", "Finding", "choose_series", "index_series", "read_series"]


def read_series(
    folder: Path, *, series: str | None = None, resample_uneven: bool = False
) -> tuple[npt.NDArray[np.float32], Geometry, DicomSeries]:
    """Voxels (I, J, K) float32 in the modality's unit (HU for CT), their grid, and what was found.

    i runs along rows, j down columns, k with the slice normal. Rescaling is done slice by slice; unmeasured voxels
    (PixelPaddingValue) become the modality's background. Memory: the volume and one slice.

    Args:
        folder: a folder, searched with all below it, or one file.
        series: which one of several: its number in `index_series` (from 1) or the beginning of its identifier.
        resample_uneven: interpolate slices with uneven gaps onto an even grid instead of refusing them.

    Raises:
        DicomError: no or several series fit, or the one that does cannot be read right; the fault is named.
    """
    chosen = choose_series(index_series(folder, resample_uneven=resample_uneven), series=series, folder=folder)
    if chosen.problems or chosen.geometry is None:
        faults = "; ".join(str(problem) for problem in chosen.problems)
        kind = chosen.modality or "unnamed"
        raise DicomError(f"{folder}: {kind} series '{chosen.description}' is not readable: {faults}")
    return read_voxels(chosen), chosen.geometry, chosen


def read_voxels(series: DicomSeries) -> npt.NDArray[np.float32]:
    """The voxels (I, J, K) of a series without problems, as `read_series` gives them.

    Raises:
        DicomError: a slice's pixels are cut short or cannot be decoded.
    """
    first = series.slices[0]
    if series.geometry is not None and series.slice_positions_k is not None:
        planes = np.empty((series.geometry.shape[2], first.rows, first.columns), dtype=np.float32)
        fill_planes(planes, lambda n: _measured(series.slices[n], series.background), series.slice_positions_k)
        return planes.transpose(2, 1, 0)
    stack = np.empty((len(series.slices), first.rows, first.columns), dtype=np.float32)
    for k, header in enumerate(series.slices):
        stack[k] = _measured(header, series.background)
    return stack.transpose(2, 1, 0)


def _measured(header: Header, background: float) -> npt.NDArray[np.float64]:
    """One slice (rows, columns) in the modality's unit (PS3.3 C.11.1)."""
    stored = _stored(header)
    measured = _without_spare_bits(stored, header).astype(np.float64)
    measured *= header.slope or 1.0
    measured += header.intercept or 0.0
    if header.padding is not None and not keeps_padding(header):
        low, high = header.padding
        measured[(stored >= low) & (stored <= high)] = background
    return measured


def _stored(header: Header) -> npt.NDArray[Any]:
    """One slice (rows, columns) of stored values, decoded, with all bits that are allocated."""
    try:
        with quiet_pydicom():
            dataset = pydicom.dcmread(header.path, force=True)
            _name_syntax(dataset)
            # The bits above BitsStored are kept, since padding values may lie there.
            stored = pixel_array(dataset, raw=True, correct_unused_bits=False)
    except PARSE_FAULTS as fault:
        raise DicomError(
            f"{header.path}: the pixels in {syntax_name(header.transfer_syntax)} cannot be decoded "
            f"({type(fault).__name__}): cut short, damaged, or of a kind without a decoder here; fetch the file again "
            "or decompress it"
        ) from None
    if stored.shape != (header.rows, header.columns) or stored.dtype.kind not in "iu":
        raise DicomError(
            f"{header.path}: {stored.shape} pixels of {stored.dtype} where the header promises "
            f"{header.rows} rows of {header.columns} whole numbers"
        )
    return np.asarray(stored)


def _name_syntax(dataset: pydicom.FileDataset) -> None:
    """Files without a preamble name no transfer syntax; the parser has seen which one it is."""
    if "TransferSyntaxUID" in dataset.file_meta:
        return
    is_implicit, is_little_endian = dataset.original_encoding
    explicit = ExplicitVRLittleEndian if is_little_endian else ExplicitVRBigEndian
    dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if is_implicit else explicit


def _without_spare_bits(stored: npt.NDArray[Any], header: Header) -> npt.NDArray[Any]:
    """Clear (or sign-extend) the bits above BitsStored, which may hold anything (PS3.5 8.1.1)."""
    spare = header.bits_allocated - header.bits_stored
    if not spare or stored.dtype.itemsize * 8 != header.bits_allocated:
        return stored
    return (stored << spare) >> spare
