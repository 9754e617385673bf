"""A whole cross-validation as MLflow then shows it: real cases, its real store, nothing but what is asked of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from pipeline import compare
from pipeline.bundle import find_bundles, load_bundle, set_postprocessing
from pipeline.cli_console import TerminalConsole
from pipeline.cli_postprocess import _written
from pipeline.console import Silence
from pipeline.crossval import cross_validate
from pipeline.manifest import Dataset, manifest_hash, save_manifest
from pipeline.postprocessing import Action, Found, PostProcessing
from pipeline.predict import Model, PredictSettings, predict
from pipeline.report_values import Report, read_report
from pipeline.runs import Run, open_run, read_done
from pipeline.tracked_results import tell_folds_again
from pipeline.tracking import embedded_store, tracked_as
from pipeline.tracking.journal import read_facts
from pipeline.tracking.registry import open_registry
from transforms.volume import read_volume

from .test_crossval import config_at
from .test_held_out import ENOUGH, mirrored_is_better

pytestmark = [
    pytest.mark.slow,  # two folds are trained and told of
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:mlflow.*"),
]


@pytest.fixture(scope="module")
def made(small_dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Report, Any, dict[str, Any]]:
    """The run, its report, MLflow's client, and MLflow's runs by name."""
    import mlflow

    home = tmp_path_factory.mktemp("tracked")
    save_manifest(small_dataset, home / "cases.json")
    both_ways = {"predict": {"mirror": "auto"}, "augment": {"mirror_axes": [0]}}
    config = config_at(home, tracking={"enabled": True}, **both_ways)
    run = open_run(config, home / "runs" / "tiny", Silence())
    report = cross_validate(run, [0, 1], Silence())
    client = mlflow.MlflowClient(embedded_store(home / "runs"), embedded_store(home / "runs"))
    experiment = client.get_experiment_by_name("tiny")
    found = {tracked.info.run_name: tracked for tracked in client.search_runs([experiment.experiment_id])}
    return run, report, client, found


def test_names_nesting_and_tags(made: tuple[Run, Report, Any, dict[str, Any]], small_dataset: Dataset) -> None:
    run, _, _, found = made
    assert set(found) == {"tiny", "tiny fold 0", "tiny fold 1"}
    assert {tracked.info.status for tracked in found.values()} == {"FINISHED"}
    for fold in (0, 1):
        assert found[f"tiny fold {fold}"].data.tags["mlflow.parentRunId"] == found["tiny"].info.run_id
    tags = found["tiny"].data.tags
    assert tags["dataset"] == run.dataset.manifest.name
    assert tags["dataset_sha256"] == manifest_hash(run.dataset.manifest)[:16]
    assert tags["plan_sha256"] == found["tiny fold 0"].data.params["plan.sha256"]
    (given,) = found["tiny"].inputs.dataset_inputs
    assert (given.dataset.name, given.tags[0].value) == (run.dataset.manifest.name, "cross-validation")
    contexts = {given.tags[0].value for given in found["tiny fold 0"].inputs.dataset_inputs}
    assert contexts == {"train", "validation"}


def test_figures_by_label_and_fold(made: tuple[Run, Report, Any, dict[str, Any]]) -> None:
    _, report, client, found = made
    parent = found["tiny"]
    for summary in report.labels:
        assert parent.data.metrics[f"out_of_fold_dice/{summary.label}"] == summary.mean
        history = client.get_metric_history(parent.info.run_id, f"dice_of_fold/{summary.label}")
        assert {point.step: point.value for point in history} == {fold.fold: fold.mean for fold in summary.folds}
        for fold in summary.folds:
            assert found[f"tiny fold {fold.fold}"].data.metrics[f"out_of_fold_dice/{summary.label}"] == fold.mean


def test_the_description_says_what_the_report_says(made: tuple[Run, Report, Any, dict[str, Any]]) -> None:
    _, report, client, found = made
    note = found["tiny"].data.tags["mlflow.note.content"]
    low, high = report.overall.interval_95 or (0.0, 0.0)
    lines = note.splitlines()
    assert lines[0] == f"### Dice {report.overall.mean:.3f} (95 % {low:.3f} to {high:.3f})"
    assert lines[2].startswith(
        "Mean of labels, out of fold over 4 cases of 4 patients, 2 folds. Look at the [report](#/"
    )
    for summary in report.labels:
        assert any(line.startswith(f"- **{summary.label}**: Dice {summary.mean:.3f}") for line in lines)
    assert "volseg crossval config.yaml" in note
    assert "volseg train config.yaml --fold 1" in found["tiny fold 1"].data.tags["mlflow.note.content"]
    for name, tracked in found.items():
        run_id = tracked.info.run_id
        files = {file.path for folder in ("", "overlays") for file in client.list_artifacts(run_id, folder)}
        place = f"#/experiments/{tracked.info.experiment_id}/runs/{run_id}/artifacts/"
        linked = [part.split(")")[0] for part in tracked.data.tags["mlflow.note.content"].split("](")[1:]]
        assert len(linked) >= 3
        assert {link.removeprefix(place) for link in linked} <= files, name


def test_the_registered_model_is_the_mean_of_the_folds(made: tuple[Run, Report, Any, dict[str, Any]]) -> None:
    import mlflow

    run, report, client, found = made
    (registered,) = client.search_registered_models()
    assert registered.name == run.dataset.manifest.name
    assert "Segments Anterior, Posterior on" in registered.description
    (version,) = client.search_model_versions(f"name = '{registered.name}'")
    assert version.run_id == found["tiny"].info.run_id
    assert version.description.startswith(f"Dice {report.overall.mean:.3f}")
    case = run.dataset.manifest.cases[0]
    (path,) = run.dataset.image_paths(case)
    (label_map,) = mlflow.pyfunc.load_model(version.source).predict(str(path))
    model = Model(tuple(load_bundle(bundle) for bundle in find_bundles(run.folder)))
    assert len(model.bundles) == 2
    direct = predict(model, [read_volume(path)], settings=PredictSettings(False), device=torch.device("cpu"))
    np.testing.assert_array_equal(label_map, direct.label_map)
    assert label_map.shape == nib.load(path).shape  # type: ignore[attr-defined]


def test_a_second_look_registers_nothing_anew(made: tuple[Run, Report, Any, dict[str, Any]]) -> None:
    run, _, client, _ = made
    cross_validate(run, [0, 1], Silence())
    assert len(client.search_model_versions(f"name = '{run.dataset.manifest.name}'")) == 1


def test_no_case_is_named_in_what_is_told_of_data(made: tuple[Run, Report, Any, dict[str, Any]]) -> None:
    run, _, _, found = made
    told = "".join(str(tracked.inputs) + tracked.data.tags["mlflow.note.content"] for tracked in found.values())
    assert not any(case.case_id in told for case in run.dataset.manifest.cases)
    assert str(Path.home()) + "/" not in told


class TestSettledLater:
    """What was settled after the folds had told of themselves. Each test leaves the run as the next one finds it."""

    @staticmethod
    def shown(run: Run, client: Any, folder: Path) -> tuple[Any, dict[str, Any], Path]:
        """What MLflow has of a fold, or of the whole: the run, its report, and the files of its model."""
        uri = embedded_store(run.config.runs)
        tracked = client.get_run(tracked_as(folder, uri=uri)[1])
        report = json.loads(Path(client.download_artifacts(tracked.info.run_id, "report.json")).read_text())
        with open_registry(uri) as registry:
            model = client.get_logged_model(registry.candidate(tracked.info.run_id).model_id)
        return tracked, report, Path(model.artifact_location.removeprefix("file://")) / "model" / "fold_0" / "bundle"

    def agrees(self, run: Run, client: Any, folder: Path) -> None:
        tracked, report, bundle = self.shown(run, client, folder)
        expected = read_report(folder / "report.json")
        assert report == json.loads((folder / "report.json").read_text())
        for summary in expected.labels:
            assert tracked.data.metrics[f"out_of_fold_dice/{summary.label}"] == summary.mean
        assert tracked.data.metrics["out_of_fold_dice/mean"] == expected.overall.mean
        assert tracked.data.tags["mlflow.note.content"].startswith(f"### Dice {expected.overall.mean:.3f}")
        page = Path(client.download_artifacts(tracked.info.run_id, "report.html"))
        assert page.read_bytes() == (folder / "report.html").read_bytes()
        for picture in folder.glob("overlay_*.png"):
            shown = client.download_artifacts(tracked.info.run_id, f"overlays/{picture.name}")
            assert Path(shown).read_bytes() == picture.read_bytes()
        own = folder if folder != run.folder else run.fold_folder(0)
        assert load_bundle(bundle).index == load_bundle(own / "bundle").index

    def test_folds_that_are_predicted_again(
        self, made: tuple[Run, Report, Any, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run, _, client, found = made
        mirrored_is_better(run, monkeypatch)
        cross_validate(run, [0, 1], Silence())
        for fold in (0, 1):
            folder = run.fold_folder(fold)
            assert load_bundle(folder / "bundle").index.mirror
            self.agrees(run, client, folder)
            after, before = self.shown(run, client, folder)[0], found[f"tiny fold {fold}"]
            assert after.data.metrics["out_of_fold_dice/mean"] != before.data.metrics["out_of_fold_dice/mean"]
            assert (after.info.status, after.info.end_time) == ("FINISHED", before.info.end_time)
            dice = read_done(folder)["dice"]
            assert dice["out_of_fold_dice/mean"] == after.data.metrics["out_of_fold_dice/mean"]
        self.agrees(run, client, run.folder)
        told = [len(read_facts(run.fold_folder(fold))) for fold in (0, 1)]
        cross_validate(run, [0, 1], Silence())
        assert [len(read_facts(run.fold_folder(fold))) for fold in (0, 1)] == told

    @pytest.mark.parametrize("wanted", [True, False])
    def test_post_processing_that_is_chosen_later_and_taken_back(
        self, made: tuple[Run, Report, Any, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, *, wanted: bool
    ) -> None:
        """Four cases never choose any, so they are made to."""
        run, _, client, _ = made
        largest = Action(kind="largest", name="Anterior", labels=("Anterior",))
        chosen = Found(cases=4, patients=4, note="chosen: by hand", chosen=PostProcessing(actions=(largest,)))
        monkeypatch.setattr("pipeline.postprocess_run.find_postprocessing", lambda *_: chosen)
        monkeypatch.setattr(compare, "SIGNIFICANT", ENOUGH)
        _written(run, [0, 1], TerminalConsole(), wanted=wanted)
        for folder in (run.folder, run.fold_folder(0), run.fold_folder(1)):
            self.agrees(run, client, folder)
            assert (self.shown(run, client, folder)[2] / "postprocessing.json").is_file() == wanted

    def test_what_a_kill_left_untold_is_told_by_the_next_call(
        self, made: tuple[Run, Report, Any, dict[str, Any]]
    ) -> None:
        run, _, client, _ = made
        folder, largest = run.fold_folder(1), Action(kind="largest", name="Anterior", labels=("Anterior",))
        set_postprocessing(folder / "bundle", PostProcessing(actions=(largest,)))
        tell_folds_again(run, [0, 1], Silence())
        assert (self.shown(run, client, folder)[2] / "postprocessing.json").is_file()
