"""What a network holds in memory while it answers, found by running it on PyTorch's meta device: shapes, no values.

It counts for any network, whoever built it, what is alive at the same time beside its weights, and what convolutions
on a CPU take besides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

LARGEST_UNFOLDED = 20_480
"""Without oneDNN, PyTorch unfolds the input of a convolution over one volume whose channels times first two sides are
no more."""


def answer_bytes(network: nn.Module, shape: Sequence[int]) -> int | None:
    """Bytes alive at the peak of the network's answer to a batch of `shape` (B, C, I, J, K), the batch included.

    None for a network that cannot be run without values.
    """
    state = {name: torch.empty_like(t, device="meta") for name, t in _state(network)}
    counted = _Counted()
    try:
        with torch.inference_mode(False), torch.no_grad(), counted:
            image = torch.empty(tuple(shape), device="meta")
            torch.func.functional_call(network, state, (image,))
    except (RuntimeError, NotImplementedError, TypeError, AttributeError):
        return None
    return counted.peak


def _state(network: nn.Module) -> list[tuple[str, Tensor]]:
    return [*network.named_parameters(), *network.named_buffers()]


class _Counted(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the highest sum of what is alive after each operation, and what convolutions take besides."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._alive: dict[int, tuple[Any, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                self._alive[storage._cdata] = _reference(storage), storage.nbytes()
        self._alive = {key: held for key, held in self._alive.items() if not held[0].expired()}
        besides = _workspace(args, result) if "convolution" in str(func) else 0
        self.peak = max(self.peak, besides + sum(size for _, size in self._alive.values()))
        return result


def _reference(storage: torch.UntypedStorage) -> Any:
    return StorageWeakRef(storage)  # type: ignore[no-untyped-call]


def _workspace(args: Any, result: Any) -> int:
    """What a convolution takes on a CPU: its input unfolded, or its input and output in blocks of channels.

    For one of single voxels, a product of matrices, half of the output was measured at most.
    """
    image, weight = args[0], args[1]
    if math.prod(weight.shape[2:]) == 1:
        return int(result.numel() * result.element_size()) // 2
    small = image.ndim == 5 and math.prod(image.shape[:4]) <= LARGEST_UNFOLDED and len(image) == 1
    if small and not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return int(result.element_size() * result[0, 0].numel() * math.prod(weight.shape[1:]))
    return int(image.numel() * image.element_size() + result.numel() * result.element_size())
