"""Every network by name, run once on a small patch, and what is said to one that cannot be built."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.errors import PlanError
from pipeline.models.needs import NEEDS
from pipeline.models.registry import NETWORKS, build_network
from pipeline.models.spec import UNetSpec
from pipeline.models.unet import UNet

UNUSED: dict[str, list[str]] = {}
"""Weights that MONAI builds and does not use."""


def spec_of(dimensions: int = 3, **choices: Any) -> UNetSpec:
    ones = (1,) * dimensions
    defaults: dict[str, Any] = {
        "dimensions": dimensions,
        "in_channels": 2,
        "out_channels": 3,
        "features": (4, 6, 8),
        "strides": (ones, (1, *(2,) * (dimensions - 1)), (2,) * dimensions),
        "kernel_shapes": ((3,) * dimensions,) * 3,
        "encoder_blocks": (1, 1, 1),
        "decoder_blocks": (1, 1),
    }
    return UNetSpec(**(defaults | choices))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def patch_for(name: str, dimensions: int) -> tuple[int, ...]:
    side = NEEDS[name].divisor or 8
    return (2 * side, *(side,) * (dimensions - 1))


@pytest.mark.parametrize("dimensions", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", list(NETWORKS))
def test_every_network_learns_from_a_patch_of_its_own(name: str, dimensions: int) -> None:
    """One step forward and backward: logits of the patch, a gradient for every weight, the same with the same seed."""
    shape = patch_for(name, dimensions)
    image = torch.randn(1, 2, *shape, generator=seeded(1))
    results = []
    for _ in range(2):
        network = build_network(name, spec_of(dimensions), shape, generator=seeded(7))
        logits = network(image)
        assert logits.shape == (1, 3, *shape)
        logits.square().mean().backward()
        gradients = [p.grad for p in network.parameters()]
        unused = [n for n, p in network.named_parameters() if p.grad is None]
        assert unused == UNUSED.get(name, [])
        assert any(isinstance(m, _BatchNorm) for m in network.modules()) == NEEDS[name].batch_normalised
        results.append([logits, *(g for g in gradients if g is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_swin_unetr_checkpoints_to_the_same_gradients() -> None:
    results = []
    for on in (False, True):
        network = build_network("swin_unetr", spec_of(2, checkpointing=on), (64, 32), generator=seeded(7))
        network(torch.randn(1, 2, 64, 32, generator=seeded(1))).square().mean().backward()
        results.append([p.grad for p in network.parameters()])
    for plain, checkpointed in zip(*results, strict=True):
        torch.testing.assert_close(checkpointed, plain)


def test_what_is_known_of_needs_is_known_of_builders() -> None:
    assert list(NETWORKS) == list(NEEDS)


def test_our_network_is_built_from_the_whole_spec() -> None:
    spec = spec_of(deep_supervision=True, skip="attention")
    network = build_network("unet", spec, (8, 8, 8))
    assert isinstance(network, UNet)
    assert network.spec == spec


def test_dynunet_takes_kernels_strides_features_and_blocks_from_the_spec() -> None:
    network = build_network("dynunet", spec_of(kernel_shapes=((1, 3, 3), (3, 3, 3), (3, 3, 3))), (8, 8, 8))
    convolution = network.input_block.conv1.conv
    assert (convolution.kernel_size, convolution.out_channels) == ((1, 3, 3), 4)
    assert network.bottleneck.conv1.conv.stride == (2, 2, 2)
    kinds = [type(build_network("dynunet", spec_of(block=b), (8, 8, 8)).bottleneck) for b in ("plain", "residual")]
    assert [kind.__name__ for kind in kinds] == ["UnetBasicBlock", "UnetResBlock"]


@pytest.mark.parametrize("name", ["unet", "segresnet"])
def test_weights_follow_the_generator_and_leave_the_global_one_alone(name: str) -> None:
    shape = patch_for(name, 2)
    before = torch.get_rng_state()
    first, second, other = (build_network(name, spec_of(2), shape, generator=seeded(seed)) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    pairs = list(zip(first.parameters(), second.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    ("name", "choices", "shape", "message"),
    [
        ("segresnett", {}, (8, 8, 8), r"did you mean 'segresnet'\? known are unet, segresnet, swin_unetr"),
        ("qqq", {}, (8, 8, 8), "'qqq' is not known: known are unet"),
        ("unet", {}, (8, 8, 9), r"'unet': input shape \(8, 8, 9\) .* \(8, 8, 8\) and \(8, 8, 12\)"),
        (
            "segresnet",
            {},
            (16, 16, 12),
            r"\(16, 16, 12\) is not divisible by \(8, 8, 8\); the next one is \(16, 16, 16\)",
        ),
        ("segresnet", {}, (8, 8, 8), "one voxel at the bottleneck"),
        ("dynunet", {}, (8, 8), "has 2 axes, expected 3"),
        ("mednext", {"deep_supervision": True}, (32, 32, 32), "has same padding and no deep supervision"),
    ],
)
def test_what_cannot_be_built_is_refused(
    name: str, choices: dict[str, Any], shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        build_network(name, spec_of(**choices), shape)


def test_too_few_stages_are_refused() -> None:
    two = {"features": (4, 8), "strides": ((1,) * 3, (2,) * 3), "kernel_shapes": ((3,) * 3,) * 2}
    spec = spec_of(encoder_blocks=(1, 1), decoder_blocks=(1,), **two)
    with pytest.raises(PlanError, match="found 2 stages, expected at least 3"):
        build_network("dynunet", spec, (8, 8, 8))


def test_our_network_needs_no_monai() -> None:
    code = (
        "import sys; from pipeline.models.registry import build_network; from pipeline.models.spec import UNetSpec;"
        "build_network('unet', UNetSpec(features=(4, 4, 4, 4)), (16, 16, 16)); sys.exit('monai' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
