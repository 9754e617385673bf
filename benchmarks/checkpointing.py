"""What gradient checkpointing saves and costs in a training step, against the patch: a Markdown table.

kept      bytes that autograd holds for backward when the forward pass ends: counted with saved-tensor hooks, each
          storage once, weights and buffers left out; exact on any machine
peak      the largest sum of all tensors alive at once in the step, gradients and intermediate results included (every
          storage that an operation makes, counted on tensors without contents; where there is a GPU
          torch.cuda.max_memory_allocated), with three copies of the weights for optimiser and averaging added
planner   what `pipeline.models.cost.step_gb` tells the planner of that peak
work      operations of forward and backward, on over off (torch's FlopCounterMode): what time would be, were all
          operations as fast; the same on any machine
time      forward and backward, the fastest of some runs that take turns (--repeats 0: not measured)
"""

from __future__ import annotations

import argparse
import itertools
import time
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from pipeline.config import NetworkConfig
from pipeline.models.cost import step_gb
from pipeline.models.unet import UNet
from pipeline.topology import Topology

MIB = 2**20
FURTHER_COPIES = 3  # the optimiser's two moments and the averaged weights, which a step here does not make


def main() -> None:
    """Measure every patch with and without checkpointing, and print a row for each."""
    args = parsed()
    print(f"{args.preset or 'default network'}, {args.width} channels at full resolution, batch {args.batch}, float32,")
    print(f"{'one GPU' if args.device == 'cuda' else f'{args.threads} CPU thread(s)'}; MiB, and seconds\n")
    columns = ["patch", *(f"{what} {on}" for what in ("kept", "peak", "planner") for on in ("off", "on")), "work"]
    columns += ["s off", "s on", "time"] if args.repeats else []
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for side in args.patches:
        print(row(args, side), flush=True)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patches", type=int, nargs="+", default=[32, 48, 64, 96, 128], help="sides of cubic patches")
    parser.add_argument("--width", type=int, default=32, help="channels at full resolution")
    parser.add_argument("--preset", choices=["resenc_m"], help="the residual encoder (all sizes have one network)")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each setting; 0: none")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(args.threads)
    return args


def row(args: argparse.Namespace, side: int) -> str:
    """One line of the table."""
    empty = [network_and_image(args, side, checkpointing=on, device="meta") for on in (False, True)]
    there = empty if args.device == "cpu" else pairs_on(args, side)
    kept = [kept_bytes(*pair) for pair in empty]
    peak = [peak_bytes(*pair) for pair in there]
    planner = [1e9 * step_gb("unet", network.spec, (side,) * 3, args.batch) for network, _ in empty]
    off, on = (operations(*pair) for pair in empty)
    cells = [f"{side}³", *(f"{size / MIB:.0f}" for size in (*kept, *peak, *planner)), f"{on / off:.2f}"]
    if args.repeats:
        off, on = timed(pairs_on(args, side), args.repeats)
        cells += [f"{off:.2f}", f"{on:.2f}", f"{on / off:.2f}"]
    return f"| {' | '.join(cells)} |"


def pairs_on(args: argparse.Namespace, side: int) -> list[tuple[UNet, Tensor]]:
    """Without and with checkpointing, on the device that is measured."""
    return [network_and_image(args, side, checkpointing=on, device=args.device) for on in (False, True)]


def network_and_image(args: argparse.Namespace, side: int, *, checkpointing: bool, device: str) -> tuple[UNet, Tensor]:
    """The planner's network for that patch, and a patch."""
    config = NetworkConfig(preset=args.preset, checkpointing="on" if checkpointing else "off")
    topology = Topology(config, 1, 3, (1.0, 1.0, 1.0), None)
    with torch.device(device):
        return UNet(topology.spec((side,) * 3, args.width)), torch.ones(args.batch, 1, *(side,) * 3)


def operations(network: UNet, image: Tensor) -> float:
    """Of forward and backward."""
    with FlopCounterMode(display=False) as counter:
        step(network, image)
    return counter.get_total_flops()


def step(network: UNet, image: Tensor) -> None:
    network.zero_grad()
    network(image).square().mean().backward()


def kept_bytes(network: UNet, image: Tensor) -> int:
    own = {t.untyped_storage()._cdata for t in itertools.chain(network.parameters(), network.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        logits = network(image)
    total = sum(storage.nbytes() for storage in kept.values())
    del logits
    return total


class AliveBytes(TorchDispatchMode):
    """Adds up the storages that operations make, and takes each away when it is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._note(leaf.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, size)

    def _drop(self, size: int) -> None:
        self.now -= size


def peak_bytes(network: UNet, image: Tensor) -> int:
    """Of a step, with the image, the weights and what an optimiser keeps of them."""
    weights = sum(p.nbytes for p in network.parameters())
    if image.is_cuda:
        step(network, image)  # the first looks for the fastest kernels
        network.zero_grad()
        torch.cuda.reset_peak_memory_stats()
        others = torch.cuda.memory_allocated() - weights - image.nbytes
        step(network, image)
        return torch.cuda.max_memory_allocated() - others + FURTHER_COPIES * weights
    with AliveBytes() as alive:
        step(network, image)
    network.zero_grad()
    return alive.peak + image.nbytes + (1 + FURTHER_COPIES) * weights


def timed(both: list[tuple[UNet, Tensor]], repeats: int) -> list[float]:
    """Seconds of the fastest run of each; they take turns, so that a busy moment hits both."""
    times_s: list[list[float]] = [[] for _ in both]
    for _ in range(repeats):
        for found, (network, image) in zip(times_s, both, strict=True):
            synchronise(image)
            start_s = time.perf_counter()
            step(network, image)
            synchronise(image)
            found.append(time.perf_counter() - start_s)
    return [min(found) for found in times_s]


def synchronise(image: Tensor) -> None:
    if image.is_cuda:
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
