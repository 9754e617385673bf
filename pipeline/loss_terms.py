"""The terms that a loss may be made of: each a mean over patches of a value of each patch alone.

That makes accumulated gradients those of the whole batch. The exception is `batch_dice`, which sums the overlaps of
a batch before it divides. A class or patch of which nothing counts costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from monai.losses.boundary_loss import BoundaryLoss
from monai.losses.cldice import SoftclDiceLoss
from monai.losses.hausdorff_loss import HausdorffDTLoss
from torch import Tensor

from pipeline.config import LossConfig
from pipeline.loss_comparison import Comparison, Sums

Term = Callable[[Comparison, LossConfig], Tensor]

SMOOTH = 1e-5  # added to both sides of each overlap's fraction: a class absent from both sides costs nothing
TINY = 1e-6  # where a power's slope would be infinite


def dice(compared: Comparison, settings: LossConfig) -> Tensor:
    """One minus soft Dice, the mean over classes (Milletari et al. 2016, unsquared; MONAI's DiceLoss)."""
    sums = _sums(compared, settings)
    score = (2 * sums.overlap + SMOOTH) / (sums.predicted + sums.present + SMOOTH)
    return _class_mean(1 - score, compared, settings)


def generalised_dice(compared: Comparison, settings: LossConfig) -> Tensor:
    """One minus Dice of all classes together, each weighted by its inverse squared volume (Sudre et al. 2017).

    As MONAI's GeneralizedDiceLoss an absent class weighs as much as the rarest present one; unlike there that weight
    is one, so that the smoothing term stays small beside large structures and an empty patch still teaches.
    """
    sums = _sums(compared, settings)
    is_present = sums.present > 0
    rarest = torch.where(is_present, sums.present, torch.inf).amin(1, keepdim=True)
    weight = torch.where(is_present, (rarest / sums.present.clamp(min=1)) ** 2, 1.0)
    counting = _counting(compared, settings)
    if counting is not None:
        weight = torch.where(counting, weight, 0.0)
    overlap, volume = (weight * sums.overlap).sum(1), (weight * (sums.predicted + sums.present)).sum(1)
    return (1 - (2 * overlap + SMOOTH) / (volume + SMOOTH)).mean()


def tversky(compared: Comparison, settings: LossConfig) -> Tensor:
    """One minus the Tversky index, the mean over classes (Salehi et al. 2017; MONAI's TverskyLoss)."""
    return _class_mean(_tversky_loss(compared, settings), compared, settings)


def focal_tversky(compared: Comparison, settings: LossConfig) -> Tensor:
    """The root of order gamma of one minus the Tversky index, the mean over classes (Abraham and Khan 2019).

    Below a millionth it is a straight line, since the root's slope at a perfect prediction is infinite.
    """
    wrong = _tversky_loss(compared, settings).clamp(min=0)
    curved = wrong.clamp(min=TINY)
    return _class_mean(curved ** (1 / settings.focal_tversky_gamma) * (wrong / curved), compared, settings)


def cross_entropy(compared: Comparison, settings: LossConfig) -> Tensor:
    """The mean over voxels; binary cross entropy, the mean over regions too, where they overlap."""
    return compared.voxel_mean(compared.per_voxel(-compared.log_truth))


def top_k(compared: Comparison, settings: LossConfig) -> Tensor:
    """Cross entropy of the share of each patch's voxels where it is highest (Wu et al. 2016; nnU-Net's TopK: 10 %).

    At least one voxel of each patch; nnU-Net takes its share of the batch as a whole.
    """
    counted = compared.counted_voxels()
    wanted = (counted.double() * settings.top_k_share).long().clamp(min=1).minimum(counted)
    values = compared.per_voxel(-compared.log_truth)
    if compared.counted is not None:
        values = values.masked_fill(~compared.counted.flatten(1), -1.0)
    most = max(1, int(values.shape[1] * settings.top_k_share))
    worst = values.topk(most, dim=1).values
    is_wanted = torch.arange(most, device=worst.device) < wanted[:, None]
    return (torch.where(is_wanted, worst, 0.0).sum(1) / wanted.clamp(min=1)).mean()


def focal(compared: Comparison, settings: LossConfig) -> Tensor:
    """Cross entropy, each voxel weighted by (1 - p)^gamma of its true class (Lin et al. 2017).

    A mean over voxels, where MONAI's FocalLoss divides by the number of classes too.
    """
    doubt = (-torch.expm1(compared.log_truth)).clamp(min=TINY)
    return compared.voxel_mean(compared.per_voxel(-compared.log_truth * doubt**settings.focal_gamma))


def boundary(compared: Comparison, settings: LossConfig) -> Tensor:
    """Probability on the wrong side of the true border, by its distance in voxels (Kervadec et al. 2019).

    The signed distances are those of MONAI's BoundaryLoss less half a voxel: the border then lies between voxels and
    the outermost layer counts as well. The same distances of the truth are taken off, which has no gradient, so that
    a perfect prediction costs nothing. A class that is absent, or everywhere, has no border and costs nothing.
    """
    probability, truth = compared.dense
    space = tuple(range(2, truth.dim()))
    has_border = truth.amax(space, keepdim=True) > truth.amin(space, keepdim=True)
    distance = (BoundaryLoss().compute_distance_map(truth.detach()).to(truth) - 0.5) * has_border
    moments = (distance * (probability - truth)).sum(space)
    return _class_mean(moments / compared.counted_voxels().clamp(min=1)[:, None], compared)


def hausdorff(compared: Comparison, settings: LossConfig) -> Tensor:
    """Squared errors weighted by powers of both sides' distances to a border (Karimi et al. 2019).

    MONAI's LogHausdorffDTLoss, with the mean over the voxels that count. Distances are in voxels.
    """
    probability, truth = compared.dense
    term = HausdorffDTLoss(alpha=settings.hausdorff_alpha, include_background=True, reduction="none")
    means = term(probability, truth).flatten(1)
    share = compared.counted_voxels().clamp(min=1)[:, None] / truth[0, 0].numel()
    return _class_mean(torch.log1p(means / share), compared)


def cldice(compared: Comparison, settings: LossConfig) -> Tensor:
    """One minus soft centreline Dice (Shit et al. 2021): MONAI's SoftclDiceLoss of each class alone.

    Each iteration is five poolings of every class: on a CPU by far the slowest term.
    """
    probability, truth = (volume.flatten(0, 1).unsqueeze(1) for volume in compared.dense)
    # Both its sensitivities are above zero already, so that their harmonic mean needs no `smooth`.
    term = SoftclDiceLoss(iter_=settings.cldice_iterations, smooth=1e-12, reduction="none")
    return _class_mean(term(probability, truth).view(compared.dense[0].shape[:2]), compared)


TERMS: dict[str, Term] = {
    term.__name__: term
    for term in (
        dice,
        generalised_dice,
        tversky,
        focal_tversky,
        cross_entropy,
        top_k,
        focal,
        boundary,
        hausdorff,
        cldice,
    )
}
"""By their names in `loss.terms`."""


def _tversky_loss(compared: Comparison, settings: LossConfig) -> Tensor:
    """(B,C) of one minus the index."""
    sums = _sums(compared, settings)
    false_positives, false_negatives = sums.predicted - sums.overlap, sums.present - sums.overlap
    wrong = settings.tversky_false_positives * false_positives + settings.tversky_false_negatives * false_negatives
    return 1 - (sums.overlap + SMOOTH) / (sums.overlap + wrong + SMOOTH)


def _sums(compared: Comparison, settings: LossConfig) -> Sums:
    """(B,C), or (1,C) of all patches together, of which only those count where the class was annotated."""
    sums = compared.sums
    if not settings.batch_dice:
        return sums
    tables = [sums.overlap, sums.predicted, sums.present]
    if compared.active is not None:
        tables = [torch.where(compared.active, table, 0.0) for table in tables]
    return Sums(*(table.sum(0, keepdim=True) for table in tables))


def _counting(compared: Comparison, settings: LossConfig) -> Tensor | None:
    """Which channels count, (B,C) or (1,C) as `_sums` has them."""
    if compared.active is None or not settings.batch_dice:
        return compared.active
    return compared.active.any(0, keepdim=True)


def _class_mean(values: Tensor, compared: Comparison, settings: LossConfig | None = None) -> Tensor:
    """The mean of (B,C) over the classes that count, then over patches; `settings` where a batch may be summed up."""
    counting = compared.active if settings is None else _counting(compared, settings)
    if counting is None:
        return values.mean()
    means = torch.where(counting, values, 0.0).sum(1) / counting.sum(1).clamp(min=1)
    return means.mean()
