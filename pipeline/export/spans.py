"""Runs of voxels along rays, for the readers of surfaces: what lies between entering a surface and leaving it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


def counted(starts: Ints, stops: Ints) -> tuple[Ints, Ints]:
    """All whole numbers from each start up to its stop, one range after the other: which range, and the number."""
    lengths = np.maximum(stops - starts, 0)
    owner = np.repeat(np.arange(len(lengths)), lengths)
    return owner, np.arange(len(owner)) + (starts - np.cumsum(lengths) + lengths)[owner]


def voxels(spans: Ints) -> Ints:
    """(N, 3) indices (i, j, k) of what spans (M, 4) hold: k, j, the first i, and the first i after it."""
    span, i = counted(spans[:, 2], spans[:, 3])
    return np.stack([i, spans[span, 1], spans[span, 0]], axis=1)
