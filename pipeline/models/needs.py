"""What each network asks of a plan, and what it costs beside our U-Net: torch-free, so that the planner can see it.

The figures of MONAI's networks were measured with MONAI 1.6.1 as `pipeline.models.registry` builds them: autograd's
saved-tensor hooks for what backward keeps, torch's FlopCounterMode for the work (tests/pipeline/models/test_cost.py
measures them again).
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field

from pipeline.errors import PlanError


@dataclass(frozen=True)
class OwnCost:
    """Of a network whose sizes are its own, with one channel in and two classes out.

    `kept_bytes` (float32, for backward), `checkpointed_bytes` and `flops` (forward) are for each voxel of the patch;
    a further channel adds `flops_in` and a further class `flops_out`.
    """

    parameters: int
    kept_bytes: float
    flops: float
    flops_in: float
    flops_out: float
    checkpointed_bytes: float | None = None


@dataclass(frozen=True)
class Shares:
    """Of a network built from the plan's stages: parts of what our U-Net of the same spec has, keeps and does."""

    parameters: float = 1.0
    kept: float = 1.0
    flops: float = 1.0


@dataclass(frozen=True)
class Needs:
    """What a network asks of a plan.

    `keys`: the `network.*` keys that it follows, beside name and dimensions (None: all).
    `features`: its own widths, finest first, where the plan cannot choose them; every stride is 2 then.
    `costs`: by the number of dimensions, for a network with its own widths.
    `sees_patch`: every voxel of the bottleneck sees the whole of an ordinary patch.
    `batch_normalised`: it has batch normalisation of its own, whatever the plan says.
    """

    keys: frozenset[str] | None = frozenset()
    features: tuple[int, ...] | None = None
    encoder_blocks: int = 2
    residual: bool = False
    least_stages: int = 1
    needs_package: str | None = None
    sees_patch: bool = False
    batch_normalised: bool = False
    costs: dict[int, OwnCost] = field(default_factory=dict)
    shares: Shares = Shares()

    @property
    def ours(self) -> bool:
        """Whether it is the U-Net of `pipeline.models.unet`."""
        return self.keys is None

    @property
    def divisor(self) -> int | None:
        """What each side of a patch must be divisible by, where the plan's strides do not say it."""
        return None if self.features is None else int(2 ** (len(self.features) - 1))

    def follows(self, key: str) -> bool:
        """Whether `network.<key>` says anything to it."""
        return self.keys is None or key in self.keys


NEEDS: dict[str, Needs] = {
    "unet": Needs(keys=None),
    "segresnet": Needs(
        features=(16, 32, 64, 128),
        residual=True,
        costs={
            3: OwnCost(4_700_914, 1005.0, 138_528.0, flops_in=864.0, flops_out=32.0),
            2: OwnCost(1_576_402, 1516.5, 118_624.0, flops_in=288.0, flops_out=32.0),
        },
    ),
    # Windows of 7 are filled up, so that the figures change with the patch; these are the largest from 64 voxels on.
    "swin_unetr": Needs(
        keys=frozenset({"checkpointing"}),
        features=(24, 24, 48, 96, 192, 384),
        needs_package="einops",
        sees_patch=True,
        costs={
            3: OwnCost(15_703_004, 4304.0, 193_967.0, flops_in=1392.0, flops_out=48.0, checkpointed_bytes=1735.0),
            2: OwnCost(6_302_228, 4394.0, 145_558.0, flops_in=528.0, flops_out=48.0, checkpointed_bytes=2078.0),
        },
    ),
    "dynunet": Needs(keys=frozenset({"block"}), least_stages=3),
    "attention_unet": Needs(
        least_stages=2, batch_normalised=True, shares=Shares(parameters=1.05, kept=1.26, flops=0.88)
    ),
    "mednext": Needs(
        features=(32, 64, 128, 256, 512),
        costs={
            3: OwnCost(5_550_914, 7226.0, 121_790.0, flops_in=64.0, flops_out=64.0),
            2: OwnCost(5_472_002, 10_490.0, 267_108.0, flops_in=64.0, flops_out=64.0),
        },
    ),
}


def needs_of(name: str) -> Needs:
    """What the network called `name` asks for.

    Raises:
        PlanError: there is no network of that name; the nearest and all others are named.
    """
    if name not in NEEDS:
        near = difflib.get_close_matches(name, NEEDS, n=1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise PlanError(f"network '{name}' is not known: {hint}known are {', '.join(NEEDS)}")
    return NEEDS[name]
