"""Losses against numbers worked out by hand, formulas written out in float64, and MONAI's own combination."""

from __future__ import annotations

import math

import pytest
import torch
from monai.losses.dice import DiceCELoss
from torch import Tensor
from torch.nn import functional

from pipeline.errors import ConfigError
from pipeline.losses import LOSSES, build_loss, deep_supervision_loss

# Four voxels of one patch: probability of class 1, and the truth.
FOREGROUND = (0.9, 0.6, 0.5, 0.4)
TRUTH = (1, 1, 1, 0)


def logits_of(*foreground: float) -> Tensor:
    """(1,2,1,1,N) whose softmax is the given probability of class 1."""
    p = torch.tensor(foreground, dtype=torch.float64)
    return torch.stack([1 - p, p]).log().float().reshape(1, 2, 1, 1, -1)


def target_of(*classes: int) -> Tensor:
    """(1,1,1,N)."""
    return torch.tensor(classes).reshape(1, 1, 1, -1)


def random_problem(
    class_count: int = 3, *, batch: int = 2, shape: tuple[int, ...] = (5, 6, 7)
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(batch, class_count, *shape, generator=generator)
    return logits, torch.randint(0, class_count, (batch, *shape), generator=generator)


def test_terms_by_hand() -> None:
    """Overlap 2.0, predicted 2.4, present 3: false positives 0.4, false negatives 1.0."""
    values = {name: build_loss(name, class_count=2)(logits_of(*FOREGROUND), target_of(*TRUTH)) for name in LOSSES}
    dice = 1 - 2 * 2.0 / (2.4 + 3)
    cross_entropy = -(math.log(0.9) + math.log(0.6) + math.log(0.5) + math.log(0.6)) / 4
    tversky = 1 - 2.0 / (2.0 + 0.3 * 0.4 + 0.7 * 1.0)
    expected = {"dice_ce": dice + cross_entropy, "dice": dice, "tversky": tversky, "ce": cross_entropy}
    assert {name: total.item() for name, (total, _) in values.items()} == pytest.approx(expected, abs=1e-5)
    terms = {name: value.item() for name, value in values["dice_ce"][1].items()}
    assert terms == pytest.approx({"dice": dice, "cross_entropy": cross_entropy}, abs=1e-5)


def test_tversky_weights_are_false_positives_first() -> None:
    loss = build_loss("tversky", class_count=2, false_positive_weight=1.0, false_negative_weight=0.0)
    total, _ = loss(logits_of(*FOREGROUND), target_of(*TRUTH))
    assert total.item() == pytest.approx(1 - 2.0 / 2.4, abs=1e-5)


def test_batch_dice_sums_before_it_divides() -> None:
    """A patch with a third of the object's voxels has a third of the say."""
    logits = torch.cat([logits_of(*FOREGROUND), logits_of(0.2, 0.2, 0.2, 0.2)])
    target = torch.cat([target_of(*TRUTH), target_of(1, 0, 0, 0)])
    each = (2 * 2.0 / 5.4 + 2 * 0.2 / (0.8 + 1)) / 2
    together = 2 * (2.0 + 0.2) / (5.4 + 1.8)
    for batch_dice, expected in ((False, each), (True, together)):
        total, _ = build_loss("dice", class_count=2, batch_dice=batch_dice)(logits, target)
        assert total.item() == pytest.approx(1 - expected, abs=1e-5)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("ignored", [255, -1, 2])
def test_ignored_voxels_count_nowhere(name: str, ignored: int) -> None:
    logits = torch.cat([logits_of(*FOREGROUND), logits_of(0.01, 0.99)], dim=-1).requires_grad_()
    loss = build_loss(name, class_count=2, ignore_class=ignored)
    total, _ = loss(logits, target_of(*TRUTH, ignored, ignored))
    expected, _ = build_loss(name, class_count=2)(logits_of(*FOREGROUND), target_of(*TRUTH))
    assert total.item() == pytest.approx(expected.item(), abs=1e-6)
    total.backward()
    assert logits.grad is not None
    assert not logits.grad[..., 4:].any()
    assert logits.grad[..., :4].all()


@pytest.mark.parametrize("name", LOSSES)
def test_a_patch_of_ignored_voxels_costs_nothing(name: str) -> None:
    logits = logits_of(*FOREGROUND).requires_grad_()
    total, _ = build_loss(name, class_count=2, ignore_class=9)(logits, target_of(9, 9, 9, 9))
    total.backward()
    assert total.item() == 0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_a_class_absent_from_both_sides_costs_nothing() -> None:
    logits = torch.tensor([60.0, 0.0]).reshape(1, 2, 1, 1, 1)
    total, _ = build_loss("dice", class_count=2)(logits, target_of(0))
    assert total.item() == pytest.approx(0, abs=1e-6)


def test_dice_ce_is_what_monai_combines() -> None:
    logits, target = random_problem()
    for batch_dice in (False, True):
        oracle = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True, batch=batch_dice)
        total, _ = build_loss("dice_ce", class_count=3, batch_dice=batch_dice)(logits, target)
        assert torch.allclose(total, oracle(logits, target[:, None]))


def test_terms_are_their_formulas_in_float64() -> None:
    logits, target = random_problem(5, shape=(9, 8))
    probability = logits.double().softmax(1)[:, 1:].flatten(2)
    truth = functional.one_hot(target, 5).movedim(-1, 1)[:, 1:].flatten(2)
    overlap, predicted, present = (probability * truth).sum(2), probability.sum(2), truth.sum(2)
    dice = 1 - (2 * overlap / (predicted + present)).mean()
    tversky = 1 - (overlap / (overlap + 0.3 * (predicted - overlap) + 0.7 * (present - overlap))).mean()
    for name, expected in (("dice", dice), ("tversky", tversky)):
        total, _ = build_loss(name, class_count=5)(logits, target)
        assert total.item() == pytest.approx(expected.item(), abs=1e-5)


def test_class_maps_may_have_a_channel_and_any_integer_type() -> None:
    logits, target = random_problem()
    loss = build_loss("dice_ce", class_count=3)
    expected, _ = loss(logits, target)
    for same in (target[:, None], target.to(torch.uint8), target.to(torch.int16)[:, None]):
        assert torch.equal(loss(logits, same)[0], expected)


def test_half_precision_logits_are_summed_in_float32() -> None:
    logits, target = random_problem()
    loss = build_loss("dice_ce", class_count=3)
    total, terms = loss(logits.bfloat16().requires_grad_(), target)
    assert total.dtype == torch.float32
    assert torch.equal(total, loss(logits.bfloat16().float(), target)[0])
    assert total.requires_grad
    assert not any(value.requires_grad for value in terms.values())


def test_deep_supervision_halves_each_weight_and_takes_the_nearest_voxels() -> None:
    finest, target = random_problem(shape=(8, 12, 10))
    coarser = torch.randn(2, 3, 8, 6, 5, generator=torch.Generator().manual_seed(1))
    coarsest = torch.randn(2, 3, 4, 3, 2, generator=torch.Generator().manual_seed(2))
    loss = build_loss("dice_ce", class_count=3)
    total, terms = deep_supervision_loss(loss, (finest, coarser, coarsest), target)

    def alone(logits: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        shrunk = functional.interpolate(target[:, None].float(), size=logits.shape[2:], mode="nearest-exact")
        return loss(logits, shrunk.long())

    (first, first_terms), (second, second_terms), (third, third_terms) = map(alone, (finest, coarser, coarsest))
    assert torch.allclose(total, (4 * first + 2 * second + third) / 7)
    for name in ("dice", "cross_entropy"):
        expected = (4 * first_terms[name] + 2 * second_terms[name] + third_terms[name]) / 7
        assert torch.allclose(terms[name], expected)
    assert torch.allclose(total, torch.stack(list(terms.values())).sum())


def test_deep_supervision_of_one_output_is_the_loss_itself() -> None:
    logits, target = random_problem()
    loss = build_loss("dice_ce", class_count=3)
    expected, expected_terms = loss(logits, target)
    for outputs in (logits, (logits,)):
        total, terms = deep_supervision_loss(loss, outputs, target)
        assert torch.equal(total, expected)
        assert terms == expected_terms


def test_the_margin_of_valid_convolutions_is_cut_from_the_target() -> None:
    logits, target = random_problem(shape=(4, 5, 6))
    framed = functional.pad(target, (1, 2, 2, 2, 3, 1), value=1)
    loss = build_loss("dice_ce", class_count=3)
    total, _ = deep_supervision_loss(loss, logits, framed, margin=(3, 2, 1))
    assert torch.equal(total, loss(logits, target)[0])
    with pytest.raises(ValueError, match=r"target of shape \(8, 9, 9\) for logits of shape \(4, 5, 6\)"):
        deep_supervision_loss(loss, logits, framed)


def test_gradients_reach_every_output() -> None:
    finest, target = random_problem(shape=(4, 4, 4))
    outputs = (finest.requires_grad_(), torch.zeros(2, 3, 2, 2, 2, requires_grad=True))
    deep_supervision_loss(build_loss("dice_ce", class_count=3), outputs, target)[0].backward()
    assert all(logits.grad is not None and logits.grad.any() for logits in outputs)


def test_wrong_names_and_shapes_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"'dice-ce' is not known: did you mean 'dice_ce'\? known are dice_ce, dice"):
        build_loss("dice-ce", class_count=2)
    with pytest.raises(ValueError, match="found 1 classes"):
        build_loss("dice", class_count=1)
    logits, target = random_problem()
    with pytest.raises(ValueError, match="found logits of 3 classes, expected 4"):
        build_loss("dice", class_count=4)(logits, target)
    loss = build_loss("dice", class_count=3)
    with pytest.raises(ValueError, match=r"target of shape \(4, 6, 7\) for logits of shape \(5, 6, 7\)"):
        loss(logits, target[:, 1:])
    with pytest.raises(ValueError, match="expected a map of class numbers"):
        loss(logits, logits.softmax(1))
