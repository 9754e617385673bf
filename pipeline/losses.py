"""What training minimises: a weighted sum of terms (`loss.terms`), with deep supervision on top.

Logits are (B,C,...), targets are class maps of integers, (B,...) or (B,1,...); `Targets` says what they mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.config import LossConfig
from pipeline.loss_comparison import Targets, compare
from pipeline.loss_terms import TERMS

__all__ = ["Loss", "Targets", "build_loss", "deep_supervision_loss"]


@dataclass(frozen=True)
class Loss:
    """A weighted sum of the terms named in `weights`."""

    weights: dict[str, float]
    settings: LossConfig
    targets: Targets

    @property
    def terms(self) -> tuple[str, ...]:
        """The names of the terms, as they stand in the log."""
        return tuple(self.weights)

    def __call__(
        self, logits: Tensor, classes: Tensor, annotated: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar total, and each term for the log, detached and without its weight.

        `annotated` (B,class_count) is False where a class was not annotated in a patch's case; None: all were, which
        spares asking a GPU. All arithmetic is in float32 or better: nothing here is what autocast makes smaller.

        Raises:
            ValueError: the channels are not those of the targets, or the class map lies on another grid.
        """
        if logits.shape[1] != self.targets.channel_count:
            raise ValueError(f"found logits of {logits.shape[1]} channels, expected {self.targets.channel_count}")
        classes = _with_channel(logits, classes)
        _require_same_shape(logits, classes)
        compared = compare(
            logits.to(torch.promote_types(logits.dtype, torch.float32)),
            classes,
            self.targets,
            annotated=_unless_complete(annotated, self.targets),
            include_background=self.settings.include_background,
        )
        values = {name: TERMS[name](compared, self.settings) for name in self.weights}
        total = torch.stack([weight * values[name] for name, weight in self.weights.items()]).sum()
        return total, {name: value.detach() for name, value in values.items()}


def build_loss(settings: LossConfig, targets: Targets) -> Loss:
    """The loss of a config's `loss` section for outputs that mean `targets`."""
    weights = {name: weight for name, weight in settings.terms if weight > 0}
    return Loss(weights, settings, targets)


def deep_supervision_loss(
    loss: Loss,
    outputs: Tensor | Sequence[Tensor],
    classes: Tensor,
    annotated: Tensor | None = None,
    *,
    margin: Sequence[int] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`loss` of each output, finest first, weighted 1, 1/2, 1/4, ... over their sum; the terms alike.

    A coarser output is compared with the target's voxels at its centres. A single tensor is a single output.
    After valid convolutions, `margin` says where in the target the output begins (`shape.output_margin`).

    Raises:
        ValueError: the finest output and the target without its margin differ in shape, or do not fit.
    """
    outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
    classes = _with_channel(outputs[0], classes)
    if margin is not None:
        classes = _cropped(classes, outputs[0].shape[2:], margin)
    _require_same_shape(outputs[0], classes)
    annotated = _unless_complete(annotated, loss.targets)
    levels = [loss(logits, _nearest(classes, logits.shape[2:]), annotated) for logits in outputs]
    # Numbers of the host: a tensor of them would have a GPU wait for its copy at every update.
    weights = [0.5**level for level in range(len(levels))]
    shares = [weight / sum(weights) for weight in weights]

    def weighted(values: Sequence[Tensor]) -> Tensor:
        return torch.stack([share * value for share, value in zip(shares, values, strict=True)]).sum()

    terms = {name: weighted([values[name] for _, values in levels]) for name in loss.terms}
    return weighted([total for total, _ in levels]), terms


def _unless_complete(annotated: Tensor | None, targets: Targets) -> Tensor | None:
    """None where every class was annotated in every case."""
    if annotated is not None and annotated.shape[1:] != (targets.class_count,):
        raise ValueError(f"found annotated of shape {tuple(annotated.shape)}, expected (B, {targets.class_count})")
    return None if annotated is None or bool(annotated.all()) else annotated


def _with_channel(logits: Tensor, target: Tensor) -> Tensor:
    """(B,1,...) of int64, from (B,...) or (B,1,...)."""
    target = target if target.dim() == logits.dim() else target.unsqueeze(1)
    if target.dim() != logits.dim() or target.shape[1] != 1:
        raise ValueError(f"found a target of shape {tuple(target.shape)}, expected a map of class numbers")
    return target.long()


def _require_same_shape(logits: Tensor, target: Tensor) -> None:
    if target.shape[2:] != logits.shape[2:]:
        found, expected = tuple(target.shape[2:]), tuple(logits.shape[2:])
        raise ValueError(f"found a target of shape {found} for logits of shape {expected}")


def _cropped(target: Tensor, shape: Sequence[int], margin: Sequence[int]) -> Tensor:
    """The part of `target` (B,1,...) that begins at voxel `margin` and has the spatial shape `shape`."""
    window = tuple(slice(start, start + side) for start, side in zip(margin, shape, strict=True))
    return target[(slice(None), slice(None), *window)]


def _nearest(target: Tensor, shape: Sequence[int]) -> Tensor:
    """`target` (B,1,...) where the centres of a coarser grid's voxels, over the same field, come to lie."""
    for axis, side in enumerate(shape, start=2):
        if target.shape[axis] != side:
            centres = (torch.arange(side, device=target.device) + 0.5) * (target.shape[axis] / side)
            target = target.index_select(axis, centres.long())
    return target
