"""What is told of the machine, against what the system itself says."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

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
