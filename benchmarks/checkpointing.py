"""What gradient checkpointing saves and costs in a training step: one U-Net, one patch, with and without.

kept       bytes that autograd holds for backward when the forward pass ends: counted with saved-tensor hooks, each
           storage once, weights and buffers left out; exact on any machine
estimate   what `pipeline.models.shape.activation_bytes` tells the planner: kept at most, recomputation included
alive      the largest sum of all tensors alive at once in the step, gradients and intermediate results included
resident   the peak of the resident memory of a process that does nothing else, PyTorch itself included
time       forward and backward, in runs that take turns
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import statistics
import subprocess
import sys
import time
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.models.counts import activation_bytes
from pipeline.models.spec import UNetSpec
from pipeline.models.unet import UNet

MIB = 2**20
MAXRSS_BYTES = 1 if sys.platform == "darwin" else 1024


def main() -> None:
    """Measure both settings and print them side by side."""
    args = parsed()
    if args.only:
        print(resident_bytes(args, checkpointing=args.only == "on"))
        return
    # A process inherits the peak of the one that starts it, so these come before anything is computed here.
    resident = {name: resident_bytes_elsewhere(name) for name in ("off", "on")}
    found = {name: measured(args, checkpointing=name == "on") for name in ("off", "on")}
    for name, size in resident.items():
        found[name] |= {"resident_bytes": size}
    for name, times_s in timed(args).items():
        found[name] |= {"times_s": times_s}
    if args.json:
        print(json.dumps({"patch": args.patch, "features": args.features, "batch": args.batch, **found}))
    else:
        print_table(args, found)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patch", type=int, nargs=3, default=[64, 64, 64], metavar=("I", "J", "K"))
    parser.add_argument("--features", type=int, nargs="+", default=[32, 64, 128, 256], help="of each stage")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each setting")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    parser.add_argument("--only", choices=["off", "on"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    return args


def measured(args: argparse.Namespace, *, checkpointing: bool) -> dict[str, Any]:
    """What can be counted in this process, in bytes."""
    network, image = network_and_image(args, checkpointing=checkpointing)
    return {
        "kept_bytes": kept_bytes(network, image),
        "estimate_bytes": activation_bytes(network.spec, tuple(args.patch), args.batch),
        "alive_bytes": alive_bytes(network, image),
    }


def network_and_image(args: argparse.Namespace, *, checkpointing: bool) -> tuple[UNet, Tensor]:
    stages = len(args.features)
    spec = UNetSpec(
        features=tuple(args.features),
        strides=((1, 1, 1), *((2, 2, 2),) * (stages - 1)),
        kernel_shapes=((3, 3, 3),) * stages,
        encoder_blocks=(2,) * stages,
        decoder_blocks=(2,) * (stages - 1),
        checkpointing=checkpointing,
    )
    generator = torch.Generator().manual_seed(0)
    return UNet(spec, generator), torch.randn(args.batch, 1, *args.patch, generator=generator)


def step(network: UNet, image: Tensor) -> None:
    network.zero_grad()
    network(image).square().mean().backward()


def kept_bytes(network: UNet, image: Tensor) -> int:
    own = {t.untyped_storage().data_ptr() for t in itertools.chain(network.parameters(), network.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
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


def alive_bytes(network: UNet, image: Tensor) -> int:
    with AliveBytes() as alive:
        step(network, image)
    network.zero_grad()
    return alive.peak


def resident_bytes_elsewhere(name: str) -> int:
    command = [sys.executable, *sys.argv, "--only", name]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def resident_bytes(args: argparse.Namespace, *, checkpointing: bool) -> int:
    # A tiny step first: what PyTorch imports for checkpointing (about 80 MiB) is not what is asked here.
    tiny = argparse.Namespace(patch=[16, 16, 16], features=[2, 2], batch=1)
    step(*network_and_image(tiny, checkpointing=True))
    network, image = network_and_image(args, checkpointing=checkpointing)
    step(network, image)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * MAXRSS_BYTES


def timed(args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each run; the settings take turns, so that a busy moment hits both."""
    both = {name: network_and_image(args, checkpointing=name == "on") for name in ("off", "on")}
    for network, image in both.values():
        step(network, image)
    times_s: dict[str, list[float]] = {name: [] for name in both}
    for _ in range(args.repeats):
        for name, (network, image) in both.items():
            start_s = time.perf_counter()
            step(network, image)
            times_s[name].append(time.perf_counter() - start_s)
    return times_s


def print_table(args: argparse.Namespace, found: dict[str, dict[str, Any]]) -> None:
    patch, features = ("x".join(map(str, numbers)) for numbers in (args.patch, args.features))
    print(f"patch {patch}, features {features}, batch {args.batch}, float32, {args.threads} threads")
    print(f"{'checkpointing':14}{'off':>12}{'on':>12}{'on/off':>9}")
    for name in ("kept", "estimate", "alive", "resident"):
        off, on = (found[setting][f"{name}_bytes"] / MIB for setting in ("off", "on"))
        print(f"{name:14}{off:8.1f} MiB{on:8.1f} MiB{on / off:9.3f}")
    for name, pick in (("time, median", statistics.median), ("time, fastest", min)):
        off, on = (pick(found[setting]["times_s"]) for setting in ("off", "on"))
        print(f"{name:14}{off:10.3f} s{on:10.3f} s{on / off:9.3f}")
    print(f"{args.repeats} timed runs of each")


if __name__ == "__main__":
    main()
