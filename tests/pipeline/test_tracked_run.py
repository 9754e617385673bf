"""A whole cross-validation as MLflow then shows it: real cases, its real store, nothing but what is asked of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from pipeline.bundle import find_bundles, load_bundle
from pipeline.console import Silence
from pipeline.crossval import cross_validate
from pipeline.manifest import Dataset, manifest_hash, save_manifest
from pipeline.predict import Model, PredictSettings, predict
from pipeline.report_values import Report
from pipeline.runs import Run, open_run
from pipeline.tracking import embedded_store
from transforms.volume import read_volume

from .test_crossval import config_at

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
    config = config_at(home, tracking={"enabled": True})
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
