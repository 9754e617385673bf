"""What flows through networks whose weights are set by hand, so that the figures are known."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from pipeline.errors import PlanError
from pipeline.inspection.figures import MOST_SAMPLED, ChannelSums, figures_of, record_levels, record_sums
from pipeline.inspection.levels import kind_and_level
from pipeline.models.registry import NETWORKS, build_network
from pipeline.models.slices import SliceNetwork
from pipeline.models.spec import UNetSpec
from pipeline.models.unet import UNet

from .worlds import generator, small_spec

WITHOUT_SKIPS = {"segresnet", "mednext"}


def test_channels_that_never_rise_are_dead() -> None:
    features = torch.rand((1, 4, 4, 4, 4), generator=generator()) + 0.1
    features[:, 1] = 0.0
    features[:, 2] *= -0.01  # as a leaky ReLU passes a channel that never fires
    (figures,) = figures_of({"encoder 1": features})
    assert figures.dead == 2
    assert figures.dead_share == 0.5
    assert figures.sparsity == 0.5


def test_a_channel_that_works_below_zero_is_not_dead() -> None:
    """As behind a transformer, which has no activation at its end."""
    features = torch.rand((1, 2, 4, 4, 4), generator=generator())
    features[:, 1] = -features[:, 1] - 0.5
    (figures,) = figures_of({"bottleneck 1": features})
    assert figures.dead == 0


def test_figures_do_not_change_with_the_scale() -> None:
    features = torch.randn((1, 6, 5, 5, 5), generator=generator()).relu()
    features[:, 0] = 0.0
    small, large = (figures_of({"encoder 1": features * scale})[0] for scale in (1e-4, 1e4))
    assert (small.dead, small.sparsity) == (large.dead, large.sparsity)
    assert small.effective_rank == pytest.approx(large.effective_rank)
    assert large.energy == pytest.approx(1e8 * small.energy)


def test_energy_is_the_root_mean_square() -> None:
    features = torch.tensor([3.0, 4.0]).reshape(1, 2, 1, 1, 1).expand(1, 2, 2, 2, 2)
    assert figures_of({"encoder 1": features})[0].energy == pytest.approx(math.sqrt(12.5))


def test_effective_rank_counts_independent_directions() -> None:
    """Channels of equal variance that do not correlate count each, copies count once."""
    signs = torch.tensor([[1.0, 1, -1, -1, 1, 1, -1, -1], [1, -1, 1, -1, 1, -1, 1, -1]])
    two = signs.reshape(1, 2, 2, 2, 2)
    assert figures_of({"encoder 1": two})[0].effective_rank == pytest.approx(2.0)
    copies = two[:, :1].expand(1, 5, 2, 2, 2) * torch.tensor([1.0, 2, 3, -4, 5]).reshape(1, 5, 1, 1, 1)
    (figures,) = figures_of({"encoder 1": copies})
    assert figures.effective_rank == pytest.approx(1.0)
    assert figures.redundant_share == pytest.approx(4 / 5)
    assert figures_of({"encoder 1": torch.ones(1, 3, 2, 2, 2)})[0].effective_rank == 0.0


def test_effective_rank_is_that_of_the_singular_values() -> None:
    """Against the definition itself: a singular value decomposition of the centred channels."""
    features = torch.randn((2, 7, 4, 5, 6), generator=generator()).relu()
    matrix = features.transpose(0, 1).flatten(1).double()
    singular = torch.linalg.svdvals(matrix - matrix.mean(dim=1, keepdim=True))
    shares = singular / singular.sum()
    expected = math.exp(-float((shares * shares.log()).sum()))
    assert figures_of({"skip 1": features})[0].effective_rank == pytest.approx(expected, rel=1e-9)


def test_sums_of_patches_are_those_of_all_their_voxels() -> None:
    features = torch.randn((4, 5, 3, 3, 3), generator=generator())
    parts = [ChannelSums.of(part) for part in features.split(1)]
    whole, added = ChannelSums.of(features), parts[0] + parts[1] + parts[2] + parts[3]
    assert whole.voxels == added.voxels == 4 * 27
    for name in ("lowest", "highest", "total", "squares", "sum", "products"):
        torch.testing.assert_close(getattr(added, name), getattr(whole, name))


@pytest.mark.parametrize("shape", [(256, 256, 32), (64, 96, 96), (512, 512, 2)])
def test_every_plane_is_sampled(shape: tuple[int, int, int]) -> None:
    """Features that are not 0 in one plane alone."""
    for axis in range(3):
        features = torch.zeros((1, 2, *shape))
        first = features.select(axis + 2, 0)
        first.copy_(torch.randn(first.shape, generator=generator()))
        found = ChannelSums.of(features)
        share = float((found.products.diagonal() / found.squares).mean())
        # A sample of one in n voxels holds one nth of the squares.
        assert share == pytest.approx(found.sampled / found.voxels, rel=0.2), axis
        assert figures_of({"encoder 1": features})[0].effective_rank == pytest.approx(2.0, abs=0.05)
        assert found.sampled <= MOST_SAMPLED


def test_figures_do_not_depend_on_the_batch() -> None:
    """How many windows pass at a time is the memory's matter; here one is far quieter than the other."""
    features = torch.randn((2, 3, 40, 41, 43), generator=generator()).relu()
    features[1] = 1e-4 * features[1] + 1e-5
    (whole,), (parts,) = (
        figures_of({"encoder 1": sums})
        for sums in (ChannelSums.of(features), ChannelSums.of(features[:1]) + ChannelSums.of(features[1:]))
    )
    assert whole == parts
    assert whole.sparsity == pytest.approx(0.25, abs=0.01)


def test_features_that_are_not_finite_do_not_pass_for_figures() -> None:
    features = torch.ones(1, 2, 2, 2, 2)
    features[0, 0, 0, 0, 0] = math.nan
    (figures,) = figures_of({"encoder 1": features})
    assert math.isnan(figures.energy)
    assert math.isnan(figures.effective_rank)


@pytest.mark.parametrize(
    ("name", "dimensions"),
    [
        *((name, 2) for name in sorted(NETWORKS)),
        ("unet", 3),
        *(pytest.param(name, 3, marks=pytest.mark.slow) for name in ("dynunet", "segresnet", "mednext")),
    ],
)
def test_every_network_names_its_levels(name: str, dimensions: Literal[2, 3]) -> None:
    ones, twos = (1,) * dimensions, (2,) * dimensions
    kernels = ((3,) * dimensions,) * 4
    spec = UNetSpec(
        dimensions=dimensions, features=(8, 16, 32, 64), strides=(ones, twos, twos, twos), kernel_shapes=kernels
    )
    side = 64 if name == "swin_unetr" else 32
    network = build_network(name, spec, (side,) * dimensions, generator=generator()).eval()
    with torch.inference_mode(), record_sums(network) as sums:
        network(torch.randn((1, 1, *(side,) * dimensions), generator=generator()))
    figures = figures_of(sums)
    kinds = {each.kind for each in figures}
    assert kinds == {"encoder", "bottleneck", "decoder"} | (set() if name in WITHOUT_SKIPS else {"skip"})
    by_name = {each.name: each for each in figures}
    assert by_name["encoder 1"].shape == by_name["decoder 1"].shape == (side,) * dimensions
    (bottleneck,) = (each for each in figures if each.kind == "bottleneck")
    assert all(each.level <= bottleneck.level for each in figures)
    sides = {each.level: each.shape for each in figures if each.kind != "skip"}
    assert [sides[level] for level in sorted(sides)] == sorted(sides.values(), reverse=True)


def test_a_network_of_unknown_levels_is_refused_by_name() -> None:
    refused = pytest.raises(PlanError, match=r"network Conv3d: its levels are not known.*known are UNet, DynUNet")
    with refused, record_levels(nn.Conv3d(1, 1, 1)):
        pass


def test_skips_are_taken_behind_the_gate_and_cropped() -> None:
    gated = UNet(small_spec(skip="attention"), generator()).eval()
    image = torch.randn((1, 1, 16, 16, 16), generator=generator())
    with torch.inference_mode(), record_levels(gated) as found:
        gated(image)
        maps = gated.attention_maps(image)
    torch.testing.assert_close(found["skip 1"], found["encoder 1"] * maps[0])
    torch.testing.assert_close(found["skip 2"], found["encoder 2"] * maps[1])
    valid = UNet(small_spec(padding="valid", downsampling="max_pool"), generator()).eval()
    with torch.inference_mode(), record_levels(valid) as found:
        valid(torch.randn((1, 1, 22, 22, 22), generator=generator()))
    margin = (found["encoder 1"].shape[2] - found["skip 1"].shape[2]) // 2
    assert margin > 0
    inner = slice(margin, margin + found["skip 1"].shape[2])
    assert torch.equal(found["skip 1"], found["encoder 1"][:, :, inner, inner, inner])


def test_a_transformer_is_the_bottleneck_above_the_last_encoder() -> None:
    network = UNet(small_spec(bottleneck="transformer", transformer_heads=4), generator()).eval()
    with torch.inference_mode(), record_levels(network) as found:
        network(torch.randn((1, 1, 16, 16, 16), generator=generator()))
    assert set(found) == {"encoder 1", "encoder 2", "encoder 3", "bottleneck 3", "skip 1", "skip 2"} | {
        "decoder 1",
        "decoder 2",
    }


def test_recording_changes_nothing_and_sees_checkpointed_levels() -> None:
    """Gradients are the same bit for bit, with hooks that run again when levels are recomputed."""
    image = torch.randn((1, 1, 16, 16, 16), generator=generator())
    gradients = []
    for recording in (False, True):
        network = UNet(small_spec(checkpointing=True, deep_supervision=True), generator()).train()
        with record_levels(network) if recording else nullcontext({}) as found:
            torch.stack([level.square().mean() for level in network(image)]).sum().backward()
        assert len(found) == (2 + 1 + 2 + 2 if recording else 0)
        gradients.append([parameter.grad for parameter in network.parameters()])
    for plain, seen in zip(*gradients, strict=True):
        assert plain is not None
        assert seen is not None
        assert torch.equal(plain, seen)


def test_nothing_is_seen_once_recording_has_ended() -> None:
    network = UNet(small_spec(), generator()).eval()
    with record_levels(network) as found:
        pass
    network(torch.randn((1, 1, 16, 16, 16), generator=generator()))
    assert found == {}


def test_wrapped_networks_are_found() -> None:
    spec = small_spec(dimensions=2, strides=((1, 1), (2, 2), (2, 2)), kernel_shapes=((3, 3),) * 3, features=(4, 8, 16))
    network = SliceNetwork(UNet(spec, generator()), slice_axis=2).eval()
    with torch.inference_mode(), record_levels(network) as found:
        network(torch.randn((1, 1, 16, 16, 1), generator=generator()))
    assert found["encoder 1"].shape == (1, 4, 16, 16)


def test_names_are_read_back() -> None:
    assert kind_and_level("skip 12") == ("skip", 12)
    for wrong in ("skip", "skips 1", "skip one", ""):
        with pytest.raises(ValueError, match="expected one of encoder"):
            kind_and_level(wrong)


def test_a_level_set_to_zero_by_its_weights_is_dead() -> None:
    network = UNet(small_spec(normalisation="none"), generator()).eval()
    first = next(m for m in network.encoder[1].modules() if isinstance(m, nn.Conv3d))
    with torch.no_grad():
        first.weight[:5] = 0.0
        assert isinstance(first.bias, Tensor)
        first.bias[:5] = -1.0
        first.bias[5:] = 1.0
    with torch.inference_mode(), record_sums(network) as sums:
        network(torch.randn((1, 1, 16, 16, 16), generator=generator()))
    by_name = {each.name: each for each in figures_of(sums)}
    assert by_name["encoder 2"].dead == by_name["skip 2"].dead == 5
    assert by_name["encoder 2"].channels == 16
