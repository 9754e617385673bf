"""3D Slicer's .seg.nrrd: against pynrrd, slicerio and SimpleITK, sheared grids, and files that were tampered with."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import nrrd
import numpy as np
import pytest
import SimpleITK as sitk
import slicerio

from pipeline.errors import ExportError
from pipeline.export.seg_nrrd import write_seg_nrrd
from pipeline.export.verify_seg_nrrd import verify_seg_nrrd
from pipeline.segmentation import Segmentation
from transforms.geometry import Geometry
from transforms.labels import CodedConcept, Label, LabelSchema, schema_from_names
from transforms.volume import read_label

ORIENTATIONS = ["axial", "coronal", "sagittal", "upside down", "oblique"]


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_readers_find_every_voxel_where_it_belongs(phantoms: SimpleNamespace, tmp_path: Path, orientation: str) -> None:
    source = phantoms.source_of(phantoms.write_series(tmp_path / "in", orientation))
    segmentation, path = phantoms.segmentation_of(source), tmp_path / "x.seg.nrrd"
    write_seg_nrrd(path, segmentation)
    voxels, header = nrrd.read(str(path))
    assert np.array_equal(voxels, segmentation.label_map)
    affine = np.column_stack([header["space directions"].T, header["space origin"]])
    assert np.array_equal(affine, segmentation.geometry.affine_lps[:3])
    assert header["space"] == "left-posterior-superior"
    image = sitk.ReadImage(path)
    last = [n - 1 for n in segmentation.geometry.shape]
    right, anterior, superior = segmentation.geometry.ras_from_ijk([last])[0]
    assert image.TransformIndexToPhysicalPoint(last) == pytest.approx((-right, -anterior, superior), abs=1e-6)
    found = read_label(path)
    assert found.geometry.difference(segmentation.geometry) is None
    assert np.array_equal(found.voxels, segmentation.label_map)


def test_slicer_reads_the_segments(phantom: Segmentation, tmp_path: Path) -> None:
    write_seg_nrrd(tmp_path / "x.seg.nrrd", phantom)
    found = slicerio.read_segmentation(str(tmp_path / "x.seg.nrrd"))
    assert np.array_equal(found["voxels"], phantom.label_map)
    assert np.array_equal(found["ijkToLPS"], phantom.geometry.affine_lps)
    assert found["masterRepresentation"] == "Binary labelmap"
    assert found["containedRepresentationNames"] == ["Binary labelmap"]
    assert found["referenceImageExtentOffset"] == [0, 0, 0]
    for segment, label in zip(found["segments"], phantom.schema.labels, strict=True):
        assert (segment["labelValue"], segment["layer"]) == (label.id, 0)
        assert np.abs(np.subtract(segment["color"], np.array(label.colour) / 255)).max() < 1e-6
        assert segment["extent"] == [0, 10, 0, 6, 0, 5]
        assert segment["terminology"]["category"] == [
            label.category.scheme,
            label.category.value,
            label.category.meaning,
        ]
        assert segment["terminology"]["type"] == [label.code.scheme, label.code.value, label.code.meaning]
    assert [segment["id"] for segment in found["segments"]] == ["Segment_200", "Segment_3", "Segment_7"]
    # slicerio drops what is not ASCII; Slicer itself writes and reads UTF-8.
    assert [segment["name"] for segment in found["segments"]] == ["Hcker", "Right half", "Nowhere"]
    assert b"Segment0_Name:=H\xc3\xb6cker\n" in (tmp_path / "x.seg.nrrd").read_bytes()


def test_ids_beyond_255(phantom: Segmentation, tmp_path: Path) -> None:
    labels = np.where(phantom.label_map == 200, 40_000, 0).astype(np.uint16)
    wide = replace(phantom, label_map=labels, schema=schema_from_names({40_000: "far", 2: "absent"}))
    write_seg_nrrd(tmp_path / "x.seg.nrrd", wide)
    voxels, header = nrrd.read(str(tmp_path / "x.seg.nrrd"))
    assert header["type"] == "unsigned short"
    assert np.array_equal(voxels, labels)
    assert [label.dice for label in verify_seg_nrrd(tmp_path / "x.seg.nrrd", wide).labels] == [None, 1.0]


def test_a_sheared_grid(phantom: Segmentation, tmp_path: Path) -> None:
    affine = phantom.geometry.affine_ras.copy()
    affine[:3, 2] += 0.3 * affine[:3, 1]
    tilted = replace(phantom, geometry=Geometry(phantom.geometry.shape, affine))
    write_seg_nrrd(tmp_path / "x.seg.nrrd", tilted)
    assert [label.dice for label in verify_seg_nrrd(tmp_path / "x.seg.nrrd", tilted).labels] == [1.0, 1.0, None]
    with pytest.raises(ExportError, match="reads back with"):
        verify_seg_nrrd(tmp_path / "x.seg.nrrd", phantom)


def test_equal_results_give_equal_bytes(phantom: Segmentation, tmp_path: Path) -> None:
    for name in "ab":
        write_seg_nrrd(tmp_path / name, phantom)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_an_empty_result(phantom: Segmentation, tmp_path: Path) -> None:
    empty = replace(phantom, label_map=np.zeros_like(phantom.label_map))
    write_seg_nrrd(tmp_path / "x.seg.nrrd", empty)
    assert [label.dice for label in verify_seg_nrrd(tmp_path / "x.seg.nrrd", empty).labels] == [None, None, None]


def test_names_with_line_ends(phantom: Segmentation, tmp_path: Path) -> None:
    odd = replace(phantom, schema=schema_from_names({3: "a\nb\\nc", 7: "x:=y: z", 200: "海馬"}))
    write_seg_nrrd(tmp_path / "x.seg.nrrd", odd)
    assert [label.dice for label in verify_seg_nrrd(tmp_path / "x.seg.nrrd", odd).labels] == [1.0, None, 1.0]


@pytest.mark.parametrize("mark", "~^|")
def test_codes_that_slicer_cannot_hold(phantom: Segmentation, tmp_path: Path, mark: str) -> None:
    label = Label(id=3, name="a", colour=(1, 2, 3), code=CodedConcept(value="1", meaning=f"a {mark} b"))
    odd = replace(phantom, label_map=np.zeros_like(phantom.label_map), schema=LabelSchema(labels=(label,)))
    with pytest.raises(ExportError, match="the code of label 3"):
        write_seg_nrrd(tmp_path / "x.seg.nrrd", odd)


Tamper = Callable[[str, np.ndarray], tuple[str, np.ndarray]]


def negate_an_axis(header: str, voxels: np.ndarray) -> tuple[str, np.ndarray]:
    before, after = header.split("space directions: (")
    return before + "space directions: (" + (after[1:] if after[0] == "-" else "-" + after), voxels


def another_space(header: str, voxels: np.ndarray) -> tuple[str, np.ndarray]:
    return header.replace("left-posterior-superior", "right-anterior-superior"), voxels


def shift_by_a_slice(header: str, voxels: np.ndarray) -> tuple[str, np.ndarray]:
    return header, np.roll(voxels, 1, axis=2)


def exchange_label_values(header: str, voxels: np.ndarray) -> tuple[str, np.ndarray]:
    header = header.replace("LabelValue:=200", "LabelValue:=x").replace("LabelValue:=3", "LabelValue:=200")
    return header.replace("LabelValue:=x", "LabelValue:=3"), voxels


def exchange_voxels(header: str, voxels: np.ndarray) -> tuple[str, np.ndarray]:
    return header, np.where(voxels == 200, 3, np.where(voxels == 3, 200, voxels))


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (lambda h, v: (h, v[::-1]), "label 'Höcker' reads back with Dice"),
        (lambda h, v: (h, v[:, ::-1]), "label 'Höcker' reads back with Dice"),
        (lambda h, v: (h, v[:, :, ::-1]), "label 'Höcker' reads back with Dice"),
        (negate_an_axis, "reads back with Dice"),
        (another_space, "its 'space' is right-anterior-superior"),
        (shift_by_a_slice, "label 'Höcker' reads back with Dice"),
        (exchange_voxels, "label 'Höcker' reads back with Dice"),
        (exchange_label_values, "segment 0 has another label value"),
        (lambda h, v: (h.replace("Segment1_Name:=R", "Segment1_Name:=L"), v), "segment 1 has another"),
        (lambda h, v: (h.replace("Segment1_Color:=0.3", "Segment1_Color:=0.4"), v), "segment 1 has another"),
        (lambda h, v: (h.replace("4421005", "4421006"), v), "segment 0 has another"),
        (lambda h, v: (h.replace("Segment1_Layer:=0", "Segment1_Layer:=1"), v), "segment 1 has another"),
        (lambda h, v: (h.replace("Segment2_ID:=Segment_7", "Segment2_ID:=Segment_3"), v), "share an identifier"),
        (lambda h, v: (h.replace("Segment2_ID", "Segment2_Id"), v), "not the schema's labels"),
    ],
)
def test_tampering_is_seen(phantom: Segmentation, tmp_path: Path, tamper: Tamper, message: str) -> None:
    path = tmp_path / "x.seg.nrrd"
    write_seg_nrrd(path, phantom)
    verify_seg_nrrd(path, phantom)
    head, _, packed = path.read_bytes().partition(b"\n\n")
    voxels = np.frombuffer(gzip.decompress(packed), np.uint8).reshape(phantom.label_map.shape, order="F")
    header, voxels = tamper(head.decode(), voxels)
    path.write_bytes(header.encode() + b"\n\n" + gzip.compress(voxels.astype(np.uint8).tobytes(order="F")))
    assert path.read_bytes() != head + b"\n\n" + packed
    with pytest.raises(ExportError, match=message):
        verify_seg_nrrd(path, phantom)
