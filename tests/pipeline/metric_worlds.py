"""A world on which metrics of several packages are compared; numpy alone, so that each package's Python can make it.

`python tests/pipeline/metric_worlds.py FOLDER` writes it for `benchmarks/metrics_peers.py`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

SPACING_MM = (0.7, 1.1, 3.0)
SHAPE = (48, 44, 24)
TOLERANCE_MM = 1.1
LABELS = {1: "moved", 2: "at the border", 3: "noise", 4: "lesions", 5: "one voxel"}

Array = np.ndarray[Any, Any]


def ellipsoid(centre: tuple[float, ...], radii: tuple[float, ...]) -> Array:
    grid = np.stack(np.meshgrid(*[np.arange(n) for n in SHAPE], indexing="ij"))
    steps = (grid - np.reshape(centre, (3, 1, 1, 1))) / np.reshape(radii, (3, 1, 1, 1))
    return np.asarray((steps**2).sum(axis=0) <= 1.0)


def lesion_boxes(label_map: Array, generator: np.random.Generator, count: int) -> None:
    """Small boxes of label 4 in the upper half of the first axis."""
    for _ in range(count):
        i, j, k = (int(generator.integers(low, high)) for low, high in ((26, 44), (2, 38), (2, 20)))
        a, b, c = (int(n) for n in generator.integers(1, 5, 3))
        label_map[i : i + a, j : j + b, k : k + c] = 4


def maps() -> tuple[Array, Array]:
    """Prediction and reference, (I, J, K) of uint8."""
    prediction, reference = np.zeros((2, *SHAPE), dtype=np.uint8)
    generator = np.random.default_rng(20)
    for label_map, count in ((reference, 14), (prediction, 12)):
        lesion_boxes(label_map, generator, count)
    kept = np.random.default_rng(3).random(SHAPE) > 0.2
    prediction[(reference == 4) & kept] = 4
    reference[ellipsoid((13, 15, 12), (8, 9, 7))] = 1
    prediction[ellipsoid((14.4, 15, 11), (8, 8, 7))] = 1
    reference[ellipsoid((10, 40, 20), (7, 9, 6))] = 2
    prediction[ellipsoid((9, 41, 21), (8, 8, 6))] = 2
    for seed, label_map in ((5, prediction), (6, reference)):
        noise = np.zeros(SHAPE, dtype=bool)
        noise[2:12, 30:40, 4:10] = np.random.default_rng(seed).random((10, 10, 6)) > 0.6
        label_map[noise & (label_map == 0)] = 3
    reference[24, 0, 0], prediction[23, 1, 1] = 5, 5
    return prediction, reference


if __name__ == "__main__":
    prediction, reference = maps()
    np.savez(Path(sys.argv[1]) / "world.npz", prediction=prediction, reference=reference, spacing_mm=SPACING_MM)
