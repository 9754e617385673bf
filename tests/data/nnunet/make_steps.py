"""Makes steps.npz: what nnU-Net's own preprocessing makes of small volumes of noise, and what its export makes of
logits on the grids that result; run it where nnunetv2 is installed (2.8.1 then):
python tests/data/nnunet/make_steps.py FOLDER.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import make
import numpy as np
import torch
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from scipy.ndimage import gaussian_filter

Z, CT, UNIT, NONE = "ZScoreNormalization", "CTNormalization", "RescaleTo01Normalization", "NoNormalization"
TORCH = {
    f"resampling_fn_{what}{part}": value
    for what in ("data", "seg", "probabilities")
    for part, value in (
        ("", "resample_torch_fornnunet"),
        ("_kwargs", {"is_seg": what == "seg", "force_separate_z": None, "memefficient_seg_resampling": False}),
    )
}
REGIONS = {
    "labels": {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "active": 3},
    "regions_class_order": [1, 2, 3],
}

CASES: dict[str, tuple[Any, ...]] = {
    "same_spacing": ((12, 13, 14), (1.0, 1.0, 1.0), (1.0, 1.0, 1.0), (0, 1, 2), [Z, UNIT], [False, False], {}),
    "finer": ((10, 13, 14), (2.0, 1.5, 1.5), (1.0, 1.0, 1.0), (0, 1, 2), [Z, CT], [True, False], {}),
    "coarser": ((19, 22, 18), (0.8, 0.7, 0.7), (1.0, 1.1, 1.3), (2, 0, 1), [Z, Z], [True, True], {}),
    "slices_stay": ((9, 20, 19), (5.0, 0.7, 0.7), (5.0, 1.0, 1.0), (0, 1, 2), [CT, NONE], [False, False], {}),
    "slices_double": ((10, 17, 19), (6.0, 0.8, 0.8), (3.0, 1.0, 1.0), (0, 1, 2), [CT, Z], [False, True], {}),
    "slices_merge": ((16, 18, 17), (2.0, 0.9, 0.9), (6.0, 1.0, 1.0), (0, 1, 2), [Z, Z], [False, False], {}),
    "last_axis_slices": ((18, 17, 9), (0.8, 0.8, 5.0), (4.0, 1.0, 1.0), (2, 0, 1), [Z, Z], [True, False], {}),
    "not_apart": ((10, 17, 19), (6.0, 0.8, 0.8), (3.0, 1.0, 1.0), (0, 1, 2), [Z, Z], [False, False], {"apart": False}),
    "linear": ((10, 17, 19), (6.0, 0.8, 0.8), (3.0, 1.0, 1.0), (0, 1, 2), [NONE, Z], [False, True], TORCH),
    "linear_even": ((14, 17, 19), (1.3, 0.8, 0.8), (1.0, 1.0, 1.0), (1, 0, 2), [Z, NONE], [True, False], TORCH),
    "flat": ((9, 18, 17), (3.0, 0.9, 0.9), (1.1, 1.2), (0, 1, 2), [Z, Z], [False, True], {}),
    "flat_turned": ((18, 9, 17), (0.9, 3.0, 0.9), (1.1, 1.2), (1, 0, 2), [Z, Z], [True, False], {}),
    "regions": ((10, 13, 14), (2.0, 1.5, 1.5), (1.0, 1.0, 1.0), (0, 1, 2), [Z, Z], [True, True], REGIONS),
}
"""Shape and spacing as SimpleITK has them (k, j, i), the plan's spacing, transpose_forward, normalisations, masks."""


def documents(name: str) -> tuple[dict[str, Any], dict[str, Any], str]:
    """plans.json, dataset.json and the configuration."""
    _, spacing, target, transpose, schemes, masks, other = CASES[name]
    base = "plain_2d" if len(target) == 2 else "plain_3d"
    configuration = make.CASES[base][0]
    plans = make.plans_of(base)
    plans["transpose_forward"] = list(transpose)
    plans["transpose_backward"] = [transpose.index(axis) for axis in range(3)]
    plans["original_median_spacing_after_transp"] = [spacing[axis] for axis in transpose]
    chosen = plans["configurations"][configuration]
    chosen |= {"spacing": list(target), "normalization_schemes": schemes, "use_mask_for_norm": masks}
    chosen |= {key: value for key, value in other.items() if key.startswith("resampling")}
    if other.get("apart") is False:
        for what in ("data", "seg", "probabilities"):
            key = f"resampling_fn_{what}_kwargs"
            chosen[key] = chosen[key] | {"force_separate_z": False}
    dataset = make.DATASET | {key: value for key, value in other.items() if key in REGIONS}
    return plans, dataset, configuration


def noise(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return gaussian_filter(random.normal(0, 1, shape), 1.0) * 5


def study(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Two channels that are 0 all around, and in a hole."""
    seen = np.zeros(shape, bool)
    seen[2:-1, 1:-2, 3:-1] = True
    seen[shape[0] // 2, shape[1] // 2 : shape[1] // 2 + 2, shape[2] // 2] = False
    return np.stack([np.where(seen, (noise(random, shape) * 40 + 90).round(), 0) for _ in range(2)]).astype(np.int16)


def steps(name: str, random: np.random.Generator) -> dict[str, np.ndarray]:
    plans, dataset, configuration = documents(name)
    manager = PlansManager(json.loads(json.dumps(plans)))
    chosen, labels = manager.get_configuration(configuration), manager.get_label_manager(dataset)
    shape, spacing = CASES[name][:2]
    channels = study(random, shape)
    image, _, properties = DefaultPreprocessor(verbose=False).run_case_npy(
        channels, None, {"spacing": list(spacing)}, manager, chosen, dataset
    )
    logits = np.stack([noise(random, image.shape[1:]) for _ in range(labels.num_segmentation_heads)])
    logits = logits.astype(np.float16)
    exported = convert_predicted_logits_to_segmentation_with_correct_shape(
        torch.from_numpy(logits.astype(np.float32)), manager, chosen, labels, properties, num_threads_torch=1
    )
    found = {"channels": channels, "image": image, "logits": logits, "labels": np.asarray(exported).astype(np.uint8)}
    print(name, image.shape, np.bincount(found["labels"].ravel()))
    return found


def main() -> None:
    torch.set_num_threads(1)
    random = np.random.default_rng(5)
    found = {f"{name}.{part}": array for name in CASES for part, array in steps(name, random).items()}
    told = {name: [CASES[name][1], *documents(name)] for name in CASES}
    np.savez_compressed(Path(sys.argv[1]) / "steps.npz", told=json.dumps(told), **found)


if __name__ == "__main__":
    main()
