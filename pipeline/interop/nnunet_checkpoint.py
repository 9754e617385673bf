"""A checkpoint of nnU-Net v2, read as data: tensors, plain values and NumPy's numbers, and nothing that could run.

Source: nnUNetTrainer.save_checkpoint of nnU-Net v2 (MIC-DKFZ/nnUNet), which pickles its log with NumPy's scalars.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from pipeline.errors import BundleError
from pipeline.files import sha256_of_file

_NUMBERS = {"b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"}
_NAMES_SHOWN = 3
_WRAPPERS = ("module.", "_orig_mod.")
"""What DistributedDataParallel and torch.compile put before a weight's name."""


@dataclass(frozen=True, eq=False)
class NnunetCheckpoint:
    """What of a checkpoint decides predictions. `mirror_axes` are those of the network's input, without batch and
    channels; `weights` float32 by nnU-Net's names.
    """

    weights: dict[str, Tensor]
    configuration: str
    trainer: str
    mirror_axes: tuple[int, ...]
    epochs: int
    sha256: str


def read_checkpoint(path: Path) -> NnunetCheckpoint:
    """Read `path` without running anything that stands in it.

    Raises:
        BundleError: it cannot be read, holds what is not data (named), or is no checkpoint of nnU-Net v2.
    """
    document = _load(path)
    weights = document.get("network_weights") if isinstance(document, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise BundleError(f"{path}: not a checkpoint of nnU-Net v2 (no network_weights of tensors in it)")
    for name, value in weights.items():
        _check_weight(name, value, path)
    arguments, trainer = document.get("init_args"), document.get("trainer_name")
    if not isinstance(arguments, dict) or not isinstance(arguments.get("configuration"), str):
        raise BundleError(f"{path}: not a checkpoint of nnU-Net v2 (init_args names no configuration)")
    axes, epochs = document.get("inference_allowed_mirroring_axes") or (), document.get("current_epoch")
    if not isinstance(axes, list | tuple) or not all(isinstance(axis, int) for axis in axes):
        raise BundleError(f"{path}: inference_allowed_mirroring_axes: found {axes!r}, expected numbers of axes")
    return NnunetCheckpoint(
        {_plain_name(name): _as_float32(value) for name, value in weights.items()},
        arguments["configuration"],
        str(trainer),
        tuple(sorted(axes)),
        epochs if isinstance(epochs, int) else 0,
        sha256_of_file(path),
    )


class _NumberType:
    """Stands in for numpy.dtype while a checkpoint is read: knows numbers of a fixed size and nothing else."""

    def __init__(self, code: str, *_: Any) -> None:
        if code not in _NUMBERS:
            raise ValueError(f"a NumPy value of type {code!r} is not a plain number")
        self.code = code

    def __setstate__(self, state: Any) -> None:
        """`state` is what numpy.dtype pickles; its byte order is in the second place."""
        if isinstance(state, tuple) and len(state) > 1 and state[1] == ">":
            self.code = f">{self.code}"


def _number(kind: _NumberType, data: bytes) -> float | int | bool:
    """Stands in for numpy.core.multiarray.scalar."""
    found: float | int | bool = np.frombuffer(data, dtype=np.dtype(kind.code), count=1)[0].item()
    return found


_ALLOWED: list[Any] = [
    (_number, "numpy._core.multiarray.scalar"),
    (_number, "numpy.core.multiarray.scalar"),
    (_NumberType, "numpy.dtype"),
]


def _load(path: Path) -> Any:
    if not path.is_file():
        raise BundleError(f"{path}: no such file")
    try:
        with safe_globals(_ALLOWED):
            foreign = get_unsafe_globals_in_checkpoint(path)
            if foreign:
                raise _foreign(path, sorted(foreign))
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except BundleError:
        raise
    except Exception as error:  # what torch raises of a file that only claims to be one is not to be listed
        raise BundleError(f"{path}: not a readable checkpoint ({type(error).__name__}); copy it again") from error


def _foreign(path: Path, names: list[str]) -> BundleError:
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return BundleError(
        f"{path}: refused, since reading it would call {', '.join(names[:_NAMES_SHOWN])}{more}; a checkpoint of "
        "nnU-Net holds tensors and plain values alone"
    )


def _check_weight(name: Any, value: Tensor, path: Path) -> None:
    """Raise BundleError unless it is what a trained network has: a name, and real, finite numbers that are there."""
    found = None
    if not isinstance(name, str):
        found = f"a weight named {name!r}, expected text"
    elif value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
        kind = "quantised" if value.is_quantized else str(value.layout).removeprefix("torch.")
        found = f"{name} as a {kind} tensor on '{value.device.type}', expected a plain one with its values"
    elif value.is_complex():
        found = f"{name} in complex numbers, expected real ones"
    elif not _as_float32(value).isfinite().all():
        found = f"{name} with values that are not finite, which gives no prediction; its training failed"
    if found:
        raise BundleError(f"{path}: network_weights: found {found}; take another checkpoint")


def _plain_name(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.removeprefix(wrapper)
    return name


def _as_float32(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value
