"""The index of a tree: what is set aside, in which order volumes come, and how one of them is chosen."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset

from transforms.dicom_index import choose_series, index_folder, index_series
from transforms.errors import DicomError
from transforms.geometry import Geometry

WriteSeries = Callable[..., Path]
GRID = Geometry.from_lps((6, 5, 4), np.diag([0.8, 1.25, 2.5, 1.0]))
VOXELS = np.arange(120, dtype=np.int16).reshape(GRID.shape)


def named(**values: object) -> Callable[[Dataset, int], None]:
    """Set elements in every slice, and identifiers of instances that no other series has."""

    def edit(dataset: Dataset, k: int) -> None:
        for keyword, value in values.items():
            setattr(dataset, keyword, value)
        dataset.SOPInstanceUID = f"{dataset.SeriesInstanceUID or '1.2.7'}.{k}.{values.get('EchoNumbers', 0)}"

    return edit


def write_directory(path: Path) -> None:
    """A media directory without entries."""
    directory = Dataset()
    directory.file_meta = pydicom.dataset.FileMetaDataset()
    directory.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.1.3.10"
    directory.file_meta.MediaStorageSOPInstanceUID = "1.2.9"
    directory.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    directory.save_as(path, enforce_file_format=True)


def test_what_is_set_aside(write_series: WriteSeries) -> None:
    folder = write_series(GRID, VOXELS, folder="series/deep/deeper")
    root = folder.parents[1]
    (root / "readme.txt").write_text("not an image")
    (folder / "empty").touch()
    (root / "broken link").symlink_to(root / "nowhere")
    (root / "loop").symlink_to(root)
    write_directory(root / "DICOMDIR")
    index = index_folder(root)
    assert [(aside.path.relative_to(root).as_posix(), aside.reason) for aside in index.set_aside] == [
        ("DICOMDIR", "media directory (DICOMDIR)"),
        ("readme.txt", "not DICOM"),
        ("deep/deeper/empty", "empty file"),
    ]
    assert index.file_count == 7
    (series,) = index.series
    assert series.problems == ()


def test_what_is_unfinished_is_no_part_of_a_series(write_series: WriteSeries) -> None:
    folder = write_series(GRID, VOXELS)
    beginning = min(folder.iterdir()).read_bytes()[:300]
    for path in (folder / "IM009", folder / ".writing-12-x" / "IM000", folder / ".writing-12-IM009"):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(beginning)
    assert [finding.name for finding in index_series(folder)[0].problems] == ["damaged-file"]
    (folder / "IM009").unlink()
    index = index_folder(folder)
    assert (index.file_count, index.set_aside, index.series[0].problems) == (4, (), ())


def test_progress_is_told(write_series: WriteSeries) -> None:
    geometry = Geometry.from_lps((2, 2, 150), GRID.affine_lps)
    told: list[tuple[int, int]] = []
    index_folder(
        write_series(geometry, np.zeros(geometry.shape, dtype=np.int16)), progress=lambda *done: told.append(done)
    )
    assert told == [(64, 150), (128, 150), (150, 150)]


@pytest.mark.parametrize("name", ["nowhere", "nowhere/deeper"])
def test_a_folder_that_is_not_there(tmp_path: Path, name: str) -> None:
    with pytest.raises(DicomError, match="no such file or folder"):
        index_folder(tmp_path / name)


def test_the_order_does_not_depend_on_the_salt(write_series: WriteSeries) -> None:
    """By patient, then study, then series: a patient comes where the first of his studies does."""
    parts = [
        ("Ann", "1.3.5", "1.3.5.1", 2),
        ("Bob", "1.3.2", "1.3.2.1", 9),
        ("Ann", "1.3.1", "1.3.1.1", 5),
        ("Bob", "1.3.4", "1.3.4.1", 1),
        ("Ann", "1.3.5", "1.3.5.2", 1),
    ]
    for n, (patient, study, series, number) in enumerate(parts):
        edit = named(PatientID=patient, StudyInstanceUID=study, SeriesInstanceUID=series, SeriesNumber=number)
        folder = write_series(GRID, VOXELS, folder=f"tree/{n}", edit=edit)
    expected = ["1.3.1.1", "1.3.5.2", "1.3.5.1", "1.3.2.1", "1.3.4.1"]
    keys = set()
    for salt in (bytes([n]) * 16 for n in range(8)):
        listed = index_folder(folder.parent, salt=salt).series
        assert [series.series_uid for series in listed] == expected
        assert len({series.patient_key for series in listed}) == 2
        keys |= {series.patient_key for series in listed}
    assert len(keys) == 16
    with pytest.raises(DicomError, match="5 image series of 2 patients, name one by number") as asked:
        choose_series(listed, series=None, folder=folder)
    assert "Ann" not in str(asked.value)
    assert listed[0].patient_key not in str(asked.value)


def test_choosing_a_volume_of_a_series(write_series: WriteSeries) -> None:
    for echo in (1, 2):
        folder = write_series(GRID, VOXELS, folder=f"tree/{echo}", edit=named(EchoNumbers=echo)).parent
    write_series(GRID, VOXELS, folder="tree/other", edit=named(SeriesInstanceUID="1.5", SeriesNumber=9))
    listed = index_series(folder)
    for choice, number in (("1", 0), ("2", 1), ("3", 2), ("1.2#1", 0), ("1.2.2#2", 1), ("1.5", 2), ("1.5#1", 2)):
        assert choose_series(listed, series=choice, folder=folder) is listed[number]
    for choice, message in (
        (None, "3 volumes in 2 image series, name one by number or SeriesInstanceUID#VOLUME: 1: MR 'phantom' echo 1"),
        ("1.2", "2 volumes in 1 image series, name one by number or SeriesInstanceUID#VOLUME: 1: MR"),
        ("1.2#3", "the series has no volume #3, but 2: 1: MR 'phantom' echo 1, 4 slices, 1.2.2; 2: "),
        ("1.", "2 series begin with '1.': "),
        ("1.9#1", "no series has the number or identifier '1.9#1': "),
    ):
        with pytest.raises(DicomError, match=re.escape(message)):
            choose_series(listed, series=choice, folder=folder)


def test_single_slices_are_not_chosen_by_themselves(write_series: WriteSeries) -> None:
    edit = named(SeriesInstanceUID="1.1", SeriesNumber=1, SliceThickness="3")
    folder = write_series(GRID, VOXELS, folder="tree/one", edit=edit, slices=[2]).parent
    assert choose_series(index_series(folder), series=None, folder=folder).slice_count == 1
    write_series(GRID, VOXELS, folder="tree/all")
    listed = index_series(folder)
    assert [series.slice_count for series in listed] == [1, 4]
    assert choose_series(listed, series=None, folder=folder).slice_count == 4
    assert choose_series(listed, series="1", folder=folder).slice_count == 1


def test_doses_are_no_images(write_series: WriteSeries) -> None:
    dose = named(SeriesInstanceUID="1.1", Modality="RTDOSE", SOPClassUID="1.2.840.10008.5.1.4.1.1.481.2")
    folder = write_series(GRID, VOXELS, folder="tree/dose", edit=dose).parent
    write_series(GRID, VOXELS, folder="tree/image")
    assert choose_series(index_series(folder), series=None, folder=folder).modality == "MR"


def test_messages_stay_short(write_series: WriteSeries) -> None:
    """Two hundred volumes of one series are one entry, many series are cut."""
    geometry = Geometry.from_lps((2, 2, 2), GRID.affine_lps)
    voxels = np.zeros(geometry.shape, dtype=np.int16)
    for time in range(1, 61):
        edit = named(TemporalPositionIdentifier=time, EchoNumbers=time)
        folder = write_series(geometry, voxels, folder=f"tree/{time}", edit=edit).parent
    with pytest.raises(DicomError) as asked:
        choose_series(index_series(folder), series=None, folder=folder)
    assert str(asked.value) == (
        f"{folder}: 60 volumes in 1 image series, name one by number or SeriesInstanceUID#VOLUME: "
        "1 to 60: MR 'phantom', 60 volumes from echo 1 to echo 60, 1.2.2"
    )
    for number in range(20):
        write_series(geometry, voxels, folder=f"tree/s{number}", edit=named(SeriesInstanceUID=f"1.5.{number}"))
    with pytest.raises(DicomError, match=r"and 13 more, which `volseg dicom ls` shows$") as asked:
        choose_series(index_series(folder), series=None, folder=folder)
    assert len(str(asked.value)) < 1000


def test_series_without_identifiers_keep_patients_apart(write_series: WriteSeries) -> None:
    """Two slices of each in one folder, and nothing but the patient differs."""
    for patient, slices in (("Ann", (0, 1)), ("Bob", (2, 3))):
        edit = named(PatientID=patient, SeriesInstanceUID="", StudyInstanceUID="")
        folder = write_series(GRID, VOXELS, edit=edit, slices=slices)
        for path in folder.glob("IM*"):
            path.rename(folder / f"{patient}{path.name}")
    listed = index_series(folder)
    assert [series.slice_count for series in listed] == [2, 2]
    assert listed[0].patient_key != listed[1].patient_key
