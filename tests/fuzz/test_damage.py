"""Damaged files of every kind, in a process of their own: no crash, no hang, no memory, nothing but VolumeError."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

READER = Path(__file__).parent / "reader.py"


def read_damaged(seconds: int, seed: int) -> dict[str, int]:
    """The counts of a run; an error names seed and number, which `reader.py --seed S --only N` reads again."""
    command = [sys.executable, str(READER), "--seconds", str(seconds), "--seed", str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 60, check=False)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, f"exit code {done.returncode}\n" + "\n".join([*lines[-5:], done.stderr[-2000:]])
    counts: dict[str, int] = json.loads(lines[-1])
    return counts


def test_damaged_files() -> None:
    counts = read_damaged(seconds=8, seed=0)
    # Both must happen, or the damage is too rough or too soft to prove anything.
    assert counts["read"] > 10
    assert counts["refused"] > 100


@pytest.mark.slow
def test_more_damaged_files() -> None:
    assert read_damaged(seconds=90, seed=7)["inputs"] > 1000
