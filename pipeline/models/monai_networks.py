"""Building a `MonaiNetwork`, and what it asks of the sides of a tile."""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import PlanError
from pipeline.models.monai_spec import MONAI_NETWORKS, MonaiNetwork

Sides = tuple[int, int, int]
Arguments = Mapping[str, Any]

CODE_ARGUMENTS = frozenset({"preprocess", "norm_layer"})
"""Arguments that are code, which no value can stand for."""


class Reordered(nn.Module):
    """A network with its outputs in another order."""

    def __init__(self, network: nn.Module, order: tuple[int, ...]) -> None:
        super().__init__()
        self.network = network
        self.order = list(order)

    def forward(self, image: Tensor) -> Tensor:
        outputs: Tensor = self.network(image)
        return outputs[:, self.order]


def build_monai(network: MonaiNetwork) -> nn.Module:
    """The network, with weights drawn from torch's global generator.

    Raises:
        PlanError: an argument that it does not have or that stands for code, or values that it does not take.
    """
    built: Any = _class_of(network)
    bound_arguments(network)
    try:
        # Defaults are left to it: some are deprecated, and to give them would be told of.
        module: nn.Module = built(**network.arguments)
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, AssertionError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise PlanError(f"network '{network.name}' cannot be built with its arguments: {reason}") from error
    except ImportError as error:
        raise PlanError(f"network '{network.name}': {' '.join(str(error).split())}") from error
    return Reordered(module, network.output_order) if network.output_order else module


def bound_arguments(network: MonaiNetwork) -> dict[str, Any]:
    """The arguments that the network's class takes, with the given values and its defaults for the others.

    Raises:
        PlanError: as `build_monai`, for names alone; no network of fewer or more than three dimensions is taken.
    """
    parameters = dict(inspect.signature(_class_of(network)).parameters)
    unknown = sorted(set(network.arguments) - set(parameters))
    if unknown:
        raise PlanError(f"network '{network.name}' of this MONAI has no argument '{unknown[0]}'")
    if code := sorted(name for name in CODE_ARGUMENTS & set(network.arguments) if network.arguments[name] is not None):
        raise PlanError(f"network '{network.name}': the argument '{code[0]}' is code, which is not run")
    required = [n for n, p in parameters.items() if p.default is p.empty and n not in network.arguments]
    if required:
        raise PlanError(f"network '{network.name}': the argument '{required[0]}' is missing")
    values = {n: network.arguments.get(n, p.default) for n, p in parameters.items()}
    if values.get("spatial_dims", 3) != 3:
        raise PlanError(f"network '{network.name}': spatial_dims is {values['spatial_dims']!r}, expected 3")
    return values


def side_divisors(network: MonaiNetwork) -> Sides:
    """What the sides of a tile must be divisible by.

    Raises:
        PlanError: as `bound_arguments`, or arguments that do not say it.
    """
    values = bound_arguments(network)
    try:
        i, j, k = _DIVISORS[network.name](values)
    except (TypeError, ValueError, KeyError) as error:
        raise PlanError(f"network '{network.name}': its arguments say no resolutions ({error})") from error
    return int(i), int(j), int(k)


def fixed_sides(network: MonaiNetwork) -> Sides | None:
    """The only sides that the network takes, where it was built for one shape."""
    if network.name != "UNETR":
        return None
    i, j, k = _triple(network.argument("img_size"))
    return i, j, k


def filled_monai(network: MonaiNetwork, weights: Mapping[str, Tensor]) -> nn.Module:
    """The network with these weights, in evaluation mode.

    Raises:
        PlanError: as `build_monai`, or weights that are not its own.
    """
    with torch.random.fork_rng(devices=[]):
        module = build_monai(network)
    inner = module.network if isinstance(module, Reordered) else module
    missing, unexpected = inner.state_dict().keys() - weights.keys(), weights.keys() - inner.state_dict().keys()
    if missing or unexpected:
        what, names = ("lack", missing) if missing else ("hold besides", unexpected)
        raise PlanError(
            f"the weights are not those of network '{network.name}' with its arguments: they {what} "
            f"{sorted(names)[0]} ({len(names)} such names)"
        )
    try:
        inner.load_state_dict(dict(weights), strict=True)
    except RuntimeError as error:
        first = str(error).strip().splitlines()[-1].strip()
        raise PlanError(f"the weights are not those of network '{network.name}' with its arguments: {first}") from error
    return module.eval()


def _class_of(network: MonaiNetwork) -> Any:
    module = importlib.import_module(f"monai.networks.nets.{MONAI_NETWORKS[network.name]}")
    return getattr(module, network.name)


def _triple(value: Any) -> tuple[int, ...]:
    """One number for all axes, or one an axis."""
    values = tuple(int(v) for v in value) if isinstance(value, (list, tuple)) else (int(value),) * 3
    if len(values) != 3:
        raise ValueError(f"{values} are not three numbers")
    return values


def _strides(name: str) -> Callable[[Arguments], tuple[int, ...]]:
    def divisors(values: Arguments) -> tuple[int, ...]:
        rows = [_triple(row) for row in values[name]]
        return tuple(math.prod(row[axis] for row in rows) for axis in range(3))

    return divisors


def _halvings(name: str, offset: int) -> Callable[[Arguments], tuple[int, ...]]:
    return lambda values: (2 ** (len(values[name]) + offset),) * 3


def _always(divisor: int) -> Callable[[Arguments], tuple[int, ...]]:
    return lambda _: (divisor,) * 3


_DIVISORS: dict[str, Callable[[Arguments], tuple[int, ...]]] = {
    "AttentionUnet": _strides("strides"),
    "BasicUNet": _always(16),
    "DynUNet": _strides("strides"),
    "HighResNet": _always(1),
    "MedNeXt": _halvings("blocks_down", 0),
    "SegResNet": _halvings("blocks_down", -1),
    "SegResNetDS": _halvings("blocks_down", -1),
    "SwinUNETR": lambda values: tuple(side**5 for side in _triple(values["patch_size"])),
    "UNETR": lambda values: _triple(values["img_size"]),
    "UNet": _strides("strides"),
    "VNet": _always(16),
}
"""For each of `MONAI_NETWORKS`, from all of its arguments."""
