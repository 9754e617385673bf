"""The U-Net, with every choice of it as a value of `UNetSpec`: encoder and decoder stages, the network, its
initial weights. What stages are made of is in `blocks`, `attention`, `transformer` and `layers`.

Sources: Ronneberger et al. 2015 (arXiv 1505.04597), Çiçek et al. 2016 (1606.06650), He et al. 2015 (1502.01852);
residual encoders of more blocks than the decoder has: Isensee et al. 2024 (2404.09556).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd

from pipeline.models.attention import AttentionGate
from pipeline.models.blocks import decoder_blocks, encoder_blocks, stem
from pipeline.models.checkpointing import checkpointed
from pipeline.models.layers import LINEAR, MAXIMUM_POOL, TRANSPOSED, cropped, pointwise, slope
from pipeline.models.shape import output_shape, skip_margin
from pipeline.models.spec import UNetSpec, unet_2015
from pipeline.models.transformer import BottleneckTransformer

__all__ = ["UNet", "unet_2015"]

TRANSFORMER_DEVIATION = 0.02
"""Standard deviation of the initial weights of transformer layers and of learned positions."""


class EncoderStage(nn.Module):
    """One resolution on the way down: stem or maximum pooling if the spec says so, then blocks."""

    def __init__(self, spec: UNetSpec, stage: int) -> None:
        super().__init__()
        in_channels = spec.features[stage - 1] if stage else spec.stem_channels or spec.in_channels
        stride = spec.strides[stage]
        self.stem = nn.Identity() if stage else stem(spec)
        self.pool: nn.Module = nn.Identity()
        if spec.downsampling == "max_pool" and math.prod(stride) > 1:
            self.pool = MAXIMUM_POOL[spec.dimensions](stride)
            stride = (1,) * spec.dimensions
        self.blocks = encoder_blocks(spec, stage, in_channels=in_channels, stride=stride)

    def forward(self, features: Tensor) -> Tensor:
        result: Tensor = self.blocks(self.pool(self.stem(features)))
        return result


class InterpolatedUpsampling(nn.Module):
    """Linear interpolation, and a 1x1 convolution to halve the features.

    Both are linear and the interpolation's weights sum to one, so their order does not change the result:
    the convolution comes first, where there are fewer voxels.
    """

    def __init__(self, spec: UNetSpec, stage: int) -> None:
        super().__init__()
        self.convolution = pointwise(spec, spec.features[stage + 1], spec.features[stage])
        self.factor = tuple(float(s) for s in spec.strides[stage + 1])
        self.mode = LINEAR[spec.dimensions]

    def forward(self, coarse: Tensor) -> Tensor:
        halved: Tensor = self.convolution(coarse)
        return functional.interpolate(halved, scale_factor=self.factor, mode=self.mode, align_corners=False)


class DecoderStage(nn.Module):
    """One resolution on the way up: upsample, join with the (cropped, gated) skip, then blocks."""

    def __init__(self, spec: UNetSpec, stage: int) -> None:
        super().__init__()
        channels, coarse_channels = spec.features[stage], spec.features[stage + 1]
        self.stride = spec.strides[stage + 1]
        self.margin = skip_margin(spec, stage)
        self.upsampling: nn.Module = InterpolatedUpsampling(spec, stage)
        if spec.upsampling == "transposed":
            make = TRANSPOSED[spec.dimensions]
            self.upsampling = make(coarse_channels, channels, self.stride, stride=self.stride)
        self.gate = AttentionGate(spec, stage) if spec.skip == "attention" else None
        self.blocks = decoder_blocks(spec, stage, in_channels=2 * channels)

    def forward(self, coarse: Tensor, skip: Tensor) -> Tensor:
        skip = self.cropped(skip, coarse)
        if self.gate is not None:
            skip = self.gate(skip, coarse)
        result: Tensor = self.blocks(torch.cat((self.upsampling(coarse), skip), dim=1))
        return result

    def cropped(self, skip: Tensor, coarse: Tensor) -> Tensor:
        """The part of `skip` that `coarse` covers; all of it with same padding."""
        covered = [side * s for side, s in zip(coarse.shape[2:], self.stride, strict=True)]
        return cropped(skip, covered, self.margin)


class UNet(nn.Module):
    """A U-Net of `spec`, 2D or 3D.

    Input (B, in_channels, ...), output logits (B, out_channels, ...): of the input's shape with same padding,
    of `shape.output_shape` with valid convolutions. With deep supervision and in training mode the output is
    a tuple of logits, one for each decoder stage, finest first.
    """

    def __init__(self, spec: UNetSpec, generator: torch.Generator | None = None) -> None:
        """Weights come from `generator`, or from torch's global one; no other random number is drawn."""
        super().__init__()
        self.spec = spec
        with torch.random.fork_rng(devices=[]):  # the layers' own initial values, all of them replaced below
            self.encoder = nn.ModuleList(EncoderStage(spec, stage) for stage in range(spec.stages))
            self.transformer = BottleneckTransformer(spec) if spec.bottleneck == "transformer" else None
            self.decoder = nn.ModuleList(DecoderStage(spec, stage) for stage in range(spec.stages - 1))
            supervised = max(spec.stages - 1, 1) if spec.deep_supervision else 1
            self.heads = nn.ModuleList(
                pointwise(spec, spec.features[stage], spec.out_channels) for stage in range(supervised)
            )
        _initialise(self, generator)

    def forward(self, image: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Logits for `image`.

        Raises:
            ValueError: the image's shape does not fit; the message names the nearest ones that do.
        """
        skips = self._encode(image)
        features = skips.pop()
        outputs = [] if self.decoder else [self.heads[0](features)]
        for stage in reversed(range(len(self.decoder))):
            # The last stage is the first to be needed again, when nothing has been given back yet: recomputing it
            # would cost time and lower no peak.
            run = self._run if stage else _directly
            features, logits = run(self.decoder[stage], self._decode, stage, features, skips.pop())
            outputs += [] if logits is None else [logits]
        supervised = self.spec.deep_supervision and self.training
        return tuple(reversed(outputs)) if supervised else outputs[-1]

    def features(self, image: Tensor) -> Tensor:
        """(B, features, ...), of which `head` makes the logits for `image`.

        Raises:
            ValueError: see `forward`.
        """
        skips = self._encode(image)
        features = skips.pop()
        for stage in reversed(range(len(self.decoder))):
            features = self.decoder[stage](features, skips.pop())
        return features

    def head(self, features: Tensor) -> Tensor:
        """Logits (B, out_channels, ...) of features at any places: it sees single voxels."""
        logits: Tensor = self.heads[0](features)
        return logits

    @torch.no_grad()
    def attention_maps(self, image: Tensor) -> tuple[Tensor, ...]:
        """The coefficients of every attention gate, finest first: (B,1,...) in [0, 1] on its (cropped) skip.

        Raises:
            ValueError: the network has no attention gates or is in training mode, or `image` does not fit.
        """
        if self.spec.skip != "attention":
            raise ValueError(f"found skip '{self.spec.skip}', expected 'attention': there are no maps")
        if self.training:
            raise ValueError("found training mode: call eval() first, so that reading changes nothing")
        skips = self._encode(image)
        features = skips.pop()
        maps = []
        for stage in reversed(range(len(self.decoder))):
            decoder: Any = self.decoder[stage]
            skip = skips.pop()
            maps.append(decoder.gate.coefficients(decoder.cropped(skip, features), features))
            features = decoder(features, skip)
        return tuple(reversed(maps))

    def _encode(self, image: Tensor) -> list[Tensor]:
        """The features of every encoder stage, finest first; the last is the bottleneck's."""
        output_shape(self.spec, tuple(image.shape[2:]))
        features = [image]
        for stage in self.encoder:
            features.append(self._run(stage, stage, features[-1]))
        if self.transformer is not None:
            features[-1] = self._run(self.transformer, self.transformer, features[-1])
        return features[1:]

    def _decode(self, stage: int, coarse: Tensor, skip: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features of one decoder stage, and its logits where they are wanted."""
        features: Tensor = self.decoder[stage](coarse, skip)
        wanted = stage == 0 or (self.spec.deep_supervision and self.training)
        return features, self.heads[stage](features) if wanted else None

    def _run(self, module: nn.Module, function: Callable[..., Any], *inputs: Any) -> Any:
        """`function(*inputs)`, checkpointed in training if the spec asks for it."""
        if self.spec.checkpointing and self.training:
            return checkpointed(module, function, *inputs, random=self.spec.drop_path > 0)
        return function(*inputs)


def _directly(_: nn.Module, function: Callable[..., Any], *inputs: Any) -> Any:
    return function(*inputs)


def _initialise(network: UNet, generator: torch.Generator | None) -> None:
    """He's normal initialisation for the activation in use (He et al. 2015); biases are zero, scales one.

    Transformers and learned positions are drawn small (as in GPT-2 and ViT), so that they start as a small change.
    """
    for module in network.modules():
        if isinstance(module, BottleneckTransformer) and module.positions is not None:
            nn.init.normal_(module.positions, std=TRANSFORMER_DEVIATION, generator=generator)
        if not isinstance(module, _ConvNd | nn.Linear):
            continue
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=TRANSFORMER_DEVIATION, generator=generator)
        elif module.transposed:
            # Kernel and stride are equal: a voxel sums over the input channels alone, and is not activated.
            nn.init.normal_(module.weight, std=module.in_channels**-0.5, generator=generator)
        else:
            nn.init.kaiming_normal_(module.weight, a=slope(network.spec), generator=generator)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
