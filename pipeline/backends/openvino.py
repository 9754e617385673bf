"""A network run by OpenVINO on the CPU, which gets it as ONNX in memory and tells nobody."""

from __future__ import annotations

import sys
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pipeline.backends.torch_bf16 import require_bf16
from pipeline.bundle import ModelBundle
from pipeline.errors import ConfigError, ExportError
from pipeline.interop.network_graph import TOLERANCE, Difference, difference, has_free_sides
from pipeline.interop.onnx_export import onnx_model

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


def openvino_network(
    bundle: ModelBundle, device: torch.device, *, threads: int | None, precision: Precision
) -> nn.Module:
    """The bundle's network compiled by OpenVINO, compared with the bundle's own before it is handed out.

    Raises:
        ConfigError: OpenVINO or onnx is not installed, the device is no CPU or has no bfloat16, or the network takes
            tiles of one size alone.
        ExportError: the logits are not the bundle's.
    """
    openvino = silent_openvino()
    _require_fit(bundle, device, precision)
    properties = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": threads or torch.get_num_threads(),
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
    }
    core = openvino.Core()
    network = OpenVinoNetwork(core.compile_model(core.read_model(onnx_model(bundle)), "CPU", properties)).eval()
    _require_same(difference(bundle, network), precision)
    return network


def silent_openvino() -> Any:
    """The package, without its telemetry.

    Unless told otherwise on each machine, it tells a server of every import and conversion, by a package of its own
    that it does without where that is not there (openvino/tools/ovc/telemetry_utils.py).
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # as of a package not installed
    try:
        import openvino  # type: ignore[import-untyped]
    except ImportError as error:
        raise ConfigError('--backend openvino: OpenVINO is not installed; pip install "volseg[openvino]"') from error
    return openvino


def _require_fit(bundle: ModelBundle, device: torch.device, precision: Precision) -> None:
    if device.type != "cpu":
        raise ConfigError(f"--backend openvino: runs on the CPU, found device {device.type}; use --backend torch there")
    if precision == "bf16":
        require_bf16(device)
    if not has_free_sides(bundle.plan):
        raise ConfigError(
            f"--backend openvino: network '{bundle.plan.network}' can be recorded for tiles of one size alone; "
            "use --backend torch"
        )


def _require_same(found: Difference, precision: Precision) -> None:
    allowed = TOLERANCE if precision == "f32" else BF16_TOLERANCE
    if not found.within(allowed):
        raise ExportError(
            f"--backend openvino: logits differ by {found.largest:.2g} from the bundle's own, which reach "
            f"{found.peak:.2g}; expected at most {allowed:g} of that; use --backend torch"
        )
