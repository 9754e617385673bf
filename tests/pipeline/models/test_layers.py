"""Drop path, standardised weights and transformers, each against what can be worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from pipeline.models.layers import DropPath, StandardisedConvolution
from pipeline.models.spec import UNetSpec
from pipeline.models.transformer import BottleneckTransformer, rotary_table, rotated
from pipeline.models.unet import UNet


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def spec_of(**choices: Any) -> UNetSpec:
    defaults: dict[str, Any] = {
        "dimensions": 2,
        "features": (8, 16),
        "strides": ((1, 1), (2, 2)),
        "kernel_shapes": ((3, 3), (3, 3)),
        "encoder_blocks": (1, 1),
        "decoder_blocks": (1,),
        "bottleneck": "transformer",
        "transformer_layers": 2,
        "transformer_heads": 2,
    }
    return UNetSpec(**(defaults | choices))


class TestDropPath:
    def test_leaves_out_whole_samples_and_keeps_the_mean(self) -> None:
        torch.manual_seed(0)
        dropped = DropPath(0.25)(torch.ones(4000, 2, 3))
        by_sample = dropped.flatten(1)
        assert torch.equal(by_sample, by_sample[:, :1].expand_as(by_sample))
        assert sorted(by_sample.unique().tolist()) == pytest.approx([0.0, 4 / 3])
        assert (by_sample[:, 0] == 0).float().mean().item() == pytest.approx(0.25, abs=0.03)

    def test_does_nothing_at_prediction(self) -> None:
        network = UNet(spec_of(drop_path=0.9), seeded()).eval()
        image = torch.randn(2, 1, 8, 8, generator=seeded(1))
        before = torch.get_rng_state()
        assert torch.equal(network(image), network(image))
        assert torch.equal(torch.get_rng_state(), before)

    def test_without_it_no_random_number_is_drawn(self) -> None:
        before = torch.get_rng_state()
        UNet(spec_of(), seeded())(torch.zeros(2, 1, 8, 8))
        assert torch.equal(torch.get_rng_state(), before)

    def test_rates_rise_linearly_over_what_can_drop(self) -> None:
        residual = spec_of(block="residual", encoder_blocks=(1, 2), drop_path=0.4)
        assert residual.drop_path_rates == pytest.approx((0.0, 0.1, 0.2, 0.3, 0.4))
        plain = spec_of(encoder_blocks=(1, 2), transformer_layers=3, drop_path=0.4)
        assert plain.drop_path_rates == pytest.approx((0.0, 0.0, 0.0, 0.0, 0.2, 0.4))
        assert spec_of(transformer_layers=1, drop_path=0.4).drop_path_rates == (0.0, 0.0, 0.4)
        network = UNet(residual)
        found = [m.rate for m in network.modules() if isinstance(m, DropPath)]
        assert sorted(found) == pytest.approx([0.0, 0.0, 0.1, 0.2, 0.3, 0.4])  # the decoder's is 0

    def test_a_dropped_block_is_its_shortcut(self) -> None:
        torch.manual_seed(0)
        spec = spec_of(block="residual", bottleneck="convolution", drop_path=0.5)
        block = UNet(spec, seeded()).encoder[1].blocks[0]
        block.drop_path = DropPath(1 - 1e-9)
        features = torch.randn(1, 8, 4, 4, generator=seeded(1))
        assert torch.equal(block(features), functional.leaky_relu(block.shortcut(features), 0.01))


class TestStandardisedWeights:
    def test_each_filter_has_mean_zero_and_the_variance_of_he(self) -> None:
        layer = nn.Conv3d(6, 5, (1, 3, 3))
        nn.init.normal_(layer.weight, mean=0.7, std=3.0, generator=seeded())
        used = StandardisedConvolution(layer, slope=0.01).weight().flatten(1)
        torch.testing.assert_close(used.mean(1), torch.zeros(5), atol=1e-6, rtol=0)
        expected = math.sqrt(2 / (1 + 0.01**2) / 54)
        torch.testing.assert_close(used.std(1, correction=0), torch.full((5,), expected))

    def test_it_is_the_convolution_with_those_weights(self) -> None:
        layer = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        image = torch.randn(2, 3, 9, 8, generator=seeded())
        standardised = StandardisedConvolution(layer, slope=0.0)
        expected = functional.conv2d(image, standardised.weight(), layer.bias, stride=2, padding=1)
        assert torch.equal(standardised(image), expected)

    def test_scale_and_offset_of_a_filter_change_nothing(self) -> None:
        spec = spec_of(bottleneck="convolution", weight_standardisation=True, normalisation="none")
        network = UNet(spec, seeded())
        image = torch.randn(1, 1, 8, 8, generator=seeded(1))
        before = network(image)
        with torch.no_grad():
            for module in network.modules():
                if isinstance(module, StandardisedConvolution):
                    module.layer.weight.mul_(3.0).add_(0.5)
        torch.testing.assert_close(network(image), before)

    def test_weights_survive_saving(self) -> None:
        spec = spec_of(weight_standardisation=True)
        first, second = UNet(spec, seeded(1)), UNet(spec, seeded(2))
        second.load_state_dict(first.state_dict())
        image = torch.randn(1, 1, 8, 8, generator=seeded())
        assert torch.equal(first(image), second(image))


class TestTransformer:
    def test_products_of_rotated_tokens_depend_on_distances_alone(self) -> None:
        query, key = (torch.randn(14, generator=seeded(n)) for n in (1, 2))
        table = rotary_table((6, 5, 4), 14, query.device)
        grid = [rotated(v.expand(1, 120, 1, 14), table).view(6, 5, 4, 14) for v in (query, key)]
        one = grid[0][1, 2, 0] @ grid[1][3, 0, 1]
        same = grid[0][3, 4, 2] @ grid[1][5, 2, 3]
        other = grid[0][3, 4, 2] @ grid[1][5, 3, 3]
        torch.testing.assert_close(one, same)
        assert not torch.allclose(one, other, rtol=1e-3)
        torch.testing.assert_close(grid[0].norm(dim=-1), query.norm().expand(6, 5, 4))

    def test_channels_left_over_are_not_turned(self) -> None:
        tokens = torch.randn(1, 8, 1, 14, generator=seeded())
        turned = rotated(tokens, rotary_table((2, 2, 2), 14, tokens.device))
        assert torch.equal(turned[..., 12:], tokens[..., 12:])
        assert not torch.equal(turned[..., :12], tokens[..., :12])

    @pytest.mark.parametrize("positions", ["rotary", "learned"])
    def test_places_are_told_apart(self, positions: str) -> None:
        """Without positions, attention would give permuted voxels the permuted result."""
        spec = spec_of(positions=positions, position_grid=(4, 4))
        transformer = BottleneckTransformer(spec)
        for weights in transformer.parameters():
            nn.init.normal_(weights, std=0.5, generator=seeded())
        features = torch.randn(1, 16, 4, 4, generator=seeded(1))
        straight, turned = transformer(features), transformer(features.roll(1, dims=2)).roll(-1, dims=2)
        assert not torch.allclose(straight, turned, rtol=1e-2, atol=1e-2)

    def test_every_voxel_sees_every_other(self) -> None:
        features = torch.randn(1, 16, 5, 6, generator=seeded()).requires_grad_()
        BottleneckTransformer(spec_of())(features)[0, :, 0, 0].sum().backward()
        assert features.grad is not None
        assert (features.grad.abs().sum(1) > 0).all()

    def test_learned_positions_stretch_over_a_larger_window(self) -> None:
        transformer = BottleneckTransformer(spec_of(positions="learned", position_grid=(2, 2)))
        with torch.no_grad():
            transformer.positions[:] = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
        assert torch.equal(transformer.learned_positions((2, 2)), transformer.positions)
        stretched = transformer.learned_positions((3, 4))
        assert stretched.shape == (1, 16, 3, 4)
        torch.testing.assert_close(stretched[0, 0], torch.tensor([0.0, 0.25, 0.75, 1.0]).expand(3, 4))

    @pytest.mark.parametrize("positions", ["rotary", "learned"])
    def test_a_larger_window_is_taken(self, positions: str) -> None:
        network = UNet(spec_of(positions=positions, position_grid=(4, 4)), seeded()).eval()
        assert network(torch.zeros(1, 1, 12, 20)).shape == (1, 2, 12, 20)

    def test_it_starts_as_a_small_change_drawn_from_the_generator(self) -> None:
        first, second = (UNet(spec_of(positions="learned", position_grid=(4, 4)), seeded(5)) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
        features = torch.randn(1, 16, 4, 4, generator=seeded(1))
        change = first.transformer(features) - features
        assert 1e-4 < change.std().item() < 0.2

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            ({"transformer_heads": 3}, "transformer_heads: found 3, which does not divide the bottleneck's 16"),
            ({"transformer_heads": 8}, "leaves 2 channels a head; rotary positions need 4: use fewer heads"),
            ({"transformer_layers": 0}, "transformer_layers: found 0"),
            ({"positions": "learned"}, r"position_grid: found \(\), expected 2 numbers"),
            ({"drop_path": 1.0}, "drop_path: found 1, expected a probability below 1"),
            ({"bottleneck": "convolution", "drop_path": 0.1}, "drop_path: needs block 'residual'"),
        ],
    )
    def test_what_cannot_be_built_is_refused(self, wrong: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            spec_of(**wrong)
