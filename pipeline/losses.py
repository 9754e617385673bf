"""What training minimises: sums of named terms, built from MONAI's losses, with deep supervision on top.

Logits are (B,C,...), class 0 is the background; targets are class maps of integers, (B,...) or (B,1,...).
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from monai.losses.dice import DiceLoss
from monai.losses.tversky import TverskyLoss
from torch import Tensor
from torch.nn import functional

from pipeline.errors import ConfigError

SMOOTH = 1e-5  # added to both sides of each overlap's fraction: a class absent from both sides costs nothing

Term = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class LossSettings:
    """What the terms may be told. `batch_dice`: overlaps of all patches of a batch together, not of each."""

    batch_dice: bool
    ignore_class: int | None
    false_positive_weight: float
    false_negative_weight: float


@dataclass(frozen=True)
class Loss:
    """A sum of terms. Called with logits and target, gives the total and its detached terms by name."""

    terms: dict[str, Term]
    class_count: int

    def __call__(self, logits: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar total, and each term for the log.

        Raises:
            ValueError: the channels are not `class_count`, or the target lies on another grid.
        """
        if logits.shape[1] != self.class_count:
            raise ValueError(f"found logits of {logits.shape[1]} classes, expected {self.class_count}")
        target = _with_channel(logits, target)
        _require_same_shape(logits, target)
        values = {name: term(logits.float(), target) for name, term in self.terms.items()}
        return torch.stack(list(values.values())).sum(), {k: v.detach() for k, v in values.items()}


def _dice(settings: LossSettings) -> Term:
    """One minus soft Dice, the mean over the foreground classes (Milletari et al. 2016, unsquared)."""
    term: Term = DiceLoss(
        include_background=False,
        to_onehot_y=True,
        softmax=True,
        batch=settings.batch_dice,
        smooth_nr=SMOOTH,
        smooth_dr=SMOOTH,
        ignore_index=settings.ignore_class,
    )
    return term


def _tversky(settings: LossSettings) -> Term:
    """One minus the Tversky index, the mean over the foreground classes (Salehi et al. 2017: 0.3 and 0.7)."""
    term: Term = TverskyLoss(
        include_background=False,
        to_onehot_y=True,
        softmax=True,
        batch=settings.batch_dice,
        alpha=settings.false_positive_weight,
        beta=settings.false_negative_weight,
        smooth_nr=SMOOTH,
        smooth_dr=SMOOTH,
        ignore_index=settings.ignore_class,
    )
    return term


def _cross_entropy(settings: LossSettings) -> Term:
    """The mean over all voxels that count; zero where none does."""

    def term(logits: Tensor, target: Tensor) -> Tensor:
        if settings.ignore_class is None:
            return functional.cross_entropy(logits, target[:, 0])
        counted = (target != settings.ignore_class).sum().clamp(min=1)
        ignored = settings.ignore_class
        return functional.cross_entropy(logits, target[:, 0], ignore_index=ignored, reduction="sum") / counted

    return term


TERMS: dict[str, Callable[[LossSettings], Term]] = {
    "dice": _dice,
    "cross_entropy": _cross_entropy,
    "tversky": _tversky,
}

LOSSES: dict[str, tuple[str, ...]] = {
    "dice_ce": ("dice", "cross_entropy"),
    "dice": ("dice",),
    "tversky": ("tversky",),
    "ce": ("cross_entropy",),
}


def require_loss(name: str) -> None:
    """Raise ConfigError if there is no loss of that name; the nearest and all others are named."""
    if name not in LOSSES:
        near = difflib.get_close_matches(name, LOSSES, n=1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise ConfigError(f"loss '{name}' is not known: {hint}known are {', '.join(LOSSES)}")


def build_loss(
    name: str,
    *,
    class_count: int,
    batch_dice: bool = False,
    ignore_class: int | None = None,
    false_positive_weight: float = 0.3,
    false_negative_weight: float = 0.7,
) -> Loss:
    """The loss called `name` in `LOSSES`, for `class_count` classes, the background included.

    Voxels whose target is `ignore_class` (any integer) count nowhere. The two weights are Tversky's.

    Raises:
        ConfigError: there is no loss of that name.
        ValueError: fewer than two classes.
    """
    require_loss(name)
    if class_count < 2:
        raise ValueError(f"found {class_count} classes, expected the background and at least one more")
    settings = LossSettings(batch_dice, ignore_class, false_positive_weight, false_negative_weight)
    return Loss({term: TERMS[term](settings) for term in LOSSES[name]}, class_count)


def deep_supervision_loss(
    loss: Loss, outputs: Tensor | Sequence[Tensor], target: Tensor, *, margin: Sequence[int] | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """`loss` of each output, finest first, weighted 1, 1/2, 1/4, ... over their sum; the terms alike.

    A coarser output is compared with the target's voxels at its centres. A single tensor is a single output.
    After valid convolutions, `margin` says where in the target the output begins (`shape.output_margin`).

    Raises:
        ValueError: the finest output and the target without its margin differ in shape, or do not fit.
    """
    outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
    target = _with_channel(outputs[0], target)
    if margin is not None:
        target = _cropped(target, outputs[0].shape[2:], margin)
    _require_same_shape(outputs[0], target)
    levels = [loss(logits, _nearest(target, logits.shape[2:])) for logits in outputs]
    totals = torch.stack([total for total, _ in levels])
    weights = totals.new_tensor([0.5**level for level in range(len(levels))])
    shares = weights / weights.sum()
    terms = {name: torch.stack([values[name] for _, values in levels]) for name in loss.terms}
    return (shares * totals).sum(), {name: (shares * values).sum() for name, values in terms.items()}


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
