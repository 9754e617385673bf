"""Where the seconds of the first result go: each part of `volseg predict` of one small case in a fresh process, against
the same case again in that process, which is warm by then.

Wall time and, since a shared machine stretches that, the processor's. What the parts are made of is imported where the
command imports it. For comparison, the import of MONAI's transforms alone, which prediction does without.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

MONAI = "import monai.transforms"
Times = dict[str, tuple[float, float]]
"""Wall and processor seconds, by part."""


@contextmanager
def timed(times: Times, part: str) -> Iterator[None]:
    wall_s, processor_s = time.perf_counter(), time.process_time()
    yield
    times[part] = time.perf_counter() - wall_s, time.process_time() - processor_s


def predict_twice(bundle: Path, image: Path, threads: int | None) -> dict[str, Times]:
    """The parts in this process, which has imported nothing yet, and then those that are done again for a case."""
    cold: Times = {}
    with timed(cold, "command line"):
        import pipeline.cli_stages  # noqa: F401
    with timed(cold, "import torch"):
        import torch
    if threads:
        torch.set_num_threads(threads)
    with timed(cold, "import the stages"):
        from pipeline.bundle import load_bundle
        from pipeline.device import choose_hardware  # noqa: F401
        from pipeline.predict import Model
        from pipeline.segment import segment_studies  # noqa: F401
    with timed(cold, "weights"):
        model = Model((load_bundle(bundle),))
    one_case(cold, model, image)
    warm: Times = {}
    one_case(warm, model, image)
    return {"cold": cold, "warm": warm}


def one_case(times: Times, model: object, image: Path) -> None:
    """Read, segment, write and read back: what is done for every case."""
    from pipeline.export import export
    from pipeline.predict import PredictSettings, predict
    from pipeline.segment import device_of
    from pipeline.sources import open_source

    with timed(times, "read"):
        source = open_source(image).read()
    with timed(times, "prepare, network, restore"):
        settings = PredictSettings(mirror=model.mirror)  # type: ignore[attr-defined]
        found = predict(model, [source.image], settings=settings, device=device_of(model))  # type: ignore[arg-type]
    with timed(times, "write and read back"), tempfile.TemporaryDirectory() as folder:
        export(found, formats=("nifti",), out=Path(folder), name="case", source=source)


def measured(command: list[str]) -> tuple[float, float, str]:
    """Wall and processor seconds of a process, and what it printed."""
    import resource

    before, start_s = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    wall_s, after = time.perf_counter() - start_s, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall_s, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, text


def show(name: str, rounds: list[tuple[float, float]]) -> None:
    walls, processor = zip(*rounds, strict=True)
    print(f"{name:28} {median(walls):8.3f} s {median(processor):8.3f} s  ({min(walls):.3f} to {max(walls):.3f})")


def main() -> None:
    """Print medians of the parts, of the whole command, and of importing MONAI."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("image", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="of PyTorch; default: its own choice")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(predict_twice(given.bundle, given.image, given.threads)))
        return
    child = [sys.executable, __file__, *sys.argv[1:], "--child"]
    volseg = str(Path(sys.executable).with_name("volseg"))
    parts: list[dict[str, Times]] = []
    whole: list[tuple[float, float]] = []
    monai: list[tuple[float, float]] = []
    for number in range(given.rounds + 1):
        with tempfile.TemporaryDirectory() as out:
            command = measured([volseg, "predict", str(given.bundle), str(given.image), "--out", out])
        times, alone = measured(child), measured([sys.executable, "-c", MONAI])
        if number:  # the first round also reads the disk and writes the bytecode
            whole.append(command[:2])
            parts.append(json.loads(times[2]))
            monai.append(alone[:2])
    print(f"medians of {given.rounds} fresh processes: wall, processor")
    show("volseg predict, one case", whole)
    for state in ("cold", "warm"):
        print(f"{state}:")
        for part in parts[0][state]:
            show(f"  {part}", [tuple(p[state][part]) for p in parts])  # type: ignore[misc]
        show("  all parts", [tuple(map(sum, zip(*p[state].values(), strict=True))) for p in parts])  # type: ignore[misc]
    show(MONAI, monai)


if __name__ == "__main__":
    main()
