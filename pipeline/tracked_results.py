"""What MLflow is told of results: of a fold when it is done, of all folds together, and again where something else was
settled for them since.

Folds are told of one by one, before they agree on mirrored passes and before post-processing is chosen on all of them.
A fold's `done.json` keeps a digest of what was told, so that what a kill left untold is told by the next call.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from pipeline.bundle import POSTPROCESSING, is_mirrored, read_air
from pipeline.console import Console
from pipeline.files import sha256_of_file, sha256_of_json, write_json
from pipeline.report_values import REPORT_CSV, REPORT_JSON, Report, read_report
from pipeline.run_note import headline, run_note
from pipeline.run_page import write_run_page
from pipeline.runs import BUNDLE, DONE, Run, read_done, tracking_uri
from pipeline.tracking import Busy, ModelCard, Tracker, amend_tracker, null_tracker

SETTLED = "settled"
"""In a fold's `done.json`."""


def tell_fold(run: Run, fold: int, report: Report, tracker: Tracker, *, step: int) -> None:
    """Figures after so many steps, report, page, pictures, note and bundle of a fold, whose page is drawn for it.

    Raises:
        RunError: a file cannot be written.
    """
    folder = run.fold_folder(fold)
    tracker.metrics(_figures(report), step=step)
    for name in (REPORT_JSON, REPORT_CSV):
        tracker.artifact(folder / name)
    _tell_page(tracker, run, folder, report, write_run_page(run, folder, report))
    tracker.model([folder / BUNDLE], _model_card(run, report, step=step))


def note_done(run: Run, fold: int, report: Report, *, steps: int, seconds: float) -> None:
    """Say that a fold is done, and what of it was told.

    Raises:
        RunError: it cannot be written.
    """
    done = {"steps": steps, "seconds": seconds, "dice": _headline(report), SETTLED: _settled(run.fold_folder(fold))}
    write_json(run.fold_folder(fold) / DONE, done)


def tell_whole(run: Run, folds: Sequence[int], report: Report, tracker: Tracker, *, files: Sequence[Path]) -> None:
    """The same of all finished folds together, whose model is registered once none is missing; `files` are the page and
    its pictures.

    Raises:
        RunError: the journal cannot be written.
    """
    tracker.metrics(_figures(report), step=0)
    for fold in folds:
        tracker.metrics(_of_fold(report, fold), step=fold)
    for name in (REPORT_JSON, REPORT_CSV, "dice.png"):
        tracker.artifact(run.folder / name)
    _tell_page(tracker, run, run.folder, report, files)
    if len(folds) == run.folds.count:
        card = replace(_model_card(run, report), register_as=run.dataset.manifest.name)
        tracker.model([run.fold_folder(fold) / BUNDLE for fold in folds], card)


def tell_folds_again(run: Run, folds: Sequence[int], console: Console) -> None:
    """Of these finished folds, tell those anew whose report or way of predicting is no longer what was told.

    Their runs in MLflow go on as they ended: the last value of a figure, each file and the newest model are the final
    ones. A fold that is being tracked at the moment is left to the next call.

    Raises:
        RunError: a fold's files cannot be read or written.
    """
    for fold in folds:
        folder = run.fold_folder(fold)
        done = read_done(folder)
        if done.get(SETTLED) == _settled(folder):
            continue
        report = read_report(folder / REPORT_JSON)
        try:
            with _amending(run, folder, console) as tracker:
                tell_fold(run, fold, report, tracker, step=done["steps"])
        except Busy as error:
            console.note(f"fold {fold}: MLflow shows what it was told before: {error}")
            continue
        note_done(run, fold, report, steps=done["steps"], seconds=done["seconds"])


def tell_whole_again(
    run: Run, folds: Sequence[int], report: Report, console: Console, *, files: Sequence[Path]
) -> None:
    """See `tell_whole`, for a cross-validation that is over. One that is at work tells its own results, and one with
    folds missing tells them when it goes on.

    Raises:
        RunError: the journal cannot be written.
    """
    if len(folds) < run.folds.count:
        return
    with suppress(Busy), _amending(run, run.folder, console) as tracker:
        tell_whole(run, folds, report, tracker, files=files)


def _amending(run: Run, folder: Path, console: Console) -> Tracker:
    if not run.config.tracking.enabled:
        return null_tracker()
    return amend_tracker(folder, uri=tracking_uri(run.config), on_warning=console.note)


def _settled(folder: Path) -> str:
    """A digest of a fold's report, and of what was settled of how its bundle predicts."""
    bundle = folder / BUNDLE
    air, cleaning = read_air(bundle), bundle / POSTPROCESSING
    return sha256_of_json(
        {
            "report": sha256_of_file(folder / REPORT_JSON),
            "mirror": is_mirrored(bundle),
            "air": air and air.model_dump(mode="json"),
            "postprocessing": sha256_of_file(cleaning) if cleaning.is_file() else None,
        }
    )


def _tell_page(tracker: Tracker, run: Run, folder: Path, report: Report, files: Sequence[Path]) -> None:
    page, *pictures = files
    tracker.artifact(page)
    for picture in pictures:
        tracker.artifact(picture, "overlays")
    tracker.note(run_note(run, folder, report, [picture.name for picture in pictures]))


def _model_card(run: Run, report: Report, step: int | None = None) -> ModelCard:
    """Of a fold's model after so many steps, or of all folds' together."""
    return ModelCard(
        patch_shape=run.plan.patch_shape,
        spacing_mm=run.plan.spacing_mm,
        channels=[channel.described for channel in run.plan.channels],
        labels=run.dataset.manifest.labels.names,
        metrics=_figures(report),
        step=step or 0,
        result=headline(report, is_fold=step is not None),
    )


def _headline(report: Report) -> dict[str, float]:
    rows = {f"out_of_fold_dice/{x.label}": x.mean for x in report.summaries} | {
        "out_of_fold_dice/mean": report.overall.mean
    }
    return {k: v for k, v in rows.items() if v is not None}


def _figures(report: Report) -> dict[str, float]:
    """The headline, with the surface figures by label and overall."""
    rows: dict[str, float | None] = {}
    for name in ("surface_dice", "hausdorff_95_mm"):
        for summary in report.summaries:
            found = summary.figure(name)
            rows[f"out_of_fold_{name}/{summary.label}"] = None if found is None else found.mean
        rows |= {f"out_of_fold_{name}/mean": f.mean for f in report.overall.figures if f.name == name}
    return _headline(report) | {k: v for k, v in rows.items() if v is not None}


def _of_fold(report: Report, fold: int) -> dict[str, float]:
    """Mean Dice of the labels within one fold, as a curve over the folds."""
    rows = {summary.label: summary.folds for summary in report.summaries} | {"mean": report.overall.folds}
    found = {label: mean.mean for label, folds in rows.items() for mean in folds if mean.fold == fold}
    return {f"dice_of_fold/{label}": mean for label, mean in found.items() if mean is not None}
