"""The U itself in one picture: what flows down, across and up, with the figures of every level."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch
from torch import Tensor

from pipeline.export.planes import FAINT, TEXT, write
from pipeline.inspection.figures import LevelFigures
from pipeline.inspection.scene import Scene
from pipeline.inspection.sheets import COLOURS, WARNING, Sheet, is_encoder, save, spacing_of, told

_EDGE_IN, _HEADER_IN, _FOOTER_IN = 0.35, 0.95, 0.7
_AREA_IN2, _MOST_IN = 2.1, (2.2, 1.75)
_TEXT_IN, _GAP_IN = 2.3, 2.05
_ROW_GAP_IN, _INDENT_IN = 0.42, 0.3
_LINE_IN = 0.195
_LINES = 5.6
"""Of text beside a thumbnail; the arrow across runs below them."""

Place = tuple[float, float]


def write_overview(
    target: Path, scene: Scene, activations: Mapping[str, Tensor], figures: Sequence[LevelFigures]
) -> None:
    """Draw the U of `draw_overview` as PNG.

    Raises:
        RunError: the file cannot be written.
    """
    save(draw_overview(scene, activations, figures), target)


def draw_overview(scene: Scene, activations: Mapping[str, Tensor], figures: Sequence[LevelFigures]) -> Figure:
    """Encoder on the left, decoder on the right, skips between them, finest levels on top; image and result above.

    Each thumbnail is the energy (RMS over channels) of a level in the scene's plane, from lowest to highest there.
    """
    u = _U(scene, figures)
    boxes = {}
    for level in figures:
        words = [f"{level.channels} ch, {' x '.join(map(str, level.shape))}", *told(level)]
        if level.kind == "skip" and is_encoder(activations, level):
            words = ["what the encoder found"]
        boxes[level.name] = _draw_level(u, activations[level.name], level, words)
    boxes["image"] = _draw_end(u, "Image", reference=True)
    boxes["result"] = _draw_end(u, "Result", reference=False)
    for start, end in u.flows():
        _draw_arrow(u.sheet, boxes[start], boxes[end])
    _draw_texts(u)
    return u.sheet.figure


class _U:
    """Where everything stands, in inches from the upper left corner."""

    def __init__(self, scene: Scene, figures: Sequence[LevelFigures]) -> None:
        self.scene, self.figures = scene, figures
        self.depth = max(level.level for level in figures)
        aspect = scene.size_mm[0] / scene.size_mm[1]
        width_in = min((_AREA_IN2 * aspect) ** 0.5, _MOST_IN[0], _MOST_IN[1] * aspect)
        self.thumb_in = width_in, width_in / aspect
        self.row_in = max(self.thumb_in[1], _LINES * _LINE_IN) + _ROW_GAP_IN
        height_in = _HEADER_IN + (self.depth + 1) * self.row_in - _ROW_GAP_IN + _FOOTER_IN
        deepest_in = _TEXT_IN + _INDENT_IN * (self.depth - 1)
        self.sheet = Sheet(2 * deepest_in + 3 * width_in + 2 * _GAP_IN, height_in)

    def corner(self, kind: str, level: int) -> Place:
        """Upper left of the thumbnail of a level; level 0 is the image's and the result's."""
        indent_in = _INDENT_IN * max(level - 1, 0)
        x_in = {
            "encoder": _TEXT_IN + indent_in,
            "decoder": self.sheet.width_in - _TEXT_IN - indent_in - self.thumb_in[0],
        }.get(kind, (self.sheet.width_in - self.thumb_in[0]) / 2)
        return x_in, _HEADER_IN + level * self.row_in

    def flows(self) -> list[tuple[str, str]]:
        """From what to what features flow, as far as the figures show it."""
        names = {level.name for level in self.figures}
        down = ["image", *(level.name for level in self.figures if level.kind == "encoder")]
        bottom = [level.name for level in self.figures if level.kind == "bottleneck"]
        up = sorted((f for f in self.figures if f.kind == "decoder"), key=lambda level: -level.level)
        way = [*down, *bottom, *(level.name for level in up), "result"]
        across = [(f"encoder {n}", f"skip {n}") for n in range(1, self.depth + 1)]
        across += [(f"skip {n}", f"decoder {n}") for n in range(1, self.depth + 1)]
        plain = [(f"encoder {n}", f"decoder {n}") for n in range(1, self.depth) if f"skip {n}" not in names]
        known = [(a, b) for a, b in [*across, *plain] if {a, b} <= names]
        return [*pairwise(way), *known]


Box = tuple[float, float, float, float]
"""Left, top, width and height of a thumbnail, in inches."""


def _draw_level(u: _U, features: Tensor, level: LevelFigures, words: Sequence[str]) -> Box:
    """The thumbnail with its words beside it."""
    x_in, y_in = u.corner(level.kind, level.level)
    axes = u.sheet.axes(x_in, y_in, *u.thumb_in)
    pixels = u.scene.plane(np.sqrt(np.square(u.scene.level(features), dtype=np.float64).mean(axis=0)))
    u.scene.draw(axes, pixels, cmap=COLOURS, vmin=float(pixels.min()), vmax=max(float(pixels.max()), 1e-12))
    u.scene.draw_reference(axes, width=0.8)
    name = level.name.capitalize()
    if level.dead:
        name += f"  ·  {level.dead} dead"
    if level.kind == "encoder":
        _lines(u.sheet, (x_in - 0.14, y_in), [name, *words], ha="right", warns=level.dead > 0)
    else:
        _lines(u.sheet, (x_in + u.thumb_in[0] + 0.14, y_in), [name, *words], ha="left", warns=level.dead > 0)
    return x_in, y_in, *u.thumb_in


def _draw_end(u: _U, name: str, *, reference: bool) -> Box:
    """The image with the reference before the network, or what was found behind it."""
    kind = "encoder" if reference else "decoder"
    x_in, y_in = u.corner(kind, 0)
    axes = u.sheet.axes(x_in, y_in, *u.thumb_in)
    u.scene.draw_image(axes)
    (u.scene.draw_reference if reference else u.scene.draw_prediction)(axes)
    sides = " x ".join(map(str, u.scene.window.geometry.shape))
    if reference:
        words = [name, f"{sides} voxels", f"of {spacing_of(u.scene, u.scene.window.geometry.shape)} mm"]
        words += [] if u.scene.window.classes is None else ["dashed: reference"]
        _lines(u.sheet, (x_in - 0.14, y_in), words, ha="right")
    else:
        _lines(u.sheet, (x_in + u.thumb_in[0] + 0.14, y_in), [name], ha="left")
        _labels(u, (x_in + u.thumb_in[0] + 0.14, y_in + 1.5 * _LINE_IN))
    _letters(axes, u.scene.view.left_right_top_bottom)
    return x_in, y_in, *u.thumb_in


def _labels(u: _U, place: Place) -> None:
    """The first labels, in their colours."""
    most = max(1, int((u.row_in - _ROW_GAP_IN) / _LINE_IN) - 2)
    for row, label in enumerate(u.scene.schema.labels[:most]):
        y_in = place[1] + row * _LINE_IN + 0.09
        u.sheet.line([place[0], place[0] + 0.18], [y_in, y_in], color=u.scene.colour_of(row + 1), linewidth=1.8)
        name = label.name if len(label.name) <= 22 else label.name[:21] + "…"
        u.sheet.text(place[0] + 0.26, y_in, name, fontsize=9.2)
    if (more := len(u.scene.schema.labels) - most) > 0:
        u.sheet.text(place[0], place[1] + most * _LINE_IN + 0.09, f"and {more} more", fontsize=8, color=FAINT)


def _lines(sheet: Sheet, place: Place, lines: Sequence[str], *, ha: str, warns: bool = False) -> None:
    for row, line in enumerate(lines):
        y_in = place[1] + 0.09 + row * _LINE_IN + (0.03 if row else 0.0)
        style: dict[str, Any] = {"fontsize": 9.2, "color": FAINT}
        if row == 0:
            style = {"fontsize": 11.5, "fontweight": "bold", "color": WARNING if warns else TEXT}
        sheet.text(place[0], y_in, line, ha=ha, **style)


def _letters(axes: Axes, letters: str) -> None:
    """The patient's sides, small."""
    places = (((0, 0.5), (6, 0)), ((1, 0.5), (-6, 0)), ((0.5, 1), (0, -7)), ((0.5, 0), (0, 7)))
    for letter, (place, shift_pt) in zip(letters, places, strict=True):
        write(axes, letter, place, shift_pt, fontsize=8, fontweight="bold")


def _draw_arrow(sheet: Sheet, start: Box, end: Box) -> None:
    """From edge to edge: downwards, across or upwards."""
    if abs(start[1] - end[1]) < 0.01:
        y_in = start[1] + max(0.82 * start[3], _LINES * _LINE_IN)
        a, b = (start[0] + start[2], y_in), (end[0], y_in)
    elif start[1] < end[1]:
        a, b = (start[0] + start[2] / 2, start[1] + start[3]), (end[0] + end[2] / 2, end[1])
    else:
        a, b = (start[0] + start[2] / 2, start[1]), (end[0] + end[2] / 2, end[1] + end[3])
    (xa, ya), (xb, yb) = ((x / sheet.width_in, 1 - y / sheet.height_in) for x, y in (a, b))
    arrow = FancyArrowPatch(
        (xa, ya), (xb, yb), transform=sheet.figure.transFigure, arrowstyle="-|>", mutation_scale=10,
        color=FAINT, linewidth=1.1, shrinkA=3, shrinkB=3,
    )  # fmt: skip
    sheet.figure.add_artist(arrow)


def _draw_texts(u: _U) -> None:
    name = u.scene.view.name.lower()
    u.sheet.text(_EDGE_IN, 0.36, "What flows through the network", fontsize=17, fontweight="bold")
    said = "Energy: RMS of the activations; silent: at or below zero; effective rank: directions that are used"
    u.sheet.text(_EDGE_IN, 0.66, said, fontsize=9, color=FAINT)
    notes = (
        f"Thumbnails: energy over all channels in one {name} slice, dark to bright from its own lowest to its highest. "
    )
    notes += "The patient's right is on the left of axial and coronal planes."
    u.sheet.text(_EDGE_IN, u.sheet.height_in - 0.28, notes, fontsize=8, color=FAINT)
