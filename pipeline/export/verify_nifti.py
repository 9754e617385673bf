"""Reads a NIfTI label map with SimpleITK (nibabel wrote it), and puts each voxel where the header says it lies.

The table of labels is read from the bytes.
"""

from __future__ import annotations

import gzip
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import fromstring

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk

from pipeline.errors import ExportError
from pipeline.export.verify import Sheet, Verification, compare
from pipeline.segmentation import Segmentation
from transforms.labels import LabelSchema

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]

PLACING_VOXELS = 0.02
"""How far a voxel may lie from its centre: the header's affine has the precision of 32-bit floats."""

_EXTENSIONS = 352
"""Where the header's extensions begin (nifti1.h)."""

_CODES = [0, 30]


def verify_nifti(path: Path, segmentation: Segmentation) -> Verification:
    """Compare a NIfTI label map with what was to be written: the table of labels, the voxels.

    Raises:
        ExportError: anything differs.
    """
    _check_table(path, segmentation.schema)
    try:
        voxels, affine_lps, reader = *_read_with_itk(path), "SimpleITK"
    except RuntimeError:
        # ITK knows no sheared grids (a tilted gantry makes them).
        voxels, affine_lps, reader = *_read_nifti_bytes(path), "bytes"
    return compare(_sheets(voxels, affine_lps), segmentation, reader=reader, placing_voxels=PLACING_VOXELS)


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


def _sheets(voxels: Array, affine_lps: Floats) -> Iterator[Sheet]:
    volume_mm3 = float(abs(np.linalg.det(affine_lps[:3, :3])))
    i_mm, j_mm, k_mm = affine_lps[:3, :3].T
    for k in range(voxels.shape[2]):
        yield Sheet(voxels[:, :, k], affine_lps[:3, 3] + k * k_mm, i_mm, j_mm, volume_mm3)


def _check_table(path: Path, schema: LabelSchema) -> None:
    """Values, names and colours are the schema's, in its order, in both extensions."""
    tables = dict(_extensions(path))
    if list(tables) != _CODES:
        raise ExportError("it has no table of its labels")
    for content in tables.values():
        found = [
            (int(x.attrib["Key"]), x.text, tuple(round(255 * float(x.attrib[c])) for c in ("Red", "Green", "Blue")))
            for x in fromstring(content).iter("Label")
        ]
        if found != [(x.id, x.name, x.colour) for x in schema.labels]:
            raise ExportError("its table of labels has other values, names or colours than the schema")


def _extensions(path: Path) -> Iterator[tuple[int, bytes]]:
    """Code and content of each (nifti1.h): size and code come before it, and nothing lies behind the last one."""
    with gzip.open(path) as file:
        head = file.read(_EXTENSIONS)
        start = int(np.frombuffer(head, "<f4", 1, 108)[0])  # vox_offset
        while head[348] and file.tell() < start:  # extender
            size, code = struct.unpack("<ii", file.read(8))
            yield code, file.read(size - 8).rstrip(b"\0")
