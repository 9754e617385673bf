"""`volseg evaluate`, and how a report is shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.cli_console import TerminalConsole, show_table
from pipeline.errors import ConfigError
from pipeline.files import write_json, write_text

if TYPE_CHECKING:
    from pipeline.config import EvaluateConfig
    from pipeline.postprocessing import Found
    from pipeline.report_values import Report


@dataclass(frozen=True)
class Wishes:
    """What is asked for on the command line: files to write, tolerances as MM or LABEL=MM, labels with lesions."""

    json_file: Path | None = None
    csv_file: Path | None = None
    html_file: Path | None = None
    tolerances: Sequence[str] = ()
    lesions: Sequence[str] = ()
    allow_missing: bool = False


def evaluate_paths(
    predictions: Path, references: Path, root: Path | None, *, wishes: Wishes, console: TerminalConsole
) -> bool:
    """True when every case could be scored."""
    from pipeline.evaluate import evaluate_files
    from pipeline.manifest import load_dataset

    settings = settings_of(wishes)
    report = evaluate_files(
        predictions,
        references if root is None else load_dataset(references, root),
        settings=settings,
        allow_missing=wishes.allow_missing,
        progress=lambda done, total: console.progress("scoring", done, total),
    )
    console.close()
    if wishes.json_file:
        write_json(wishes.json_file, report.to_json())
    if wishes.csv_file:
        write_text(wishes.csv_file, report.to_csv())
    if wishes.html_file:
        from pipeline.report_page import RunFacts, write_report_page

        write_report_page(wishes.html_file, report, RunFacts(predictions.name))
    show_report(str(predictions), report)
    for failure in report.failures:
        console.note(f"not scored: {failure.case_id}: {failure.reason}")
    if report.missing_predictions:
        count = len(report.missing_predictions)
        console.note(f"{count} of {count + len(report.cases)} references had no prediction; no figure knows of them")
    return not report.failures


def settings_of(wishes: Wishes) -> EvaluateConfig:
    """The settings of an evaluation outside of a run.

    Raises:
        ConfigError: a tolerance that is neither MM nor LABEL=MM.
    """
    from pipeline.config import EvaluateConfig

    given: dict[str, float] = {}
    for text in wishes.tolerances:
        name, _, number = text.rpartition("=")
        given[name] = _millimetres(text, number)
    common = given.pop("", EvaluateConfig().tolerance_mm)
    return EvaluateConfig(tolerance_mm=common, tolerances_mm=given or None, lesions=tuple(wishes.lesions))


def show_report(title: str, report: Report) -> None:
    """The tables of a report on standard output."""
    from pipeline.expectation import sentence_of
    from pipeline.report_tables import tables

    for table in tables(report):
        show_table(f"{table.title}, {title}" if table.title == "Dice" else table.title, table.rows)
        print()
    if (sentence := sentence_of(report.expectations)) is not None:
        print(sentence)
    if report.mirroring is not None:
        print(report.mirroring.sentence)
    if report.postprocessing is not None:
        show_postprocessing(report.postprocessing)
    for case in report.explanations:
        print(f"{case.case_id}: {case.sentence}; look at its header and label table before the model")


def show_postprocessing(found: Found) -> None:
    """What the choice of a post-processing found, on standard output."""
    from pipeline.postprocessing_tables import honesty, postprocessing_tables

    for table in postprocessing_tables(found):
        show_table(table.title, table.rows)
        print()
    if note := honesty(found):
        print(note)
    print(f"post-processing: {found.note}")


def _millimetres(text: str, number: str) -> float:
    try:
        value = float(number)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise ConfigError(f"--tolerance {text}: expected millimetres, as 2 or Mandible=1.5")
    return value
