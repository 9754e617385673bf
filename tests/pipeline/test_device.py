"""The device: a CPU gets what it can do, and what it cannot is refused by its key."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pipeline.config import PlanConfig, TrainConfig
from pipeline.device import CPU_GFLOPS_PER_THREAD, CPU_MEMORY_GB, Hardware, budget_of, choose_hardware, peak_memory_gb
from pipeline.errors import ConfigError


def settings(**values: Any) -> TrainConfig:
    return TrainConfig.model_validate(values)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("no_gpu")
class TestWithoutGpu:
    @pytest.mark.parametrize("values", [{}, {"device": "cpu"}, {"precision": "float32"}])
    def test_a_cpu_computes_in_float32(self, values: dict[str, str]) -> None:
        assert choose_hardware(settings(**values)) == Hardware("cpu", "32-true")

    def test_asking_for_a_gpu_is_refused(self) -> None:
        with pytest.raises(ConfigError, match=r"^train.device: cuda is asked for but PyTorch sees no GPU"):
            choose_hardware(settings(device="cuda"))

    @pytest.mark.parametrize("precision", ["bf16", "fp16"])
    def test_half_precision_is_for_gpus(self, precision: str) -> None:
        with pytest.raises(ConfigError, match=f"^train.precision: {precision} is for GPUs"):
            choose_hardware(settings(precision=precision))


@pytest.mark.parametrize(
    ("bf16", "precision", "expected"),
    [
        (True, "auto", "bf16-mixed"),
        (False, "auto", "16-mixed"),
        (True, "float32", "32-true"),
        (True, "fp16", "16-mixed"),
    ],
)
def test_a_gpu_computes_in_what_it_has(
    bf16: bool, precision: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    assert choose_hardware(settings(precision=precision)) == Hardware("cuda", expected)  # type: ignore[arg-type]
    assert choose_hardware(settings(device="cpu")).device == "cpu"
    if not bf16:
        with pytest.raises(ConfigError, match="this GPU has no bfloat16"):
            choose_hardware(settings(precision="bf16"))


class TestBudget:
    CPU = Hardware("cpu", "32-true")

    def test_steps_change_nothing_so_that_a_run_repeated_with_its_steps_gets_the_same_plan(self) -> None:
        timed = budget_of(self.CPU, PlanConfig(), settings(budget_minutes=7))
        assert timed.minutes == 7
        assert budget_of(self.CPU, PlanConfig(), settings(budget_minutes=7, steps=400)) == timed
        assert budget_of(self.CPU, PlanConfig(), settings(budget_minutes=None, steps=400)).minutes is None

    def test_memory_is_the_configs_if_it_says(self) -> None:
        assert budget_of(self.CPU, PlanConfig(), settings()).memory_gb == CPU_MEMORY_GB
        assert budget_of(self.CPU, PlanConfig(memory_gb=1.5), settings()).memory_gb == 1.5

    def test_work_grows_with_threads(self) -> None:
        assert budget_of(self.CPU, PlanConfig(), settings()).gflops == CPU_GFLOPS_PER_THREAD * torch.get_num_threads()

    def test_peak_memory_is_this_process(self) -> None:
        assert 0.05 < peak_memory_gb(self.CPU) < 64
