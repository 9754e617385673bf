"""Channels that a case may lack, and what an image ends in beyond its border.

A missing channel is 0 everywhere after normalisation, the mean of what a network sees. In training some of those that
are there are left out at random (modality dropout: Neverova et al. 2016, ModDrop, doi 10.1109/TPAMI.2015.2461544), so
that the network learns to do with the others. Beyond its border each channel goes on with its own lowest value, in
patches and in windows alike; for a missing one that is 0 again.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from transforms.sampling import filled


def channel_minima(image: Tensor) -> Tensor:
    """The lowest value (C,) of each channel of an image (C, I, J, K): what it ends in beyond its border."""
    return image.flatten(1).amin(dim=1)


def pad_channels(image: Tensor, before_after: Sequence[tuple[int, int]]) -> Tensor:
    """An image (C, I, J, K) with voxels added before and after each axis, of each channel's own lowest value."""
    if not any(map(any, before_after)):
        return image
    sides = [before + n + after for (before, after), n in zip(before_after, image.shape[1:], strict=True)]
    padded = filled((image.shape[0], *sides), channel_minima(image), dtype=image.dtype, device=image.device)
    i, j, k = (slice(before, before + n) for (before, _), n in zip(before_after, image.shape[1:], strict=True))
    padded[:, i, j, k] = image
    return padded


def insert_missing(image: Tensor, present: Sequence[bool]) -> Tensor:
    """Channels that are there (P, I, J, K) in their places among all (C, I, J, K); the others are 0.

    Raises:
        ValueError: `present` is not true as often as the image has channels.
    """
    if sum(present) != image.shape[0]:
        raise ValueError(f"{image.shape[0]} channels, expected {sum(present)} of {len(present)}")
    whole = torch.zeros((len(present), *image.shape[1:]), dtype=image.dtype, device=image.device)
    whole[torch.as_tensor(list(present), device=image.device)] = image
    return whole


def draw_kept(
    random: np.random.RandomState, present: Sequence[bool], *, optional: Sequence[bool], probability: float
) -> npt.NDArray[np.bool_]:
    """Which channels (C,) a patch keeps of those that are `present`, at least one of which must be.

    Each optional one is dropped with `probability`; where that would leave none, one of them stays, drawn evenly.
    The number of draws is always C, whatever happens.
    """
    draws = random.random_sample(len(present))
    there = np.asarray(present, dtype=bool)
    kept = there & ~(np.asarray(optional, dtype=bool) & (draws < probability))
    if not kept.any():
        kept[np.argmax(np.where(there, draws, -1.0))] = True
    return np.asarray(kept)
