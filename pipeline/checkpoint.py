"""A training on disk: all that it needs to go on as if it had never stopped.

A checkpoint is one line, the format and the SHA-256 of what follows, and then what torch saved: tensors and plain
values. The one before is kept until the new one is whole on disk, and a newest one that is damaged gives way to it.
"""

from __future__ import annotations

import hashlib
import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import RunError
from pipeline.files import atomic_path, explain_os_error, sync_file
from pipeline.schedule import Schedule
from pipeline.task import Observer, TrainingState, TrainingTask, bare

CHECKPOINT, PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"
CHECKPOINT_FAMILY = "volseg-checkpoint-"
CHECKPOINT_FORMAT = CHECKPOINT_FAMILY + "2"


def has_checkpoint(folder: Path) -> bool:
    """True when an unfinished training lies here."""
    return any((folder / name).exists() for name in (CHECKPOINT, PREVIOUS))


def discard_checkpoints(folder: Path) -> None:
    """Remove what a finished fold needs no more: its optimiser's state is twice the size of its weights."""
    for name in (PREVIOUS, CHECKPOINT):
        (folder / name).unlink(missing_ok=True)


class Checkpoints:
    """The checkpoints of one training: when the next is due, and what a disk that takes none means.

    While training goes on, a checkpoint that cannot be written is told once and tried again when the next is due.
    """

    def __init__(self, task: TrainingTask, observer: Observer) -> None:
        self._task, self._observer = task, observer
        self._stamp = time.monotonic()
        self._saved_step: int | None = None
        self._failing = False

    def restore(self, state: TrainingState) -> None:
        """Go on from the newest checkpoint that can be read.

        Raises:
            RunError: none can, or it belongs to another plan, config or set of cases.
        """
        load_checkpoint(self._task.folder, state, self._task, self._observer.note)
        self._saved_step = state.step

    def due(self) -> bool:
        """True once `train.checkpoint_minutes` have passed since the last one was tried."""
        return time.monotonic() - self._stamp > 60 * self._task.settings.checkpoint_minutes

    def save(self, state: TrainingState) -> None:
        """Write one if the disk takes it."""
        try:
            self._write(state)
        except RunError as error:
            if not self._failing:
                minutes = self._task.settings.checkpoint_minutes
                self._observer.note(f"no checkpoint: {error}; training goes on and tries again every {minutes:g} min")
            self._failing = True
        else:
            if self._failing:
                self._observer.note(f"checkpoints are written again, at update {state.step}")
            self._failing = False
        self._stamp = time.monotonic()

    def save_last(self, state: TrainingState) -> None:
        """Write one before the training ends or stops.

        Raises:
            RunError: the disk does not take it; says which update is safe.
        """
        try:
            self._write(state)
        except RunError as error:
            if self._saved_step is None:
                raise
            raise RunError(f"{error} with --resume: update {self._saved_step} is safe") from error

    def _write(self, state: TrainingState) -> None:
        save_checkpoint(self._task.folder, state, self._task)
        self._saved_step = state.step


def save_checkpoint(folder: Path, state: TrainingState, task: TrainingTask) -> None:
    """Write all that a resumed run needs; the checkpoint before stays until this one is whole.

    Raises:
        RunError: the disk is full or the folder cannot be written; what was there is there still.
    """
    newest = folder / CHECKPOINT
    # In memory first: torch reports a full disk as a RuntimeError, a plain write as what it is.
    buffer = io.BytesIO()
    torch.save(_document(state, task), buffer)
    content = buffer.getbuffer()
    with atomic_path(newest) as temporary:
        with temporary.open("wb") as stream:
            stream.write(f"{CHECKPOINT_FORMAT} {hashlib.sha256(content).hexdigest()}\n".encode())
            stream.write(content)
        _keep(newest, temporary)


def load_checkpoint(folder: Path, state: TrainingState, task: TrainingTask, note: Callable[[str], None]) -> None:
    """Put the newest readable checkpoint into `state`; one that is damaged is told and taken away.

    Raises:
        RunError: none can be read, or it belongs to another plan, config or set of cases.
    """
    found = [folder / name for name in (CHECKPOINT, PREVIOUS) if (folder / name).exists()]
    for path in found:
        try:
            document = _read(path)
        except _Damaged as damage:
            if path == found[-1]:
                raise RunError(f"{path}: {damage}; delete it to start anew") from damage
            note(f"{path}: {damage}; going on from the one before")
            # Were it to become the one before, a kill in the next checkpoint's write would leave no good one.
            _remove(path)
        else:
            _restore(document, path, state, task)
            return
    raise RunError(f"{folder}: there is no checkpoint to go on from")


class _Damaged(Exception):
    """What is wrong with a file that should be a checkpoint."""


def _document(state: TrainingState, task: TrainingTask) -> dict[str, Any]:
    on_gpu = next(state.averaged.parameters()).is_cuda
    return {
        "key": task.key(),
        "step": state.step,
        "schedule": [list(decision) for decision in state.schedule.decisions],
        "elapsed_s": state.elapsed_s,
        "dice": state.dice,
        "best": state.best,
        "network": bare(state.network).state_dict(),
        "averaged": state.averaged.state_dict(),
        "optimiser": state.optimiser.state_dict(),
        "loop": state.loop_state(),
        "torch_random": torch.get_rng_state(),
        "cuda_random": torch.cuda.get_rng_state_all() if on_gpu else [],
    }


def _restore(document: dict[str, Any], path: Path, state: TrainingState, task: TrainingTask) -> None:
    if document["key"] != task.key():
        raise RunError(
            f"{path}: made with another plan, config or set of cases than this run's; "
            "use the same ones to resume, or another --out"
        )
    bare(state.network).load_state_dict(document["network"])
    state.averaged.load_state_dict(document["averaged"])
    state.optimiser.load_state_dict(document["optimiser"])
    state.load_loop_state(document["loop"])
    state.step, state.elapsed_s = document["step"], document["elapsed_s"]
    state.schedule = Schedule.of(document["schedule"])
    state.dice, state.best = document["dice"], document["best"]
    torch.set_rng_state(document["torch_random"])
    if len(document["cuda_random"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(document["cuda_random"])


def _keep(newest: Path, coming: Path) -> None:
    """Make the newest checkpoint the one before, once the coming one is whole on disk."""
    sync_file(coming)
    if newest.exists():
        newest.replace(newest.with_name(PREVIOUS))


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as stream:
            header, content = stream.readline(200), stream.read()
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({(error.strerror or str(error)).lower()})") from error
    form, _, sha256 = header.decode("ascii", "replace").rstrip("\n").partition(" ")
    if form != CHECKPOINT_FORMAT and form.startswith(CHECKPOINT_FAMILY):
        raise RunError(f"{path}: made by another version of volseg; resume with that one, or choose another --out")
    if form != CHECKPOINT_FORMAT:
        raise _Damaged("not a readable checkpoint of this version of volseg")
    if hashlib.sha256(content).hexdigest() != sha256:
        raise _Damaged("a damaged checkpoint (its hash differs)")
    try:
        document: dict[str, Any] = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # what torch raises of a file that only claims to be one is not to be listed
        raise _Damaged("not a readable checkpoint of this version of volseg") from error
    return document


def _remove(path: Path) -> None:
    try:
        path.unlink()
    except OSError as error:
        raise explain_os_error(error, path) from error
