"""A bundle's network with its convolutions in eight bits, as ONNX: scaled by what real windows hold (ONNX Runtime)."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from pipeline.bundle import ModelBundle
from pipeline.errors import ExportError
from pipeline.interop.model_card import INPUT
from pipeline.interop.network_graph import quiet_recording
from pipeline.interop.onnx_export import onnx_model
from pipeline.tiling import Triple, lay_out, overlap, window_settings
from transforms.channels import channel_minima
from transforms.sampling import filled

Item = TypeVar("Item")


def int8_model(bundle: ModelBundle, windows: Sequence[Tensor]) -> bytes:
    """The network as ONNX in which what convolutions take and their weights are rounded to eight bits (QDQ).

    Ranges are those that `windows` (1, C, I, J, K) reach. Weights are rounded to seven bits and a sign for each output
    channel: of eight, processors without VNNI cannot add up two products, and would give other labels than those that
    were proven. The same windows give the same bytes. Source: Jacob et al., CVPR 2018 (arXiv:1712.05877).

    Raises:
        ExportError: ONNX Runtime or onnx is not installed.
    """
    plain = onnx_model(bundle)
    try:
        from onnxruntime.quantization import (  # type: ignore[import-untyped]
            QuantFormat,
            QuantType,
            quantize_static,
        )
        from onnxruntime.quantization.shape_inference import quant_pre_process  # type: ignore[import-untyped]
    except ImportError as error:
        raise ExportError('ONNX Runtime is not installed; pip install "volseg[openvino]"') from error
    with tempfile.TemporaryDirectory(prefix="volseg-int8-") as name, quiet_recording():
        given, shaped, small = (Path(name) / f"{stage}.onnx" for stage in ("given", "shaped", "small"))
        given.write_bytes(plain)
        quant_pre_process(str(given), str(shaped), skip_symbolic_shape=True)
        quantize_static(
            str(shaped),
            str(small),
            _Reader(windows),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["Conv"],
            per_channel=True,
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        return small.read_bytes()


def full_windows(bundle: ModelBundle, image: Tensor, count: int) -> list[Tensor]:
    """At most `count` windows (1, C, I, J, K) of a prepared image (C, I, J, K) as prediction cuts them.

    They are spread over those that hold something: half as many voxels above the image's mean as the fullest, or more.
    """
    settings = window_settings(bundle.plan, bundle.schema, step=bundle.index.tile_step, mirror=False)
    places = [(start, row.window) for row in lay_out(image.shape[1:], [settings]).rows for start in row.starts]
    bright = image > image.mean(dim=(1, 2, 3), keepdim=True)
    held = [int(bright[(slice(None), *overlap(*place, image.shape[1:])[1])].sum()) for place in places]
    full = [place for place, voxels in zip(places, held, strict=True) if 2 * voxels >= max(held)]
    padding = torch.zeros(len(image)) if settings.conventions.padding == "zero" else channel_minima(image)
    return [_cut(image, *place, padding)[None] for place in evenly(full, count)]


def evenly(items: Sequence[Item], count: int) -> list[Item]:
    """At most `count` of the items, evenly spread over them and in their order."""
    wanted = min(count, len(items))
    return [items[number * len(items) // wanted] for number in range(wanted)]


class _Reader:
    """Hands windows to ONNX Runtime, as it asks for them."""

    def __init__(self, windows: Sequence[Tensor]) -> None:
        self._windows: Iterator[Tensor] = iter(windows)

    def get_next(self) -> dict[str, Any] | None:
        window = next(self._windows, None)
        return None if window is None else {INPUT: window.contiguous().numpy()}


def _cut(image: Tensor, start: Triple, window: Triple, padding: Tensor) -> Tensor:
    inside, volume = overlap(start, window, image.shape[1:])
    tile = filled((len(image), *window), padding, dtype=image.dtype, device=image.device)
    tile[(slice(None), *inside)] = image[(slice(None), *volume)]
    return tile
