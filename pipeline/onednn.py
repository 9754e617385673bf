"""Convolutions by oneDNN whatever the size of the tile, as PyTorch does for larger batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

Lengths = int | tuple[int, ...]


class OneDnnConvolutions(TorchFunctionMode):
    """While entered, 2D and 3D convolutions of float32 tensors on the CPU are done by oneDNN.

    PyTorch leaves one image of few voxels (channels x I x J up to 20480) to a slower code of its own
    (`use_mkldnn` of aten/src/ATen/native/Convolution.cpp), where a U-Net has its coarser stages: half of the time of a
    small tile. It also rounds otherwise, so that a tile alone was not what it is in a batch of two. For inference:
    nothing is recorded for backward.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if func in CONVOLUTIONS and not given and _is_for_onednn(args):
            return _convolve(*args)
        return func(*args, **given)


CONVOLUTIONS = frozenset((functional.conv2d, functional.conv3d))


def _is_for_onednn(args: tuple[Any, ...]) -> bool:
    """Modules hand over all of input, weight, bias, stride, padding, dilation and groups, in this order."""
    image, weight = args[0], args[1]
    plain = len(args) == 7 and not isinstance(args[4], str)
    return (
        plain
        and not torch.is_grad_enabled()
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and image.device.type == "cpu"
        and image.dtype == weight.dtype == torch.float32
        and image.ndim == weight.ndim
        and not torch.is_autocast_enabled("cpu")
    )


def _convolve(
    image: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Lengths,
    padding: Lengths,
    dilation: Lengths,
    groups: int,
) -> Tensor:
    axes = image.ndim - 2
    lengths = [(n,) * axes if isinstance(n, int) else n for n in (padding, stride, dilation)]
    result: Tensor = torch.ops.aten.mkldnn_convolution(image, weight, bias, *lengths, groups)
    return result
