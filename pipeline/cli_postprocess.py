"""`volseg postprocess`: what is done to finished label maps, chosen for a cross-validation that is there already."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pipeline.cli_console import TerminalConsole
    from pipeline.runs import Run


def choose_postprocessing(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a cross-validation with finished folds.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be chosen; nothing is written.")] = False,
    none: Annotated[bool, typer.Option("--none", help="Take the post-processing out of the folds' bundles.")] = False,
    root: Annotated[Path | None, typer.Option("--root", help="Folder that the manifest's paths start from.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything that was tried as JSON.")] = None,
) -> None:
    """Choose post-processing on out-of-fold predictions, where it evidently helps, and put it into the bundles."""
    from pipeline.cli_console import TerminalConsole
    from pipeline.cli_evaluate import show_postprocessing
    from pipeline.crossval import write_whole_report
    from pipeline.errors import RunError
    from pipeline.files import write_json
    from pipeline.held_out import out_of_fold_report
    from pipeline.postprocess_run import find_postprocessing, store_postprocessing

    console = TerminalConsole()
    run = _opened(folder, root, console)
    folds = [fold for fold in range(run.folds.count) if run.is_done(fold)]
    if not folds:
        raise RunError(f"{folder}: no fold is finished; run `volseg crossval` first")
    if none:
        store_postprocessing(run, folds, None)
        print(f"no post-processing from now on in the bundles of {_listed(folds)}")
        return
    report = out_of_fold_report(run, folds)
    found = find_postprocessing(run, report, console)
    console.close()
    show_postprocessing(found)
    if json_file is not None:
        write_json(json_file, found.model_dump(mode="json"))
    if dry_run:
        print("nothing was written (--dry-run)")
        return
    store_postprocessing(run, folds, found.chosen)
    page = write_whole_report(run, report.model_copy(update={"postprocessing": found}))
    print(f"written to the bundles of {_listed(folds)}\nreport: {page}")


def _opened(folder: Path, root: Path | None, console: TerminalConsole) -> Run:
    from pipeline.config import load_config
    from pipeline.errors import RunError
    from pipeline.runs import CONFIG, DATASET, open_run

    if not (folder / DATASET).is_file():
        raise RunError(f"{folder}: not the folder of a cross-validation (no {DATASET} in it)")
    # What the training ran on need not be here.
    overrides = ["train.device=cpu", *([] if root is None else [f"data.root={root.resolve()}"])]
    return open_run(load_config(folder / CONFIG, overrides), folder, console)


def _listed(folds: list[int]) -> str:
    return f"fold{'s' if len(folds) > 1 else ''} {', '.join(map(str, folds))}"
