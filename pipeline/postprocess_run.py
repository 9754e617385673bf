"""The post-processing of a cross-validation: tried on its out-of-fold predictions, and put into its folds' bundles."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.bundle import set_postprocessing
from pipeline.cleaning_cases import Cases, HeldOut
from pipeline.cleaning_choice import LEAST_PATIENTS, choose
from pipeline.cleaning_effects import candidates
from pipeline.confidence_files import scores_file
from pipeline.console import Console
from pipeline.files import explain_os_error, write_json
from pipeline.postprocessing import Action, FoldChoice, Found, PostProcessing, Tried, described
from pipeline.references import references_of_dataset
from pipeline.report_values import Report
from pipeline.runs import BUNDLE, VALIDATION, Run
from pipeline.threshold_effects import threshold_candidates

UNWANTED = "no_postprocessing.json"
"""In the folder of a run for which none is to be chosen."""

UNWANTED_NOTE = "none is wanted (`volseg postprocess RUN --none`); `volseg postprocess RUN` chooses one"

NO_SCORES = "thresholds were not tried: of these predictions no scores were kept"


def find_postprocessing(run: Run, report: Report, console: Console) -> Found:
    """Choose on the cases of an out-of-fold report, and say what it does to cases that it was not chosen on.

    For that it is chosen once more for each fold, on the cases of the others.

    Raises:
        VolumeError: a prediction or a reference cannot be read.
        GeometryMismatch: they lie on different grids.
    """
    cases = Cases(held_out_cases(run, report), run.dataset.manifest.labels, run.config.evaluate, console)
    patients = {case.reference.patient_id for case in cases.held_out}
    folds = sorted({case.fold for case in cases.held_out})
    if len(folds) < 2 or len(patients) < LEAST_PATIENTS:
        few = f"{_count(len(patients), 'patient')} in {_count(len(folds), 'finished fold')}"
        note = f"nothing chosen: {few}; at least {LEAST_PATIENTS} patients in two folds are needed"
        return Found(cases=len(cases.held_out), patients=len(patients), note=note)
    return _found(cases, folds, len(patients))


def store_postprocessing(run: Run, folds: Sequence[int], wanted: PostProcessing | None) -> None:
    """Put it into the bundle of each of these folds, or take out what is there; weights are left as they are.

    Raises:
        BundleError: a fold has no bundle.
        RunError: it cannot be written.
    """
    for fold in folds:
        set_postprocessing(run.fold_folder(fold) / BUNDLE, wanted)


def want_postprocessing(run: Run, wanted: bool) -> None:
    """Say whether post-processing is to be chosen for this run, now and by every later cross-validation of it.

    Raises:
        RunError: it cannot be written down.
    """
    file = run.folder / UNWANTED
    try:
        if wanted:
            file.unlink(missing_ok=True)
        else:
            write_json(file, {"postprocessing": UNWANTED_NOTE})
    except OSError as error:
        raise explain_os_error(error, file) from error


def settle_postprocessing(run: Run, folds: Sequence[int], report: Report, console: Console) -> Found:
    """What is found of post-processing, which from now on is in the bundles of these folds; nothing is tried where none
    is wanted.

    Raises:
        VolsegError: as for `find_postprocessing` and `store_postprocessing`.
    """
    if (run.folder / UNWANTED).is_file():
        found = Found(cases=report.overall.n_cases, patients=report.overall.n_patients, note=UNWANTED_NOTE)
    else:
        found = find_postprocessing(run, report, console)
    store_postprocessing(run, folds, found.chosen)
    return found


def with_postprocessing(run: Run, folds: Sequence[int], report: Report, console: Console) -> Report:
    """The report with what was found of post-processing (see `settle_postprocessing`)."""
    found = settle_postprocessing(run, folds, report, console)
    console.note(f"post-processing: {found.note}")
    return report.model_copy(update={"postprocessing": found})


def held_out_cases(run: Run, report: Report) -> tuple[HeldOut, ...]:
    """Those of a report that have a fold, with their files."""
    references = {reference.case_id: reference for reference in references_of_dataset(run.dataset)}
    found = []
    for case in report.cases:
        if case.fold is not None and case.case_id in references:
            folder = run.fold_folder(case.fold) / VALIDATION
            map_file, scores = folder / f"{case.case_id}.nii.gz", scores_file(folder, case.case_id)
            found.append(HeldOut(case.fold, map_file, scores, references[case.case_id]))
    return tuple(found)


def _found(cases: Cases, folds: Sequence[int], patients: int) -> Found:
    actions = candidates(cases.schema)
    # Runs that were begun before scores were kept have none.
    has_scores = all(case.scores.is_file() for case in cases.held_out)
    if has_scores:
        actions += threshold_candidates(cases.schema)
    judged = cases.judge(actions)
    trials = cases.trials(judged, actions)
    chosen, tried = choose(actions, judged, trials=trials, settings=cases.settings)
    choices = []
    for fold in folds:
        others = [row for row, case in enumerate(judged) if case.fold != fold]
        theirs: tuple[Action, ...] = ()
        if len({judged[row].patient_id for row in others}) >= LEAST_PATIENTS:
            some = [judged[row] for row in others]
            theirs, _ = choose(actions, some, trials=trials.of(others), settings=cases.settings)
        choices.append(FoldChoice(fold=fold, actions=theirs))
    is_anything = bool(chosen) or any(choice.actions for choice in choices)
    return Found(
        cases=len(judged),
        patients=patients,
        note=_note(tried) + ("" if has_scores else f"; {NO_SCORES}"),
        chosen=PostProcessing(actions=chosen) if chosen else None,
        tried=tried,
        folds=tuple(choices),
        effects=cases.measure(chosen, {choice.fold: choice.actions for choice in choices}) if is_anything else (),
    )


def _note(tried: Sequence[Tried]) -> str:
    chosen = [row.action for row in tried if row.is_chosen]
    if chosen:
        return f"chosen: {described(chosen)}"
    moved = sum(row.p_value is not None for row in tried)
    if not moved:
        return f"nothing chosen: none of {len(tried)} actions changes the Dice of any case"
    return f"nothing chosen: of {len(tried)} actions {moved} change a case; none helps beyond doubt and harms nobody"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
