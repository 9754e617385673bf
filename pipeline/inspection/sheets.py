"""Picture sheets of what flows through a network: one a level, channel by channel, beside the image.

Channels are drawn with one colour scale a sheet, which is perceptually uniform and colour-blind safe (viridis), in the
order of what they know of the labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor, nn

from pipeline.export.planes import BACKGROUND, FAINT, FONT, TEXT, Array
from pipeline.files import atomic_path
from pipeline.inspection.figures import ChannelSums, LevelFigures
from pipeline.inspection.scene import DASHES, Scene, grid_shape
from transforms.quiet_warnings import quiet_warnings

MOST_CHANNELS = 24
"""That are drawn of a level."""

MOST_LABELS = 8
"""That are named beside it."""

COLOURS = "viridis"
SCALE_PERCENTILES = (0.5, 99.5)
"""Of all that a sheet shows: what becomes the ends of its colour scale."""

WARNING = "#f0b429"
DPI = 130

_EDGE_IN, _GAP_IN, _HEADER_IN, _LINE_IN = 0.3, 0.42, 1.0, 0.19
_LEFT_IN, _GRID_IN, _BAR_IN = 3.9, 9.0, 0.36
_MOST_HEIGHT_IN = 6.6
_TILE_GAP_IN = (0.09, 0.3)
_MOST_COLUMNS = 8


@dataclass(frozen=True, eq=False)
class Channel:
    """One channel of a level in the scene's plane.

    `told` is the part of its variance over the patch that lies between the labels, None where none are known; `worth`
    is what channels are ordered by: the deviation between the labels, or the energy where none are known.
    """

    number: int
    pixels: Array
    told: float | None
    worth: float
    dead: bool


def write_sheets(
    folder: Path, scene: Scene, activations: Mapping[str, Tensor], figures: Sequence[LevelFigures]
) -> list[Path]:
    """Draw each level of `figures` as NAME.png in `folder` ('encoder_1.png'); `activations` as `record_levels` gives.

    A skip that hands on what the encoder found, as it is, has no sheet of its own: the encoder's says that it is it.

    Raises:
        RunError: a file cannot be written.
    """
    written = []
    skips = {level.name: is_encoder(activations, level) for level in figures if level.kind == "skip"}
    for level in figures:
        if skips.get(level.name):
            continue
        title = level.name
        if level.kind == "encoder" and skips.get(f"skip {level.level}"):
            title = f"{level.name}, and skip {level.level}"
        target = folder / f"{level.name.replace(' ', '_')}.png"
        save(draw_sheet(scene, activations[level.name], level, title=title), target)
        written.append(target)
    return written


def is_encoder(activations: Mapping[str, Tensor], skip: LevelFigures) -> bool:
    """Whether a skip hands on what the encoder found, as it is."""
    source = activations.get(f"encoder {skip.level}")
    return source is not None and torch.equal(source, activations[skip.name])


def draw_sheet(scene: Scene, features: Tensor, level: LevelFigures, *, title: str | None = None) -> Figure:
    """The image with both outlines, and the channels of a level (1, C, ...) that change most with the labels."""
    ranked = channels_of(scene, features)
    shown = ranked[:MOST_CHANNELS]
    aspect = scene.size_mm[0] / scene.size_mm[1]
    columns = grid_shape(len(shown), aspect, (_GRID_IN, _MOST_HEIGHT_IN), most=_MOST_COLUMNS, gap=_TILE_GAP_IN)
    rows = -(-len(shown) // columns)
    tile_in = _tile(aspect, columns, rows)
    grid_in = columns * (tile_in[0] + _TILE_GAP_IN[0]), rows * (tile_in[1] + _TILE_GAP_IN[1])
    left_in = min(_LEFT_IN, 0.72 * aspect * _MOST_HEIGHT_IN)
    notes = [*_legend(scene), *_notes(scene, ranked)]
    body_in = max(grid_in[1] + _BAR_IN, left_in / aspect + 0.25 + _LINE_IN * len(notes))
    sheet = Sheet(2 * _EDGE_IN + _LEFT_IN + _GAP_IN + max(grid_in[0], 6.0), _HEADER_IN + body_in + _EDGE_IN)
    axes = sheet.axes(_EDGE_IN, _HEADER_IN, left_in, left_in / aspect)
    scene.draw_image(axes)
    scene.draw_prediction(axes)
    scene.draw_reference(axes)
    scene.draw_marks(axes)
    scale = Normalize(*_limits(shown))
    start_in = _EDGE_IN + _LEFT_IN + _GAP_IN
    for at, channel in enumerate(shown):
        x_in = start_in + (at % columns) * (tile_in[0] + _TILE_GAP_IN[0])
        y_in = _HEADER_IN + (at // columns) * (tile_in[1] + _TILE_GAP_IN[1])
        _draw_channel(sheet.axes(x_in, y_in, *tile_in), scene, channel, scale)
    _draw_scale(sheet, (start_in, _HEADER_IN + grid_in[1]), scale)
    _draw_title(sheet, title or level.name, scene, level)
    _draw_notes(sheet, notes, _HEADER_IN + left_in / aspect + 0.28)
    return sheet.figure


def channels_of(scene: Scene, features: Tensor) -> list[Channel]:
    """Of a level (1, C, ...): those first that change most with the labels, or have most energy where none are known.

    Dead ones, as `LevelFigures` counts them, come last.
    """
    found = scene.level(features)
    planes, values = scene.plane(found), found.reshape(len(found), -1).astype(np.float64)
    energies = np.sqrt(np.square(values).mean(axis=1))
    dead = ChannelSums.of(features).dead.tolist()
    shares = _label_shares(scene, found.shape[1:])
    told: list[float | None] = [None] * len(found)
    worth = energies
    if shares is not None:
        between, whole = _variances(values, shares)
        told = list(np.divide(between, whole, out=np.zeros_like(between), where=whole > 0))
        worth = np.sqrt(between)
    order = sorted(range(len(found)), key=lambda n: (dead[n], -float(worth[n])))
    return [Channel(n, planes[n], told[n], float(worth[n]), dead[n]) for n in order]


def _label_shares(scene: Scene, shape: Sequence[int]) -> Array | None:
    """(classes, voxels): the part of each of a level's voxels that a class fills; None where no label is known."""
    classes = scene.window.classes
    count = scene.schema.class_count
    if classes is None or not bool(((classes > 0) & (classes < count)).any()):
        return None
    known = torch.stack([classes.cpu() == number for number in range(count)]).float()
    i, j, k = shape
    return nn.functional.adaptive_avg_pool3d(known, (i, j, k)).flatten(1).double().numpy()


def _variances(values: Array, shares: Array) -> tuple[Array, Array]:
    """Of channels (C, voxels): the variance between the classes, and all of it (eta squared is their ratio)."""
    filled, every = shares.sum(axis=1), shares.sum(axis=0)
    means = values @ shares.T / np.maximum(filled, 1e-12)
    mean = (values @ every / every.sum())[:, None]
    between = (np.square(means - mean) * filled).sum(axis=1) / every.sum()
    return between, (np.square(values - mean) * every).sum(axis=1) / every.sum()


@dataclass(frozen=True)
class Note:
    """A line below the image; with a colour it explains an outline."""

    text: str
    colour: tuple[float, float, float] | str | None = None


class Sheet:
    """A dark figure whose parts are placed in inches from its upper left corner."""

    def __init__(self, width_in: float, height_in: float) -> None:
        self.width_in, self.height_in = width_in, height_in
        self.figure = Figure(figsize=(width_in, height_in), facecolor=BACKGROUND)
        FigureCanvasAgg(self.figure)

    def axes(self, x_in: float, y_in: float, width_in: float, height_in: float) -> Axes:
        """A panel."""
        bottom_in = self.height_in - y_in - height_in
        box = (x_in / self.width_in, bottom_in / self.height_in, width_in / self.width_in, height_in / self.height_in)
        axes: Axes = self.figure.add_axes(box)
        return axes

    def text(self, x_in: float, y_in: float, text: str, **style: Any) -> None:
        """Letters as they are, no mathematics between dollar signs."""
        style = {"color": TEXT, "fontsize": 9, "fontfamily": FONT, "va": "center", "parse_math": False, **style}
        self.figure.text(x_in / self.width_in, 1 - y_in / self.height_in, text, **style)

    def line(self, xs_in: Sequence[float], ys_in: Sequence[float], **style: Any) -> None:
        """A line between places."""
        xs, ys = [x / self.width_in for x in xs_in], [1 - y / self.height_in for y in ys_in]
        self.figure.add_artist(Line2D(xs, ys, transform=self.figure.transFigure, **{"color": FAINT, **style}))


def save(figure: Figure, target: Path) -> None:
    """As PNG.

    Raises:
        RunError: the file cannot be written.
    """
    # A label name in a script that the font lacks is drawn as boxes.
    with quiet_warnings(), atomic_path(target) as temporary:
        figure.savefig(temporary, format="png", dpi=DPI)


def _tile(aspect: float, columns: int, rows: int) -> tuple[float, float]:
    across = _GRID_IN / columns - _TILE_GAP_IN[0]
    down = _MOST_HEIGHT_IN / rows - _TILE_GAP_IN[1]
    width_in = min(across, down * aspect, 2.6)
    return width_in, width_in / aspect


def _limits(shown: Sequence[Channel]) -> tuple[float, float]:
    values = np.concatenate([channel.pixels.ravel() for channel in shown])
    low, high = (float(v) for v in np.percentile(values, SCALE_PERCENTILES))
    return low, max(high, low + 1e-6)


def _draw_channel(axes: Axes, scene: Scene, channel: Channel, scale: Normalize) -> None:
    scene.draw(axes, channel.pixels, cmap=COLOURS, norm=scale)
    if channel.dead:
        axes.plot([0, 1], [0, 1], transform=axes.transAxes, color=WARNING, linewidth=1.2)
        axes.plot([0, 1], [1, 0], transform=axes.transAxes, color=WARNING, linewidth=1.2)
    else:
        scene.draw_reference(axes, width=0.7)
    said = f"{channel.number}" + (
        " dead" if channel.dead else "" if channel.told is None else f"  ·  {100 * channel.told:.0f} %"
    )
    axes.annotate(
        said,
        (0, 1),
        xytext=(0, 3),
        xycoords="axes fraction",
        textcoords="offset points",
        fontsize=8,
        fontfamily=FONT,
        color=WARNING if channel.dead else FAINT,
    )


def _draw_scale(sheet: Sheet, place_in: tuple[float, float], scale: Normalize) -> None:
    axes = sheet.axes(*place_in, 2.6, 0.11)
    bar = sheet.figure.colorbar(ScalarMappable(scale, COLOURS), cax=axes, orientation="horizontal")
    bar.outline.set_visible(False)
    axes.tick_params(colors=FAINT, labelsize=7.5, length=2, labelfontfamily=FONT)
    sheet.text(
        place_in[0] + 2.75, place_in[1] + 0.055, "activation, one scale for all of the sheet", color=FAINT, fontsize=8
    )


def _draw_title(sheet: Sheet, title: str, scene: Scene, level: LevelFigures) -> None:
    """Title and figures."""
    sheet.text(_EDGE_IN, 0.33, title[0].upper() + title[1:], fontsize=17, fontweight="bold")
    start_in = _EDGE_IN + _LEFT_IN + _GAP_IN
    sheet.text(start_in, 0.25, size_of(scene, level), fontsize=10, color=FAINT)
    sheet.text(start_in, 0.5, "   ·   ".join(told(level)), fontsize=11)
    if level.dead:
        count = "1 dead channel" if level.dead == 1 else f"{level.dead} dead channels"
        sheet.text(sheet.width_in - _EDGE_IN, 0.25, count, fontsize=11, color=WARNING, ha="right", fontweight="bold")


def _legend(scene: Scene) -> list[Note]:
    """The labels with their colours, and the reference."""
    labels = scene.schema.labels
    shown = labels if len(labels) <= MOST_LABELS else labels[: MOST_LABELS - 1]
    rows = [Note(label.name, scene.colour_of(number)) for number, label in enumerate(shown, start=1)]
    if len(shown) < len(labels):
        rows.append(Note(f"and {len(labels) - len(shown)} more labels"))
    return rows if scene.window.classes is None else [*rows, Note("reference", "white")]


def _notes(scene: Scene, ranked: Sequence[Channel]) -> list[Note]:
    """What the tiles are, and what their numbers say."""
    hidden = ranked[MOST_CHANNELS:]
    which = f"Shown: {MOST_CHANNELS} of {len(ranked)} channels" if hidden else "Shown: all channels"
    dead = sum(channel.dead for channel in hidden)
    first = f"{which}; {dead} dead ones are not" if dead else which
    lines = ["", f"{first}."]
    if ranked[0].told is None:
        lines += ["Those with most energy come first, by their numbers from 0."]
    else:
        lines += [
            "Those come first that change most with the labels.",
            "Above each: its number, from 0, and the part of its",
            "variance that the labels explain.",
        ]
    lines += ["The patient's right is on the left of axial and coronal planes."]
    return [Note(line) for line in lines]


def _draw_notes(sheet: Sheet, notes: Sequence[Note], top_in: float) -> None:
    for row, note in enumerate(notes):
        y_in = top_in + _LINE_IN * row
        if note.colour is None:
            sheet.text(_EDGE_IN, y_in, note.text, fontsize=8, color=FAINT)
            continue
        dashes: Any = DASHES if note.colour == "white" else "-"
        sheet.line([_EDGE_IN, _EDGE_IN + 0.22], [y_in, y_in], color=note.colour, linestyle=dashes, linewidth=1.6)
        sheet.text(_EDGE_IN + 0.32, y_in, note.text, fontsize=9)


def size_of(scene: Scene, level: LevelFigures) -> str:
    """Channels and voxels of a level, in words."""
    count = f"{level.channels} channels" if level.channels != 1 else "1 channel"
    sides = " x ".join(map(str, level.shape))
    return f"{count} of {sides} voxels of {spacing_of(scene, level.shape)} mm"


def spacing_of(scene: Scene, shape: Sequence[int]) -> str:
    """Sides in mm of the voxels of a level, whose (I, J, K) cover the patch; of a 2D network's, in its plane."""
    geometry = scene.window.geometry
    sides = zip(geometry.spacing_mm, geometry.shape, strict=True)
    along_mm = [mm * n for mm, n in sides if len(shape) == 3 or n > 1]
    return " x ".join(f"{total / n:.3g}" for total, n in zip(along_mm, shape, strict=True))


def told(level: LevelFigures) -> tuple[str, str, str]:
    """The three figures of a level that people look at, in words."""
    rank = f"effective rank {level.effective_rank:.1f} of {level.channels}"
    return f"energy {level.energy:.3g}", f"{100 * level.sparsity:.0f} % silent", rank
