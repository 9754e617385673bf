"""Slices that lie unevenly -> the planes of an even grid, by linear interpolation between neighbours."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

Slice = npt.NDArray[np.float64]


def fill_planes(
    planes: npt.NDArray[np.float32], read_slice: Callable[[int], Slice], slice_positions_k: Sequence[float]
) -> None:
    """Fill (K, rows, columns) from slices that lie at these places of the k axis.

    The first slice lies at 0. A plane beyond the last slice is like it. Slices are read in order, each at most once,
    and two are held at a time.

    Args:
        planes: what is filled.
        read_slice: slice n as (rows, columns).
        slice_positions_k: where slice n lies, ascending.

    Raises:
        ValueError: the places do not begin with 0 or do not ascend.
    """
    places = np.asarray(slice_positions_k, dtype=np.float64)
    if places.size == 0 or places[0] != 0 or (np.diff(places) <= 0).any():
        raise ValueError("slices lie at ascending places that begin with 0")
    below = np.clip(np.searchsorted(places, np.arange(len(planes)), side="right") - 1, 0, max(len(places) - 2, 0))
    held: dict[int, Slice] = {}
    for k, first in enumerate(below.tolist()):
        pair = [first, min(first + 1, len(places) - 1)]
        held = {n: held[n] if n in held else read_slice(n) for n in pair}
        gap = places[pair[1]] - places[first]
        part = min((k - places[first]) / gap, 1.0) if gap else 0.0
        planes[k] = (1 - part) * held[pair[0]] + part * held[pair[1]]
