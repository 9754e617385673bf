"""Folds -> runs -> out-of-fold report. A finished fold isn't run again; one that fails doesn't stop the others.

Where folds run is a `FoldRunner`'s matter: here, one after another, or elsewhere (`pipeline.runners`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pipeline.air import air_levels
from pipeline.bundle import Air, BundleFacts, load_bundle, save_bundle, set_air
from pipeline.checkpoint import discard_checkpoints, has_checkpoint
from pipeline.console import Console, Silence
from pipeline.dataset import PreparedCase
from pipeline.device import describe
from pipeline.errors import PlanError, RunError, describe_fault
from pipeline.folder_lock import held
from pipeline.held_out import agree_on_mirroring, out_of_fold_report, score_fold, write_report
from pipeline.history import HISTORY, read_history
from pipeline.inspection.live import validation_window
from pipeline.inspection.pictures import write_pictures
from pipeline.postprocess_run import with_postprocessing
from pipeline.provenance import provenance_tags
from pipeline.report import dice_distribution, learning_curves
from pipeline.report_values import Report
from pipeline.run_page import write_run_page
from pipeline.runs import (
    BUNDLE,
    Run,
    open_run_tracker,
    public_yaml,
    run_fold_cases,
    send_leftovers,
    track_data,
    track_whole_data,
)
from pipeline.task import TrainingResult, TrainingTask
from pipeline.tracked_results import note_done, tell_fold, tell_folds_again, tell_whole
from pipeline.tracking import Tracker, null_tracker
from pipeline.train import train

INSPECTION = "inspection"
"""In a fold's folder, and among its artifacts: pictures of the network's levels, where `train.inspect_every` asks."""


FoldRunner = Callable[[Run, Sequence[int], Console], Mapping[int, Exception]]
"""Does `train_fold` for each of some folds, somewhere; gives what stopped those that could not be finished."""


def cross_validate(run: Run, folds: Sequence[int], console: Console, *, runner: FoldRunner | None = None) -> Report:
    """Train the folds that aren't finished, then score the out-of-fold predictions of all finished ones together.

    The post-processing that helps these goes into the folds' bundles; scores are without it (`postprocess_run`).

    Raises:
        RunError: at least one fold failed; the others were done first.
    """
    with open_run_tracker(run, console, fold=None) as tracker:
        track_whole_data(tracker, run)
        for fold in filter(run.is_done, folds):
            console.note(f"fold {fold} is finished already, kept")
        faults = (runner or one_after_another)(run, [fold for fold in folds if not run.is_done(fold)], console)
        failed = {f"fold {fold}: {describe_fault(error)}": error for fold, error in faults.items()}
        first = next(iter(failed), "none was asked for")
        finished = [fold for fold in range(run.folds.count) if run.is_done(fold)]
        if not finished:
            raise RunError(f"no fold was finished; {first}") from failed.get(first)
        agree_on_mirroring(run, finished, console)
        report = with_postprocessing(run, finished, out_of_fold_report(run, finished), console)
        files = write_whole_report(run, report)
        tell_whole(run, finished, report, tracker, files=files)
        tell_folds_again(run, finished, console)
        send_leftovers(run, console)
        if failed:
            count = f"{len(failed)} of {len(folds)} folds"
            raise RunError(f"{count} failed, the others are done; {first}") from failed[first]
    return report


def one_after_another(run: Run, folds: Sequence[int], console: Console) -> dict[int, Exception]:
    """The runner that needs nothing: this process, fold after fold."""
    faults: dict[int, Exception] = {}
    for fold in folds:
        try:
            train_fold(run, fold, console, resume=True)
        except Exception as error:  # whatever stopped this fold, the others are worth having
            faults[fold] = error
            console.note(f"fold {fold} failed: {describe_fault(error)}")
    return faults


def train_fold(run: Run, fold: int, console: Console, *, resume: bool) -> Report:
    """One fold: preprocess, train, save the bundle, predict the held-out cases on their own grids, score them.

    Raises:
        RunError: an unfinished training is here and `resume` is off, or another process trains here; see also `train`.
        KeyboardInterrupt: after a checkpoint was written.
    """
    folder = run.fold_folder(fold)
    if not resume and has_checkpoint(folder):
        raise RunError(f"{folder}: an unfinished training is here; give --resume, or another --out")
    with held(folder), open_run_tracker(run, console, fold=fold) as tracker:
        training, validation = run_fold_cases(run, fold, console)
        track_data(tracker, run, training, validation)
        task = _task(run, fold, training, validation)
        counts = f"{len(training)} cases to train on, {len(validation)} held out"
        console.note(f"fold {fold}: {counts}; {describe(run.hardware)}")
        result = train(task, run.hardware, _Observer(console, tracker, fold), resume=resume)
        _save(run, fold, result)
        levels = air_levels(training, run.plan.patch_shape)
        set_air(folder / BUNDLE, None if levels is None else Air(levels=levels))
        report = score_fold(run, fold, [case.case_id for case in validation], console)
        if task.settings.inspect_every is not None:
            try:
                _draw_levels(run, fold, task, tracker)
            except PlanError as error:  # pictures are not worth a fold that is trained and scored
                console.note(f"fold {fold}: no pictures of its levels: {error}")
        _finish(run, fold, result, report, tracker)
    return report


def help_train(run: Run, fold: int) -> None:
    """Take a share of every update of a fold that another process trains; nothing is written or told here."""
    training, validation = run_fold_cases(run, fold, None)
    observer = _Observer(Silence(), null_tracker(), fold)
    train(_task(run, fold, training, validation), run.hardware, observer, resume=True)


def write_whole_report(run: Run, report: Report) -> list[Path]:
    """Write the out-of-fold report of a run; gives its page, then the pictures on it.

    Raises:
        RunError: a file cannot be written.
    """
    write_report(run.folder, report)
    dice_distribution(report, run.folder / "dice.png")
    return write_run_page(run, run.folder, report)


class _Observer:
    """Passes what training tells to the console and the tracker."""

    def __init__(self, console: Console, tracker: Tracker, fold: int) -> None:
        self._console, self._tracker, self._fold = console, tracker, fold

    def progress(self, step: int, steps: int, loss: float) -> None:
        self._console.progress(f"training fold {self._fold}", step, steps, f"loss {loss:.3f}")

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        self._tracker.metrics(values, step)
        dice = {k.removeprefix("dice/"): v for k, v in values.items() if k.startswith("dice/")}
        if dice:
            self._console.note(f"step {step}: Dice " + ", ".join(f"{k} {v:.3f}" for k, v in dice.items()))

    def note(self, message: str) -> None:
        self._console.note(message)


def _task(run: Run, fold: int, training: Sequence[PreparedCase], validation: Sequence[PreparedCase]) -> TrainingTask:
    return TrainingTask(
        plan=run.plan,
        schema=run.dataset.manifest.labels,
        training=training,
        validation=validation,
        settings=run.config.train,
        augment=run.config.augment,
        loss=run.config.loss,
        tile_step=run.config.predict.tile_step,
        folder=run.fold_folder(fold),
    )


def _save(run: Run, fold: int, result: TrainingResult) -> None:
    facts = BundleFacts(
        name=run.config.name,
        fold=fold,
        mirror=run.config.predict.mirror is True,
        tile_step=run.config.predict.tile_step,
        plan=run.plan,
        schema=run.dataset.manifest.labels,
        config_yaml=public_yaml(run.config, run.fold_folder(fold) / BUNDLE),
        provenance={
            **provenance_tags(),
            "device": describe(run.hardware),
            "steps": result.steps,
            "seconds": round(result.elapsed_s, 1),
        },
    )
    save_bundle(run.fold_folder(fold) / BUNDLE, result.weights, facts)


def _draw_levels(run: Run, fold: int, task: TrainingTask, tracker: Tracker) -> None:
    """What flows through the finished network, in the patch that was looked at while it learnt."""
    folder = run.fold_folder(fold)
    bundle = load_bundle(folder / BUNDLE, run.hardware.torch_device())
    for picture in write_pictures(folder / INSPECTION, bundle, validation_window(task)):
        tracker.artifact(picture, INSPECTION)


def _finish(run: Run, fold: int, result: TrainingResult, report: Report, tracker: Tracker) -> None:
    folder = run.fold_folder(fold)
    learning_curves(read_history(folder / HISTORY), folder / "curves.png")
    for name in ("curves.png", HISTORY):
        tracker.artifact(folder / name)
    tell_fold(run, fold, report, tracker, step=result.steps)
    note_done(run, fold, report, steps=result.steps, seconds=round(result.elapsed_s, 1))
    discard_checkpoints(folder)
