"""NIfTI-1 label map (.nii.gz): the ids of the label schema on the source grid; and maps of values on it.

Both forms of the header's affine say the same, with code 1 (scanner): readers that look at one of them only, or
drop one whose code is 0, all find the grid. A sheared grid has no quaternion form, so there qform's code is 0.

Names and colours travel inside the file, as the label table of Caret and Connectome Workbench in the header's
extensions. It stands there twice: Workbench looks for code 30, TotalSegmentator and what reads its results take the
first extension, and nibabel gives them the content of code 0 only. Other readers pass both over.
"""

from __future__ import annotations

import gzip
from pathlib import Path
from xml.etree.ElementTree import Element, SubElement, tostring

import nibabel as nib
import numpy as np
import numpy.typing as npt

from pipeline.segmentation import Segmentation
from transforms.geometry import Geometry
from transforms.labels import LabelSchema

SCANNER = 1
"""NIFTI_XFORM_SCANNER_ANAT (nifti1.h)."""

ORTHOGONAL = 1e-4
"""Axes whose cosines differ from a right angle's by less than this are written as a quaternion too."""

TABLE_CODES = (0, 30)
"""NIFTI_ECODE_IGNORE and NIFTI_ECODE_CARET (nifti1.h)."""

_COMPRESSION = 6


def write_nifti(target: Path, segmentation: Segmentation) -> None:
    """Write the label map as uint8 or uint16, with a table of its labels. Equal segmentations give equal bytes."""
    dtype = np.uint8 if max(segmentation.schema.ids) <= 255 else np.uint16
    image = nib.Nifti1Image(segmentation.label_map.astype(dtype), segmentation.geometry.affine_ras)
    image.header.set_xyzt_units(xyz="mm")
    image.header.set_intent("label", name="label ids")
    image.header["descrip"] = f"volseg: {segmentation.algorithm.name}".encode("ascii", "replace")[:79]
    table = _label_table(segmentation.schema)
    image.header.extensions.extend(nib.nifti1.Nifti1Extension(code, table) for code in TABLE_CODES)
    _write(target, image, segmentation.geometry)


def write_scaled(
    target: Path, voxels: npt.NDArray[np.uint8], geometry: Geometry, *, step: float, description: str
) -> None:
    """Write a map of values `step` apart, whose multiples the voxels (I, J, K) are: readers see the values, by the
    header's slope. `description`, of up to 79 ASCII characters, says what they are."""
    image = nib.Nifti1Image(voxels, geometry.affine_ras)
    image.header.set_xyzt_units(xyz="mm")
    image.header.set_slope_inter(step, 0.0)
    image.header["cal_max"] = step * 255
    image.header["descrip"] = description.encode("ascii", "replace")[:79]
    _write(target, image, geometry)


def _write(target: Path, image: nib.Nifti1Image, geometry: Geometry) -> None:
    image.set_sform(geometry.affine_ras, code=SCANNER)
    image.set_qform(geometry.affine_ras, code=SCANNER if _is_orthogonal(geometry) else 0)
    # Neither a time nor a file name goes into the gzip header.
    with target.open("wb") as stream, gzip.GzipFile("", "wb", _COMPRESSION, stream, mtime=0) as packed:
        packed.write(image.to_bytes())


def _label_table(schema: LabelSchema) -> bytes:
    """Keys are voxel values, colours parts of 1, the names text."""
    root = Element("CaretExtension")
    volume = SubElement(root, "VolumeInformation", Index="0")
    table = SubElement(volume, "LabelTable")
    for label in schema.labels:
        parts = zip(("Red", "Green", "Blue"), label.colour, strict=True)
        colour = {name: f"{part / 255:.6g}" for name, part in parts}
        SubElement(table, "Label", {"Key": str(label.id), **colour, "Alpha": "1"}).text = label.name
    SubElement(volume, "StudyMetaDataLinkSet")
    SubElement(volume, "VolumeType").text = "Label"
    text: bytes = tostring(root, encoding="UTF-8", xml_declaration=True)
    return text


def _is_orthogonal(geometry: Geometry) -> bool:
    cosines = geometry.direction_ras.T @ geometry.direction_ras
    return bool(np.abs(cosines - np.eye(3)).max() < ORTHOGONAL)
