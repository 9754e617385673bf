"""What is written down of MONAI's networks, measured again: weights, bytes kept for backward, operations."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pipeline.models.cost import kept_bytes, patch_flops, step_gb, weight_count
from pipeline.models.needs import NEEDS
from pipeline.models.registry import build_network
from pipeline.models.spec import UNetSpec

OTHERS = [name for name, needs in NEEDS.items() if not needs.ours]


def spec_for(name: str, dimensions: int, **choices: Any) -> UNetSpec:
    """As the planner makes it, of two channels and five classes."""
    features = NEEDS[name].features or (8, 16, 32)
    stages = len(features)
    values: dict[str, Any] = {
        "dimensions": dimensions,
        "in_channels": 2,
        "out_channels": 5,
        "features": features,
        "strides": ((1,) * dimensions, *((2,) * dimensions,) * (stages - 1)),
        "kernel_shapes": ((3,) * dimensions,) * stages,
        "encoder_blocks": (2,) * stages,
        "decoder_blocks": (2,) * (stages - 1),
    }
    return UNetSpec(**(values | choices))


def measured(network: nn.Module, image: Tensor) -> tuple[int, int]:
    """Bytes that autograd keeps beside the weights, and operations of a forward pass."""
    own = {t.untyped_storage().data_ptr() for t in itertools.chain(network.parameters(), network.buffers())}
    kept: dict[int, Any] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = network(image)
    del result
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        network(image)
    return sum(storage.nbytes() for storage in kept.values()), counter.get_total_flops()


CASES = [(name, {}) for name in OTHERS]
CASES += [("swin_unetr", {"checkpointing": True})]
CASES += [("dynunet", {"block": "residual", "encoder_blocks": (1,) * 3, "decoder_blocks": (1,) * 2})]


@pytest.mark.parametrize("dimensions", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("name", "choices"), CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_figures_of_monais_networks(name: str, choices: dict[str, Any], dimensions: int) -> None:
    spec = spec_for(name, dimensions, **choices)
    shape = (64,) * dimensions
    network = build_network(name, spec, shape)
    kept, operations = measured(network, torch.zeros(1, 2, *shape))
    assert weight_count(name, spec) == pytest.approx(sum(p.numel() for p in network.parameters()), rel=0.03)
    assert patch_flops(name, spec, shape) == pytest.approx(operations, rel=0.08)
    # Never less than there is: a residual DynUNet keeps a tenth less than our residual blocks.
    assert 0.99 * kept < kept_bytes(name, spec, shape, 1) < 1.12 * kept


def test_memory_and_work_grow_as_they_should() -> None:
    for name in NEEDS:
        spec = spec_for(name, 3)
        assert kept_bytes(name, spec, (64, 64, 64), 3) == pytest.approx(3 * kept_bytes(name, spec, (64, 64, 64), 1))
        assert patch_flops(name, spec, (64, 64, 128)) == pytest.approx(2 * patch_flops(name, spec, (64, 64, 64)))
        assert step_gb(name, spec, (64, 64, 64), 2) > 2e-9 * kept_bytes(name, spec, (64, 64, 64), 1)
