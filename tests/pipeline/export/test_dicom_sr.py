"""Measurement report: by hand, by dcmqi's reader, by the validator, and tampered with."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pydicom
import pytest
from pydicom import Dataset

from pipeline.errors import ExportError
from pipeline.export import Job, Source, export
from pipeline.export.dicom_seg import write_seg
from pipeline.export.dicom_sr import write_sr
from pipeline.export.measurements import measure
from pipeline.export.verify_sr import verify_sr
from pipeline.segmentation import Segmentation

BIN = Path(sys.executable).parent
ORIENTATIONS = ["axial", "coronal", "sagittal", "upside down", "oblique"]


def job_of(segmentation: Segmentation, source: Source, folder: Path) -> Job:
    assert source.series is not None
    write_seg(folder / "x.seg.dcm", segmentation, source.series)
    return Job(segmentation, source, files={"seg": folder / "x.seg.dcm"})


def report_of(segmentation: Segmentation, source: Source, folder: Path) -> tuple[Path, Job]:
    job = job_of(segmentation, source, folder)
    write_sr(folder / "x.sr.dcm", job)
    return folder / "x.sr.dcm", job


def groups(report: Dataset) -> list[Dataset]:
    [container] = [item for item in report.ContentSequence if item.ConceptNameCodeSequence[0].CodeValue == "126010"]
    return list(container.ContentSequence)


def children(group: Dataset, code: str) -> Iterator[Dataset]:
    return (item for item in group.ContentSequence if item.ConceptNameCodeSequence[0].CodeValue == code)


def numbers(group: Dataset) -> dict[str, float]:
    """Values by the meanings of what is measured, and how it is derived."""
    found = {}
    for item in group.ContentSequence:
        if item.ValueType == "NUM":
            derived = [x.ConceptCodeSequence[0].CodeMeaning for x in item.get("ContentSequence", [])]
            name = " ".join([item.ConceptNameCodeSequence[0].CodeMeaning, *derived])
            found[name] = float(item.MeasuredValueSequence[0].NumericValue)
    return found


def test_numbers_by_hand(phantom: Segmentation, source: Source, tmp_path: Path) -> None:
    path, _ = report_of(phantom, source, tmp_path)
    found = numbers(groups(pydicom.dcmread(path))[0])
    inside = source.image.voxels[phantom.label_map == 200]
    voxel_mm3 = 2.0 * 0.7 * 3.5
    assert found["Volume"] == pytest.approx(17 * voxel_mm3, rel=1e-6)
    assert found["MR signal intensity Mean"] == pytest.approx(inside.mean(dtype=float))
    assert found["MR signal intensity Standard Deviation"] == pytest.approx(inside.std(dtype=float))
    assert (found["MR signal intensity Minimum"], found["MR signal intensity Maximum"]) == (inside.min(), inside.max())
    # The largest piece is 4 x 2 x 2 voxels. Farthest apart are the middles of faces above and below, 3, 1 and 2 steps.
    assert found["Maximum 3D Diameter of a Mesh"] == pytest.approx(np.hypot(np.hypot(2.1, 2.0), 7.0), rel=1e-6)


def test_the_planar_group_shows_where(phantom: Segmentation, source: Source, tmp_path: Path) -> None:
    path, job = report_of(phantom, source, tmp_path)
    found = {g.ContentTemplateSequence[0].TemplateIdentifier: g for g in groups(pydicom.dcmread(path))[:2]}
    assert list(found) == ["1411", "1410"]
    [region] = children(found["1410"], "111030")
    [reference] = region.ContentSequence[0].ReferencedSOPSequence
    # Label 200 is a box of 4 x 2 pixels on slices 1 and 2; the first of the two is taken.
    assert reference.ReferencedSOPInstanceUID == job.series.slices[1].sop_uid
    corners = np.array(region.GraphicData).reshape(-1, 2)
    assert corners.min(axis=0).tolist() == [1, 1]
    assert corners.max(axis=0).tolist() == [5, 3]
    assert corners[0].tolist() == corners[-1].tolist()
    by_name = numbers(found["1410"])
    assert by_name["Long axis"] == pytest.approx(np.hypot(3 * 0.7, 2 * 2.0), rel=1e-6)
    assert by_name["Short axis"] > 0


def test_tracking_is_that_of_the_segments(phantom: Segmentation, source: Source, tmp_path: Path) -> None:
    path, job = report_of(phantom, source, tmp_path)
    segments = pydicom.dcmread(job.files["seg"]).SegmentSequence
    tracked = {segment.TrackingUID: (segment.TrackingID, segment.SegmentNumber) for segment in segments}
    for group in groups(pydicom.dcmread(path)):
        [uid], [name] = children(group, "112040"), children(group, "112039")
        assert tracked[uid.UID][0] == name.TextValue
        for item in children(group, "121191"):
            assert item.ReferencedSOPSequence[0].ReferencedSegmentNumber == tracked[uid.UID][1]


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_every_orientation_is_verified(phantoms: SimpleNamespace, tmp_path: Path, orientation: str) -> None:
    source = phantoms.source_of(phantoms.write_series(tmp_path / "in", orientation))
    files = export(phantoms.segmentation_of(source), formats=["sr"], out=tmp_path / "out", name="x", source=source)
    assert [file.path.name for file in files] == ["x.seg.dcm", "x.sr.dcm"]
    verification = files[1].verification
    assert verification is not None
    assert [label.voxels for label in verification.labels] == [17, 33, 0]


def validate(path: Path) -> str:
    run = subprocess.run([BIN / "dciodvfy", path], capture_output=True, text=True, check=False)
    return "\n".join(line for line in (run.stdout + run.stderr).splitlines() if line.startswith("Error"))


def test_the_validator_finds_no_error(phantom: Segmentation, source: Source, tmp_path: Path) -> None:
    path, _ = report_of(phantom, source, tmp_path)
    assert validate(path) == ""


def test_dcmqi_reads_the_same_figures(phantom: Segmentation, source: Source, tmp_path: Path) -> None:
    path, job = report_of(phantom, source, tmp_path)
    command = [BIN / "tid1500reader", "--inputDICOM", path, "--outputMetadata", tmp_path / "x.json"]
    subprocess.run(command, capture_output=True, check=True)
    read = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))["Measurements"]
    found = {group["TrackingIdentifier"]: group for group in read if "ReferencedSegment" in group}
    # What does not occur has no group: OHIF 3.13 shows nothing of a report with one that holds no region.
    assert list(found) == ["Höcker", "Right half"]
    for label, measures in zip(phantom.schema.labels, measure(phantom, source.image.voxels), strict=True):
        if label.name not in found:
            assert measures.voxels == 0
            continue
        items = found[label.name]["measurementItems"]
        by_name = {
            (x["quantity"]["CodeMeaning"], x.get("derivationModifier", {}).get("CodeMeaning", "")): float(x["value"])
            for x in items
        }
        assert by_name["Volume", ""] == pytest.approx(measures.volume_mm3)
        assert found[label.name]["SourceSeriesForImageSegmentation"] == job.series.series_uid
        if measures.intensity is not None:
            assert by_name["MR signal intensity", "Mean"] == pytest.approx(measures.intensity.mean)
            assert by_name["MR signal intensity", "Standard Deviation"] == pytest.approx(measures.intensity.deviation)


def test_an_empty_result_says_so(phantoms: SimpleNamespace, source: Source, tmp_path: Path) -> None:
    empty = phantoms.segmentation_of(source, np.zeros(source.image.geometry.shape, dtype=np.uint8))
    path, job = report_of(empty, source, tmp_path)
    verify_sr(path, job)
    assert validate(path) == ""
    for group in groups(pydicom.dcmread(path)):
        [presence] = children(group, "705057003")
        assert presence.ConceptCodeSequence[0].CodeMeaning == "Absent"
        assert numbers(group) == {"Volume": 0.0}


@pytest.mark.parametrize(
    ("tags", "unit"),
    [
        ({"Modality": "CT", "SOPClassUID": "1.2.840.10008.5.1.4.1.1.2"}, "[hnsf'U]"),
        ({"Modality": "PT", "SOPClassUID": "1.2.840.10008.5.1.4.1.1.128", "Units": "BQML"}, "Bq/ml"),
        ({"Modality": "PT", "SOPClassUID": "1.2.840.10008.5.1.4.1.1.128", "Units": "GML"}, "g/ml{SUVbw}"),
        ({"Modality": "PT", "SOPClassUID": "1.2.840.10008.5.1.4.1.1.128", "Units": "KEV"}, None),
        ({"Modality": "OT", "SOPClassUID": "1.2.840.10008.5.1.4.1.1.7"}, None),
    ],
)
def test_units_of_intensity(phantoms: SimpleNamespace, tmp_path: Path, tags: dict[str, str], unit: str | None) -> None:
    source = phantoms.source_of(phantoms.write_series(tmp_path / "in", **tags))
    path, job = report_of(phantoms.segmentation_of(source), source, tmp_path)
    verify_sr(path, job)
    units = {
        item.MeasuredValueSequence[0].MeasurementUnitsCodeSequence[0].CodeValue
        for item in groups(pydicom.dcmread(path))[0].ContentSequence
        if item.ValueType == "NUM"
    }
    assert units == {"mm3", "mm"} | ({unit} if unit else set())


def test_a_real_series(hippocrop: Source, phantoms: SimpleNamespace, tmp_path: Path) -> None:
    i, j, k = np.indices(hippocrop.image.geometry.shape)
    ellipsoid = ((i - 16) / 6) ** 2 + ((j - 25) / 17) ** 2 + ((k - 20) / 5) ** 2 < 1
    labels = np.where(ellipsoid, 200, 0).astype(np.uint8)
    path, job = report_of(phantoms.segmentation_of(hippocrop, labels), hippocrop, tmp_path)
    verify_sr(path, job)
    assert validate(path) == ""
    found = numbers(groups(pydicom.dcmread(path))[0])
    assert found["Volume"] == pytest.approx(4 / 3 * np.pi * 6 * 17 * 5, rel=0.03)
    assert found["Maximum 3D Diameter of a Mesh"] == pytest.approx(34, abs=1)


Tamper = Callable[[Dataset], None]


def number(report: Dataset, group: int, name: str) -> Dataset:
    [item] = [
        item
        for item in groups(report)[group].ContentSequence
        if item.ValueType == "NUM" and name in (item.ConceptNameCodeSequence[0].CodeMeaning, *derivations(item))
    ]
    return item.MeasuredValueSequence[0]


def derivations(item: Dataset) -> list[str]:
    return [x.ConceptCodeSequence[0].CodeMeaning for x in item.get("ContentSequence", [])]


def scaled(name: str, factor: float, group: int = 0) -> Tamper:
    def tamper(report: Dataset) -> None:
        measured = number(report, group, name)
        measured.FloatingPointValue = float(measured.NumericValue) * factor
        measured.NumericValue = pydicom.valuerep.DS(measured.FloatingPointValue, auto_format=True)

    return tamper


def two_values(report: Dataset) -> None:
    number(report, 0, "Volume").NumericValue = "1.0"


def another_unit(report: Dataset) -> None:
    number(report, 0, "Volume").MeasurementUnitsCodeSequence[0].CodeValue = "cm3"


def exchange_means_and_maxima(report: Dataset) -> None:
    mean, maximum = number(report, 0, "Mean"), number(report, 0, "Maximum")
    for keyword in ("NumericValue", "FloatingPointValue"):
        a, b = mean[keyword].value, maximum[keyword].value
        mean[keyword].value, maximum[keyword].value = b, a


def exchange_labels(report: Dataset) -> None:
    """The groups of two labels trade everything that names them."""
    first, second = groups(report)[0], groups(report)[2]
    for code, keyword in (("112039", "TextValue"), ("112040", "UID")):
        [a], [b] = children(first, code), children(second, code)
        a[keyword].value, b[keyword].value = b[keyword].value, a[keyword].value


def exchange_segments(report: Dataset) -> None:
    images = [next(children(groups(report)[n], "121191")).ReferencedSOPSequence[0] for n in (0, 2)]
    images[0].ReferencedSegmentNumber, images[1].ReferencedSegmentNumber = 2, 1


def foreign_segmentation(report: Dataset) -> None:
    next(children(groups(report)[0], "121191")).ReferencedSOPSequence[0].ReferencedSOPInstanceUID = "1.2.3"


def foreign_series(report: Dataset) -> None:
    next(children(groups(report)[0], "121232")).UID = "1.2.3"


def foreign_evidence(report: Dataset) -> None:
    study = report.CurrentRequestedProcedureEvidenceSequence[0]
    study.ReferencedSeriesSequence[0].SeriesInstanceUID = "1.2.3"


def another_finding(report: Dataset) -> None:
    next(children(groups(report)[0], "121071")).ConceptCodeSequence[0].CodeValue = "1"


def said_to_be_absent(report: Dataset) -> None:
    next(children(groups(report)[0], "705057003")).ConceptCodeSequence[0].CodeValue = "272519000"


def region(report: Dataset, group: int = 1) -> Dataset:
    return next(children(groups(report)[group], "111030"))


def region_elsewhere(report: Dataset) -> None:
    region(report).GraphicData = [x + 1 for x in region(report).GraphicData]


def mirrored_region(report: Dataset) -> None:
    corners = np.array(region(report).GraphicData).reshape(-1, 2)
    region(report).GraphicData = (corners * (-1, 1) + (11, 0)).ravel().tolist()


def region_on_another_slice(report: Dataset) -> None:
    uids = [
        str(item.ReferencedSOPInstanceUID)
        for item in report.CurrentRequestedProcedureEvidenceSequence[0]
        .ReferencedSeriesSequence[0]
        .ReferencedSOPSequence
    ]
    reference = region(report).ContentSequence[0].ReferencedSOPSequence[0]
    reference.ReferencedSOPInstanceUID = uids[uids.index(reference.ReferencedSOPInstanceUID) - 1]


def another_group(report: Dataset) -> None:
    for item in report.ContentSequence:
        if item.ConceptNameCodeSequence[0].CodeValue == "126010":
            item.ContentSequence.append(item.ContentSequence[0])


def group_of_no_segment(report: Dataset) -> None:
    another_group(report)
    next(children(groups(report)[-1], "112040")).UID = "1.2.3"


def no_planar_group(report: Dataset) -> None:
    for item in report.ContentSequence:
        if item.ConceptNameCodeSequence[0].CodeValue == "126010":
            del item.ContentSequence[1]


def another_patient(report: Dataset) -> None:
    report.PatientID = "ID-4712"


@pytest.fixture(scope="module")
def untouched(phantoms: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Job]:
    folder = tmp_path_factory.mktemp("report")
    source = phantoms.source_of(phantoms.write_series(folder / "in", "oblique"))
    path, job = report_of(phantoms.segmentation_of(source), source, folder)
    verify_sr(path, job)
    return path, job


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (scaled("Volume", 1.0001), "label 'Höcker' is reported with .* where 83.3 is measured"),
        (scaled("Mean", 1.001), "is reported with"),
        (scaled("Standard Deviation", 1.01), "is reported with"),
        (scaled("Maximum 3D Diameter of a Mesh", 1.01), "a longest diameter of"),
        (scaled("Long axis", 1.01, group=1), "a long axis of"),
        (scaled("Short axis", 0.99, group=1), "a short axis of"),
        (two_values, "given in two ways"),
        (another_unit, "other measurements or units"),
        (exchange_means_and_maxima, "is reported with"),
        (exchange_labels, "groups|another tracking identifier"),
        (exchange_segments, "a reference to another segment"),
        (foreign_segmentation, "a reference to another segment"),
        (foreign_series, "a reference to another series"),
        (foreign_evidence, "its evidence is not"),
        (another_finding, "another tracking identifier, finding or category"),
        (said_to_be_absent, "the wrong presence"),
        (region_elsewhere, "an outline that is not its own"),
        (mirrored_region, "an outline that is not its own"),
        (region_on_another_slice, "an outline that is not its own"),
        (another_group, "groups"),
        (group_of_no_segment, "groups|what is no segment"),
        (no_planar_group, "groups"),
        (another_patient, "its PatientID is not the source's"),
    ],
)
def test_tampering_is_seen(untouched: tuple[Path, Job], tmp_path: Path, tamper: Tamper, message: str) -> None:
    path, job = untouched
    report = pydicom.dcmread(path)
    tamper(report)
    report.save_as(tmp_path / "tampered.dcm")
    with pytest.raises(ExportError, match=message) as caught:
        verify_sr(tmp_path / "tampered.dcm", job)
    for secret in ("Muster", "4711", "4712"):
        assert secret not in str(caught.value)


def test_frames_of_one_file(phantoms: SimpleNamespace, data_dir: Path, tmp_path: Path) -> None:
    source = phantoms.source_of(data_dir / "dicom_odd" / "enhanced_hyperfine")
    labels = np.zeros(source.image.geometry.shape, dtype=np.uint8)
    labels[40:60, 50:75, 2:5] = 3
    path, job = report_of(phantoms.segmentation_of(source, labels), source, tmp_path)
    verify_sr(path, job)
    assert validate(path) == ""
    report = pydicom.dcmread(path)
    [reference] = region(report).ContentSequence[0].ReferencedSOPSequence
    assert reference.ReferencedFrameNumber == job.series.slices[2].frame
    assert (
        len(report.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence[0].ReferencedSOPSequence) == 1
    )
    reference.ReferencedFrameNumber += 3
    report.save_as(path)
    with pytest.raises(ExportError, match="an outline"):
        verify_sr(path, job)
