"""`volseg manifest build` as a newcomer gives it: what is written, and in which words the rest is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.errors import ManifestError


@pytest.fixture
def bundled(data_dir: Path) -> Path:
    return data_dir / "hippocampus"


def build(*arguments: Any) -> str:
    """What the command prints; its error is raised."""
    result = CliRunner().invoke(app, ["manifest", "build", *map(str, arguments), "--channel", "T1:MR"])
    if result.exception is not None:
        raise result.exception
    return result.stdout


def refused(*arguments: Any) -> str:
    with pytest.raises(ManifestError) as caught:
        build(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_images_and_labels(bundled: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.json"
    told = build(bundled / "images", "--labels", bundled / "labels", "--label", "1:A", "--label", "02:B", "--out", out)
    assert told == f"32 cases written to {out}; run `volseg check {out}` next\n"
    labels = json.loads(out.read_text())["labels"]["labels"]
    assert [(label["id"], label["name"]) for label in labels] == [(1, "A"), (2, "B")]


def test_images_alone_are_for_prediction(bundled: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.json"
    first, second = build(bundled / "images", "--out", out).splitlines()
    assert first.startswith("32 cases, 0 of them labelled, written to")
    assert second == "no case has a label: fit for prediction, not for training"
    checked = CliRunner().invoke(app, ["check", str(out)])
    assert checked.exit_code == 0
    assert "no case has a label: nothing to train on" in checked.stdout


def test_names_of_labels_need_label_maps(bundled: Path, tmp_path: Path) -> None:
    told = "--label names labels, but there is no label map: give their folder with --labels"
    out = tmp_path / "m.json"
    assert refused(bundled / "images", "--label", "1:A", "--out", out) == told
    hint = f"; did you mean {bundled / 'images'} --labels {bundled / 'labels'}?"
    assert refused(bundled, "--label", "1:A", "--out", out) == told + hint
    assert refused(bundled, "--out", out).endswith(hint)
    assert not out.exists()


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        (("1:A", "1:B"), "--label 1:B: label 1 is A already"),
        (("1:A", "2:A"), "--label 2:A: A is label 1 already"),
        (("0:A",), "--label 0:A: 0 is the background; number labels from 1"),
        (("70000:A",), "--label 70000:A: the largest id of a label is 65535"),
        ((f"{'9' * 5000}:A",), f"--label {'9' * 5000}:A: the largest id of a label is 65535"),
        (("-1:A",), "--label -1:A: a label's id is a whole number from 1"),
        (("\u00b2:A",), "--label \u00b2:A: a label's id is a whole number from 1"),
        (("liver:1",), "--label liver:1: a label's id is a whole number from 1"),
        (("1=liver",), "--label 1=liver: expected ID:NAME"),
    ],
)
def test_labels_that_cannot_be(bundled: Path, tmp_path: Path, labels: tuple[str, ...], told: str) -> None:
    options = [f"--label={label}" for label in labels]
    out = tmp_path / "m.json"
    assert refused(bundled / "images", "--labels", bundled / "labels", *options, "--out", out) == told


def test_a_label_may_be_named_twice_alike(bundled: Path, tmp_path: Path) -> None:
    options = ["--label", "1:A", "--label", "2:B", "--label", "1:A", "--out", tmp_path / "m.json"]
    assert build(bundled / "images", "--labels", bundled / "labels", *options).startswith("32 cases")


@pytest.mark.parametrize("force", [(), ("--force",)])
def test_a_folder_is_no_name_of_a_manifest(tmp_path: Path, force: tuple[str, ...]) -> None:
    """Said before anything is looked at: the images are not there."""
    told = f"--out {tmp_path}: is a folder; give the name of a file, such as {tmp_path / 'manifest.json'}"
    assert refused(tmp_path / "none", "--out", tmp_path, *force) == told


def test_a_table_of_patients_without_its_columns(bundled: Path, tmp_path: Path) -> None:
    table = tmp_path / "p.csv"
    table.write_text("case,patient\n", encoding="utf-8")
    told = refused(bundled / "images", "--patient-table", table, "--out", tmp_path / "m.json")
    assert told == f"{table}: expected the columns case_id,patient_id; found case,patient"
