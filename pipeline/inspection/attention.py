"""Where a network looks: maps of its attention gates, and what the middle of the object attends to in a transformer.

A map says what was weighed, not why (Jain and Wallace 2019, arXiv 1902.10186).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from torch import Tensor, nn

from pipeline.export.planes import FAINT
from pipeline.inspection.scene import Scene, grid_shape
from pipeline.inspection.sheets import Sheet, save
from pipeline.models.attention import AttentionGate
from pipeline.models.transformer import BottleneckTransformer, SelfAttention, rotated
from pipeline.tiling import Triple

COLOURS, ALPHA = "magma", 0.62
"""Of a map over the image; perceptually uniform."""

EVEN = 2.0
"""The least that a transformer's scale goes up to, so that attention to all voxels alike is in its middle."""

_EDGE_IN, _HEADER_IN, _FOOTER_IN, _GAP_IN = 0.3, 1.2, 1.0, (0.3, 0.5)
_ROOM_IN, _MOST_COLUMNS = (13.0, 8.0), 4
_MOST_TILE_IN = 4.2


@dataclass(frozen=True, eq=False)
class AttentionMap:
    """One map over the patch.

    `kind` 'gate': the coefficients (0 to 1) of the gate of skip `number` (from 1, finest). 'transformer': what the
    voxel in the middle of the object attends to in layer `number` (from 1), averaged over heads, as multiples of what
    it would be if it attended to all voxels alike. `values` (1, 1, ...) as the network's features.
    """

    kind: str
    number: int
    values: Tensor


def attention_maps(network: nn.Module, image: Tensor, centre_ijk: Triple) -> tuple[AttentionMap, ...]:
    """Those of our U-Net for one patch (1, C, I, J, K), gates first; none where it has no attention.

    `centre_ijk` is the voxel of the patch that asks.
    """
    found: list[AttentionMap] = []
    with torch.inference_mode(), _listening(network, centre_ijk, tuple(image.shape[2:]), found):
        network(image)
    return tuple(sorted(found, key=lambda each: (each.kind, each.number)))


def write_attention(folder: Path, scene: Scene, maps: Sequence[AttentionMap]) -> list[Path]:
    """Draw the maps as attention_gates.png and attention_transformer.png, as far as there are any.

    Raises:
        RunError: a file cannot be written.
    """
    written = []
    for kind, name in (("gate", "attention_gates.png"), ("transformer", "attention_transformer.png")):
        shown = [each for each in maps if each.kind == kind]
        if shown:
            save(draw_attention(scene, shown), folder / name)
            written.append(folder / name)
    return written


def draw_attention(scene: Scene, maps: Sequence[AttentionMap]) -> Figure:
    """Maps of one kind over the image, one panel each, with one colour scale and the outlines of the reference."""
    gates = maps[0].kind == "gate"
    planes = [scene.plane(scene.level(each.values)[0]) for each in maps]
    highest = 1.0 if gates else max(EVEN, *(float(plane.max()) for plane in planes))
    scale = Normalize(0.0, highest)
    aspect = scene.size_mm[0] / scene.size_mm[1]
    columns = grid_shape(len(maps), aspect, _ROOM_IN, most=_MOST_COLUMNS, gap=_GAP_IN)
    rows = -(-len(maps) // columns)
    width_in = min(_ROOM_IN[0] / columns - _GAP_IN[0], aspect * (_ROOM_IN[1] / rows - _GAP_IN[1]), _MOST_TILE_IN)
    height_in = width_in / aspect
    body_in = rows * (height_in + _GAP_IN[1]) - _GAP_IN[1]
    sheet_in = max(2 * _EDGE_IN + columns * (width_in + _GAP_IN[0]) - _GAP_IN[0], 8.6)
    sheet = Sheet(sheet_in, _HEADER_IN + body_in + _FOOTER_IN)
    for at, (each, plane) in enumerate(zip(maps, planes, strict=True)):
        x_in = _EDGE_IN + (at % columns) * (width_in + _GAP_IN[0])
        y_in = _HEADER_IN + (at // columns) * (height_in + _GAP_IN[1])
        axes = sheet.axes(x_in, y_in, width_in, height_in)
        scene.draw_image(axes)
        scene.draw(axes, plane, cmap=COLOURS, norm=scale, alpha=ALPHA)
        scene.draw_reference(axes, width=0.9)
        if not gates:
            _mark_query(axes, scene)
        sheet.text(x_in, y_in - 0.13, _title(each), fontsize=10)
        if at == 0:
            scene.draw_marks(axes, named=False)
    _draw_frame(sheet, scene, scale, gates=gates)
    return sheet.figure


@contextlib.contextmanager
def _listening(
    network: nn.Module, centre_ijk: Triple, shape: tuple[int, ...], found: list[AttentionMap]
) -> Iterator[None]:
    """While entered, `found` gets the maps of each forward pass."""
    with contextlib.ExitStack() as stack:
        gates = [module for module in network.modules() if isinstance(module, AttentionGate)]
        for number, gate in enumerate(gates, start=1):
            hook = gate.register_forward_hook(_gate_listener(number, found))
            stack.callback(hook.remove)
        transformers = [module for module in network.modules() if isinstance(module, BottleneckTransformer)]
        for transformer in transformers:
            query = _Query(centre_ijk, shape)
            stack.callback(transformer.register_forward_pre_hook(query.see_grid).remove)
            for number, layer in enumerate(transformer.layers, start=1):
                attention: Any = layer.attention
                stack.callback(attention.register_forward_pre_hook(query.listener(number, found)).remove)
        yield


def _gate_listener(number: int, found: list[AttentionMap]) -> Any:
    def hear(gate: AttentionGate, inputs: tuple[Tensor, Tensor], _output: Tensor) -> None:
        found.append(AttentionMap("gate", number, gate.coefficients(*inputs).float()))

    return hear


class _Query:
    """The voxel of the bottleneck that holds the centre of the object, and what it attends to."""

    def __init__(self, centre_ijk: Triple, shape: tuple[int, ...]) -> None:
        self._parts = [(c + 0.5) / side for c, side in zip(centre_ijk, shape, strict=True) if side > 1]
        self._grid: tuple[int, ...] = ()

    def see_grid(self, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._grid = tuple(inputs[0].shape[2:])

    def listener(self, number: int, found: list[AttentionMap]) -> Any:
        def hear(attention: SelfAttention, inputs: tuple[Tensor, Any]) -> None:
            parts = self._parts if len(self._parts) == len(self._grid) else [0.5] * len(self._grid)
            place = [min(int(part * side), side - 1) for part, side in zip(parts, self._grid, strict=True)]
            weights = attention_weights(attention, *inputs, query=int(np.ravel_multi_index(place, self._grid)))
            values = weights.mean(dim=1).reshape(1, 1, *self._grid) * math.prod(self._grid)
            found.append(AttentionMap("transformer", number, values))

        return hear


def attention_weights(attention: SelfAttention, tokens: Tensor, table: Any, *, query: int) -> Tensor:
    """(B, heads, N): what token `query` of (B, N, C) attends to in each head; sums to 1 over the tokens."""
    channels = tokens.shape[-1] // attention.heads
    asked, keys = (
        part.view(*tokens.shape[:2], attention.heads, channels)
        for part in attention.query_key(tokens).float().chunk(2, dim=-1)
    )
    if table is not None:
        asked, keys = rotated(asked, table), rotated(keys, table)
    products = torch.einsum("bhc,bnhc->bhn", asked[:, query], keys)
    return (products / math.sqrt(channels)).softmax(dim=-1)


def _title(each: AttentionMap) -> str:
    values = each.values
    if each.kind == "gate":
        return f"Gate of skip {each.number}   mean {float(values.mean()):.2f}"
    shares = values.flatten() / values.sum()
    spread = float(torch.exp(-(shares * shares.clamp_min(1e-30).log()).sum()))
    return f"Layer {each.number}   attends to {spread:.0f} of {len(shares)} voxels"


def _mark_query(axes: Any, scene: Scene) -> None:
    """A cross where the voxel that asks lies, as seen in this plane."""
    centre = scene.window.centre_ijk
    seen = torch.zeros(scene.window.geometry.shape)
    seen[centre] = 1.0
    along = scene.along_view(seen.numpy()).max(axis=scene.view.through)
    rows_columns = np.argwhere(along.T == 1.0)[0]
    across_mm, down_mm = scene.spacing_mm[scene.view.across], scene.spacing_mm[scene.view.down]
    place = (rows_columns[1] + 0.5) * across_mm, (rows_columns[0] + 0.5) * down_mm
    for colour, width in (("black", 3.2), ("white", 1.6)):
        axes.plot(*place, marker="+", markersize=13, markeredgewidth=width, color=colour)


def _draw_frame(sheet: Sheet, scene: Scene, scale: Normalize, *, gates: bool) -> None:
    title = "What the attention gates let through" if gates else "What the middle of the object attends to"
    sheet.text(_EDGE_IN, 0.36, title, fontsize=16, fontweight="bold")
    said = "Coefficients of each skip: 0 shuts it, 1 lets all through"
    if not gates:
        said = "Attention of the voxel at the cross, mean of all heads; 1: as much as if it looked at all voxels alike"
    sheet.text(_EDGE_IN, 0.68, f"{said}; {scene.view.name.lower()} slice", fontsize=9, color=FAINT)
    axes = sheet.axes(_EDGE_IN, sheet.height_in - 0.74, 2.8, 0.11)
    bar = sheet.figure.colorbar(ScalarMappable(scale, COLOURS), cax=axes, orientation="horizontal")
    bar.outline.set_visible(False)
    axes.tick_params(colors=FAINT, labelsize=7.5, length=2)
    notes = "The patient's right is on the left of axial and coronal planes."
    if scene.window.classes is not None:
        notes = f"Dashed: reference. {notes}"
    sheet.text(_EDGE_IN, sheet.height_in - 0.24, notes, fontsize=8, color=FAINT)
