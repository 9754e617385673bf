"""What loading costs a training: the part of an update's wall time spent waiting for batches, and of the CPU's time.

    python benchmarks/loader_share.py                       # bundled hippocampus cases, the hippocampus plan
    python benchmarks/loader_share.py --device cuda --workers 8

An update is what a training does: forward, loss, backward and AdamW of the planned network. On a GPU one minus the
waiting is the utilisation by the step timer: the host waits for the device after every update.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pipeline.batch import Batch
from pipeline.checks import check_dataset
from pipeline.config import AugmentConfig, LossConfig, NetworkConfig, PlanConfig
from pipeline.dataset import Patches, prepare_case
from pipeline.fingerprint import Measuring
from pipeline.loader import Timed, batches, count_workers
from pipeline.losses import Targets, build_loss, deep_supervision_loss
from pipeline.manifest import load_dataset
from pipeline.models.registry import build_network
from pipeline.plan import Budget, Plan
from pipeline.planner import make_plan

ROOT = Path(__file__).parents[1]
WARM = 5
"""Updates that are not counted: the first batches have been made by then."""


@dataclass
class Clocked:
    """A source that sums up the CPU time of the thread that asks it."""

    source: Patches
    spent_s: float = field(default=0.0)

    def batch(self, number: int) -> Batch:
        begun = time.thread_time()
        batch = self.source.batch(number)
        self.spent_s += time.thread_time() - begun
        return batch

    def case_ids(self, number: int) -> tuple[str, ...]:
        return self.source.case_ids(number)

    def recipe(self) -> tuple[str, dict[str, Any]]:
        return self.source.recipe()


def world(cache: Path, shape: tuple[int, int, int], device: str) -> tuple[Plan, Patches]:
    """The plan that `volseg train` would make of the bundled cases for half an hour, and their patches."""
    dataset = load_dataset(ROOT / "data_manifests" / "hippocampus_demo.json")
    measuring = Measuring(dataset.manifest)
    check_dataset(dataset, visit=measuring.visit)
    cases = dataset.manifest.cases
    budget = Budget(device, memory_gb=6.0, minutes=30.0, gflops=100.0 if device == "cpu" else 20_000.0)
    fingerprint = measuring.fingerprint([case.case_id for case in cases])
    plan = make_plan(fingerprint, budget, settings=PlanConfig(patch_shape=shape), network=NetworkConfig())
    prepared = [prepare_case(dataset, case, plan, cache) for case in cases]
    twins = tuple(range(plan.class_count))
    patches = Patches(prepared, plan, augment=AugmentConfig(), twin_classes=twins, foreground_share=0.5, seed=0)
    return plan, patches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--workers", default="auto")
    parser.add_argument("--updates", type=int, default=60)
    parser.add_argument("--patch", type=int, nargs=3, default=(32, 48, 40))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        plan, patches = world(Path(cache), tuple(arguments.patch), arguments.device)
        workers = count_workers("auto" if arguments.workers == "auto" else int(arguments.workers), arguments.device)
        print(
            f"patch {'x'.join(map(str, plan.patch_shape))}, batch {plan.batch_size}, features {plan.unet.features}, "
            f"{torch.get_num_threads()} threads, loading by {workers if workers > 1 else 'a thread'}"
        )
        measure(plan, patches, torch.device(arguments.device), workers, arguments.updates)


def measure(plan: Plan, patches: Patches, device: torch.device, workers: int, updates: int) -> None:
    """Train for a while and print where the time went."""
    network = build_network(plan.network, plan.unet, plan.patch_shape, generator=torch.Generator().manual_seed(0))
    network.to(device)
    optimiser = torch.optim.AdamW(network.parameters(), lr=1e-3)
    loss = build_loss(LossConfig(), Targets(plan.class_count))
    source = Clocked(patches)  # of this process only
    seconds, waits = [], []
    with closing(
        Timed(
            batches(source if workers <= 1 else patches, 0, updates + WARM, workers=workers, pin=device.type == "cuda")
        )
    ) as made:
        stamp, waited_s, cpu_s, loading_s = time.monotonic(), 0.0, 0.0, 0.0
        for number, batch in enumerate(made):
            if number == WARM:
                cpu_s, loading_s = time.process_time(), source.spent_s
            moved = batch.to(device)
            optimiser.zero_grad(set_to_none=True)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                outputs = network(moved.images)
            total, _ = deep_supervision_loss(loss, outputs, moved.classes)
            total.backward()
            optimiser.step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            now = time.monotonic()
            seconds.append(now - stamp)
            waits.append(made.waited_s - waited_s)
            stamp, waited_s = now, made.waited_s
        cpu_s, loading_s = time.process_time() - cpu_s, source.spent_s - loading_s
    wait = sum(waits[WARM:]) / sum(seconds[WARM:])
    print(f"an update: {1000 * statistics.median(seconds[WARM:]):.1f} ms (median of {updates})")
    print(f"waiting for batches: {100 * wait:.2f} % of the wall time; the rest: {100 * (1 - wait):.2f} %")
    if workers <= 1:
        print(f"loading: {100 * loading_s / cpu_s:.2f} % of the CPU time of this process")


if __name__ == "__main__":
    main()
