"""What is counted from a spec alone, against the network itself and torch's own counters."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pipeline.models.counts import activation_bytes, forward_flops, parameter_count
from pipeline.models.shape import fitting_shapes
from pipeline.models.spec import UNetSpec
from pipeline.models.unet import UNet

CHOICES: dict[str, tuple[Any, ...]] = {
    "block": ("plain", "residual"),
    "normalisation": ("instance", "none"),
    "padding": ("same", "valid"),
    "downsampling": ("strided", "max_pool"),
    "upsampling": ("transposed", "interpolated"),
    "skip": ("concatenate", "attention"),
}
EVERY_CHOICE = [dict(zip(CHOICES, values, strict=True)) for values in itertools.product(*CHOICES.values())]

FURTHER: list[dict[str, Any]] = [
    {"bottleneck": "transformer", "transformer_layers": 3, "transformer_heads": 2},
    {"bottleneck": "transformer", "transformer_layers": 1, "transformer_heads": 1, "padding": "valid"},
    {"bottleneck": "transformer", "positions": "learned", "position_grid": (5, 2, 2), "skip": "attention"},
    {"bottleneck": "transformer", "transformer_heads": 2, "block": "residual", "drop_path": 0.3},
    {"block": "residual", "decoder_block": "plain", "encoder_blocks": (1, 3, 2), "decoder_blocks": (1, 1)},
    {"block": "plain", "decoder_block": "residual", "downsampling": "max_pool", "normalisation": "none"},
    {"weight_standardisation": True, "features": (16, 24, 32)},
    {"weight_standardisation": True, "block": "residual", "normalisation": "group", "padding": "valid"},
    {"biased_convolutions": True, "block": "residual", "decoder_block": "plain", "stem_channels": 5},
    {"biased_convolutions": True, "stem_channels": 7, "padding": "valid", "downsampling": "max_pool"},
]
"""What later networks brought: transformers, decoders of other blocks, standardised weights, stems, biases."""


def named(choices: dict[str, Any]) -> str:
    return "-".join(f"{key}={value}" for key, value in choices.items())


def spec_of(**choices: Any) -> UNetSpec:
    defaults: dict[str, Any] = {
        "in_channels": 2,
        "out_channels": 3,
        "features": (8, 12, 16),
        "strides": ((1, 1, 1), (1, 2, 2), (2, 2, 2)),
        "kernel_shapes": ((1, 3, 3), (3, 3, 3), (3, 3, 3)),
        "encoder_blocks": (1, 2, 1),
        "decoder_blocks": (2, 1),
    }
    return UNetSpec(**(defaults | choices))


def kept_bytes(function: Any, network: nn.Module) -> int:
    """Bytes of all storages that autograd keeps for backward, but for the network's own weights."""
    own = {t.untyped_storage().data_ptr() for t in itertools.chain(network.parameters(), network.buffers())}
    kept: dict[int, Any] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = function()
    del result
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("choices", [*EVERY_CHOICE[::3], *FURTHER], ids=named)
def test_counts_are_those_of_the_network(choices: dict[str, Any]) -> None:
    spec = spec_of(**choices, deep_supervision=choices.get("padding", "same") == "same")
    _, shape = fitting_shapes(spec, (20, 20, 20))
    network = UNet(spec)
    image = torch.zeros(2, 2, *shape)
    kept = kept_bytes(lambda: network(image), network)
    # Torch counts attention's products where it is written out as such, and not in the CPU's fused kernel.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        network(image)
    assert parameter_count(spec) == sum(p.numel() for p in network.parameters())
    assert 2 * forward_flops(spec, shape) == counter.get_total_flops()
    # What is left out of the estimate is small: means and variances of the normalisation.
    assert activation_bytes(spec, shape, 2) == pytest.approx(kept, rel=0.01)


@pytest.mark.parametrize("choices", [*EVERY_CHOICE[::13], *FURTHER], ids=named)
def test_memory_with_checkpointing_is_what_has_entered_and_the_stage_being_recomputed(choices: dict[str, Any]) -> None:
    spec = spec_of(**choices, checkpointing=True)
    _, shape = fitting_shapes(spec, (20, 20, 20))
    network = UNet(spec)
    image = torch.zeros(1, 2, *shape)
    inside, features = [], [image]
    for stage in network.encoder:
        given = features[-1]
        inside.append(kept_bytes(lambda m=stage, x=given: m(x), network) - given.nbytes)
        features.append(stage(given).detach().requires_grad_())
    skips = features[1:]
    if network.transformer is not None:
        given = features[-1]
        # Its result is counted as its own, and the features it is given as those of the convolutions.
        inside.append(kept_bytes(lambda: network.transformer(given), network) - given.nbytes + given.nbytes)
        features.append(network.transformer(given).detach().requires_grad_())
    for number in (1, 0):
        coarse, skip = features[-1], skips[number]
        taken = kept_bytes(lambda m=network.decoder[number], x=coarse, y=skip: m(x, y), network)
        inside.append(taken - coarse.nbytes - (skip.nbytes if spec.skip == "attention" else 0))
        features.append(network.decoder[number](coarse, skip).detach().requires_grad_())
    entered = list(itertools.accumulate(f.nbytes for f in features))
    # The last stage is the only one that is not recomputed, for backward begins with it.
    assert kept_bytes(lambda: network(image), network) == pytest.approx(entered[-2] + inside[-1], rel=0.01)
    peak = max(held + kept for held, kept in zip(entered, inside, strict=False))
    assert activation_bytes(spec, shape, 1) == pytest.approx(peak, rel=0.01)
    assert peak < activation_bytes(spec.model_copy(update={"checkpointing": False}), shape, 1)


def test_checkpointed_estimate_grows_with_the_batch_alone() -> None:
    spec = spec_of(checkpointing=True)
    one = activation_bytes(spec, (16, 16, 16), 1)
    assert activation_bytes(spec, (16, 16, 16), 3) == 3 * one
    assert one > 2 * math.prod((16, 16, 16)) * 4


def test_counting_needs_no_torch() -> None:
    code = "import sys, pipeline.models.counts; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
