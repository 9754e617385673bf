"""Planes of a volume as pictures: which way they are turned, which side is which, what is to scale.

Radiological convention: axial and coronal planes show the patient's right on the left of the picture, sagittal
planes are seen from the patient's left.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from scipy.ndimage import zoom

from transforms.geometry import Geometry
from transforms.resample import move

Array = npt.NDArray[Any]

BACKGROUND, TEXT, FAINT = "#0d1117", "#f0f3f6", "#9aa4af"
FONT = "DejaVu Sans"

VIEW = "LPI"
"""Array axes of all three planes: they run to the patient's left, back and feet."""

WINDOW_PERCENTILES, EMPTY_PART = (1.0, 99.0), 0.03
"""The grey values of what is shown that become black and white; the lowest part of their range does not count."""

_FINER = 4


@dataclass(frozen=True)
class View:
    """One plane: the axes of `VIEW` that run across, down and through it, and what its four edges are."""

    name: str
    across: int
    down: int
    through: int
    left_right_top_bottom: str


VIEWS = (
    View("Axial", 0, 1, 2, "RLAP"),
    View("Coronal", 0, 2, 1, "RLSI"),
    View("Sagittal", 1, 2, 0, "APSI"),
)


def turned(voxels: Array, geometry: Geometry, *, fill: float = 0.0) -> Array:
    """Voxels with their axes along `VIEW`: permuted and flipped; only the slices of a sheared grid are shifted."""
    if geometry.is_sheared:
        stored = torch.from_numpy(voxels)[None]
        return move(stored, geometry, geometry.orthogonal().oriented(VIEW), order=0, fill=fill)[0].numpy()
    axes = geometry.axis_map(geometry.oriented(VIEW))
    flips = tuple(t for t, scale in enumerate(axes.scales) if scale < 0)
    return np.asarray(np.flip(voxels.transpose(axes.source_axes), flips))


def grey_window(values: Array) -> tuple[float, float]:
    """The grey values that become black and white. Air and what was not measured would only flatten the rest."""
    lowest, highest = float(values.min()), float(values.max())
    inside = values[values > lowest + EMPTY_PART * (highest - lowest)]
    low, high = (float(v) for v in np.percentile(inside if inside.size else values, WINDOW_PERCENTILES))
    return low, max(high, low + 1e-6)


def outline(mask: Array, pixel_mm: tuple[float, float]) -> tuple[Array, Array, Array]:
    """Positions in mm, and the mask on a finer grid; its level 0.5 runs along the pixels' edges."""
    rows, columns = (slice(max(int(a.min()) - 2, 0), int(a.max()) + 3) for a in np.nonzero(mask))
    # The rim of zeros closes contours at the picture's edge.
    padded = np.pad(mask[rows, columns].astype(np.float32), 1)
    share = zoom(padded, _FINER, order=1, mode="nearest", grid_mode=True)
    down, across = ((np.arange(n) + 0.5) / _FINER - 1 for n in share.shape)
    return (across + columns.start) * pixel_mm[0], (down + rows.start) * pixel_mm[1], share


def draw_marks(axes: Axes, view: View, size_mm: tuple[float, float]) -> None:
    """The plane's name, the patient's sides at its edges, and a scale; `size_mm` is what is seen, across and down."""
    write(axes, view.name, (0, 1), (1, 6), fontsize=11, ha="left", va="bottom")
    places = (((0, 0.5), (9, 0)), ((1, 0.5), (-9, 0)), ((0.5, 1), (0, -10)), ((0.5, 0), (0, 10)))
    for letter, (place, shift_pt) in zip(view.left_right_top_bottom, places, strict=True):
        write(axes, letter, place, shift_pt, fontsize=11, fontweight="bold")
    width_mm, height_mm = size_mm
    lengths_mm = [m * 10.0**e for e in range(-1, 4) for m in (1, 2, 5)]
    length_mm = max((n for n in lengths_mm if n <= width_mm / 3.5), default=lengths_mm[0])
    left_mm, y_mm = 0.05 * width_mm, 0.95 * height_mm
    line = Line2D([left_mm, left_mm + length_mm], [y_mm, y_mm], color=TEXT, linewidth=2.2, solid_capstyle="butt")
    line.set_path_effects([withStroke(linewidth=4.0, foreground="#00000099")])
    axes.add_line(line)
    place = ((left_mm + length_mm / 2) / width_mm, 1 - y_mm / height_mm)
    write(axes, f"{length_mm:g} mm", place, (0, 4), fontsize=8.5, va="bottom")


def write(axes: Axes, text: str, place: tuple[float, float], shift_pt: tuple[float, float], **style: Any) -> None:
    """Text at a place in parts of the panel, moved by some points, with a dark rim that keeps it readable."""
    written = axes.annotate(
        text,
        place,
        xytext=shift_pt,
        xycoords="axes fraction",
        textcoords="offset points",
        **{"ha": "center", "va": "center", "color": TEXT, "fontfamily": FONT, **style},
    )
    written.set_path_effects([withStroke(linewidth=2.4, foreground="#000000b0")])
