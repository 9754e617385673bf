"""Transformer layers in the bottleneck: every coarse voxel looks at every other.

Sources: Vaswani et al. 2017 (arXiv 1706.03762), pre-normalised as in Dosovitskiy et al. 2020 (2010.11929); rotary
positions by Su et al. 2021 (2104.09864), along each axis as in Heo et al. 2024 (2403.13298).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.models.layers import LINEAR, DropPath
from pipeline.models.shape import Shape
from pipeline.models.spec import MLP_FACTOR, UNetSpec

ROTARY_BASE = 100.0
"""The slowest frequency turns by about a radian over this many voxels of the bottleneck (Heo et al.)."""

RotaryTable = tuple[Tensor, Tensor]


class BottleneckTransformer(nn.Module):
    """Layers over the voxels of the bottleneck as tokens: (B,C,...) in, the same shape out.

    What the layers find is added to the features, and there is no normalisation behind the last one: the decoder's
    blocks have their own.
    """

    def __init__(self, spec: UNetSpec) -> None:
        super().__init__()
        channels = spec.features[-1]
        rates = spec.drop_path_rates[-spec.transformer_layers :]
        self.head_channels = channels // spec.transformer_heads
        self.mode = LINEAR[spec.dimensions]
        self.positions: nn.Parameter | None = None
        if spec.positions == "learned":
            self.positions = nn.Parameter(torch.zeros(1, channels, *spec.position_grid))
        self.layers = nn.ModuleList(TransformerLayer(channels, spec.transformer_heads, drop_rate=r) for r in rates)

    def forward(self, features: Tensor) -> Tensor:
        shape = tuple(features.shape[2:])
        table = None
        if self.positions is None:
            table = rotary_table(shape, self.head_channels, features.device)
        else:
            features = features + self.learned_positions(shape)
        tokens = features.flatten(2).transpose(1, 2)
        for layer in self.layers:
            tokens = layer(tokens, table)
        return tokens.transpose(1, 2).reshape(features.shape).contiguous()

    def learned_positions(self, shape: Shape) -> Tensor:
        """(1,C,*shape): interpolated where the bottleneck is larger or smaller than that of the training's patch."""
        assert self.positions is not None
        if tuple(self.positions.shape[2:]) == shape:
            return self.positions
        return functional.interpolate(self.positions, size=shape, mode=self.mode, align_corners=False)


class TransformerLayer(nn.Module):
    """Attention and a two-layer perceptron, each normalised before and added to what came in. Tokens are (B,N,C)."""

    def __init__(self, channels: int, heads: int, *, drop_rate: float) -> None:
        super().__init__()
        self.attention_normalisation = nn.LayerNorm(channels)
        self.attention = SelfAttention(channels, heads)
        self.perceptron_normalisation = nn.LayerNorm(channels)
        self.perceptron = nn.Sequential(
            nn.Linear(channels, MLP_FACTOR * channels), nn.GELU(), nn.Linear(MLP_FACTOR * channels, channels)
        )
        self.drop_path = DropPath(drop_rate)

    def forward(self, tokens: Tensor, table: RotaryTable | None) -> Tensor:
        tokens = tokens + self.drop_path(self.attention(self.attention_normalisation(tokens), table))
        change: Tensor = self.drop_path(self.perceptron(self.perceptron_normalisation(tokens)))
        return tokens + change


class SelfAttention(nn.Module):
    """PyTorch's scaled_dot_product_attention over (B,N,C), in heads of equal size."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        # Values on their own, so that rotated queries and keys do not keep their unrotated selves alive beside them.
        self.query_key = nn.Linear(channels, 2 * channels)
        self.value = nn.Linear(channels, channels)
        self.output = nn.Linear(channels, channels)

    def forward(self, tokens: Tensor, table: RotaryTable | None) -> Tensor:
        query, key = (self._heads(part) for part in self.query_key(tokens).chunk(2, dim=-1))
        if table is not None:
            query, key = rotated(query, table), rotated(key, table)
        # Heads are moved to the front as views: the result then lies in memory as its next layer reads it.
        query, key, value = (part.transpose(1, 2) for part in (query, key, self._heads(self.value(tokens))))
        mixed = functional.scaled_dot_product_attention(query, key, value)
        result: Tensor = self.output(mixed.transpose(1, 2).flatten(2))
        return result

    def _heads(self, tokens: Tensor) -> Tensor:
        """(B,N,C) to (B,N,heads,C/heads)."""
        return tokens.view(*tokens.shape[:2], self.heads, -1)


def rotary_table(shape: Shape, head_channels: int, device: torch.device) -> RotaryTable:
    """Cosines and sines (N, 1, pairs) of the angles by which each voxel's pairs of channels are turned.

    Every axis has as many pairs of channels as the others; `head_channels // (2 * axes)`, at least 1. Channels that
    are left over are not turned.
    """
    pairs = head_channels // (2 * len(shape))
    frequencies = ROTARY_BASE ** (-torch.arange(pairs, device=device, dtype=torch.float32) / pairs)
    axes = [torch.arange(side, device=device, dtype=torch.float32) for side in shape]
    grids = torch.meshgrid(*axes, indexing="ij")
    angles = torch.cat([grid.flatten()[:, None, None] * frequencies for grid in grids], dim=-1)
    return angles.cos(), angles.sin()


def rotated(tokens: Tensor, table: RotaryTable) -> Tensor:
    """`tokens` (B,N,heads,C) with their pairs of channels turned; products of two depend on distances alone."""
    cosines, sines = table
    pairs = cosines.shape[-1]
    first, second, rest = tokens[..., :pairs], tokens[..., pairs : 2 * pairs], tokens[..., 2 * pairs :]
    turned = (first * cosines - second * sines, second * cosines + first * sines, rest)
    return torch.cat(turned, dim=-1).to(tokens.dtype)
