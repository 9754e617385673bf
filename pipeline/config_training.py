"""The sections of a config that say how a network learns: the loop, the loss, the random changes of its patches.

Their base, `Section`, is that of all sections; `pipeline.config` puts them together.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from pipeline.schedule import Decision, check_decisions


def _rising(limits: tuple[float, float]) -> tuple[float, float]:
    if not 0 < limits[0] <= limits[1]:
        raise ValueError("expected two positive numbers, the smaller first")
    return limits


Range = Annotated[tuple[float, float], AfterValidator(_rising)]
Decisions = Annotated[tuple[Decision, ...], AfterValidator(check_decisions)]
RasAxis = Literal[0, 1, 2]


class Section(BaseModel):
    """A frozen part of a config; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class TrainConfig(Section):
    """The loop. One of `budget_minutes`, `steps` and `schedule` ends it; of two the later wins."""

    budget_minutes: float | None = Field(60.0, gt=0, description="wall time of the training, validation included")
    steps: int | None = Field(None, ge=1, description="number of updates; exactly repeatable")
    schedule: Decisions | None = Field(None, description="of a run's steps.json: repeats exactly what minutes gave it")
    seed: int = Field(0, ge=0, description="seed of weights, patches and augmentation")
    optimiser: Literal["adamw", "sgd"] = Field("adamw", description="AdamW, or SGD with Nesterov momentum 0.99")
    learning_rate: float = Field(3e-3, gt=0, description="peak of the schedule")
    weight_decay: float = Field(1e-2, ge=0, description="decoupled for AdamW, L2 for SGD")
    warmup: float = Field(0.05, ge=0, lt=1, description="part of the steps over which the rate rises")
    gradient_norm: float = Field(12.0, gt=0, description="gradients are clipped to this norm")
    weight_average: float = Field(0.995, ge=0, lt=1, description="decay of the averaged weights that are kept; 0: none")
    foreground_share: float = Field(0.5, ge=0, le=1, description="part of the patches centred on a labelled voxel")
    validations: int = Field(4, ge=1, description="whole-volume validations, evenly spaced, the last at the end")
    validation_cases: int = Field(8, ge=1, description="cases in those before the last, which takes all")
    checkpoint_minutes: float = Field(2.0, gt=0, description="a resumable checkpoint at least this often")
    workers: Literal["auto"] | Annotated[int, Field(ge=0)] = Field(
        "auto", description="processes that load batches; 0, 1: a thread; auto: a thread on a CPU, processes for a GPU"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: the GPU if there is one")
    precision: Literal["auto", "float32", "tf32", "bf16", "fp16"] = Field(
        "auto", description="auto: what is fastest there; tf32: float32 whose products a GPU may round to 10 bits"
    )
    inspect_every: int | None = Field(
        None, ge=1, description="updates between two looks at the figures and gradients of each level; null: no look"
    )
    deterministic: bool = Field(
        False, description="a GPU gives the same bits every time, more slowly; a CPU always does"
    )


Weight = Annotated[float, Field(ge=0)]


class LossTerms(Section):
    """Weights of the terms of `pipeline.loss_terms`, where their sources are named; 0 leaves a term out."""

    dice: Weight = Field(0.0, description="weight of soft Dice")
    generalised_dice: Weight = Field(0.0, description="weight of Dice with classes weighted by inverse squared volume")
    tversky: Weight = Field(0.0, description="weight of Tversky")
    focal_tversky: Weight = Field(0.0, description="weight of focal Tversky")
    cross_entropy: Weight = Field(0.0, description="weight of cross entropy")
    top_k: Weight = Field(0.0, description="weight of cross entropy of the hardest voxels")
    focal: Weight = Field(0.0, description="weight of focal cross entropy")
    boundary: Weight = Field(0.0, description="weight of the boundary loss; distances are computed on the CPU")
    hausdorff: Weight = Field(0.0, description="weight of the Hausdorff loss; distances are computed on the CPU")
    cldice: Weight = Field(0.0, description="weight of centreline Dice, for tubes")

    @model_validator(mode="after")
    def _some(self) -> LossTerms:
        if not any(weight for _, weight in self):
            raise ValueError("expected at least one term with a weight above 0")
        return self


class LossConfig(Section):
    """What training minimises: a weighted sum. A `terms` mapping in a file says all the terms there are."""

    terms: LossTerms = LossTerms(dice=1.0, cross_entropy=1.0)
    batch_dice: bool = Field(False, description="overlaps of all patches of a batch together, not of each patch")
    include_background: bool = Field(False, description="the background counts as a class in overlaps and distances")
    tversky_false_positives: float = Field(0.3, gt=0, le=10, description="their weight in both Tversky terms")
    tversky_false_negatives: float = Field(0.7, gt=0, le=10, description="their weight in both Tversky terms")
    focal_tversky_gamma: float = Field(4 / 3, ge=1, le=3, description="order of the root; 1: Tversky itself")
    focal_gamma: float = Field(2.0, ge=0, le=5, description="how little sure voxels count in focal; 0: cross entropy")
    top_k_share: float = Field(0.1, gt=0, le=1, description="part of each patch's voxels that top_k counts")
    hausdorff_alpha: float = Field(2.0, gt=0, le=3, description="power of the distances")
    cldice_iterations: int = Field(3, ge=1, le=50, description="erosions to a skeleton: the tubes' largest radius")


class AugmentConfig(Section):
    """Random changes of training patches: probability per patch and strength."""

    rotation_probability: float = Field(0.8, ge=0, le=1, description="of a rotation")
    rotation_degrees: float = Field(15.0, ge=0, le=180, description="largest angle about each axis")
    scaling_probability: float = Field(0.8, ge=0, le=1, description="of a change of size")
    scaling_range: Range = Field((0.85, 1.15), description="smallest and largest factor")
    elastic_probability: float = Field(0.2, ge=0, le=1, description="of an elastic deformation")
    elastic_mm: float = Field(2.0, ge=0, description="standard deviation of its control points, mm")
    mirror_axes: Literal["auto"] | tuple[RasAxis, ...] = Field(
        "auto",
        description="RAS axes that may be mirrored, in training and prediction; auto: left to right",
    )
    noise_probability: float = Field(0.3, ge=0, le=1, description="of Gaussian noise")
    noise_deviation: float = Field(0.2, ge=0, description="largest standard deviation, of normalised intensity")
    blur_probability: float = Field(0.1, ge=0, le=1, description="of a Gaussian blur")
    blur_voxels: Range = Field((0.5, 1.0), description="range of its sigma, voxels")
    brightness_probability: float = Field(0.3, ge=0, le=1, description="of a brightness factor")
    brightness_range: Range = Field((0.75, 1.25), description="range of the factor")
    contrast_probability: float = Field(0.3, ge=0, le=1, description="of a contrast change about the mean")
    contrast_range: Range = Field((0.75, 1.25), description="range of the factor")
    gamma_probability: float = Field(0.3, ge=0, le=1, description="of a gamma curve")
    gamma_range: Range = Field((0.7, 1.5), description="range of the exponent")
    low_resolution_probability: float = Field(0.1, ge=0, le=1, description="of a simulated low resolution")
    low_resolution_range: Range = Field((0.5, 1.0), description="range of the zoom")
    channel_dropout: Literal["auto"] | Annotated[float, Field(ge=0, le=1)] = Field(
        "auto",
        description="probability with which each optional channel is left out, never all; auto: 0.3",
    )
