"""Manifests from folders: every layout with the same three cases, and identities that must not come through."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid

from pipeline.errors import ManifestError
from pipeline.manifest import Channel, Dataset, load_dataset, save_manifest
from pipeline.manifest_build import PatientRule, build_manifest, find_label_ids, read_patient_table

IDS = ("hippocampus_001", "hippocampus_015", "hippocampus_035")
NAMES = {1: "Anterior", 2: "Posterior"}
ONE = [Channel(name="T1", modality="MR")]
TWO = [Channel(name="T1", modality="MR"), Channel(name="FLAIR", modality="MR")]


@pytest.fixture
def bundled(data_dir: Path) -> Path:
    return data_dir / "hippocampus"


def link(bundled: Path, folder: Path, images: str, labels: str = "labels/{case}.nii.gz", channel: str = "") -> None:
    """Link three cases under names made of {case} and {channel}."""
    for case in IDS:
        for kind, pattern in (("images", images), ("labels", labels)):
            path = folder / pattern.format(case=case, channel=channel)
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                path.symlink_to(bundled / kind / f"{case}.nii.gz")


def build(folder: Path, channels: list[Channel], patients: PatientRule | None = None) -> Dataset:
    return build_manifest(
        folder / "images",
        folder / "labels",
        name="x",
        channels=channels,
        label_names=NAMES,
        patients=patients,
    )


def dicom_file(path: Path, patient_id: str, name: str = "", removed: str = "") -> None:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = MRImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    header = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    header.SOPClassUID, header.SOPInstanceUID = MRImageStorage, meta.MediaStorageSOPInstanceUID
    header.PatientID, header.PatientName = patient_id, name
    if removed:
        header.PatientIdentityRemoved = removed
    path.parent.mkdir(parents=True, exist_ok=True)
    header.save_as(path, enforce_file_format=True)


def dicom_manifest(folder: Path, channels: list[Channel] = ONE, salt: str | None = None) -> Dataset:
    return build_manifest(folder, None, name="x", channels=channels, label_names=NAMES, patients=PatientRule(salt=salt))


@pytest.mark.parametrize(
    "images",
    [
        "images/{case}.nii.gz",
        "images/{case}_0000.nii.gz",
        "images/{case}_T1.nii.gz",
        "images/{case}-t1.nii.gz",
        "images/T1/{case}.nii.gz",
        "images/{case}/volume.nii.gz",
    ],
)
@pytest.mark.parametrize("labels", ["labels/{case}.nii.gz", "labels/{case}_seg.nii.gz"])
def test_one_channel(tmp_path: Path, bundled: Path, images: str, labels: str) -> None:
    link(bundled, tmp_path, images, labels)
    dataset = build(tmp_path, ONE)
    assert dataset.root == tmp_path.resolve()
    assert [case.case_id for case in dataset.manifest.cases] == list(IDS)
    assert [case.patient_id for case in dataset.manifest.cases] == list(IDS)
    assert [case.images["T1"] for case in dataset.manifest.cases] == [images.format(case=i) for i in IDS]
    assert [case.label for case in dataset.manifest.cases] == [labels.format(case=i) for i in IDS]


@pytest.mark.parametrize(
    ("images", "endings"),
    [
        ("images/{case}_{channel}.nii.gz", ("0000", "0001")),
        ("images/{case}_{channel}.nii.gz", ("T1", "flair")),
        ("images/{channel}/{case}.nii.gz", ("T1", "FLAIR")),
        ("images/{case}/{channel}.nii.gz", ("t1", "flair")),
        ("images/{case}/{case}_{channel}.nii.gz", ("t1", "flair")),
    ],
)
def test_two_channels(tmp_path: Path, bundled: Path, images: str, endings: tuple[str, str]) -> None:
    for ending in endings:
        link(bundled, tmp_path, images, channel=ending)
    cases = build(tmp_path, TWO).manifest.cases
    assert [case.case_id for case in cases] == list(IDS)
    for name, ending in zip(("T1", "FLAIR"), endings, strict=True):
        assert [c.images[name] for c in cases] == [images.format(case=i, channel=ending) for i in IDS]


def test_numbers_of_cases_are_not_channels(tmp_path: Path, bundled: Path) -> None:
    for number, case in enumerate(IDS):
        for kind in ("images", "labels"):
            (tmp_path / kind).mkdir(exist_ok=True)
            (tmp_path / kind / f"mr_{number:04d}.nii.gz").symlink_to(bundled / kind / f"{case}.nii.gz")
    assert [c.case_id for c in build(tmp_path, ONE).manifest.cases] == ["mr_0000", "mr_0001", "mr_0002"]


def test_what_is_built_can_be_saved_and_loaded(tmp_path: Path, bundled: Path) -> None:
    link(bundled, tmp_path, "images/{case}.nii.gz")
    dataset = build(tmp_path, ONE)
    save_manifest(dataset, tmp_path / "manifests" / "x.json")
    again = load_dataset(tmp_path / "manifests" / "x.json")
    assert (again.root, again.manifest.cases) == (dataset.root, dataset.manifest.cases)


def test_label_ids_are_read_when_no_name_is_given(tmp_path: Path, bundled: Path) -> None:
    link(bundled, tmp_path, "images/{case}.nii.gz")
    calls: list[tuple[int, int]] = []
    assert find_label_ids(tmp_path / "labels", lambda done, total: calls.append((done, total))) == [1, 2]
    assert calls == [(1, 3), (2, 3), (3, 3)]
    dataset = build_manifest(tmp_path / "images", tmp_path / "labels", name="x", channels=ONE)
    assert dataset.manifest.labels.names == ("label_1", "label_2")


def test_everything_without_a_partner_is_told_at_once(tmp_path: Path, bundled: Path) -> None:
    link(bundled, tmp_path, "images/{case}.nii.gz")
    (tmp_path / "labels/hippocampus_001.nii.gz").rename(tmp_path / "labels/other.nii.gz")
    (tmp_path / "labels/hippocampus_015.nii.gz").rename(tmp_path / "labels/another.nii.gz")
    (tmp_path / "labels/hippocampus_035_seg.nii.gz").symlink_to(bundled / "labels/hippocampus_035.nii.gz")
    with pytest.raises(ManifestError) as caught:
        build(tmp_path, ONE)
    told = str(caught.value)
    assert "1 labels that are a second one: hippocampus_035_seg.nii.gz" in told
    assert "2 labels without an image: another.nii.gz, other.nii.gz" in told
    assert "2 images without a label: hippocampus_001, hippocampus_015" in told


def test_a_missing_channel_is_told(tmp_path: Path, bundled: Path) -> None:
    link(bundled, tmp_path, "images/{case}_{channel}.nii.gz", channel="T1")
    link(bundled, tmp_path, "images/{case}_{channel}.nii.gz", channel="FLAIR")
    (tmp_path / "images/hippocampus_015_FLAIR.nii.gz").unlink()
    (tmp_path / "images/stranger.nii.gz").symlink_to(bundled / "images/hippocampus_001.nii.gz")
    with pytest.raises(ManifestError) as caught:
        build(tmp_path, TWO)
    assert "1 without all of their channels: hippocampus_015" in str(caught.value)
    assert "1 without a channel's name or number: stranger.nii.gz" in str(caught.value)


def test_two_files_of_one_name_are_told(tmp_path: Path, bundled: Path) -> None:
    link(bundled, tmp_path, "images/{case}_0000.nii.gz")
    (tmp_path / "images/hippocampus_001_0000.nii").touch()
    with pytest.raises(ManifestError, match="1 names that stand for two volumes: hippocampus_001_0000"):
        build(tmp_path, ONE)


def test_empty_and_missing_folders(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images/notes.txt").touch()
    with pytest.raises(ManifestError, match=r"no volume here"):
        build_manifest(tmp_path / "images", None, name="x", channels=ONE, label_names=NAMES)
    with pytest.raises(ManifestError, match=r"no such folder"):
        build_manifest(tmp_path / "none", None, name="x", channels=ONE, label_names=NAMES)


def test_without_labels_it_is_for_prediction(tmp_path: Path, bundled: Path) -> None:
    link(bundled, tmp_path, "images/{case}.nii.gz")
    dataset = build_manifest(tmp_path / "images", None, name="x", channels=ONE)
    assert {case.label for case in dataset.manifest.cases} == {None}
    assert dataset.manifest.labels.names == ("label_1",)
    save_manifest(dataset, tmp_path / "x.json")
    assert load_dataset(tmp_path / "x.json").manifest.cases == dataset.manifest.cases


def test_label_maps_of_background_need_names(tmp_path: Path, bundled: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.nii.gz").symlink_to(bundled / "images/hippocampus_001.nii.gz")
    label: Any = nib.load(bundled / "labels/hippocampus_001.nii.gz")  # type: ignore[attr-defined]
    (tmp_path / "labels").mkdir()
    empty = nib.Nifti1Image(np.zeros(label.shape, np.uint8), label.affine)  # type: ignore[attr-defined]
    nib.save(empty, tmp_path / "labels" / "a.nii.gz")  # type: ignore[attr-defined]
    with pytest.raises(ManifestError, match="name them, as --label 1:liver, or give their folder with --labels"):
        build_manifest(tmp_path / "images", tmp_path / "labels", name="x", channels=ONE)
    assert build(tmp_path, ONE).manifest.labels.names == ("Anterior", "Posterior")


@pytest.mark.parametrize("label_id", [0, -1, 65536])
def test_ids_that_no_label_can_have(tmp_path: Path, bundled: Path, label_id: int) -> None:
    link(bundled, tmp_path, "images/{case}.nii.gz")
    told = rf"label {label_id} \(A\): a label's id is a whole number from 1 to 65535"
    with pytest.raises(ManifestError, match=told):
        build_manifest(
            tmp_path / "images", tmp_path / "labels", name="x", channels=ONE, label_names={1: "B", label_id: "A"}
        )


@pytest.mark.parametrize(("images", "labels"), [("images", "labels"), ("imagesTr", "labelsTr")])
@pytest.mark.parametrize("with_labels", [True, False])
def test_a_folder_of_images_and_labels_is_refused(
    tmp_path: Path, bundled: Path, images: str, labels: str, with_labels: bool
) -> None:
    link(bundled, tmp_path, images + "/{case}.nii.gz", labels + "/{case}.nii.gz")
    with pytest.raises(ManifestError) as caught:
        build_manifest(tmp_path, tmp_path / labels if with_labels else None, name="x", channels=ONE)
    assert str(caught.value).endswith(f"did you mean {tmp_path / images} --labels {tmp_path / labels}?")


def test_a_channel_may_be_called_images(tmp_path: Path, bundled: Path) -> None:
    link(bundled, tmp_path, "images/{case}.nii.gz")
    dataset = build_manifest(tmp_path, tmp_path / "labels", name="x", channels=[Channel(name="images", modality="MR")])
    assert [case.images["images"] for case in dataset.manifest.cases] == [f"images/{case}.nii.gz" for case in IDS]


def test_a_folder_without_label_maps_is_named(tmp_path: Path, bundled: Path) -> None:
    link(bundled, tmp_path, "images/{case}.nii.gz")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ManifestError) as caught:
        build_manifest(tmp_path / "images", tmp_path / "empty", name="x", channels=ONE, label_names=NAMES)
    assert str(caught.value).startswith(f"{tmp_path / 'empty'}: no label map here")


def test_a_file_is_no_folder(tmp_path: Path, bundled: Path) -> None:
    link(bundled, tmp_path, "images/{case}.nii.gz")
    (tmp_path / "file").touch()
    for images, labels in ((tmp_path / "file", None), (tmp_path / "images", tmp_path / "file")):
        with pytest.raises(ManifestError) as caught:
            build_manifest(images, labels, name="x", channels=ONE)
        assert str(caught.value) == f"{tmp_path / 'file'}: is a file; expected a folder"


def test_one_series_is_not_a_folder_of_cases(data_dir: Path) -> None:
    with pytest.raises(ManifestError, match="this is one DICOM series; give the folder above it"):
        dicom_manifest(data_dir / "dicom_hippocrop")


def test_patients_by_a_pattern(tmp_path: Path, bundled: Path) -> None:
    link(bundled, tmp_path, "images/{case}.nii.gz")
    cases = build(tmp_path, ONE, PatientRule(pattern=r"hippocampus_(0.)")).manifest.cases
    assert [case.patient_id for case in cases] == ["00", "01", "03"]
    for pattern, told in (
        (r"hippocampus_(00)", "2 cases without a patient by the given rule: hippocampus_015, hippocampus_035"),
        (r"hippocampus_00", "needs a group in round brackets"),
        (r"(", "is no regular expression"),
    ):
        with pytest.raises(ManifestError, match="patient") as caught:
            build(tmp_path, ONE, PatientRule(pattern=pattern))
        assert told in str(caught.value)


def test_patients_by_a_table(tmp_path: Path, bundled: Path) -> None:
    link(bundled, tmp_path, "images/{case}.nii.gz")
    csv = tmp_path / "patients.csv"
    csv.write_text("side,case_id,patient_id\n" + "".join(f"L,{i},p\n" for i in IDS), encoding="utf-8-sig")
    table = read_patient_table(csv)
    assert [c.patient_id for c in build(tmp_path, ONE, PatientRule(table=table)).manifest.cases] == ["p"] * 3
    del table["hippocampus_015"]
    with pytest.raises(ManifestError, match="1 cases without a patient by the given rule: hippocampus_015"):
        build(tmp_path, ONE, PatientRule(table=table))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("case,patient\na,b\n", "p.csv: expected the columns case_id,patient_id; found case,patient"),
        ("case_id;patient_id\n", "expected the columns case_id,patient_id; found case_id;patient_id"),
        ("", "expected the columns case_id,patient_id; found an empty file"),
        ("case_id,patient_id\na,p\na,q\n", "line 3 gives case 'a' a second patient"),
        ("case_id,patient_id\na,\n", "line 2 has no case_id or no patient_id"),
    ],
)
def test_tables_that_do_not_tell(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "p.csv").write_text(text, encoding="utf-8")
    with pytest.raises(ManifestError) as caught:
        read_patient_table(tmp_path / "p.csv")
    assert told in str(caught.value)


def test_a_table_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"p\.csv: no such file"):
        read_patient_table(tmp_path / "p.csv")


def test_spaces_in_a_table_mean_nothing(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("case_id, patient_id\na , p\n", encoding="utf-8")
    assert read_patient_table(tmp_path / "p.csv") == {"a": "p"}


def test_dicom_patients_are_hashes_with_a_salt(tmp_path: Path) -> None:
    for study, patient in (("study1", "MRN4711"), ("study2", "MRN4711"), ("study3", "MRN0815"), ("study4", "")):
        dicom_file(tmp_path / study / "0001", patient, "Roe^Jane")
    first, second, third, fourth = dicom_manifest(tmp_path).manifest.cases
    assert first.patient_id == second.patient_id != third.patient_id
    assert fourth.patient_id == "study4"
    assert "4711" not in dicom_manifest(tmp_path).manifest.model_dump_json()
    assert "roe" not in dicom_manifest(tmp_path).manifest.model_dump_json().lower()
    assert dicom_manifest(tmp_path).manifest.cases[0].patient_id != first.patient_id
    assert dicom_manifest(tmp_path, salt="s").manifest == dicom_manifest(tmp_path, salt="s").manifest


def test_a_real_series(tmp_path: Path, data_dir: Path) -> None:
    (tmp_path / "study1").symlink_to(data_dir / "dicom_hippocrop")
    (case,) = dicom_manifest(tmp_path).manifest.cases
    assert case.images == {"T1": "study1"}
    assert re.fullmatch(r"p[0-9a-f]{16}", case.patient_id)


@pytest.mark.parametrize("folder", ["MRN-4711", "roe_scan", "2020_Jane"])
def test_dicom_folders_named_after_their_patient_are_refused_without_a_name(tmp_path: Path, folder: str) -> None:
    dicom_file(tmp_path / folder / "0001", "MRN4711", "Roe^Jane")
    dicom_file(tmp_path / "study2" / "0001", "MRN0815", "Doe^John")
    with pytest.raises(ManifestError) as caught:
        dicom_manifest(tmp_path)
    assert "1 of 2 DICOM folders carry their patient's name or id" in str(caught.value)
    assert folder not in str(caught.value)


def test_pseudonyms_of_a_public_set_may_name_folders(tmp_path: Path) -> None:
    dicom_file(tmp_path / "TCIA-01" / "0001", "TCIA-01", "TCIA-01", removed="YES")
    (case,) = dicom_manifest(tmp_path).manifest.cases
    assert case.case_id == "TCIA-01"


def test_dicom_channels_of_two_patients_are_refused(tmp_path: Path) -> None:
    dicom_file(tmp_path / "T1" / "study1" / "0001", "A100")
    dicom_file(tmp_path / "FLAIR" / "study1" / "0001", "B200")
    with pytest.raises(ManifestError, match="1 cases with channels of different patients: study1"):
        dicom_manifest(tmp_path, TWO)


def test_a_folder_of_other_files_is_no_case(tmp_path: Path) -> None:
    (tmp_path / "study1").mkdir()
    (tmp_path / "study1" / "readme.txt").write_text("no DICOM", encoding="utf-8")
    with pytest.raises(ManifestError, match="no DICOM file in this folder"):
        dicom_manifest(tmp_path)
