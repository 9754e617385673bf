"""A network run by OpenVINO on the CPU, which gets it as ONNX in memory and tells nobody."""

from __future__ import annotations

import sys
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pipeline.backends.torch_bf16 import require_bf16
from pipeline.bundle import ModelBundle
from pipeline.errors import BundleError, ConfigError, ExportError
from pipeline.interop.network_graph import Difference, difference, has_free_sides
from pipeline.interop.onnx_export import onnx_model
from pipeline.plan import Plan

Precision = Literal["f32", "bf16"]

BF16_TOLERANCE = 0.1
"""Largest difference of a logit in bfloat16, as a part of the largest logit: eight bits, over tens of layers."""


class OpenVinoNetwork(nn.Module):
    """A compiled model as a module: (B, C, I, J, K) float32 to logits, both on the CPU; not for several threads."""

    def __init__(self, compiled: Any) -> None:
        super().__init__()
        # Where a network is, is asked of its parameters.
        self.place = nn.Parameter(torch.empty(0), requires_grad=False)
        self._request = compiled.create_infer_request()

    def forward(self, image: Tensor) -> Tensor:
        # A copy: the next request overwrites what this one gives.
        found = self._request.infer([image.contiguous().numpy()], share_inputs=True, share_outputs=False)
        return torch.from_numpy(found[0])


def bfloat16_openvino(bundle: ModelBundle, device: torch.device, *, threads: int | None) -> nn.Module:
    """The bundle's network compiled by OpenVINO in bfloat16, compared with the bundle's own before it is handed out.

    Raises:
        ConfigError: OpenVINO is not installed, the device is no CPU or has no bfloat16, or the network takes tiles of
            one size alone.
        ExportError: the logits are not the bundle's, or onnx is not installed.
    """
    require_fit(bundle.plan, device, "openvino-bf16")
    require_bf16(device)
    network = compiled(onnx_model(bundle), "bf16", threads=threads)
    _require_close(difference(bundle, network))
    return network


def int8_openvino(bundle: ModelBundle, device: torch.device, *, threads: int | None) -> nn.Module:
    """The bundle's network in eight bits, as `volseg bundle quantise` proved it, compiled by OpenVINO.

    Raises:
        ConfigError: OpenVINO is not installed, the device is no CPU, or the network takes tiles of one size alone.
        BundleError: the bundle has no such network, or not the one that was saved.
    """
    require_fit(bundle.plan, device, "openvino-int8")
    if bundle.int8 is None:
        raise BundleError(
            f"--backend openvino-int8: the bundle '{bundle.index.name}'{_fold(bundle)} has no network in eight bits; "
            "make one with `volseg bundle quantise MODEL`, or use another backend"
        )
    return compiled(bundle.int8.read(), "f32", threads=threads)


def compiled(content: bytes, precision: Precision, *, threads: int | None) -> OpenVinoNetwork:
    """A model (ONNX) for the CPU; `precision` is that of what it does not say itself.

    Raises:
        ConfigError: OpenVINO is not installed.
    """
    properties = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": threads or torch.get_num_threads(),
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
    }
    core = _core()
    network = OpenVinoNetwork(core.compile_model(core.read_model(content), "CPU", properties))
    network.eval()
    return network


def require_fit(plan: Plan, device: torch.device, name: str) -> None:
    """Raise ConfigError where OpenVINO is not installed or the backend of that `name` cannot run the plan's network."""
    silent_openvino()
    if device.type != "cpu":
        raise ConfigError(f"--backend {name}: runs on the CPU, found device {device.type}; use --backend torch there")
    if not has_free_sides(plan):
        raise ConfigError(
            f"--backend {name}: network '{plan.network}' can be recorded for tiles of one size alone; "
            "use --backend torch"
        )


def silent_openvino() -> Any:
    """The package, without its telemetry.

    Unless told otherwise on each machine, it tells a server of every import and conversion, by a package of its own
    that it does without where that is not there (openvino/tools/ovc/telemetry_utils.py).
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # as of a package not installed
    try:
        import openvino  # type: ignore[import-untyped]
    except ImportError as error:
        raise ConfigError('OpenVINO is not installed; pip install "volseg[openvino]"') from error
    return openvino


@cache
def _core() -> Any:
    """One for the process, which it does not outlive.

    Each gives the thread that makes it another stack for signals. Gone in another order than they came, they leave it
    with one that is no more, and the next Ctrl-C is a segmentation fault (OpenVINO 2026.4).
    """
    return silent_openvino().Core()


def _fold(bundle: ModelBundle) -> str:
    return "" if bundle.index.fold is None else f" (fold {bundle.index.fold})"


def _require_close(found: Difference) -> None:
    if not found.within(BF16_TOLERANCE):
        raise ExportError(
            f"--backend openvino-bf16: logits differ by {found.largest:.2g} from the bundle's own, which reach "
            f"{found.peak:.2g}; expected at most {BF16_TOLERANCE:g} of that; use --backend torch"
        )
