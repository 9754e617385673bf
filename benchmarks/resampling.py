"""How long resampling takes and how much memory, against SciPy and skimage; and restoring class scores, against MONAI.

    python benchmarks/resampling.py [--sides 256 512] [--classes 5 117] [--rounds 5] [--threads 2]

Each measurement is a process of its own, and the contestants take turns: imports and making the input are not
counted. Memory is what the process held at most beyond its input: for resizing the result is part of it. Restored are
scores of a model grid of 1.5 mm to a CT of 512x512x300 at 0.7x0.7x1 mm, or a part of it (`--planes`): volseg's arrive
slab by slab; peers hold all of them, interpolate them and take the highest.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
GROWTHS = (0.75, 1.25)
SLAB = 8
Measured = tuple[float, float, float]


def resize_with(contestant: str) -> Callable[[Any, tuple[int, ...]], np.ndarray]:
    """Cubic, by the mirrored ends that all of them have; warmed up on a small volume."""
    import torch

    def volseg(voxels: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        from transforms.resample import resize

        return resize(torch.from_numpy(voxels)[None], shape, orders=(3, 3, 3))[0].numpy()

    def scipy(voxels: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        from scipy.ndimage import zoom

        factors = [m / n for n, m in zip(voxels.shape, shape, strict=True)]
        return np.asarray(zoom(voxels, factors, order=3, mode="mirror", grid_mode=True))

    def skimage(voxels: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        from skimage.transform import resize

        return np.asarray(resize(voxels, shape, order=3, mode="reflect", anti_aliasing=False, clip=False))

    return {"volseg": volseg, "SciPy": scipy, "skimage": skimage}[contestant]


def measure_resize(contestant: str, side: int, growth: float) -> Measured:
    """Seconds, peak bytes beyond the input, and the sum of the result."""
    resize = resize_with(contestant)
    resize(np.zeros((24, 24, 24), np.float32), (30, 30, 30))
    voxels = np.random.default_rng(0).random((side, side, side), np.float32)
    shape = (round(side * growth),) * 3
    before, start_s = peak_bytes(), time.perf_counter()
    found = resize(voxels, shape)
    return time.perf_counter() - start_s, peak_bytes() - before, float(found[::9, ::9, ::9].astype(float).sum())


def score_planes(classes: int, shape: tuple[int, int, int], first: int, count: int) -> Any:
    """Probabilities (classes, count, I, J) of a made-up body: organs around random centres, air outside."""
    import torch

    random = torch.Generator().manual_seed(0)
    sides = torch.tensor(shape, dtype=torch.float32)
    centres = (torch.rand((classes - 1, 3), generator=random) * 0.7 + 0.15) * sides
    steps = [torch.arange(n, dtype=torch.float32) for n in (count, shape[0], shape[1])]
    k, i, j = torch.meshgrid(steps[0] + first, steps[1], steps[2], indexing="ij")
    scores = torch.empty((classes, *k.shape))
    for number, (x, y, z) in enumerate(centres, start=1):
        scores[number] = ((i - x) ** 2 + (j - y) ** 2 + (k - z) ** 2) / -40
    reach = ((i / shape[0] - 0.5) / 0.4) ** 2 + ((j / shape[1] - 0.5) / 0.3) ** 2
    scores[0] = scores[1:].amax(dim=0) + 30 * (reach - 1)
    scores -= scores.amax(dim=0)
    scores.exp_()
    return scores.div_(scores.sum(dim=0))


def measure_restoring(contestant: str, classes: int, planes: int) -> Measured:
    """Seconds, peak bytes in all beyond the imports, and how many voxels are not background."""
    import torch

    from transforms.geometry import Geometry
    from transforms.restore import SlabRestorer

    target = Geometry((512, 512, planes), np.diag([0.7, 0.7, 1.0, 1.0]))
    source = target.respaced((1.5, 1.5, 1.5))
    before, spent_s = peak_bytes(), 0.0
    if contestant == "volseg":
        found = torch.zeros(target.shape, dtype=torch.uint8)
        restorer = SlabRestorer(source, target, 2)
        for first in range(0, source.shape[2], SLAB):
            slab = score_planes(classes, source.shape, first, min(SLAB, source.shape[2] - first))
            start_s = time.perf_counter()
            restorer.add(slab.permute(0, 2, 3, 1), found)
            spent_s += time.perf_counter() - start_s
    else:
        scores = torch.empty((classes, *source.shape))
        for first in range(0, source.shape[2], SLAB):
            slab = score_planes(classes, source.shape, first, min(SLAB, source.shape[2] - first))
            scores[..., first : first + slab.shape[1]] = slab.permute(0, 2, 3, 1)
        start_s = time.perf_counter()
        found = PEERS[contestant](scores, source, target)
        spent_s = time.perf_counter() - start_s
    return spent_s, peak_bytes() - before, float(np.count_nonzero(np.asarray(found)))


def restore_monai(scores: Any, source: Any, target: Any) -> np.ndarray:
    """What Invertd does to a prediction that was respaced, and the highest."""
    from monai.data import MetaTensor
    from monai.transforms import SpatialResample

    move = SpatialResample(mode="bilinear", padding_mode="border", align_corners=True)
    moved = move(MetaTensor(scores, affine=source.affine_ras), dst_affine=target.affine_ras, spatial_size=target.shape)
    return np.asarray(moved.argmax(dim=0))


def restore_skimage(scores: Any, source: Any, target: Any) -> np.ndarray:
    """As nnU-Net's export: each class by skimage's resize of order 1, and the highest."""
    from skimage.transform import resize

    moved = np.empty((len(scores), *target.shape), np.float32)
    for into, score in zip(moved, scores.numpy(), strict=True):
        into[:] = resize(score, target.shape, order=1, mode="edge", anti_aliasing=False, clip=True)
    return moved.argmax(axis=0)


PEERS = {"MONAI": restore_monai, "skimage": restore_skimage}


def peak_bytes() -> int:
    """What this process held at most; ru_maxrss would be its parent's where that was larger."""
    status = Path("/proc/self/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


def measure(threads: int, kind: str, *task: Any) -> Measured:
    """One measurement in a new process."""
    command = [sys.executable, __file__, "--threads", str(threads), "--task", json.dumps([kind, *task])]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise SystemExit(f"{task[0]} ended with code {run.returncode}: {run.stderr[-500:]}")
    seconds, taken, found = json.loads(run.stdout)
    return seconds, taken, found


def compete(title: str, rounds: int, tasks: dict[str, list[Any]], threads: int) -> None:
    """Medians, ranges, and how many times as long each takes as volseg, round by round."""
    found: dict[str, list[Measured]] = {contestant: [] for contestant in tasks}
    for _ in range(rounds):
        for contestant, task in tasks.items():
            found[contestant].append(measure(threads, *task))
    print(title)
    for contestant, measured in found.items():
        times = [seconds for seconds, _, _ in measured]
        ratios = [theirs / ours for theirs, (ours, _, _) in zip(times, found["volseg"], strict=True)]
        gib = median(taken for _, taken, _ in measured) / 2**30
        print(
            f"  {contestant:8} {median(times):8.3f} s ({min(times):.3f} to {max(times):.3f}), {gib:6.2f} GiB,"
            f" {median(ratios):6.1f} times volseg's time (found {measured[0][2]:.6g})",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", type=int, nargs="*", default=[256, 512])
    parser.add_argument("--classes", type=int, nargs="*", default=[5, 117])
    parser.add_argument("--planes", type=int, default=300, help="of the CT; peers hold 4 bytes a voxel and class")
    parser.add_argument("--restoring-peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--task", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.task:
        import torch

        torch.set_num_threads(arguments.threads)
        kind, *task = json.loads(arguments.task)
        print(json.dumps((measure_resize if kind == "resize" else measure_restoring)(*task)))
        return
    for side, growth in itertools.product(arguments.sides, GROWTHS):
        tasks = {name: ["resize", name, side, growth] for name in ("volseg", "SciPy", "skimage")}
        size = 4 * (side**3 + round(side * growth) ** 3) / 2**30
        title = f"{side}^3 to {round(side * growth)}^3, cubic (in and out {size:.2f} GiB, of which in is not counted)"
        compete(title, arguments.rounds, tasks, arguments.threads)
    for classes in arguments.classes:
        names = ["volseg", *arguments.restoring_peers]
        tasks = {name: ["restore", name, classes, arguments.planes] for name in names}
        title = f"{classes} classes to 512x512x{arguments.planes}, everything but the network"
        compete(title, arguments.rounds, tasks, arguments.threads)


if __name__ == "__main__":
    # Run from anywhere: the packages lie beside this folder.
    sys.path.insert(0, str(ROOT))
    main()
