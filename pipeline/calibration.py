"""Whether a network is right as often as it says: calibration of class probabilities. Arrays in, numbers out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]

_BLOCK_VOXELS = 1 << 20


@dataclass(frozen=True, eq=False)
class Reliability:
    """Per bin of confidence, each (bins,): voxels in it, their mean confidence and the part of them that is right.

    NaN for the last two where a bin holds nothing. Drawn against each other they are the reliability diagram.
    """

    voxels: npt.NDArray[np.int64]
    confidence: Floats
    accuracy: Floats

    @property
    def expected_error(self) -> float:
        """Expected calibration error (ECE): |accuracy - confidence| of the bins, weighted by their voxels; 0 to 1.

        NaN when no voxel was counted. Source: Guo et al., On calibration of modern neural networks, ICML 2017, eq. 3.
        """
        if not (total := int(self.voxels.sum())):
            return float("nan")
        held = self.voxels > 0
        gaps = np.abs(self.accuracy[held] - self.confidence[held])
        return float(gaps @ self.voxels[held]) / total


def reliability(
    probabilities: Array, classes: Array, *, counted: Array | None = None, bin_count: int = 15
) -> Reliability:
    """Confidence against accuracy of class probabilities (C, I, J, K) that sum to 1; `classes` (I, J, K) are true.

    The confidence of a voxel is the probability of its most likely class (of several, the first). Bins have the same
    width; bin m holds confidences above m / bin_count, up to and including (m + 1) / bin_count; the first one 0 too.
    Only voxels where `counted` (I, J, K) is true count. Most voxels of a volume are background that nothing mistakes,
    so over all of them the error is close to 0 for any network: count a margin around what is segmented.

    Raises:
        ValueError: the shapes do not belong together.
    """
    if probabilities.shape[1:] != classes.shape or (counted is not None and counted.shape != classes.shape):
        raise ValueError(
            f"probabilities (C, I, J, K) and classes (I, J, K) on one grid are compared, found {probabilities.shape} "
            f"and {classes.shape}" + ("" if counted is None else f", counted {counted.shape}")
        )
    kept = np.ones(classes.size, dtype=np.bool_) if counted is None else np.asarray(counted, dtype=np.bool_).reshape(-1)
    rows, truth = probabilities.reshape(len(probabilities), -1), classes.reshape(-1)
    sums = np.zeros((3, bin_count))
    for start in range(0, truth.size, _BLOCK_VOXELS):
        block = slice(start, start + _BLOCK_VOXELS)
        sums += _block_sums(rows[:, block][:, kept[block]], truth[block][kept[block]], bin_count)
    confidence, accuracy = (
        np.divide(part, sums[0], out=np.full(bin_count, np.nan), where=sums[0] > 0) for part in sums[1:]
    )
    return Reliability(sums[0].astype(np.int64), confidence, accuracy)


def _block_sums(probabilities: Array, truth: Array, bin_count: int) -> Floats:
    """(3, bin_count): voxels, their confidences, those that are right."""
    confidence = probabilities.max(axis=0, initial=0.0).astype(np.float64)
    is_right = probabilities.argmax(axis=0) == truth
    bins = np.clip(np.ceil(confidence * bin_count).astype(np.intp) - 1, 0, bin_count - 1)
    weights = (None, confidence, is_right.astype(np.float64))
    return np.stack([np.bincount(bins, weights=w, minlength=bin_count).astype(np.float64) for w in weights])
