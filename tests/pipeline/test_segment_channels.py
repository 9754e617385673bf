"""What inputs stand for where a model has several channels: each image goes to the channel it was made for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from pipeline.console import Silence
from pipeline.errors import VolumeError
from pipeline.files import write_json
from pipeline.plan import ChannelPlan
from pipeline.studies import Wanted, find_studies

MODEL = [("FLAIR", "MR"), ("T1c", "MR")]


def planned(channels: Sequence[tuple[str, str]], *optional: str) -> list[ChannelPlan]:
    facts = {"normalisation": {"kind": "zscore"}, "lowest": 0.0, "highest": 1.0}
    return [
        ChannelPlan.model_validate({"name": name, "modality": modality, "optional": name in optional, **facts})
        for name, modality in channels
    ]


def found(inputs: Sequence[Path], *optional: str) -> list[tuple[str, list[str], tuple[str, ...]]]:
    """Name, files and missing channels of every study that the inputs stand for."""
    studies = find_studies(inputs, Wanted(planned(MODEL, *optional)), console=Silence())
    return [(study.name, [path.name for path in study.paths], study.missing) for study in studies]


def touch(folder: Path, *names: str) -> list[Path]:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).touch()
    return [folder / name for name in names]


def manifest_of(folder: Path, channels: Sequence[tuple[str, str]], lacking: str = "") -> Path:
    images = {name: f"a_{name}.nii.gz" for name, _ in channels if name != lacking}
    for image in images.values():
        (folder / image).touch()
    document = {
        "name": "two",
        "channels": [{"name": n, "modality": modality, "optional": n == lacking} for n, modality in channels],
        "labels": {"labels": [{"id": 1, "name": "tumour", "colour": [230, 159, 0]}]},
        "cases": [{"case_id": "a", "patient_id": "a", "images": images}],
    }
    write_json(folder / "two.json", document)
    return folder / "two.json"


@pytest.mark.parametrize("channels", [MODEL, MODEL[::-1], [("t1C", "MR"), ("flair", "MR")]])
def test_channels_of_a_manifest_are_put_in_the_models_order(
    tmp_path: Path, channels: Sequence[tuple[str, str]]
) -> None:
    (study,) = find_studies([manifest_of(tmp_path, channels)], Wanted(planned(MODEL)), console=Silence())
    assert [path.name.casefold() for path in study.paths] == ["a_flair.nii.gz", "a_t1c.nii.gz"]


@pytest.mark.parametrize(
    "channels", [[("FLAIR", "MR"), ("T2", "MR")], [("FLAIR", "MR"), ("T1c", "CT")], MODEL[:1]], ids=str
)
def test_a_manifest_of_other_channels_is_refused(tmp_path: Path, channels: Sequence[tuple[str, str]]) -> None:
    with pytest.raises(VolumeError, match=r"the model wants FLAIR \(MR\), T1c \(MR\)"):
        find_studies([manifest_of(tmp_path, channels)], Wanted(planned(MODEL)), console=Silence())


def test_a_single_channel_may_have_another_name_but_no_other_modality(tmp_path: Path) -> None:
    manifest = manifest_of(tmp_path, [("T1", "MR")])
    assert len(find_studies([manifest], Wanted(planned([("MRI", "MR")])), console=Silence())) == 1
    with pytest.raises(VolumeError, match=r"channels are T1 \(MR\), the model wants CT \(CT\)"):
        find_studies([manifest], Wanted(planned([("CT", "CT")])), console=Silence())


class TestMissing:
    def test_numbered_files(self, tmp_path: Path) -> None:
        files = touch(tmp_path / "in", "a_0000.nii", "a_0001.nii", "b_0000.nii")
        both = ("a", ["a_0000.nii", "a_0001.nii"], ())
        alone = ("b", ["b_0000.nii"], ("T1c",))
        assert found([tmp_path / "in"], "T1c") == [both, alone]
        assert found(files, "T1c") == [both, alone], "files one by one are put together as well"
        assert found(touch(tmp_path / "in", "b_0001.nii"), "FLAIR") == [("b", ["b_0001.nii"], ("FLAIR",))]

    def test_a_numbered_file_without_one_that_is_needed(self, tmp_path: Path) -> None:
        touch(tmp_path / "in", "a_0001.nii")
        with pytest.raises(VolumeError) as caught:
            found([tmp_path / "in"], "T1c")
        told = "a has the channels ['0001'], the model wants 0000 = FLAIR (MR), 0001 = T1c (MR, optional)"
        assert str(caught.value) == f"{tmp_path / 'in'}: {told}"
        with pytest.raises(VolumeError, match=r"the model wants \['0000', '0001'\]"):
            found([tmp_path / "in"])

    def test_a_file_or_series_without_a_number_is_the_one_that_is_needed(self, tmp_path: Path, data_dir: Path) -> None:
        (file,) = touch(tmp_path / "in", "a.nii")
        assert found([file], "T1c") == [("a", ["a.nii"], ("T1c",))]
        assert found([file], "FLAIR") == [("a", ["a.nii"], ("FLAIR",))]
        series = data_dir / "dicom_hippocrop"
        assert found([series], "T1c") == [("dicom_hippocrop", ["dicom_hippocrop"], ("T1c",))]
        for optional in ((), ("FLAIR", "T1c")):
            with pytest.raises(VolumeError, match="one file, the model wants 2 channels"):
                found([file], *optional)

    def test_a_manifest_without_the_channel_or_with_a_case_that_lacks_it(self, tmp_path: Path) -> None:
        expected = [("a", ["a_FLAIR.nii.gz"], ("T1c",))]
        assert found([manifest_of(tmp_path, MODEL[:1])], "T1c") == expected
        assert found([manifest_of(tmp_path, MODEL[::-1], lacking="T1c")], "T1c") == expected
        assert found([manifest_of(tmp_path, MODEL, lacking="T1c")]) == expected, "judged when it is predicted"
        with pytest.raises(VolumeError, match=r"channels are T1c \(MR\), the model wants FLAIR \(MR\), T1c \(MR, opt"):
            found([manifest_of(tmp_path, MODEL[1:])], "T1c")
        with pytest.raises(VolumeError, match=r"channels are FLAIR \(MR\), T2 \(MR\), the model wants"):
            found([manifest_of(tmp_path, [*MODEL[:1], ("T2", "MR")])], "T1c")
