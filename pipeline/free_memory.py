"""How much memory this process holds and how much more it may take: the machine's, and its control group's limits."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

_GROUPS = Path("/sys/fs/cgroup")
_PROCESS = Path("/proc/self")


def held_bytes() -> int:
    """Resident memory of this process."""
    try:
        pages = int((_PROCESS / "statm").read_text(encoding="ascii").split()[1])
    except OSError:
        import resource

        # Elsewhere only the highest so far is known: bytes on macOS, otherwise kilobytes.
        return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * (1 if sys.platform == "darwin" else 1024)
    return pages * os.sysconf("SC_PAGE_SIZE")


def free_bytes() -> int:
    """What this process can still take: the least of what the machine and each control group above it have left."""
    return max(0, min([_machine_bytes(), *_group_bytes()]))


def _machine_bytes() -> int:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") - held_bytes()
    sizes = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}
    return sizes["MemAvailable"]


def _group_bytes(root: Path = _GROUPS, process: Path = _PROCESS) -> Iterator[int]:
    """What is left below each limit, of control groups of version 2 and 1."""
    try:
        lines = (process / "cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            yield from _left(root, path, "memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            names = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
            yield from _left(root / "memory", path, *names)


def _left(root: Path, path: str, limit: str, used: str, cached: str) -> Iterator[int]:
    """Of a group and those above it; files that are only cached can be given back."""
    folder = root / path.lstrip("/")
    for group in (folder, *folder.parents):
        if group != root and root not in group.parents:
            return
        try:
            most = (group / limit).read_text(encoding="ascii").strip()
            taken = int((group / used).read_text(encoding="ascii"))
            stat = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
        except (OSError, ValueError):
            continue
        if most != "max":
            yield int(most) - taken + int(stat.get(cached, 0))
