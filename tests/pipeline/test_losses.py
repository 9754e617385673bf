"""Losses against numbers worked out by hand, formulas written out in float64, and MONAI's own combination."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from monai.losses.dice import DiceCELoss
from torch import Tensor
from torch.nn import functional

from pipeline.config import LossConfig, LossTerms
from pipeline.loss_terms import TERMS
from pipeline.losses import Loss, Targets, build_loss, deep_supervision_loss

# Four voxels of one patch: probability of class 1, and the truth.
FOREGROUND = (0.9, 0.6, 0.5, 0.4)
TRUTH = (1, 1, 1, 0)

LOCAL = [name for name in TERMS if name not in ("boundary", "hausdorff", "cldice")]
"""Terms in which a voxel's neighbours play no part."""


def logits_of(*foreground: float) -> Tensor:
    """(1,2,1,1,N) whose softmax is the given probability of class 1."""
    p = torch.tensor(foreground, dtype=torch.float64)
    return torch.stack([1 - p, p]).log().float().reshape(1, 2, 1, 1, -1)


def target_of(*classes: int) -> Tensor:
    """(1,1,1,N)."""
    return torch.tensor(classes).reshape(1, 1, 1, -1)


def loss_of(*names: str, classes: int = 2, ignored: int | None = None, **settings: Any) -> Loss:
    """Terms of weight one; without names, the default ones."""
    terms = {"terms": LossTerms(**dict.fromkeys(names, 1.0))} if names else {}
    return build_loss(LossConfig(**terms, **settings), Targets(classes, ignored_class=ignored))


def random_problem(
    class_count: int = 3, *, batch: int = 2, shape: tuple[int, ...] = (5, 6, 7)
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(batch, class_count, *shape, generator=generator)
    return logits, torch.randint(0, class_count, (batch, *shape), generator=generator)


def test_terms_by_hand() -> None:
    """Overlap 2.0, predicted 2.4, present 3: false positives 0.4, false negatives 1.0. The two voxels of class 1 that
    are predicted worst, one of 0.5 and one of 0.6, are the upper half for cross entropy."""
    nll = [-math.log(p) for p in (0.9, 0.6, 0.5, 0.6)]
    tversky = 1 - 2.0 / (2.0 + 0.3 * 0.4 + 0.7 * 1.0)
    expected = {
        "dice": 1 - 2 * 2.0 / (2.4 + 3),
        "tversky": tversky,
        "focal_tversky": tversky ** (1 / 2),
        "cross_entropy": sum(nll) / 4,
        "top_k": (nll[1] + nll[2]) / 2,
        "focal": (0.1**2 * nll[0] + 0.4**2 * nll[1] + 0.5**2 * nll[2] + 0.4**2 * nll[3]) / 4,
    }
    loss = loss_of(*expected, focal_tversky_gamma=2.0, top_k_share=0.5)
    total, terms = loss(logits_of(*FOREGROUND), target_of(*TRUTH))
    assert {name: value.item() for name, value in terms.items()} == pytest.approx(expected, abs=1e-5)
    assert total.item() == pytest.approx(sum(expected.values()), abs=1e-5)


def test_weights_are_in_the_total_and_not_in_the_log() -> None:
    terms = LossTerms(dice=2.0, cross_entropy=0.5)
    total, values = build_loss(LossConfig(terms=terms), Targets(2))(logits_of(*FOREGROUND), target_of(*TRUTH))
    plain = loss_of()(logits_of(*FOREGROUND), target_of(*TRUTH))[1]
    assert values == plain
    assert total.item() == pytest.approx(2 * values["dice"].item() + 0.5 * values["cross_entropy"].item())


def test_a_term_of_weight_zero_is_not_computed() -> None:
    assert build_loss(LossConfig(terms=LossTerms(dice=0.0, tversky=1.0)), Targets(2)).terms == ("tversky",)


def test_tversky_weights_are_false_positives_first() -> None:
    loss = loss_of("tversky", tversky_false_positives=1.0, tversky_false_negatives=0.1)
    total, _ = loss(logits_of(*FOREGROUND), target_of(*TRUTH))
    assert total.item() == pytest.approx(1 - 2.0 / (2.0 + 0.4 + 0.1), abs=1e-5)


def test_batch_dice_sums_before_it_divides() -> None:
    """A patch with a third of the object's voxels has a third of the say."""
    logits = torch.cat([logits_of(*FOREGROUND), logits_of(0.2, 0.2, 0.2, 0.2)])
    target = torch.cat([target_of(*TRUTH), target_of(1, 0, 0, 0)])
    each = (2 * 2.0 / 5.4 + 2 * 0.2 / (0.8 + 1)) / 2
    together = 2 * (2.0 + 0.2) / (5.4 + 1.8)
    for batch_dice, expected in ((False, each), (True, together)):
        total, _ = loss_of("dice", batch_dice=batch_dice)(logits, target)
        assert total.item() == pytest.approx(1 - expected, abs=1e-5)


@pytest.mark.parametrize("name", LOCAL)
@pytest.mark.parametrize("ignored", [255, -1, 2])
def test_ignored_voxels_count_nowhere(name: str, ignored: int) -> None:
    logits = torch.cat([logits_of(*FOREGROUND), logits_of(0.01, 0.99)], dim=-1).requires_grad_()
    loss = loss_of(name, ignored=ignored, top_k_share=1.0)
    total, _ = loss(logits, target_of(*TRUTH, ignored, ignored))
    expected, _ = loss_of(name, top_k_share=1.0)(logits_of(*FOREGROUND), target_of(*TRUTH))
    assert total.item() == pytest.approx(expected.item(), abs=1e-6)
    total.backward()
    assert logits.grad is not None
    assert not logits.grad[..., 4:].any()
    assert logits.grad[..., :4].all()


@pytest.mark.parametrize("name", TERMS)
def test_a_patch_of_ignored_voxels_costs_nothing(name: str) -> None:
    logits = logits_of(*FOREGROUND).requires_grad_()
    total, _ = loss_of(name, ignored=9)(logits, target_of(9, 9, 9, 9))
    total.backward()
    assert total.item() == 0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_a_class_absent_from_both_sides_costs_nothing() -> None:
    logits = torch.tensor([60.0, 0.0]).reshape(1, 2, 1, 1, 1)
    total, _ = loss_of("dice")(logits, target_of(0))
    assert total.item() == pytest.approx(0, abs=1e-6)


def test_dice_ce_is_what_monai_combines() -> None:
    logits, target = random_problem()
    for batch_dice in (False, True):
        oracle = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True, batch=batch_dice)
        total, _ = loss_of(classes=3, batch_dice=batch_dice)(logits, target)
        assert torch.allclose(total, oracle(logits, target[:, None]))


def test_terms_are_their_formulas_in_float64() -> None:
    logits, target = random_problem(5, shape=(9, 8))
    probability = logits.double().softmax(1)[:, 1:].flatten(2)
    truth = functional.one_hot(target, 5).movedim(-1, 1)[:, 1:].flatten(2)
    overlap, predicted, present = (probability * truth).sum(2), probability.sum(2), truth.sum(2)
    dice = 1 - (2 * overlap / (predicted + present)).mean()
    tversky = 1 - (overlap / (overlap + 0.3 * (predicted - overlap) + 0.7 * (present - overlap))).mean()
    for name, expected in (("dice", dice), ("tversky", tversky)):
        total, _ = loss_of(name, classes=5)(logits, target)
        assert total.item() == pytest.approx(expected.item(), abs=1e-5)


def test_class_maps_may_have_a_channel_and_any_integer_type() -> None:
    logits, target = random_problem()
    loss = loss_of(classes=3)
    expected, _ = loss(logits, target)
    for same in (target[:, None], target.to(torch.uint8), target.to(torch.int16)[:, None]):
        assert torch.equal(loss(logits, same)[0], expected)


def test_half_precision_logits_are_summed_in_float32() -> None:
    logits, target = random_problem()
    loss = loss_of(classes=3)
    total, terms = loss(logits.bfloat16().requires_grad_(), target)
    assert total.dtype == torch.float32
    assert torch.equal(total, loss(logits.bfloat16().float(), target)[0])
    assert total.requires_grad
    assert not any(value.requires_grad for value in terms.values())


def test_deep_supervision_halves_each_weight_and_takes_the_nearest_voxels() -> None:
    finest, target = random_problem(shape=(8, 12, 10))
    coarser = torch.randn(2, 3, 8, 6, 5, generator=torch.Generator().manual_seed(1))
    coarsest = torch.randn(2, 3, 4, 3, 2, generator=torch.Generator().manual_seed(2))
    loss = loss_of(classes=3)
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
    loss = loss_of(classes=3)
    expected, expected_terms = loss(logits, target)
    for outputs in (logits, (logits,)):
        total, terms = deep_supervision_loss(loss, outputs, target)
        assert torch.equal(total, expected)
        assert terms == expected_terms


def test_the_margin_of_valid_convolutions_is_cut_from_the_target() -> None:
    logits, target = random_problem(shape=(4, 5, 6))
    framed = functional.pad(target, (1, 2, 2, 2, 3, 1), value=1)
    loss = loss_of(classes=3)
    total, _ = deep_supervision_loss(loss, logits, framed, margin=(3, 2, 1))
    assert torch.equal(total, loss(logits, target)[0])
    with pytest.raises(ValueError, match=r"target of shape \(8, 9, 9\) for logits of shape \(4, 5, 6\)"):
        deep_supervision_loss(loss, logits, framed)


def test_gradients_reach_every_output() -> None:
    finest, target = random_problem(shape=(4, 4, 4))
    outputs = (finest.requires_grad_(), torch.zeros(2, 3, 2, 2, 2, requires_grad=True))
    deep_supervision_loss(loss_of(classes=3), outputs, target)[0].backward()
    assert all(logits.grad is not None and logits.grad.any() for logits in outputs)


def test_wrong_numbers_and_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="found 1 classes"):
        Targets(1)
    with pytest.raises(ValueError, match=r"region of classes \(1, 3\), expected some of 1 to 2"):
        Targets(3, regions=((1, 3),))
    with pytest.raises(ValueError, match="found class 2 to be ignored"):
        Targets(3, ignored_class=2)
    logits, target = random_problem()
    with pytest.raises(ValueError, match="found logits of 3 channels, expected 4"):
        loss_of("dice", classes=4)(logits, target)
    loss = loss_of("dice", classes=3)
    with pytest.raises(ValueError, match=r"target of shape \(4, 6, 7\) for logits of shape \(5, 6, 7\)"):
        loss(logits, target[:, 1:])
    with pytest.raises(ValueError, match="expected a map of class numbers"):
        loss(logits, logits.softmax(1))
    with pytest.raises(ValueError, match=r"annotated of shape \(2, 4\), expected \(B, 3\)"):
        loss(logits, target, torch.ones(2, 4, dtype=torch.bool))
