"""SEG objects before others' eyes: dciodvfy validates them, dcmqi and highdicom read the same voxels at one place.

All are Python packages, so this runs with the other tests.
"""

from __future__ import annotations

import json
import subprocess
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import highdicom as hd
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk

from pipeline.export import Source, export
from pipeline.segmentation import Segmentation
from transforms.labels import schema_from_names

SCRIPTS = Path(sysconfig.get_path("scripts"))
KINDS = ["seg", "labelmap"]


def written(segmentation: Segmentation, source: Source, folder: Path, kind: str) -> Path:
    [file] = export(segmentation, formats=[kind], out=folder, name="x", source=source)
    return file.path


def complaints(path: Path) -> list[str]:
    """dciodvfy's errors and warnings. It names the kind of object that it has recognised, so silence is none."""
    run = subprocess.run([SCRIPTS / "dciodvfy", path], capture_output=True, text=True, check=False)
    kind, *lines = (run.stdout + run.stderr).splitlines()
    assert kind in ("Segmentation", "LabelMapSegmentation"), kind
    return lines


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


def read_by_highdicom(path: Path, segmentation: Segmentation) -> np.ndarray:
    volume = hd.seg.segread(path).get_volume(combine_segments=True, allow_missing_positions=True)
    indices = np.argwhere(volume.array)
    points_lps_mm = indices @ volume.affine[:3, :3].T + volume.affine[:3, 3]
    values = np.array([0, *segmentation.schema.ids])[volume.array[tuple(indices.T)]]
    return on_grid(points_lps_mm, values, segmentation)


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


@pytest.mark.parametrize("kind", KINDS)
def test_the_validator_sees_faults(phantom: Segmentation, source: Source, tmp_path: Path, kind: str) -> None:
    path = written(phantom, source, tmp_path / "out", kind)
    dataset = pydicom.dcmread(path)
    del dataset.SegmentSequence[0].SegmentLabel
    dataset.save_as(path)
    assert any(line.startswith("Error") for line in complaints(path))
