"""What folders and files of numbered channels stand for: one file a case and channel."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.console import Silence
from pipeline.errors import VolumeError
from pipeline.plan import ChannelPlan
from pipeline.studies import Wanted, find_studies
from transforms.labels import schema_from_names


def found(*inputs: Path, channels: int = 1) -> dict[str, list[str]]:
    facts = {"modality": "MR", "normalisation": {"kind": "zscore"}, "lowest": 0.0, "highest": 1.0}
    planned = [ChannelPlan.model_validate({"name": f"T{n + 1}", **facts}) for n in range(channels)]
    studies = find_studies(inputs, Wanted(planned), console=Silence())
    return {study.name: [path.name for path in study.paths] for study in studies}


@pytest.mark.parametrize("modality", ["CT", "MR"])
def test_a_manifest_of_any_modality_fits_a_channel_of_unknown_modality(tmp_path: Path, modality: str) -> None:
    (path,) = touch(tmp_path, "one.nii.gz")
    said = {
        "name": "world",
        "channels": [{"name": "a", "modality": modality}],
        "labels": schema_from_names({1: "x"}).model_dump(mode="json"),
        "cases": [{"case_id": "one", "patient_id": "one", "images": {"a": path.name}}],
    }
    manifest = tmp_path / "manifest.json"
    manifest.write_text(json.dumps(said))
    facts = {"name": "zscore", "normalisation": {"kind": "zscore"}, "lowest": None, "highest": None}
    unknown = ChannelPlan.model_validate({**facts, "modality": None})
    (study,) = find_studies([manifest], Wanted([unknown]), console=Silence())
    assert study.paths == (path,)
    other = ChannelPlan.model_validate({**facts, "modality": "PT"})
    with pytest.raises(VolumeError, match=rf"its channels are a \({modality}\), the model wants zscore \(PT\)"):
        find_studies([manifest], Wanted([other]), console=Silence())


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
