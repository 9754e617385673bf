"""How a channel is normalised, as a value: torch-free, so that plans can hold it."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, model_validator


class Normalisation(BaseModel):
    """How one channel is normalised.

    `window`: clip to [lower, upper], then subtract `mean` and divide by `deviation`, all of the training data (CT).
    `zscore`: subtract the volume's own mean and divide by its own deviation (MR, PET); with `nonzero`, both are
    measured on voxels other than 0 and voxels of exactly 0 become the lowest normalised value.

    Only models from elsewhere have the others (nnU-Net v2, preprocessing/normalization). `inside`: as `zscore`, but
    of what lies inside the body, the voxels that are not 0 in every channel and the holes among them; outside stays
    as it is. `unit`: to [0, 1] by the volume's own range. `byte`: divided by 255. `none`: as it is.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["window", "zscore", "inside", "unit", "byte", "none"]
    lower: float = 0.0
    upper: float = 0.0
    mean: float = 0.0
    deviation: float = 1.0
    nonzero: bool = False

    @model_validator(mode="after")
    def _usable(self) -> Self:
        if self.kind == "window" and not (self.lower < self.upper and self.deviation > 0):
            raise ValueError(f"a window from {self.lower} to {self.upper} with deviation {self.deviation} is empty")
        return self
