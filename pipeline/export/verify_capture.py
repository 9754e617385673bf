"""Reads a secondary capture series with pydicom: outlines by their colours where the files say they lie, and greys.

The outlines that should be there come from rank filters over the label map. The greys of a slice have to rise with
its values (or fall, where the source shows high values dark), whatever the window, so a picture that is mirrored,
turned, of another slice or blank does not pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydicom import Dataset, dcmread
from scipy.ndimage import generate_binary_structure, maximum_filter, minimum_filter

from pipeline.errors import ExportError
from pipeline.export import Job
from pipeline.export.capture_colours import outline_colours
from pipeline.export.verify import Piece, Verification, compare, indices_of
from pipeline.export.verify_links import check_links
from pipeline.quiet import quiet
from transforms.dicom_checks import is_inverted
from transforms.dicom_header import Header

Array = npt.NDArray[Any]

PLACING_VOXELS = 0.45
"""How far a pixel may lie from its voxel's centre; the grid idealises the slices' own numbers."""


def verify_capture(folder: Path, job: Job) -> Verification:
    """Compare a capture series with what was to be drawn: links, references, outlines, greys.

    Raises:
        ExportError: anything differs.
    """
    with quiet():
        paths = sorted(folder.iterdir())
        _check_series(paths, job)
        drawn = replace(job.segmentation, label_map=_outlines(job.segmentation.label_map))
        return compare(_pieces(paths, job), drawn, reader="pydicom", placing_voxels=PLACING_VOXELS)


def _outlines(label_map: Array) -> Array:
    """Labels without the voxels whose neighbours in the slice are all of the same label."""
    cross = generate_binary_structure(2, 1)[:, :, None]
    least = minimum_filter(label_map, footprint=cross, mode="constant", cval=0)
    most = maximum_filter(label_map, footprint=cross, mode="constant", cval=0)
    return np.asarray(np.where(least == most, 0, label_map), dtype=label_map.dtype)


def _check_series(paths: Sequence[Path], job: Job) -> None:
    headers = [dcmread(path, stop_before_pixels=True) for path in paths]
    if len(headers) != len(job.series.slices):
        raise ExportError(f"it holds {len(headers)} images of {len(job.series.slices)} slices")
    if len({header.SOPInstanceUID for header in headers}) != len(headers):
        raise ExportError("two of its images have the same SOPInstanceUID")
    for header, found in zip(headers, job.series.slices, strict=True):
        check_links(header, job.series)
        frame_of_reference = found.frame_of_reference or header.FrameOfReferenceUID
        shared = (headers[0].SeriesInstanceUID, frame_of_reference)
        if (header.SeriesInstanceUID, header.FrameOfReferenceUID) != shared:
            raise ExportError("its images are not of one series in the source's frame of reference")
        [image] = header.SourceImageSequence
        if (image.ReferencedSOPInstanceUID, image.get("ReferencedFrameNumber")) != (found.sop_uid, found.frame):
            raise ExportError("an image does not refer to the source slice that it shows")
        if header.BurnedInAnnotation != "NO" or "DERIVED" not in header.ImageType:
            raise ExportError("an image does not say that it is derived, without burned-in text")


def _pieces(paths: Sequence[Path], job: Job) -> Iterator[Piece]:
    """The coloured pixels of all files; the others are judged on the way."""
    schema = job.segmentation.schema
    codes = {_code(np.array(c)): x for c, x in zip(outline_colours(schema), schema.ids, strict=True)}
    known = np.array(sorted(codes))
    label_ids = np.array([codes[code] for code in sorted(codes)])
    contrast = 0
    for path, found in zip(paths, job.series.slices, strict=True):
        dataset = dcmread(path)
        pixels = np.frombuffer(dataset.PixelData, np.uint8)[: dataset.Rows * dataset.Columns * 3]
        pixels = pixels.reshape(dataset.Rows, dataset.Columns, 3)
        is_grey = (pixels[..., 0] == pixels[..., 1]) & (pixels[..., 1] == pixels[..., 2])
        contrast = max(contrast, _contrast(pixels[..., 0], is_grey, dataset, found, job))
        rows, columns = np.nonzero(~is_grey)
        colours = _code(pixels[rows, columns].astype(np.int64))
        which = np.minimum(np.searchsorted(known, colours), len(known) - 1)
        if (known[which] != colours).any():
            raise ExportError("an image holds a colour that is no label's")
        yield Piece(
            label_ids[which], _points_lps_mm(dataset, rows, columns), job.segmentation.geometry.voxel_volume_mm3
        )
    image = job.source.image.voxels
    if contrast == 0 and image.size and image.max() > image.min():
        raise ExportError("all of its images are blank")


def _code(colours: Array) -> Any:
    return colours[..., 0] * 65536 + colours[..., 1] * 256 + colours[..., 2]


def _points_lps_mm(dataset: Dataset, rows: Array, columns: Array) -> npt.NDArray[np.float64]:
    corner = np.array(dataset.ImagePositionPatient, dtype=np.float64)
    cosines = np.array(dataset.ImageOrientationPatient, dtype=np.float64)
    row_step_mm, column_step_mm = (float(x) for x in dataset.PixelSpacing)
    across, down = np.outer(columns * column_step_mm, cosines[:3]), np.outer(rows * row_step_mm, cosines[3:])
    return np.asarray(corner + across + down)


def _contrast(grey: Array, is_grey: Array, dataset: Dataset, found: Header, job: Job) -> int:
    """Check that the greys of a slice follow the values at their places. Gives how far they reach."""
    rows, columns = np.nonzero(is_grey)
    if not len(rows):
        return 0
    indices = np.rint(indices_of(_points_lps_mm(dataset, rows, columns), job.segmentation.geometry)).astype(np.int64)
    if (indices < 0).any() or (indices >= job.segmentation.geometry.shape).any():
        raise ExportError("an image reaches beyond the source grid")
    values = job.source.image.voxels[tuple(indices.T)]
    shown = grey[rows, columns].astype(np.int64)
    if found.photometric == "MONOCHROME1" and not is_inverted(found):
        shown = -shown
    if (np.diff(shown[np.lexsort((shown, values))]) < 0).any():
        raise ExportError("the greys of an image are not those of the source slice")
    return int(shown.max() - shown.min())
