"""The figures of a training, row by row, in a file that survives what kills the training."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import RunError
from pipeline.files import atomic_path, explain_os_error
from pipeline.task import Observer, TrainingState

HISTORY = "history.jsonl"

LOGGED_EVERY = 10
"""Updates between two rows of the history."""


class History:
    """Rows of figures, appended to a file as they come and handed to the observer.

    On resume, rows beyond the checkpoint are dropped: their steps are done again. Rows that a full disk does not take
    wait for the next one; only the end of the training insists.

    Raises:
        RunError: the folder cannot be written, at the beginning or at the end.
    """

    def __init__(self, path: Path, step: int, observer: Observer) -> None:
        self._path, self._observer = path, observer
        self._pending: list[dict[str, Tensor]] = []
        self._stamp, self._patches = time.monotonic(), 0
        self._waiting, self._failing = b"", False
        kept = "".join(json.dumps(row) + "\n" for row in read_history(path) if row["step"] <= step).encode()
        with atomic_path(path) as temporary:
            temporary.write_bytes(kept)
        self._size_bytes = len(kept)

    def __enter__(self) -> History:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._write()

    def update(
        self,
        state: TrainingState,
        values: dict[str, Tensor],
        rate: float,
        patches: int,
        waited: Callable[[], float] = lambda: 0.0,
    ) -> None:
        """After each update; figures are averaged over some of them and the device is asked only then.

        `waited` says which part of the time since it was last asked went into waiting for batches.
        """
        self._pending.append(values)
        self._patches += patches
        if state.step % LOGGED_EVERY and state.step != state.steps:
            return
        means = _means(self._pending)
        now = time.monotonic()
        seconds = max(1e-9, now - self._stamp)
        means |= {"learning_rate": rate, "patches_per_s": self._patches / seconds}
        means |= {"seconds_per_update": seconds / len(self._pending), "wait_share": waited()}
        self._pending, self._patches, self._stamp = [], 0, now
        self._observer.progress(state.step, state.steps, means.get("loss", math.nan))
        self.add(state.step, means)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Append one row, now or when the disk takes it again."""
        self._waiting += json.dumps({"step": step, **values}).encode() + b"\n"
        try:
            self._write()
            self._failing = False
        except RunError as error:
            if not self._failing:
                self._observer.note(f"the history waits: {error}")
            self._failing = True
        self._observer.metrics(step, values)

    def _write(self) -> None:
        try:
            with self._path.open("ab") as stream:
                # What a full disk left of an earlier row must not run into this one.
                stream.truncate(self._size_bytes)
                stream.write(self._waiting)
        except OSError as error:
            raise explain_os_error(error, self._path) from error
        self._size_bytes, self._waiting = self._size_bytes + len(self._waiting), b""


class NoHistory:
    """Of a process that does not write one."""

    def __enter__(self) -> NoHistory:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def update(self, *_: object) -> None:
        """Nothing."""

    def add(self, *_: object) -> None:
        """Nothing."""


def _means(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
    """Means of the figures that are numbers; a figure that is none of the time is left out, and `skipped` counts."""
    means: dict[str, float] = {}
    for name in rows[0]:
        values = torch.stack([row[name] for row in rows]).float()
        finite = values[torch.isfinite(values)]
        if len(finite):
            means[name] = float(finite.mean())
        if name == "loss" and len(finite) < len(values):
            means["skipped"] = float(len(values) - len(finite))
    return means


def read_history(path: Path) -> list[dict[str, Any]]:
    """The rows written so far; a last line cut short by a kill is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
