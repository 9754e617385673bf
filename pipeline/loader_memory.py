"""A batch in memory that two processes share: its voxels are written there, and a few words about them are sent.

The memory has no name and lies on no disk, so nothing of it is left when the last process that has it is gone, however
it went.
"""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from pipeline.batch import Batch

ALIGNMENT = 64


def new_memory() -> int:
    """A file descriptor of memory that can be handed to another process; empty at first."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("volseg-batch")
    with tempfile.TemporaryFile() as stream:  # elsewhere a file whose name is gone
        return os.dup(stream.fileno())


class Slot:
    """Room for one batch at a time in the memory of a descriptor; grows with what is written."""

    def __init__(self, handle: int) -> None:
        self.handle = handle
        self._map: mmap.mmap | None = None

    def write(self, batch: Batch) -> dict[str, Any]:
        """Put a batch there; gives what `read` needs to know, as JSON values."""
        values = {field.name: getattr(batch, field.name) for field in fields(batch)}
        tensors: dict[str, Any] = {}
        size = 0
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[name] = (str(value.dtype).removeprefix("torch."), tuple(value.shape), size)
                size += -(-value.nbytes // ALIGNMENT) * ALIGNMENT
        if size > os.fstat(self.handle).st_size:
            os.ftruncate(self.handle, size)
        for name, described in tensors.items():
            self._view(size, *described).copy_(values[name])
        return {"size": size, "tensors": tensors, "rest": {k: v for k, v in values.items() if k not in tensors}}

    def read(self, header: dict[str, Any]) -> Batch:
        """A copy of the batch that `header` tells of."""
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in header["rest"].items()}
        values |= {name: self._view(header["size"], *d).clone() for name, d in header["tensors"].items()}
        return Batch(**values)

    def _view(self, size: int, dtype: str, shape: tuple[int, ...], start: int) -> Tensor:
        if self._map is None or len(self._map) < size:
            self._map = mmap.mmap(self.handle, size)
        count = math.prod(shape)
        return torch.frombuffer(self._map, dtype=getattr(torch, dtype), count=count, offset=start).reshape(shape)
