"""What is drawn of a look inside a network: the plane that shows most of the object, and any level in that plane.

A level's voxels are larger than the image's, but cover the same patch; both are drawn to the same scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from torch import Tensor

from pipeline.export.planes import VIEW, VIEWS, Array, View, draw_marks, grey_window, outline
from pipeline.inspection.window import Window
from transforms.labels import LabelSchema

ENOUGH = 0.5
"""A plane with this part of the most pixels shows as much as any; of several the axial one comes first."""

DASHES = (0, (3.5, 2.0))


@dataclass(frozen=True, eq=False)
class Scene:
    """The patch that the network saw, and the classes (I, J, K) it found there; `window.classes` is the reference."""

    window: Window
    prediction: Tensor
    schema: LabelSchema

    @cached_property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Of the patch's voxels, along `VIEW`."""
        return self.window.geometry.oriented(VIEW).spacing_mm

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Of the patch, along `VIEW`."""
        return self.along_view(self.prediction.cpu().numpy()).shape

    @cached_property
    def view(self) -> View:
        """The plane that shows most of the patch: through slices that are thick or few; of one slice, the slice."""
        pixels = [self.shape[view.across] * self.shape[view.down] for view in VIEWS]
        return next(view for view, count in zip(VIEWS, pixels, strict=True) if count >= ENOUGH * max(pixels))

    @cached_property
    def part(self) -> float:
        """Where the plane lies along its axis, from 0 to 1: where most is labelled, else in the middle."""
        for classes in (self.window.classes, self.prediction):
            if classes is None:
                continue
            turned = self.along_view(classes.cpu().numpy())
            areas = np.count_nonzero(self._is_label(turned), axis=(self.view.across, self.view.down))
            if areas.any():
                return (float(areas.argmax()) + 0.5) / len(areas)
        return 0.5

    @property
    def size_mm(self) -> tuple[float, float]:
        """Of the plane, across and down."""
        width, height = (self.shape[axis] * self.spacing_mm[axis] for axis in (self.view.across, self.view.down))
        return width, height

    def plane(self, voxels: Array) -> Array:
        """Rows and columns (..., down, across) of voxels (..., i, j, k) of any resolution that cover the patch."""
        turned = self.along_view(voxels)
        through = turned.ndim - 3 + self.view.through
        count = turned.shape[through]
        cut = np.take(turned, min(int(self.part * count), count - 1), axis=through)
        return np.swapaxes(cut, -1, -2)

    def level(self, features: Tensor) -> Array:
        """Channels (C, i, j, k) of one patch's features (1, C, ...); those of a 2D network get their slice back."""
        found = features.detach()[0].float().cpu()
        flat = [axis for axis, side in enumerate(self.window.geometry.shape) if side == 1]
        if found.ndim == 3:
            found = found.unsqueeze(1 + flat[0])
        return found.numpy()

    def draw_image(self, axes: Axes) -> None:
        """The first channel of the patch in grey, to scale."""
        image = self.plane(self.window.image[0].float().cpu().numpy())
        low, high = grey_window(image)
        self.draw(axes, image, cmap="gray", vmin=low, vmax=high, interpolation="lanczos")

    def draw(self, axes: Axes, pixels: Array, **style: Any) -> Any:
        """Rows and columns of any resolution, to scale."""
        width_mm, height_mm = self.size_mm
        drawn = axes.imshow(pixels, extent=(0.0, width_mm, height_mm, 0.0), **{"interpolation": "nearest", **style})
        axes.set(xlim=(0, width_mm), ylim=(height_mm, 0))
        axes.set_axis_off()
        return drawn

    def draw_marks(self, axes: Axes, *, named: bool = True) -> None:
        """Name of the plane, sides of the patient, scale."""
        draw_marks(axes, self.view if named else replace(self.view, name=""), self.size_mm)

    def draw_prediction(self, axes: Axes, *, width: float = 1.6) -> None:
        """The outline of each label that was found, in its colour."""
        for number, lines in self._found.items():
            axes.add_collection(LineCollection(lines, colors=[self.colour_of(number)], linewidths=width))

    def draw_reference(self, axes: Axes, *, width: float = 1.2) -> None:
        """The outline of each label of the reference, in white dashes."""
        for lines in self._expected.values():
            axes.add_collection(LineCollection(lines, colors=["white"], linewidths=width, linestyles=[DASHES]))

    def colour_of(self, class_number: int) -> tuple[float, float, float]:
        """Of a class, as the schema has it."""
        r, g, b = (value / 255 for value in self.schema.labels[class_number - 1].colour)
        return r, g, b

    @cached_property
    def _found(self) -> dict[int, list[Array]]:
        return self._outlines(self.prediction)

    @cached_property
    def _expected(self) -> dict[int, list[Array]]:
        return {} if self.window.classes is None else self._outlines(self.window.classes)

    def _outlines(self, classes: Tensor) -> dict[int, list[Array]]:
        """Lines (N, 2) of positions in mm around each class of the plane; found once, drawn many times."""
        plane = self.plane(classes.cpu().numpy())
        pixel_mm = self.spacing_mm[self.view.across], self.spacing_mm[self.view.down]
        numbers = [number for number in range(1, self.schema.class_count) if (plane == number).any()]
        edges = {number: outline(plane == number, pixel_mm) for number in numbers}
        scratch = Figure().add_subplot()
        return {number: list(scratch.contour(*edge, levels=[0.5]).allsegs[0]) for number, edge in edges.items()}

    def _is_label(self, classes: Array) -> Array:
        return np.asarray((classes > 0) & (classes < self.schema.class_count))

    def along_view(self, voxels: Array) -> Array:
        """The last three axes permuted and flipped as those of the patch; a sheared patch is drawn as it is stored."""
        geometry = self.window.geometry
        axes = geometry.axis_map(geometry.oriented(VIEW))
        before = voxels.ndim - 3
        order = [*range(before), *(before + axis for axis in axes.source_axes)]
        flips = tuple(before + t for t, scale in enumerate(axes.scales) if scale < 0)
        return np.asarray(np.flip(voxels.transpose(order), flips))


def grid_shape(count: int, aspect: float, room: tuple[float, float], *, most: int, gap: Sequence[float]) -> int:
    """How many columns let `count` tiles (at most `most` a row) of width / height `aspect` be largest in `room`."""
    widths = {}
    for columns in range(1, min(count, most) + 1):
        rows = -(-count // columns)
        by_width = (room[0] - (columns - 1) * gap[0]) / columns
        by_height = aspect * ((room[1] - (rows - 1) * gap[1]) / rows)
        widths[columns] = min(by_width, by_height)
    return max(widths, key=lambda columns: widths[columns])
