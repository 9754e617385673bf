"""The memory contract: what is planned, what is refused, and that the process keeps to it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline import predict as predict_module
from pipeline import settled_memory
from pipeline.bundle import load_bundle
from pipeline.confidence import MOVING_BYTES
from pipeline.errors import PlanError
from pipeline.free_memory import _group_bytes, free_bytes, held_bytes
from pipeline.memory_plan import Demand, plan_memory
from pipeline.network_memory import answer_bytes
from pipeline.plan import Plan
from pipeline.postprocessing import LIBRARY_BYTES
from pipeline.predict import Model, PredictSettings, explain, predict
from transforms.geometry import Geometry
from transforms.volume import Volume

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
DEMAND = Demand(
    process=100_000_000,
    study=50_000_000,
    preparing=200_000_000,
    image=10_000_000,
    network=300_000_000,
    live=400_000_000,
    slab_plane=10_000_000,
    restoring=300_000_000,
    label_map=5_000_000,
)


class TestPlan:
    def test_the_largest_slabs_that_fit(self) -> None:
        # While restoring 865 MB are held beside the slab, which takes 10 MB a plane.
        assert [plan_memory(DEMAND, limit_bytes=mb * 10**6, batch=1).slab_planes for mb in (4000, 1024, 910)] == [
            16,
            8,
            4,
        ]

    def test_the_answer_to_air_is_kept_where_there_is_room_for_it(self) -> None:
        demand = replace(DEMAND, empty=100_000_000)
        # Beside the network 1,010 MB are held with it, and 910 without.
        plans = [plan_memory(demand, limit_bytes=mb * 10**6, batch=1) for mb in (4000, 1010, 1009, 910)]
        assert [plan.skip_empty for plan in plans] == [True, True, False, False]
        assert [plan.slab_planes for plan in plans] == [16, 4, 8, 4]
        assert "air" in plans[2].lines()[-1]
        assert all(plan.peak_bytes <= plan.limit_bytes for plan in plans)

    def test_too_little_is_one_line_that_names_what_suffices(self) -> None:
        with pytest.raises(PlanError) as caught:
            plan_memory(DEMAND, limit_bytes=800_000_000, batch=1)
        message = str(caught.value)
        assert message.startswith("0.80 GB of memory do not suffice for this study and this model")
        assert "\n" not in message
        least = re.search(r"--max-memory ([\d.]+)GB", message)
        assert least is not None
        # The network holds 910 MB, whatever the slabs; another process may hold some 5 MB more.
        assert float(least[1]) == 0.92
        assert plan_memory(DEMAND, limit_bytes=910_000_000, batch=1).slab_planes == 4
        with pytest.raises(PlanError):
            plan_memory(DEMAND, limit_bytes=909_000_000, batch=1)

    def test_the_lines_name_the_stages_the_peak_and_the_choices(self) -> None:
        lines = plan_memory(DEMAND, limit_bytes=4_000_000_000, batch=1).lines()
        assert [line.split(":")[0] for line in lines[:4]] == ["preparing", "network", "restoring", "labels"]
        assert lines[-2] == "at most 1.02 GB of 4.00 GB"
        assert lines[-1] == "windows at a time: 1; planes restored at a time: 16"


class TestUncertainty:
    ASKED = PredictSettings(True, uncertainty=True, keep_scores=2)

    def test_it_is_counted_where_it_is_held_and_only_if_asked_for(self, small_bundle: Path) -> None:
        bundle = load_bundle(small_bundle)
        mirrored = bundle.plan.model_copy(update={"mirror_axes": (1,)})
        grid = Geometry((64, 80, 96), torch.eye(4).numpy())
        plans = {}
        for name, plan, settings in (
            ("plain", mirrored, PredictSettings(True)),
            ("asked", mirrored, self.ASKED),
            ("alone", bundle.plan.model_copy(update={"mirror_axes": ()}), self.ASKED),
        ):
            found = explain(Model((replace(bundle, plan=plan),)), grid, settings=settings, device=CPU)
            plans[name] = {stage.name: dict(stage.parts) for stage in found.stages}
        voxels = 64 * 80 * 96
        assert "uncertainty" not in plans["plain"]
        # Two maps in half precision, or one; the numbers and levels of two classes.
        for name, size in (("asked", 2 * 2 + 2 * 2), ("alone", 2 + 2 * 2)):
            stages = plans[name]
            held = {stages[stage]["uncertainty and scores"] for stage in ("network", "restoring", "uncertainty")}
            assert held == {size * voxels}
        ring = plans["asked"]["network"]["unfinished scores"] - plans["plain"]["network"]["unfinished scores"]
        # One channel more of a ring that holds three of them and the coverage.
        assert ring == plans["plain"]["network"]["unfinished scores"] / 4

    def test_finished_maps_are_as_large_as_the_study(self, small_bundle: Path) -> None:
        """Of twice as fine a grid along each axis as the network's."""
        bundle = load_bundle(small_bundle)
        mirrored = replace(bundle, plan=bundle.plan.model_copy(update={"mirror_axes": (1,)}))
        source = Geometry((128, 160, 192), np.diag([0.5, 0.5, 0.5, 1.0]))
        plan = explain(Model((mirrored,)), source, settings=self.ASKED, device=CPU)
        stages, voxels = {stage.name: dict(stage.parts) for stage in plan.stages}, 64 * 80 * 96
        # On the network's grid two maps in half precision, and the numbers and levels of two classes.
        assert stages["restoring"]["uncertainty and scores"] == (2 * 2 + 2 * 2) * voxels
        # Then two maps of bytes on the study's, and the same scores; the first map while the second is moved.
        assert stages["labels"]["uncertainty and scores"] == 2 * 8 * voxels + 2 * 2 * voxels
        assert stages["uncertainty"]["work"] == (MOVING_BYTES + 1) * 8 * voxels

    def test_on_a_gpu_only_what_is_gathered_is_in_ordinary_memory(self, small_bundle: Path) -> None:
        bundle = load_bundle(small_bundle)
        mirrored = replace(bundle, plan=bundle.plan.model_copy(update={"mirror_axes": (1,)}))
        source = Geometry((64, 80, 96), np.eye(4))
        plan = explain(Model((mirrored,)), source, settings=self.ASKED, device=torch.device("cuda"))
        stages, voxels = {stage.name: dict(stage.parts) for stage in plan.stages}, 64 * 80 * 96
        assert (stages["network"]["network"], stages["network"]["unfinished scores"]) == (0, 0)
        assert stages["restoring"]["finished scores"] == 0
        assert stages["restoring"]["uncertainty and scores"] == (2 * 2 + 2 * 2) * voxels


class TestSettled:
    """A process of 1 GB that grows by what a first prediction brings, which is counted before and not again."""

    @pytest.fixture
    def process(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        held = [10**9]
        monkeypatch.setattr(settled_memory, "_COME", settled_memory._Come())
        for module in (settled_memory, predict_module):
            monkeypatch.setattr(module, "held_bytes", lambda: held[0])
        return held

    def test_the_second_study_is_planned_as_the_first(self, small_bundle: Path, process: list[int]) -> None:
        model, settings = Model((load_bundle(small_bundle),)), PredictSettings(False)
        voxels = np.random.default_rng(0).normal(size=(24, 36, 28)).astype(np.float32)
        volume = Volume(voxels, Geometry(voxels.shape, np.eye(4)), None, 0.0)
        first = explain(model, volume.geometry, settings=settings, device=CPU)
        process[0] += voxels.nbytes
        predict(model, [volume], settings=settings, device=CPU)
        process[0] += settled_memory.PREDICTING_BYTES - voxels.nbytes
        second = explain(model, volume.geometry, settings=settings, device=CPU)
        assert second.stages == first.stages
        # Nor where others are read and written beside it.
        beside = replace(settings, held_bytes=settled_memory.settled_bytes(cleans=False))
        assert explain(model, volume.geometry, settings=beside, device=CPU).stages == first.stages

    def test_what_planning_and_the_first_post_processing_bring(self, process: list[int]) -> None:
        predicting, cleaning = settled_memory.PREDICTING_BYTES, LIBRARY_BYTES
        before = settled_memory.settled_bytes(cleans=True)
        assert before == 10**9 + predicting + cleaning
        with settled_memory.planning():
            process[0] += 10**7
        assert settled_memory.settled_bytes(cleans=True) == before
        settled_memory.note_prediction(cleaned=False)
        process[0] = 10**9 + predicting
        assert settled_memory.settled_bytes(cleans=True) == before
        settled_memory.note_prediction(cleaned=True)
        assert settled_memory.settled_bytes(cleans=True) == process[0] == settled_memory.settled_bytes(cleans=False)


class TestExplain:
    def test_a_larger_study_takes_more_and_a_tight_limit_is_refused(self, small_bundle: Path) -> None:
        model = Model((load_bundle(small_bundle),))
        affine = torch.eye(4).numpy()
        small, large = (
            explain(model, Geometry((n, n, n), affine), settings=PredictSettings(False), device=CPU) for n in (64, 256)
        )
        assert large.peak_bytes - small.peak_bytes > 4 * (256**3 - 64**3)
        with pytest.raises(PlanError, match="the least that does is"):
            explain(model, Geometry((64, 64, 64), affine), settings=PredictSettings(False, 10**8), device=CPU)

    def test_by_default_it_is_most_of_what_is_free(self, small_bundle: Path) -> None:
        model = Model((load_bundle(small_bundle),))
        plan = explain(model, Geometry((32, 32, 32), torch.eye(4).numpy()), settings=PredictSettings(False), device=CPU)
        expected = held_bytes() + 0.8 * free_bytes()
        assert plan.limit_bytes == pytest.approx(expected, rel=0.25)


class TestNetwork:
    def test_what_is_alive_at_once_is_counted(self) -> None:
        """Two pointwise layers: the input and 4 channels, then these and 2, without the first if it was dropped."""
        network = torch.nn.Sequential(torch.nn.Flatten(2), torch.nn.Unflatten(2, (8, 8, 8)), torch.nn.ReLU())
        assert answer_bytes(network, (1, 2, 8, 8, 8)) == 2 * 2 * 512 * 4

    def test_a_convolution_takes_its_input_and_output_again(self) -> None:
        convolution = torch.nn.Conv3d(64, 8, 3, padding=1, bias=False)
        assert answer_bytes(convolution, (1, 64, 32, 32, 32)) == 2 * (64 + 8) * 32**3 * 4
        pointwise = torch.nn.Conv3d(64, 8, 1, bias=False)
        assert answer_bytes(pointwise, (1, 64, 32, 32, 32)) == (64 + 8 + 4) * 32**3 * 4

    def test_what_asks_for_values_cannot_be_counted(self) -> None:
        class Asking(torch.nn.Module):
            def forward(self, image: torch.Tensor) -> torch.Tensor:
                return image if bool(image.mean() > 0) else -image

        assert answer_bytes(Asking(), (1, 1, 8, 8, 8)) is None


class TestControlGroups:
    @staticmethod
    def group(folder: Path, names: tuple[str, str], most: str, used: int, stat: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name, value in zip((*names, "memory.stat"), (most, str(used), stat), strict=True):
            (folder / name).write_text(value + "\n")

    def test_the_tightest_of_all_above_counts_and_caches_can_be_given_back(self, tmp_path: Path) -> None:
        root, process = tmp_path / "fs", tmp_path / "proc"
        process.mkdir()
        (process / "cgroup").write_text("0::/jobs/mine\n")
        names = ("memory.max", "memory.current")
        self.group(root / "jobs" / "mine", names, "max", 900, "inactive_file 0")
        self.group(root / "jobs", names, "5000", 1000, "anon 600\ninactive_file 300")
        assert list(_group_bytes(root, process)) == [4300]

    def test_version_1_too(self, tmp_path: Path) -> None:
        root, process = tmp_path / "fs", tmp_path / "proc"
        process.mkdir()
        (process / "cgroup").write_text("4:memory:/box\n3:cpu,cpuacct:/box\n")
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
        self.group(root / "memory" / "box", names, "7000", 1000, "total_inactive_file 50")
        assert list(_group_bytes(root, process)) == [6050]

    def test_without_groups_there_is_no_limit(self, tmp_path: Path) -> None:
        assert list(_group_bytes(tmp_path, tmp_path)) == []


WORKER = """
import hashlib, json, sys
from dataclasses import replace
from pathlib import Path
import numpy as np, torch
torch.set_num_threads(1)
from pipeline.bundle import BundleIndex, ModelBundle
from pipeline.errors import PlanError
from pipeline.models.registry import build_network
from pipeline.plan import Plan
from pipeline.postprocessing import LIBRARY_BYTES
from pipeline.predict import Model, PredictSettings, explain, predict
from transforms.geometry import Geometry
from transforms.labels import schema_from_names
from transforms.volume import Volume

plan = Plan.model_validate_json(Path(sys.argv[1]).read_text())
shape, mirror, limit, asked = json.loads(sys.argv[2])
outputs = plan.unet.out_channels
schema = schema_from_names({n: f"label {n}" for n in range(1, outputs)})
network = build_network(plan.network, plan.unet, plan.patch_shape, generator=torch.Generator().manual_seed(1)).eval()
index = BundleIndex(name="x", fold=None, mirror=mirror, tile_step=0.5, provenance={}, sha256={})
model = Model((ModelBundle(index, plan, schema, network, ""),))
geometry = Geometry(tuple(shape), np.diag([1.0, 1.0, 2.0, 1.0]))
settings = PredictSettings(mirror, limit, uncertainty=asked, keep_scores=3 if asked else 0)
error = peak = digest = planned = None
try:
    planned = explain(model, geometry, settings=settings, device=torch.device("cpu")).peak_bytes
    coarse = torch.randn(1, 1, *(n // 8 for n in shape), generator=torch.Generator().manual_seed(2))
    voxels = torch.nn.functional.interpolate(coarse, size=tuple(shape), mode="trilinear")[0, 0].numpy()
    volume = Volume(voxels, geometry, None, float(voxels.min()))
    del coarse
    for _ in range(2):
        found = predict(model, [volume], settings=settings, device=torch.device("cpu"))
        digest = hashlib.sha256(found.label_map.tobytes()).hexdigest()
        del found
except PlanError as caught:
    error = str(caught)
status = Path("/proc/self/status").read_text().splitlines()
peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
print(json.dumps({"peak": peak, "digest": digest, "planned": planned, "error": error}))
"""


def predict_within(
    limit: int | None, plan: Plan, folder: Path, *, shape: tuple[int, int, int], mirror: bool, asked: bool
) -> dict[str, Any]:
    """Two equal studies, one after the other."""
    (folder / "plan.json").write_text(plan.model_dump_json())
    command = [sys.executable, "-c", WORKER, str(folder / "plan.json"), json.dumps([shape, mirror, limit, asked])]
    outcome = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stderr
    found: dict[str, Any] = json.loads(outcome.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "outputs", "mirror", "asked"),
    [
        ((96, 96, 64), 3, True, False),
        ((160, 160, 48), 3, False, False),
        ((96, 96, 48), 60, False, False),
        ((128, 128, 64), 8, True, True),
    ],
)
def test_the_promise_is_kept_and_the_result_is_the_same(
    small_plan: Plan, tmp_path: Path, shape: tuple[int, int, int], outputs: int, mirror: bool, asked: bool
) -> None:
    """`asked`: with maps of uncertainty and the scores of three classes."""
    unet = small_plan.unet.model_copy(update={"out_channels": outputs})
    values = {"unet": unet, "class_count": outputs, "patch_shape": (48, 48, 32), "spacing_mm": (1.5, 1.5, 1.5)}
    plan = small_plan.model_copy(update=values)
    free = predict_within(None, plan, tmp_path, shape=shape, mirror=mirror, asked=asked)
    refused = predict_within(10**8, plan, tmp_path, shape=shape, mirror=mirror, asked=asked)
    least = re.search(r"--max-memory ([\d.]+)GB", refused["error"])
    assert least is not None
    tight = predict_within(round(float(least[1]) * 1e9), plan, tmp_path, shape=shape, mirror=mirror, asked=asked)
    for found, limit in ((free, free["planned"]), (tight, float(least[1]) * 1e9)):
        assert found["error"] is None
        assert 0.5 * limit < found["peak"] <= limit
    assert tight["digest"] == free["digest"]
