"""Where a model is unsure: entropies and disagreement by hand, by brute force, and on the patient's right side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from pipeline.bundle import ModelBundle, load_bundle
from pipeline.confidence import Confidence, UncertaintyMap
from pipeline.plan import InferenceConventions
from pipeline.predict import Model, PredictSettings, predict
from pipeline.tile_scores import mirror_passes
from pipeline.uncertainty import Potential, entropy
from transforms.geometry import Geometry
from transforms.labels import LabelSchema, Region, schema_from_names
from transforms.volume import Volume

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
GRID = Geometry((12, 10, 8), np.eye(4))
EVERYTHING = PredictSettings(False, uncertainty=True, keep_scores=3)
NESTED = (Region(name="whole", labels=("a", "b"), paints="b"), Region(name="core", labels=("a",), paints="a"))


class Constant(torch.nn.Module):
    """The same logits at every voxel."""

    def __init__(self, *logits: float) -> None:
        super().__init__()
        self.logits = torch.nn.Parameter(torch.tensor(logits).reshape(1, -1, 1, 1, 1), requires_grad=False)

    def forward(self, image: Tensor) -> Tensor:
        return self.logits.expand(len(image), -1, *image.shape[2:])


class Drawn(torch.nn.Module):
    """One convolution with weights as drawn."""

    def __init__(self, outputs: int, seed: int) -> None:
        super().__init__()
        self.convolution = torch.nn.Conv3d(1, outputs, 3, padding=1)
        generator = torch.Generator().manual_seed(seed)
        for values in self.convolution.parameters():
            torch.nn.init.normal_(values, generator=generator)
        self.requires_grad_(False)

    def forward(self, image: Tensor) -> Tensor:
        return self.convolution(image)


@pytest.fixture(scope="module")
def bundle(small_bundle: Path) -> ModelBundle:
    return load_bundle(small_bundle)


def model_of(
    bundle: ModelBundle, networks: Sequence[torch.nn.Module], schema: LabelSchema | None = None, **plan: Any
) -> Model:
    values = {"patch_shape": (8, 8, 8), "mirror_axes": (), **plan}
    return Model(
        tuple(
            replace(bundle, network=network, schema=schema or bundle.schema, plan=bundle.plan.model_copy(update=values))
            for network in networks
        )
    )


def image_on(grid: Geometry, seed: int = 0) -> Volume:
    voxels = np.random.default_rng(seed).normal(100, 20, grid.shape).astype(np.float32)
    return Volume(voxels, grid, None, 0.0)


def told(model: Model, volume: Volume, settings: PredictSettings = EVERYTHING) -> Confidence:
    found = predict(model, [volume], settings=settings, device=CPU).confidence
    assert found is not None
    return found


def values_of(found: UncertaintyMap | None) -> npt.NDArray[np.float64]:
    assert found is not None
    return found.values * found.step


class TestByHand:
    def test_entropy(self) -> None:
        probabilities = torch.tensor([[1.0, 0.5, 0.25, 1 / 3], [0.0, 0.5, 0.25, 1 / 3], [0.0, 0.0, 0.5, 1 / 3]])
        found = entropy(probabilities, overlap=False)
        # In bits: 0, 1, and 2 quarters of 2 bits with a half of 1; a third each is the most.
        expected = torch.tensor([0, 1, 1.5, math.log2(3)]) / math.log2(3)
        torch.testing.assert_close(found, expected)

    def test_entropy_of_regions_is_the_mean_of_each(self) -> None:
        found = entropy(torch.tensor([[1.0, 0.5, 0.5], [0.0, 0.0, 0.5]]), overlap=True)
        torch.testing.assert_close(found, torch.tensor([0, 0.5, 1.0]))

    def test_two_networks_that_are_sure_of_different_classes(self, bundle: ModelBundle) -> None:
        found = told(model_of(bundle, [Constant(0, 50, 0), Constant(0, 0, 50)]), image_on(GRID))
        # One bit of the log2(3) there are; each network by itself has none.
        for one in (found.entropy, found.disagreement):
            np.testing.assert_allclose(values_of(one), 1 / math.log2(3), atol=0.004)

    def test_two_networks_that_are_unsure_alike_do_not_disagree(self, bundle: ModelBundle) -> None:
        found = told(model_of(bundle, [Constant(1, 1, 1)] * 2), image_on(GRID))
        np.testing.assert_allclose(values_of(found.entropy), 1, atol=0.001)
        assert values_of(found.disagreement).max() < 1e-6

    def test_one_network_has_nothing_to_disagree_with(self, bundle: ModelBundle) -> None:
        found = told(model_of(bundle, [Constant(1, 1, 1)]), image_on(GRID))
        assert found.entropy is not None
        assert found.disagreement is None

    def test_its_mirrored_pass_is_another_answer(self, bundle: ModelBundle) -> None:
        """A network that is sure of class 1 in the first half of what it sees, and of class 2 in the other."""

        class ByPlace(Constant):
            def forward(self, image: Tensor) -> Tensor:
                side = torch.linspace(-1, 1, image.shape[3]).sign().reshape(1, 1, 1, -1, 1).expand_as(image)
                return torch.cat([torch.zeros_like(side), 50 * side, -50 * side], dim=1)

        model = model_of(bundle, [ByPlace(0)], mirror_axes=(1,), patch_shape=(12, 10, 8))
        found = told(model, image_on(GRID), replace(EVERYTHING, mirror=True))
        np.testing.assert_allclose(values_of(found.disagreement), 1 / math.log2(3), atol=0.004)

    def test_regions(self, bundle: ModelBundle) -> None:
        schema = LabelSchema(labels=schema_from_names({1: "a", 2: "b"}).labels, regions=NESTED)
        found = told(model_of(bundle, [Constant(50, 50), Constant(50, -50)], schema), image_on(GRID))
        # They agree on the first region and are of opposite minds on the other.
        for one in (found.entropy, found.disagreement):
            np.testing.assert_allclose(values_of(one), 0.5, atol=0.002)

    @pytest.mark.parametrize("overlap", [False, True])
    def test_logits_that_are_averaged(self, overlap: bool) -> None:
        """The gap is the mean divergence from what was made of the mean: worked out from the distributions."""
        answers = torch.tensor([[3.0, 0.0, -1.0], [0.0, 1.0, 0.5]]).double()
        mean = answers.mean(dim=0)
        figure = Potential(overlap, logits=True)
        found = figure.disagreement(torch.stack([figure(a) for a in answers]).mean(dim=0), mean)
        if overlap:
            p, q = mean.sigmoid(), answers.sigmoid()
            divergence = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean(dim=1) / math.log(2)
        else:
            p, q = mean.softmax(dim=0), answers.softmax(dim=1)
            divergence = (p * (p / q).log()).sum(dim=1) / math.log(3)
        torch.testing.assert_close(found, divergence.mean())
        assert float(found) > 0.1


def by_hand(model: Model, image: Tensor, mirror: bool) -> tuple[Tensor, Tensor]:
    """Entropy and disagreement of a whole image (1, I, J, K) in one window, in double precision."""
    answers = []
    for bundle in model.bundles:
        for axes in mirror_passes(bundle.plan.mirror_axes if mirror else ()):
            flipped = [a + 2 for a in axes]
            answers.append(bundle.network(image[None].flip(flipped)).flip(flipped)[0].double().softmax(dim=0))
    each = torch.stack(answers)

    def bits(probabilities: Tensor, axis: int) -> Tensor:
        return -(probabilities * probabilities.log()).sum(dim=axis) / math.log(each.shape[1])

    mean = bits(each.mean(dim=0), 0)
    return mean, mean - bits(each, 1).mean(dim=0)


@pytest.mark.parametrize("mirror", [False, True])
def test_brute_force_on_the_whole_volume(bundle: ModelBundle, mirror: bool) -> None:
    """The grid is the network's own, and one window takes all of it, so nothing is blended or interpolated."""
    networks = [Drawn(3, seed) for seed in range(3)]
    model = model_of(bundle, networks, patch_shape=GRID.shape, mirror_axes=(1, 2))
    volume = image_on(GRID)
    image = torch.from_numpy((volume.voxels - volume.voxels.mean()) / volume.voxels.std())[None]
    found = told(model, volume, replace(EVERYTHING, mirror=mirror))
    for one, expected in zip((found.entropy, found.disagreement), by_hand(model, image, mirror), strict=True):
        assert one is not None
        # Half a step of 8 bits, and half precision.
        np.testing.assert_allclose(values_of(one), expected.numpy(), atol=one.step / 2 + 5e-4)
        assert np.ptp(values_of(one)) > 0.1


@pytest.mark.parametrize("blend", ["probabilities", "logits"])
@pytest.mark.parametrize("outputs", [3, 40])
@pytest.mark.parametrize("mirror", [False, True])
def test_labels_are_the_same_bits_whatever_is_asked(
    bundle: ModelBundle, blend: Any, outputs: int, mirror: bool
) -> None:
    """Over overlapping windows, another spacing, float32 and 16-bit sums."""
    schema = schema_from_names({n: f"label {n}" for n in range(1, outputs)})
    plan = {"mirror_axes": (0, 2), "spacing_mm": (1.5, 1.0, 0.8), "inference": InferenceConventions(blend=blend)}
    model = model_of(bundle, [Drawn(outputs, seed) for seed in range(2)], schema, **plan)
    volume = image_on(Geometry((17, 15, 14), np.eye(4)))
    plain = predict(model, [volume], settings=PredictSettings(mirror), device=CPU)
    assert plain.confidence is None
    for asked in (
        PredictSettings(mirror, uncertainty=True),
        PredictSettings(mirror, estimate=True),
        PredictSettings(mirror, keep_scores=2),
        PredictSettings(mirror, uncertainty=True, keep_scores=99),
    ):
        found = predict(model, [volume], settings=asked, device=CPU)
        assert np.array_equal(found.label_map, plain.label_map)
        assert found.confidence is not None
        assert (found.confidence.disagreement is not None) == asked.uncertainty
        assert (found.confidence.estimate is not None) == (asked.uncertainty or asked.estimate)


class BrightIsDoubtful(Constant):
    """One of two classes where the image is bright, and sure of one elsewhere."""

    def forward(self, image: Tensor) -> Tensor:
        sure = 9 * (image <= 2).float()
        return torch.cat([sure, -sure, torch.full_like(image, -99)], dim=1)


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PIR", "SAL", "ILA", "ARI"])
def test_doubt_lies_where_the_voxels_are_however_they_are_stored(bundle: ModelBundle, codes: str) -> None:
    voxels = np.zeros((14, 11, 9), dtype=np.float32)
    voxels[9:12, 2:4, 6:8] = 1000
    straight = nib.Nifti1Image(voxels, np.diag([1.0, 2.0, 3.0, 1.0]))  # type: ignore[attr-defined]
    turn = nib.orientations.ornt_transform(
        nib.orientations.io_orientation(straight.affine), nib.orientations.axcodes2ornt(codes)
    )
    turned = straight.as_reoriented(turn)
    stored = np.asarray(turned.dataobj)
    model = model_of(bundle, [BrightIsDoubtful(0)], patch_shape=(24, 24, 32))
    doubt = values_of(told(model, Volume(stored, Geometry(stored.shape, turned.affine), None, 0.0)).entropy)
    # In the box it is one of two; the network's grid, of 1 mm, smooths it by less than a voxel of the study.
    assert doubt[stored > 0].min() > 0.4
    assert doubt[stored == 0].max() < 0.35
