"""DICOM SEG as LABELMAP: against highdicom's reader and the raw pixels, what it says of itself, and tampered with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import highdicom as hd
import numpy as np
import pydicom
import pytest
from pydicom import Dataset

from pipeline.errors import ExportError
from pipeline.export import Source, export
from pipeline.export.dicom_seg import write_labelmap
from pipeline.export.verify_seg import verify_seg
from pipeline.segmentation import Segmentation
from tests.pipeline.export.highdicom_reader import read_by_highdicom
from transforms.labels import LabelSchema, schema_from_names

ORIENTATIONS = ["axial", "coronal", "sagittal", "upside down", "oblique"]


def written(segmentation: Segmentation, source: Source, folder: Path) -> Path:
    [file] = export(segmentation, formats=["labelmap"], out=folder, name="x", source=source)
    return file.path


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_highdicom_reads_the_same_voxels(phantoms: SimpleNamespace, tmp_path: Path, orientation: str) -> None:
    source = phantoms.source_of(phantoms.write_series(tmp_path / "in", orientation))
    segmentation = phantoms.segmentation_of(source)
    assert np.array_equal(
        read_by_highdicom(written(segmentation, source, tmp_path), segmentation), segmentation.label_map
    )


def test_one_frame_a_slice_of_segment_numbers(phantom: Segmentation, source: Source, tmp_path: Path) -> None:
    """Numbers are classes: 200, 3 and 7 in the schema's order become 1, 2 and 3, as in the BINARY object."""
    found = pydicom.dcmread(written(phantom, source, tmp_path))
    assert (found.SegmentationType, found.SOPClassUID) == ("LABELMAP", "1.2.840.10008.5.1.4.1.1.66.7")
    assert (found.BitsAllocated, found.BitsStored, found.HighBit, found.PixelPaddingValue) == (8, 8, 7, 0)
    assert [(s.SegmentNumber, s.SegmentLabel) for s in found.SegmentSequence] == [
        (1, "Höcker"),
        (2, "Right half"),
        (3, "Nowhere"),
    ]
    # Slices 1 to 5 hold something, the first does not.
    assert found.NumberOfFrames == len(found.PerFrameFunctionalGroupsSequence) == 5
    expected = phantom.schema.classes_from_ids(phantom.label_map).transpose(2, 1, 0)[1:]
    assert np.array_equal(found.pixel_array, expected)
    contents = [groups.FrameContentSequence[0] for groups in found.PerFrameFunctionalGroupsSequence]
    assert [content.DimensionIndexValues for content in contents] == [1, 2, 3, 4, 5]
    assert len(found.ReferencedSeriesSequence[0].ReferencedInstanceSequence) == 6


def test_background_is_no_segment(phantom: Segmentation, source: Source, tmp_path: Path) -> None:
    """Viewers that count the segments would give each the colour of the one before."""
    found = pydicom.dcmread(written(phantom, source, tmp_path))
    colours = [
        hd.color.CIELabColor.from_dicom_value(s.RecommendedDisplayCIELabValue).to_rgb() for s in found.SegmentSequence
    ]
    assert np.abs(np.subtract(colours, [label.colour for label in phantom.schema.labels])).max() <= 2


def test_many_labels_take_two_bytes(phantoms: SimpleNamespace, source: Source, tmp_path: Path) -> None:
    labels = np.arange(11 * 7 * 6, dtype=np.uint16).reshape(11, 7, 6) % 257 * 100
    schema = schema_from_names({int(n): f"label {n}" for n in np.unique(labels) if n})
    segmentation = phantoms.segmentation_of(source, labels, schema)
    path = written(segmentation, source, tmp_path)
    found = pydicom.dcmread(path)
    assert (found.BitsAllocated, found["PixelData"].VR) == (16, "OW")
    assert np.array_equal(read_by_highdicom(path, segmentation), labels)


def test_an_empty_result_has_one_empty_frame(phantoms: SimpleNamespace, source: Source, tmp_path: Path) -> None:
    empty = phantoms.segmentation_of(source, np.zeros(source.image.geometry.shape, dtype=np.uint8))
    found = pydicom.dcmread(written(empty, source, tmp_path))
    assert (found.NumberOfFrames, len(found.SegmentSequence)) == (1, 3)
    assert not found.pixel_array.any()


def test_one_label(phantoms: SimpleNamespace, source: Source, tmp_path: Path) -> None:
    labels = (phantoms.label_map() == 3).astype(np.uint8)
    segmentation = phantoms.segmentation_of(source, labels, schema_from_names({1: "only"}))
    assert np.array_equal(read_by_highdicom(written(segmentation, source, tmp_path), segmentation), labels)


def put(dataset: Dataset, pixels: np.ndarray) -> None:
    content = np.ascontiguousarray(pixels, dtype=np.uint8).tobytes()
    dataset.PixelData = content + b"\0" * (len(content) % 2)


def exchange_values(dataset: Dataset) -> None:
    put(dataset, np.array([0, 2, 1], np.uint8)[dataset.pixel_array])


def an_unknown_value(dataset: Dataset) -> None:
    put(dataset, np.where(dataset.pixel_array == 2, 4, dataset.pixel_array))


def mirror_rows(dataset: Dataset) -> None:
    put(dataset, dataset.pixel_array[:, ::-1])


def mirror_columns(dataset: Dataset) -> None:
    put(dataset, dataset.pixel_array[:, :, ::-1])


def turn_frames_round(dataset: Dataset) -> None:
    put(dataset, dataset.pixel_array[::-1])


def one_voxel_less(dataset: Dataset) -> None:
    pixels = dataset.pixel_array.copy()
    pixels.ravel()[np.flatnonzero(pixels)[0]] = 0
    put(dataset, pixels)


def negate_a_cosine(dataset: Dataset) -> None:
    orientation = dataset.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence[0]
    cosines = list(orientation.ImageOrientationPatient)
    orientation.ImageOrientationPatient = cosines[:3] + [-c for c in cosines[3:]]


def shift_by_a_slice(dataset: Dataset) -> None:
    """With references that fit: only the voxels can tell."""
    groups = list(dataset.PerFrameFunctionalGroupsSequence)
    places = [(g.PlanePositionSequence, g.DerivationImageSequence) for g in groups]
    for group, (place, derivation) in zip(groups, places[1:] + places[:1], strict=True):
        group.PlanePositionSequence, group.DerivationImageSequence = place, derivation


def exchange_segment_numbers(dataset: Dataset) -> None:
    first, second = dataset.SegmentSequence[:2]
    first.SegmentNumber, second.SegmentNumber = second.SegmentNumber, first.SegmentNumber


def leave_out_a_file(dataset: Dataset) -> None:
    del dataset.ReferencedSeriesSequence[0].ReferencedInstanceSequence[0]


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (exchange_values, "label 'Höcker' reads back with Dice"),
        (an_unknown_value, "a segment that it does not describe"),
        (mirror_rows, "label 'Höcker' reads back with Dice"),
        (mirror_columns, "label 'Höcker' reads back with Dice"),
        (turn_frames_round, "label 'Höcker' reads back with Dice"),
        (one_voxel_less, "label 'Höcker' reads back with Dice"),
        (negate_a_cosine, "reads back with Dice"),
        (shift_by_a_slice, "label 'Höcker' reads back with Dice"),
        (exchange_segment_numbers, "reads back with Dice"),
        (leave_out_a_file, "does not name every file of the source series"),
    ],
)
def test_tampering_is_seen(
    phantom: Segmentation, source: Source, tmp_path: Path, tamper: Callable[[Dataset], None], message: str
) -> None:
    path = tmp_path / "x.dcm"
    assert source.series is not None
    write_labelmap(path, phantom, source.series)
    verify_seg(path, phantom, source.series)
    dataset = pydicom.dcmread(path)
    tamper(dataset)
    dataset.save_as(path)
    with pytest.raises(ExportError, match=message):
        verify_seg(path, phantom, source.series)


def test_another_order_of_labels_is_another_object(phantom: Segmentation, source: Source, tmp_path: Path) -> None:
    assert source.series is not None
    write_labelmap(tmp_path / "x.dcm", phantom, source.series)
    backwards = replace(phantom, schema=LabelSchema(labels=phantom.schema.labels[::-1]))
    with pytest.raises(ExportError, match="not the schema's labels in order"):
        verify_seg(tmp_path / "x.dcm", backwards, source.series)
