"""Makes `study_0000.nii.gz`, `study_0001.nii.gz`, three models for that study, and nnU-Net's own label maps of it by
each, with mirroring and without; nnU-Net adds its logits up in half precision, so the same once more with that made
single. Run it where nnunetv2 is installed (2.8.1 then):
nnUNet_compile=f python tests/data/nnunet/make_labels.py FOLDER.

The study is made of noise: thick slices on an oblique grid, 0 all around what is seen, and a hole of 0 in it. The
models are those of make.py with other plans, and biases of their outputs that give every class its share.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import make
import nibabel
import numpy as np
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from scipy.ndimage import gaussian_filter

Z = "ZScoreNormalization"
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "study_3d": ("plain_3d", {"normalization_schemes": [Z, Z], "use_mask_for_norm": [True, True]}, {}),
    "study_2d": ("plain_2d", {"spacing": [1.1, 3.0]}, {}),
    "study_regions": (
        "resenc_3d",
        {"spacing": [1.2, 3.0, 1.0]},
        {
            "labels": {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "active": 3},
            "regions_class_order": [1, 2, 3],
        },
    ),
}
"""The model of make.py, what is other in its configuration, and in its dataset.json."""

SHAPE = (30, 34, 13)
SPACING = (0.9, 0.8, 4.5)


def affine() -> np.ndarray:
    """Columns towards L, P and S, turned by 10 degrees about the first."""
    turn = np.deg2rad(10)
    axes = np.diag([-1.0, -1.0, 1.0])
    turned = np.array([[1, 0, 0], [0, np.cos(turn), -np.sin(turn)], [0, np.sin(turn), np.cos(turn)]]) @ axes
    full = np.eye(4)
    full[:3, :3] = turned * SPACING
    full[:3, 3] = (20.0, -35.0, 410.0)
    return full


def write_study(folder: Path) -> None:
    random = np.random.default_rng(7)
    seen = np.zeros(SHAPE, bool)
    seen[3:28, 2:30, 1:12] = True
    seen[12:14, 15:18, 5:7] = False
    for channel, (mean, deviation) in enumerate(((60, 900), (300, 1200))):
        noise = gaussian_filter(random.normal(0, 1, SHAPE), (2, 2, 0.7)) * deviation + mean
        voxels = np.where(seen, noise.round(), 0).astype(np.int16)
        image = nibabel.Nifti1Image(voxels, affine())
        image.set_qform(affine(), 1)
        nibabel.save(image, folder / f"study_{channel:04d}.nii.gz")


def write_model(folder: Path, name: str) -> None:
    """As make.py makes it, with what is other; then the biases, from nnU-Net's own logits of the study."""
    base, other, dataset = MODELS[name]
    configuration = make.CASES[base][0]
    plans = make.plans_of(base)
    plans["configurations"][configuration] |= other
    network = make.network_of(plans, configuration)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for weight in network.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.5)
    model = folder / name
    (model / "fold_0").mkdir(parents=True, exist_ok=True)
    (model / "plans.json").write_text(json.dumps(plans, indent=1) + "\n")
    (model / "dataset.json").write_text(json.dumps(make.DATASET | dataset, indent=1) + "\n")
    weights = network.state_dict()
    save(model, weights, configuration)
    biases = [key for key in weights if key.startswith("decoder.seg_layers.") and key.endswith("bias")]
    weights[biases[-1]] -= mean_logits(folder, model)
    save(model, weights, configuration)


def save(model: Path, weights: dict[str, torch.Tensor], configuration: str) -> None:
    sides = len(json.loads((model / "plans.json").read_text())["configurations"][configuration]["patch_size"])
    checkpoint = {
        "network_weights": weights,
        "init_args": {"configuration": configuration, "fold": 0},
        "trainer_name": "nnUNetTrainer",
        "inference_allowed_mirroring_axes": tuple(range(sides)),
    }
    torch.save(checkpoint, model / "fold_0" / "checkpoint_final.pth")


def mean_logits(folder: Path, model: Path) -> torch.Tensor:
    predictor = predictor_of(model, mirror=False)
    preprocessor = predictor.configuration_manager.preprocessor_class(verbose=False)
    data, _, _ = preprocessor.run_case(
        channels_of(folder), None, predictor.plans_manager, predictor.configuration_manager, predictor.dataset_json
    )
    return predictor.predict_logits_from_preprocessed_data(torch.from_numpy(data)).float().mean(dim=(1, 2, 3))


def channels_of(folder: Path) -> list[str]:
    return [str(folder / f"study_{channel:04d}.nii.gz") for channel in range(2)]


def predictor_of(model: Path, *, mirror: bool) -> nnUNetPredictor:
    predictor = nnUNetPredictor(use_mirroring=mirror, device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model), (0,))
    return predictor


@contextmanager
def single_precision() -> Iterator[None]:
    """nnU-Net looks `torch.half` up when it makes the arrays that it adds logits up in."""
    half, torch.half = torch.half, torch.float32
    try:
        yield
    finally:
        torch.half = half


def write_labels(folder: Path, model: str, *, mirror: bool, suffix: str) -> None:
    predictor = predictor_of(folder / model, mirror=mirror)
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "labels"
        predictor.predict_from_files_sequential([channels_of(folder)], [str(out)], False, True)
        found = nibabel.load(f"{out}.nii.gz")
        labels = np.asanyarray(found.dataobj).astype(np.uint8)
        name = f"labels_{'mirrored' if mirror else 'plain'}{suffix}.nii.gz"
        nibabel.save(nibabel.Nifti1Image(labels, found.affine), folder / model / name)
        print(model, name, np.bincount(labels.ravel()))


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    write_study(folder)
    for model in MODELS:
        write_model(folder, model)
        for mirror in (True, False):
            write_labels(folder, model, mirror=mirror, suffix="")
            with single_precision():
                write_labels(folder, model, mirror=mirror, suffix="_single")


if __name__ == "__main__":
    main()
