"""Out of memory for real: a process whose address space is limited trains in parts what it cannot take whole."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.plan import Plan

ROOT = Path(__file__).parents[2]
WORKER = """
import json, resource, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from pipeline.batch import Batch
from pipeline.config import AugmentConfig, TrainConfig
from pipeline.device import Hardware
from pipeline.errors import RunError
from pipeline.losses import Targets, build_loss
from pipeline.plan import Plan
from pipeline.processes import open_fabric
from pipeline.step import start_training, update
from pipeline.task import TrainingTask, bare
from transforms.labels import schema_from_names

plan = Plan.model_validate_json(Path(sys.argv[1]).read_text())
task = TrainingTask(
    plan, schema_from_names({1: "a", 2: "b"}), (), (),
    TrainConfig(steps=9, optimiser="sgd"), AugmentConfig(), 0.5, Path("."),
)
fabric = open_fabric(Hardware("cpu", "32-true"))
loss = build_loss(task.loss, Targets(3))
random = torch.Generator().manual_seed(0)
def batch(count, shape):
    images = torch.randn(count, 1, *shape, generator=random)
    return Batch(images, (images > 0).byte(), torch.ones(count, 3, dtype=torch.bool), ("x",) * count)
update(task, fabric, start_training(task, fabric), loss, batch(1, (8, 8, 8)), 0.01)
given = batch(4, plan.patch_shape)
state = start_training(task, fabric)
taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
limit = taken + int(sys.argv[2]) * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
error = None
try:
    update(task, fabric, state, loss, given, 0.01)
except RunError as caught:
    error = str(caught)
weights = [float(value) for p in state.network.parameters() for value in p.flatten()]
print(json.dumps({"parts": state.parts, "error": error, "weights": weights}))
"""


def train_within(megabytes: int, plan: Plan, folder: Path) -> dict[str, Any]:
    """One update of four patches with this much more address space than a small one took."""
    (folder / "plan.json").write_text(plan.model_dump_json())
    command = [sys.executable, "-c", WORKER, str(folder / "plan.json"), str(megabytes)]
    outcome = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stderr
    found: dict[str, Any] = json.loads(outcome.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
def test_less_memory_means_smaller_parts_and_the_same_weights_until_one_patch_does_not_fit(
    small_plan: Plan, tmp_path: Path
) -> None:
    plan = small_plan.model_copy(update={"patch_shape": (64, 64, 64), "batch_size": 4})
    whole, split, none = (train_within(megabytes, plan, tmp_path) for megabytes in (4000, 320, 40))
    assert (whole["parts"], whole["error"]) == (1, None)
    assert split["error"] is None
    assert split["parts"] in (2, 4)
    assert split["weights"] == pytest.approx(whole["weights"], rel=1e-5, abs=1e-6)
    assert none["error"].startswith("out of memory with a single patch of 64x64x64; the nearest plan that fits: --set")
