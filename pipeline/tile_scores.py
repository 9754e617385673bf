"""What networks say of a batch of windows: averaged over mirrored passes and over networks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from pipeline.models.unet import UNet
from pipeline.onednn import OneDnnConvolutions
from pipeline.tiling import WindowSettings

Network = Callable[[Tensor], Tensor]
VoxelFigure = Callable[[Tensor], Tensor]

CHUNK_VALUES = 1 << 20
"""Scores that are worked on together: few enough for a processor's cache, so that memory is passed through once."""


@dataclass(frozen=True, eq=False)
class Member:
    """A network, which maps (B, C, *window) to logits (B, O, *window), and how it wants to be used."""

    network: Network
    settings: WindowSettings


def score_tiles(
    members: Sequence[Member], tiles: Tensor, figure: VoxelFigure | None = None
) -> Iterator[tuple[int, int, Tensor]]:
    """Scores of windows (B, C, I, J, K), averaged over the members and their passes, piece by piece.

    Each piece is the number of its window, its first plane, and scores (O, i, J, K) float32 of its planes. With a
    `figure`, which gives a value (...) a voxel of one pass's scores (O, ...), its mean is one channel more, the last.
    """
    passes = [(member, axes) for member in members for axes in mirror_passes(member.settings.mirror_axes)]
    if len(passes) == 1:
        answer = _Answer(passes[0][0].network, tiles)
        for tile, low, high in _pieces(answer.shape):
            scores = _activated(answer.logits(tile, low, high), passes[0][0].settings)
            yield tile, low, scores if figure is None else torch.cat([scores, figure(scores)[None]])
        return
    total: Tensor | None = None
    for member, axes in passes:
        answer = _Answer(member.network, tiles.flip([a + 2 for a in axes]))
        outputs = answer.shape[1]
        if total is None:
            shape = (len(tiles), outputs + (figure is not None), *answer.shape[2:])
            total = torch.zeros(shape, dtype=torch.float32, device=tiles.device)
        share = 1.0 / (len(members) * len(mirror_passes(member.settings.mirror_axes)))
        for tile, low, high in _pieces(answer.shape):
            scores = _unmirrored(answer, tile, (low, high), axes, member.settings)
            total[tile, :outputs, low:high].add_(scores, alpha=share)
            if figure is not None:
                total[tile, outputs, low:high].add_(figure(scores), alpha=share)
        del answer  # else the next one would be made beside it
    if total is not None:
        for tile, low, high in _pieces(total.shape):
            yield tile, low, total[tile, :, low:high]


def widening(network: Network) -> UNet | None:
    """The network, if it is a U-Net whose last layer makes more channels than it gets."""
    if isinstance(network, UNet) and network.spec.out_channels > network.spec.features[0]:
        return network
    return None


class _Answer:
    """A network's logits of windows (B, C, I, J, K), `shape` (B, O, I, J, K), of which a few planes are asked for at a
    time. Those of many classes are made only then, of what a U-Net's last layer takes: they would be most of what it
    holds."""

    def __init__(self, network: Network, tiles: Tensor) -> None:
        unet = widening(network)
        with OneDnnConvolutions():
            self._values = network(tiles) if unet is None else unet.features(tiles)
        self._head = None if unet is None else unet.head
        batch, channels, *sides = self._values.shape
        self.shape = (batch, channels if unet is None else unet.spec.out_channels, *sides)

    def logits(self, tile: int, low: int, high: int) -> Tensor:
        """(O, i, J, K) of the planes [low, high) of one window."""
        part = self._values[tile, :, low:high]
        if self._head is None:
            return part
        with OneDnnConvolutions():
            return self._head(part[None])[0]


def mirror_passes(axes: Sequence[int]) -> list[tuple[int, ...]]:
    """Every combination of axes, the empty one first."""
    return [c for n in range(len(axes) + 1) for c in combinations(sorted(axes), n)]


def _pieces(shape: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Window, first plane and the plane after the last, over (B, O, I, J, K)."""
    count, outputs, planes, *plane = shape
    step = max(1, CHUNK_VALUES // (outputs * math.prod(plane)))
    for tile in range(count):
        for low in range(0, planes, step):
            yield tile, low, min(low + step, planes)


def _unmirrored(
    answer: _Answer, tile: int, planes: tuple[int, int], axes: Sequence[int], settings: WindowSettings
) -> Tensor:
    """Scores of the planes [low, high) of one window, from the answer to a mirrored pass."""
    low, high = planes
    if 0 in axes:
        low, high = answer.shape[2] - high, answer.shape[2] - low
    scores = _activated(answer.logits(tile, low, high), settings).flip([a + 1 for a in axes])
    # What the mirrored patient calls left is this patient's right.
    return scores[list(settings.twin_outputs)] if 0 in axes else scores


def _activated(logits: Tensor, settings: WindowSettings) -> Tensor:
    logits = logits.float()
    if settings.conventions.blend == "logits":
        return logits
    return logits.sigmoid() if settings.overlap else logits.softmax(dim=0)
