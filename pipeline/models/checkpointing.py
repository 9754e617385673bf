"""Gradient checkpointing (Chen et al. 2016, arXiv 1604.06174) that changes not one bit of the result."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


def checkpointed(module: nn.Module, function: Callable[..., Any], *inputs: Any, random: bool) -> Any:
    """`function(*inputs)`, which runs `module`: keeps its inputs, recomputes the rest in backward.

    `random`: whether it draws random numbers, so that the recomputation has to draw the same.
    """
    return checkpoint(
        function,
        *inputs,
        use_reentrant=False,
        preserve_rng_state=random,
        context_fn=lambda: (nullcontext(), SpareRunningStatistics(module)),
    )


class SpareRunningStatistics(AbstractContextManager[None]):
    """While entered, batch normalisation updates copies of its running statistics, which are then dropped.

    A recomputed forward pass must not count its batch a second time. May be entered repeatedly.
    """

    NAMES = ("running_mean", "running_var", "num_batches_tracked")

    def __init__(self, module: nn.Module) -> None:
        self._layers = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
        self._originals: list[tuple[_BatchNorm, str, Tensor]] = []

    def __enter__(self) -> None:
        self._originals = [(bn, name, getattr(bn, name)) for bn in self._layers for name in self.NAMES]
        for layer, name, original in self._originals:
            setattr(layer, name, original.clone())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for layer, name, original in self._originals:
            setattr(layer, name, original)
        self._originals = []
