"""From which score on a label is taken: the usual decision between outputs, moved by a threshold for each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from transforms.labels import LabelSchema


@dataclass(frozen=True, eq=False)
class Decision:
    """By what each output's scores (O, ...) are multiplied and what is added, both (O, 1, 1, 1), so that the usual
    decision heeds thresholds: the highest output wins, or a region is where it is over its half.

    Both are the same everywhere, so that it does not matter whether scores are interpolated before or after.
    """

    weights: Tensor
    shift: Tensor

    def apply_(self, scores: Tensor) -> Tensor:
        """To scores (O, I, J, K), which are changed in place."""
        return scores.mul_(self.weights.to(scores.device)).add_(self.shift.to(scores.device))


def decision_of(schema: LabelSchema, thresholds: Mapping[str, float], *, in_logits: bool = False) -> Decision:
    """For thresholds by the name of a label, or of a region where the schema has any.

    A label's threshold t is its share against any one other class from which on it is taken: it wins over class c
    where p / (p + p_c) > t, so that with one label t is the probability itself. A region's is its probability.

    Raises:
        ValueError: a name that is no output of the schema, or a threshold that is not between 0 and 1.
    """
    names = schema.output_names
    for name, threshold in thresholds.items():
        if not name or name not in names:
            raise ValueError(f"{name}={threshold:g}: the model's outputs are {', '.join(filter(None, names))}")
        if not 0 < threshold < 1:
            raise ValueError(f"{name}={threshold:g}: expected a probability between 0 and 1")
    limits = torch.tensor([thresholds.get(name, 0.5) for name in names]).reshape(-1, 1, 1, 1)
    # p (1 - t) > p_c t is p / (p + p_c) > t; a class without a threshold has a half, so odds of 1.
    odds = (1 - limits) / limits
    if in_logits:
        return Decision(torch.ones_like(limits), odds.log())
    if schema.regions:
        return Decision(torch.ones_like(limits), 0.5 - limits)
    return Decision(odds, torch.zeros_like(limits))
