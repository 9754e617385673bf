"""The figures of a training, row by row, in a file that survives what kills the training."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.files import atomic_path, explain_os_error
from pipeline.task import Observer, TrainingState

HISTORY = "history.jsonl"

LOGGED_EVERY = 10
"""Updates between two rows of the history."""


class History:
    """Rows of figures, appended to a file as they come and handed to the observer.

    On resume, rows beyond the checkpoint are dropped: their steps are done again.
    """

    def __init__(self, path: Path, step: int, observer: Observer) -> None:
        self._path, self._observer = path, observer
        self._pending: list[dict[str, Tensor]] = []
        self._stamp, self._patches = time.monotonic(), 0
        kept = [row for row in read_history(path) if row["step"] <= step]
        with atomic_path(path) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")

    def __enter__(self) -> History:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def update(self, state: TrainingState, values: dict[str, Tensor], rate: float, patches: int) -> None:
        """After each update; figures are averaged over some of them and the device is asked only then."""
        self._pending.append(values)
        self._patches += patches
        if state.step % LOGGED_EVERY and state.step != state.steps:
            return
        means = {k: float(torch.stack([row[k] for row in self._pending]).float().mean()) for k in values}
        now = time.monotonic()
        means |= {"learning_rate": rate, "patches_per_s": self._patches / max(1e-9, now - self._stamp)}
        self._pending, self._patches, self._stamp = [], 0, now
        self._observer.progress(state.step, state.steps, means["loss"])
        self.add(state.step, means)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Append one row."""
        try:
            with self._path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps({"step": step, **values}) + "\n")
        except OSError as error:
            raise explain_os_error(error, self._path) from error
        self._observer.metrics(step, values)


def read_history(path: Path) -> list[dict[str, Any]]:
    """The rows written so far; a last line cut short by a kill is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
