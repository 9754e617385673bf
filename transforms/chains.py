"""The Compose of each stage. Preprocessing is one chain, the same for training and prediction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from monai.transforms import Compose, Randomizable
from torch import Tensor

from transforms.annotation import Annotation
from transforms.augment import IntensitySettings, RandIntensityd, RandPatchd, SpatialSettings
from transforms.intensity_spec import Normalisation
from transforms.load import LoadVolumed
from transforms.steps import EncodeLabelsd, InsertMissingd, NormaliseIntensityd, OrientAndRespaced, RandDropChannelsd


def preprocess_chain(
    *,
    axis_codes: str,
    spacing_mm: Sequence[float],
    normalisations: Sequence[Normalisation],
    annotation: Annotation | None,
    present: Sequence[bool] | None = None,
) -> Compose:
    """Files under `image` (a list, one a channel that is `present`) and, with an annotation, `label`, to the plan's
    grid and range.

    Gives MetaTensors (C, I, J, K) float32 and (1, I, J, K) classes.
    """
    labels = [] if annotation is None else ["label"]
    steps: list[Any] = [LoadVolumed(["image", *labels], label_keys=labels)]
    if annotation is not None:
        steps.append(EncodeLabelsd("label", annotation))
    placing = placing_steps(["image", *labels], labels, axis_codes, spacing_mm, normalisations, present)
    return Compose([*steps, *placing])


def placing_steps(
    keys: Sequence[str],
    class_keys: Sequence[str],
    axis_codes: str,
    spacing_mm: Sequence[float],
    normalisations: Sequence[Normalisation],
    present: Sequence[bool] | None = None,
) -> list[Any]:
    """What follows loading: normalise, reorient, respace, and put zeros where a channel is missing.

    `normalisations` are of all channels, `image` holds those that are `present` (by default all). Respacing comes
    after normalising: a spline rings, and after it hardly a voxel of a masked background would be exactly 0.
    """
    there = [True] * len(normalisations) if present is None else list(present)
    steps = [
        NormaliseIntensityd("image", [how for how, is_there in zip(normalisations, there, strict=True) if is_there]),
        OrientAndRespaced(keys, class_keys=class_keys, axis_codes=axis_codes, spacing_mm=spacing_mm),
    ]
    return steps if all(there) else [*steps, InsertMissingd("image", there)]


def training_chain(
    patch_shape: Sequence[int],
    spacing_mm: Sequence[float],
    *,
    spatial: SpatialSettings,
    intensity: IntensitySettings,
    twin_classes: Sequence[int],
    foreground_share: float,
    dropout: RandDropChannelsd | None = None,
) -> Compose:
    """A preprocessed volume to one augmented patch; seed it with `reseed` before each call."""
    cut = RandPatchd(
        patch_shape, spacing_mm, settings=spatial, twin_classes=twin_classes, foreground_share=foreground_share
    )
    return Compose([cut, RandIntensityd(intensity), *([] if dropout is None else [dropout])])


def reseed(chain: Compose, seed: int | Sequence[int]) -> None:
    """Let all steps of a chain draw from one new generator: ten times faster than MONAI's generator for each step."""
    random = np.random.RandomState(np.random.PCG64(seed))
    for step in chain.transforms:
        if isinstance(step, Randomizable):
            step.set_random_state(state=random)


def plain(tensor: Tensor) -> Tensor:
    """A MetaTensor's voxels without its metadata; any other tensor as it is."""
    return tensor.as_tensor() if hasattr(tensor, "as_tensor") else tensor
