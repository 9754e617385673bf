"""The device: a CPU gets what it can do, and what it cannot is refused by its key."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pipeline.config import PlanConfig, TrainConfig
from pipeline.device import (
    CPU_BF16_FACTOR,
    CPU_GFLOPS_PER_THREAD,
    CPU_MEMORY_GB,
    Hardware,
    arithmetic,
    budget_of,
    choose_hardware,
    describe,
    peak_memory_gb,
)
from pipeline.errors import ConfigError

AMD = {"cpu_name": "AMD EPYC", "avx512_bf16": True}
INTEL = {"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": False}


def settings(**values: Any) -> TrainConfig:
    return TrainConfig.model_validate(values)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("no_gpu")
class TestWithoutGpu:
    @pytest.mark.parametrize("values", [{}, {"device": "cpu"}, {"precision": "bf16"}])
    @pytest.mark.parametrize("capabilities", [AMD, INTEL | {"amx_bf16": True}])
    def test_a_cpu_that_gains_by_bfloat16_computes_in_it(
        self, values: dict[str, str], capabilities: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
        assert choose_hardware(settings(**values)) == Hardware("cpu", "bf16-mixed")
        assert choose_hardware(settings(precision="float32")) == Hardware("cpu", "32-true")

    def test_one_that_has_it_and_does_not_gain_computes_in_it_only_if_asked_to(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: INTEL, raising=False)
        assert choose_hardware(settings()) == Hardware("cpu", "32-true")
        asked = choose_hardware(settings(precision="bf16"))
        assert asked == Hardware("cpu", "bf16-mixed")
        both = [budget_of(hardware, PlanConfig(), settings()) for hardware in (asked, Hardware("cpu", "32-true"))]
        assert both[0].gflops == both[1].gflops

    @pytest.mark.parametrize("capabilities", [{}, {"avx512_bf16": False, "avx512_f": True}])
    def test_a_cpu_without_computes_in_float32(
        self, capabilities: dict[str, bool], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
        assert choose_hardware(settings()) == Hardware("cpu", "32-true")
        with pytest.raises(ConfigError, match=r"^train.precision: this CPU has no bfloat16 instructions"):
            choose_hardware(settings(precision="bf16"))

    def test_asking_for_a_gpu_is_refused(self) -> None:
        with pytest.raises(ConfigError, match=r"^--device / train.device: cuda is asked for but PyTorch sees no GPU"):
            choose_hardware(settings(device="cuda"))


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

    def test_work_grows_with_threads(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: AMD, raising=False)
        rate = CPU_GFLOPS_PER_THREAD * torch.get_num_threads()
        assert budget_of(self.CPU, PlanConfig(), settings()).gflops == rate
        faster = budget_of(Hardware("cpu", "bf16-mixed"), PlanConfig(), settings())
        assert faster.gflops == rate * CPU_BF16_FACTOR

    def test_peak_memory_is_this_process(self) -> None:
        assert 0.05 < peak_memory_gb(self.CPU) < 64


class TestArithmetic:
    def test_a_gpu_is_set_up_as_the_config_says_and_set_back(self) -> None:
        def now() -> tuple[bool, ...]:
            cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
            deterministic = torch.are_deterministic_algorithms_enabled()
            return cuda.allow_tf32, cudnn.allow_tf32, cudnn.benchmark, deterministic

        before = now()
        with arithmetic(Hardware("cuda", "32-true", tf32=True), deterministic=False):
            assert now() == (True, True, True, False)
        with arithmetic(Hardware("cuda", "bf16-mixed"), deterministic=True):
            assert now() == (False, False, False, True)
        with arithmetic(Hardware("cpu", "32-true"), deterministic=True):
            assert now() == (False, False, False, False)
        assert now() == before

    @pytest.mark.usefixtures("no_gpu")
    @pytest.mark.parametrize("precision", ["tf32", "fp16"])
    def test_what_a_cpu_has_not_is_refused(self, precision: str) -> None:
        with pytest.raises(ConfigError, match=f"^train.precision: {precision} is for GPUs"):
            choose_hardware(settings(precision=precision))

    def test_tf32_is_float32_that_may_be_rounded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
        assert choose_hardware(settings(precision="tf32")) == Hardware("cuda", "32-true", tf32=True)

    @pytest.mark.usefixtures("one_thread")
    def test_it_is_told_in_one_line(self) -> None:
        assert describe(Hardware("cpu", "bf16-mixed")) == "CPU with 1 thread, bfloat16 and float32"
        assert describe(Hardware("cpu", "32-true", devices=2, nodes=2)) == "4 x CPU with 1 thread, float32"

    def test_processes_are_counted(self) -> None:
        assert Hardware("cuda", "32-true", devices=3, nodes=2).processes == 6
