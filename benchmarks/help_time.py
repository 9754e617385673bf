"""How long `volseg --help` takes, against the bare interpreter: medians of runs taken in turns."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from statistics import median

ROUNDS = 15
COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "volseg --help": [str(Path(sys.executable).with_name("volseg")), "--help"],
}


def wall_time_s(command: list[str]) -> float:
    start_s = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start_s


def main() -> None:
    """Print the median wall time of each command, in milliseconds, and their ratio."""
    for command in COMMANDS.values():
        wall_time_s(command)  # the first run also reads the disk and writes the bytecode
    times_s: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(ROUNDS):
        for name, command in COMMANDS.items():
            times_s[name].append(wall_time_s(command))
    for name, values_s in times_s.items():
        low_ms, middle_ms, high_ms = (1000 * f(values_s) for f in (min, median, max))
        print(f"{name:16} {middle_ms:7.1f} ms (median of {ROUNDS}; {low_ms:.1f} to {high_ms:.1f})")
    bare_s, help_s = (median(values_s) for values_s in times_s.values())
    print(f"ratio            {help_s / bare_s:7.1f}")


if __name__ == "__main__":
    main()
