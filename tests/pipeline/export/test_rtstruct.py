"""RT Structure Sets: filled by Matplotlib on the planes of the source's own headers, validated, and tampered with."""

from __future__ import annotations

import logging
import subprocess
import sysconfig
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pydicom
import pytest
from matplotlib.path import Path as Polygon
from pydicom import Dataset
from pydicom.uid import UID

from pipeline.errors import ExportError
from pipeline.export import Source, export
from pipeline.export.rtstruct import decimal_strings, write_rtstruct
from pipeline.export.verify_rtstruct import verify_rtstruct
from pipeline.segmentation import Segmentation
from transforms.dicom import DicomSeries
from transforms.labels import CodedConcept, Label, LabelSchema, schema_from_names

ORIENTATIONS = ["axial", "coronal", "sagittal", "upside down", "oblique"]
DCIODVFY = Path(sysconfig.get_path("scripts")) / "dciodvfy"


def series_of(source: Source) -> DicomSeries:
    assert source.series is not None
    return source.series


def written(segmentation: Segmentation, source: Source, folder: Path) -> Path:
    [file] = export(segmentation, formats=["rtstruct"], out=folder, name="x", source=source)
    return file.path


def filled(path: Path, source: Source) -> dict[str, np.ndarray]:
    """Masks (I, J, K) by ROI name: pixel centres of the slice that a contour names, as Matplotlib fills."""
    dataset = pydicom.dcmread(path)
    slices = [pydicom.dcmread(p) for p in series_of(source).paths]
    planes = {header.SOPInstanceUID: (k, header) for k, header in enumerate(slices)}
    names = {roi.ROINumber: roi.ROIName for roi in dataset.StructureSetROISequence}
    masks = {name: np.zeros(source.image.geometry.shape, dtype=int) for name in names.values()}
    for roi in dataset.ROIContourSequence:
        for contour in roi.get("ContourSequence", []):
            k, header = planes[contour.ContourImageSequence[0].ReferencedSOPInstanceUID]
            row, column = np.array(header.ImageOrientationPatient, dtype=float).reshape(2, 3)
            points = np.array(contour.ContourData, dtype=float).reshape(-1, 3) - header.ImagePositionPatient
            assert np.abs(points @ np.cross(row, column)).max() < 1e-3
            row_mm, column_mm = (float(v) for v in header.PixelSpacing)
            i, j = np.indices((header.Columns, header.Rows))
            centres_mm = np.stack([i.ravel() * column_mm, j.ravel() * row_mm], axis=1)
            polygon = Polygon(np.stack([points @ row, points @ column], axis=1))
            masks[names[roi.ReferencedROINumber]][:, :, k] += polygon.contains_points(centres_mm).reshape(i.shape)
    return masks


def check_filled(path: Path, segmentation: Segmentation, source: Source) -> None:
    masks = filled(path, source)
    assert tuple(masks) == segmentation.schema.names
    for label in segmentation.schema.labels:
        assert np.array_equal(masks[label.name], segmentation.label_map == label.id), label.name


def holed() -> np.ndarray:
    """A block with a hole, an island in it, and a hole that is filled by another label."""
    labels = np.zeros((11, 7, 6), dtype=np.uint8)
    labels[1:10, 0:7, 2:5] = 3
    labels[2:6, 1:6, 3] = 0
    labels[3:5, 2:4, 3] = 3
    labels[7:9, 2:5, 2:4] = 200
    return labels


def tilted(folder: Path) -> Path:
    """Shift each slice of an axial series along its columns, as a tilted gantry does."""
    for path in folder.iterdir():
        header = pydicom.dcmread(path)
        x, y, z = (float(v) for v in header.ImagePositionPatient)
        header.ImagePositionPatient = [x, round(y + 0.3 * (z - 40.0), 6), z]
        header.save_as(path)
    return folder


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_matplotlib_fills_the_same_pixels(phantoms: SimpleNamespace, tmp_path: Path, orientation: str) -> None:
    source = phantoms.source_of(phantoms.write_series(tmp_path / "in", orientation))
    for labels in (phantoms.label_map(), holed()):
        segmentation = phantoms.segmentation_of(source, labels)
        check_filled(written(segmentation, source, tmp_path), segmentation, source)


def test_a_tilted_gantry(phantoms: SimpleNamespace, tmp_path: Path) -> None:
    source = phantoms.source_of(tilted(phantoms.write_series(tmp_path / "in")))
    segmentation = phantoms.segmentation_of(source, holed())
    check_filled(written(segmentation, source, tmp_path), segmentation, source)


def test_a_real_series(hippocrop: Source, phantoms: SimpleNamespace, tmp_path: Path) -> None:
    i, j, k = np.indices(hippocrop.image.geometry.shape)
    distance = ((i - 16) / 9) ** 2 + ((j - 25) / 17) ** 2 + ((k - 20) / 7) ** 2
    labels = np.where(distance < 1, np.where(distance < 0.2, 0, 1), 0).astype(np.uint8)
    segmentation = phantoms.segmentation_of(hippocrop, labels, schema_from_names({1: "shell"}))
    check_filled(written(segmentation, hippocrop, tmp_path), segmentation, hippocrop)


@pytest.mark.parametrize("orientation", [*ORIENTATIONS, "empty"])
def test_the_validator_finds_no_error(phantoms: SimpleNamespace, tmp_path: Path, orientation: str) -> None:
    is_empty = orientation == "empty"
    source = phantoms.source_of(phantoms.write_series(tmp_path / "in", "axial" if is_empty else orientation))
    segmentation = phantoms.segmentation_of(source, holed() * (not is_empty))
    path = written(segmentation, source, tmp_path)
    run = subprocess.run([DCIODVFY, path], capture_output=True, text=True, check=False)
    assert run.stderr.split() == ["RTStructureSet"]
    assert run.returncode == 0


def test_links_to_the_source(phantom: Segmentation, source: Source, tmp_path: Path) -> None:
    found = pydicom.dcmread(written(phantom, source, tmp_path))
    slices = [pydicom.dcmread(path) for path in series_of(source).paths]
    for keyword in ("PatientName", "PatientID", "AccessionNumber", "StudyInstanceUID", "StudyDate", "StudyDescription"):
        assert found[keyword].value == slices[0][keyword].value, keyword
    assert found.SeriesInstanceUID != slices[0].SeriesInstanceUID
    [frame] = found.ReferencedFrameOfReferenceSequence
    assert frame.FrameOfReferenceUID == found.FrameOfReferenceUID == slices[0].FrameOfReferenceUID
    [study] = frame.RTReferencedStudySequence
    assert study.ReferencedSOPInstanceUID == found.StudyInstanceUID
    [series] = study.RTReferencedSeriesSequence
    assert series.SeriesInstanceUID == slices[0].SeriesInstanceUID
    named = [(item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID) for item in series.ContourImageSequence]
    assert named == [(header.SOPClassUID, header.SOPInstanceUID) for header in slices]
    assert (found.Modality, found.Manufacturer, found.SeriesNumber) == ("RTSTRUCT", "volseg", 2004)
    assert found.SeriesDescription == "Structures by phantom"
    assert "edges between pixels" in found.StructureSetDescription
    assert "keyhole" in found.StructureSetDescription


def test_rois_are_the_schema(phantom: Segmentation, source: Source, tmp_path: Path) -> None:
    found = pydicom.dcmread(written(phantom, source, tmp_path))
    rois = found.StructureSetROISequence
    assert [(x.ROINumber, x.ROIName) for x in rois] == [(1, "Höcker"), (2, "Right half"), (3, "Nowhere")]
    assert {x.ROIGenerationAlgorithm for x in rois} == {"AUTOMATIC"}
    algorithm = rois[0].ROIDerivationAlgorithmIdentificationSequence[0]
    assert (algorithm.AlgorithmName, algorithm.AlgorithmVersion) == ("phantom", "1.2")
    colours = [tuple(int(v) for v in x.ROIDisplayColor) for x in found.ROIContourSequence]
    assert colours == [label.colour for label in phantom.schema.labels]
    observed = found.RTROIObservationsSequence[0]
    assert observed.RTROIIdentificationCodeSequence[0].CodeValue == "4421005"
    assert [x.RTROIInterpretedType for x in found.RTROIObservationsSequence] == ["ORGAN", "", ""]


def test_a_label_that_does_not_occur_has_no_contours(phantom: Segmentation, source: Source, tmp_path: Path) -> None:
    contours = pydicom.dcmread(written(phantom, source, tmp_path)).ROIContourSequence
    assert ["ContourSequence" in item for item in contours] == [True, True, False]


def test_numbers_are_short_and_precise(phantom: Segmentation, source: Source, tmp_path: Path) -> None:
    for roi in pydicom.dcmread(written(phantom, source, tmp_path)).ROIContourSequence:
        for contour in roi.get("ContourSequence", []):
            texts = bytes(contour.get_item("ContourData").value).decode().split("\\")
            assert max(map(len, texts)) <= 16
            assert {len(text.strip().partition(".")[2]) for text in texts} == {4}


def test_decimal_strings() -> None:
    assert decimal_strings(np.array([-123.45678, -0.00001]), step_mm=1e-3) == "-123.4568\\0.0000"
    assert decimal_strings(np.array([0.5]), step_mm=2e-6) == "0.500000"
    with pytest.raises(ExportError, match="does not fit DICOM: at most 16 characters"):
        decimal_strings(np.array([-123456.5]), step_mm=1e-9)


def test_long_contours(phantoms: SimpleNamespace, source: Source, tmp_path: Path) -> None:
    """A value of more than 64 KiB, which files of explicit value representations cannot hold."""
    comb = np.zeros((2000, 8, 2), dtype=np.uint8)
    comb[:, 1, 0] = comb[::2, 2:6, 0] = 1
    series = series_of(source)
    slices = tuple(replace(header, columns=2000, rows=8) for header in series.slices[:2])
    geometry = source.image.geometry.window((0, 0, 0), comb.shape)
    segmentation = replace(phantoms.segmentation_of(source), label_map=comb, geometry=geometry)
    segmentation = replace(segmentation, schema=schema_from_names({1: "comb"}))
    series = replace(series, slices=slices, geometry=geometry)
    path = tmp_path / "x.dcm"
    write_rtstruct(path, segmentation, series)
    verify_rtstruct(path, segmentation, series)
    [contour] = pydicom.dcmread(path).ROIContourSequence[0].ContourSequence
    assert len(contour.get_item("ContourData").value) > 65_536


def test_frames_of_one_file(phantoms: SimpleNamespace, source: Source, tmp_path: Path) -> None:
    """The slices of a multi-frame file share its identifier and are told apart by their frame."""
    series = series_of(source)
    slices = [replace(x, sop_uid=series.slices[0].sop_uid, frame=6 - k) for k, x in enumerate(series.slices)]
    series = replace(series, slices=tuple(slices))
    path = tmp_path / "x.dcm"
    write_rtstruct(path, phantoms.segmentation_of(source), series)
    verify_rtstruct(path, phantoms.segmentation_of(source), series)
    [first, *_] = pydicom.dcmread(path).ROIContourSequence[0].ContourSequence
    assert first.ContourImageSequence[0].ReferencedFrameNumber == 5
    moved = replace(series, slices=tuple(replace(x, frame=x.frame + 1) for x in slices))
    with pytest.raises(ExportError, match="does not name the slices"):
        verify_rtstruct(path, phantoms.segmentation_of(source), moved)


def test_resampled_slices_are_refused(phantom: Segmentation, source: Source, tmp_path: Path) -> None:
    series = replace(series_of(source), slice_positions_k=(0.0, 1.0, 2.0, 3.0, 4.0, 5.5))
    with pytest.raises(ExportError, match="needs the source's own slices"):
        export(phantom, formats=["rtstruct"], out=tmp_path / "out", name="x", source=replace(source, series=series))


@pytest.mark.parametrize(
    "tags",
    [
        dict.fromkeys(("PatientName", "PatientID", "PatientBirthDate", "AccessionNumber", "StudyID", "StudyDate")),
        {"PatientSex": "unsure", "PatientBirthDate": "spring", "StudyDate": "long ago", "StudyTime": "noon"},
        {"SpecificCharacterSet": ["", "ISO 2022 IR 87"], "PatientName": "Yamada^Tarou=山田^太郎=やまだ^たろう"},
        {"SpecificCharacterSet": "ISO_IR 100", "PatientName": "Müller^Jörg", "StudyDescription": "Schädel"},
        {"FrameOfReferenceUID": None, "PositionReferenceIndicator": "XY"},
    ],
    ids=["anonymised", "no such dates", "Japanese", "Latin", "no frame of reference"],
)
def test_sources_as_they_are(phantoms: SimpleNamespace, tmp_path: Path, tags: dict[str, Any]) -> None:
    source = phantoms.source_of(phantoms.write_series(tmp_path / "in", **tags))
    path = written(phantoms.segmentation_of(source), source, tmp_path)
    found, given = pydicom.dcmread(path), pydicom.dcmread(series_of(source).paths[0])
    for keyword in ("PatientName", "PatientBirthDate", "StudyDate", "StudyDescription", "PositionReferenceIndicator"):
        assert str(found.get(keyword) or "") == str(given.get(keyword) or ""), keyword
    assert found.FrameOfReferenceUID


def test_nothing_is_said_about_the_patient(
    phantoms: SimpleNamespace, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    source = phantoms.source_of(phantoms.write_series(tmp_path / "in", PatientName="Erika Muster", StudyID="S" * 40))
    with caplog.at_level(logging.DEBUG):
        written(phantoms.segmentation_of(source), source, tmp_path / "out")
    assert capfd.readouterr() == ("", "")
    assert not [record for record in caplog.records if record.name.startswith("pydicom")]


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (Label(id=3, name="n" * 65, colour=(1, 2, 3)), "the name of label 3.*at most 64 characters"),
        (Label(id=3, name="a\\b", colour=(1, 2, 3)), "no backslash"),
        (Label(id=3, name="a", colour=(1, 2, 3), code=CodedConcept(value="1" * 17, meaning="m")), "the code value"),
    ],
)
def test_labels_that_do_not_fit_dicom(
    phantoms: SimpleNamespace, source: Source, tmp_path: Path, label: Label, message: str
) -> None:
    labels = (phantoms.label_map() == 3).astype(np.uint8) * 3
    with pytest.raises(ExportError, match=message):
        written(phantoms.segmentation_of(source, labels, LabelSchema(labels=(label,))), source, tmp_path)


Tamper = Callable[[Dataset, Source], None]


def change_points(dataset: Dataset, change: Callable[[np.ndarray], np.ndarray]) -> None:
    for roi in dataset.ROIContourSequence:
        for contour in roi.get("ContourSequence", []):
            points = change(np.array(contour.ContourData, dtype=float).reshape(-1, 3))
            contour.ContourData = [f"{x:.4f}" for x in points.ravel()]
            contour.NumberOfContourPoints = len(points)


def through_indices(source: Source, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    """A change of points in mm that is `change` of their indices on the source's grid."""
    affine = source.image.geometry.affine_lps

    def changed(points_mm: np.ndarray) -> np.ndarray:
        indices = np.linalg.solve(affine[:3, :3], (points_mm - affine[:3, 3]).T).T
        return change(indices) @ affine[:3, :3].T + affine[:3, 3]

    return changed


def mirror_x(dataset: Dataset, source: Source) -> None:
    change_points(dataset, lambda points: points * (-1, 1, 1))


def mirror_rows(dataset: Dataset, source: Source) -> None:
    change_points(dataset, through_indices(source, lambda ijk: ijk * (-1, 1, 1) + (10, 0, 0)))


def exchange_rows_and_columns(dataset: Dataset, source: Source) -> None:
    change_points(dataset, through_indices(source, lambda ijk: ijk[:, [1, 0, 2]]))


def exchange_spacings(dataset: Dataset, source: Source) -> None:
    change_points(dataset, through_indices(source, lambda ijk: ijk * (2.0 / 0.7, 0.7 / 2.0, 1)))


def shift_by_half_a_pixel(dataset: Dataset, source: Source) -> None:
    change_points(dataset, through_indices(source, lambda ijk: np.add(ijk, (0.5, 0, 0))))


def shift_by_a_tenth_of_a_pixel(dataset: Dataset, source: Source) -> None:
    change_points(dataset, through_indices(source, lambda ijk: np.add(ijk, (0, 0.1, 0))))


def shift_by_a_pixel(dataset: Dataset, source: Source) -> None:
    change_points(dataset, through_indices(source, lambda ijk: np.add(ijk, (1, 0, 0))))


def shift_by_a_slice(dataset: Dataset, source: Source) -> None:
    change_points(dataset, through_indices(source, lambda ijk: np.add(ijk, (0, 0, 1))))


def shift_with_references(dataset: Dataset, source: Source) -> None:
    """By one slice, with references that fit: only the pixels can tell."""
    uids = [header.sop_uid for header in series_of(source).slices]
    for roi in dataset.ROIContourSequence:
        for contour in roi.get("ContourSequence", []):
            image = contour.ContourImageSequence[0]
            image.ReferencedSOPInstanceUID = uids[uids.index(image.ReferencedSOPInstanceUID) - 1]
    change_points(dataset, through_indices(source, lambda ijk: ijk - (0, 0, 1)))


def through_centres(dataset: Dataset, source: Source) -> None:
    """Contours through the centres of border pixels, which lose half a pixel on each side."""

    def shrunk(ijk: np.ndarray) -> np.ndarray:
        middle = ijk.mean(axis=0)
        return ijk + np.sign(middle - ijk) * (0.5, 0.5, 0)

    change_points(dataset, through_indices(source, shrunk))


def drop_holes(dataset: Dataset, source: Source) -> None:
    """Keep the outermost points of each contour only."""

    def box(ijk: np.ndarray) -> np.ndarray:
        (i0, j0, k), (i1, j1, _) = ijk.min(axis=0), ijk.max(axis=0)
        return np.array([[i0, j0, k], [i1, j0, k], [i1, j1, k], [i0, j1, k]])

    change_points(dataset, through_indices(source, box))


def drop_a_contour(dataset: Dataset, source: Source) -> None:
    contours = dataset.ROIContourSequence[1].ContourSequence
    dataset.ROIContourSequence[1].ContourSequence = contours[:-1]


def write_a_contour_twice(dataset: Dataset, source: Source) -> None:
    contours = dataset.ROIContourSequence[1].ContourSequence
    dataset.ROIContourSequence[1].ContourSequence = [*contours, contours[0]]


def cut_to_two_points(dataset: Dataset, source: Source) -> None:
    change_points(dataset, lambda points: points[:2])


def exchange_contours(dataset: Dataset, source: Source) -> None:
    first, second = dataset.ROIContourSequence[:2]
    first.ContourSequence, second.ContourSequence = second.ContourSequence, first.ContourSequence


def exchange_numbers(dataset: Dataset, source: Source) -> None:
    first, second = dataset.StructureSetROISequence[:2]
    first.ROIName, second.ROIName = second.ROIName, first.ROIName


def name_another_slice(dataset: Dataset, source: Source) -> None:
    image = dataset.ROIContourSequence[0].ContourSequence[0].ContourImageSequence[0]
    image.ReferencedSOPInstanceUID = series_of(source).slices[-1].sop_uid


def name_no_slice(dataset: Dataset, source: Source) -> None:
    dataset.ROIContourSequence[0].ContourSequence[0].ContourImageSequence[0].ReferencedSOPInstanceUID = UID("1.2.3")


def recolour(dataset: Dataset, source: Source) -> None:
    dataset.ROIContourSequence[0].ROIDisplayColor = [0, 0, 1]


def recode(dataset: Dataset, source: Source) -> None:
    dataset.RTROIObservationsSequence[0].RTROIIdentificationCodeSequence[0].CodeValue = "1"


def another_patient(dataset: Dataset, source: Source) -> None:
    dataset.PatientID = "ID-4712"


def another_frame_of_reference(dataset: Dataset, source: Source) -> None:
    dataset.FrameOfReferenceUID = UID("1.2.3")


def another_frame_of_an_roi(dataset: Dataset, source: Source) -> None:
    dataset.StructureSetROISequence[0].ReferencedFrameOfReferenceUID = UID("1.2.3")


def leave_out_a_slice(dataset: Dataset, source: Source) -> None:
    study = dataset.ReferencedFrameOfReferenceSequence[0].RTReferencedStudySequence[0]
    del study.RTReferencedSeriesSequence[0].ContourImageSequence[0]


def another_series(dataset: Dataset, source: Source) -> None:
    study = dataset.ReferencedFrameOfReferenceSequence[0].RTReferencedStudySequence[0]
    study.RTReferencedSeriesSequence[0].SeriesInstanceUID = UID("1.2.3")


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (mirror_x, "does not follow the edges|reads back with Dice"),
        (mirror_rows, "reads back with Dice"),
        (exchange_rows_and_columns, "reads back with Dice"),
        (exchange_spacings, "does not follow the edges"),
        (shift_by_half_a_pixel, "does not follow the edges"),
        (shift_by_a_tenth_of_a_pixel, "does not follow the edges"),
        (shift_by_a_pixel, "reads back with Dice"),
        (shift_by_a_slice, "does not follow the edges"),
        (shift_with_references, "reads back with Dice"),
        (through_centres, "does not follow the edges"),
        (drop_holes, "reads back with Dice"),
        (drop_a_contour, "label 'Right half' reads back with Dice"),
        (write_a_contour_twice, "label 'Right half' reads back with Dice"),
        (cut_to_two_points, "no closed polygon"),
        (exchange_contours, "reads back with Dice"),
        (exchange_numbers, "its ROIs are not the schema's labels in order"),
        (name_another_slice, "does not follow the edges"),
        (name_no_slice, "names a slice that is not the source's"),
        (recolour, "ROI 1 has another code or colour"),
        (recode, "ROI 1 has another code or colour"),
        (another_patient, "its PatientID is not the source's"),
        (another_frame_of_reference, "its FrameOfReferenceUID is not the source's"),
        (another_frame_of_an_roi, "another frame of reference"),
        (leave_out_a_slice, "does not name the slices of the source series in order"),
        (another_series, "does not refer to the source series"),
    ],
)
def test_tampering_is_seen(
    phantoms: SimpleNamespace, source: Source, tmp_path: Path, tamper: Tamper, message: str
) -> None:
    segmentation, path = phantoms.segmentation_of(source, holed()), tmp_path / "x.dcm"
    write_rtstruct(path, segmentation, series_of(source))
    verify_rtstruct(path, segmentation, series_of(source))
    dataset = pydicom.dcmread(path)
    tamper(dataset, source)
    dataset.save_as(path)
    with pytest.raises(ExportError, match=message) as caught:
        verify_rtstruct(path, segmentation, series_of(source))
    for secret in ("Muster", "4711", "4712"):
        assert secret not in str(caught.value)
