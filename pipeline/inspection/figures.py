"""Figures of what flows through a level: dead channels, sparsity, energy, effective rank, redundancy."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from operator import add

import torch
from torch import Tensor, nn

from pipeline.inspection.levels import KINDS, Kind, kind_and_level, levels_of, visited

DEAD_ABOVE, DEAD_BELOW = 1e-3, 0.1
"""A channel is dead that stays between -DEAD_BELOW and DEAD_ABOVE times the RMS of its level. Below zero a leaky ReLU
of slope 0.01 passes a hundredth, so that ten RMS of a silenced channel still count as silence."""

NEAR_ZERO = 1e-3
"""An activation is not active that is no larger than this part of the RMS of its level in the patch."""

REDUNDANT_CORRELATION = 0.95
"""Two channels that correlate by as much (or the opposite of it) share nine tenths of their variance."""

MOST_SAMPLED = 1 << 16
"""Voxels of a window, evenly taken, that correlations are computed from."""


@dataclass(frozen=True)
class LevelFigures:
    """Of one part of a network, over all voxels of the patches that were looked at.

    `level` counts from 1, full resolution; `shape` is that of its features in one patch, without batch and channels.
    `dead_share`: of channels that never rise above zero (see `DEAD_ABOVE`). `sparsity`: share of activations that are
    zero or below, or nearly. `energy`: root mean square. `effective_rank`: exp of the entropy of the normalised
    singular values of the centred channels (Roy and Vetterli, EUSIPCO 2007), from 1 to the smaller of the channels
    and `voxels - 1`; 0 where every channel is constant. `redundant_share`: of channels that repeat an earlier one
    (`REDUNDANT_CORRELATION`). `voxels`: how many were seen, of all patches.
    """

    name: str
    kind: Kind
    level: int
    channels: int
    shape: tuple[int, ...]
    dead_share: float
    sparsity: float
    energy: float
    effective_rank: float
    redundant_share: float
    voxels: int

    @property
    def dead(self) -> int:
        """Channels that are dead."""
        return round(self.dead_share * self.channels)


@dataclass(frozen=True, eq=False)
class ChannelSums:
    """What figures are made of, small whatever the patch is; those of several patches are added.

    (C,) each, over `voxels`: `lowest`, `highest`, `total` and `squares`, their sums; over the `sampled` voxels: `sum`
    (C,) and `products` (C,C). `quiet` counts activations that are no larger than `NEAR_ZERO` of their patch's RMS.
    """

    shape: tuple[int, ...]
    voxels: int
    lowest: Tensor
    highest: Tensor
    total: Tensor
    squares: Tensor
    sampled: int
    sum: Tensor
    products: Tensor
    quiet: int

    @classmethod
    def of(cls, features: Tensor) -> ChannelSums:
        """Of features (B,C,...); those of a batch are those of its patches one by one."""
        return reduce(add, (cls._of_patch(patch) for patch in features.detach()))

    @classmethod
    def _of_patch(cls, features: Tensor) -> ChannelSums:
        """Of (C,...)."""
        by_channel = features.flatten(1)
        if by_channel.device.type == "mps":
            by_channel = by_channel.cpu()  # it has no double precision
        sampled = by_channel[:, :: _stride(by_channel.shape[1])].double()
        squares = _sums(by_channel, lambda part: part * part)
        near = NEAR_ZERO * math.sqrt(float(squares.sum()) / max(by_channel.numel(), 1))
        return cls(
            shape=tuple(features.shape[1:]),
            voxels=by_channel.shape[1],
            lowest=by_channel.amin(dim=1).double(),
            highest=by_channel.amax(dim=1).double(),
            total=_sums(by_channel, lambda part: part),
            squares=squares,
            sampled=sampled.shape[1],
            sum=sampled.sum(dim=1),
            products=sampled @ sampled.T,
            quiet=int((by_channel <= near).sum()),
        )

    def __add__(self, other: ChannelSums) -> ChannelSums:
        return ChannelSums(
            shape=self.shape,
            voxels=self.voxels + other.voxels,
            lowest=torch.minimum(self.lowest, other.lowest),
            highest=torch.maximum(self.highest, other.highest),
            total=self.total + other.total,
            squares=self.squares + other.squares,
            sampled=self.sampled + other.sampled,
            sum=self.sum + other.sum,
            products=self.products + other.products,
            quiet=self.quiet + other.quiet,
        )

    @property
    def mean(self) -> Tensor:
        """(C,) over all voxels."""
        return self.total / self.voxels

    @property
    def energy(self) -> float:
        """Root mean square of all channels."""
        return math.sqrt(float(self.squares.sum()) / (len(self.squares) * self.voxels))

    @property
    def dead(self) -> Tensor:
        """(C,) of bool: which channels never rise above zero, see `DEAD_ABOVE`."""
        return (self.highest <= DEAD_ABOVE * self.energy) & (self.lowest >= -DEAD_BELOW * self.energy)

    @property
    def covariance(self) -> Tensor:
        """(C,C) of the sampled voxels."""
        mean = self.sum / self.sampled
        return self.products / self.sampled - torch.outer(mean, mean)


@contextlib.contextmanager
def record_levels(network: nn.Module) -> Iterator[dict[str, Tensor]]:
    """While entered, each forward pass of `network` puts into the dict what flows through its levels.

    By name, as in `Levels.named`: features (B,C,...), whose memory is held. A later pass replaces an earlier one's.
    Skips are taken as they enter the decoder, behind a gate. Checkpointed parts are seen as any other.

    Raises:
        PlanError: the network's levels are not known; the message names those that are.
    """
    recorded: dict[str, Tensor] = {}

    def visit(name: str, features: Tensor) -> None:
        recorded[name] = features.detach()

    with visited(levels_of(network).named(), visit):
        yield recorded


@contextlib.contextmanager
def record_sums(network: nn.Module) -> Iterator[dict[str, ChannelSums]]:
    """As `record_levels`, but of next to no memory: the sums of all passes, added up.

    Raises:
        PlanError: see `record_levels`.
    """
    recorded: dict[str, ChannelSums] = {}

    def visit(name: str, features: Tensor) -> None:
        found = ChannelSums.of(features)
        recorded[name] = recorded[name] + found if name in recorded else found

    with visited(levels_of(network).named(), visit):
        yield recorded


def figures_of(activations: Mapping[str, Tensor] | Mapping[str, ChannelSums]) -> tuple[LevelFigures, ...]:
    """Figures of what `record_levels` or `record_sums` found: encoder, bottleneck, skips, decoder, each from level 1.

    Raises:
        ValueError: a name is not as in `Levels.named`.
    """
    sums = {name: f if isinstance(f, ChannelSums) else ChannelSums.of(f) for name, f in activations.items()}
    figures = [_figures(name, found) for name, found in sums.items()]
    return tuple(sorted(figures, key=lambda each: (KINDS.index(each.kind), each.level)))


def effective_rank(covariance: Tensor) -> float:
    """Of channels with this covariance (C,C): exp of the entropy of their singular values, which are the roots of its
    eigenvalues, as parts of their sum (Roy and Vetterli 2007). 0 where nothing varies.
    """
    if not bool(torch.isfinite(covariance).all()):
        return math.nan
    eigenvalues = torch.linalg.eigvalsh(covariance)
    # What is left of a zero by rounding would count by its root, which is not small.
    floor = float(eigenvalues.abs().max()) * covariance.shape[0] * torch.finfo(covariance.dtype).eps
    singular = eigenvalues[eigenvalues > floor].sqrt()
    if not len(singular):
        return 0.0
    shares = singular / singular.sum()
    return float(torch.exp(-(shares * shares.log()).sum()))


def _figures(name: str, sums: ChannelSums) -> LevelFigures:
    kind, level = kind_and_level(name)
    channels, dead, covariance = len(sums.total), sums.dead, sums.covariance
    return LevelFigures(
        name=name,
        kind=kind,
        level=level,
        channels=channels,
        shape=sums.shape,
        dead_share=float(dead.double().mean()),
        sparsity=sums.quiet / (channels * sums.voxels),
        energy=sums.energy,
        effective_rank=effective_rank(covariance),
        redundant_share=_redundant_share(covariance, ~dead),
        voxels=sums.voxels,
    )


def _redundant_share(covariance: Tensor, alive: Tensor) -> float:
    """Of all channels, those alive that repeat one before them that is alive."""
    variances = covariance.diagonal()
    varying = alive & (variances > torch.finfo(covariance.dtype).eps * variances.abs().max())
    kept = covariance[varying][:, varying]
    deviations = kept.diagonal().sqrt()
    alike = (kept / torch.outer(deviations, deviations)).abs() >= REDUNDANT_CORRELATION
    repeats = torch.tril(alike, diagonal=-1).any(dim=1)
    return float(repeats.sum()) / len(variances)


def _stride(voxels: int) -> int:
    """The least that leaves `MOST_SAMPLED` of so many voxels, or a few less, and has no factor in common with a side.

    With one it would pass by whole planes: every 32nd voxel of 256 x 256 x 32 is in the first.
    """
    stride = -(-voxels // MOST_SAMPLED)
    while math.gcd(stride, voxels) > 1:
        stride += 1
    return stride


def _sums(by_channel: Tensor, of: Callable[[Tensor], Tensor]) -> Tensor:
    """(C,) in double precision, of a function of (C,N), some voxels at a time."""
    total = torch.zeros(by_channel.shape[0], dtype=torch.float64, device=by_channel.device)
    for part in torch.split(by_channel, MOST_SAMPLED, dim=1):
        total += of(part.double()).sum(dim=1)
    return total
