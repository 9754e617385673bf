"""Preprocessing as a list of steps in a given order, as a value: torch-free, so that plans can hold it.

A model that was trained elsewhere wants its maker's steps in its maker's order. These are the arithmetic of MONAI's
transforms of the same meaning (monai/transforms/intensity/array.py, spatial/array.py, croppad/array.py, MONAI 1.6).
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class _Step(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Reorient(_Step):
    """Axes permuted and flipped so that they point along `axis_codes` (Orientation)."""

    step: Literal["reorient"] = "reorient"
    axis_codes: str = Field(pattern=r"^[RLAPSI]{3}$")


class Respace(_Step):
    """Other voxel sides, None keeping the study's own: the first voxel stays where it is (Spacing)."""

    step: Literal["respace"] = "respace"
    spacing_mm: tuple[float | None, float | None, float | None]
    interpolation: Literal["linear", "nearest"] = "linear"

    @model_validator(mode="after")
    def _positive(self) -> Self:
        if any(side is not None and side <= 0 for side in self.spacing_mm):
            raise ValueError(f"spacing_mm: found {self.spacing_mm}, a voxel's side is more than 0 mm")
        return self


class MapRange(_Step):
    """The range `source` to the range `target`, linearly; beyond it as well unless `clip` (ScaleIntensityRange).

    `target` None: to [0, 1], and `clip` says nothing then.
    """

    step: Literal["map_range"] = "map_range"
    source: tuple[float, float]
    target: tuple[float, float] | None = None
    clip: bool = False

    @model_validator(mode="after")
    def _not_empty(self) -> Self:
        if self.source[0] == self.source[1]:
            raise ValueError(f"source: the range from {self.source[0]:g} to {self.source[1]:g} is empty")
        return self


class MapPercentiles(_Step):
    """As `MapRange`, from the volume's own percentiles (ScaleIntensityRangePercentiles); of each channel or of all."""

    step: Literal["map_percentiles"] = "map_percentiles"
    percentiles: tuple[float, float]
    target: tuple[float, float] | None = None
    clip: bool = False
    channel_wise: bool = False

    @model_validator(mode="after")
    def _rising(self) -> Self:
        low, high = self.percentiles
        if not 0 <= low < high <= 100:
            raise ValueError(f"percentiles: found {low:g} and {high:g}, expected two from 0 to 100, the lower first")
        return self


class Stretch(_Step):
    """The volume's own range to `target`; of each channel or of all (ScaleIntensity). A flat one: times its start."""

    step: Literal["stretch"] = "stretch"
    target: tuple[float, float] = (0.0, 1.0)
    channel_wise: bool = False


class Standardise(_Step):
    """Minus the mean, divided by the deviation, of each channel or of all (NormalizeIntensity).

    With `nonzero` of what is not 0, and what is 0 stays so. `mean` and `deviation` are measured where they are None;
    otherwise one a channel if `channel_wise`, else one.
    """

    step: Literal["standardise"] = "standardise"
    nonzero: bool = False
    channel_wise: bool = False
    mean: tuple[float, ...] | None = None
    deviation: tuple[float, ...] | None = None


class CropForeground(_Step):
    """The smallest box around what is above 0 in any channel, with `margin` voxels around it as far as there are any
    (CropForeground, `allow_smaller`)."""

    step: Literal["crop_foreground"] = "crop_foreground"
    margin: int = Field(0, ge=0)


Step = Annotated[
    Reorient | Respace | MapRange | MapPercentiles | Stretch | Standardise | CropForeground,
    Field(discriminator="step"),
]
