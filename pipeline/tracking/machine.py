"""What the machine does while a run goes: processor, memory, disk and accelerators, under MLflow's own names.

MLflow's sampler needs psutil, writes past our journal and is lost when its server is away; this one tells the journal.
"""

from __future__ import annotations

import shutil
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.errors import RunError
from pipeline.free_memory import held_bytes

PREFIX = "system/"
_FIRST_S, _INTERVAL_S = 2.0, 10.0
_MB = 1e6
_STAT, _MEMORY = Path("/proc/stat"), Path("/proc/meminfo")

Figures = dict[str, float]


class Sampler:
    """Tells of the machine from a thread of its own, after two seconds and then every ten, until it is stopped.

    `tell` gets the figures of one moment; what a disk refuses is left out.
    """

    def __init__(self, tell: Callable[[Figures], None], folder: Path) -> None:
        self._tell, self._folder = tell, folder
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="volseg-machine", daemon=True)

    def start(self) -> None:
        """Begin to tell."""
        self._thread.start()

    def stop(self) -> None:
        """Tell nothing from now on."""
        self._stopping.set()
        # No longer than that, where a driver hangs.
        self._thread.join(_INTERVAL_S)

    def _loop(self) -> None:
        before, wait_s = _processor_s(), _FIRST_S
        while not self._stopping.wait(wait_s):
            now = _processor_s()
            with suppress(RunError, OSError):
                figures = _busy(before, now) | machine_figures(self._folder)
                if self._stopping.is_set():  # a driver hung so long that nobody waits any more
                    return
                self._tell(figures)
            before, wait_s = now, _INTERVAL_S


def machine_figures(folder: Path) -> Figures:
    """Memory, the disk of `folder` and accelerators at this moment, sizes in MB of a million bytes."""
    disk = shutil.disk_usage(folder)
    figures = {
        "process_memory_usage_megabytes": held_bytes() / _MB,
        "disk_usage_percentage": 100 * disk.used / disk.total,
        "disk_available_megabytes": disk.free / _MB,
    }
    return {PREFIX + key: value for key, value in (figures | _memory() | _accelerators()).items()}


def _memory() -> Figures:
    """Of the whole machine; nothing where the system does not tell."""
    with suppress(OSError, ValueError, KeyError):
        lines = _MEMORY.read_text(encoding="ascii").splitlines()
        sizes = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}
        used = sizes["MemTotal"] - sizes["MemAvailable"]
        share = 100 * used / sizes["MemTotal"]
        return {"system_memory_usage_megabytes": used / _MB, "system_memory_usage_percentage": share}
    return {}


def _processor_s() -> tuple[float, float] | None:
    """Time that all cores have worked, and time in all, in ticks; None where the system does not tell."""
    with suppress(OSError, ValueError, IndexError):
        # user, nice, system, idle, iowait, irq, softirq, steal (proc(5)).
        ticks = [int(text) for text in _STAT.read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]]
        return float(sum(ticks) - ticks[3] - ticks[4]), float(sum(ticks))
    return None


def _busy(before: tuple[float, float] | None, now: tuple[float, float] | None) -> Figures:
    if before is None or now is None or now[1] <= before[1]:
        return {}
    return {PREFIX + "cpu_utilization_percentage": 100 * (now[0] - before[0]) / (now[1] - before[1])}


def _accelerators() -> Figures:
    """Of the GPUs that this process computes on: to ask for the memory of another would take some of it."""
    torch: Any = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return {}
    figures: Figures = {}
    for number in range(torch.cuda.device_count()):
        # Its load is known with NVIDIA's library alone, whose errors are its own.
        with suppress(Exception):
            if not torch.cuda.memory_reserved(number):
                continue
            free, total = torch.cuda.mem_get_info(number)
            figures[f"gpu_{number}_memory_usage_megabytes"] = (total - free) / _MB
            figures[f"gpu_{number}_memory_usage_percentage"] = 100 * (total - free) / total
            figures[f"gpu_{number}_utilization_percentage"] = float(torch.cuda.utilization(number))
    return figures
