"""What a U-Net is, as a value: torch-free, so that plans and configs can hold it."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, model_validator


class UNetSpec(BaseModel):
    """Every choice of the U-Net. Stage 0 works at full resolution; stage s+1 is coarser by `strides[s+1]`."""

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
    normalisation: Literal["instance", "batch", "group", "none"] = "instance"
    activation: Literal["leaky_relu", "relu"] = "leaky_relu"
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
