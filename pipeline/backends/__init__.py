"""What runs a model's network: PyTorch or another runtime, in float32, bfloat16 or eight bits."""

from __future__ import annotations

import difflib
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from pipeline.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from pipeline.bundle import ModelBundle


class Backend(Protocol):
    """Gives a bundle a network with the same input and output that runs elsewhere or otherwise."""

    def __call__(self, bundle: ModelBundle, *, device: torch.device, threads: int | None) -> ModelBundle: ...


def with_backend(
    bundle: ModelBundle, name: str, *, device: torch.device | None = None, threads: int | None = None
) -> ModelBundle:
    """The bundle with a network that the backend `name` runs; 'torch' gives the bundle as it is.

    `device` is where images will be; None: where the bundle's weights are. `threads` are those of the processor that a
    runtime beside PyTorch takes; None: as many as PyTorch.

    Raises:
        ConfigError: no such backend, a package that it needs is not installed, or it cannot do this on the device.
        BundleError: the backend needs what is not in the bundle.
        ExportError: what the backend makes of the network gives other logits.
    """
    require_backend(name)
    device = device or next(bundle.network.parameters()).device
    found = BACKENDS[name](bundle, device=device, threads=threads)
    # That no label changes without dark windows was seen of PyTorch's network.
    return found if name == DEFAULT else replace(found, index=found.index.model_copy(update={"air": None}))


def require_backend(name: str) -> None:
    """Raise ConfigError if there is no backend of that name; the nearest and all others are named."""
    if name in BACKENDS:
        return
    near = difflib.get_close_matches(name, BACKENDS, n=1)
    hint = f"did you mean '{near[0]}'? " if near else ""
    raise ConfigError(f"--backend {name}: no such backend; {hint}known are {', '.join(BACKENDS)}")


def _torch(bundle: ModelBundle, *, device: torch.device, threads: int | None) -> ModelBundle:
    return bundle


def _torch_bf16(bundle: ModelBundle, *, device: torch.device, threads: int | None) -> ModelBundle:
    from pipeline.backends.torch_bf16 import bfloat16_network

    return replace(bundle, network=bfloat16_network(bundle, device))


def _openvino_bf16(bundle: ModelBundle, *, device: torch.device, threads: int | None) -> ModelBundle:
    from pipeline.backends.openvino import bfloat16_openvino

    return replace(bundle, network=bfloat16_openvino(bundle, device, threads=threads))


def _openvino_int8(bundle: ModelBundle, *, device: torch.device, threads: int | None) -> ModelBundle:
    from pipeline.backends.openvino import int8_openvino

    network = int8_openvino(bundle, device, threads=threads)
    # Its weights are others, and made again they may be others again: results are told apart by this.
    return replace(bundle, network=network, digest=bundle.int8.sha256 if bundle.int8 else bundle.digest)


DEFAULT = "torch"

BACKENDS: dict[str, Backend] = {
    DEFAULT: _torch,
    "torch-bf16": _torch_bf16,
    "openvino-bf16": _openvino_bf16,
    "openvino-int8": _openvino_int8,
}
"""Each imports what it needs when it is called. What they gain is measured by benchmarks/backends.py."""
