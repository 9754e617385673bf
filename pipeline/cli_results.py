"""The subcommands that look at results: `compare`, `promote`, `runs` and `report`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from pipeline.compare import Comparison, Difference
    from pipeline.report_values import Report
    from pipeline.tracking.queries import TrackedRun

URI_HELP = (
    "MLflow server or store; default: mlflow.db in the folder of the runs. User and password of a server: "
    "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or ~/.mlflow/credentials."
)
Uri = Annotated[str | None, typer.Option("--uri", help=URI_HELP)]
RunsFolder = Annotated[Path, typer.Option("--runs", help="Folder of the runs.")]

RUNS = Path("runs")
"""Where runs are looked for unless another folder is named."""

RUN_PREFIX = "runs:/"


def compare_runs(
    a: Annotated[str, typer.Argument(metavar="RUN_A", help="A run folder, its report.json, or runs:/ID of MLflow.")],
    b: Annotated[str, typer.Argument(metavar="RUN_B", help="The same; B minus A is told.")],
    figure: Annotated[
        str, typer.Option("--figure", help="dice, surface_dice, hausdorff_95_mm, average_distance_mm, ...")
    ] = "dice",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the comparison as JSON.")] = None,
    uri: Uri = None,
    runs: RunsFolder = RUNS,
) -> None:
    """Say whether one of two evaluations of the same cases is better, by how much, and where."""
    from pipeline.cli_console import show_table
    from pipeline.compare import FIGURES, compare
    from pipeline.config import EvaluateConfig
    from pipeline.errors import ConfigError
    from pipeline.files import write_json

    if figure not in FIGURES:
        raise ConfigError(f"--figure: no figure '{figure}' to compare; there are {', '.join(FIGURES)}")
    reports = [_report_of(text, uri, _named_folder(runs)) for text in (a, b)]
    found = compare(*reports, figure=figure, settings=EvaluateConfig())
    show_table(f"{figure}, B minus A, {found.overall.n_cases} shared cases", _rows(found))
    show_table("cases that changed most", [
        {"case": c.case_id, "A": c.value_a, "B": c.value_b, "B minus A": c.difference} for c in found.changed
    ])  # fmt: skip
    for name, ids in (("A", found.only_in_a), ("B", found.only_in_b)):
        if ids:
            print(f"{len(ids)} cases only in {name} are not compared")
    print(found.verdict)
    if json_file is not None:
        write_json(json_file, found.to_json())


def promote_run(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A tracked run's folder, or runs:/ID of MLflow.")],
    if_better: Annotated[
        bool, typer.Option("--if-better", help="Only on evidence, by the paired test of `compare`; else exit code 1.")
    ] = False,
    alias: Annotated[str, typer.Option("--alias", help="What to call the version.")] = "champion",
    model: Annotated[
        str | None, typer.Option("--model", metavar="NAME", help="Name in the registry; default: the dataset's.")
    ] = None,
    uri: Uri = None,
    runs: RunsFolder = RUNS,
) -> None:
    """Give the alias `champion` to a run's model in MLflow's registry."""
    from pipeline.promote import promote
    from pipeline.tracking import without_password
    from pipeline.tracking.registry import open_registry

    place, run_id = _tracked_run(run, uri, _named_folder(runs))
    with open_registry(place) as registry:
        outcome = promote(registry, run_id, alias=alias, model=model, if_better=if_better)
    print(outcome.told)
    if outcome.comparison is not None and not outcome.moved:
        raise typer.Exit(1)
    address = f"models:/{outcome.version.model}@{alias}"
    print(f"in Python: mlflow.set_tracking_uri('{without_password(place)}')")
    print(f"           mlflow.pyfunc.load_model('{address}').predict('study.nii.gz')")


def list_tracked(
    uri: Uri = None,
    runs: RunsFolder = RUNS,
    experiment: Annotated[str | None, typer.Option("--experiment", help="Only this experiment's.")] = None,
    sort: Annotated[str, typer.Option("--sort", help="started, minutes, name, or a metric's name.")] = "started",
    metric: Annotated[list[str] | None, typer.Option("--metric", help="A metric to show; may be repeated.")] = None,
    most: Annotated[int, typer.Option("--most", min=1, help="Rows that are shown.")] = 30,
    offline: Annotated[bool, typer.Option("--offline", help="Ask the run folders, not MLflow.")] = False,
) -> None:
    """List tracked runs, folds below their cross-validation, with their out-of-fold Dice; largest or newest first."""
    from pipeline.cli_console import show_table
    from pipeline.cli_run_rows import in_order, require_metrics, row_of

    found = _runs_in(uri, _named_folder(runs), experiment, offline=offline)
    require_metrics(found, metric or ())
    shown = metric or ["out_of_fold_dice/mean"]
    rows = in_order(found, sort)
    show_table("runs", [row_of(run, shown, offline=offline) for run in rows[:most]])
    if len(rows) > most:
        print(f"{len(rows) - most} more; give --most")
    if not rows:
        print("no runs yet")


def _named_folder(runs: Path) -> Path:
    """The folder of the runs, which has to be there if it was named, even where RUN alone would have been enough."""
    from pipeline.errors import RunError

    if runs != RUNS and not runs.is_dir():
        raise RunError(f"--runs {runs}: no such folder; expected the folder that holds the runs and their mlflow.db")
    return runs


def _runs_in(uri: str | None, runs: Path, experiment: str | None, *, offline: bool) -> list[TrackedRun]:
    from pipeline.errors import ConfigError, RunError
    from pipeline.tracking import embedded_store
    from pipeline.tracking.offline import list_folders
    from pipeline.tracking.queries import list_runs

    if not offline:
        return list_runs(uri or embedded_store(runs), experiment=experiment)
    if uri is not None:
        raise ConfigError("--offline asks the run folders alone; leave out --uri")
    found = [run for run in list_folders(runs) if experiment in (None, run.experiment)]
    if not found:
        raise RunError(f"{runs}: holds no run of an experiment named '{experiment}'")
    return found


def write_page(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, one of its folds, or a report.json.")],
    out: Annotated[Path | None, typer.Option("--out", help="The page; default: report.html beside the report.")] = None,
) -> None:
    """Write the page of an evaluation again: figures, every case, pictures, curves, plan, data, versions."""
    from pipeline.report_page import Picture, read_run_facts, write_report_page
    from pipeline.report_values import read_report

    file = _report_file(run)
    pictures = [
        Picture(f"{which.capitalize()} case", path.read_bytes())
        for which in ("worst", "median", "best")
        if (path := file.parent / f"overlay_{which}.png").is_file()
    ]
    target = out or file.with_suffix(".html")
    write_report_page(target, read_report(file), read_run_facts(file.parent), pictures=pictures)
    print(target)


def _report_of(text: str, uri: str | None, runs: Path) -> Report:
    from pipeline.report_values import REPORT_JSON, Report, read_report

    if not text.startswith(RUN_PREFIX):
        return read_report(_report_file(Path(text)))
    from pipeline.tracking import embedded_store
    from pipeline.tracking.queries import read_run_json

    run_id = text.removeprefix(RUN_PREFIX)
    return Report.from_json(read_run_json(uri or embedded_store(runs), run_id, REPORT_JSON))


def _tracked_run(text: str, uri: str | None, runs: Path) -> tuple[str, str]:
    """Store and id of a run that is given as a folder or by its id."""
    from pipeline.errors import RunError
    from pipeline.tracking import embedded_store, tracked_as

    if Path(text).is_dir():
        return tracked_as(Path(text), uri=uri)
    run_id = text.removeprefix(RUN_PREFIX)
    if not re.fullmatch(r"[0-9a-f]{32}", run_id):
        raise RunError(f"{text}: neither a folder nor the id of a run in MLflow (32 hexadecimal digits)")
    return uri or embedded_store(runs), run_id


def _report_file(path: Path) -> Path:
    from pipeline.errors import RunError
    from pipeline.report_values import REPORT_JSON

    file = path / REPORT_JSON if path.is_dir() else path
    if not file.is_file():
        raise RunError(f"{path}: no report of an evaluation there; give a finished run's folder or a report.json")
    return file


def _rows(found: Comparison) -> list[dict[str, Any]]:
    return [_row(row) for row in (*found.labels, found.overall)]


def _row(row: Difference) -> dict[str, Any]:
    interval = row.interval_95
    return {
        "label": row.label,
        "A": row.mean_a,
        "B": row.mean_b,
        "B minus A": row.difference,
        "95 %": None if interval is None else f"{interval[0]:+.3f} to {interval[1]:+.3f}",
        "p (Holm)": None if row.p_corrected is None else f"{row.p_corrected:.2g}",
        "wins": row.wins,
        "losses": row.losses,
    }
