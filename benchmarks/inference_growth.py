"""How time and memory of a prediction grow with the volume and the number of classes: a table and a plot.

Studies have 512 x 512 voxels in a slice, of 0.8 x 0.8 x 1.5 mm, and as many slices as make their size. The network is
one pointwise layer, so that what is measured is everything around it. Each prediction runs in a process of its own,
under the limit that `--max-memory-gb` sets; a size that does not fit is told with the least that would.

    python benchmarks/inference_growth.py --out growth.png
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))

SPACING_MM = (0.8, 0.8, 1.5)
GRID_MM = (1.5, 1.5, 1.5)


def main() -> None:
    """Print a row for each size and number of classes, and draw them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megavoxels", type=float, nargs="*", default=[32, 64, 128, 256, 512])
    parser.add_argument("--classes", type=int, nargs="*", default=[2, 16, 117])
    parser.add_argument("--slice", type=int, default=512, help="voxels of a slice's sides")
    parser.add_argument("--side", type=int, default=96, help="of the windows, in voxels")
    parser.add_argument("--max-memory-gb", type=float, default=12.0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("inference_growth.png"))
    parser.add_argument("--worker", nargs=2, type=int, metavar=("SLICES", "CLASSES"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        torch.set_num_threads(args.threads)
        print(json.dumps(_predicted(args, *args.worker)))
        return
    print("| classes | million voxels | seconds | processor seconds | peak | study, label map | the rest |")
    print("|---|---|---|---|---|---|---|")
    rows = [_row(args, classes, millions) for classes in args.classes for millions in args.megavoxels]
    _draw([row for row in rows if row], args.out)


def _row(args: argparse.Namespace, classes: int, millions: float) -> dict[str, Any]:
    slices = max(1, round(millions * 1e6 / args.slice**2))
    command = [sys.executable, __file__, *sys.argv[1:], "--worker", str(slices), str(classes)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode:
        said = (ran.stderr.strip().splitlines() or ["killed"])[-1]
        print(f"| {classes} | {millions:g} | {said} |", flush=True)
        return {}
    found = {"classes": classes, "millions": millions, **json.loads(ran.stdout.splitlines()[-1])}
    figures = [f"{found[key]:.1f}" for key in ("seconds", "processor")]
    sizes = [f"{found[key] / 1e9:.2f} GB" for key in ("peak", "study", "rest")]
    print(f"| {classes} | {millions:g} | {' | '.join(figures + sizes)} |", flush=True)
    return found


def _predicted(args: argparse.Namespace, slices: int, classes: int) -> dict[str, float]:
    from many_classes import organ_model, organ_study

    from pipeline.predict import PredictSettings, predict

    study = organ_study((args.slice, args.slice, slices), SPACING_MM, classes)
    model = organ_model(classes, args.side, GRID_MM)
    settings = PredictSettings(False, round(args.max_memory_gb * 1e9))
    wall, processor = time.perf_counter(), time.process_time()
    label_map = predict(model, [study], settings=settings, device=torch.device("cpu")).label_map
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    known = study.voxels.nbytes + label_map.nbytes
    assert int(np.max(label_map)) < classes
    return {"seconds": wall, "processor": processor, "peak": peak, "study": known, "rest": peak - known}


def _draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Seconds on the left and gigabytes on the right, over millions of voxels."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for classes in dict.fromkeys(row["classes"] for row in rows):
        chosen = [row for row in rows if row["classes"] == classes]
        millions = [row["millions"] for row in chosen]
        left.plot(millions, [row["processor"] for row in chosen], "o-", label=f"{classes} classes")
        (line,) = right.plot(millions, [row["peak"] / 1e9 for row in chosen], "o-", label=f"{classes} classes")
        right.plot(millions, [row["rest"] / 1e9 for row in chosen], "o--", color=line.get_color())
    left.set(xlabel="million voxels", ylabel="seconds of the processor", xlim=(0, None), ylim=(0, None))
    right.set(xlabel="million voxels", ylabel="GB; dashed: without study and label map", xlim=(0, None), ylim=(0, None))
    left.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
