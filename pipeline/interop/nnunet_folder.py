"""What lies in the folder of a trained nnU-Net v2 model: plans, dataset, and a checkpoint a fold.

Source: MIC-DKFZ/nnUNet, documentation/how_to_use_nnunet.md, and nnUNetPredictor.initialize_from_trained_model_folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import BundleError

PLANS, DATASET = "plans.json", "dataset.json"
CHECKPOINTS = ("checkpoint_final.pth", "checkpoint_best.pth")
"""At the end of a training, and where its validation was best so far."""
ALL = "all"
"""The name of the fold that was trained on every case."""

_DATASET_KEYS = ("channel_names", "modality", "labels", "regions_class_order", "file_ending", "numTraining")
_NAMES_SHOWN = 8


@dataclass(frozen=True)
class TrainedFolder:
    """`plans` and `dataset` as they stand in the files; of `dataset` not its list of cases, which may name people."""

    path: Path
    plans: dict[str, Any]
    dataset: dict[str, Any]


def open_trained(folder: Path, configuration: str | None = None) -> TrainedFolder:
    """The trained model in `folder`, or the only one below it (of `configuration`, if that is given).

    Raises:
        BundleError: there is none or more than one, or a file cannot be read.
    """
    path = _trained_below(folder, configuration)
    dataset = _json(path / DATASET)
    return TrainedFolder(path, _json(path / PLANS), {key: dataset[key] for key in _DATASET_KEYS if key in dataset})


def checkpoints_of(trained: TrainedFolder, folds: Sequence[str] | None = None) -> dict[str, Path]:
    """By the name of the fold, its checkpoint: those of `folds`, or all numbered ones, or else that of fold all.

    Where `folds` does not say which, those whose training ended are taken, as nnU-Net's predictor does; only if none
    did, the best checkpoint of each. `unfinished` tells of it.

    Raises:
        BundleError: a fold has no checkpoint.
    """
    there = {
        fold: found
        for fold, path in _fold_folders(trained).items()
        if (found := next((path / name for name in CHECKPOINTS if (path / name).is_file()), None))
    }
    if folds is None:
        ended = [fold for fold, path in there.items() if path.name == CHECKPOINTS[0]] or list(there)
        # As nnU-Net does: a model of all cases is no fold of a cross-validation, and not averaged with them.
        folds = [name for name in ended if name != ALL] or ended
    if missing := [name for name in folds if name not in there]:
        known = ", ".join(there) or "none"
        raise BundleError(f"{trained.path}: no checkpoint of fold {', '.join(missing)}; folds that have one: {known}")
    if not folds:
        raise BundleError(f"{trained.path}: no fold_* with {' or '.join(CHECKPOINTS)} in it")
    return {name: there[name] for name in folds}


def unfinished(trained: TrainedFolder, chosen: Mapping[str, Path], *, asked: bool) -> str | None:
    """One line of the folds whose training did not end: taken at their best, or left out; None if there are none.

    `chosen` is what `checkpoints_of` gave. Folds that a user who `asked` for some left out are not spoken of.
    """
    final, best = CHECKPOINTS
    taken = [fold for fold, path in chosen.items() if path.name == best]
    folders = {} if asked else _fold_folders(trained)
    left = [f for f, path in folders.items() if f not in (*chosen, ALL) and not (path / final).is_file()]
    said = [f"fold {', '.join(taken)} taken from {best}"] if taken else []
    said += [f"fold {', '.join(left)} left out"] if left else []
    return f"{'; '.join(said)}: no {final} there, so the training did not end" if said else None


def _fold_folders(trained: TrainedFolder) -> dict[str, Path]:
    folders = {path.name.removeprefix("fold_"): path for path in sorted(trained.path.glob("fold_*"))}
    return {fold: path for fold, path in folders.items() if fold.isdecimal() or fold == ALL}


def _trained_below(folder: Path, configuration: str | None) -> Path:
    if (folder / PLANS).is_file():
        return folder
    # nnU-Net writes DATASET/TRAINER__PLANS__CONFIGURATION.
    found = sorted({path.parent for depth in ("*", "*/*") for path in folder.glob(f"{depth}/{PLANS}")})
    models = [path for path in found if (path / DATASET).is_file() and any(path.glob("fold_*"))]
    chosen = [path for path in models if configuration in (None, path.name.rpartition("__")[2])]
    if len(chosen) == 1:
        return chosen[0]
    names = ", ".join(str(path.relative_to(folder)) for path in models[:_NAMES_SHOWN])
    if not models:
        raise BundleError(f"{folder}: no trained nnU-Net v2 model (no {PLANS} in it, nor in a folder below)")
    what = "several trained models" if chosen else f"no model of configuration '{configuration}'"
    raise BundleError(f"{folder}: {what}; give one of {names}")


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BundleError(f"{path}: no such file; a trained nnU-Net v2 model has {PLANS} and {DATASET}") from error
    except (OSError, ValueError, RecursionError) as error:  # of deep nesting and of endless numbers, too
        raise BundleError(f"{path}: cannot be read as JSON ({type(error).__name__})") from error
    if not isinstance(found, dict):
        raise BundleError(f"{path}: found {type(found).__name__}, expected a JSON object")
    return found
