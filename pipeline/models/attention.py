"""Attention gates (Oktay et al. 2018, arXiv 1804.03999): what of a skip the decoder looks at, as maps to read out."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.models.layers import CONVOLUTION, LINEAR, pointwise
from pipeline.models.spec import UNetSpec


class AttentionGate(nn.Module):
    """Weighs each voxel of a skip by what the coarser features ask for (figure 2 of the paper)."""

    def __init__(self, spec: UNetSpec, stage: int) -> None:
        super().__init__()
        channels, coarse_channels = spec.features[stage], spec.features[stage + 1]
        stride = spec.strides[stage + 1]
        inner = max(channels // 2, 1)
        self.skip = CONVOLUTION[spec.dimensions](channels, inner, stride, stride=stride, bias=False)
        self.gate = pointwise(spec, coarse_channels, inner)
        self.score = pointwise(spec, inner, 1)
        self.mode = LINEAR[spec.dimensions]

    def coefficients(self, skip: Tensor, coarse: Tensor) -> Tensor:
        """(B,1,...) in [0, 1], on the grid of `skip`."""
        joint = functional.relu(self.skip(skip) + self.gate(coarse), inplace=True)
        weights = torch.sigmoid(self.score(joint))
        return functional.interpolate(weights, size=skip.shape[2:], mode=self.mode, align_corners=False)

    def forward(self, skip: Tensor, coarse: Tensor) -> Tensor:
        return skip * self.coefficients(skip, coarse)
