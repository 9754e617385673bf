"""What a prediction holds in memory, worked out before it begins: the parts, their sum, and what was chosen for it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MemoryPlan:
    """The parts of the peak in bytes, in the order they are shown, and the choices that keep it below the limit.

    `limit_bytes` is of the whole process. `batch` windows pass through the network together; `slab_planes` planes of
    scores are restored at a time.
    """

    parts: tuple[tuple[str, int], ...]
    limit_bytes: int
    batch: int
    slab_planes: int

    @property
    def peak_bytes(self) -> int:
        """What the process will hold at most."""
        return sum(size for _, size in self.parts)

    def lines(self) -> tuple[str, ...]:
        """For people: a line a part, then the sum and the limit."""
        rows = [f"{name}: {_gb(size)}" for name, size in self.parts]
        chosen = f"windows at a time: {self.batch}; planes restored at a time: {self.slab_planes}"
        return (*rows, f"in all: {_gb(self.peak_bytes)} of {_gb(self.limit_bytes)}", chosen)


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
