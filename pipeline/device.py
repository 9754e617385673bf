"""What this machine can do: device, precision, memory, a nominal rate of work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from pipeline.config import PlanConfig, TrainConfig
from pipeline.errors import ConfigError
from pipeline.plan import Budget

CPU_GFLOPS_PER_THREAD = 50.0
"""Sustained float32 convolution rate of a training step, per thread (measured on two EPYC cores)."""

CUDA_GFLOPS = 20_000.0
"""Sustained mixed-precision rate of 3D convolutions on a recent data-centre GPU; halved for float32."""

CPU_MEMORY_GB = 6.0
"""Memory that a training step may take on a CPU unless the config says otherwise."""

CUDA_MEMORY_SHARE = 0.85
"""Part of a GPU's memory that a training step may take."""

Precision = Literal["32-true", "bf16-mixed", "16-mixed"]


@dataclass(frozen=True)
class Hardware:
    """The device of a run and the arithmetic used on it (names as in Lightning Fabric)."""

    device: Literal["cpu", "cuda"]
    precision: Precision

    def torch_device(self) -> torch.device:
        """For tensors."""
        return torch.device(self.device)


def choose_hardware(settings: TrainConfig) -> Hardware:
    """The config's device and precision; `auto` takes what measures best on the device.

    bfloat16 on a CPU without native support is two hundred times slower than float32, so a CPU gets float32.

    Raises:
        ConfigError: a GPU is asked for and there is none, or a precision that the device cannot do.
    """
    there = torch.cuda.is_available()
    if settings.device == "cuda" and not there:
        raise ConfigError("train.device: cuda is asked for but PyTorch sees no GPU; use auto or cpu")
    device: Literal["cpu", "cuda"] = "cuda" if there and settings.device != "cpu" else "cpu"
    if device == "cpu":
        if settings.precision not in ("auto", "float32"):
            raise ConfigError(f"train.precision: {settings.precision} is for GPUs; on a CPU use auto or float32")
        return Hardware("cpu", "32-true")
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    if settings.precision == "bf16" and not bf16:
        raise ConfigError("train.precision: this GPU has no bfloat16; use auto, fp16 or float32")
    names: dict[str, Precision] = {
        "auto": "bf16-mixed" if bf16 else "16-mixed",
        "float32": "32-true",
        "bf16": "bf16-mixed",
        "fp16": "16-mixed",
    }
    return Hardware("cuda", names[settings.precision])


def budget_of(hardware: Hardware, plan: PlanConfig, train: TrainConfig) -> Budget:
    """What a training on this machine may spend."""
    # Also where `steps` ends the training: a run that is repeated with its recorded steps gets the same plan.
    minutes = train.budget_minutes
    if hardware.device == "cpu":
        gflops = CPU_GFLOPS_PER_THREAD * torch.get_num_threads()
        return Budget("cpu", plan.memory_gb or CPU_MEMORY_GB, minutes, gflops)
    total_gb = torch.cuda.get_device_properties(0).total_memory / 1e9
    memory_gb = plan.memory_gb or round(CUDA_MEMORY_SHARE * total_gb, 1)
    gflops = CUDA_GFLOPS / (2 if hardware.precision == "32-true" else 1)
    return Budget("cuda", memory_gb, minutes, gflops)


def peak_memory_gb(hardware: Hardware) -> float:
    """Highest memory so far: of the GPU's allocator, or this process's resident set."""
    if hardware.device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak) * (1 if sys.platform == "darwin" else 1024) / 1e9
