"""Predictions of regions: networks whose answer is known, from tiles to the label map on the source's grid."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.bundle import ModelBundle, load_bundle
from pipeline.errors import BundleError
from pipeline.predict import Model, PredictSettings, predict
from pipeline.windows import WindowSettings, predict_windows
from transforms.labels import LabelSchema, Region, schema_from_names
from transforms.volume import Volume, read_volume

pytestmark = pytest.mark.usefixtures("one_thread")

LABELS = schema_from_names({1: "necrosis", 2: "oedema", 4: "enhancing"}).labels
REGIONS = (
    Region(name="whole", labels=("necrosis", "oedema", "enhancing"), paints="oedema"),
    Region(name="core", labels=("necrosis", "enhancing"), paints="necrosis"),
)
CPU = torch.device("cpu")


class Thresholds(nn.Module):
    """Region r is where the image is above the r-th threshold, surely."""

    def __init__(self, *thresholds: float) -> None:
        super().__init__()
        self.thresholds = nn.Parameter(torch.tensor(thresholds).reshape(1, -1, 1, 1, 1))

    def forward(self, image: Tensor) -> Tensor:
        return 50 * (image[:, :1] - self.thresholds)


class Constant(nn.Module):
    def __init__(self, *probabilities: float) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(probabilities).logit().reshape(1, -1, 1, 1, 1))

    def forward(self, image: Tensor) -> Tensor:
        return self.logits.expand(1, -1, *image.shape[2:])


@pytest.fixture
def bundle(small_bundle: Path) -> ModelBundle:
    return replace(load_bundle(small_bundle), schema=LabelSchema(labels=LABELS, regions=REGIONS))


@pytest.fixture
def volume(data_dir: Path) -> Volume:
    return read_volume(data_dir / "hippocampus" / "images" / "hippocampus_001.nii.gz")


def labels_of(volume: Volume, *bundles: ModelBundle) -> set[int]:
    found = predict(Model(bundles), [volume], settings=PredictSettings(False), device=CPU)
    assert found.label_map.shape == volume.geometry.shape
    return {0, *found.present()}


def settings(patch: tuple[int, int, int], **values: Any) -> WindowSettings:
    return WindowSettings(patch, (4, 4, 4), 0.5, **values)


class TestWindows:
    def test_each_output_is_a_yes_or_no_of_its_own(self) -> None:
        """Over one tile and over many: 0.9 and 0.8 together are no softmax."""
        image = torch.randn(1, 20, 9, 30, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            found = predict_windows(
                Constant(0.9, 0.8, 0.1),
                image,
                settings((8, 8, 8), mirror_axes=(), twin_outputs=(0, 1, 2), overlap=True),
            )
        np.testing.assert_allclose(found.mean(dim=(1, 2, 3)), [0.9, 0.8, 0.1], atol=1e-5)
        assert float(found.std(dim=(1, 2, 3)).max()) < 1e-5

    @pytest.mark.parametrize(("twins", "agrees"), [((1, 0), True), ((0, 1), False)])
    def test_left_and_right_regions_are_exchanged(self, twins: tuple[int, int], agrees: bool) -> None:
        def by_side(image: Tensor) -> Tensor:
            low = torch.full_like(image, -9.0)
            low[:, :, : image.shape[2] // 2] = 9.0
            return torch.cat([low, -low], dim=1)

        image = torch.randn(1, 8, 8, 8, generator=torch.Generator().manual_seed(0))
        window = settings((8, 8, 8), mirror_axes=(0,), twin_outputs=twins, overlap=True)
        found = predict_windows(by_side, image, window)
        assert bool((found[0, :4] > 0.99).all()) == agrees
        assert bool((found[1, 4:] > 0.99).all()) == agrees


class TestPredict:
    def test_regions_are_painted_in_order_on_the_source(self, bundle: ModelBundle, volume: Volume) -> None:
        """The z-score of the volume itself says where it is above the mean and above one deviation more."""
        network = Thresholds(0.0, 1.0)
        found = predict(
            Model((replace(bundle, network=network),)), [volume], settings=PredictSettings(False), device=CPU
        )
        score = (volume.voxels - volume.voxels.mean()) / volume.voxels.std()
        expected = np.select([score > 1.0, score > 0.0], [1, 2], 0)
        assert (found.label_map == expected).mean() > 0.999
        assert found.schema.regions == REGIONS

    def test_the_order_decides(self, bundle: ModelBundle, volume: Volume) -> None:
        turned = replace(bundle, schema=LabelSchema(labels=LABELS, regions=REGIONS[::-1]))
        network = Constant(0.9, 0.9)
        assert labels_of(volume, replace(bundle, network=network)) == {0, 1}
        assert labels_of(volume, replace(turned, network=network)) == {0, 2}

    def test_a_half_is_not_enough_and_folds_are_averaged(self, bundle: ModelBundle, volume: Volume) -> None:
        first, second = (replace(bundle, network=Constant(*p)) for p in ((0.9, 0.2), (0.2, 0.7)))
        assert labels_of(volume, first) == {0, 2}
        assert labels_of(volume, second) == {0, 1}
        assert labels_of(volume, first, second) == {0, 2}
        assert labels_of(volume, second, second, first) == {0, 1}

    def test_models_of_other_regions_are_refused(self, bundle: ModelBundle) -> None:
        without = replace(bundle, schema=LabelSchema(labels=LABELS))
        with pytest.raises(BundleError, match="different labels"):
            Model((bundle, without))

    def test_the_spacing_may_be_another(self, bundle: ModelBundle, data_dir: Path, tmp_path: Path) -> None:
        """A case read as if its voxels were 1.7 mm long comes back on its own grid."""
        path = data_dir / "hippocampus" / "images" / "hippocampus_001.nii.gz"
        image: Any = nib.load(path)
        nib.save(nib.Nifti1Image(np.asarray(image.dataobj), image.affine @ np.diag([1.7, 1, 1, 1])), tmp_path / "a.nii")
        volume = read_volume(tmp_path / "a.nii")
        found = predict(
            Model((replace(bundle, network=Thresholds(0.0, 1.0)),)),
            [volume],
            settings=PredictSettings(False),
            device=CPU,
        )
        assert found.geometry.shape == volume.geometry.shape
        score = (volume.voxels - volume.voxels.mean()) / volume.voxels.std()
        expected = np.select([score > 1.0, score > 0.0], [1, 2], 0)
        assert (found.label_map == expected).mean() > 0.9
