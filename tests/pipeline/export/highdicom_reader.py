"""DICOM SEG as highdicom's own reader places it: the oracle of the modules that test segmentations."""

from __future__ import annotations

from pathlib import Path

import highdicom as hd
import numpy as np

from pipeline.segmentation import Segmentation


def read_by_highdicom(path: Path, segmentation: Segmentation) -> np.ndarray:
    """Label ids on the grid of `segmentation`, placed by highdicom's volume alone."""
    volume = hd.seg.segread(path).get_volume(combine_segments=True, allow_missing_positions=True)
    found = np.zeros_like(segmentation.label_map)
    corners = np.argwhere(volume.array)
    points_lps_mm = corners @ volume.affine[:3, :3].T + volume.affine[:3, 3]
    affine = segmentation.geometry.affine_lps
    indices = np.rint(np.linalg.solve(affine[:3, :3], (points_lps_mm - affine[:3, 3]).T)).astype(int)
    found[tuple(indices)] = np.array([0, *segmentation.schema.ids])[volume.array[tuple(corners.T)]]
    return found
