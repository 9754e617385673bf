"""What networks say of a batch of windows: averaged over mirrored passes and over networks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

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
        logits = _answer(passes[0][0].network, tiles)
        for tile, low, high in _pieces(logits):
            scores = _activated(logits[tile, :, low:high], passes[0][0].settings)
            yield tile, low, scores if figure is None else torch.cat([scores, figure(scores)[None]])
        return
    total: Tensor | None = None
    for member, axes in passes:
        logits = _answer(member.network, tiles.flip([a + 2 for a in axes]))
        outputs = logits.shape[1]
        if total is None:
            shape = (len(logits), outputs + (figure is not None), *logits.shape[2:])
            total = torch.zeros(shape, dtype=torch.float32, device=logits.device)
        share = 1.0 / (len(members) * len(mirror_passes(member.settings.mirror_axes)))
        for tile, low, high in _pieces(logits):
            scores = _unmirrored(logits[tile], low, high, axes, member.settings)
            total[tile, :outputs, low:high].add_(scores, alpha=share)
            if figure is not None:
                total[tile, outputs, low:high].add_(figure(scores), alpha=share)
        del logits  # else the next ones would be made beside them
    if total is not None:
        for tile, low, high in _pieces(total):
            yield tile, low, total[tile, :, low:high]


def _answer(network: Network, tiles: Tensor) -> Tensor:
    with OneDnnConvolutions():
        return network(tiles)


def mirror_passes(axes: Sequence[int]) -> list[tuple[int, ...]]:
    """Every combination of axes, the empty one first."""
    return [c for n in range(len(axes) + 1) for c in combinations(sorted(axes), n)]


def _pieces(scores: Tensor) -> Iterator[tuple[int, int, int]]:
    """Window, first plane and the plane after the last, over (B, O, I, J, K)."""
    count, outputs, planes, *plane = scores.shape
    step = max(1, CHUNK_VALUES // (outputs * math.prod(plane)))
    for tile in range(count):
        for low in range(0, planes, step):
            yield tile, low, min(low + step, planes)


def _unmirrored(logits: Tensor, low: int, high: int, axes: Sequence[int], settings: WindowSettings) -> Tensor:
    """Scores of the planes [low, high) of one window, from the logits (O, I, J, K) of a mirrored pass."""
    planes = logits.shape[1]
    part = logits[:, planes - high : planes - low] if 0 in axes else logits[:, low:high]
    scores = _activated(part, settings).flip([a + 1 for a in axes])
    # What the mirrored patient calls left is this patient's right.
    return scores[list(settings.twin_outputs)] if 0 in axes else scores


def _activated(logits: Tensor, settings: WindowSettings) -> Tensor:
    logits = logits.float()
    if settings.conventions.blend == "logits":
        return logits
    return logits.sigmoid() if settings.overlap else logits.softmax(dim=0)
