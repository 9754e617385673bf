"""NIfTI label maps against SimpleITK and nibabel, bytes that repeat, and files that were tampered with."""

from __future__ import annotations

import gzip
import itertools
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from pipeline.errors import ExportError
from pipeline.export.nifti import write_nifti
from pipeline.export.verify_nifti import verify_nifti
from pipeline.segmentation import Segmentation
from transforms.geometry import Geometry
from transforms.labels import LabelSchema, schema_from_names
from transforms.volume import read_label


def sheared(segmentation: Segmentation) -> Segmentation:
    affine = segmentation.geometry.affine_ras.copy()
    affine[:3, 2] += 0.3 * affine[:3, 1]
    return replace(segmentation, geometry=Geometry(segmentation.geometry.shape, affine))


def saved(path: Path, voxels: np.ndarray, affine_ras: np.ndarray, phantom: Segmentation) -> Path:
    """Other voxels or another place than the phantom's, with its table of labels."""
    write_nifti(path, phantom)
    extensions = nib.load(path).header.extensions
    image = nib.Nifti1Image(voxels, affine_ras)
    image.header.extensions.extend(extensions)
    image.set_sform(affine_ras, code=1)
    image.set_qform(affine_ras, code=1)
    nib.save(image, path)
    return path


def test_simpleitk_finds_every_voxel_where_it_belongs(phantom: Segmentation, tmp_path: Path) -> None:
    path = tmp_path / "x.nii.gz"
    write_nifti(path, phantom)
    image = sitk.ReadImage(str(path))
    for ijk in itertools.islice(np.ndindex(phantom.geometry.shape), 0, None, 7):
        index = [int(n) for n in ijk]
        assert image[tuple(index)] == phantom.label_map[ijk]
        right, anterior, superior = phantom.geometry.ras_from_ijk([ijk])[0]
        assert image.TransformIndexToPhysicalPoint(index) == pytest.approx((-right, -anterior, superior), abs=1e-4)


def test_the_header_says_it_twice(phantom: Segmentation, tmp_path: Path) -> None:
    write_nifti(tmp_path / "x.nii.gz", phantom)
    image = nib.load(tmp_path / "x.nii.gz")
    assert image.get_data_dtype() == np.uint8
    assert (int(image.header["sform_code"]), int(image.header["qform_code"])) == (1, 1)
    assert np.abs(image.get_sform() - phantom.geometry.affine_ras).max() < 1e-5
    assert np.abs(image.get_qform() - phantom.geometry.affine_ras).max() < 1e-5
    assert image.header.get_xyzt_units()[0] == "mm"


def test_equal_results_give_equal_bytes(phantom: Segmentation, tmp_path: Path) -> None:
    for name in ("a.nii.gz", "another.nii.gz"):
        write_nifti(tmp_path / name, phantom)
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "another.nii.gz").read_bytes()
    # The time of RFC 1952, and no file name.
    assert (tmp_path / "a.nii.gz").read_bytes()[3:8] == bytes(5)


def test_ids_beyond_255(phantom: Segmentation, tmp_path: Path) -> None:
    labels = np.where(phantom.label_map == 200, 40_000, 0).astype(np.uint16)
    wide = replace(phantom, label_map=labels, schema=schema_from_names({40_000: "far", 2: "absent"}))
    write_nifti(tmp_path / "x.nii.gz", wide)
    assert nib.load(tmp_path / "x.nii.gz").get_data_dtype() == np.uint16
    near, far = verify_nifti(tmp_path / "x.nii.gz", wide).labels
    assert (near.dice, far.dice, far.voxels) == (None, 1.0, 17)


def test_a_sheared_grid_is_written_and_read_back(phantom: Segmentation, tmp_path: Path) -> None:
    tilted = sheared(phantom)
    write_nifti(tmp_path / "x.nii.gz", tilted)
    verification = verify_nifti(tmp_path / "x.nii.gz", tilted)
    assert verification.reader == "bytes"
    assert [label.dice for label in verification.labels] == [1.0, 1.0, None]
    assert int(nib.load(tmp_path / "x.nii.gz").header["qform_code"]) == 0


def test_a_lost_shear_is_seen(phantom: Segmentation, tmp_path: Path) -> None:
    write_nifti(tmp_path / "x.nii.gz", phantom)
    with pytest.raises(ExportError, match="reads back with Dice"):
        verify_nifti(tmp_path / "x.nii.gz", sheared(phantom))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_mirrored_voxels_are_seen(phantom: Segmentation, tmp_path: Path, axis: int) -> None:
    path = saved(tmp_path / "x.nii.gz", np.flip(phantom.label_map, axis), phantom.geometry.affine_ras, phantom)
    with pytest.raises(ExportError, match=r"label 'Höcker' reads back with Dice 0\..* mm away"):
        verify_nifti(path, phantom)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_mirrored_affine_is_seen(phantom: Segmentation, tmp_path: Path, axis: int) -> None:
    affine = phantom.geometry.affine_ras.copy()
    affine[:3, axis] *= -1
    with pytest.raises(ExportError, match="reads back with"):
        verify_nifti(saved(tmp_path / "x.nii.gz", phantom.label_map, affine, phantom), phantom)


def test_the_same_voxels_in_another_order_are_the_same(phantom: Segmentation, tmp_path: Path) -> None:
    turned = np.flip(phantom.label_map.transpose(2, 0, 1), 1)
    affine = phantom.geometry.permuted((2, 0, 1)).flipped(1).affine_ras
    verification = verify_nifti(saved(tmp_path / "x.nii.gz", turned, affine, phantom), phantom)
    assert [label.dice for label in verification.labels] == [1.0, 1.0, None]


@pytest.mark.parametrize("shift_voxels", [0.1, 0.5, 1.0])
def test_a_shift_is_seen(phantom: Segmentation, tmp_path: Path, shift_voxels: float) -> None:
    affine = phantom.geometry.affine_ras.copy()
    affine[:3, 3] += shift_voxels * affine[:3, 2]
    with pytest.raises(ExportError, match="reads back with"):
        verify_nifti(saved(tmp_path / "x.nii.gz", phantom.label_map, affine, phantom), phantom)


def test_one_voxel_more_is_seen(phantom: Segmentation, tmp_path: Path) -> None:
    labels = phantom.label_map.copy()
    labels[0, 0, 0] = 7
    with pytest.raises(ExportError, match=r"label 'Nowhere' reads back with Dice 0\.0000"):
        verify_nifti(saved(tmp_path / "x.nii.gz", labels, phantom.geometry.affine_ras, phantom), phantom)


def test_an_unknown_id_is_seen(phantom: Segmentation, tmp_path: Path) -> None:
    labels = np.where(phantom.label_map == 3, 4, phantom.label_map).astype(np.uint8)
    with pytest.raises(ExportError, match="it holds label 4"):
        verify_nifti(saved(tmp_path / "x.nii.gz", labels, phantom.geometry.affine_ras, phantom), phantom)


def test_the_compressed_stream_is_one_member(phantom: Segmentation, tmp_path: Path) -> None:
    write_nifti(tmp_path / "x.nii.gz", phantom)
    content = gzip.decompress((tmp_path / "x.nii.gz").read_bytes())
    assert len(content) == int(np.frombuffer(content, "<f4", 1, 108)[0]) + phantom.label_map.size


def test_the_table_of_labels(phantom: Segmentation, tmp_path: Path) -> None:
    """As Connectome Workbench and TotalSegmentator look for it; readers without a use for it read the voxels."""
    path = tmp_path / "x.nii.gz"
    write_nifti(path, phantom)
    image = nib.load(path)
    first, second = image.header.extensions
    assert (first.get_code(), second.get_code()) == (0, 30)
    assert first.get_content() == second.content
    labels = ElementTree.fromstring(first.get_content()).findall("VolumeInformation/LabelTable/Label")
    assert [(x.get("Key"), x.text) for x in labels] == [("200", "Höcker"), ("3", "Right half"), ("7", "Nowhere")]
    assert labels[1].attrib == {"Key": "3", "Red": "0.337255", "Green": "0.705882", "Blue": "0.913725", "Alpha": "1"}
    assert np.array_equal(np.asanyarray(image.dataobj), phantom.label_map)
    assert np.array_equal(read_label(path).voxels, phantom.label_map)


def test_names_that_xml_would_read_as_marks(phantom: Segmentation, tmp_path: Path) -> None:
    schema = schema_from_names({3: "a < b & 'c' \"d\" ]]>", 7: " 海馬 ", 200: "x\ty"})
    odd = replace(phantom, schema=schema)
    write_nifti(tmp_path / "x.nii.gz", odd)
    assert [label.dice for label in verify_nifti(tmp_path / "x.nii.gz", odd).labels] == [1.0, None, 1.0]


def test_exchanged_ids_are_seen(phantom: Segmentation, tmp_path: Path) -> None:
    labels = np.array([0, 0, 0, 200, 0, 0, 0, 7], np.uint8)[np.where(phantom.label_map == 200, 7, phantom.label_map)]
    labels[labels == 7] = 3
    with pytest.raises(ExportError, match=r"label 'Höcker' reads back with Dice 0\."):
        verify_nifti(saved(tmp_path / "x.nii.gz", labels, phantom.geometry.affine_ras, phantom), phantom)


@pytest.mark.parametrize("change", [{"name": "Other"}, {"colour": (1, 2, 3)}, {"id": 8}])
def test_another_table_is_seen(phantom: Segmentation, tmp_path: Path, change: dict[str, object]) -> None:
    *others, last = phantom.schema.labels
    schema = LabelSchema(labels=(*others, last.model_copy(update=change)))
    write_nifti(tmp_path / "x.nii.gz", replace(phantom, schema=schema))
    with pytest.raises(ExportError, match="its table of labels has other"):
        verify_nifti(tmp_path / "x.nii.gz", phantom)


def test_a_missing_table_is_seen(phantom: Segmentation, tmp_path: Path) -> None:
    nib.save(nib.Nifti1Image(phantom.label_map, phantom.geometry.affine_ras), tmp_path / "x.nii.gz")
    with pytest.raises(ExportError, match="it has no table of its labels"):
        verify_nifti(tmp_path / "x.nii.gz", phantom)
