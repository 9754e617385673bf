"""A picture of a segmentation on its image: three planes, contours, a legend with volumes.

Radiological convention: axial and coronal planes show the patient's right on the left of the picture, sagittal
planes are seen from the patient's left. Lengths are to scale in each plane, whatever the voxels' sides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch

from pipeline.export.planes import (
    BACKGROUND,
    FAINT,
    FONT,
    TEXT,
    VIEW,
    VIEWS,
    Array,
    View,
    draw_marks,
    grey_window,
    outline,
    turned,
)
from pipeline.segmentation import Segmentation
from transforms.labels import Label
from transforms.quiet_warnings import quiet_warnings
from transforms.volume import Volume

Box = tuple[slice, slice, slice]
Rectangle = tuple[float, float, float, float]

MARGIN_MM, MARGIN_PART = 15.0, 0.35
"""What is shown around the labels: at least so many mm, and this part of their longest side."""

_DPI = 160
_WIDTH_IN, _LEGEND_IN, _EDGE_IN, _GAP_IN, _HEADER_IN, _FOOTER_IN = 12.0, 2.55, 0.25, 0.14, 0.42, 0.45
_PANEL_HEIGHT_IN = (2.4, 4.6)
_LEGEND_ROW_IN = 0.34
_MM3_PER_ML = 1000.0


@dataclass(frozen=True, eq=False)
class _Scene:
    """Image and label maps along `VIEW`, cut to what is shown."""

    image: Array
    labels: Array
    reference: Array | None
    spacing_mm: tuple[float, float, float]


@dataclass(frozen=True, eq=False)
class _Plane:
    """A view's slice: (rows, columns) arrays, row 0 on top, and the sides of a pixel across and down."""

    view: View
    image: Array
    labels: Array
    reference: Array | None
    pixel_mm: tuple[float, float]

    @property
    def size_mm(self) -> tuple[float, float]:
        """Across and down."""
        rows, columns = self.image.shape
        return columns * self.pixel_mm[0], rows * self.pixel_mm[1]


def write_overlay(
    target: Path, segmentation: Segmentation, image: Volume, *, reference: Segmentation | None = None
) -> None:
    """Write the picture of `draw_overlay` as a PNG."""
    figure = draw_overlay(segmentation, image, reference=reference)
    # A label name in a script that the font lacks is drawn as boxes.
    with quiet_warnings():
        figure.savefig(target, format="png", dpi=_DPI)


def draw_overlay(segmentation: Segmentation, image: Volume, *, reference: Segmentation | None = None) -> Figure:
    """Axial, coronal and sagittal plane, each through the slice with the largest labelled area.

    Args:
        segmentation: filled and outlined in the colours of its schema.
        image: shown between `WINDOW_PERCENTILES` of what is in the picture.
        reference: outlined with white dashes; the same schema.

    Raises:
        ValueError: image and reference are not on the grid of the segmentation.
    """
    for other in (image, reference):
        difference = other and segmentation.geometry.difference(other.geometry)
        if difference:
            raise ValueError(f"a picture needs one grid, found {difference}")
    scene = _scene(segmentation, image, reference)
    planes = [_plane(view, scene) for view in VIEWS]
    figure, boxes = _canvas([plane.size_mm[0] / plane.size_mm[1] for plane in planes])
    window = grey_window(np.concatenate([plane.image.ravel() for plane in planes]))
    for plane, box in zip(planes, boxes[:-1], strict=True):
        axes = figure.add_axes(box)
        _draw_image(axes, plane, window)
        _draw_labels(axes, plane, segmentation.schema.labels)
        draw_marks(axes, plane.view, plane.size_mm)
    _draw_legend(figure, boxes[-1], segmentation, has_reference=reference is not None)
    _draw_notes(figure, segmentation)
    return figure


def _scene(segmentation: Segmentation, image: Volume, reference: Segmentation | None) -> _Scene:
    geometry = segmentation.geometry
    labels = turned(segmentation.label_map, geometry)
    expected = None if reference is None else turned(reference.label_map, geometry)
    lowest = float(image.voxels.min())
    spacing_mm = geometry.orthogonal().oriented(VIEW).spacing_mm
    box = _box(labels.astype(bool) if expected is None else (labels != 0) | (expected != 0), spacing_mm)
    return _Scene(
        image=turned(image.voxels, geometry, fill=lowest)[box],
        labels=labels[box],
        reference=None if expected is None else expected[box],
        spacing_mm=spacing_mm,
    )


def _box(labelled: Array, spacing_mm: Sequence[float]) -> Box:
    """The labels and some of what lies around them; everything when there are none."""
    if not labelled.any():
        return slice(None), slice(None), slice(None)
    ranges = [np.flatnonzero(labelled.any(axis=tuple({0, 1, 2} - {axis}))) for axis in range(3)]
    sides_mm = [(r[-1] - r[0] + 1) * s for r, s in zip(ranges, spacing_mm, strict=True)]
    margin_mm = max(MARGIN_MM, MARGIN_PART * max(sides_mm))
    i, j, k = (
        slice(max(0, int(r[0] - margin_mm / s)), int(r[-1] + margin_mm / s) + 2)
        for r, s in zip(ranges, spacing_mm, strict=True)
    )
    return i, j, k


def _plane(view: View, scene: _Scene) -> _Plane:
    searched = scene.labels if scene.labels.any() or scene.reference is None else scene.reference
    areas = np.count_nonzero(searched, axis=(view.across, view.down))
    index = int(areas.argmax()) if areas.any() else len(areas) // 2

    def cut(voxels: Array) -> Array:
        return np.asarray(np.moveaxis(voxels, view.through, 0)[index].T)

    return _Plane(
        view=view,
        image=cut(scene.image).astype(np.float32),
        labels=cut(scene.labels),
        reference=None if scene.reference is None else cut(scene.reference),
        pixel_mm=(scene.spacing_mm[view.across], scene.spacing_mm[view.down]),
    )


def _canvas(aspects: Sequence[float]) -> tuple[Figure, list[Rectangle]]:
    """A figure whose panels have one height, and the boxes of the panels and, last, of the legend."""
    around_in = 2 * _EDGE_IN + _LEGEND_IN + (len(aspects) + 1) * _GAP_IN
    panel_in = float(np.clip((_WIDTH_IN - around_in) / sum(aspects), *_PANEL_HEIGHT_IN))
    widths_in = [panel_in * aspect for aspect in aspects]
    width_in, height_in = around_in + sum(widths_in), _HEADER_IN + panel_in + _FOOTER_IN
    figure = Figure(figsize=(width_in, height_in), facecolor=BACKGROUND)
    FigureCanvasAgg(figure)
    boxes: list[Rectangle] = []
    left_in = _EDGE_IN
    for box_in in (*widths_in, _LEGEND_IN):
        if len(boxes) == len(aspects):
            left_in += _GAP_IN
        boxes.append((left_in / width_in, _FOOTER_IN / height_in, box_in / width_in, panel_in / height_in))
        left_in += box_in + _GAP_IN
    return figure, boxes


def _draw_image(axes: Axes, plane: _Plane, window: tuple[float, float]) -> None:
    width_mm, height_mm = plane.size_mm
    extent = (0.0, width_mm, height_mm, 0.0)
    axes.imshow(plane.image, cmap="gray", vmin=window[0], vmax=window[1], extent=extent, interpolation="lanczos")
    axes.set(xlim=(0, width_mm), ylim=(height_mm, 0))
    axes.set_axis_off()


def _draw_labels(axes: Axes, plane: _Plane, labels: Sequence[Label]) -> None:
    for label in labels:
        colour = _colour(label)
        if (plane.labels == label.id).any():
            edge = outline(plane.labels == label.id, plane.pixel_mm)
            axes.contourf(*edge, levels=[0.5, 2.0], colors=[colour], alpha=0.35)
            axes.contour(*edge, levels=[0.5], colors=[colour], linewidths=1.8)
    for label in labels:
        if plane.reference is not None and (plane.reference == label.id).any():
            edge = outline(plane.reference == label.id, plane.pixel_mm)
            axes.contour(*edge, levels=[0.5], colors=["white"], linewidths=1.3, linestyles=[(0, (3.5, 2.0))])


def _draw_legend(figure: Figure, box: Rectangle, segmentation: Segmentation, *, has_reference: bool) -> None:
    """A row a label: colour, name, volume. What has no room is counted in the last row."""
    width_pt, height_pt = (72 * float(n) for n in figure.get_size_inches() * box[2:])
    axes = figure.add_axes(box)
    axes.set(xlim=(0, width_pt), ylim=(height_pt, 0))
    axes.set_axis_off()
    row_pt = 72 * _LEGEND_ROW_IN
    labels = segmentation.schema.labels
    room = int(height_pt / row_pt) - (1 if has_reference else 0)
    shown = labels if len(labels) <= room else labels[: room - 1]
    for row, label in enumerate(shown):
        voxels = np.count_nonzero(segmentation.label_map == label.id)
        volume_ml = voxels * segmentation.geometry.voxel_volume_mm3 / _MM3_PER_ML
        _draw_row(axes, (row + 0.5) * row_pt, label, volume_ml)
    y_pt = (len(shown) + 0.5) * row_pt
    style: dict[str, Any] = {"color": FAINT, "fontsize": 9.5, "fontfamily": FONT, "va": "center"}
    if len(shown) < len(labels):
        axes.text(24, y_pt, f"and {len(labels) - len(shown)} more", **style)
        y_pt += row_pt
    if has_reference:
        axes.add_line(Line2D([1, 15], [y_pt, y_pt], color="white", linewidth=1.3, linestyle=(0, (3.5, 2.0))))
        axes.text(24, y_pt, "Reference", **style)


def _draw_row(axes: Axes, y_pt: float, label: Label, volume_ml: float) -> None:
    swatch = FancyBboxPatch((3, y_pt - 4), 10, 8, boxstyle="round,pad=1.5", linewidth=1.4)
    swatch.set(facecolor=(*_colour(label), 0.45), edgecolor=_colour(label))
    axes.add_patch(swatch)
    colour = TEXT if volume_ml > 0 else FAINT
    name = label.name if len(label.name) <= 21 else label.name[:20] + "…"
    style: dict[str, Any] = {"color": colour, "fontsize": 10, "fontfamily": FONT, "va": "center"}
    # Names are text, not mathematics between dollar signs.
    axes.text(24, y_pt, name, parse_math=False, **style)
    axes.text(axes.get_xlim()[1], y_pt, _volume(volume_ml), ha="right", **style)


def _volume(volume_ml: float) -> str:
    if volume_ml == 0:
        return "not found"
    if volume_ml < 0.005:
        return "< 0.01 ml"
    return f"{volume_ml:.{2 if volume_ml < 10 else 1 if volume_ml < 100 else 0}f} ml"


def _draw_notes(figure: Figure, segmentation: Segmentation) -> None:
    width_in, height_in = figure.get_size_inches()
    y = 0.45 * _FOOTER_IN / height_in
    style: dict[str, Any] = {"color": FAINT, "fontsize": 8.5, "fontfamily": FONT, "va": "center"}
    left, right = _EDGE_IN / width_in, 1 - _EDGE_IN / width_in
    figure.text(left, y, "Radiological convention: the patient's right is on the left of the picture", **style)
    maker = f"{segmentation.algorithm.name} {segmentation.algorithm.version}".strip()
    figure.text(right, y, f"{maker[:60]} · for research, not for diagnosis", ha="right", parse_math=False, **style)


def _colour(label: Label) -> tuple[float, float, float]:
    r, g, b = (c / 255 for c in label.colour)
    return r, g, b
