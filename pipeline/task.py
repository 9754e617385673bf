"""What a training is made of, what changes as it goes on, who is told, and what comes of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pipeline.config import AugmentConfig, LossConfig, TrainConfig
from pipeline.dataset import PreparedCase
from pipeline.files import sha256_of_json
from pipeline.plan import Plan
from pipeline.schedule import Schedule
from transforms.labels import LabelSchema


class Observer(Protocol):
    """Told what happens while a training goes on."""

    def progress(self, step: int, steps: int, loss: float) -> None:
        """After every update."""

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Every few updates, and after each validation."""

    def note(self, message: str) -> None:
        """One line worth telling."""


@dataclass(frozen=True, eq=False)
class TrainingTask:
    """All that a training is made of."""

    plan: Plan
    schema: LabelSchema
    training: Sequence[PreparedCase]
    validation: Sequence[PreparedCase]
    settings: TrainConfig
    augment: AugmentConfig
    tile_step: float
    folder: Path
    loss: LossConfig = field(default_factory=LossConfig)

    def key(self) -> str:
        """Hash of what must be the same for a checkpoint to be resumed."""
        return sha256_of_json(
            {
                "plan": self.plan.model_dump(mode="json"),
                # How long to go on and how often to look may change; what is learnt may not.
                "settings": self.settings.model_dump(
                    mode="json",
                    exclude={
                        "budget_minutes",
                        "steps",
                        "schedule",
                        "checkpoint_minutes",
                        "validations",
                        "validation_cases",
                        "inspect_every",
                        "device",
                        "workers",
                    },
                ),
                "loss": self.loss.model_dump(mode="json"),
                "augment": self.augment.model_dump(mode="json"),
                "cases": [case.case_id for case in self.training],
            }
        )


@dataclass
class TrainingState:
    """What changes from step to step."""

    network: nn.Module
    averaged: nn.Module
    optimiser: torch.optim.Optimizer
    schedule: Schedule
    step: int = 0
    elapsed_s: float = 0.0
    dice: dict[str, float] = field(default_factory=dict)
    """Of the last validation."""
    best: dict[str, float] = field(default_factory=dict)
    """Step and mean Dice of the best of those validations that looked at the same cases."""

    scaler: torch.amp.GradScaler | None = None
    """With float16: how much gradients are scaled up."""
    parts: int = 1
    """In how many parts a batch is computed, since memory ran out with fewer."""
    skipped: int = 0
    """Updates left out for want of a finite loss or gradient."""
    suspects: list[list[str]] = field(default_factory=list)
    """The cases of the updates that were left out in a row, up to this one."""
    rehearsals: int = 2
    """Updates that several processes compute once on their own before they exchange gradients."""

    @property
    def steps(self) -> int:
        """Updates in all, as far as is known by now."""
        return self.schedule.steps

    def loop_state(self) -> dict[str, Any]:
        """What the loop has found out so far, as plain values for a checkpoint."""
        scaler = self.scaler.state_dict() if self.scaler is not None else {}
        return {"parts": self.parts, "skipped": self.skipped, "suspects": self.suspects, "scaler": scaler}

    def load_loop_state(self, state: dict[str, Any]) -> None:
        """Go on from what `loop_state` gave."""
        self.parts, self.skipped, self.suspects = state["parts"], state["skipped"], state["suspects"]
        if self.scaler is not None and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])


@dataclass(frozen=True)
class TrainingResult:
    """Weights to keep (averaged, if that is on) and how the training went."""

    weights: dict[str, Tensor]
    steps: int
    elapsed_s: float
    dice: dict[str, float]


def bare(network: nn.Module) -> nn.Module:
    """The network inside Fabric's wrapper."""
    inner = getattr(network, "module", network)
    if not isinstance(inner, nn.Module):
        raise TypeError("a wrapped network holds a network")
    return inner
