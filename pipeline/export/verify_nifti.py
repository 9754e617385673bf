"""Reads a NIfTI label map with SimpleITK (nibabel wrote it), and puts each voxel where the header says it lies."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk

from pipeline.export.verify import Piece, Verification, compare
from pipeline.segmentation import Segmentation

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]

PLACING_VOXELS = 0.02
"""How far a voxel may lie from its centre: the header's affine has the precision of 32-bit floats."""


def verify_nifti(path: Path, segmentation: Segmentation) -> Verification:
    """Compare a NIfTI label map with what was to be written.

    Raises:
        ExportError: anything differs.
    """
    try:
        voxels, affine_lps, reader = *_read_with_itk(path), "SimpleITK"
    except RuntimeError:
        # ITK knows no sheared grids (a tilted gantry makes them).
        voxels, affine_lps, reader = *_read_nifti_bytes(path), "bytes"
    pieces = _pieces(voxels, affine_lps)
    return compare(pieces, segmentation, reader=reader, placing_voxels=PLACING_VOXELS)


def _read_with_itk(path: Path) -> tuple[Array, Floats]:
    """Voxels (I, J, K) and the affine to LPS+ mm."""
    image = sitk.ReadImage(str(path))
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return sitk.GetArrayFromImage(image).T, affine


def _read_nifti_bytes(path: Path) -> tuple[Array, Floats]:
    """As above from the bytes of a little-endian .nii.gz of unsigned integers (nifti1.h, offsets in comments)."""
    content = gzip.decompress(path.read_bytes())
    shape = np.frombuffer(content, "<i2", 3, 42)  # dim[1..3]
    dtype = {2: "<u1", 512: "<u2"}[int(np.frombuffer(content, "<i2", 1, 70)[0])]  # datatype
    start = int(np.frombuffer(content, "<f4", 1, 108)[0])  # vox_offset
    affine_ras = np.frombuffer(content, "<f4", 12, 280).reshape(3, 4)  # srow_x, srow_y, srow_z
    voxels = np.frombuffer(content, dtype, offset=start).reshape(shape, order="F")
    return voxels, np.vstack([affine_ras[0] * -1.0, affine_ras[1] * -1.0, affine_ras[2], (0, 0, 0, 1)])


def _pieces(voxels: Array, affine_lps: Floats) -> Iterator[Piece]:
    volume_mm3 = float(abs(np.linalg.det(affine_lps[:3, :3])))
    for k in range(voxels.shape[2]):
        plane = voxels[:, :, k]
        for label_id in np.unique(plane[plane != 0]):
            i, j = np.nonzero(plane == label_id)
            points_ijk = np.stack([i, j, np.full_like(i, k)], axis=1)
            yield Piece(int(label_id), points_ijk @ affine_lps[:3, :3].T + affine_lps[:3, 3], volume_mm3)
