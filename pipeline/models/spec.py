"""What a U-Net is, as a value: torch-free, so that plans and configs can hold it."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, model_validator

MLP_FACTOR = 4
"""Channels inside a transformer layer's perceptron, as a multiple of those outside (Vaswani et al. 2017)."""


class UNetSpec(BaseModel):
    """Every choice of the U-Net. Stage 0 works at full resolution; stage s+1 is coarser by `strides[s+1]`.

    Every tuple that is indexed by stage is finest first; `decoder_blocks[s]` is at the resolution of stage s.
    `decoder_block` None: as `block`. `stem_channels`: of a plain block before the first stage, 0 for none.
    `biased_convolutions`: biases in blocks also where a normalisation follows, which takes them away again.
    `transformer_*`, `positions` and `position_grid` count with bottleneck 'transformer' alone; `position_grid` is the
    bottleneck's shape in training, which learned positions need.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    dimensions: Literal[2, 3] = 3
    in_channels: int = 1
    out_channels: int = 2
    features: tuple[int, ...] = (32, 64, 128, 256)
    strides: tuple[tuple[int, ...], ...] = ((1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2))
    kernel_shapes: tuple[tuple[int, ...], ...] = ((3, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3))
    encoder_blocks: tuple[int, ...] = (2, 2, 2, 2)
    decoder_blocks: tuple[int, ...] = (2, 2, 2)
    block: Literal["plain", "residual"] = "plain"
    decoder_block: Literal["plain", "residual"] | None = None
    stem_channels: int = 0
    bottleneck: Literal["convolution", "transformer"] = "convolution"
    transformer_layers: int = 4
    transformer_heads: int = 8
    positions: Literal["rotary", "learned"] = "rotary"
    position_grid: tuple[int, ...] = ()
    drop_path: float = 0.0
    weight_standardisation: bool = False
    biased_convolutions: bool = False
    normalisation: Literal["instance", "batch", "group", "none"] = "instance"
    normalisation_epsilon: float = 1e-5
    activation: Literal["leaky_relu", "relu"] = "leaky_relu"
    leaky_slope: float = 0.01
    padding: Literal["same", "valid"] = "same"
    downsampling: Literal["strided", "max_pool"] = "strided"
    upsampling: Literal["transposed", "interpolated"] = "transposed"
    skip: Literal["concatenate", "attention"] = "concatenate"
    deep_supervision: bool = False
    checkpointing: bool = False

    @property
    def stages(self) -> int:
        """Number of resolutions, the bottleneck included."""
        return len(self.features)

    @property
    def block_of_decoder(self) -> Literal["plain", "residual"]:
        """Kind of the blocks on the way up."""
        return self.decoder_block or self.block

    @property
    def drop_path_rates(self) -> tuple[float, ...]:
        """Of each encoder block and then each transformer layer: rising linearly from 0 over those that can drop.

        Plain blocks cannot; the decoder's blocks, few and close to the output, never do.
        """
        fixed = sum(self.encoder_blocks) if self.block == "plain" else 0
        dropping = sum(self.encoder_blocks) - fixed
        dropping += self.transformer_layers if self.bottleneck == "transformer" else 0
        steps = max(dropping - 1, 1)
        return (0.0,) * fixed + tuple(self.drop_path * (n if dropping > 1 else 1) / steps for n in range(dropping))

    @property
    def downsampling_factor(self) -> tuple[int, ...]:
        """Per axis, what a patch's side must be divisible by under same padding."""
        factor = [1] * self.dimensions
        for stride in self.strides:
            factor = [f * s for f, s in zip(factor, stride, strict=True)]
        return tuple(factor)

    @model_validator(mode="after")
    def _stages_agree(self) -> Self:
        n = self.stages
        if n < 1:
            raise ValueError("features: at least one stage is needed")
        lengths = {
            "strides": (len(self.strides), n),
            "kernel_shapes": (len(self.kernel_shapes), n),
            "encoder_blocks": (len(self.encoder_blocks), n),
            "decoder_blocks": (len(self.decoder_blocks), n - 1),
        }
        for name, (found, expected) in lengths.items():
            if found != expected:
                raise ValueError(f"{name}: {found} entries for {n} stages, expected {expected}")
        for name, rows in (("strides", self.strides), ("kernel_shapes", self.kernel_shapes)):
            if any(len(row) != self.dimensions for row in rows):
                raise ValueError(f"{name}: every stage wants {self.dimensions} numbers")
        if any(s != 1 for s in self.strides[0]):
            raise ValueError("strides: the first stage works at full resolution, so its stride is 1")
        return self

    @model_validator(mode="after")
    def _numbers_make_sense(self) -> Self:
        counts = {
            "in_channels": [self.in_channels],
            "out_channels": [self.out_channels],
            "features": self.features,
            "strides": [s for row in self.strides for s in row],
            "kernel_shapes": [k for row in self.kernel_shapes for k in row],
            "encoder_blocks": self.encoder_blocks,
            "decoder_blocks": self.decoder_blocks,
        }
        for name, numbers in counts.items():
            if any(number < 1 for number in numbers):
                raise ValueError(f"{name}: found {min(numbers)}, every number must be at least 1")
        if any(k % 2 == 0 for k in counts["kernel_shapes"]):
            raise ValueError("kernel_shapes: found an even number, a kernel needs a middle voxel: use 1, 3 or 5")
        if self.stem_channels < 0:
            raise ValueError(f"stem_channels: found {self.stem_channels}, expected 0 for no stem, or its channels")
        if not (self.normalisation_epsilon > 0 and self.leaky_slope >= 0):
            raise ValueError(
                f"normalisation_epsilon, leaky_slope: found {self.normalisation_epsilon:g} and {self.leaky_slope:g}, "
                "expected more than 0 and at least 0"
            )
        return self

    @model_validator(mode="after")
    def _transformer_can_be_built(self) -> Self:
        if self.bottleneck == "convolution":
            return self
        if self.transformer_layers < 1:
            raise ValueError(f"transformer_layers: found {self.transformer_layers}, expected at least 1")
        heads, channels = self.transformer_heads, self.features[-1]
        if heads < 1 or channels % heads:
            raise ValueError(
                f"transformer_heads: found {heads}, which does not divide the bottleneck's {channels} channels"
            )
        if self.positions == "rotary" and channels // heads < 2 * self.dimensions:
            raise ValueError(
                f"transformer_heads: found {heads}, which leaves {channels // heads} channels a head; rotary positions "
                f"need {2 * self.dimensions}: use fewer heads"
            )
        if self.positions == "learned" and len(self.position_grid) != self.dimensions:
            raise ValueError(f"position_grid: found {self.position_grid}, expected {self.dimensions} numbers")
        return self

    @model_validator(mode="after")
    def _drop_path_has_paths(self) -> Self:
        if not 0.0 <= self.drop_path < 1.0:
            raise ValueError(f"drop_path: found {self.drop_path:g}, expected a probability below 1")
        if self.drop_path and self.block == "plain" and self.bottleneck == "convolution":
            raise ValueError("drop_path: needs block 'residual' or bottleneck 'transformer', there is no path to drop")
        return self

    @model_validator(mode="after")
    def _valid_padding_keeps_registration(self) -> Self:
        if self.padding == "same":
            return self
        if self.deep_supervision:
            raise ValueError(
                "deep_supervision: needs padding 'same', since valid convolutions make every "
                "output cover another field of view"
            )
        for strides, kernel in zip(self.strides, self.kernel_shapes, strict=True):
            if self.downsampling == "strided" and any(k < 2 * s - 1 for s, k in zip(strides, kernel, strict=True)):
                raise ValueError(
                    "strides: with padding 'valid' and downsampling 'strided' a stride s needs a kernel of 2s-1 "
                    f"or more, found {strides} with {kernel}: use longer kernels or downsampling 'max_pool'"
                )
        return self


def unet_2015() -> UNetSpec:
    """Ronneberger, Fischer and Brox (MICCAI 2015), figure 1: 572x572 in, 388x388 out, 64 to 1024 features.

    The dropout that the paper mentions at the end of its contracting path is left out.
    """
    return UNetSpec(
        dimensions=2,
        in_channels=1,
        out_channels=2,
        features=(64, 128, 256, 512, 1024),
        strides=((1, 1), (2, 2), (2, 2), (2, 2), (2, 2)),
        kernel_shapes=((3, 3),) * 5,
        encoder_blocks=(2,) * 5,
        decoder_blocks=(2,) * 4,
        normalisation="none",
        activation="relu",
        padding="valid",
        downsampling="max_pool",
        upsampling="transposed",
    )
