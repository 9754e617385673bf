"""Probabilities, plane by plane -> the Dice that they lead one to expect of each label."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.quality import LabelEstimate, QualityEstimate
from transforms.labels import LabelSchema


class DiceTally:
    """Sums, for each output, of what expected Dice is made of; probabilities come plane by plane."""

    def __init__(self, schema: LabelSchema) -> None:
        self._overlap = bool(schema.regions)
        self._names = names = schema.output_names
        self._likely, self._agreed, self._decided = (torch.zeros(len(names), dtype=torch.float64) for _ in range(3))

    def add(self, probabilities: Tensor) -> None:
        """Those (O, A, B) of the next plane."""
        flat = probabilities.flatten(1)
        self._likely += flat.sum(dim=1, dtype=torch.float64).cpu()
        if self._overlap:
            decided = flat > 0.5
            self._agreed += (flat * decided).sum(dim=1, dtype=torch.float64).cpu()
            self._decided += decided.sum(dim=1).cpu()
            return
        # On a GPU sums of this kind come out another way each time.
        best, winner = (found.cpu() for found in flat.max(dim=0))
        self._agreed += torch.bincount(winner, weights=best.double(), minlength=len(flat))
        self._decided += torch.bincount(winner, minlength=len(flat))

    def estimate(self, voxel_mm3: float, models: Sequence[str] = ()) -> QualityEstimate:
        """Of the planes that have come; the background is left out. `models` are digests of what was asked."""
        rows = zip(self._names, self._likely.tolist(), self._agreed.tolist(), self._decided.tolist(), strict=True)
        return QualityEstimate(
            labels=tuple(
                LabelEstimate(
                    label=name,
                    # Rounding may add up to a little more than 1.
                    expected_dice=min(1.0, 2 * agreed / (likely + decided)) if decided else None,
                    decided_mm3=decided * voxel_mm3,
                    expected_mm3=likely * voxel_mm3,
                )
                for name, likely, agreed, decided in rows
                if name
            ),
            models=tuple(models),
        )
