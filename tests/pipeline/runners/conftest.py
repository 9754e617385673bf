"""A cross-validation of two folds on bundled cases, and the processes that train its folds."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import Config, parse_config
from pipeline.console import Silence
from pipeline.crossval import cross_validate
from pipeline.manifest import Dataset, save_manifest
from pipeline.runs import Run, open_run

STEPS = 60


class Listener(Silence):
    """Remembers its notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


@pytest.fixture(scope="session")
def home(small_dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runners")
    save_manifest(small_dataset, folder / "cases.json")
    return folder


def config_at(home: Path, **train: Any) -> Config:
    """Small networks, a checkpoint after every update."""
    return parse_config(
        {
            "name": "tiny",
            "runs": str(home / "runs"),
            "data": {"manifest": str(home / "cases.json"), "cache": str(home / "cache")},
            "folds": {"count": 2},
            "plan": {"features": [4, 8], "patch_shape": [16, 16, 16], "batch_size": 1},
            "train": {
                "steps": STEPS,
                "validations": 1,
                "validation_cases": 1,
                "device": "cpu",
                "checkpoint_minutes": 1e-6,
                **train,
            },
            "predict": {"mirror": False, "tile_step": 1.0},
            "evaluate": {"bootstrap_samples": 100},
            "tracking": {"enabled": False},
        },
        source="test",
    )


@pytest.fixture(scope="session")
def undisturbed(home: Path) -> Run:
    """The two folds one after another in this process, on one thread."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    run = open_run(config_at(home), home / "runs" / "undisturbed", Silence())
    cross_validate(run, [0, 1], Silence())
    torch.set_num_threads(before)
    return run


def weights(run: Run, fold: int) -> bytes:
    return (run.fold_folder(fold) / "bundle" / "weights.safetensors").read_bytes()


def processes(name: str) -> list[int]:
    """Ids of the processes that are alive and have `name` among their arguments."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if name.encode() in arguments:
            found.append(int(folder.name))
    return found


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
