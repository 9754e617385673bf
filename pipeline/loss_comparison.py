"""A prediction beside its truth, as the terms of a loss see them: what counts, where, and for which channels.

Arrays are (B,C,...) with any number of spatial axes. Channels are classes (softmax, 0 is the background) or
regions (sigmoid), see `Targets`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional

BACKGROUND = 0


@dataclass(frozen=True)
class Targets:
    """What a network's outputs mean.

    `regions`, each a union of classes, that may overlap: one sigmoid channel each. Without regions: a softmax over
    `class_count` classes, the background included. Voxels of `ignored_class` count nowhere.

    Raises:
        ValueError: fewer than two classes, a region of unknown or no classes, an `ignored_class` that is a class.
    """

    class_count: int
    regions: tuple[tuple[int, ...], ...] = ()
    ignored_class: int | None = None

    def __post_init__(self) -> None:
        if self.class_count < 2:
            raise ValueError(f"found {self.class_count} classes, expected the background and at least one more")
        for region in self.regions:
            if not region or not set(region) <= set(range(1, self.class_count)):
                raise ValueError(f"found a region of classes {region}, expected some of 1 to {self.class_count - 1}")
        if self.ignored_class is not None and self.ignored_class in range(self.class_count):
            raise ValueError(f"found class {self.ignored_class} to be ignored, which is one of the classes")

    @property
    def channel_count(self) -> int:
        """Channels of the network's output."""
        return len(self.regions) or self.class_count


@dataclass(frozen=True)
class Sums:
    """Per patch and channel (B,C), over the voxels that count: soft true positives, and both sides' volumes."""

    overlap: Tensor
    predicted: Tensor
    present: Tensor


@dataclass(frozen=True, eq=False)
class Comparison:
    """Log-probabilities (B,C,...) and what is true.

    `log_truth` is the log-probability of what is true: (B,1,...) where classes exclude each other, (B,C,...) for
    regions. `target` is a map of class numbers (B,1,...) then, or 0 and 1 (B,C,...). `counted` (B,1,...) and
    `annotated` (B,C) are None where all is. Overlaps are of the channels from `first`.
    """

    log_probability: Tensor
    log_truth: Tensor
    target: Tensor
    exclusive: bool
    counted: Tensor | None
    annotated: Tensor | None
    first: int

    @cached_property
    def probability(self) -> Tensor:
        """(B,C,...)."""
        return self.log_probability.exp()

    @cached_property
    def active(self) -> Tensor | None:
        """Which of the channels from `first` count in each patch (B,C), None where all do."""
        return None if self.annotated is None else self.annotated[:, self.first :]

    @cached_property
    def sums(self) -> Sums:
        """Of the channels from `first`."""
        space = tuple(range(2, self.log_probability.dim()))
        weight = None if self.counted is None else self.counted.to(self.probability.dtype)
        predicted = _weighted(self.probability, weight).sum(space)
        if self.exclusive:
            channels = self.log_probability.shape[1]
            overlap = _sum_by_class(_weighted(self.log_truth.exp(), weight), self.target, channels)
            ones = torch.ones_like(self.log_truth) if weight is None else weight
            present = _sum_by_class(ones.detach(), self.target, channels)
        else:
            truth = _weighted(self.target, weight)
            overlap, present = (self.probability * truth).sum(space), truth.sum(space)
        return Sums(*(table[:, self.first :] for table in (overlap, predicted, present)))

    @cached_property
    def dense(self) -> tuple[Tensor, Tensor]:
        """Probability and truth (B,C,...) of the channels from `first`, both zero where nothing counts."""
        truth = self.target
        if self.exclusive:
            truth = torch.zeros_like(self.log_probability).scatter_(1, self.target, 1.0)
        weight = None if self.counted is None else self.counted.to(truth.dtype)
        return _weighted(self.probability[:, self.first :], weight), _weighted(truth[:, self.first :], weight)

    def counted_voxels(self) -> Tensor:
        """How many voxels of each patch count (B,)."""
        if self.counted is None:
            voxels = self.log_truth[0, 0].numel()
            return torch.full((len(self.log_truth),), voxels, device=self.log_truth.device)
        return self.counted.flatten(1).sum(1)

    def per_voxel(self, values: Tensor) -> Tensor:
        """The mean of `values`, shaped as `log_truth`, over the channels that count: (B,V)."""
        values = values.flatten(2)
        if self.exclusive or self.annotated is None:
            return values.mean(1)
        counting = self.annotated[:, :, None]
        return torch.where(counting, values, 0.0).sum(1) / counting.sum(1).clamp(min=1)

    def voxel_mean(self, values: Tensor) -> Tensor:
        """The mean of `values` (B,V) over the voxels that count, then over patches; zero for a patch without any."""
        if self.counted is None:
            return values.mean()
        sums = torch.where(self.counted.flatten(1), values, 0.0).sum(1)
        return (sums / self.counted_voxels().clamp(min=1)).mean()


def compare(
    logits: Tensor, classes: Tensor, targets: Targets, *, annotated: Tensor | None, include_background: bool
) -> Comparison:
    """`logits` (B,C,...) beside class numbers (B,1,...) of int64; `annotated` (B,class_count) or None for all."""
    counted = None
    if targets.ignored_class is not None:
        counted = classes != targets.ignored_class
        classes = torch.where(counted, classes, BACKGROUND)
    if targets.regions:
        return _compare_regions(logits, classes, targets, counted, annotated)
    first = 0 if include_background else 1
    if annotated is not None:
        annotated = _with_background(annotated)
        logits, classes = _merge_into_background(logits, classes, annotated)
    log_probability = logits.log_softmax(1)
    log_truth = log_probability.gather(1, classes)
    return Comparison(log_probability, log_truth, classes, True, counted, annotated, first)


def _compare_regions(
    logits: Tensor, classes: Tensor, targets: Targets, counted: Tensor | None, annotated: Tensor | None
) -> Comparison:
    """A region counts only where all of its classes were annotated."""
    table = torch.tensor([[c in region for region in targets.regions] for c in range(targets.class_count)])
    inside = table.to(logits.device)[classes[:, 0]].movedim(-1, 1)
    log_truth = functional.logsigmoid(torch.where(inside, logits, -logits))
    if annotated is not None:
        annotated = torch.stack([annotated[:, list(region)].all(1) for region in targets.regions], dim=1)
    log_probability = functional.logsigmoid(logits)
    return Comparison(log_probability, log_truth, inside.to(logits.dtype), False, counted, annotated, 0)


def _merge_into_background(logits: Tensor, classes: Tensor, annotated: Tensor) -> tuple[Tensor, Tensor]:
    """Classes that were not annotated lie somewhere in the background: their probability is added to its own.

    The marginal loss of Shi et al. 2021 (arXiv 2007.03868) and Fang and Yan 2020; channels (B,C) are left with no
    probability, and voxels that claim such a class become background.
    """
    kept = annotated.view(*annotated.shape, *(1,) * (logits.dim() - 2))
    outside = kept.clone()
    outside[:, BACKGROUND] = False
    background = logits.masked_fill(outside, -torch.inf).logsumexp(1, keepdim=True)
    merged = torch.cat([background, logits[:, 1:].masked_fill(~kept[:, 1:], -torch.inf)], dim=1)
    numbers = torch.arange(annotated.shape[1], device=classes.device)
    known = torch.where(annotated, numbers, BACKGROUND)
    return merged, known.gather(1, classes.flatten(1)).view_as(classes)


def _with_background(annotated: Tensor) -> Tensor:
    """The background is what no annotated class covers, so it is always known."""
    return torch.cat([torch.ones_like(annotated[:, :1]), annotated[:, 1:]], dim=1)


def _weighted(values: Tensor, weight: Tensor | None) -> Tensor:
    return values if weight is None else values * weight


def _sum_by_class(values: Tensor, classes: Tensor, count: int) -> Tensor:
    """The sum of `values` (B,1,...) over the voxels of each class: (B,`count`)."""
    # Adding by index has no fixed order on a GPU, and one address that most voxels wait for.
    add = _sum_by_index if values.device.type == "cpu" else _sum_by_mask
    return add(values, classes, count)


def _sum_by_mask(values: Tensor, classes: Tensor, count: int) -> Tensor:
    numbers = torch.arange(count, device=classes.device).view(1, count, *(1,) * (classes.dim() - 2))
    return (values * (classes == numbers)).sum(tuple(range(2, classes.dim())))


def _sum_by_index(values: Tensor, classes: Tensor, count: int) -> Tensor:
    # Plane by plane, because a long chain of float32 additions loses digits.
    planes, index = values.flatten(3)[:, 0], classes.flatten(3)[:, 0]
    return planes.new_zeros(*planes.shape[:2], count).scatter_add(2, index, planes).sum(1)
