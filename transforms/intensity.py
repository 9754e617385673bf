"""Intensities to the range that a network learns on. Statistics are arguments, never measured in hiding."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform
from torch import Tensor

from transforms.intensity_spec import Normalisation

SMALLEST_DEVIATION = 1e-6
"""A volume flatter than this cannot be normalised by its own deviation."""


def normalise(voxels: Tensor, how: Normalisation) -> Tensor:
    """One channel (I, J, K) float32 to a new tensor of the same shape.

    Raises:
        ValueError: the volume is constant and is to be normalised by its own deviation.
    """
    if how.kind == "window":
        return voxels.clamp(how.lower, how.upper).sub_(how.mean).div_(how.deviation)
    measured = voxels[voxels != 0] if how.nonzero else voxels
    deviation = float(measured.std(correction=0)) if measured.numel() else 0.0
    if deviation < SMALLEST_DEVIATION:
        raise ValueError("the volume has one value everywhere, so it cannot be normalised and holds nothing to see")
    normalised = (voxels - measured.mean()) / deviation
    if how.nonzero:
        normalised[voxels == 0] = normalised[voxels != 0].min()
    return normalised


class NormaliseIntensityd(MapTransform):
    """Each channel of (C, I, J, K) by its own `Normalisation`."""

    def __init__(self, keys: KeysCollection, normalisations: Sequence[Normalisation]) -> None:
        super().__init__(keys)
        self.normalisations = tuple(normalisations)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Raises ValueError when the number of channels is another or a channel is constant."""
        result = dict(data)
        for key in self.key_iterator(result):
            image = result[key]
            if image.shape[0] != len(self.normalisations):
                raise ValueError(f"{image.shape[0]} channels, expected {len(self.normalisations)}")
            channels = [normalise(c, how) for c, how in zip(image, self.normalisations, strict=True)]
            result[key] = torch.stack(channels)
        return result
