"""What this machine can do: device, precision, memory, a nominal rate of work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch

from pipeline.config import PlanConfig, TrainConfig
from pipeline.errors import ConfigError
from pipeline.plan import Budget

CPU_GFLOPS_PER_THREAD = 60.0
"""Sustained float32 rate of a training step, per thread: 52 to 83 with 16 to 32 channels (two shared EPYC cores)."""

CPU_BF16_FACTOR = 2.0
"""How much faster a processor that gains by bfloat16 trains in it (measured 1.9 to 2.4 on an AMD EPYC)."""

CPU_BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16")
"""Without these bfloat16 is emulated, two hundred times slower than float32 (benchmarks/LOG.md)."""

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
    devices: int = 1
    """Processes on each machine, one device each."""
    nodes: int = 1
    """Machines."""
    tf32: bool = False
    """A GPU may round what it multiplies in float32 to 10 bits."""

    @property
    def processes(self) -> int:
        """In all."""
        return self.devices * self.nodes

    def torch_device(self) -> torch.device:
        """For tensors."""
        return torch.device(self.device)


def choose_hardware(settings: TrainConfig) -> Hardware:
    """The config's device and precision; `auto` takes what measures best on the device.

    A CPU gets bfloat16 only where it gains by it: the same machine always gets the same.

    Raises:
        ConfigError: a GPU is asked for and there is none, or a precision that the device cannot do.
    """
    there = torch.cuda.is_available()
    if settings.device == "cuda" and not there:
        raise ConfigError("--device / train.device: cuda is asked for but PyTorch sees no GPU; use auto or cpu")
    device: Literal["cpu", "cuda"] = "cuda" if there and settings.device != "cpu" else "cpu"
    if device == "cpu":
        return Hardware("cpu", _cpu_precision(settings))
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    if settings.precision == "bf16" and not bf16:
        raise ConfigError("train.precision: this GPU has no bfloat16; use auto, fp16 or float32")
    names: dict[str, Precision] = {
        "auto": "bf16-mixed" if bf16 else "16-mixed",
        "float32": "32-true",
        "tf32": "32-true",
        "bf16": "bf16-mixed",
        "fp16": "16-mixed",
    }
    return Hardware("cuda", names[settings.precision], tf32=settings.precision == "tf32")


def _cpu_precision(settings: TrainConfig) -> Precision:
    native = cpu_has_bf16()
    if settings.precision in ("fp16", "tf32"):
        raise ConfigError(f"train.precision: {settings.precision} is for GPUs; on a CPU use auto, bf16 or float32")
    if settings.precision == "bf16" and not native:
        raise ConfigError(
            "train.precision: this CPU has no bfloat16 instructions and would take a hundred times as long; "
            "use auto or float32"
        )
    bf16 = settings.precision == "bf16" or (settings.precision == "auto" and cpu_gains_by_bf16())
    return "bf16-mixed" if bf16 else "32-true"


def cpu_has_bf16() -> bool:
    """True when the processor multiplies bfloat16 itself."""
    return any(_capabilities().get(name, False) for name in CPU_BF16_INSTRUCTIONS)


def cpu_gains_by_bf16() -> bool:
    """True when it multiplies bfloat16 faster than float32.

    Intel's processors do so with AMX, which a virtual machine may hide. With AVX-512 alone they do no more products a
    cycle than in float32, and an update took 1.4 times as long (benchmarks/LOG.md).
    """
    found = _capabilities()
    is_intel = "intel" in str(found.get("cpu_name", "")).lower()
    return bool(found.get("amx_bf16", False)) or (cpu_has_bf16() and not is_intel)


def _capabilities() -> dict[str, Any]:
    # torch.cpu.get_capabilities came after torch 2.8; older ones stay with float32.
    ask = getattr(torch.cpu, "get_capabilities", None)
    return {} if ask is None else dict(ask())


def budget_of(hardware: Hardware, plan: PlanConfig, train: TrainConfig) -> Budget:
    """What a training on this machine may spend."""
    # Also where `steps` ends the training: a run that is repeated with its recorded steps gets the same plan.
    minutes = train.budget_minutes
    if hardware.device == "cpu":
        gflops = CPU_GFLOPS_PER_THREAD * torch.get_num_threads()
        if hardware.precision == "bf16-mixed" and cpu_gains_by_bf16():
            gflops *= CPU_BF16_FACTOR
        return Budget("cpu", plan.memory_gb or CPU_MEMORY_GB, minutes, gflops)
    total_gb = torch.cuda.get_device_properties(0).total_memory / 1e9
    memory_gb = plan.memory_gb or round(CUDA_MEMORY_SHARE * total_gb, 1)
    gflops = CUDA_GFLOPS / (2 if hardware.precision == "32-true" else 1)
    return Budget("cuda", memory_gb, minutes, gflops)


def memory_gb_of(device: torch.device) -> float | None:
    """What a training step may take on a GPU; None for a CPU, whose memory others share."""
    if device.type != "cuda":
        return None
    return CUDA_MEMORY_SHARE * float(torch.cuda.get_device_properties(device).total_memory) / 1e9


@contextmanager
def arithmetic(hardware: Hardware, *, deterministic: bool) -> Iterator[None]:
    """How a GPU computes inside: whether it rounds float32 products, and whether it gives the same bits every time.

    Deterministic mode refuses what has no deterministic version on a GPU (PyTorch's note on reproducibility), such
    as the gradient of a linear interpolation; without it, cuDNN tries which algorithms are fastest. A CPU is the same
    every time as it is.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark, torch.are_deterministic_algorithms_enabled()
    on_gpu = hardware.device == "cuda"
    _set_arithmetic(hardware.tf32, hardware.tf32, on_gpu and not deterministic, on_gpu and deterministic)
    try:
        yield
    finally:
        _set_arithmetic(*before)


def _set_arithmetic(matmul_tf32: bool, cudnn_tf32: bool, benchmark: bool, deterministic: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = matmul_tf32
    torch.backends.cudnn.allow_tf32 = cudnn_tf32
    torch.backends.cudnn.benchmark = benchmark
    torch.use_deterministic_algorithms(deterministic)


def describe(hardware: Hardware) -> str:
    """Device and arithmetic in one line."""
    names = {"32-true": "float32", "bf16-mixed": "bfloat16 and float32", "16-mixed": "float16 and float32"}
    numbers = "TF32" if hardware.tf32 else names[hardware.precision]
    if hardware.device == "cuda":
        return f"{_times(hardware)}{torch.cuda.get_device_name()}, {numbers}"
    threads = torch.get_num_threads()
    return f"{_times(hardware)}CPU with {threads} thread{'s' if threads > 1 else ''}, {numbers}"


def _times(hardware: Hardware) -> str:
    return f"{hardware.processes} x " if hardware.processes > 1 else ""


def peak_memory_gb(hardware: Hardware) -> float:
    """Highest memory so far: of the GPU's allocator, or this process's resident set."""
    if hardware.device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak) * (1 if sys.platform == "darwin" else 1024) / 1e9
