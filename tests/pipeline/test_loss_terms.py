"""Every term of a loss against MONAI, numpy and brute force; with regions, ignored voxels and partial labels."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from monai.losses.boundary_loss import BoundaryLoss
from monai.losses.cldice import SoftclDiceLoss
from monai.losses.dice import DiceLoss, GeneralizedDiceLoss
from monai.losses.focal_loss import FocalLoss
from monai.losses.hausdorff_loss import LogHausdorffDTLoss
from monai.losses.tversky import TverskyLoss
from scipy import ndimage
from torch import Tensor
from torch.nn import functional

from pipeline.config import LossConfig, LossTerms
from pipeline.loss_comparison import _sum_by_index, _sum_by_mask
from pipeline.loss_terms import TERMS
from pipeline.losses import Loss, Targets, build_loss, deep_supervision_loss

CLASSES, SHAPE = 4, (6, 7, 8)
REGIONS = ((1, 2), (2,), (3,))
OVERLAPS = ("dice", "generalised_dice", "tversky", "focal_tversky")

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass(frozen=True)
class Scene:
    """Random logits for a few patches with boxes in them."""

    logits: Tensor
    classes: Tensor
    annotated: Tensor | None
    targets: Targets

    def loss(self, name: str, **settings: Any) -> Loss:
        return loss_of(name, self.targets, **settings)

    def rows(self, start: int, stop: int) -> Scene:
        part = slice(start, stop)
        annotated = None if self.annotated is None else self.annotated[part]
        return replace(self, logits=self.logits[part], classes=self.classes[part], annotated=annotated)

    def perfect(self, confidence: float = 60.0) -> Tensor:
        """Logits sure of the truth."""
        known = torch.where(self.classes < CLASSES, self.classes, 0)
        if self.targets.regions:
            inside = torch.cat([torch.isin(known, torch.tensor(r)) for r in self.targets.regions], dim=1)
            return (2.0 * inside - 1) * confidence
        return functional.one_hot(known[:, 0], CLASSES).movedim(-1, 1) * confidence


def loss_of(name: str, targets: Targets, **settings: Any) -> Loss:
    return build_loss(LossConfig(terms=LossTerms(**{name: 1.0}), **settings), targets)


def scene(kind: str) -> Scene:
    """`kind` holds any of the words ignored, partial, regions. Patch 0 has all classes, 1 a single voxel, 2 none."""
    generator = torch.Generator().manual_seed(len(kind))
    classes = torch.zeros(4, 1, *SHAPE, dtype=torch.long)
    classes[0, 0, :3, :4, :5], classes[0, 0, 3:, 4:, 5:], classes[0, 0, 3:, :3, 2:7] = 1, 2, 3
    classes[1, 0, 2, 2, 3] = 1
    classes[3, 0, 1:5, 2:6, 1:3], classes[3, 0, 1:5, 2:6, 5:6] = 3, 2
    annotated = None
    if "partial" in kind:
        annotated = torch.ones(4, CLASSES, dtype=torch.bool)
        annotated[0, 2], annotated[1, 1:], annotated[3, (1, 3)] = False, False, False
        flat = classes.flatten(1)
        classes = torch.where(annotated.gather(1, flat), flat, 0).view_as(classes)
    if "ignored" in kind:
        classes[0, 0, :, :2], classes[3, 0, 4:] = CLASSES, CLASSES
        classes[1, 0, 0] = CLASSES
    regions = REGIONS if "regions" in kind else ()
    logits = torch.randn(4, len(regions) or CLASSES, *SHAPE, generator=generator, dtype=torch.float64)
    return Scene(logits, classes, annotated, Targets(CLASSES, regions, CLASSES if "ignored" in kind else None))


KINDS = ("plain", "ignored", "partial", "ignored partial", "regions", "regions ignored partial")
every_term = pytest.mark.parametrize("name", TERMS)
few_kinds = pytest.mark.parametrize("kind", ["plain", "ignored partial", "regions ignored partial"])
every_kind = pytest.mark.parametrize("kind", KINDS)


def gradient(total: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    leaf = logits.clone().requires_grad_()
    total(leaf).backward()
    assert leaf.grad is not None
    return leaf.grad


class TestEveryTerm:
    @every_term
    @every_kind
    def test_two_halves_of_a_batch_give_the_gradient_of_the_whole(self, name: str, kind: str) -> None:
        whole = scene(kind)
        loss = whole.loss(name)
        expected = gradient(lambda x: loss(x, whole.classes, whole.annotated)[0], whole.logits)
        parts = []
        for start in (0, 2):
            half = whole.rows(start, start + 2)
            parts.append(gradient(lambda x, half=half: loss(x, half.classes, half.annotated)[0] / 2, half.logits))
        assert expected.abs().max() > 1e-6
        torch.testing.assert_close(torch.cat(parts), expected, rtol=1e-6, atol=1e-9)

    @every_term
    @every_kind
    def test_a_perfect_prediction_costs_nothing(self, name: str, kind: str) -> None:
        given = scene(kind)
        value, _ = given.loss(name)(given.perfect().float(), given.classes, given.annotated)
        assert value.item() == pytest.approx(0, abs=1e-6)

    @every_term
    @few_kinds
    def test_following_the_gradient_leads_there(self, name: str, kind: str) -> None:
        """From a patch with all classes: a soft overlap with none says too little to be led by.

        Centreline Dice is led by skeletons alone, and slowly.
        """
        given = scene(kind).rows(0, 1)
        loss = given.loss(name)
        logits = (0.1 * given.logits).float().requires_grad_()
        optimiser = torch.optim.Adam([logits], lr=0.5)
        values = []
        for _ in range(25):
            optimiser.zero_grad()
            total, _ = loss(logits, given.classes, given.annotated)
            total.backward()
            optimiser.step()
            values.append(total.item())
        assert values[-1] < (0.5 if name == "cldice" else 0.25) * values[0]

    @every_term
    @few_kinds
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_is_summed_in_float32_and_stays_finite(
        self, name: str, kind: str, dtype: torch.dtype
    ) -> None:
        given = scene(kind).rows(0, 3)
        loss = given.loss(name)
        for logits in (given.logits.to(dtype), given.perfect(6e4).to(dtype), -given.perfect(6e4).to(dtype)):
            leaf = logits.clone().requires_grad_()
            with torch.autocast("cpu", dtype):
                total, _ = loss(leaf, given.classes, given.annotated)
            total.backward()
            assert leaf.grad is not None
            assert total.isfinite()
            assert leaf.grad.isfinite().all()
            assert torch.equal(total, loss(logits.float(), given.classes, given.annotated)[0])

    @every_term
    @pytest.mark.parametrize("kind", [kind for kind in KINDS if "ignored" in kind])
    def test_ignored_voxels_change_nothing_and_get_no_gradient(self, name: str, kind: str) -> None:
        given = scene(kind)
        ignored = (given.classes == CLASSES).expand_as(given.logits)
        loss = given.loss(name)
        slope = gradient(lambda x: loss(x, given.classes, given.annotated)[0], given.logits)
        assert not slope[ignored].any()
        assert slope[~ignored].any()
        other = torch.where(ignored, 7 * given.logits.flip(1), given.logits)
        before, after = (loss(x, given.classes, given.annotated)[0] for x in (given.logits, other))
        torch.testing.assert_close(after, before)

    @every_term
    @pytest.mark.parametrize("kind", ["ignored", "regions ignored partial"])
    def test_a_patch_of_which_nothing_counts_is_a_patch_that_costs_nothing(self, name: str, kind: str) -> None:
        given = scene(kind).rows(0, 2)
        given.classes[1] = CLASSES
        alone, both = given.rows(0, 1), given.loss(name)(given.logits, given.classes, given.annotated)[0]
        expected, _ = given.loss(name)(alone.logits, alone.classes, alone.annotated)
        assert both.item() == pytest.approx(expected.item() / 2)
        assert not gradient(lambda x: given.loss(name)(x, given.classes, given.annotated)[0], given.logits)[1].any()

    @every_term
    @every_kind
    def test_deep_supervision_reaches_every_output(self, name: str, kind: str) -> None:
        given = scene(kind)
        coarse = given.logits[..., ::2, ::2, ::2].float().contiguous().requires_grad_()
        outputs = (given.logits.float().requires_grad_(), coarse)
        total, terms = deep_supervision_loss(given.loss(name), outputs, given.classes, given.annotated)
        total.backward()
        assert terms[name].item() == pytest.approx(total.item())
        assert all(x.grad is not None and x.grad.isfinite().all() and x.grad.any() for x in outputs)

    @every_term
    def test_planes_are_volumes_of_one_slice(self, name: str) -> None:
        given = scene("ignored")
        flat, classes = given.logits[..., 3], given.classes[..., 3]
        loss = given.loss(name)
        assert loss(flat, classes)[0].item() == pytest.approx(loss(flat[..., None], classes[..., None])[0].item())


class TestPartialLabels:
    """Against the loss of fewer classes, of the logarithms of merged probabilities."""

    @every_term
    @pytest.mark.parametrize("include_background", [False, True])
    def test_classes_not_annotated_are_background(self, name: str, include_background: bool) -> None:
        given = scene("partial").rows(0, 1)
        assert given.annotated is not None
        assert given.annotated.tolist() == [[True, True, False, True]]
        settings = {"include_background": include_background}

        def merged(logits: Tensor) -> Tensor:
            p = logits.softmax(1)
            fewer = torch.stack([p[:, 0] + p[:, 2], p[:, 1], p[:, 3]], dim=1).log()
            renamed = torch.where(given.classes == 3, 2, given.classes)
            return loss_of(name, Targets(3), **settings)(fewer, renamed)[0]

        def found(logits: Tensor) -> Tensor:
            return given.loss(name, **settings)(logits, given.classes, given.annotated)[0]

        torch.testing.assert_close(found(given.logits), merged(given.logits))
        torch.testing.assert_close(gradient(found, given.logits), gradient(merged, given.logits))

    @every_term
    def test_the_only_gradient_of_such_a_class_is_its_share_of_the_backgrounds(self, name: str) -> None:
        given = scene("partial")
        slope = gradient(lambda x: given.loss(name)(x, given.classes, given.annotated)[0], given.logits)
        share = slope / given.logits.softmax(1)
        assert given.annotated is not None
        for patch, channel in (~given.annotated).nonzero().tolist():
            torch.testing.assert_close(share[patch, channel], share[patch, 0])
        assert not torch.allclose(share[0, 1], share[0, 0])

    @every_term
    def test_labels_of_a_class_that_was_not_annotated_are_background(self, name: str) -> None:
        given = scene("partial")
        assert given.annotated is not None
        claimed = given.classes.clone()
        claimed[0, 0, 5, 6] = 2
        assert given.classes[0, 0, 5, 6].eq(0).all()
        loss = given.loss(name)
        expected, _ = loss(given.logits, given.classes, given.annotated)
        assert torch.equal(loss(given.logits, claimed, given.annotated)[0], expected)

    @pytest.mark.parametrize("name", [*OVERLAPS, "boundary", "hausdorff", "cldice"])
    def test_nothing_but_the_background_annotated_costs_overlaps_nothing(self, name: str) -> None:
        given = scene("partial").rows(1, 2)
        assert given.annotated is not None
        assert given.annotated.tolist() == [[True, False, False, False]]
        assert given.loss(name)(given.logits, given.classes, given.annotated)[0].item() == 0

    @every_term
    def test_all_annotated_is_what_none_says(self, name: str) -> None:
        given = scene("plain")
        everything = torch.ones(4, CLASSES, dtype=torch.bool)
        loss = given.loss(name)
        expected, _ = loss(given.logits, given.classes)
        assert torch.equal(loss(given.logits, given.classes, everything)[0], expected)

    @every_term
    def test_a_region_counts_only_where_all_its_labels_were_annotated(self, name: str) -> None:
        given = scene("regions ignored partial").rows(0, 1)
        assert given.annotated is not None
        assert given.annotated.tolist() == [[True, True, False, True]]
        value, _ = given.loss(name)(given.logits, given.classes, given.annotated)
        alone = loss_of(name, replace(given.targets, regions=REGIONS[2:]))
        torch.testing.assert_close(value, alone(given.logits[:, 2:], given.classes)[0])
        slope = gradient(lambda x: given.loss(name)(x, given.classes, given.annotated)[0], given.logits)
        assert not slope[:, :2].any()

    @pytest.mark.parametrize("kind", ["partial", "regions ignored partial"])
    def test_batch_dice_sums_a_class_over_the_cases_that_have_it(self, kind: str) -> None:
        given = scene(kind)
        assert given.annotated is not None
        found, _ = given.loss("dice", batch_dice=True)(given.logits, given.classes, given.annotated)
        expected = []
        groups = given.targets.regions or ((1,), (2,), (3,))
        for channel, group in enumerate(groups, start=0 if given.targets.regions else 1):
            has = given.annotated[:, list(group)].all(1)
            p = given.logits.sigmoid() if given.targets.regions else given.logits.softmax(1)
            p, truth = p[has, channel], torch.isin(given.classes[has, 0], torch.tensor(group))
            p = p * (given.classes[has, 0] != CLASSES)
            expected.append(1 - 2 * (p * truth).sum() / (p.sum() + truth.sum()))
        assert found.item() == pytest.approx(torch.stack(expected).mean().item(), abs=1e-5)


def volumes(activation: str) -> tuple[Scene, Tensor]:
    """A scene without partial labels or ignored voxels, and its truth as one channel each."""
    given = scene("regions" if activation == "sigmoid" else "plain")
    return replace(given, logits=given.logits.float()), (given.perfect() > 0).float()


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
class TestMonai:
    @pytest.mark.parametrize("batch", [False, True])
    @pytest.mark.parametrize("background", [False, True])
    def test_overlaps(self, activation: str, batch: bool, background: bool) -> None:
        given, truth = volumes(activation)
        options = {activation: True, "batch": batch, "include_background": background or activation == "sigmoid"}
        oracles = {
            "dice": DiceLoss(**options),
            "tversky": TverskyLoss(**options, alpha=0.3, beta=0.7),
            "generalised_dice": GeneralizedDiceLoss(**options, smooth_nr=1e-9, smooth_dr=1e-9),
        }
        # The all-background patches are no oracle of generalised Dice, see the docstring of our term.
        rows = {"generalised_dice": (0, 3)} if not batch else {}
        for name, oracle in oracles.items():
            keep = list(rows.get(name, range(4)))
            loss = given.loss(name, batch_dice=batch, include_background=background)
            found, _ = loss(given.logits[keep], given.classes[keep])
            assert found.item() == pytest.approx(oracle(given.logits[keep], truth[keep]).item(), abs=1e-4), name

    def test_focal_is_divided_by_the_classes_there(self, activation: str) -> None:
        given, truth = volumes(activation)
        oracle = FocalLoss(use_softmax=activation == "softmax", gamma=1.5, include_background=True)
        factor = CLASSES if activation == "softmax" else 1
        found, _ = given.loss("focal", focal_gamma=1.5)(given.logits, given.classes)
        assert found.item() == pytest.approx(factor * oracle(given.logits, truth).item(), rel=1e-5)

    def test_hausdorff(self, activation: str) -> None:
        given, truth = volumes(activation)
        oracle = LogHausdorffDTLoss(
            **{activation: True}, alpha=1.5, include_background=activation == "sigmoid", reduction="none"
        )
        found, _ = given.loss("hausdorff", hausdorff_alpha=1.5)(given.logits, given.classes)
        assert found.item() == pytest.approx(oracle(given.logits, truth).mean().item(), rel=1e-5)

    def test_cldice_of_each_class_alone(self, activation: str) -> None:
        given, truth = volumes(activation)
        p = given.logits.softmax(1) if activation == "softmax" else given.logits.sigmoid()
        first = 1 if activation == "softmax" else 0
        oracle = SoftclDiceLoss(iter_=2, smooth=1e-9)
        each = [oracle(p[:, c : c + 1], truth[:, c : c + 1]).item() for c in range(first, truth.shape[1])]
        found, _ = given.loss("cldice", cldice_iterations=2)(given.logits, given.classes)
        assert found.item() == pytest.approx(sum(each) / len(each), rel=1e-5)

    def test_boundary_has_the_gradient_of_monais_where_no_voxel_is_of_the_outermost_layer(
        self, activation: str
    ) -> None:
        """Half a voxel less everywhere is the gradient of the probability's sum, which is added here."""
        given, truth = volumes(activation)
        first = 0 if activation == "sigmoid" else 1
        oracle = BoundaryLoss(**{activation: True}, include_background=first == 0)
        bordered = truth.flatten(2).any(2)[:, first:]

        def theirs(logits: Tensor) -> Tensor:
            p = logits.softmax(1) if first else logits.sigmoid()
            half = 0.5 * p[:, first:].flatten(2).mean(2) * bordered
            value: Tensor = oracle(logits, truth) - half.mean()
            return value

        found = gradient(lambda x: given.loss("boundary")(x, given.classes)[0], given.logits)
        torch.testing.assert_close(found, gradient(theirs, given.logits), atol=1e-9, rtol=1e-4)


class TestBruteForce:
    def problem(self) -> tuple[np.ndarray, np.ndarray, Tensor, Tensor]:
        """Probabilities (9,8) of class 1, a blob of truth, and both as tensors."""
        generator = np.random.default_rng(3)
        p = generator.uniform(0.02, 0.98, (9, 8))
        truth = np.zeros((9, 8), dtype=bool)
        truth[2:6, 3:7], truth[7, 1] = True, True
        logits = torch.from_numpy(np.log(np.stack([1 - p, p])))[None]
        return p, truth, logits, torch.from_numpy(truth.astype(np.int64))[None, None]

    def value(self, name: str, **settings: Any) -> float:
        _, _, logits, classes = self.problem()
        return loss_of(name, Targets(2), **settings)(logits, classes)[0].item()

    def test_boundary(self) -> None:
        """The distance to the nearest voxel of the other side, less the half voxel to the border."""
        p, truth, _, _ = self.problem()
        total = 0.0
        for here in itertools.product(range(9), range(8)):
            there = [x for x in itertools.product(range(9), range(8)) if truth[x] != truth[here]]
            distance = min(np.hypot(here[0] - x[0], here[1] - x[1]) for x in there) - 0.5
            total += distance * abs(p[here] - truth[here])
        assert self.value("boundary") == pytest.approx(total / 72)

    def test_hausdorff(self) -> None:
        p, truth, _, _ = self.problem()

        def nearest_other(mask: np.ndarray) -> np.ndarray:
            there = np.argwhere(mask[..., None, None] != mask)
            result = np.full(mask.shape, np.inf)
            for i, j, k, m in there:
                result[i, j] = min(result[i, j], np.hypot(i - k, j - m))
            return result

        weight = nearest_other(truth) ** 2 + nearest_other(p > 0.5) ** 2
        assert self.value("hausdorff") == pytest.approx(np.log1p((weight * (p - truth) ** 2).mean()), rel=1e-5)

    def test_cldice(self) -> None:
        p, truth, _, _ = self.problem()
        cross = ndimage.generate_binary_structure(2, 1)

        def skeleton(image: np.ndarray) -> np.ndarray:
            found = np.zeros_like(image)
            for step in range(3):
                image = ndimage.grey_erosion(image, footprint=cross, mode="nearest") if step else image
                eroded = ndimage.grey_erosion(image, footprint=cross, mode="nearest")
                delta = np.maximum(image - ndimage.grey_dilation(eroded, size=(3, 3), mode="nearest"), 0)
                found = found + np.maximum(delta - found * delta, 0)
            return found

        ours, true = skeleton(p), skeleton(truth.astype(float))
        precision = ((ours * truth).sum() + 1) / (ours.sum() + 1)
        sensitivity = ((true * p).sum() + 1) / (true.sum() + 1)
        expected = 1 - 2 * precision * sensitivity / (precision + sensitivity)
        assert self.value("cldice", cldice_iterations=2) == pytest.approx(expected, rel=1e-5)

    def test_top_k_and_focal(self) -> None:
        p, truth, _, _ = self.problem()
        right = np.where(truth, p, 1 - p).ravel()
        hardest = np.sort(-np.log(right))[::-1][: int(72 * 0.3)]
        assert self.value("top_k", top_k_share=0.3) == pytest.approx(hardest.mean())
        assert self.value("focal", focal_gamma=3.0) == pytest.approx((-np.log(right) * (1 - right) ** 3).mean())
        assert self.value("focal", focal_gamma=0.0) == pytest.approx(self.value("cross_entropy"))
        assert self.value("top_k", top_k_share=1.0) == pytest.approx(self.value("cross_entropy"))

    def test_generalised_dice_weighs_by_inverse_squared_volume(self) -> None:
        """Two classes of 2 and 8 voxels: a sixteenth of the weight for each voxel of the larger."""
        classes = torch.tensor([1, 1, *[2] * 8, 0, 0])
        p = torch.tensor([[0.2, 0.5, 0.3]]).repeat(12, 1).double()
        found, _ = loss_of("generalised_dice", Targets(3))(p.log().T[None, :, None], classes[None, None])
        overlap, volume = 2 * 0.5 + 8 * 0.3 / 16, (12 * 0.5 + 2) + (12 * 0.3 + 8) / 16
        assert found.item() == pytest.approx(1 - 2 * overlap / volume, abs=1e-5)


def test_sums_by_class_are_the_same_either_way() -> None:
    """By index on the CPU, by mask on a GPU."""
    given = scene("plain")
    values = given.logits[:, :1].clone().requires_grad_()
    by_index, by_mask = (f(values, given.classes, CLASSES) for f in (_sum_by_index, _sum_by_mask))
    torch.testing.assert_close(by_index, by_mask)
    expected = [[given.logits[b, 0][given.classes[b, 0] == c].sum() for c in range(CLASSES)] for b in range(4)]
    torch.testing.assert_close(by_index, torch.tensor(expected, dtype=torch.float64))
    weights = torch.randn_like(by_index)
    slopes = [torch.autograd.grad((found * weights).sum(), values)[0] for found in (by_index, by_mask)]
    torch.testing.assert_close(*slopes)


def test_missing_the_only_voxel_of_a_structure_costs_boundary() -> None:
    """Half a voxel from the border on either side: its 0.5, and nothing elsewhere."""
    classes = torch.zeros(1, 1, 5, 5, 5, dtype=torch.long)
    classes[0, 0, 2, 2, 2] = 1
    nothing = torch.stack([torch.full((5, 5, 5), 50.0), torch.zeros(5, 5, 5)])[None]
    assert loss_of("boundary", Targets(2))(nothing, classes)[0].item() == pytest.approx(0.5 / 125)


def test_hausdorff_is_a_mean_over_the_voxels_that_count() -> None:
    """Distances 1, 1 and 2 to the border, squared, of the structure's only voxel and the two beside it."""
    p = torch.full((1, 1, 1, 4), 0.25, dtype=torch.float64)
    logits, classes = torch.stack([1 - p, p], dim=1).log(), torch.tensor([1, 0, 0, 2]).view(1, 1, 1, 4)
    found, _ = loss_of("hausdorff", Targets(2, ignored_class=2))(logits, classes)
    assert found.item() == pytest.approx(np.log1p((0.75**2 * 1 + 0.25**2 * 1 + 0.25**2 * 4) / 3))


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_focal_of_a_sure_prediction_has_a_slope(gamma: float) -> None:
    """The power below one has none at zero."""
    given = scene("plain")
    loss = given.loss("focal", focal_gamma=gamma)
    assert gradient(lambda x: loss(x, given.classes)[0], given.perfect(1e4).float()).isfinite().all()
