"""SEG objects before others' eyes: dciodvfy validates them, dcmqi and highdicom read the same voxels at one place.

All are Python packages, so this runs with the other tests.
"""

from __future__ import annotations

import json
import subprocess
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk

from pipeline.errors import ExportError
from pipeline.export import Source, export
from pipeline.export.verify_seg import verify_seg
from pipeline.segmentation import Algorithm, Segmentation
from tests.pipeline.export.highdicom_reader import read_by_highdicom
from transforms.dicom import index_series, read_series, read_voxels
from transforms.labels import schema_from_names
from transforms.volume import Volume

ODD = Path(__file__).parents[2] / "data" / "dicom_odd"
SCRIPTS = Path(sysconfig.get_path("scripts"))
KINDS = ["seg", "labelmap"]
RECOGNISED = ("Segmentation", "LabelMapSegmentation")


def written(segmentation: Segmentation, source: Source, folder: Path, kind: str) -> Path:
    [file] = export(segmentation, formats=[kind], out=folder, name="x", source=source)
    return file.path


def complaints(path: Path) -> list[str]:
    """dciodvfy's errors and warnings. It names the kind of object that it has recognised, so silence is none."""
    run = subprocess.run([SCRIPTS / "dciodvfy", path], capture_output=True, text=True, check=False)
    lines = (run.stdout + run.stderr).splitlines()
    assert sum(line in RECOGNISED for line in lines) == 1, lines
    return [line for line in lines if line not in RECOGNISED]


def on_grid(points_lps_mm: np.ndarray, values: np.ndarray, segmentation: Segmentation) -> np.ndarray:
    """A label map from the places of voxels; each must be a centre of the grid."""
    affine = segmentation.geometry.affine_lps
    indices = np.linalg.solve(affine[:3, :3], (points_lps_mm - affine[:3, 3]).T)
    assert np.abs(indices - np.rint(indices)).max(initial=0) < 0.01
    found = np.zeros_like(segmentation.label_map)
    found[tuple(np.rint(indices).astype(int))] = values
    return found


def read_by_dcmqi(path: Path, folder: Path, segmentation: Segmentation) -> np.ndarray:
    """BINARY becomes a file a segment, LABELMAP one file; segments are known by their names."""
    folder.mkdir()
    command = [SCRIPTS / "segimage2itkimage", "--inputDICOM", path, "--outputDirectory", folder, "-t", "nrrd"]
    subprocess.run(command, capture_output=True, check=True)
    ids = {label.name: label.id for label in segmentation.schema.labels}
    found = np.zeros_like(segmentation.label_map)
    groups = json.loads((folder / "meta.json").read_text(encoding="utf-8"))["segmentAttributes"]
    files = sorted(folder.glob("*.nrrd"), key=lambda file: int(file.stem))
    assert sum(len(group) for group in groups) == len(ids)
    for group, file in zip(groups, files, strict=True):
        names = {segment["labelID"]: segment["SegmentLabel"] for segment in group}
        image = sitk.ReadImage(file)
        voxels = sitk.GetArrayFromImage(image).T
        indices = np.argwhere(voxels)
        direction = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
        values = [ids[names[int(number)]] for number in voxels[tuple(indices.T)]]
        found += on_grid(indices @ direction.T + image.GetOrigin(), np.array(values, dtype=found.dtype), segmentation)
    return found


def check(segmentation: Segmentation, source: Source, folder: Path, kind: str) -> None:
    path = written(segmentation, source, folder, kind)
    assert complaints(path) == []
    assert np.array_equal(read_by_dcmqi(path, folder / "dcmqi", segmentation), segmentation.label_map)
    assert np.array_equal(read_by_highdicom(path, segmentation), segmentation.label_map)


@pytest.mark.parametrize("orientation", ["axial", "coronal", "sagittal", "upside down", "oblique"])
@pytest.mark.parametrize("kind", KINDS)
def test_orientations(phantoms: SimpleNamespace, tmp_path: Path, orientation: str, kind: str) -> None:
    source = phantoms.source_of(phantoms.write_series(tmp_path / "in", orientation))
    check(phantoms.segmentation_of(source), source, tmp_path / "out", kind)


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_result(phantoms: SimpleNamespace, source: Source, tmp_path: Path, kind: str) -> None:
    labels = np.zeros(source.image.geometry.shape, dtype=np.uint8)
    check(phantoms.segmentation_of(source, labels), source, tmp_path / "out", kind)


@pytest.mark.parametrize("kind", KINDS)
def test_300_labels(phantoms: SimpleNamespace, source: Source, tmp_path: Path, kind: str) -> None:
    """On 462 voxels; ids with gaps, so that they are no segment numbers."""
    labels = np.zeros(source.image.geometry.shape, dtype=np.uint16)
    labels.ravel()[50:350] = np.arange(3, 1200, 4)
    schema = schema_from_names({int(n): f"label {n}" for n in np.arange(3, 1200, 4)})
    check(phantoms.segmentation_of(source, labels, schema), source, tmp_path / "out", kind)


@pytest.mark.parametrize("kind", KINDS)
def test_no_frame_of_reference(phantoms: SimpleNamespace, tmp_path: Path, kind: str) -> None:
    source = phantoms.source_of(phantoms.write_series(tmp_path / "in", "oblique", FrameOfReferenceUID=None))
    check(phantoms.segmentation_of(source), source, tmp_path / "out", kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_real_series(hippocrop: Source, phantoms: SimpleNamespace, tmp_path: Path, kind: str) -> None:
    i, j, k = np.indices(hippocrop.image.geometry.shape)
    ellipsoid = ((i - 16) / 6) ** 2 + ((j - 25) / 17) ** 2 + ((k - 20) / 5) ** 2 < 1
    labels = np.where(ellipsoid, np.where(j > 25, 2, 1), 0).astype(np.uint8)
    segmentation = phantoms.segmentation_of(hippocrop, labels, schema_from_names({1: "Anterior", 2: "Posterior"}))
    check(segmentation, hippocrop, tmp_path / "out", kind)


def lopsided(source: Source) -> Segmentation:
    """Two labels of an ellipsoid beside the middle of any grid."""
    shape = np.array(source.image.geometry.shape)
    places = np.moveaxis(np.indices(tuple(shape)), 0, -1) / shape
    inside = (((places - (0.4, 0.6, 0.4)) / (0.2, 0.3, 0.35)) ** 2).sum(axis=-1) < 1
    labels = np.where(inside, np.where(places[..., 0] > 0.45, 2, 1), 0).astype(np.uint8)
    schema = schema_from_names({1: "left half", 2: "right half"})
    return Segmentation(labels, source.image.geometry, schema, Algorithm("ellipsoid", "1"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("folder", "first_frames"), [("enhanced_fmri", [2, 6, 10]), ("enhanced_hyperfine", [1, 2, 3])])
def test_frames_of_a_real_multi_frame_file(tmp_path: Path, folder: str, first_frames: list[int], kind: str) -> None:
    """The second of four volumes in one file, whose frames alternate; and a file of one volume."""
    volumes = index_series(ODD / folder)
    series = volumes[1] if len(volumes) > 1 else volumes[0]
    assert series.geometry is not None
    source = Source(Volume(read_voxels(series), series.geometry, "MR", 0.0), series)
    segmentation = lopsided(source)
    path = written(segmentation, source, tmp_path, kind)
    assert [line for line in complaints(path) if line.startswith("Error")] == []
    assert np.array_equal(read_by_dcmqi(path, tmp_path / "dcmqi", segmentation), segmentation.label_map)
    assert np.array_equal(read_by_highdicom(path, segmentation), segmentation.label_map)
    found = pydicom.dcmread(path)
    [instance] = found.ReferencedSeriesSequence[0].ReferencedInstanceSequence
    assert instance.ReferencedSOPInstanceUID == series.slices[0].sop_uid
    assert instance.ReferencedSOPClassUID == "1.2.840.10008.5.1.4.1.1.4.1"
    assert [header.frame for header in series.slices[:3]] == first_frames
    places = {header.frame: header.plane.position_lps_mm for header in series.slices if header.plane}
    for groups in found.PerFrameFunctionalGroupsSequence:
        [image] = groups.DerivationImageSequence[0].SourceImageSequence
        assert image.ReferencedSOPInstanceUID == instance.ReferencedSOPInstanceUID
        place = groups.PlanePositionSequence[0].ImagePositionPatient
        assert list(place) == pytest.approx(places[image.ReferencedFrameNumber], abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_another_frame_is_seen(tmp_path: Path, kind: str) -> None:
    """The frame before is of another volume at the same place."""
    series = index_series(ODD / "enhanced_fmri")[1]
    assert series.geometry is not None
    source = Source(Volume(read_voxels(series), series.geometry, "MR", 0.0), series)
    segmentation = lopsided(source)
    path = written(segmentation, source, tmp_path, kind)
    dataset = pydicom.dcmread(path)
    image = dataset.PerFrameFunctionalGroupsSequence[0].DerivationImageSequence[0].SourceImageSequence[0]
    image.ReferencedFrameNumber -= 1
    dataset.save_as(path)
    with pytest.raises(ExportError, match="does not refer to the source slice"):
        verify_seg(path, segmentation, series)


@pytest.mark.parametrize("kind", KINDS)
def test_a_real_series_with_oblong_pixels(tmp_path: Path, kind: str) -> None:
    voxels, geometry, series = read_series(ODD / "not_square")
    source = Source(Volume(voxels, geometry, "MR", 0.0), series)
    segmentation = lopsided(source)
    path = written(segmentation, source, tmp_path, kind)
    assert [line for line in complaints(path) if line.startswith("Error")] == []
    assert np.array_equal(read_by_dcmqi(path, tmp_path / "dcmqi", segmentation), segmentation.label_map)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("folder", ["tilt", "tilt_uneven"])
def test_a_real_series_with_a_tilted_gantry(tmp_path: Path, folder: str, kind: str) -> None:
    """Readers of volumes cannot place it; viewers go by the source's slices, which the export itself has checked."""
    voxels, geometry, series = read_series(ODD / "stacks" / folder, resample_uneven=True)
    assert (series.slice_positions_k is not None) == (folder == "tilt_uneven")
    source = Source(Volume(voxels, geometry, "CT", -1024.0), series)
    path = written(lopsided(source), source, tmp_path, kind)
    assert [line for line in complaints(path) if line.startswith("Error")] == []


@pytest.mark.parametrize("kind", KINDS)
def test_the_validator_sees_faults(phantom: Segmentation, source: Source, tmp_path: Path, kind: str) -> None:
    path = written(phantom, source, tmp_path / "out", kind)
    dataset = pydicom.dcmread(path)
    del dataset.SegmentSequence[0].SegmentLabel
    dataset.save_as(path)
    assert any(line.startswith("Error") for line in complaints(path))
