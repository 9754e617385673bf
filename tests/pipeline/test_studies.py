"""What folders and files of numbered channels stand for: one file a case and channel."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.console import Silence
from pipeline.errors import VolumeError
from pipeline.plan import ChannelPlan
from pipeline.studies import Wanted, find_studies


def found(*inputs: Path, channels: int = 1) -> dict[str, list[str]]:
    facts = {"modality": "MR", "normalisation": {"kind": "zscore"}, "lowest": 0.0, "highest": 1.0}
    planned = [ChannelPlan.model_validate({"name": f"T{n + 1}", **facts}) for n in range(channels)]
    studies = find_studies(inputs, Wanted(planned), console=Silence())
    return {study.name: [path.name for path in study.paths] for study in studies}


def touch(folder: Path, *names: str) -> list[Path]:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).touch()
    return [folder / name for name in names]


def test_two_files_of_one_case_in_a_folder_are_refused(tmp_path: Path) -> None:
    compressed, nrrd = touch(tmp_path, "case_0000.nii.gz", "case_0000.nrrd")
    with pytest.raises(VolumeError) as caught:
        found(tmp_path)
    assert str(caught.value) == (
        f"two inputs would be named case in the output: {compressed} and {nrrd} are both its channel 0000; keep one "
        "of them, or predict them into different folders"
    )


def test_so_are_two_files_of_one_of_several_channels(tmp_path: Path) -> None:
    files = touch(tmp_path, "case_0000.nii", "case_0001.nii", "case_0001.mha")
    for inputs in ([tmp_path], files):
        with pytest.raises(VolumeError, match=r"case_0001\.(nii|mha) and .*case_0001\.(nii|mha) are both its channel"):
            found(*inputs, channels=2)


def test_one_file_a_channel_and_a_file_given_twice_are_one_study(tmp_path: Path) -> None:
    first, second = touch(tmp_path, "case_0000.nii", "case_0001.nrrd")
    expected = {"case": ["case_0000.nii", "case_0001.nrrd"]}
    assert found(tmp_path, channels=2) == expected
    assert found(first, second, first, channels=2) == expected
