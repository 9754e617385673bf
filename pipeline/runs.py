"""Run folders: what a training writes where, how it is set up once, and one fold from cache to scores.

RUN/
  config.yaml plan.json fingerprint.json folds.json dataset.json set_aside.json provenance.json
  fold_K/  history.jsonl checkpoint.pt bundle/ validation/*.nii.gz report.json report.csv curves.png done.json
           inspection/*.png                                             (with train.inspect_every)
  report.json report.csv dice.png                                       (after a cross-validation)
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.checks import CheckReport, check_dataset
from pipeline.config import Config, config_to_yaml, flatten, load_config
from pipeline.console import Console, Silence
from pipeline.dataset import PreparedCase, dataset_digest, prepare_cases
from pipeline.device import Hardware, budget_of, choose_hardware
from pipeline.errors import ConfigError, ManifestError, PlanError, RunError
from pipeline.evaluate import require_labels
from pipeline.failures import Failure, describe_failures
from pipeline.files import remove_leftovers, sha256_of_json, write_json, write_text
from pipeline.fingerprint import Measuring
from pipeline.folder_lock import held
from pipeline.folds import Folds, assign_folds, read_folds, write_folds
from pipeline.manifest import Dataset, load_dataset, manifest_hash
from pipeline.models.registry import require_network
from pipeline.plan import Fingerprint, Plan, read_plan
from pipeline.planner import make_plan, require_consistent
from pipeline.provenance import provenance_tags
from pipeline.tracking import (
    Busy,
    Tracker,
    deliver,
    embedded_store,
    null_tracker,
    open_tracker,
    without_password,
)
from pipeline.tracking.registry import DATASET_HASH_TAG, DATASET_TAG
from transforms.labels import LabelSchema

CONFIG, PLAN, FINGERPRINT, FOLDS, DATASET, DONE = (
    "config.yaml",
    "plan.json",
    "fingerprint.json",
    "folds.json",
    "dataset.json",
    "done.json",
)

BUNDLE, VALIDATION = "bundle", "validation"
"""In a fold's folder: its model, and its predictions of the cases held out."""

PLACES = ("runs", "data.", "tracking.")
"""How those keys of a config begin that say where things lie."""

CHECK_WORKERS = 2

SET_UP_S = 60.0
"""The longest that another process may take to write what a run is set up with."""


@dataclass(frozen=True, eq=False)
class Run:
    """A run that is set up: everything that all of its folds share."""

    folder: Path
    config: Config
    dataset: Dataset
    folds: Folds
    plan: Plan
    hardware: Hardware

    def fold_folder(self, fold: int) -> Path:
        """Where one fold's files lie."""
        return self.folder / f"fold_{fold}"

    def is_done(self, fold: int) -> bool:
        """True when the fold was trained, predicted and scored."""
        return (self.fold_folder(fold) / DONE).is_file()


def plan_dataset(config: Config, console: Console) -> tuple[Dataset, CheckReport, Fingerprint, Plan]:
    """Check and measure a dataset in one pass over its files, and plan for it on this machine."""
    # What is wrong in the config is told before a large dataset is read for it.
    budget = budget_of(choose_hardware(config.train), config.plan, config.train)
    require_network(config.network.name)
    require_consistent(config.plan, config.network)
    dataset = load_dataset(config.data.manifest, config.data.root)
    measuring = Measuring(dataset.manifest)
    report = check_dataset(
        dataset,
        workers=CHECK_WORKERS,
        visit=measuring.visit,
        on_progress=lambda done, total: console.progress("reading cases", done, total),
    )
    usable = [facts.case_id for facts in report.facts if facts.label_volumes_mm3 is not None]
    if not usable:
        first = next((f.message for f in report.faults if f.severity == "error"), "no case has a label")
        raise ManifestError(f"{config.data.manifest}: no case can be trained on, the first fault: {first}")
    fingerprint = measuring.fingerprint(usable)
    plan = make_plan(
        fingerprint, budget, settings=config.plan, network=config.network, mirror_axes=config.augment.mirror_axes
    )
    return dataset, report, fingerprint, plan


def open_run(config: Config, folder: Path, console: Console, *, wanted: Sequence[int] = ()) -> Run:
    """Set a run up for the `wanted` folds, or go on with one of the same config.

    Raises:
        ConfigError: there is no such fold; nothing is written then.
        RunError: the folder holds a run of another config, or cannot be written.
    """
    if (folder / CONFIG).exists():
        _require_same_config(config, folder)
    if (folder / DATASET).exists():
        dataset = load_dataset(config.data.manifest, config.data.root)
        _require_same_dataset(dataset, folder)
        folds = read_folds(folder / FOLDS)
        _require_folds(folds, wanted)
        require_labels(config.evaluate, dataset.manifest.labels)
        return Run(folder, config, dataset, folds, read_plan(folder / PLAN), choose_hardware(config.train))
    return _set_up(config, folder, console, wanted=wanted)


def run_fold_cases(run: Run, fold: int, console: Console | None) -> tuple[list[PreparedCase], list[PreparedCase]]:
    """Training and validation cases of a fold, preprocessed; those that fail are set aside and named.

    With None for the console it is another process that names them.
    """
    by_id = {case.case_id: case for case in run.dataset.manifest.cases}
    training = [by_id[i] for i in run.folds.training_cases(fold)]
    validation = [by_id[i] for i in run.folds.validation_cases(fold)]
    prepared, failures = prepare_cases(
        run.dataset,
        [*training, *validation],
        run.plan,
        run.config.cache_folder,
        workers=CHECK_WORKERS,
        console=console or Silence(),
    )
    if failures and console is not None:
        tell_set_aside(run.fold_folder(fold) / "set_aside.json", failures, console)
    ids = {case.case_id for case in training}
    kept = [case for case in prepared if case.case_id in ids], [c for c in prepared if c.case_id not in ids]
    for what, cases in zip(("training", "validation"), kept, strict=True):
        if not cases:
            raise RunError(f"fold {fold}: no {what} case is left, the first fault: {failures[0].reason}")
    _require_every_label(kept[0], run.dataset.manifest.labels, fold)
    return kept


def _require_every_label(training: Sequence[PreparedCase], schema: LabelSchema, fold: int) -> None:
    masks = [schema.are_annotated(None) if c.annotated is None else c.annotated.tolist() for c in training]
    unknown = [name for c, name in enumerate(schema.names, start=1) if not any(mask[c] for mask in masks)]
    if unknown:
        raise PlanError(
            f"fold {fold}: none of its {len(training)} training cases has {', '.join(unknown)} annotated, so it cannot "
            "be learnt; fewer folds or another folds.seed may help, or a manifest without the label"
        )


def tell_set_aside(target: Path, failures: Sequence[Failure], console: Console) -> None:
    """Name the cases that were set aside, on the console and in a file."""
    write_json(target, describe_failures(failures))
    for failure in failures:
        console.note(f"set aside {failure.case_id}: {failure.reason}")


def open_run_tracker(run: Run, console: Console, *, fold: int | None) -> Tracker:
    """The tracker of a fold, or of the whole run that folds are children of (`fold` None)."""
    if not run.config.tracking.enabled:
        return null_tracker()
    try:
        tracker = open_tracker(
            run.folder if fold is None else run.fold_folder(fold),
            uri=tracking_uri(run.config),
            experiment=run.config.experiment,
            run_name=run.folder.name if fold is None else f"{run.folder.name} fold {fold}",
            tags=_tags(run),
            on_warning=console.note,
            parent=None if fold is None else run.folder,
        )
    except Busy:
        if fold is not None:
            raise
        # Another process trains another fold of this run, and tells of the whole.
        return null_tracker()
    tracker.params(_settings(run.config) | _plan_params(run.plan))
    if fold is None:
        for name in (CONFIG, PLAN, FINGERPRINT, FOLDS, DATASET):
            tracker.artifact(run.folder / name)
    return tracker


def _settings(config: Config) -> dict[str, str]:
    """All that changes what a run finds, and not where anything lies: folders are named after patients and users."""
    return {key: value for key, value in flatten(config).items() if not key.startswith(PLACES)}


def _tags(run: Run) -> dict[str, str]:
    """What a run is told from others by, first what a reader asks first."""
    told = {
        DATASET_TAG: run.dataset.manifest.name,
        DATASET_HASH_TAG: manifest_hash(run.dataset.manifest)[:16],
        "plan_sha256": _plan_hash(run.plan),
        "network": run.plan.network,
        "device": run.hardware.device,
    }
    return told | provenance_tags()


def tracking_uri(config: Config) -> str:
    """Where MLflow's data goes."""
    return config.tracking.uri or embedded_store(config.runs)


def track_data(
    tracker: Tracker, run: Run, training: Sequence[PreparedCase], validation: Sequence[PreparedCase]
) -> None:
    """Tell what a fold was trained and validated on: a digest and a count, never a case's name."""
    name, source = run.dataset.manifest.name, run.dataset.manifest.source or "local files"
    tracker.dataset(name, dataset_digest(training), "train", source=source, case_count=len(training))
    tracker.dataset(name, dataset_digest(validation), "validation", source=source, case_count=len(validation))


def track_whole_data(tracker: Tracker, run: Run) -> None:
    """Tell what a cross-validation is over."""
    manifest = run.dataset.manifest
    tracker.dataset(
        manifest.name,
        manifest_hash(manifest),
        "cross-validation",
        source=manifest.source or "local files",
        case_count=len(manifest.cases),
    )


def public_yaml(config: Config, folder: Path) -> str:
    """The resolved config as it may be kept in `folder` and tracked: without a server's password."""
    uri = config.tracking.uri
    if uri is None:
        return config_to_yaml(config, folder)
    tracking = config.tracking.model_copy(update={"uri": without_password(uri)})
    return config_to_yaml(config.model_copy(update={"tracking": tracking}), folder)


def send_leftovers(run: Run, console: Console) -> None:
    """Tell MLflow what finished folds could not tell it before."""
    if not run.config.tracking.enabled:
        return
    for fold in range(run.folds.count):
        if run.is_done(fold):
            deliver(run.fold_folder(fold), uri=tracking_uri(run.config), on_warning=console.note)


def read_done(folder: Path) -> dict[str, Any]:
    """What a finished fold wrote last."""
    try:
        result: dict[str, Any] = json.loads((folder / DONE).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise RunError(f"{folder}: its {DONE} cannot be read; delete the fold's folder to train it again") from error
    return result


def _set_up(config: Config, folder: Path, console: Console, *, wanted: Sequence[int]) -> Run:
    require_labels(config.evaluate, load_dataset(config.data.manifest, config.data.root).manifest.labels)
    dataset, report, fingerprint, plan = plan_dataset(config, console)
    errors = [f for f in report.faults if f.severity == "error"]
    set_aside = [f for f in errors if f.case_id is not None]
    folds = assign_folds(report.facts, count=config.folds.count, seed=config.folds.seed)
    _require_folds(folds, wanted)
    certificate = folds.certificate()
    if not certificate["sound"]:
        raise ManifestError(
            f"{config.data.manifest}: the folds given in the manifest leak (see `volseg check`); "
            f"patients on two sides: {certificate['patients_on_two_sides'] or 'none'}, identical volumes on two "
            f"sides: {certificate['identical_volumes_on_two_sides'] or 'none'}"
        )
    with held(folder, wait_s=SET_UP_S):
        if (folder / DATASET).exists():
            # Another process, for another fold, was first.
            return open_run(config, folder, console, wanted=wanted)
        if set_aside:
            rows = [Failure(str(f.case_id), f"{f.file}: {f.message}") for f in set_aside]
            tell_set_aside(folder / "set_aside.json", rows, console)
        remove_leftovers(folder)
        write_text(folder / CONFIG, public_yaml(config, folder))
        write_text(folder / FINGERPRINT, fingerprint.model_dump_json(indent=2) + "\n")
        write_text(folder / PLAN, plan.model_dump_json(indent=2) + "\n")
        write_folds(folds, folder / FOLDS)
        write_json(folder / "provenance.json", provenance_tags())
        # Last, because it says that the set-up is complete.
        write_json(folder / DATASET, _dataset_facts(dataset))
    for warning in plan.warnings:
        console.note(f"plan: {warning}")
    return Run(folder, config, dataset, folds, plan, choose_hardware(config.train))


def _require_folds(folds: Folds, wanted: Sequence[int]) -> None:
    for fold in wanted:
        if fold >= folds.count:
            raise ConfigError(f"fold {fold}: there are folds 0 to {folds.count - 1} (folds.count)")


def _dataset_facts(dataset: Dataset) -> dict[str, Any]:
    return {
        "name": dataset.manifest.name,
        "sha256": manifest_hash(dataset.manifest),
        "cases": len(dataset.manifest.cases),
    }


def _require_same_dataset(dataset: Dataset, folder: Path) -> None:
    before = json.loads((folder / DATASET).read_text(encoding="utf-8"))
    if before["sha256"] != manifest_hash(dataset.manifest):
        raise RunError(f"{folder}: a run on another version of the manifest is here; choose another --out")


def _require_same_config(config: Config, folder: Path) -> None:
    try:
        before = flatten(load_config(folder / CONFIG))
    except ConfigError as error:
        raise RunError(f"{folder}: holds a run that this version cannot read; choose another --out") from error
    now = flatten(config)
    free = (*PLACES, "train.device", "train.checkpoint_minutes", "train.inspect_every")
    changed = [k for k in now if before.get(k) != now[k] and not k.startswith(free)]
    if changed:
        key = changed[0]
        raise RunError(
            f"{folder}: a run with another config is here ({key} was {before.get(key)}, is now {now[key]}); "
            "choose another --out, or delete that folder"
        )


def _plan_params(plan: Plan) -> dict[str, str]:
    return {
        "plan.spacing_mm": str(list(plan.spacing_mm)),
        "plan.patch": str(list(plan.patch_shape)),
        "plan.batch": str(plan.batch_size),
        "plan.network_features": str(list(plan.unet.features)),
        "plan.checkpointing": str(plan.unet.checkpointing),
        "plan.sha256": _plan_hash(plan),
    }


def _plan_hash(plan: Plan) -> str:
    return sha256_of_json(plan.model_dump(mode="json"))[:16]
