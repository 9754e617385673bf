"""Reads damaged files for a bounded time in bounded memory, and says what went wrong. A script: run it, see --help.

Wrong is: any exception but VolumeError, more seconds than allowed for one input, more memory than allowed (the
operating system then makes an allocation fail), a crash, or a volume that its own header contradicts.
"""

from __future__ import annotations

import argparse
import json
import resource
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pydicom

sys.path.insert(0, str(Path(__file__).parent))

from mutations import Sample, mutated, samples

from transforms.dicom import read_series
from transforms.errors import VolumeError
from transforms.volume import read_volume

OFF_VOXELS = 0.5
"""How far a slice may lie from where its own header says; half a voxel or more is an error."""


class TooSlow(Exception):
    """Raised by the alarm."""


def main() -> int:
    """Read inputs until the time is up; one JSON line an error, then one line with the counts."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="read the one input of this number, without limits")
    parser.add_argument("--input-seconds", type=int, default=5)
    parser.add_argument("--more-memory-mb", type=int, default=1500)
    options = parser.parse_args()
    counts = {"inputs": 0, "read": 0, "refused": 0, "wrong": 0}
    with tempfile.TemporaryDirectory() as scratch:
        known = samples(Path(scratch))
        if options.only is not None:
            print(json.dumps(_judge(_input(known, options.seed, options.only), Path(scratch) / "one")))
            return 0
        for sample in known:
            _judge(sample, Path(scratch) / "warm")  # what is imported late is not what a damaged input takes
        _limit_memory(options.more_memory_mb)
        signal.signal(signal.SIGALRM, _too_slow)
        end = time.monotonic() + options.seconds
        while time.monotonic() < end:
            number = counts["inputs"]
            sample = _input(known, options.seed, number)
            signal.alarm(options.input_seconds)
            verdict = _judge(sample, Path(scratch) / "now")
            signal.alarm(0)
            counts["inputs"] += 1
            counts[verdict["outcome"]] += 1
            if verdict["outcome"] == "wrong":
                print(json.dumps({"seed": options.seed, "number": number, "sample": sample.name, **verdict}))
    print(json.dumps(counts))
    return 1 if counts["wrong"] else 0


def _input(known: list[Sample], seed: int, number: int) -> Sample:
    return mutated(known[number % len(known)], np.random.default_rng([seed, number]))


def _judge(sample: Sample, folder: Path) -> dict[str, str]:
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    path = sample.write(folder)
    try:
        fault = _fault_of_series(folder) if path == folder else _fault_of_volume(path)
    except VolumeError as error:
        fault = "a message of several lines" if "\n" in str(error) else ""
        return {"outcome": "wrong" if fault else "refused", "what": fault or str(error)}
    except TooSlow:
        return {"outcome": "wrong", "what": "too slow"}
    except Exception:
        # Whatever else is raised is what this script looks for.
        return {"outcome": "wrong", "what": traceback.format_exc(limit=-4)}
    return {"outcome": "wrong" if fault else "read", "what": fault}


def _fault_of_volume(path: Path) -> str:
    volume = read_volume(path)
    return "" if np.isfinite(volume.voxels).all() else "voxels that are no numbers"


def _fault_of_series(folder: Path) -> str:
    voxels, geometry, series = read_series(folder)
    if voxels.shape != geometry.shape or not np.isfinite(voxels).all():
        return f"voxels {voxels.shape} on {geometry.shape}, or some that are no numbers"
    for k, header in enumerate(series.slices):
        if header.frame is None and (fault := _misplaced(header.path, geometry.affine_lps, k)):
            return fault
    return ""


def _misplaced(path: Path, affine_lps: np.ndarray, k: int) -> str:
    """Compare the grid with what pydicom, which the gate does not use for this, makes of a slice's position."""
    try:
        dataset = pydicom.dcmread(path, stop_before_pixels=True, force=True)
        said = np.array([float(x) for x in dataset.ImagePositionPatient])
    except Exception:
        return ""  # pydicom makes nothing of it, or takes more memory than there is
    found = affine_lps[:3] @ (0.0, 0.0, k, 1.0)
    smallest = np.linalg.norm(affine_lps[:3, :3], axis=0).min()
    off = float(np.linalg.norm(said - found))
    return f"slice {k} lies {off:.3g} mm from its own position" if off > OFF_VOXELS * smallest else ""


def _limit_memory(more_mb: int) -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = used + more_mb * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _too_slow(_signal: int, _frame: FrameType | None) -> Any:
    raise TooSlow


if __name__ == "__main__":
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    sys.exit(main())
