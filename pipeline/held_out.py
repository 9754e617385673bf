"""The cases that a fold's model never saw: predicted on their own grids and scored, and those of all folds together.

Where the config leaves it open whether mirrored passes are taken, they are predicted both ways; the bundles are told.
Then they are asked whether dark windows may be taken for air (`air_proof`).
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from pipeline.air_proof import prove_air
from pipeline.bundle import is_mirrored, load_bundle, set_mirror
from pipeline.confidence_files import write_confidence
from pipeline.console import Console
from pipeline.errors import RunError, VolsegError
from pipeline.evaluate import evaluate_files
from pipeline.export import Source, export
from pipeline.failures import Failure
from pipeline.files import write_json, write_text
from pipeline.manifest import Case, Dataset
from pipeline.mirroring import weigh_mirroring
from pipeline.predict import Model, PredictSettings, predict
from pipeline.quality import read_quality, write_quality_table
from pipeline.references import SCHEMA_FILE
from pipeline.report_values import REPORT_CSV, REPORT_JSON, Mirroring, Report, read_report
from pipeline.run_page import write_run_page
from pipeline.runs import BUNDLE, VALIDATION, Run, tell_set_aside
from pipeline.summary import summarise
from pipeline.threshold_effects import KEPT
from transforms.volume import read_volume

PLAIN_JSON, MIRRORED_JSON = "report_plain.json", "report_mirrored.json"
"""The same cases in one pass and in mirrored ones, where both were tried."""

SET_ASIDE = "set_aside_predictions.json"


def score_fold(run: Run, fold: int, case_ids: Sequence[str], console: Console) -> Report:
    """Predict held-out cases with the fold's bundle on their own grids, write the label maps and score them."""
    folder = run.fold_folder(fold)
    if _is_open(run):
        report = _score_both_ways(run, fold, case_ids, console)
    else:
        report = _score(run, fold, case_ids, console, target=folder / VALIDATION, mirror=None)
    write_report(folder, report)
    prove_air(run, fold, case_ids, console)
    return report


def agree_on_mirroring(run: Run, folds: Sequence[int], console: Console) -> None:
    """Where it was left open, let the cases of all these folds decide together.

    Folds that decided otherwise by themselves are predicted again, with report and page. A bundle is told last, so that
    what is cut short is done again by the next call.
    """
    found = _weighed(run, folds)
    if found is None:
        return
    console.note(found.sentence)
    for fold in folds:
        bundle, case_ids = run.fold_folder(fold) / BUNDLE, _predicted(run, fold)
        if is_mirrored(bundle) != found.worth_it:
            _score_again(run, fold, case_ids, found, console)
        set_mirror(bundle, found.worth_it, found.to_json())
        prove_air(run, fold, case_ids, console)


def out_of_fold_report(run: Run, folds: Sequence[int]) -> Report:
    """Every case scored by the model that never saw it, all folds together."""
    reports = [read_report(run.fold_folder(fold) / REPORT_JSON) for fold in folds]
    whole = summarise(
        [case for report in reports for case in report.cases],
        settings=run.config.evaluate,
        failures=[failure for report in reports for failure in report.failures],
        missing_predictions=sorted(case_id for report in reports for case_id in report.missing_predictions),
        extra_predictions=sorted(case_id for report in reports for case_id in report.extra_predictions),
    )
    explanations = tuple(explanation for report in reports for explanation in report.explanations)
    return whole.model_copy(update={"explanations": explanations, "mirroring": _weighed(run, folds)})


def write_report(folder: Path, report: Report) -> None:
    """As JSON and CSV, of a fold or of all."""
    write_json(folder / REPORT_JSON, report.to_json())
    write_text(folder / REPORT_CSV, report.to_csv())


def _is_open(run: Run) -> bool:
    return run.config.predict.mirror == "auto" and bool(run.plan.mirror_axes)


def _weighed(run: Run, folds: Sequence[int]) -> Mirroring | None:
    """What the cases of these folds say of mirrored passes; None where they were not asked."""
    folders = [run.fold_folder(fold) for fold in folds]
    if not _is_open(run) or not all((folder / MIRRORED_JSON).is_file() for folder in folders):
        return None
    plain, mirrored = (
        [case for folder in folders for case in read_report(folder / name).cases]
        for name in (PLAIN_JSON, MIRRORED_JSON)
    )
    return weigh_mirroring(plain, mirrored, run.config.evaluate)


def _score_both_ways(run: Run, fold: int, case_ids: Sequence[str], console: Console) -> Report:
    """Of the way that is worth its time by these cases; the bundle is told which."""
    folder = run.fold_folder(fold)
    target, other = folder / VALIDATION, folder / f"{VALIDATION}_mirrored"
    plain = _score(run, fold, case_ids, console, target=target, mirror=False)
    mirrored = _score(run, fold, case_ids, console, target=other, mirror=True)
    write_json(folder / PLAIN_JSON, plain.to_json())
    write_json(folder / MIRRORED_JSON, mirrored.to_json())
    found = weigh_mirroring(plain.cases, mirrored.cases, run.config.evaluate)
    console.note(f"fold {fold}: {found.sentence}")
    if found.worth_it:
        _put_in_place(other, target)
    else:
        shutil.rmtree(other)
    set_mirror(folder / BUNDLE, found.worth_it, found.to_json())
    return (mirrored if found.worth_it else plain).model_copy(update={"mirroring": found})


def _predicted(run: Run, fold: int) -> list[str]:
    """The cases that were asked of a fold; those whose prediction failed too: they are not to vanish."""
    plain = read_report(run.fold_folder(fold) / PLAIN_JSON)
    case_ids = [case.case_id for case in plain.cases] + [failure.case_id for failure in plain.failures]
    return case_ids + list(plain.missing_predictions)


def _score_again(run: Run, fold: int, case_ids: Sequence[str], found: Mirroring, console: Console) -> None:
    """The way that the fold did not choose by itself; its label maps, report and page take the place of the others."""
    folder = run.fold_folder(fold)
    again = folder / f"{VALIDATION}_again"
    (folder / SET_ASIDE).unlink(missing_ok=True)
    report = _score(run, fold, case_ids, console, target=again, mirror=found.worth_it)
    _put_in_place(again, folder / VALIDATION)
    report = report.model_copy(update={"mirroring": found})
    write_report(folder, report)
    write_run_page(run, folder, report)


def _put_in_place(source: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    source.rename(target)


def _score(
    run: Run, fold: int, case_ids: Sequence[str], console: Console, *, target: Path, mirror: bool | None
) -> Report:
    """The label maps go to `target`, in place of what is there; `mirror` None is as the bundle says."""
    folder = run.fold_folder(fold)
    model = Model((load_bundle(folder / BUNDLE, run.hardware.torch_device()),))
    cases = [case for case in run.dataset.manifest.cases if case.case_id in set(case_ids)]
    shutil.rmtree(target, ignore_errors=True)
    failures = []
    for done, case in enumerate(cases, start=1):
        try:
            _predict_case(run, model, case, target, mirror=model.mirror if mirror is None else mirror)
        except RunError:
            raise
        except VolsegError as error:
            failures.append(Failure(case.case_id, str(error)))
        console.progress("predicting held-out cases", done, len(cases))
    if failures:
        tell_set_aside(folder / SET_ASIDE, failures, console)
    write_text(target / SCHEMA_FILE, run.dataset.manifest.labels.model_dump_json(indent=2) + "\n")
    write_quality_table(target, read_quality(target))
    return evaluate_files(target, _part(run, fold, case_ids), settings=run.config.evaluate, allow_missing=True)


def _predict_case(run: Run, model: Model, case: Case, target: Path, *, mirror: bool) -> None:
    volumes = [None if path is None else read_volume(path) for path in run.dataset.channel_paths(case)]
    settings = PredictSettings(mirror, estimate=True, keep_scores=KEPT, postprocess=False)
    segmentation = predict(model, volumes, settings=settings, device=run.hardware.torch_device())
    source = Source(next(volume for volume in volumes if volume is not None))
    export(segmentation, formats=["nifti"], out=target, name=case.case_id, source=source)
    if segmentation.confidence is not None:
        write_confidence(target, case.case_id, segmentation.confidence, segmentation.geometry)
    # The figures of reading back are for results that leave the house.
    (target / f"{case.case_id}.verification.json").unlink(missing_ok=True)


def _part(run: Run, fold: int, case_ids: Sequence[str]) -> Dataset:
    """The dataset with the held-out cases alone, each told its fold."""
    wanted = set(case_ids)
    cases = tuple(c.model_copy(update={"fold": fold}) for c in run.dataset.manifest.cases if c.case_id in wanted)
    return run.dataset.model_copy(update={"manifest": run.dataset.manifest.model_copy(update={"cases": cases})})
