"""A training on disk: all that it needs to go on as if it had never stopped."""

from __future__ import annotations

import io
from pathlib import Path

import torch

from pipeline.errors import RunError
from pipeline.files import atomic_path
from pipeline.task import TrainingState, TrainingTask, bare

CHECKPOINT = "checkpoint.pt"
CHECKPOINT_FORMAT = "volseg-checkpoint-1"


def save_checkpoint(path: Path, state: TrainingState, task: TrainingTask) -> None:
    """Write all that a resumed run needs, atomically, as tensors and plain values (no pickled objects)."""
    document = {
        "format": CHECKPOINT_FORMAT,
        "key": task.key(),
        "step": state.step,
        "steps": state.steps,
        "elapsed_s": state.elapsed_s,
        "network": bare(state.network).state_dict(),
        "averaged": state.averaged.state_dict(),
        "optimiser": state.optimiser.state_dict(),
        "torch_random": torch.get_rng_state(),
    }
    # In memory first: torch reports a full disk as a RuntimeError, a plain write as what it is.
    buffer = io.BytesIO()
    torch.save(document, buffer)
    with atomic_path(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def load_checkpoint(path: Path, state: TrainingState, task: TrainingTask) -> None:
    try:
        document = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged file makes torch raise is not to be listed
        raise RunError(f"{path}: not a readable checkpoint; delete it to start anew") from error
    if not isinstance(document, dict) or document.get("format") != CHECKPOINT_FORMAT:
        raise RunError(f"{path}: not a checkpoint of this version of volseg; delete it to start anew")
    if document["key"] != task.key():
        raise RunError(
            f"{path}: made with another plan, config or set of cases than this run's; "
            "use the same ones to resume, or another --out"
        )
    bare(state.network).load_state_dict(document["network"])
    state.averaged.load_state_dict(document["averaged"])
    state.optimiser.load_state_dict(document["optimiser"])
    state.step, state.elapsed_s = document["step"], document["elapsed_s"]
    state.steps = task.settings.steps or document["steps"]
    torch.set_rng_state(document["torch_random"])
