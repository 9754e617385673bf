"""What lies in the folder of a trained nnU-Net v2 model: plans, dataset, and a checkpoint a fold.

Source: MIC-DKFZ/nnUNet, documentation/how_to_use_nnunet.md, and nnUNetPredictor.initialize_from_trained_model_folder.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import BundleError

PLANS, DATASET = "plans.json", "dataset.json"
CHECKPOINTS = ("checkpoint_final.pth", "checkpoint_best.pth")
"""Of a fold, the first that is there counts."""
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

    Raises:
        BundleError: a fold has no checkpoint.
    """
    folders = {path.name.removeprefix("fold_"): path for path in sorted(trained.path.glob("fold_*"))}
    there = {
        fold: found
        for fold, path in folders.items()
        if fold.isdecimal() or fold == ALL
        if (found := next((path / name for name in CHECKPOINTS if (path / name).is_file()), None))
    }
    if folds is None:
        # As nnU-Net does: a model of all cases is no fold of a cross-validation, and not averaged with them.
        folds = [name for name in there if name != ALL] or list(there)
    if missing := [name for name in folds if name not in there]:
        known = ", ".join(there) or "none"
        raise BundleError(f"{trained.path}: no checkpoint of fold {', '.join(missing)}; folds that have one: {known}")
    if not folds:
        raise BundleError(f"{trained.path}: no fold_* with {' or '.join(CHECKPOINTS)} in it")
    return {name: there[name] for name in folds}


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
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BundleError(f"{path}: cannot be read as JSON ({type(error).__name__})") from error
    if not isinstance(found, dict):
        raise BundleError(f"{path}: found {type(found).__name__}, expected a JSON object")
    return found
