"""A dataset.json and what it cannot say: patients, channels that cases lack, folds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import ManifestError
from pipeline.manifest_adopt import adopt_dataset, describes_itself
from pipeline.manifest_build import PatientRule
from pipeline.manifest_formats import Stated

CASES = ("p1_a", "p1_b", "p2_a")


@pytest.fixture(params=[".nii.gz", ".nrrd", ".mha"])
def raw(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """An nnU-Net raw folder of two channels; p2_a lacks the second."""
    document: dict[str, Any] = {
        "channel_names": {"0": "T1", "1": "zscore"},
        "labels": {"background": 0, "tumour": 1},
        "numTraining": 3,
        "file_ending": request.param,
    }
    (tmp_path / "dataset.json").write_text(json.dumps(document))
    names = [f"imagesTr/{case}_{n:04d}" for case in CASES for n in (0, 1)] + [f"labelsTr/{case}" for case in CASES]
    for name in [*names, "imagesTs/p9_0000"]:
        path = tmp_path / (name + request.param)
        path.parent.mkdir(exist_ok=True)
        path.touch()
    (tmp_path / f"imagesTr/p2_a_0001{request.param}").unlink()
    return tmp_path


STATED = Stated({"zscore": "MR"}, frozenset({"zscore"}))


def splits(folder: Path, *held_out: tuple[str, ...]) -> Path:
    path = folder / "splits_final.json"
    path.write_text(json.dumps([{"train": [c for c in CASES if c not in v], "val": list(v)} for v in held_out]))
    return path


def refusal(raw: Path, path: Path) -> str:
    with pytest.raises(ManifestError) as caught:
        adopt_dataset(raw, stated=STATED, splits=path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_channels_that_cases_lack_and_modalities_that_names_do_not_say(raw: Path) -> None:
    manifest = adopt_dataset(raw, stated=STATED).manifest
    assert [(c.name, c.modality, c.optional) for c in manifest.channels] == [
        ("T1", "MR", False),
        ("zscore", "MR", True),
    ]
    assert [sorted(case.images) for case in manifest.cases] == [["T1", "zscore"], ["T1", "zscore"], ["T1"]]
    assert [case.patient_id for case in manifest.cases] == list(CASES)


def test_patients_and_folds(raw: Path) -> None:
    path = splits(raw, ("p1_a", "p1_b"), ("p2_a",))
    rule = PatientRule(pattern=r"imagesTr/(p\d)_")
    manifest = adopt_dataset(raw, stated=STATED, patients=rule, splits=path, name="mine").manifest
    assert [(c.case_id, c.patient_id, c.fold) for c in manifest.cases] == [
        ("p1_a", "p1", 0),
        ("p1_b", "p1", 0),
        ("p2_a", "p2", 1),
    ]
    assert manifest.name == "mine"


def test_a_table_of_patients(raw: Path) -> None:
    rule = PatientRule(table={"p1_a": "x", "p1_b": "x", "p2_a": "y"})
    assert [c.patient_id for c in adopt_dataset(raw, stated=STATED, patients=rule).manifest.cases] == ["x", "x", "y"]
    with pytest.raises(ManifestError, match="1 cases without a patient by the given rule: p2_a"):
        adopt_dataset(raw, stated=STATED, patients=PatientRule(table={"p1_a": "x", "p1_b": "x"}))


def test_splits_that_a_manifest_cannot_say(raw: Path) -> None:
    assert "1 cases that two folds hold out: p1_b" in refusal(raw, splits(raw, ("p1_a", "p1_b"), ("p1_b", "p2_a")))
    assert "1 cases that no fold holds out: p2_a" in refusal(raw, splits(raw, ("p1_a",), ("p1_b",)))
    assert "1 cases that are not in the dataset: p3" in refusal(raw, splits(raw, ("p1_a", "p1_b", "p3"), ("p2_a",)))
    path = splits(raw, ("p1_a", "p1_b"), ("p2_a",))
    path.write_text(json.dumps([{"train": [], "val": ["p1_a", "p1_b"]}, {"train": ["p1_a"], "val": ["p2_a"]}]))
    assert "fold 0 does not train on exactly the cases" in refusal(raw, path)


@pytest.mark.parametrize("content", ["", "{}", "[]", '[{"train": []}]', '[{"train": [], "val": [1]}]'])
def test_other_files_are_no_splits(raw: Path, content: str) -> None:
    path = raw / "splits_final.json"
    path.write_text(content)
    told = refusal(raw, path)
    assert "splits_final.json: " in told
    assert "expected nnU-Net's list of folds" in told or "cannot be read as JSON" in told


def test_splits_that_are_nested_too_deeply(raw: Path) -> None:
    path = raw / "splits_final.json"
    path.write_text("[" * 100_000)
    told = f"{path}: lists or objects are nested too deeply to be read; expected nnU-Net's list of folds, each"
    assert refusal(raw, path).startswith(told)


def test_channels_that_are_not_there(raw: Path) -> None:
    with pytest.raises(ManifestError, match="it has no channel 'T2'; its channels are T1, zscore"):
        adopt_dataset(raw, stated=Stated({"zscore": "MR"}, frozenset({"T2"})))
    with pytest.raises(ManifestError, match=r"channel 'zscore' is unknown; .*--channel 'zscore:MR'"):
        adopt_dataset(raw)


def test_files_that_are_no_volumes(raw: Path) -> None:
    document = json.loads((raw / "dataset.json").read_text())
    (raw / "dataset.json").write_text(json.dumps({**document, "file_ending": ".png"}))
    with pytest.raises(ManifestError, match=r"its files end in '\.png', which is not read as a volume"):
        adopt_dataset(raw, stated=STATED)


def test_what_describes_itself(raw: Path) -> None:
    assert describes_itself(raw)
    assert describes_itself(raw / "dataset.json")
    assert not describes_itself(raw / "imagesTr")
