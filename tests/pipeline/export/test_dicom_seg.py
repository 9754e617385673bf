"""DICOM SEG: against highdicom's own reader and the source's tags, on all orientations, and tampered with."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import highdicom as hd
import numpy as np
import pydicom
import pytest
from pydicom import Dataset
from pydicom.uid import UID

from pipeline.errors import ExportError
from pipeline.export import Source, export
from pipeline.export.dicom_seg import write_seg
from pipeline.export.verify_seg import verify_seg
from pipeline.postprocessing import Action, PostProcessing
from pipeline.segmentation import Segmentation
from tests.pipeline.export.highdicom_reader import read_by_highdicom
from transforms.dicom import DicomSeries
from transforms.labels import CodedConcept, Label, LabelSchema, schema_from_names

ORIENTATIONS = ["axial", "coronal", "sagittal", "upside down", "oblique"]
LEFT_OUT = ("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID", "StudyDate")


def series_of(source: Source) -> DicomSeries:
    assert source.series is not None
    return source.series


def written(segmentation: Segmentation, source: Source, folder: Path) -> Path:
    [file] = export(segmentation, formats=["seg"], out=folder, name="x", source=source)
    return file.path


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_highdicom_reads_the_same_voxels(phantoms: SimpleNamespace, tmp_path: Path, orientation: str) -> None:
    source = phantoms.source_of(phantoms.write_series(tmp_path / "in", orientation))
    segmentation = phantoms.segmentation_of(source)
    path = written(segmentation, source, tmp_path)
    assert np.array_equal(read_by_highdicom(path, segmentation), segmentation.label_map)


def test_a_real_series(hippocrop: Source, phantoms: SimpleNamespace, tmp_path: Path) -> None:
    i, j, k = np.indices(hippocrop.image.geometry.shape)
    ellipsoid = ((i - 16) / 6) ** 2 + ((j - 25) / 17) ** 2 + ((k - 20) / 5) ** 2 < 1
    labels = np.where(ellipsoid, np.where(j > 25, 2, 1), 0).astype(np.uint8)
    schema = schema_from_names({1: "Anterior", 2: "Posterior"})
    segmentation = phantoms.segmentation_of(hippocrop, labels, schema)
    path = written(segmentation, hippocrop, tmp_path)
    assert np.array_equal(read_by_highdicom(path, segmentation), labels)
    verification = verify_seg(path, segmentation, series_of(hippocrop))
    assert [label.volume_mm3 for label in verification.labels] == [float((labels == n).sum()) for n in (1, 2)]


def test_links_to_the_source(phantom: Segmentation, source: Source, tmp_path: Path) -> None:
    found = pydicom.dcmread(written(phantom, source, tmp_path))
    slices = [pydicom.dcmread(path) for path in series_of(source).paths]
    for keyword in (*LEFT_OUT, "StudyTime", "StudyDescription", "ReferringPhysicianName", "StudyInstanceUID"):
        assert found[keyword].value == slices[0][keyword].value, keyword
    assert found.FrameOfReferenceUID == slices[0].FrameOfReferenceUID
    assert found.SeriesInstanceUID != slices[0].SeriesInstanceUID
    assert found.SOPInstanceUID not in {header.SOPInstanceUID for header in slices}
    [series] = found.ReferencedSeriesSequence
    assert series.SeriesInstanceUID == slices[0].SeriesInstanceUID
    named = [item.ReferencedSOPInstanceUID for item in series.ReferencedInstanceSequence]
    assert named == [header.SOPInstanceUID for header in slices]


def test_each_frame_names_the_slice_that_it_lies_on(phantom: Segmentation, source: Source, tmp_path: Path) -> None:
    found = pydicom.dcmread(written(phantom, source, tmp_path))
    by_uid = {header.SOPInstanceUID: header for header in map(pydicom.dcmread, series_of(source).paths)}
    # Label 200 lies in three slices and label 3 in three; frames without a voxel are left out.
    assert int(found.NumberOfFrames) == len(found.PerFrameFunctionalGroupsSequence) == 6
    for groups in found.PerFrameFunctionalGroupsSequence:
        [image] = groups.DerivationImageSequence[0].SourceImageSequence
        place = groups.PlanePositionSequence[0].ImagePositionPatient
        assert place == by_uid[image.ReferencedSOPInstanceUID].ImagePositionPatient


def test_segments_are_the_schema(phantom: Segmentation, source: Source, tmp_path: Path) -> None:
    segments = pydicom.dcmread(written(phantom, source, tmp_path)).SegmentSequence
    assert [(s.SegmentNumber, s.SegmentLabel) for s in segments] == [(1, "Höcker"), (2, "Right half"), (3, "Nowhere")]
    kind, category = (
        segments[0].SegmentedPropertyTypeCodeSequence[0],
        segments[0].SegmentedPropertyCategoryCodeSequence[0],
    )
    assert (kind.CodeValue, kind.CodingSchemeDesignator, kind.CodeMeaning) == ("4421005", "SCT", "Cell structure")
    assert category.CodeMeaning == "Anatomical Structure"
    for segment, label in zip(segments, phantom.schema.labels, strict=True):
        lab = hd.color.CIELabColor.from_dicom_value(segment.RecommendedDisplayCIELabValue)
        assert np.abs(np.subtract(lab.to_rgb(), label.colour)).max() <= 2
        assert segment.TrackingID == label.name
        algorithm = segment.SegmentationAlgorithmIdentificationSequence[0]
        assert (algorithm.AlgorithmName, algorithm.AlgorithmVersion) == ("phantom", "1.2")
    assert len({segment.TrackingUID for segment in segments}) == 3


def test_a_segment_says_what_was_done_to_it(phantom: Segmentation, source: Source, tmp_path: Path) -> None:
    name = phantom.schema.labels[0].name
    cleaned = PostProcessing(actions=(Action(kind="largest", name=name, labels=(name,)),))
    path = written(replace(phantom, postprocessing=cleaned), source, tmp_path)
    told = [segment.get("SegmentDescription") for segment in pydicom.dcmread(path).SegmentSequence]
    assert told == [f"post-processed: {name}: keep the largest component", *[None] * (len(told) - 1)]


def test_the_gap_is_that_of_the_positions(phantom: Segmentation, source: Source, tmp_path: Path) -> None:
    [measures] = (
        pydicom.dcmread(written(phantom, source, tmp_path)).SharedFunctionalGroupsSequence[0].PixelMeasuresSequence
    )
    assert [float(x) for x in measures.PixelSpacing] == [2.0, 0.7]
    assert float(measures.SpacingBetweenSlices) == pytest.approx(3.5, abs=1e-6)
    assert float(measures.SliceThickness) == pytest.approx(3.5, abs=1e-6)


def without_identifiers(dataset: Dataset) -> Dataset:
    def clear(item: Dataset, element: Any) -> None:
        if element.VR in ("UI", "DA", "TM", "DT"):
            element.value = None

    dataset.walk(clear)
    return dataset


def test_only_identifiers_and_times_differ_between_runs(phantom: Segmentation, source: Source, tmp_path: Path) -> None:
    first, second = (pydicom.dcmread(written(phantom, source, tmp_path / n)) for n in "ab")
    assert first.SOPInstanceUID != second.SOPInstanceUID
    assert without_identifiers(first) == without_identifiers(second)


def test_maker(phantom: Segmentation, source: Source, tmp_path: Path) -> None:
    found = pydicom.dcmread(written(phantom, source, tmp_path))
    assert (found.Manufacturer, found.ManufacturerModelName, found.Modality) == ("volseg", "volseg", "SEG")
    assert found.SoftwareVersions
    assert found.SeriesNumber == 1004
    assert found.SeriesDescription == "Segmentation by phantom"
    assert found.ContentDate
    assert found.ContentTime


def test_an_empty_result_has_one_empty_frame(phantoms: SimpleNamespace, source: Source, tmp_path: Path) -> None:
    empty = phantoms.segmentation_of(source, np.zeros(source.image.geometry.shape, dtype=np.uint8))
    found = pydicom.dcmread(written(empty, source, tmp_path))
    assert int(found.NumberOfFrames) == len(found.PerFrameFunctionalGroupsSequence) == 1
    assert len(found.SegmentSequence) == 3
    assert not found.pixel_array.any()
    assert len(found.ReferencedSeriesSequence[0].ReferencedInstanceSequence) == 6


def test_one_label(phantoms: SimpleNamespace, source: Source, tmp_path: Path) -> None:
    labels = (phantoms.label_map() == 3).astype(np.uint8)
    segmentation = phantoms.segmentation_of(source, labels, schema_from_names({1: "only"}))
    path = written(segmentation, source, tmp_path)
    assert np.array_equal(read_by_highdicom(path, segmentation), labels)


def test_ids_beyond_255(phantoms: SimpleNamespace, source: Source, tmp_path: Path) -> None:
    labels = np.where(phantoms.label_map() == 3, 40_000, 0).astype(np.uint16)
    segmentation = phantoms.segmentation_of(source, labels, schema_from_names({1: "near", 40_000: "far"}))
    assert np.array_equal(read_by_highdicom(written(segmentation, source, tmp_path), segmentation), labels)


@pytest.mark.parametrize(
    "tags",
    [
        dict.fromkeys(LEFT_OUT),
        {"PatientSex": "unsure", "PatientBirthDate": "spring", "StudyDate": "long ago", "StudyTime": "noon"},
        {"SliceThickness": None, "SpacingBetweenSlices": None, "SeriesNumber": None, "ReferringPhysicianName": None},
        {"SpecificCharacterSet": ["", "ISO 2022 IR 87"], "PatientName": "Yamada^Tarou=山田^太郎=やまだ^たろう"},
        {"SpecificCharacterSet": "ISO_IR 100", "PatientName": "Müller^Jörg", "StudyDescription": "Schädel"},
        {"SOPClassUID": None},
    ],
    ids=["anonymised", "no such dates", "bare", "Japanese", "Latin", "no class"],
)
def test_sources_as_they_are(phantoms: SimpleNamespace, tmp_path: Path, tags: dict[str, Any]) -> None:
    source = phantoms.source_of(phantoms.write_series(tmp_path / "in", **tags))
    segmentation = phantoms.segmentation_of(source)
    path = written(segmentation, source, tmp_path)
    assert np.array_equal(read_by_highdicom(path, segmentation), segmentation.label_map)
    found, given = pydicom.dcmread(path), pydicom.dcmread(series_of(source).paths[0])
    for keyword in (*LEFT_OUT, "StudyTime", "StudyDescription"):
        # What the source spells wrong stays as it is.
        assert str(found.get(keyword) or "") == str(given.get(keyword) or ""), keyword


def test_nothing_is_said_about_the_patient(
    phantoms: SimpleNamespace,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    source = phantoms.source_of(phantoms.write_series(tmp_path / "in", PatientName="Erika Muster", StudyID="S" * 40))
    segmentation = phantoms.segmentation_of(source)
    with caplog.at_level(logging.DEBUG):
        path = written(segmentation, source, tmp_path / "out")
    assert capfd.readouterr() == ("", "")
    assert not [record for record in caplog.records if record.name.startswith(("highdicom", "pydicom"))]
    for secret in ("Muster", "Erika", "4711", "ACC-99"):
        assert not [p for p in (tmp_path / "out").iterdir() if secret in p.name]
        assert secret not in path.with_name("x.verification.json").read_text(encoding="utf-8")


def test_a_frame_of_reference_is_made_where_the_source_has_none(phantoms: SimpleNamespace, tmp_path: Path) -> None:
    """All objects of one series share it, those of another do not."""
    first, second = (
        phantoms.source_of(phantoms.write_series(tmp_path / n, FrameOfReferenceUID=None)) for n in ("in", "other")
    )
    segmentation = phantoms.segmentation_of(first)
    made = [pydicom.dcmread(written(segmentation, first, tmp_path / n)).FrameOfReferenceUID for n in "ab"]
    other = pydicom.dcmread(written(phantoms.segmentation_of(second), second, tmp_path / "c")).FrameOfReferenceUID
    assert made[0] == made[1] != other
    assert made[0].startswith("2.25.")
    assert UID(made[0]).is_valid


def test_a_series_that_cannot_be_referred_to(phantoms: SimpleNamespace, tmp_path: Path) -> None:
    source = phantoms.source_of(phantoms.write_series(tmp_path / "in", SeriesInstanceUID=None))
    with pytest.raises(ExportError, match="has no SeriesInstanceUID"):
        written(phantoms.segmentation_of(source), source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    slices = [replace(header, sop_uid="1.2.3", series_uid="1.2.4") for header in series_of(source).slices]
    alike = replace(source, series=replace(series_of(source), slices=tuple(slices)))
    with pytest.raises(ExportError, match="has no SOPInstanceUID of its own"):
        written(phantoms.segmentation_of(alike), alike, tmp_path / "out")


def test_facts_that_dicom_does_not_allow_are_left_out(phantoms: SimpleNamespace, tmp_path: Path) -> None:
    tags = {"PatientAge": "0Y", "PatientSize": "1.77", "PatientWeight": "70.5", "PatientComments": "fine"}
    folder = phantoms.write_series(tmp_path / "in", **tags)
    for path in folder.iterdir():
        # pydicom writes no number that is none.
        path.write_bytes(path.read_bytes().replace(b"1.77", b"1,77"))
    source = phantoms.source_of(folder)
    found = pydicom.dcmread(written(phantoms.segmentation_of(source), source, tmp_path))
    assert (found.PatientWeight, found.PatientComments) == (70.5, "fine")
    assert "PatientAge" not in found
    assert "PatientSize" not in found


@pytest.mark.parametrize(
    ("method", "expected"),
    [(None, "not stated by the source"), ("", "not stated by the source"), ("by hand", "by hand")],
)
def test_a_removed_identity_has_a_method(
    phantoms: SimpleNamespace, tmp_path: Path, method: str | None, expected: str
) -> None:
    tags = {"PatientIdentityRemoved": "YES", "DeidentificationMethod": method}
    source = phantoms.source_of(phantoms.write_series(tmp_path / "in", **tags))
    found = pydicom.dcmread(written(phantoms.segmentation_of(source), source, tmp_path))
    assert (found.PatientIdentityRemoved, found.DeidentificationMethod) == ("YES", expected)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (Label(id=3, name="n" * 65, colour=(1, 2, 3)), "the name of label 3.*at most 64 characters"),
        (Label(id=3, name="a\\b", colour=(1, 2, 3)), "no backslash"),
        (
            Label(id=3, name="a", colour=(1, 2, 3), code=CodedConcept(value="1" * 17, meaning="m")),
            "the code value.*at most 16",
        ),
    ],
)
def test_labels_that_do_not_fit_dicom(
    phantoms: SimpleNamespace, source: Source, tmp_path: Path, label: Label, message: str
) -> None:
    labels = (phantoms.label_map() == 3).astype(np.uint8) * 3
    with pytest.raises(ExportError, match=message):
        written(phantoms.segmentation_of(source, labels, LabelSchema(labels=(label,))), source, tmp_path)


Tamper = Callable[[Dataset], None]


def frames(dataset: Dataset) -> np.ndarray:
    return np.asarray(dataset.pixel_array)


def put(dataset: Dataset, pixels: np.ndarray) -> None:
    packed = np.packbits(pixels.ravel(), bitorder="little").tobytes()
    dataset.PixelData = packed + b"\0" * (len(packed) % 2)


def mirror_rows(dataset: Dataset) -> None:
    put(dataset, frames(dataset)[:, ::-1])


def mirror_columns(dataset: Dataset) -> None:
    put(dataset, frames(dataset)[:, :, ::-1])


def exchange_rows_and_columns(dataset: Dataset) -> None:
    orientation = dataset.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence[0]
    cosines = list(orientation.ImageOrientationPatient)
    orientation.ImageOrientationPatient = cosines[3:] + cosines[:3]


def negate_a_cosine(dataset: Dataset) -> None:
    orientation = dataset.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence[0]
    cosines = list(orientation.ImageOrientationPatient)
    orientation.ImageOrientationPatient = [-c for c in cosines[:3]] + cosines[3:]


def exchange_spacings(dataset: Dataset) -> None:
    measures = dataset.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
    measures.PixelSpacing = list(measures.PixelSpacing)[::-1]


def stretch_the_gap(dataset: Dataset) -> None:
    dataset.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].SpacingBetweenSlices = 5.0


def places(dataset: Dataset) -> list[np.ndarray]:
    return [
        np.array(groups.PlanePositionSequence[0].ImagePositionPatient, dtype=float)
        for groups in dataset.PerFrameFunctionalGroupsSequence
    ]


def move(dataset: Dataset, step_mm: np.ndarray) -> None:
    for groups, place in zip(dataset.PerFrameFunctionalGroupsSequence, places(dataset), strict=True):
        groups.PlanePositionSequence[0].ImagePositionPatient = [f"{x:.9g}" for x in place + step_mm]


def axis_mm(dataset: Dataset) -> np.ndarray:
    cosines = dataset.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence[0].ImageOrientationPatient
    return np.cross(cosines[:3], cosines[3:]) * 3.5


def shift_by_a_slice(dataset: Dataset) -> None:
    move(dataset, axis_mm(dataset))


def shift_by_half_a_pixel(dataset: Dataset) -> None:
    row = np.array(dataset.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence[0].ImageOrientationPatient[:3])
    move(dataset, row * 0.7 / 2)


def shift_with_references(dataset: Dataset) -> None:
    """By one slice, with references that fit: only the voxels can tell."""
    uids = [item.ReferencedSOPInstanceUID for item in dataset.ReferencedSeriesSequence[0].ReferencedInstanceSequence]
    for groups in dataset.PerFrameFunctionalGroupsSequence:
        image = groups.DerivationImageSequence[0].SourceImageSequence[0]
        image.ReferencedSOPInstanceUID = uids[uids.index(image.ReferencedSOPInstanceUID) - 1]
    move(dataset, -axis_mm(dataset))


def exchange_segment_numbers(dataset: Dataset) -> None:
    first, second = dataset.SegmentSequence[:2]
    first.SegmentNumber, second.SegmentNumber = second.SegmentNumber, first.SegmentNumber


def exchange_frame_numbers(dataset: Dataset) -> None:
    for groups in dataset.PerFrameFunctionalGroupsSequence:
        item = groups.SegmentIdentificationSequence[0]
        item.ReferencedSegmentNumber = 3 - item.ReferencedSegmentNumber


def exchange_references(dataset: Dataset) -> None:
    first, second = (
        groups.DerivationImageSequence[0].SourceImageSequence[0]
        for groups in dataset.PerFrameFunctionalGroupsSequence[:2]
    )
    first.ReferencedSOPInstanceUID, second.ReferencedSOPInstanceUID = (
        second.ReferencedSOPInstanceUID,
        first.ReferencedSOPInstanceUID,
    )


def leave_out_a_frame(dataset: Dataset) -> None:
    put(dataset, frames(dataset)[:-1])
    dataset.NumberOfFrames = int(dataset.NumberOfFrames) - 1
    dataset.PerFrameFunctionalGroupsSequence = dataset.PerFrameFunctionalGroupsSequence[:-1]


def rename(dataset: Dataset) -> None:
    dataset.SegmentSequence[0].SegmentLabel = "Other"


def recode(dataset: Dataset) -> None:
    dataset.SegmentSequence[0].SegmentedPropertyTypeCodeSequence[0].CodeValue = "1"


def recolour(dataset: Dataset) -> None:
    dataset.SegmentSequence[0].RecommendedDisplayCIELabValue = [0, 32896, 32896]


def another_patient(dataset: Dataset) -> None:
    dataset.PatientID = "ID-4712"


def another_name(dataset: Dataset) -> None:
    dataset.PatientName = "Muster^Eva"


def another_frame_of_reference(dataset: Dataset) -> None:
    dataset.FrameOfReferenceUID = UID("1.2.3")


def another_series(dataset: Dataset) -> None:
    dataset.ReferencedSeriesSequence[0].SeriesInstanceUID = UID("1.2.3")


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (mirror_rows, "label 'Höcker' reads back with Dice"),
        (mirror_columns, "label 'Höcker' reads back with Dice"),
        (exchange_rows_and_columns, "reads back with Dice"),
        (negate_a_cosine, "reads back with Dice"),
        (exchange_spacings, "reads back with Dice"),
        (stretch_the_gap, "mm3"),
        (shift_by_a_slice, "does not refer to the source slice"),
        (shift_with_references, "reads back with Dice"),
        (shift_by_half_a_pixel, "reads back with"),
        (exchange_segment_numbers, "reads back with Dice"),
        (exchange_frame_numbers, "reads back with Dice"),
        (exchange_references, "does not refer to the source slice"),
        (leave_out_a_frame, "label 'Right half' reads back with Dice"),
        (rename, "segment 1 has another name, code or colour"),
        (recode, "segment 1 has another name, code or colour"),
        (recolour, "segment 1 has another name, code or colour"),
        (another_patient, "its PatientID is not the source's"),
        (another_name, "its PatientName is not the source's"),
        (another_frame_of_reference, "its FrameOfReferenceUID is not the source's"),
        (another_series, "does not refer to the source series"),
    ],
)
def test_tampering_is_seen(phantom: Segmentation, source: Source, tmp_path: Path, tamper: Tamper, message: str) -> None:
    path = tmp_path / "x.dcm"
    write_seg(path, phantom, series_of(source))
    verify_seg(path, phantom, series_of(source))
    dataset = pydicom.dcmread(path)
    tamper(dataset)
    dataset.save_as(path)
    with pytest.raises(ExportError, match=message) as caught:
        verify_seg(path, phantom, series_of(source))
    for secret in ("Muster", "4711", "4712"):
        assert secret not in str(caught.value)


def test_the_same_planes_in_another_order_of_files(phantom: Segmentation, source: Source, tmp_path: Path) -> None:
    """A label map whose k runs against the series is another label map."""
    path = tmp_path / "x.dcm"
    write_seg(path, phantom, series_of(source))
    backwards = replace(phantom, label_map=phantom.label_map[:, :, ::-1].copy())
    with pytest.raises(ExportError, match="reads back with Dice"):
        verify_seg(path, backwards, series_of(source))
