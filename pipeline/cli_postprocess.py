"""`volseg postprocess`: what is done to finished label maps, chosen for a cross-validation that is there already."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pipeline.cli_console import TerminalConsole
    from pipeline.postprocessing import Found
    from pipeline.runs import Run


def choose_postprocessing(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a cross-validation with finished folds.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be chosen; nothing is written.")] = False,
    none: Annotated[bool, typer.Option("--none", help="Have none, now and when the run goes on.")] = False,
    root: Annotated[Path | None, typer.Option("--root", help="Folder that the manifest's paths start from.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything that was tried as JSON.")] = None,
) -> None:
    """Choose post-processing on out-of-fold predictions, where it evidently helps, and put it into the bundles.

    Folds that were trained one by one first agree on mirrored passes; those that decided otherwise are predicted again.
    """
    from pipeline.cli_console import TerminalConsole
    from pipeline.cli_evaluate import show_postprocessing
    from pipeline.errors import ConfigError, RunError
    from pipeline.files import write_json
    from pipeline.held_out import out_of_fold_report
    from pipeline.postprocess_run import find_postprocessing

    if none and dry_run:
        raise ConfigError("--none and --dry-run: nothing would be tried, so there is nothing to show; give one of them")
    console = TerminalConsole()
    run = _opened(folder, root, console)
    folds = [fold for fold in range(run.folds.count) if run.is_done(fold)]
    if not folds:
        raise RunError(f"{folder}: no fold is finished; run `volseg crossval` first")
    if dry_run:
        found = find_postprocessing(run, out_of_fold_report(run, folds), console)
        last = "nothing was written (--dry-run)"
    else:
        found, page = _written(run, folds, console, wanted=not none)
        last = f"written to the bundles of {_listed(folds)}\nreport: {page}"
    console.close()
    show_postprocessing(found)
    if json_file is not None:
        write_json(json_file, found.model_dump(mode="json"))
    print(last)


def _written(run: Run, folds: list[int], console: TerminalConsole, *, wanted: bool) -> tuple[Found, Path]:
    """What is now in the bundles and the report, and the page."""
    from pipeline.crossval import write_whole_report
    from pipeline.held_out import agree_on_mirroring, out_of_fold_report
    from pipeline.postprocess_run import settle_postprocessing, want_postprocessing
    from pipeline.tracked_results import tell_folds_again, tell_whole_again

    want_postprocessing(run, wanted)
    agree_on_mirroring(run, folds, console)
    report = out_of_fold_report(run, folds)
    found = settle_postprocessing(run, folds, report, console)
    report = report.model_copy(update={"postprocessing": found})
    files = write_whole_report(run, report)
    tell_whole_again(run, folds, report, console, files=files)
    tell_folds_again(run, folds, console)
    return found, files[0]


def _opened(folder: Path, root: Path | None, console: TerminalConsole) -> Run:
    from pipeline.config import load_config
    from pipeline.errors import RunError
    from pipeline.runs import CONFIG, DATASET, open_run

    if not (folder / DATASET).is_file():
        raise RunError(f"{folder}: not the folder of a cross-validation (no {DATASET} in it)")
    # What the training ran on need not be here.
    overrides = ["train.device=auto", *([] if root is None else [f"data.root={root.resolve()}"])]
    return open_run(load_config(folder / CONFIG, overrides), folder, console)


def _listed(folds: list[int]) -> str:
    return f"fold{'s' if len(folds) > 1 else ''} {', '.join(map(str, folds))}"
