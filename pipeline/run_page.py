"""Pictures and page of a run: its worst, median and best case with both outlines, and all else that it is."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

from pipeline.bad_cases import mean_dice
from pipeline.bundle import load_bundle
from pipeline.export.overlay import write_overlay
from pipeline.predict import Model
from pipeline.report_page import Picture, read_run_facts, write_report_page
from pipeline.report_values import CaseScores, Report
from pipeline.runs import BUNDLE, VALIDATION, Run
from pipeline.segmentation import Segmentation
from transforms.volume import read_label, read_volume

PAGE = "report.html"


def write_run_page(run: Run, folder: Path, report: Report) -> list[Path]:
    """Draw the worst, the median and the best case beside the page of `report` in `folder`; gives all files.

    `folder` is the run's or one fold's.

    Raises:
        RunError: a file cannot be written.
    """
    pictures, files = [], []
    for which, case in chosen_cases(report).items():
        target = folder / f"overlay_{which}.png"
        if draw_case(run, case, target):
            files.append(target)
            pictures.append(Picture(f"{which.capitalize()} case: {_told(case)}", target.read_bytes()))
    facts = read_run_facts(folder, command=f"{again(run, folder)}  # config.yaml of the run's folder")
    write_report_page(folder / PAGE, report, facts, pictures=pictures)
    return [folder / PAGE, *files]


def again(run: Run, folder: Path) -> str:
    """The command that does the run, or the fold in `folder`, once more, wherever its config and its data are by then.

    Words in capitals are to be filled in: the config's paths start from its own folder, and a folder that holds the
    run already keeps it as it is.
    """
    stage = "crossval config.yaml" if folder == run.folder else f"train config.yaml --fold {folder.name[5:]}"
    data = run.config.data
    paths = {"manifest": f"PATH/{data.manifest.name}"}
    paths |= {} if data.root is None else {"root": "PATH"}
    paths |= {} if data.cache is None else {"cache": "null"}
    sets = " ".join(f"--set {shlex.quote(f'data.{key}={path}')}" for key, path in paths.items())
    return f"volseg {stage} {sets} --out ANOTHER_FOLDER"


def chosen_cases(report: Report) -> dict[str, CaseScores]:
    """The worst, the median and the best of the cases that were scored; fewer where there are fewer."""
    ranked = sorted(
        (case for case in report.cases if mean_dice(case) is not None),
        key=lambda case: (mean_dice(case) or 0.0, case.case_id),
    )
    if not ranked:
        return {}
    chosen = {"worst": ranked[0], "median": ranked[(len(ranked) - 1) // 2], "best": ranked[-1]}
    return {which: case for which, case in chosen.items() if which == "worst" or case is not ranked[0]}


def draw_case(run: Run, case: CaseScores, target: Path) -> bool:
    """Draw one held-out case with prediction and reference; False where it has no reference or no fold."""
    if case.fold is None:
        return False
    entry = next(c for c in run.dataset.manifest.cases if c.case_id == case.case_id)
    label_path = run.dataset.label_path(entry)
    if label_path is None:
        return False
    fold = run.fold_folder(case.fold)
    image = read_volume(run.dataset.image_paths(entry)[0])
    prediction, drawn = read_label(fold / VALIDATION / f"{case.case_id}.nii.gz"), read_label(label_path)
    reference = replace(drawn, voxels=run.dataset.annotation(entry).ids(drawn.voxels))
    algorithm = Model((load_bundle(fold / BUNDLE),)).algorithm
    found, expected = (
        Segmentation(v.voxels, v.geometry, run.dataset.manifest.labels, algorithm) for v in (prediction, reference)
    )
    write_overlay(target, found, image, reference=expected)
    return True


def _told(case: CaseScores) -> str:
    rows = ", ".join(f"{s.label} {s.dice:.3f}" for s in case.regions or case.labels if s.dice is not None)
    return f"{case.case_id}; Dice {rows}"
