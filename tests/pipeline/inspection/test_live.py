"""Looking inside a network while it learns: what is told is what is there, and the training never notices."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.history import HISTORY, read_history
from pipeline.inspection.figures import figures_of, record_levels
from pipeline.inspection.live import FIGURES, Onlooker, parameter_levels, rows_of, validation_window
from pipeline.models.registry import build_network
from pipeline.models.slices import as_volume_network
from pipeline.models.spec import UNetSpec
from pipeline.plan import Plan
from pipeline.processes import open_fabric
from pipeline.step import start_training
from pipeline.task import TrainingTask

from ..tiny_training import CPU, Listener, another, press_ctrl_c, run, same, tiny_task

ROOT = Path(__file__).parents[3]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def task(small_plan: Plan, tmp_path: Path) -> TrainingTask:
    return tiny_task(small_plan, tmp_path)


def looks(folder: Path) -> list[dict[str, Any]]:
    return [row for row in read_history(folder / HISTORY) if any(key.startswith("inspect/") for key in row)]


class TestTheTraining:
    @pytest.mark.parametrize("optimiser", ["adamw", "sgd"])
    def test_it_ends_with_the_same_bits(self, task: TrainingTask, optimiser: str) -> None:
        blind = run(another(task, "blind", optimiser=optimiser))
        seen = another(task, "seen", optimiser=optimiser, inspect_every=3)
        assert same(run(seen).weights, blind.weights)
        assert [row["step"] for row in looks(seen.folder)] == [3, 6, 9, 12, 15, 18, 20]
        assert looks(task.folder / "blind") == []

    def test_batch_statistics_stay_as_they_are(self, task: TrainingTask) -> None:
        unet = task.plan.unet.model_copy(update={"normalisation": "batch"})
        task = replace(task, plan=task.plan.model_copy(update={"unet": unet}))
        assert same(run(another(task, "seen", inspect_every=1)).weights, run(another(task, "blind")).weights)

    def test_a_resumed_one_tells_the_same(self, task: TrainingTask) -> None:
        straight, broken = (another(task, name, inspect_every=4) for name in ("straight", "broken"))
        whole = run(straight)
        with pytest.raises(KeyboardInterrupt):
            run(broken, Listener({10: press_ctrl_c}))
        assert same(run(broken, resume=True).weights, whole.weights)
        assert looks(broken.folder) == looks(straight.folder)

    def test_looking_may_begin_and_end_when_one_resumes(self, task: TrainingTask) -> None:
        broken = another(task, "broken")
        with pytest.raises(KeyboardInterrupt):
            run(broken, Listener({10: press_ctrl_c}))
        settings = broken.settings.model_copy(update={"inspect_every": 5})
        assert same(run(replace(broken, settings=settings), resume=True).weights, run(another(task, "blind")).weights)
        assert [row["step"] for row in looks(broken.folder)] == [15, 20]

    def test_two_dimensions(self, task: TrainingTask) -> None:
        strides, kernels = ((1, 1), (2, 2)), ((3, 3), (3, 3))
        unet = task.plan.unet.model_copy(update={"dimensions": 2, "strides": strides, "kernel_shapes": kernels})
        plan = task.plan.model_copy(update={"unet": unet, "slice_axis": 2, "patch_shape": (8, 8, 1), "batch_size": 4})
        flat = another(replace(task, plan=plan), "flat", steps=2, inspect_every=1)
        run(flat)
        assert looks(flat.folder)[0]["inspect/encoder_1/energy"] > 0

    @pytest.mark.slow
    def test_of_two_processes_one_looks(self, small_plan: Plan, tmp_path: Path) -> None:
        for name in ("blind", "seen"):
            (tmp_path / name).mkdir()
        (tmp_path / "plan.json").write_text(small_plan.model_dump_json())
        command = [sys.executable, "-m", "tests.pipeline.inspection.two_looking", str(tmp_path)]
        outcome = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=560, check=False)
        assert outcome.returncode == 0, outcome.stderr
        assert (tmp_path / "told").exists()


class TestGradients:
    @pytest.mark.parametrize("clipped_to", [1e-3, 1e6])
    def test_the_levels_together_are_the_whole_before_it_is_clipped(
        self, task: TrainingTask, clipped_to: float
    ) -> None:
        seen = another(task, "seen", inspect_every=1, gradient_norm=clipped_to, steps=10)
        run(seen)
        rows = read_history(seen.folder / HISTORY)
        wholes = [
            math.hypot(*(value for key, value in row.items() if key.startswith("gradient_norm/")))
            for row in rows
            if "gradient_norm/encoder_1" in row
        ]
        (mean,) = [row["gradient_norm"] for row in rows if "gradient_norm" in row]
        assert len(wholes) == 10
        assert sum(wholes) / 10 == pytest.approx(mean, rel=1e-5)

    @pytest.mark.parametrize(
        "changes",
        [
            {},
            {"skip": "attention", "deep_supervision": True},
            {"bottleneck": "transformer", "transformer_layers": 1, "transformer_heads": 1, "features": (4, 8, 16)},
        ],
    )
    def test_every_parameter_has_one_level(self, changes: dict[str, Any]) -> None:
        spec = UNetSpec(**{"features": (4, 8, 8), **THREE, **changes})
        network = build_network("unet", spec, (16, 16, 16))
        levels = parameter_levels(network)
        every = [id(parameter) for parameters in levels.values() for parameter in parameters]
        assert sorted(every) == sorted(id(parameter) for parameter in network.parameters())
        assert set(levels) >= {"encoder 1", "encoder 2", "bottleneck 3", "decoder 1", "decoder 2", "rest"}
        assert {id(p) for p in levels["rest"]} == {id(p) for p in network.get_submodule("heads").parameters()}
        assert {id(p) for p in levels["decoder 2"]} == {id(p) for p in network.get_submodule("decoder.1").parameters()}

    def test_of_levels_inside_one_another_the_innermost_counts(self) -> None:
        network = build_network("attention_unet", UNetSpec(features=(4, 8, 8), **THREE), (16, 16, 16))
        levels = parameter_levels(network)
        every = [id(parameter) for parameters in levels.values() for parameter in parameters]
        assert sorted(every) == sorted(id(parameter) for parameter in network.parameters())
        assert {"encoder 1", "encoder 2", "bottleneck 3", "decoder 1", "decoder 2"} <= set(levels)

    def test_a_slice_network_is_looked_through(self) -> None:
        flat = UNetSpec(dimensions=2, features=(4, 8), strides=((1, 1), (2, 2)), kernel_shapes=((3, 3),) * 2,
                        encoder_blocks=(1, 1), decoder_blocks=(1,))  # fmt: skip
        network = as_volume_network(build_network("unet", flat, (16, 16)), 0)
        assert set(parameter_levels(network)) == {"encoder 1", "bottleneck 2", "decoder 1", "rest"}


THREE: dict[str, Any] = {
    "strides": ((1, 1, 1), (2, 2, 2), (2, 2, 2)),
    "kernel_shapes": ((3, 3, 3),) * 3,
    "encoder_blocks": (1, 1, 1),
    "decoder_blocks": (1, 1),
}


class TestFigures:
    def test_they_are_those_of_the_averaged_weights_on_the_patch(self, task: TrainingTask) -> None:
        seen = another(task, "seen", inspect_every=20)
        result = run(seen)
        network = build_network("unet", seen.plan.unet, seen.plan.patch_shape).eval()
        network.load_state_dict(result.weights)
        with torch.inference_mode(), record_levels(network) as found:
            network(validation_window(seen).image[None])
        expected = rows_of(figures_of(found))
        (row,) = looks(seen.folder)
        assert {key: row[key] for key in expected} == pytest.approx(expected)
        assert set(expected) == {
            f"inspect/{n}/{f}" for n in ("encoder_1", "bottleneck_2", "decoder_1") for f in FIGURES
        }

    def test_the_patch_shows_the_object(self, task: TrainingTask) -> None:
        window = validation_window(task)
        assert tuple(window.image.shape[1:]) == task.plan.patch_shape
        assert window.classes is not None
        assert int(window.classes[window.centre_ijk]) in (1, 2)

    def test_gated_skips_are_told_apart_from_what_they_gate(self) -> None:
        network = build_network("unet", UNetSpec(features=(4, 8, 8), skip="attention", **THREE), (16, 16, 16)).eval()
        with torch.inference_mode(), record_levels(network) as found:
            network(torch.randn(1, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0)))
        assert "inspect/skip_1/energy" in rows_of(figures_of(found))

    def test_where_memory_does_not_suffice_looking_ends(self, task: TrainingTask) -> None:
        fabric, notes = open_fabric(CPU), list[str]()
        state = start_training(replace(task, settings=task.settings.model_copy(update={"inspect_every": 1})), fabric)
        state.averaged.register_module("heads", nn.ModuleList([Exhausted()]))
        seen = task.settings.model_copy(update={"inspect_every": 1})
        inspection = Onlooker(replace(task, settings=seen), fabric, state, notes.append)
        for _ in range(2):
            state.step += 1
            assert inspection.after_update({}) == {}
        assert notes == ["memory does not suffice to look inside the network: figures of its levels end here"]


class Exhausted(nn.Module):
    """Asks for more than there is."""

    def forward(self, features: Tensor) -> Tensor:
        return features.new_empty(1 << 60)
