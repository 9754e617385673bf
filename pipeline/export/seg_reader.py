"""DICOM SEG -> label map on its own grid, read by highdicom from the frames' positions. For looking at, not for
verifying what was written: see `verify_seg` for that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import highdicom as hd
import numpy as np
import numpy.typing as npt

from pipeline.errors import DicomError
from pipeline.quiet import quiet
from transforms.dicom_header import PARSE_FAULTS
from transforms.geometry import Geometry
from transforms.labels import PALETTE, Label, LabelSchema


@dataclass(frozen=True, eq=False)
class ReadSegmentation:
    """Segment numbers (I, J, K), 0 background, on the grid that the frames span; `series_uid` is the source's."""

    label_map: npt.NDArray[Any]
    geometry: Geometry
    schema: LabelSchema
    series_uid: str | None


def read_seg(path: Path) -> ReadSegmentation:
    """Read a DICOM SEG, BINARY or LABELMAP.

    Raises:
        DicomError: it is no SEG, its segments overlap or are fractional, or its frames span no regular grid.
    """
    with quiet():
        try:
            seg = hd.seg.segread(path)
        except PARSE_FAULTS as fault:
            raise DicomError(f"{path}: cannot be read as a DICOM SEG ({type(fault).__name__})") from None
        if seg.segmentation_type == hd.seg.SegmentationTypeValues.FRACTIONAL:
            raise DicomError(f"{path}: a FRACTIONAL segmentation holds shares, no labels; expected BINARY or LABELMAP")
        try:
            volume = seg.get_volume(combine_segments=True)
        except PARSE_FAULTS as fault:
            raise DicomError(
                f"{path}: its segments overlap, or its frames span no regular grid ({type(fault).__name__}); "
                "convert it to a label map first"
            ) from None
        # highdicom's axes are slices, rows, columns.
        affine_lps = np.asarray(volume.affine)[:, [2, 1, 0, 3]]
        label_map = np.asarray(volume.array).transpose(2, 1, 0)
        return ReadSegmentation(
            label_map, Geometry.from_lps(label_map.shape, affine_lps), _schema(seg), _series_uid(seg)
        )


def _schema(seg: hd.seg.Segmentation) -> LabelSchema:
    items = [item for item in seg.SegmentSequence if int(item.SegmentNumber) > 0]
    names = [str(item.SegmentLabel) for item in items]
    labels = [
        Label(id=int(item.SegmentNumber), name=_unique(name, names, int(item.SegmentNumber)), colour=_colour(item))
        for item, name in zip(items, names, strict=True)
    ]
    return LabelSchema(labels=tuple(labels))


def _unique(name: str, names: Sequence[str], number: int) -> str:
    return name if name and names.count(name) == 1 else f"{name or 'segment'} ({number})"


def _colour(item: Any) -> tuple[int, int, int]:
    if "RecommendedDisplayCIELabValue" not in item:
        return PALETTE[(int(item.SegmentNumber) - 1) % len(PALETTE)]
    lab = hd.color.CIELabColor.from_dicom_value(item.RecommendedDisplayCIELabValue)
    r, g, b = (int(v) for v in lab.to_rgb())
    return r, g, b


def _series_uid(seg: hd.seg.Segmentation) -> str | None:
    series = seg.get("ReferencedSeriesSequence") or []
    return str(series[0].SeriesInstanceUID) if len(series) == 1 else None
