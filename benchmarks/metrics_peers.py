"""Figures of two label maps by other packages, as JSON: what `metrics_rate.py` and the tests compare ours with.

Runs in a Python of its own that has surface-distance and panoptica, neither of which volseg depends on:

    python benchmarks/metrics_peers.py MAPS.npz --tolerance 1.1 > figures.json

MAPS.npz holds `prediction` and `reference` (I, J, K) and `spacing_mm`. tests/pipeline/metric_worlds.py makes the one
that tests/pipeline/peer_figures.json is of.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def of_surface_distance(
    prediction: Array, reference: Array, spacing_mm: Sequence[float], tolerance_mm: float
) -> dict[str, float]:
    """Of two masks; average distances are given per direction, with the areas that weigh them."""
    import surface_distance as package

    distances = package.compute_surface_distances(reference, prediction, spacing_mm)
    reference_mm, prediction_mm = package.compute_average_surface_distance(distances)
    return {
        "dice": float(package.compute_dice_coefficient(reference, prediction)),
        "surface_dice": float(package.compute_surface_dice_at_tolerance(distances, tolerance_mm)),
        "hausdorff_mm": float(package.compute_robust_hausdorff(distances, 100)),
        "hausdorff_95_mm": float(package.compute_robust_hausdorff(distances, 95)),
        "average_from_reference_mm": float(reference_mm),
        "average_from_prediction_mm": float(prediction_mm),
        "reference_area_mm2": float(distances["surfel_areas_gt"].sum()),
        "prediction_area_mm2": float(distances["surfel_areas_pred"].sum()),
    }


def of_panoptica(prediction: Array, reference: Array) -> dict[str, float]:
    """Of two masks: components of 26 neighbours, matched one to one by the sum of intersections over unions."""
    from panoptica import ConnectedComponentsInstanceApproximator, InputType, MaxBipartiteMatching, Panoptica_Evaluator

    evaluator = Panoptica_Evaluator(
        expected_input=InputType.SEMANTIC,
        instance_approximator=ConnectedComponentsInstanceApproximator(),
        instance_matcher=MaxBipartiteMatching(matching_threshold=0.0),
        verbose=False,
    )
    with redirect_stdout(sys.stderr):
        result = next(iter(evaluator.evaluate(prediction, reference).values()))
    keys = ("n_pred_instances", "n_ref_instances", "tp", "rq", "pq_dsc", "sq_dsc")
    return {key: float(getattr(result, key)) for key in keys}


def timed_s(action: Callable[[], object], rounds: int) -> list[float]:
    """Processor times of so many rounds."""
    times_s = []
    for _ in range(rounds):
        start_s = time.process_time()
        action()
        times_s.append(time.process_time() - start_s)
    return times_s


def main() -> None:
    """Print the figures of every label, and with --rounds the time that all labels take."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("maps", type=Path)
    parser.add_argument("--tolerance", type=float, required=True, help="of the surface Dice, in mm")
    parser.add_argument("--rounds", type=int, default=0, help="times that surface-distance is timed")
    wanted = parser.parse_args()
    with np.load(wanted.maps) as stored:
        # As a reader of NIfTI gives them: the first axis runs fastest.
        prediction, reference = (np.asfortranarray(stored[name]) for name in ("prediction", "reference"))
        spacing_mm = tuple(float(s) for s in stored["spacing_mm"])
    labels = [int(v) for v in np.unique(reference) if v]

    def surface_distance() -> dict[int, dict[str, float]]:
        return {v: of_surface_distance(prediction == v, reference == v, spacing_mm, wanted.tolerance) for v in labels}

    figures = {
        "versions": {name: version(name) for name in ("surface-distance", "panoptica", "numpy")},
        "surface_distance": surface_distance(),
        "panoptica": {
            v: of_panoptica((prediction == v).astype(np.uint8), (reference == v).astype(np.uint8)) for v in labels
        },
    }
    if wanted.rounds:
        figures["surface_distance_s"] = median(timed_s(surface_distance, wanted.rounds))
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
