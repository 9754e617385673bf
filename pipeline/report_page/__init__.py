"""One HTML page that says how good a run is, where it is wrong, and what it was: one file, no network needed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.files import write_text
from pipeline.report_page import sections
from pipeline.report_page.document import document
from pipeline.report_page.facts import Picture, RunFacts, read_run_facts
from pipeline.report_values import Report

__all__ = ["Picture", "RunFacts", "read_run_facts", "write_report_page"]


def write_report_page(
    target: Path,
    report: Report,
    run: RunFacts,
    *,
    pictures: Sequence[Picture] = (),
) -> None:
    """Write the page of an evaluation or a cross-validation. Case ids are shown, patients' never.

    Raises:
        RunError: the file cannot be written.
    """
    write_text(target, page(report, run, pictures=pictures))


def page(report: Report, run: RunFacts, *, pictures: Sequence[Picture] = ()) -> str:
    """The HTML text; the same for the same values."""
    parts = [
        ("figures", "Figures", sections.figures(report)),
        ("cases", "Every case", sections.distributions(report)),
        ("pictures", "Worst, median and best", sections.pictures(pictures)),
        ("worst", "Cases to look at first", sections.worst_cases(report)),
        ("volumes", "Agreement of volumes", sections.volumes(report)),
        ("mirroring", "Mirrored passes", sections.mirroring(report)),
        ("postprocessing", "Post-processing", sections.postprocessing(report)),
        ("expected", "What the model expected", sections.expectations(report)),
        ("curves", "Learning curves", sections.curves(run)),
        ("plan", "The plan, and why", sections.plan(run)),
        ("data", "Data", sections.data(run, report)),
        ("versions", "Versions", sections.versions(run, report)),
    ]
    return document(run.name, run.name, _lead(report), tiles=sections.tiles(report), sections=parts)


def _lead(report: Report) -> str:
    folds = {case.fold for case in report.cases if case.fold is not None}
    if not folds:
        return "Evaluation of predictions against references"
    if len(folds) == 1:
        return f"Fold {min(folds)}: every case scored by a model that never saw it"
    return f"Cross-validation of {len(folds)} folds: every case scored by the model that never saw it"
