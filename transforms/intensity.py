"""Intensities to the range that a network learns on. Statistics are arguments, never measured in hiding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from transforms.intensity_spec import Normalisation

SMALLEST_DEVIATION = 1e-6
"""A volume flatter than this cannot be normalised by its own deviation, unless the way of it says by what to divide."""

_ROUNDING = 1e-5
"""Of the mean: a smaller deviation may be nothing but the mean's own rounding (float32)."""

_NOTHING = "has one value everywhere, so it cannot be normalised and holds nothing to see"


def normalise(voxels: Tensor, how: Normalisation, *, inside: Tensor | None = None) -> Tensor:
    """One channel (I, J, K) float32 to a new tensor of the same shape; `inside` (I, J, K) bool is the body.

    Raises:
        ValueError: the volume is constant and is to be normalised by its own deviation or range and no smallest
            divisor, its values are no bytes and should be, or `inside` is needed and not given.
    """
    if how.kind == "none":
        return voxels.clone()
    if how.kind == "window":
        return voxels.clamp(how.lower, how.upper).sub_(how.mean).div_(how.deviation)
    if how.kind == "byte":
        return _bytes(voxels)
    if how.kind == "unit":
        return _own_range(voxels, how.smallest_divisor)
    if how.kind == "inside":
        return _inside(voxels, inside, how.smallest_divisor)
    measured = _nonzero(voxels) if how.nonzero else voxels
    mean, deviation = _mean_and_deviation(measured, how.smallest_divisor)
    del measured  # a volume of its own, as the result is
    normalised = (voxels - mean).div_(deviation)
    if how.nonzero:
        nothing = voxels == 0
        normalised.masked_fill_(nothing, normalised.masked_fill_(nothing, torch.inf).min())
    return normalised


def normalise_channels(image: Tensor, hows: Sequence[Normalisation], *, inside: Tensor | None = None) -> Tensor:
    """Each channel of (C, I, J, K) float32 by its own way; `inside` as in `normalise`.

    Raises:
        ValueError: as `normalise`, for another number of channels, and where every channel is constant although one
            alone may be.
    """
    if image.shape[0] != len(hows):
        raise ValueError(f"{image.shape[0]} channels, expected {len(hows)}")
    if any(how.smallest_divisor for how in hows) and all(_is_flat(channel) for channel in image):
        raise ValueError(f"{'the volume' if len(hows) == 1 else 'every channel'} {_NOTHING}")
    if len(hows) == 1:
        return normalise(image[0], hows[0], inside=inside)[None]
    normalised = torch.empty_like(image)
    for target, channel, how in zip(normalised, image, hows, strict=True):
        target.copy_(normalise(channel, how, inside=inside))
    return normalised


def _nonzero(voxels: Tensor) -> Tensor:
    """The values that are not 0; NumPy chooses them without a list of their places, eight times as large."""
    values = voxels.numpy(force=True)
    return torch.from_numpy(values[values != 0]).to(voxels.device)


def _is_flat(voxels: Tensor) -> bool:
    """Whether (I, J, K) holds one value; of a volume that does not, little is looked at."""
    first = voxels[0, 0, 0]
    return all(bool((plane == first).all()) for plane in voxels)


def _mean_and_deviation(measured: Tensor, smallest: float | None) -> tuple[float, float]:
    """What to subtract and by what to divide; of one value everywhere these are exactly that value and nothing."""
    if not measured.numel():
        raise ValueError(f"the volume {_NOTHING}")
    mean, deviation = float(measured.mean()), float(measured.std(correction=0))
    if deviation <= _ROUNDING * abs(mean):
        lowest, highest = (float(value) for value in measured.aminmax())
        mean, deviation = (lowest, 0.0) if lowest == highest else (mean, deviation)
    if smallest is None and deviation < SMALLEST_DEVIATION:
        raise ValueError(f"the volume {_NOTHING}")
    return mean, max(deviation, smallest or 0.0)


def _inside(voxels: Tensor, inside: Tensor | None, smallest: float | None) -> Tensor:
    if inside is None:
        raise ValueError("normalising what is inside the body needs its mask")
    mean, deviation = _mean_and_deviation(voxels[inside], smallest)
    return torch.where(inside, (voxels - mean) / deviation, voxels)


def _own_range(voxels: Tensor, smallest: float | None) -> Tensor:
    lowest, highest = voxels.aminmax()
    if smallest is None and highest - lowest < SMALLEST_DEVIATION:
        raise ValueError("the volume has one value everywhere, so it has no range to be brought to [0, 1]")
    return (voxels - lowest) / (highest - lowest).clamp_min(smallest or 0.0)


def _bytes(voxels: Tensor) -> Tensor:
    lowest, highest = (float(value) for value in voxels.aminmax())
    if lowest < 0 or highest > 255:
        raise ValueError(f"intensities from {lowest:g} to {highest:g}, expected a picture's bytes, from 0 to 255")
    return voxels / 255.0
