"""Convolutions in bfloat16 by PyTorch, everything else as PyTorch's autocast has it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.bundle import ModelBundle
from pipeline.device import cpu_has_bf16
from pipeline.errors import ConfigError


class Bfloat16Network(nn.Module):
    """A network under autocast; takes float32 and gives float32."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        with torch.autocast(image.device.type, torch.bfloat16):
            logits: Tensor = self.network(image)
        return logits.float()


def bfloat16_network(bundle: ModelBundle, device: torch.device) -> nn.Module:
    """The bundle's network in bfloat16.

    Raises:
        ConfigError: the device computes no bfloat16 itself.
    """
    require_bf16(device)
    return Bfloat16Network(bundle.network).eval()


def require_bf16(device: torch.device) -> None:
    """Raise ConfigError where bfloat16 would be emulated."""
    if device.type == "cpu" and not cpu_has_bf16():
        raise ConfigError("this CPU has no bfloat16 instructions and would take a hundred times as long; use float32")
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ConfigError("this GPU has no bfloat16; use another backend")
