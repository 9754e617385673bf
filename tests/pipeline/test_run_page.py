"""What a run's page and its note in MLflow say, where a text of theirs can be tried out."""

from __future__ import annotations

import shlex
import shutil
from itertools import pairwise
from pathlib import Path

import pytest

from pipeline.config import flatten, load_config
from pipeline.console import Silence
from pipeline.manifest import Dataset, save_manifest
from pipeline.run_note import _command, _plain
from pipeline.run_page import again
from pipeline.runs import CONFIG, PLAN, Run, _settings, open_run

from .test_crossval import config_at

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def run(small_dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Run:
    home = tmp_path_factory.mktemp("again")
    save_manifest(small_dataset, home / "cases.json")
    root = {"root": str(small_dataset.root)}
    return open_run(config_at(home, data=root), home / "runs" / "tiny", Silence())


def test_the_command_does_the_run_again_from_a_config_that_was_fetched(run: Run, tmp_path: Path) -> None:
    """Its data lie elsewhere than where its config came from, and the run's own folder is left alone."""
    shutil.copy(run.folder / CONFIG, tmp_path / CONFIG)
    words = shlex.split(again(run, run.folder))
    assert words[:3] == ["volseg", "crossval", "config.yaml"]
    sets = [value for name, value in pairwise(words) if name == "--set"]
    manifest = run.config.data.manifest
    filled = [value.replace("PATH/cases.json", str(manifest)) for value in sets]
    filled = [value.replace("root=PATH", f"root={run.dataset.root}") for value in filled]
    assert not any("PATH" in value for value in filled)
    config = load_config(tmp_path / CONFIG, [*filled, f"runs={tmp_path / 'runs'}"])
    assert (config.cache_folder, words[-2]) == (tmp_path / "runs" / "cache", "--out")
    other = open_run(config, tmp_path / "runs" / words[-1], Silence())
    assert (other.folder / PLAN).read_bytes() == (run.folder / PLAN).read_bytes()
    assert other.folds == run.folds


def test_note_and_page_say_it_alike(run: Run) -> None:
    assert again(run, run.fold_folder(1)).startswith("volseg train config.yaml --fold 1 --set data.manifest=")
    for folder in (run.folder, run.fold_folder(1)):
        assert f"`{again(run, folder)}`" in _command(run, folder)


def test_mlflow_is_told_how_and_not_where(run: Run) -> None:
    told = _settings(run.config)
    assert told["train.steps"] == "3"
    assert not any(str(run.config.runs.parent) in value or str(run.dataset.root) in value for value in told.values())
    assert set(flatten(run.config)) - set(told) >= {"runs", "data.root", "data.manifest", "data.cache", "tracking.uri"}


def test_a_home_folder_whose_name_is_escaped_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", lambda: Path("/home/john_doe"))
    assert _plain("scans of /home/john_doe/a_b") == "scans of ~/a\\_b"
