"""Colours of labels: eight that most colour-blind readers tell apart, then as many more as there are labels."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

Colour = tuple[int, int, int]

PALETTE: tuple[Colour, ...] = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (204, 121, 167),
    (153, 153, 153),
)
"""Okabe and Ito's colours, told apart by most colour-blind readers (jfly.uni-koeln.de/color, 2008)."""

GOLDEN = 0.6180339887498949
"""Part of a turn between the hues of neighbours: no two of any number come to lie on each other."""

_PLASTIC = 1.324717957244746
_LIGHTNESS, _CHROMA = (0.45, 0.92), (0.05, 0.22)

# OKLab to linear sRGB (Ottosson, "A perceptual color space for image processing", 2020).
_LMS_FROM_LAB = np.array(
    [[1.0, 0.3963377774, 0.2158037573], [1.0, -0.1055613458, -0.0638541728], [1.0, -0.0894841775, -1.2914855480]]
)
_RGB_FROM_LMS = np.array(
    [
        [4.0767416621, -3.3077115913, 0.2309699292],
        [-1.2684380046, 2.6097574011, -0.3413193965],
        [-0.0041960863, -0.7034186147, 1.7076147010],
    ]
)


def distinct_colours(count: int) -> tuple[Colour, ...]:
    """`count` different colours (R, G, B), 0 to 255; fewer are always the beginning of more."""
    # A power of two, so that few lengths are ever made.
    made = _made(1 << max(3, (count - 1).bit_length()))
    return made[:count]


@lru_cache(maxsize=4)
def _made(count: int) -> tuple[Colour, ...]:
    tried = 4 * count
    while True:
        colours = dict.fromkeys([*PALETTE, *map(tuple, _spread(tried).tolist())])
        if len(colours) >= count:
            return tuple(colours)[:count]
        tried *= 2


def _spread(count: int) -> npt.NDArray[np.int64]:
    """(N, 3) colours of `count` tries: hues by the golden angle, lightness and chroma by Roberts' R2 sequence."""
    numbers = np.arange(1, count + 1)
    angle = 2 * np.pi * (numbers * GOLDEN % 1)
    lightness, chroma = (
        low + (high - low) * (numbers / _PLASTIC**power % 1)
        for power, (low, high) in enumerate((_LIGHTNESS, _CHROMA), start=1)
    )
    lab = np.stack([lightness, chroma * np.cos(angle), chroma * np.sin(angle)], axis=-1)
    linear = (lab @ _LMS_FROM_LAB.T) ** 3 @ _RGB_FROM_LMS.T
    shown = linear[((linear >= 0) & (linear <= 1)).all(axis=1)]
    # The sRGB transfer function (IEC 61966-2-1).
    encoded = np.where(shown <= 0.0031308, 12.92 * shown, 1.055 * np.maximum(shown, 1e-9) ** (1 / 2.4) - 0.055)
    return np.asarray(np.rint(255 * encoded), dtype=np.int64)
