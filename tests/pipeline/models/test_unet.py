"""The network against itself (checkpointed, valid, tiled), against torch's own layers, and against the 2015 paper."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.models.counts import parameter_count
from pipeline.models.shape import fitting_shapes, output_margin, output_shape
from pipeline.models.spec import UNetSpec, unet_2015
from pipeline.models.unet import InterpolatedUpsampling, UNet


def spec_of(dimensions: int = 2, **choices: Any) -> UNetSpec:
    """Three small stages; the first stride spares the first axis, and so does the first kernel."""
    ones = (1,) * dimensions
    defaults: dict[str, Any] = {
        "dimensions": dimensions,
        "in_channels": 2,
        "out_channels": 3,
        "features": (4, 6, 8),
        "strides": (ones, (1, *(2,) * (dimensions - 1)), (2,) * dimensions),
        "kernel_shapes": ((1, *(3,) * (dimensions - 1)), (3,) * dimensions, (3,) * dimensions),
        "encoder_blocks": (1, 2, 1),
        "decoder_blocks": (2, 1),
    }
    return UNetSpec(**(defaults | choices))


def settings() -> list[Any]:
    """Every block, normalisation, skip and upsampling; the other choices in turn, so that all pairs occur."""
    turns = itertools.product(
        ("plain", "residual"),
        ("instance", "batch", "group", "none"),
        ("concatenate", "attention"),
        ("transposed", "interpolated"),
    )
    cases = []
    for number, (block, normalisation, skip, upsampling) in enumerate(turns):
        padding = "valid" if number % 3 == 0 else "same"
        choices = {
            "dimensions": 3 if number % 5 < 2 else 2,
            "block": block,
            "normalisation": normalisation,
            "skip": skip,
            "upsampling": upsampling,
            "padding": padding,
            "downsampling": "max_pool" if number % 7 < 3 else "strided",
            "activation": "relu" if number % 4 == 1 else "leaky_relu",
            "deep_supervision": padding == "same" and number % 2 == 1,
        }
        cases.append(pytest.param(choices, id="-".join(map(str, choices.values()))))
    return cases


FURTHER: list[dict[str, Any]] = [
    {"bottleneck": "transformer", "transformer_layers": 2, "transformer_heads": 2},
    {"bottleneck": "transformer", "transformer_heads": 1, "padding": "valid", "normalisation": "none"},
    {"bottleneck": "transformer", "positions": "learned", "position_grid": (3, 2), "drop_path": 0.4},
    {"block": "residual", "drop_path": 0.5, "encoder_blocks": (1, 3, 4), "decoder_block": "plain"},
    {"block": "residual", "drop_path": 0.5, "bottleneck": "transformer", "transformer_heads": 1, "dimensions": 3},
    {"weight_standardisation": True, "block": "residual", "drop_path": 0.2, "normalisation": "batch"},
    {"weight_standardisation": True, "normalisation": "none", "padding": "valid", "downsampling": "max_pool"},
    {"stem_channels": 5, "block": "residual", "decoder_block": "plain", "biased_convolutions": True},
    {"stem_channels": 3, "padding": "valid", "normalisation_epsilon": 1e-3, "leaky_slope": 0.2},
]
"""What later networks brought: transformers, drop path, standardised weights, decoders of other blocks, stems."""


def further() -> list[Any]:
    return [pytest.param(choices, id="-".join(f"{k}={v}" for k, v in choices.items())) for choices in FURTHER]


def image_for(spec: UNetSpec, side: int = 12, batch: int = 2) -> Tensor:
    _, shape = fitting_shapes(spec, (side,) * spec.dimensions)
    return torch.randn(batch, spec.in_channels, *shape, generator=seeded(1))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else outputs


def everything_after_a_step(network: UNet, image: Tensor) -> dict[str, Tensor]:
    """Outputs, gradients of the image and of every weight, and every buffer, after two backward passes."""
    image = image.clone().requires_grad_()
    torch.manual_seed(11)  # as the training loop does before each step: drop path draws from torch's own generator
    outputs = as_tuple(network(image))
    loss = torch.stack([(logits**2).mean() for logits in outputs]).sum()
    loss.backward(retain_graph=True)
    loss.backward()
    found = {f"output {level}": logits.detach() for level, logits in enumerate(outputs)}
    found |= {f"gradient of {name}": p.grad for name, p in network.named_parameters() if p.grad is not None}
    found |= {name: buffer.clone() for name, buffer in network.named_buffers()}
    assert image.grad is not None
    return found | {"gradient of image": image.grad}


@pytest.mark.parametrize("choices", [*settings(), *further()])
def test_checkpointing_changes_not_one_bit(choices: dict[str, Any]) -> None:
    spec = spec_of(**choices)
    image = image_for(spec)
    plain = everything_after_a_step(UNet(spec, seeded()), image)
    checkpointing = spec.model_copy(update={"checkpointing": True})
    checkpointed = everything_after_a_step(UNet(checkpointing, seeded()), image)
    assert plain.keys() == checkpointed.keys()
    assert len([name for name in plain if name.startswith("gradient")]) == 1 + len(list(UNet(spec).parameters()))
    for name, expected in plain.items():
        assert torch.equal(checkpointed[name], expected), name


@pytest.mark.parametrize("choices", [*settings(), *further()])
def test_the_head_sees_single_voxels(choices: dict[str, Any]) -> None:
    spec = spec_of(**choices)
    network, image = UNet(spec, seeded()).eval(), image_for(spec)
    with torch.inference_mode():
        expected, features = network(image), network.features(image)
        assert torch.equal(network.head(features), expected)
        some = network.head(features[:1, :, 1:])
    torch.testing.assert_close(some, expected[:1, :, 1:], atol=1e-6, rtol=1e-5)


def test_checkpointing_counts_a_batch_once() -> None:
    spec = spec_of(normalisation="batch", checkpointing=True)
    network = UNet(spec, seeded())
    everything_after_a_step(network, image_for(spec))
    counts = [b for name, b in network.named_buffers() if name.endswith("num_batches_tracked")]
    assert counts
    assert all(count == 1 for count in counts)


def kept_numbers(network: UNet, image: Tensor) -> int:
    """How many numbers autograd keeps for backward, counted once per tensor that a layer saves."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()), lambda _: torch.empty(0)):
        network(image)
    return sum(kept)


def test_checkpointing_keeps_less_in_training_and_does_nothing_otherwise() -> None:
    off, on = (UNet(spec_of(checkpointing=on), seeded()) for on in (False, True))
    image = image_for(off.spec, side=32)
    assert kept_numbers(on, image) < 0.6 * kept_numbers(off, image)
    on.eval(), off.eval()
    assert kept_numbers(on, image) == kept_numbers(off, image)


def test_checkpointing_does_nothing_without_gradients() -> None:
    spec = spec_of(normalisation="batch")
    off, on = (UNet(spec.model_copy(update={"checkpointing": on}), seeded()) for on in (False, True))
    with torch.no_grad():
        assert torch.equal(on(image_for(spec)), off(image_for(spec)))
    assert all(torch.equal(a, b) for a, b in zip(on.buffers(), off.buffers(), strict=True))


@pytest.mark.parametrize("choices", [*settings(), *further()])
def test_output_shape_and_every_weight_is_used(choices: dict[str, Any]) -> None:
    spec = spec_of(**choices)
    network = UNet(spec, seeded())
    image = image_for(spec, side=20)
    outputs = as_tuple(network(image))
    expected = output_shape(spec, tuple(image.shape[2:]))
    assert outputs[0].shape == (2, spec.out_channels, *expected)
    assert (expected == tuple(image.shape[2:])) == (spec.padding == "same")
    torch.stack([logits.square().mean() for logits in outputs]).sum().backward()
    assert all(p.grad is not None for p in network.parameters())


def test_checkpointing_leaves_torchs_generator_where_the_plain_step_does() -> None:
    states = []
    for on in (False, True):
        spec = spec_of(block="residual", drop_path=0.5, checkpointing=on)
        everything_after_a_step(UNet(spec, seeded()), image_for(spec))
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


@pytest.mark.parametrize("block", ["plain", "residual"])
@pytest.mark.parametrize("downsampling", ["strided", "max_pool"])
def test_valid_network_gives_what_same_padding_gives_away_from_the_border(block: str, downsampling: str) -> None:
    """Every skip is cropped where it belongs: one voxel's error would change the numbers wholly."""
    pooled_plain = (block, downsampling) == ("plain", "max_pool")
    choices = {
        "strides": ((1, 1), (2, 2), (2, 2)),
        "kernel_shapes": ((3, 3),) * 3,
        "encoder_blocks": (2, 1, 1) if pooled_plain else (1, 1, 1),
        "normalisation": "none",
        "block": block,
        "downsampling": downsampling,
        "stem_channels": 5 if (block, downsampling) == ("residual", "strided") else 0,
    }
    same, valid = (UNet(spec_of(padding=padding, **choices), seeded()) for padding in ("same", "valid"))
    image = image_for(same.spec, side=96)
    tile_shape, _ = fitting_shapes(valid.spec, (90, 90))
    assert tile_shape is not None
    margin = output_margin(valid.spec)
    whole = same(image)
    # The two grids of coarse voxels coincide for one start in four.
    differences = []
    for start in range(4):
        tile = valid(image[..., start : start + tile_shape[0], start : start + tile_shape[1]])
        rows, columns = (slice(start + m, start + m + side) for m, side in zip(margin, tile.shape[2:], strict=True))
        differences.append(((whole[..., rows, columns] - tile).abs().max() / whole.abs().max()).item())
    differences.sort()
    assert differences[0] < 1e-5
    assert differences[1] > 1e-2


def test_overlapping_tiles_of_a_valid_network_join_without_a_seam() -> None:
    """The overlap-tile strategy of Ronneberger et al. 2015, figure 2: tiles that are shifted by a coarse voxel."""
    small = {"features": (4, 6, 8, 8, 8), "out_channels": 2}
    network = UNet(UNetSpec(**(unet_2015().model_dump() | small)), seeded())
    image = torch.randn(1, 1, 252, 188, generator=seeded(1))
    whole = network(image)
    assert whole.shape[2:] == (68, 4)
    for start in (0, 16, 64):
        assert torch.allclose(network(image[:, :, start : start + 188]), whole[:, :, start : start + 4], atol=1e-5)


def test_the_2015_network_maps_572_to_388() -> None:
    with torch.device("meta"):
        network = UNet(unet_2015())
        outputs = network(torch.empty(1, 1, 572, 572))
    assert outputs.shape == (1, 2, 388, 388)
    assert output_margin(unet_2015()) == (92, 92)
    assert [stage.blocks[-1].convolution.out_channels for stage in network.encoder] == [64, 128, 256, 512, 1024]


def test_the_2015_network_has_the_parameters_of_the_paper() -> None:
    """Figure 1 of the paper, arrow by arrow: 3x3 convolutions, 2x2 up-convolutions, one 1x1, all with biases."""

    def conv(side: int, into: int, out: int) -> int:
        return side * side * into * out + out

    contracting = (
        (conv(3, 1, 64) + conv(3, 64, 64))
        + (conv(3, 64, 128) + conv(3, 128, 128))
        + (conv(3, 128, 256) + conv(3, 256, 256))
        + (conv(3, 256, 512) + conv(3, 512, 512))
        + (conv(3, 512, 1024) + conv(3, 1024, 1024))
    )
    expanding = (
        (conv(2, 1024, 512) + conv(3, 1024, 512) + conv(3, 512, 512))
        + (conv(2, 512, 256) + conv(3, 512, 256) + conv(3, 256, 256))
        + (conv(2, 256, 128) + conv(3, 256, 128) + conv(3, 128, 128))
        + (conv(2, 128, 64) + conv(3, 128, 64) + conv(3, 64, 64))
    )
    by_hand = contracting + expanding + conv(1, 64, 2)
    assert by_hand == 31_030_658
    with torch.device("meta"):
        network = UNet(unet_2015())
    assert sum(p.numel() for p in network.parameters()) == by_hand
    assert parameter_count(unet_2015()) == by_hand


def test_the_2015_network_has_only_the_layers_of_the_paper() -> None:
    with torch.device("meta"):
        network = UNet(unet_2015())
    kinds = [type(m).__name__ for m in network.modules() if not list(m.children()) and not isinstance(m, nn.Identity)]
    assert {kind: kinds.count(kind) for kind in kinds} == {
        "Conv2d": 19,
        "ConvTranspose2d": 4,
        "MaxPool2d": 4,
        "ReLU": 18,
    }


def test_deep_supervision_gives_one_output_a_decoder_stage_in_training_only() -> None:
    spec = spec_of(3, deep_supervision=True)
    network = UNet(spec, seeded())
    image = torch.randn(1, 2, 4, 8, 8, generator=seeded(1))
    assert [tuple(logits.shape) for logits in network(image)] == [(1, 3, 4, 8, 8), (1, 3, 4, 4, 4)]
    finest = network(image)[0]
    evaluated = network.eval()(image)
    assert isinstance(evaluated, Tensor)
    assert torch.equal(evaluated, finest)


def test_anisotropic_strides_divide_only_their_axes() -> None:
    network = UNet(spec_of(3, downsampling="max_pool"), seeded())
    features = torch.randn(1, 2, 6, 8, 12, generator=seeded(1))
    shapes = []
    for stage in network.encoder:
        features = stage(features)
        shapes.append(tuple(features.shape[1:]))
    assert shapes == [(4, 6, 8, 12), (6, 6, 4, 6), (8, 3, 2, 3)]


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_attention_maps_lie_in_the_unit_interval_on_their_skips(padding: str) -> None:
    spec = spec_of(skip="attention", padding=padding)
    network = UNet(spec, seeded()).eval()
    _, shape = fitting_shapes(spec, (30, 30))
    image = torch.randn(2, 2, *shape, generator=seeded(1))
    maps = network.attention_maps(image)
    expected = [(2, 1, *shape), (2, 1, shape[0], shape[1] // 2)] if padding == "same" else None
    assert expected is None or [tuple(m.shape) for m in maps] == expected
    assert all(0 <= m.min() < m.max() <= 1 for m in maps)


def test_attention_maps_are_those_that_forward_multiplies_with() -> None:
    """With the finest gate closed, nothing of the image reaches the output through the finest skip."""
    spec = spec_of(skip="attention", normalisation="none")
    network = UNet(spec, seeded()).eval()
    image = image_for(spec)
    gate = network.decoder[0].gate
    nn.init.zeros_(gate.score.weight)
    nn.init.constant_(gate.score.bias, -200.0)
    assert torch.equal(network.attention_maps(image)[0], torch.zeros(2, 1, *image.shape[2:]))
    skip = torch.randn(2, 4, 4, 4, generator=seeded(2))
    coarse = torch.randn(2, 6, 4, 2, generator=seeded(3))
    assert torch.equal(network.decoder[0](coarse, skip), network.decoder[0](coarse, 2 * skip))


def test_attention_maps_are_refused_where_there_are_none_or_reading_would_change_the_network() -> None:
    with pytest.raises(ValueError, match="expected 'attention'"):
        UNet(spec_of()).eval().attention_maps(torch.zeros(1, 2, 8, 8))
    with pytest.raises(ValueError, match="call eval"):
        UNet(spec_of(skip="attention")).attention_maps(torch.zeros(1, 2, 8, 8))


def test_a_shape_that_does_not_fit_is_refused_with_the_nearest_that_do() -> None:
    with pytest.raises(ValueError, match=r"\(6, 10\).*divisible by \(2, 4\).*\(6, 8\) and \(6, 12\)"):
        UNet(spec_of())(torch.zeros(1, 2, 6, 10))
    with pytest.raises(ValueError, match=r"\(570, 572\).*\(556, 572\) and \(572, 572\)"):
        output_shape(unet_2015(), (570, 572))
    with pytest.raises(ValueError, match=r"\(2, 4\) leaves one voxel at the bottleneck"):
        UNet(spec_of())(torch.zeros(1, 2, 2, 4))


def test_a_network_of_one_stage_is_a_plain_stack() -> None:
    one = {"features": (4,), "strides": ((1, 1),), "kernel_shapes": ((3, 3),), "encoder_blocks": (2,)}
    network = UNet(spec_of(decoder_blocks=(), deep_supervision=True, **one), seeded())
    (logits,) = network(torch.zeros(1, 2, 5, 7))
    assert logits.shape == (1, 3, 5, 7)


def test_instance_normalisation_is_torchs_own() -> None:
    spec = spec_of(3)
    network = UNet(spec, seeded())
    layer = network.encoder[0].blocks[0].normalisation
    nn.init.normal_(layer.weight, generator=seeded(1))
    nn.init.normal_(layer.bias, generator=seeded(2))
    oracle = nn.InstanceNorm3d(4, affine=True)
    oracle.load_state_dict(layer.state_dict())
    features = 3 + torch.randn(2, 4, 5, 6, 7, generator=seeded(3))
    assert torch.allclose(layer(features), oracle(features), atol=1e-5)


def test_interpolation_and_pointwise_convolution_commute() -> None:
    layer = InterpolatedUpsampling(spec_of(3, upsampling="interpolated"), 1)
    coarse = torch.randn(2, 8, 3, 4, 5, generator=seeded())
    interpolated = nn.functional.interpolate(coarse, scale_factor=2, mode="trilinear", align_corners=False)
    assert torch.allclose(layer(coarse), layer.convolution(interpolated), atol=1e-5)


def test_weights_follow_the_generator_and_leave_the_global_one_alone() -> None:
    before = torch.get_rng_state()
    first, second, other = (UNet(spec_of(), seeded(seed)) for seed in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.heads[0].weight, other.heads[0].weight)


def test_weights_are_spread_as_he_et_al_ask() -> None:
    """Variance 2 / ((1 + slope^2) fan_in) before an activation, 1 / in_channels in a transposed convolution."""
    spec = spec_of(features=(64, 64, 128), normalisation="none")
    network = UNet(spec, seeded())
    convolution = network.encoder[1].blocks[1].convolution
    assert convolution.weight.std().item() == pytest.approx((2 / (1 + 0.01**2) / (64 * 9)) ** 0.5, rel=0.05)
    assert network.decoder[1].upsampling.weight.std().item() == pytest.approx(128**-0.5, rel=0.05)
    assert not convolution.bias.any()


@pytest.mark.parametrize("block", ["plain", "residual"])
def test_a_tiny_problem_is_learnt(block: str) -> None:
    spec = spec_of(in_channels=1, out_channels=2, features=(8, 12, 16), block=block, skip="attention")
    network = UNet(spec, seeded())
    image = torch.randn(2, 1, 16, 16, generator=seeded(1))
    target = (nn.functional.avg_pool2d(image, 5, stride=1, padding=2)[:, 0] > 0).long()
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(network(image), target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
