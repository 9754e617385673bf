"""How unsure scores are, voxel by voxel: the entropy of what was averaged, and how far the averaged answers disagree.

Both are parts of the highest entropy there is: 0 is sure, 1 is as likely one class as any other. Of regions, which
overlap, each is a yes or no of its own, and the figures are means over the regions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

_LEAST = 1e-30
"""Below every probability that adds anything to an entropy in float32."""


def entropy(probabilities: Tensor, *, overlap: bool) -> Tensor:
    """Entropy (...) of probabilities (O, ...), 0 to 1: Shannon's, of the outputs together, or each by itself."""
    if overlap:
        no = 1.0 - probabilities
        return (_plogp(probabilities) + _plogp(no)).mean(dim=0).div_(-math.log(2))
    return _plogp(probabilities).sum(dim=0).div_(-math.log(len(probabilities)))


def _plogp(probabilities: Tensor) -> Tensor:
    return probabilities.clamp_min(_LEAST).log_().mul_(probabilities)


@dataclass(frozen=True)
class Potential:
    """A convex figure of scores, by which it is told how far the answers that were averaged disagree.

    By Jensen's inequality the mean of a convex figure over several answers is at least the figure of their mean, and
    the two are equal where all answers are. The gap is their `disagreement`:

    of probabilities the figure is the negative entropy, and the gap is the entropy of the mean minus the mean entropy:
    the mutual information of the voxel's class and the answer that is asked (BALD, Houlsby et al. 2011,
    arXiv:1112.5745); it is the mean Kullback-Leibler divergence of the answers from their mean.

    Where logits are averaged (`logits`), it is the logarithm of what the softmax divides by, and the gap is the mean
    divergence the other way round, of what was made of the mean from the answers. That one can be more than 1.

    The mean is over folds, mirrored passes and overlapping windows, as that of the scores is.
    """

    overlap: bool
    logits: bool

    def __call__(self, scores: Tensor) -> Tensor:
        """The figure (...) of scores (O, ...), in units of the highest entropy."""
        if not self.logits:
            return entropy(scores, overlap=self.overlap).neg_()
        if self.overlap:
            return softplus(scores).mean(dim=0).div_(math.log(2))
        return scores.logsumexp(dim=0).div_(math.log(len(scores)))

    def disagreement(self, mean_figure: Tensor, mean_scores: Tensor) -> Tensor:
        """The gap (...), at least 0: the mean of the answers' figures (...) above the figure of their mean (O, ...)."""
        return torch.sub(mean_figure, self(mean_scores)).clamp_min_(0)
