"""The largest cubic patch that fits 8, 11, 24 and 80 GB, with and without gradient checkpointing: a Markdown table.

It is computed, not measured: by the memory model that the planner uses, in float32, for a step with --batch patches
of one channel and three classes. Mixed precision needs less. How far the model is from measured peaks is what
benchmarks/checkpointing.py shows. Needs neither PyTorch nor a GPU.
"""

from __future__ import annotations

import argparse
from typing import Literal

from pipeline.config import NetworkConfig
from pipeline.models.cost import step_gb
from pipeline.topology import Topology

MEMORIES_GB = (8, 11, 24, 80)
LARGEST_SIDE = 1024
# The presets M, L and XL are one network for three memories.
NETWORKS: dict[str, Literal["resenc_m"] | None] = {"default": None, "resenc_m, _l, _xl": "resenc_m"}


def main() -> None:
    """Print a row for each network and setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=2, help="patches in a step; the planner takes at least 2")
    parser.add_argument("--width", type=int, default=32, help="channels at full resolution")
    args = parser.parse_args()
    print(f"| network, {args.width} channels | checkpointing | {' | '.join(f'{gb} GB' for gb in MEMORIES_GB)} |")
    print(f"|---|---{'|---' * len(MEMORIES_GB)}|")
    for name, preset in NETWORKS.items():
        for checkpointing in ("off", "on"):
            network = NetworkConfig.model_validate({"preset": preset, "checkpointing": checkpointing})
            sides = [largest_side(network, gb, batch=args.batch, width=args.width) for gb in MEMORIES_GB]
            print(f"| {name} | {checkpointing} | {' | '.join(f'{side}³' for side in sides)} |")


def largest_side(network: NetworkConfig, memory_gb: float, *, batch: int, width: int) -> int:
    """Of a cube that fits, divisible by what its strides need; 0 if none does."""
    topology = Topology(network, 1, 3, (1.0, 1.0, 1.0), None)
    for side in range(LARGEST_SIDE, 0, -4):
        cube = (side, side, side)
        unet = topology.spec(cube, width)
        if side % topology.factor(unet)[0] == 0 and step_gb("unet", unet, cube, batch) <= memory_gb:
            return side
    return 0


if __name__ == "__main__":
    main()
