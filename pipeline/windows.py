"""Sliding-window inference on one preprocessed volume: probabilities, blended where tiles overlap."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from transforms.channels import pad_channels
from transforms.patches import blending_weights, padding_to, tile_starts

LONGEST_WINDOW = 1.5
"""A tile may be longer than the patch by this factor when that spares tiles."""

Network = Callable[[Tensor], Tensor]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class WindowSettings:
    """How a volume is tiled.

    `factor` is what a tile's sides must be divisible by. `mirror_axes` are averaged over in every combination;
    () means once, as it is. `twin_outputs` are the outputs' left/right counterparts. Outputs exclude each other (a
    softmax), or are regions that `overlap` (a sigmoid each).
    """

    patch_shape: tuple[int, int, int]
    factor: tuple[int, int, int]
    step: float
    mirror_axes: tuple[int, ...]
    twin_outputs: tuple[int, ...]
    overlap: bool = False


def predict_windows(
    network: Network, image: Tensor, settings: WindowSettings, *, on_tile: Progress | None = None
) -> Tensor:
    """Probabilities (outputs, I, J, K) float32 for an image (C, I, J, K), on the image's device.

    `network` maps (1, C, *patch) to logits (1, outputs, *patch). Volumes smaller than the patch are padded with
    each channel's own minimum, as in training, and the padding is cut off again. `on_tile(done, total)` is called
    after each tile.
    """
    window = window_shape(image.shape[1:], settings)
    before_after = padding_to(image.shape[1:], window)
    padded = pad_channels(image, before_after)
    tiles = tile_starts(padded.shape[1:], window, step=settings.step)
    tell = on_tile or _silence
    if len(tiles) == 1:
        total = _probabilities(network, padded, settings)
        tell(1, 1)
    else:
        total = _blended(network, padded, tiles, window, settings, tell)
    inside = [slice(low, low + n) for (low, _), n in zip(before_after, image.shape[1:], strict=True)]
    return total[:, inside[0], inside[1], inside[2]]


def window_shape(shape: Sequence[int], settings: WindowSettings) -> tuple[int, int, int]:
    """The tile for a volume: the patch, but along axes where the volume is hardly longer, the whole volume.

    A patch is not all that a network can take: one larger tile costs less than several that overlap.
    """
    sides = [
        whole if patch < whole <= LONGEST_WINDOW * patch else patch
        for patch, whole in (
            (patch, math.ceil(side / factor) * factor)
            for side, patch, factor in zip(shape, settings.patch_shape, settings.factor, strict=True)
        )
    ]
    return sides[0], sides[1], sides[2]


def _blended(
    network: Network,
    image: Tensor,
    tiles: Sequence[tuple[int, int, int]],
    window: tuple[int, int, int],
    settings: WindowSettings,
    tell: Progress,
) -> Tensor:
    weights = blending_weights(window).to(image.device)
    total: Tensor | None = None
    coverage = torch.zeros(image.shape[1:], device=image.device)
    for done, start in enumerate(tiles, start=1):
        box = tuple(slice(a, a + n) for a, n in zip(start, window, strict=True))
        scores = _probabilities(network, image[(slice(None), *box)], settings)
        if total is None:
            total = torch.zeros((scores.shape[0], *image.shape[1:]), device=image.device)
        total[(slice(None), *box)] += scores * weights
        coverage[box] += weights
        tell(done, len(tiles))
    if total is None:
        raise ValueError("a volume has at least one tile")
    return total.div_(coverage)


def _silence(done: int, total: int) -> None:
    """Nothing is told."""


def _probabilities(network: Network, tile: Tensor, settings: WindowSettings) -> Tensor:
    """One tile (C, *patch), averaged over its mirrored passes."""
    passes = mirror_passes(settings.mirror_axes)
    total: Tensor | None = None
    for axes in passes:
        dims = [a + 1 for a in axes]
        logits = network(tile.flip(dims)[None])[0].float()
        scores = (logits.sigmoid() if settings.overlap else logits.softmax(dim=0)).flip(dims)
        if 0 in axes:
            # What the mirrored patient calls left is this patient's right.
            scores = scores[list(settings.twin_outputs)]
        total = scores if total is None else total + scores
    if total is None:
        raise ValueError("there is at least the pass that mirrors nothing")
    return total / len(passes)


def mirror_passes(axes: Sequence[int]) -> list[tuple[int, ...]]:
    """Every combination of axes, the empty one first."""
    return [c for n in range(len(axes) + 1) for c in combinations(sorted(axes), n)]
