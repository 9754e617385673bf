"""NIfTI-1 label map (.nii.gz): the ids of the label schema on the source grid.

Both forms of the header's affine say the same, with code 1 (scanner): readers that look at one of them only, or
drop one whose code is 0, all find the grid. A sheared grid has no quaternion form, so there qform's code is 0.
"""

from __future__ import annotations

import gzip
from pathlib import Path

import nibabel as nib
import numpy as np

from pipeline.segmentation import Segmentation
from transforms.geometry import Geometry

SCANNER = 1
"""NIFTI_XFORM_SCANNER_ANAT (nifti1.h)."""

ORTHOGONAL = 1e-4
"""Axes whose cosines differ from a right angle's by less than this are written as a quaternion too."""

_COMPRESSION = 6


def write_nifti(target: Path, segmentation: Segmentation) -> None:
    """Write the label map as uint8 or uint16. Equal segmentations give equal bytes."""
    dtype = np.uint8 if max(segmentation.schema.ids) <= 255 else np.uint16
    image = nib.Nifti1Image(segmentation.label_map.astype(dtype), segmentation.geometry.affine_ras)
    image.header.set_xyzt_units(xyz="mm")
    image.header.set_intent("label", name="label ids")
    image.header["descrip"] = f"volseg: {segmentation.algorithm.name}".encode("ascii", "replace")[:79]
    image.set_sform(segmentation.geometry.affine_ras, code=SCANNER)
    image.set_qform(segmentation.geometry.affine_ras, code=SCANNER if _is_orthogonal(segmentation.geometry) else 0)
    # Neither a time nor a file name goes into the gzip header.
    with target.open("wb") as stream, gzip.GzipFile("", "wb", _COMPRESSION, stream, mtime=0) as packed:
        packed.write(image.to_bytes())


def _is_orthogonal(geometry: Geometry) -> bool:
    cosines = geometry.direction_ras.T @ geometry.direction_ras
    return bool(np.abs(cosines - np.eye(3)).max() < ORTHOGONAL)
