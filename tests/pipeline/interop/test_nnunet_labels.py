"""From nnU-Net's folder and a study's files to its labels: against its own predictor (make_labels.py).

It adds logits up in half precision, which decides between classes that are all but equal: noise has many of those. The
labels that it finds with that made single are the ones to be found again; its own are then the same but for rounding.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.bundle import load_bundle
from pipeline.interop.nnunet_import import import_nnunet
from pipeline.predict import Model, PredictSettings, predict
from transforms.geometry import Geometry
from transforms.volume import read_label, read_volume

FOLDER = Path(__file__).parents[2] / "data" / "nnunet"
MODELS = ("study_3d", "study_2d", "study_regions")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    out = tmp_path_factory.mktemp("imported")
    return {name: Model((load_bundle(import_nnunet(FOLDER / name, out / name)[0]),)) for name in MODELS}


@pytest.mark.parametrize("mirror", [True, False])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.usefixtures("one_thread")
def test_labels_are_nnunets_own(models: dict[str, Model], name: str, mirror: bool) -> None:
    channels = [read_volume(FOLDER / f"study_{channel:04d}.nii.gz") for channel in range(2)]
    found = predict(models[name], channels, settings=PredictSettings(mirror=mirror), device=torch.device("cpu"))
    own, single = (
        read_label(FOLDER / name / f"labels_{'mirrored' if mirror else 'plain'}{precision}.nii.gz").voxels
        for precision in ("", "_single")
    )
    assert len(np.unique(own)) == found.schema.class_count
    assert np.count_nonzero(found.label_map != single) <= 1e-4 * single.size
    assert np.count_nonzero(found.label_map != own) <= np.count_nonzero(single != own) + 1e-4 * single.size


@pytest.mark.usefixtures("one_thread")
def test_slices_that_lean_are_seen_as_if_they_did_not(models: dict[str, Model]) -> None:
    """nnU-Net's readers that reorient permute and flip voxels and never shift a slice, so the tilt changes nothing."""
    bundle = models["study_3d"].bundles[0]
    assert bundle.plan.placing is not None
    placing = bundle.plan.placing.model_copy(update={"reorients": True})
    model = Model((replace(bundle, plan=bundle.plan.model_copy(update={"placing": placing})),))
    channels = [read_volume(FOLDER / f"study_{channel:04d}.nii.gz") for channel in range(2)]
    upright = channels[0].geometry
    affine = upright.affine_ras.copy()
    lean = np.deg2rad(15.0)
    affine[:3, 2] = np.cos(lean) * affine[:3, 2] + np.sin(lean) * upright.direction_ras[:, 1] * upright.spacing_mm[2]
    leaning = Geometry(upright.shape, affine)
    assert leaning.is_sheared
    found = [
        predict(
            model,
            [replace(channel, geometry=geometry) for channel in channels],
            settings=PredictSettings(mirror=False),
            device=torch.device("cpu"),
        ).label_map
        for geometry in (upright, leaning)
    ]
    assert len(np.unique(found[0])) == model.schema.class_count
    np.testing.assert_array_equal(found[1], found[0])
