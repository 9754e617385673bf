"""How a channel is normalised, as a value: torch-free, so that plans can hold it."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer, model_validator


class Normalisation(BaseModel):
    """How one channel is normalised.

    `window`: clip to [lower, upper], then subtract `mean` and divide by `deviation`, all of the training data (CT).
    `zscore`: subtract the volume's own mean and divide by its own deviation (MR, PET); with `nonzero`, both are
    measured on voxels other than 0 and voxels of exactly 0 become the lowest normalised value.

    Only models from elsewhere have the others (nnU-Net v2, preprocessing/normalization). `inside`: as `zscore`, but
    of what lies inside the body, the voxels that are not 0 in every channel and the holes among them; outside stays
    as it is. `unit`: to [0, 1] by the volume's own range. `byte`: divided by 255. `none`: as it is.

    A channel whose own deviation or range is next to nothing is refused (None), or divided by `smallest_divisor`: one
    value everywhere then becomes 0.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["window", "zscore", "inside", "unit", "byte", "none"]
    lower: float = 0.0
    upper: float = 0.0
    mean: float = 0.0
    deviation: float = 1.0
    nonzero: bool = False
    smallest_divisor: float | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _usable(self) -> Self:
        if self.kind == "window" and not (self.lower < self.upper and self.deviation > 0):
            raise ValueError(f"a window from {self.lower} to {self.upper} with deviation {self.deviation} is empty")
        return self

    @model_serializer(mode="wrap")
    def _as_before(self, written: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without the divisor where there is none: plans and caches are known by the hash of what is written."""
        fields: dict[str, Any] = written(self)
        if self.smallest_divisor is None:
            fields.pop("smallest_divisor", None)
        return fields
