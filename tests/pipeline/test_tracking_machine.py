"""What is told of the machine, against what the system itself says."""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path
from threading import Event
from types import SimpleNamespace

import pytest

from pipeline.tracking import machine, open_tracker
from pipeline.tracking.journal import read_facts

MEMORY = Path("/proc/meminfo")


def test_figures_are_those_of_the_system(tmp_path: Path) -> None:
    figures = machine.machine_figures(tmp_path)
    disk = shutil.disk_usage(tmp_path)
    assert figures["system/disk_usage_percentage"] == pytest.approx(100 * disk.used / disk.total, abs=1)
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in MEMORY.read_text().splitlines()}
    used = sizes["MemTotal"] - sizes["MemAvailable"]
    assert figures["system/system_memory_usage_megabytes"] == pytest.approx(used / 1e6, rel=0.2)
    assert 10 < figures["system/process_memory_usage_megabytes"] < sizes["MemTotal"] / 1e6
    assert 0 < figures["system/system_memory_usage_percentage"] < 100


def test_the_processor_is_busy_where_time_went_into_work() -> None:
    """proc(5): three of four ticks were work, once waiting for a disk counts as none."""
    before, now = (100.0, 1000.0), (175.0, 1100.0)
    assert machine._busy(before, now) == {"system/cpu_utilization_percentage": 75.0}
    assert machine._busy(None, now) == machine._busy(now, now) == {}


def test_of_gpus_only_those_that_are_computed_on_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """To ask CUDA for the memory of a GPU begins a context on it, some hundred MB that others may need."""
    asked = list[int]()

    def free_and_total(number: int) -> tuple[float, float]:
        asked.append(number)
        return 1e9, 4e9

    cuda = SimpleNamespace(
        is_initialized=lambda: True,
        device_count=lambda: 4,
        memory_reserved=lambda number: 2e9 if number == 2 else 0,
        mem_get_info=free_and_total,
        utilization=lambda _: 60,
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    assert machine._accelerators() == {
        "gpu_2_memory_usage_megabytes": 3000.0,
        "gpu_2_memory_usage_percentage": 75.0,
        "gpu_2_utilization_percentage": 60.0,
    }
    assert asked == [2]


def test_nothing_is_told_once_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even by a driver that answers when nobody waits for it any more."""
    begun, answering, told = Event(), Event(), list[machine.Figures]()

    def slow(_: Path) -> machine.Figures:
        begun.set()
        assert answering.wait(10)
        return {"system/x": 1.0}

    monkeypatch.setattr(machine, "_FIRST_S", 0.01)
    monkeypatch.setattr(machine, "_INTERVAL_S", 0.01)
    monkeypatch.setattr(machine, "machine_figures", slow)
    sampler = machine.Sampler(told.append, tmp_path)
    sampler.start()
    assert begun.wait(10)
    sampler.stop()
    answering.set()
    sampler._thread.join(10)
    assert not sampler._thread.is_alive()
    assert told == []


def test_a_fold_tells_of_the_machine_and_goes_on_counting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_FIRST_S", 0.01)
    monkeypatch.setattr(machine, "_INTERVAL_S", 0.01)

    def track(name: str, parent: Path | None) -> list[int]:
        with open_tracker(
            tmp_path / name,
            uri="http://127.0.0.1:9",
            experiment="e",
            run_name=name,
            tags={},
            on_warning=lambda _: None,
            parent=parent,
        ) as tracker:
            tracker.metrics({"loss": 1.0}, step=1)
            time.sleep(0.3)
        facts = [fact for fact in read_facts(tmp_path / name) if fact.kind == "metrics"]
        return [fact.body["step"] for fact in facts if "system/disk_usage_percentage" in fact.body["values"]]

    assert track("run", None) == []
    first = track("fold_0", tmp_path / "run")
    assert len(first) >= 2
    again = track("fold_0", tmp_path / "run")
    assert again == list(range(1, len(again) + 1))
    assert len(again) > len(first)
    assert read_facts(tmp_path / "fold_0")[-1].kind == "end"
