"""DICOM SEG where slices do not lie one straight above the other, or not evenly; and more frames than a file holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pydicom
import pytest
from pydicom import Dataset

from pipeline.errors import ExportError
from pipeline.export import FORMATS, Source, dicom_seg, export
from pipeline.segmentation import Algorithm, Segmentation
from transforms.dicom import read_series
from transforms.labels import schema_from_names
from transforms.volume import Volume


def rewritten(folder: Path, change: Callable[[Dataset, int, np.ndarray], None]) -> Path:
    """Each file of a phantom series changed, given the number of its slice and the step to the next slice in mm."""
    for path in folder.iterdir():
        dataset = pydicom.dcmread(path)
        cosines = np.array(dataset.ImageOrientationPatient, dtype=float)
        change(dataset, 6 - int(dataset.InstanceNumber), 3.5 * np.cross(cosines[:3], cosines[3:]))
        dataset.save_as(path)
    return folder


def put_at(dataset: Dataset, place_mm: np.ndarray) -> None:
    dataset.ImagePositionPatient = [f"{x:.9g}" for x in place_mm]


def tilt(dataset: Dataset, k: int, _: np.ndarray) -> None:
    """As a gantry of 18 degrees: the next slice lies 3.5 mm away, and shifted along the columns."""
    down = np.array(dataset.ImageOrientationPatient[3:], dtype=float)
    put_at(dataset, np.array(dataset.ImagePositionPatient, dtype=float) + 3.5 * np.tan(np.radians(18)) * k * down)


@pytest.mark.parametrize("key", ["seg", "labelmap"])
def test_a_tilted_gantry(phantoms: SimpleNamespace, tmp_path: Path, key: str) -> None:
    """The grid is sheared; each frame lies where the source's slice says."""
    source = phantoms.source_of(rewritten(phantoms.write_series(tmp_path / "in"), tilt))
    _, j_ras, k_ras = source.image.geometry.affine_ras[:3, :3].T
    assert k_ras @ j_ras / np.linalg.norm(j_ras) == pytest.approx(3.5 * np.tan(np.radians(18)), abs=1e-6)
    segmentation = phantoms.segmentation_of(source)
    [file] = export(segmentation, formats=[key], out=tmp_path / "out", name="x", source=source)
    assert file.verification is not None
    assert [label.dice for label in file.verification.labels] == [1.0, 1.0, None]
    found = pydicom.dcmread(file.path)
    assert float(found.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].SpacingBetweenSlices) == 3.5
    by_uid = {header.sop_uid: header.plane for header in source.series.slices}
    for groups in found.PerFrameFunctionalGroupsSequence:
        [image] = groups.DerivationImageSequence[0].SourceImageSequence
        place = groups.PlanePositionSequence[0].ImagePositionPatient
        assert list(place) == pytest.approx(by_uid[image.ReferencedSOPInstanceUID].position_lps_mm, abs=1e-9)


def interpolated(folder: Path) -> Source:
    voxels, geometry, series = read_series(folder, resample_uneven=True)
    return Source(Volume(voxels, geometry, "MR", 0.0), series)


UNEVEN_K = (0.0, 1.0, 2.0, 4.0, 5.0, 6.5)


def spread(dataset: Dataset, k: int, step_mm: np.ndarray) -> None:
    place = np.array(dataset.ImagePositionPatient, dtype=float)
    put_at(dataset, place + (UNEVEN_K[k] - k) * step_mm)


@pytest.mark.parametrize("key", ["seg", "labelmap"])
def test_slices_with_uneven_gaps(phantoms: SimpleNamespace, tmp_path: Path, key: str) -> None:
    """Each source slice has the plane of the label map nearest to it, and lies where it lay."""
    folder = rewritten(phantoms.write_series(tmp_path / "in"), spread)
    source = interpolated(folder)
    geometry, series = source.image.geometry, source.series
    assert series is not None
    assert series.slice_positions_k is not None
    # Each plane has another label, and a place of its own in it.
    schema = schema_from_names({n: f"plane {n}" for n in range(1, geometry.shape[2] + 1)})
    labels = np.zeros(geometry.shape, dtype=np.uint8)
    for k in range(geometry.shape[2]):
        labels[2 : 4 + k % 3, 1:5, k] = k + 1
    segmentation = Segmentation(labels, geometry, schema, Algorithm("phantom", "1"))
    [file] = export(segmentation, formats=[key], out=tmp_path / "out", name="x", source=source)
    found = pydicom.dcmread(file.path)
    assert "SpacingBetweenSlices" not in found.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
    by_uid = {uid: n for n, uid in enumerate(header.sop_uid for header in series.slices)}
    seen = []
    for frame, groups in zip(found.pixel_array, found.PerFrameFunctionalGroupsSequence, strict=True):
        n = by_uid[groups.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID]
        place = np.array(groups.PlanePositionSequence[0].ImagePositionPatient, dtype=float)
        assert place == pytest.approx(series.slices[n].plane.position_lps_mm)
        distances = np.abs(np.arange(geometry.shape[2]) - series.slice_positions_k[n])
        assert np.array_equal(frame.T != 0, labels[:, :, distances.argmin()] != 0)
        seen.append(n)
    assert sorted(seen) == list(range(6))


def test_formats_that_cannot_undo_uneven_gaps_refuse_them(phantoms: SimpleNamespace, tmp_path: Path) -> None:
    folder = rewritten(phantoms.write_series(tmp_path / "in"), spread)
    source = interpolated(folder)
    empty = phantoms.segmentation_of(source, np.zeros(source.image.geometry.shape, dtype=np.uint8))
    for key, form in FORMATS.items():
        if form.needs_dicom and not form.takes_uneven:
            with pytest.raises(ExportError, match=rf"'{key}' needs the source's own slices.*choose seg, labelmap, "):
                export(empty, formats=[key], out=tmp_path / "out", name="x", source=source)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("key", "advice"), [("seg", "6 frames of a BINARY .* export 'labelmap'"), ("labelmap", "'nifti'")]
)
def test_more_pixels_than_dicom_holds(
    phantom: Segmentation, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, advice: str
) -> None:
    """Six frames of 77 pixels are 57 bytes of bits, five of 77 bytes 385."""
    exact = {"seg": 57, "labelmap": 385}[key]
    monkeypatch.setattr(dicom_seg, "MOST_PIXEL_BYTES", exact)
    export(phantom, formats=[key], out=tmp_path, name="x", source=source)
    monkeypatch.setattr(dicom_seg, "MOST_PIXEL_BYTES", exact - 1)
    with pytest.raises(ExportError, match=advice):
        export(phantom, formats=[key], out=tmp_path, name="x", source=source)
