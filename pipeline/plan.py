"""What a dataset is to the planner, and what the planner says: values, JSON in and out, no arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.errors import PlanError
from pipeline.manifest import Modality
from pipeline.models.monai_spec import MonaiNetwork
from pipeline.models.spec import UNetSpec
from transforms.intensity_spec import Normalisation
from transforms.placing_spec import Placing
from transforms.recipe_spec import Reorient, Step

Triple = tuple[int, int, int]
Spacing = tuple[float, float, float]


class Frozen(BaseModel):
    """An immutable value; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class CaseFingerprint(Frozen):
    """One training case, on RAS axes. Extents are of the box around each label."""

    case_id: str
    shape: Triple
    spacing_mm: Spacing
    label_volumes_mm3: dict[str, float]
    label_extents_mm: dict[str, Spacing]


class ChannelFingerprint(Frozen):
    """One channel over the `case_count` training cases that have it (None: all).

    `inside_*` are of voxels inside labels, in the file's unit (CT: HU).
    """

    name: str
    modality: Modality
    optional: bool = False
    case_count: int | None = None
    lowest: float
    highest: float
    zero_share: float
    inside_percentile_00_5: float
    inside_percentile_99_5: float
    inside_mean: float
    inside_deviation: float


class Fingerprint(Frozen):
    """What the planner knows of a dataset."""

    format: Literal["volseg-fingerprint-1"] = "volseg-fingerprint-1"
    channels: tuple[ChannelFingerprint, ...] = Field(min_length=1)
    class_count: int = Field(ge=2)
    regions: tuple[str, ...] = ()
    has_twins: bool
    cases: tuple[CaseFingerprint, ...] = Field(min_length=1)

    @property
    def output_count(self) -> int:
        """Channels of the network's output: one a region, or one a class if there are no regions."""
        return len(self.regions) or self.class_count


class ChannelPlan(Frozen):
    """One input channel: what it is, how it is normalised, and the range that training saw (for refusing others).

    An `optional` one may be missing; it is then 0 everywhere, the mean of what the network sees. A maker elsewhere may
    not tell the modality or the range: None is unknown, and nothing is refused for it.
    """

    name: str
    modality: Modality | None
    normalisation: Normalisation
    lowest: float | None
    highest: float | None
    optional: bool = False

    @property
    def described(self) -> str:
        """Its name, and in brackets what it is."""
        return f"{self.name} ({self.modality or 'modality unknown'}{', optional' if self.optional else ''})"


class InferenceConventions(Frozen):
    """How tiles become a result; a model from elsewhere keeps its maker's ways.

    Overlapping tiles, mirrored passes and folds are averaged as `blend` says, and interpolated back as what they then
    are, or as the `probabilities` that averaged logits amount to (`restores`). Tiles count with the `weights` of
    `transforms.patches`, or `even` ones. `tiles` are spread evenly, or follow each other at a fixed distance, the last
    one moved back to end with the volume. Volumes smaller than a tile are padded with each channel's own minimum or
    with zeros. A tile may be longer than the patch by `longest_window` where that spares tiles.
    """

    blend: Literal["probabilities", "logits"] = "probabilities"
    restores: Literal["blended", "probabilities"] = "blended"
    weights: Literal["centred", "nnunet", "even"] = "centred"
    tiles: Literal["spread", "stepped"] = "spread"
    padding: Literal["minimum", "zero"] = "minimum"
    longest_window: float = 1.5


class Plan(Frozen):
    """Everything that training and prediction need to agree on.

    Axes are those of `axis_codes`; with a `placing` that does not reorient, they are the study's own as stored. A
    model from MONAI has its network in `monai`, of which `unet` then says channels and divisors alone, and `recipe` in
    place of all that is said of axes, spacing and normalisation.
    """

    format: Literal["volseg-plan-1"] = "volseg-plan-1"
    channels: tuple[ChannelPlan, ...]
    class_count: int
    axis_codes: str = "RAS"
    spacing_mm: Spacing
    patch_shape: Triple
    batch_size: int
    network: str
    unet: UNetSpec
    slice_axis: int | None
    mirror_axes: tuple[int, ...]
    receptive_field_mm: Spacing
    largest_label_extent_mm: Spacing
    memory_gb: float
    patch_gflop: float
    inference: InferenceConventions = InferenceConventions()
    placing: Placing | None = None
    recipe: tuple[Step, ...] | None = None
    monai: MonaiNetwork | None = None
    reasons: dict[str, str]
    warnings: tuple[str, ...]

    @property
    def normalisations(self) -> tuple[Normalisation, ...]:
        """One per channel."""
        return tuple(channel.normalisation for channel in self.channels)

    @property
    def takes_stored_axes(self) -> bool:
        """True if the network sees axes as each study's file has them, so that it may see one patient mirrored."""
        if self.recipe is not None:
            return not any(isinstance(step, Reorient) for step in self.recipe)
        return self.placing is not None and not self.placing.reorients

    @property
    def factor(self) -> Triple:
        """What the sides of a patch must be divisible by; 1 across slices."""
        factor = list(self.unet.downsampling_factor)
        if self.slice_axis is not None:
            factor.insert(self.slice_axis, 1)
        return factor[0], factor[1], factor[2]

    def preprocessing(self) -> dict[str, Any]:
        """The part that decides what a preprocessed case looks like; caches are keyed by it."""
        rows = [n.model_dump(mode="json") for n in self.normalisations]
        placing = {} if self.placing is None else {"placing": self.placing.model_dump(mode="json")}
        recipe = {} if self.recipe is None else {"recipe": [step.model_dump(mode="json") for step in self.recipe]}
        grid = {"axis_codes": self.axis_codes, "spacing_mm": list(self.spacing_mm)}
        return {**grid, "normalisations": rows, **placing, **recipe}


@dataclass(frozen=True)
class Budget:
    """What may be spent. `gflops` is the sustained rate of convolutions on the device, in GFLOP/s."""

    device: Literal["cpu", "cuda"]
    memory_gb: float
    minutes: float | None
    gflops: float


def read_plan(path: Path) -> Plan:
    """Read a plan JSON.

    Raises:
        PlanError: missing, not JSON, or not a plan of this format.
    """
    try:
        return Plan.model_validate_json(path.read_bytes())
    except OSError as error:
        raise PlanError(f"{path}: cannot read the plan ({error.strerror})") from error
    except ValidationError as error:
        first = error.errors()[0]
        raise PlanError(f"{path}: not a volseg plan: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
