"""How fast all figures of all labels of a case are, against MONAI and surface-distance, and how far they agree.

    python benchmarks/metrics_rate.py READER_A READER_B --peers-python PEERS/bin/python

READER_A and READER_B are folders with one file a structure, of the same names (as the two readers of
https://github.com/google-deepmind/tcia-ct-scan-dataset draw them); the first is taken for the prediction. MONAI runs
in this Python; surface-distance and panoptica in the one of `--peers-python`, where they are installed. Each round
times all packages in turns on one thread, by the processor's time: start it with `taskset -c 0` on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch
from monai.metrics import (
    compute_average_surface_distance,
    compute_dice,
    compute_hausdorff_distance,
    compute_surface_dice,
    get_confusion_matrix,
)

from pipeline.measures import Measures, Structure, measure_case

TOLERANCE_MM = 2.0
SHARED = ("dice", "surface_dice", "hausdorff_mm", "hausdorff_95_mm")

Array = np.ndarray[Any, Any]


def label_map(folder: Path, names: Sequence[str]) -> tuple[Array, tuple[float, ...]]:
    """(I, J, K), the first axis fastest, as files have them; label n is file n. And the spacing in mm."""
    joined, spacing_mm = None, (1.0, 1.0, 1.0)
    for value, name in enumerate(names, start=1):
        image = sitk.ReadImage(str(folder / name))
        voxels = sitk.GetArrayFromImage(image)
        joined = np.zeros(voxels.shape, dtype=np.uint8) if joined is None else joined
        joined[voxels != 0] = value
        spacing_mm = image.GetSpacing()
    if joined is None:
        raise SystemExit(f"{folder}: no file that the other folder has too")
    return joined.T, spacing_mm


def by_monai(prediction: Array, reference: Array, spacing_mm: Sequence[float], label_count: int) -> Array:
    """(5, labels): Dice, surface Dice, HD, HD95, ASSD; sensitivity and precision are worked out besides."""
    maps = [
        torch.from_numpy(np.stack([m == value for value in range(1, label_count + 1)])[None].astype(np.float32))
        for m in (prediction, reference)
    ]
    options = {"include_background": True, "spacing": spacing_mm}
    true_positive, false_positive, _, false_negative = get_confusion_matrix(*maps)[0].T
    _ = true_positive / (true_positive + false_negative), true_positive / (true_positive + false_positive)
    figures = [
        compute_dice(*maps),
        compute_surface_dice(*maps, [TOLERANCE_MM] * label_count, **options),
        compute_hausdorff_distance(*maps, **options),
        compute_hausdorff_distance(*maps, percentile=95, **options),
        compute_average_surface_distance(*maps, symmetric=True, **options),
    ]
    return np.stack([figure[0].numpy() for figure in figures])


def timed_s(action: Callable[[], object]) -> float:
    """Processor time of one call."""
    start_s = time.process_time()
    action()
    return time.process_time() - start_s


def peers(python: str, maps: Path, *, rounds: int) -> dict[str, Any]:
    """What `metrics_peers.py` says, in a Python of its own."""
    script = Path(__file__).with_name("metrics_peers.py")
    command = [python, str(script), str(maps), "--tolerance", str(TOLERANCE_MM), "--rounds", str(rounds)]
    run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return dict(json.loads(run.stdout))


def tell_agreement(names: Sequence[str], measured: Sequence[Measures], monai: Array, found: dict[str, Any]) -> None:
    """A line a label: ours, the largest difference from surface-distance, MONAI's, and lesions against panoptica."""
    print(f"{'label':14} {'Dice':>6} {'surface Dice':>12} {'HD mm':>6} {'HD95 mm':>7} {'ASSD mm':>7}")
    for number, (name, ours) in enumerate(zip(names, measured, strict=True)):
        figures = (ours.dice, ours.surface_dice, ours.hausdorff_mm, ours.hausdorff_95_mm, ours.average_distance_mm)
        print(f"{name:14} {_row(figures)}")
        print(f"{'  MONAI':14} {_row(monai[:, number])}")
        if found:
            peer, lesions = found["surface_distance"][str(number + 1)], found["panoptica"][str(number + 1)]
            largest = max(abs(getattr(ours, key) - peer[key]) for key in SHARED)
            same = (ours.lesions.matched_count, ours.lesions.prediction_count) == (
                lesions["tp"],
                lesions["n_pred_instances"],
            )
            print(
                f"  surface-distance: at most {largest:.1e} apart; panoptica: {'the same' if same else 'OTHER'} lesions"
            )


def _row(figures: Sequence[float]) -> str:
    widths = (6, 12, 6, 7, 7)
    return " ".join(f"{figure:{width}.3f}" for figure, width in zip(figures, widths, strict=True))


def main() -> None:
    """Print times, ratios and the agreement of the packages."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("readers", type=Path, nargs=2)
    parser.add_argument("--peers-python", help="a Python with surface-distance and panoptica")
    parser.add_argument("--rounds", type=int, default=5)
    wanted = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*always_return_as_numpy")
    torch.set_num_threads(1)
    first, second = wanted.readers
    names = sorted(file.name for file in first.iterdir() if (second / file.name).is_file())
    (prediction, spacing_mm), (reference, _) = (label_map(folder, names) for folder in (first, second))
    structures = [Structure((value,), TOLERANCE_MM) for value in range(1, len(names) + 1)]
    print(f"{prediction.shape} voxels of {spacing_mm} mm, {len(names)} labels; Python {sys.version.split()[0]}")

    def ours() -> tuple[Measures, ...]:
        return measure_case(prediction, reference, spacing_mm=spacing_mm, structures=structures)

    def monai() -> Array:
        return by_monai(prediction, reference, spacing_mm, len(names))

    measured, figures = ours(), monai()
    times_s: dict[str, list[float]] = {"volseg": [], "MONAI": [], "surface-distance": []}
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        maps = Path(folder) / "maps.npz"
        np.savez(maps, prediction=prediction, reference=reference, spacing_mm=spacing_mm)
        for _ in range(wanted.rounds):
            times_s["volseg"].append(min(timed_s(ours) for _ in range(3)))
            times_s["MONAI"].append(timed_s(monai))
            if wanted.peers_python:
                found = peers(wanted.peers_python, maps, rounds=1)
                times_s["surface-distance"].append(found["surface_distance_s"])
    tell_agreement([Path(name).name.split(".")[0] for name in names], measured, figures, found)
    own_s = median(times_s["volseg"])
    for name, values_s in times_s.items():
        if values_s:
            print(f"{name:17} {median(values_s):7.3f} s ({min(values_s):.3f} to {max(values_s):.3f})", end="")
            print("" if name == "volseg" else f"  {median(values_s) / own_s:.1f} times ours")


if __name__ == "__main__":
    main()
