"""How long several studies take beside each other and one at a time: the same process, model and files, in turns.

The bytes written are compared as well. Give inputs that take long to read or to write (DICOM folders, large volumes,
several formats) to see what overlapping saves, and small ones to see what it costs.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

import pipeline.segment
from pipeline.bundle import find_bundles, load_bundle
from pipeline.console import Silence
from pipeline.overlap import one_at_a_time, overlapped
from pipeline.predict import Model
from pipeline.segment import SegmentSettings, segment_studies
from pipeline.studies import Study, Wanted, find_studies

WAYS = {"one at a time": one_at_a_time, "overlapped": overlapped}


def segmented(model: Model, studies: list[Study], settings: SegmentSettings) -> tuple[float, float, dict[str, bytes]]:
    """Wall and processor seconds, and what was written."""
    with tempfile.TemporaryDirectory() as folder:
        wall_s, processor_s = time.perf_counter(), time.process_time()
        _, failures = segment_studies(model, studies, Path(folder), settings=settings, console=Silence())
        wall_s, processor_s = time.perf_counter() - wall_s, time.process_time() - processor_s
        if failures:
            raise SystemExit(f"{failures[0].case_id}: {failures[0].reason}")
        files = [path for path in Path(folder).rglob("*") if path.suffix in (".gz", ".nrrd", ".png")]
        return wall_s, processor_s, {path.name: path.read_bytes() for path in files}


def main() -> None:
    """Print medians of both ways, and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("inputs", type=Path, nargs="+")
    parser.add_argument("--as", dest="formats", default="nifti")
    parser.add_argument("--no-mirror", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="of PyTorch; default: its own choice")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    model = Model(tuple(load_bundle(path) for path in find_bundles(given.model)))
    studies = find_studies(given.inputs, Wanted(model.plan.channels), console=Silence())
    mirror = False if given.no_mirror else None
    settings = SegmentSettings(tuple(given.formats.split(",")), mirror, series=None, force=True)
    rounds: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    written: list[dict[str, bytes]] = []
    for number in range(given.rounds + 1):
        for way, run in WAYS.items():
            pipeline.segment.overlapped = run
            wall_s, processor_s, files = segmented(model, studies, settings)
            written.append(files)
            if number:  # the first round warms everything up
                rounds[way].append((wall_s, processor_s))
    if any(files != written[0] for files in written):
        raise SystemExit("the files are not the same")
    print(f"{len(studies)} studies, {torch.get_num_threads()} threads, medians of {given.rounds}; the same bytes")
    for way, times in rounds.items():
        walls, processor = zip(*times, strict=True)
        print(f"{way:14} {median(walls):8.2f} s wall ({min(walls):.2f} to {max(walls):.2f}), "
              f"{median(processor):8.2f} s processor")  # fmt: skip
    first, second = (median(wall for wall, _ in times) for times in rounds.values())
    print(f"ratio {first / second:.2f}")


if __name__ == "__main__":
    main()
