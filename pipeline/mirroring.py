"""Are mirrored passes worth their time? Asked of the cases that a model never saw, scored with them and without."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

from pipeline.compare import compare
from pipeline.config import EvaluateConfig
from pipeline.report_values import Report

WORTH_DICE = 0.001
"""Mirroring takes as many times as long as there are passes; for less than this it is not done."""


class Mirroring(BaseModel):
    """What mirrored passes did to held-out cases; `worth_it` where they help beyond doubt, and by enough."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    n_cases: int
    dice_plain: float | None
    dice_mirrored: float | None
    interval_95: tuple[float, float] | None
    p_value: float | None
    worth_it: bool

    def to_json(self) -> dict[str, Any]:
        """A JSON value, for the bundle's provenance."""
        return self.model_dump(mode="json")

    @property
    def sentence(self) -> str:
        """What was found, for the one who waits for it."""
        if self.dice_plain is None or self.dice_mirrored is None:
            return "mirrored passes: no case tells what they are worth; they are left out"
        figures = f"Dice {self.dice_plain:.4f} without, {self.dice_mirrored:.4f} with them over {self.n_cases} cases"
        test = "" if self.p_value is None else f", p = {self.p_value:.2g}"
        means = "taken by every prediction of this model" if self.worth_it else "left out, which is quicker"
        return f"mirrored passes: {figures}{test}; {means}"


def weigh_mirroring(plain: Report, mirrored: Report, settings: EvaluateConfig) -> Mirroring:
    """Compare the same cases predicted in one pass and in mirrored ones, paired by patient (see `compare`).

    Raises:
        RunError: the reports are not of the same cases and labels.
    """
    if plain.overall.mean is None or mirrored.overall.mean is None:
        return Mirroring(n_cases=0, dice_plain=None, dice_mirrored=None, interval_95=None, p_value=None, worth_it=False)
    row = compare(plain, mirrored, settings=settings).overall
    return Mirroring(
        n_cases=row.n_cases,
        dice_plain=row.mean_a,
        dice_mirrored=row.mean_b,
        interval_95=row.interval_95,
        p_value=row.p_corrected,
        worth_it=row.is_evident and row.difference is not None and row.difference >= WORTH_DICE,
    )
