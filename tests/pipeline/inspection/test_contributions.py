"""What parts bring, in networks whose weights say it, and how changes of Dice are told."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.inspection.contributions import Change, Contributions, changed, changes_of
from pipeline.inspection.figures import record_sums
from pipeline.inspection.levels import levels_of
from pipeline.models.registry import NETWORKS, build_network
from pipeline.models.spec import UNetSpec
from pipeline.models.unet import UNet

from .worlds import generator, noise, silence, small_spec

QUICK = ("unet", "segresnet", "attention_unet")


def outputs(network: nn.Module, image: Tensor) -> tuple[Tensor, dict[Change, Tensor], Tensor]:
    """As the network is, with each change, and as it is once more."""
    levels = levels_of(network)
    with torch.inference_mode():
        with record_sums(network) as sums:
            before = network(image)
        means = {name: found.mean for name, found in sums.items()}
        found = {}
        for change in changes_of(levels):
            with changed(levels, change, means):
                found[change] = network(image)
        return before, found, network(image)


def first_convolution(module: Any) -> nn.Conv3d:
    return next(layer for layer in module.modules() if isinstance(layer, nn.Conv3d))


@pytest.mark.usefixtures("one_thread")
class TestKnownNetworks:
    def test_a_skip_that_is_not_read_brings_exactly_nothing(self) -> None:
        network = UNet(small_spec(), generator()).eval()
        stage: Any = network.decoder[0]
        silence(first_convolution(stage.blocks).weight, first=8, axis=1)  # the skip's half of the joined channels
        before, found, _ = outputs(network, noise(1, 1, 16, 16, 16))
        assert torch.equal(found[Change("zeroed", 1)], before)
        assert torch.equal(found[Change("mean", 1)], before)
        assert not torch.allclose(found[Change("zeroed", 2)], before)
        assert not torch.allclose(found[Change("cut", 1)], before)

    def test_levels_that_are_not_read_bring_exactly_nothing(self) -> None:
        """With and without a gate, which reads the levels below as well."""
        for skip in ("concatenate", "attention"):
            network = UNet(small_spec(skip=skip), generator()).eval()
            stage: Any = network.decoder[1]
            silence(first_convolution(stage.blocks).weight[:, :16], axis=1)
            if stage.gate is not None:
                silence(stage.gate.gate.weight)
            before, found, _ = outputs(network, noise(1, 1, 16, 16, 16))
            assert torch.equal(found[Change("cut", 2)], before)
            assert not torch.allclose(found[Change("cut", 1)], before)
            assert not torch.allclose(found[Change("mean", 2)], before)

    def test_a_cut_takes_the_gate_its_signal(self) -> None:
        network = UNet(small_spec(skip="attention"), generator()).eval()
        stage: Any = network.decoder[1]
        silence(first_convolution(stage.blocks).weight[:, :16], axis=1)  # only the gate still reads what lies below
        before, found, _ = outputs(network, noise(1, 1, 16, 16, 16))
        assert not torch.allclose(found[Change("cut", 2)], before)

    def test_without_all_that_varies_the_answer_does_not_vary(self) -> None:
        """Away from the border, where convolutions see the padding."""
        network = UNet(small_spec(normalisation="none"), generator()).eval()
        levels = levels_of(network)
        image = noise(1, 1, 16, 16, 16)
        with torch.inference_mode(), record_sums(network) as sums:
            network(image)
        means = {name: found.mean for name, found in sums.items()}
        cut, skip = changed(levels, Change("cut", 1), means), changed(levels, Change("mean", 1), means)
        with torch.inference_mode(), cut, skip:
            inner = network(image)[:, :, 2:-2, 2:-2, 2:-2]
        # A transposed convolution gives each of the 8 voxels of a coarse one its own constant.
        for corner in (inner[..., i::2, j::2, k::2] for i in (0, 1) for j in (0, 1) for k in (0, 1)):
            assert float((corner - corner[..., :1, :1, :1]).abs().max()) < 1e-5

    def test_means_are_of_the_channels(self) -> None:
        """A skip that is constant is its mean, so that the mean changes nothing, where zero does."""
        network = UNet(small_spec(normalisation="none"), generator()).eval()
        first = first_convolution(network.encoder[0])
        silence(first.weight)
        assert first.bias is not None
        with torch.no_grad():
            first.bias.copy_(torch.arange(1.0, 9.0))
        before, found, _ = outputs(network, noise(1, 1, 16, 16, 16))
        torch.testing.assert_close(found[Change("mean", 1)], before, rtol=1e-6, atol=1e-6)
        assert not torch.allclose(found[Change("zeroed", 1)], before)

    def test_a_network_of_one_level_has_nothing_to_take_away(self) -> None:
        spec = UNetSpec(
            features=(4,), strides=((1, 1, 1),), kernel_shapes=((3, 3, 3),), encoder_blocks=(1,), decoder_blocks=()
        )
        assert changes_of(levels_of(UNet(spec))) == ()


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in sorted(NETWORKS)]
)
def test_every_network_is_changed_and_is_itself_again(name: str) -> None:
    spec = UNetSpec(
        dimensions=2, features=(8, 16, 32, 64), strides=((1, 1), (2, 2), (2, 2), (2, 2)), kernel_shapes=((3, 3),) * 4
    )
    side = 64 if name == "swin_unetr" else 32
    network = build_network(name, spec, (side, side), generator=generator()).eval()
    before, found, after = outputs(network, noise(1, 1, side, side))
    assert torch.equal(before, after)
    depth = levels_of(network).count
    cuts = {change.level for change in found if change.how == "cut"}
    assert cuts == set(range(1, depth))
    skips = {change.level for change in found if change.how == "mean"}
    assert skips == (set() if name in ("segresnet", "mednext") else set(range(1, depth)))
    for change, output in found.items():
        assert output.shape == before.shape
        assert not torch.equal(output, before), change.name


class TestDice:
    NAN = math.nan
    UNTOUCHED = ({"liver": 0.9, "spleen": 0.8, "cyst": NAN}, {"liver": 0.7, "spleen": NAN, "cyst": NAN})
    CHANGED = ({"liver": 0.8, "spleen": 0.5, "cyst": NAN}, {"liver": 0.72, "spleen": NAN, "cyst": NAN})
    CHANGE = Change("mean", 1)

    def found(self, names: tuple[str, ...] = ("liver", "spleen", "cyst")) -> Contributions:
        return Contributions("reference", names, self.UNTOUCHED, {self.CHANGE: self.CHANGED})

    def test_means_are_over_labels_and_then_over_cases(self) -> None:
        found = self.found()
        assert found.dice == pytest.approx((0.85 + 0.7) / 2)
        assert found.dice_with(self.CHANGE) == pytest.approx((0.65 + 0.72) / 2)
        assert found.falls(self.CHANGE) == pytest.approx((0.20 - 0.02) / 2)
        assert found.falls_of_cases(self.CHANGE) == pytest.approx((0.20, -0.02))

    def test_a_false_find_that_vanishes_is_a_rise_and_one_that_comes_a_fall(self) -> None:
        """A reference with a liver alone, of Dice 0.9 throughout; a cyst is found where there is none, or is not."""
        wrong, right = {"liver": 0.9, "cyst": 0.0}, {"liver": 0.9, "cyst": math.nan}
        vanishes = Contributions("reference", ("liver", "cyst"), (wrong,), {self.CHANGE: (right,)})
        assert (vanishes.dice, vanishes.dice_with(self.CHANGE)) == pytest.approx((0.45, 0.95))
        assert vanishes.most_changed(self.CHANGE) == ("cyst", -1.0)
        comes = Contributions("reference", ("liver", "cyst"), (right,), {self.CHANGE: (wrong,)})
        assert (comes.dice, comes.dice_with(self.CHANGE)) == pytest.approx((0.95, 0.45))
        assert comes.falls_of_cases(self.CHANGE) == pytest.approx((0.5,))
        assert comes.most_changed(self.CHANGE) == ("cyst", 1.0)

    def test_labels_of_a_case_are_the_same_in_every_row(self) -> None:
        """What one change brings up counts in another that leaves it be, which changes nothing then."""
        other, wrong, right = Change("cut", 1), {"liver": 0.9, "cyst": 0.0}, {"liver": 0.9, "cyst": math.nan}
        found = Contributions("reference", ("liver", "cyst"), (right,), {self.CHANGE: (wrong,), other: (right,)})
        assert found.falls(other) == 0.0
        assert found.dice_with(other) == found.dice == pytest.approx(0.95)

    def test_the_label_that_changes_most_is_named(self) -> None:
        assert self.found().most_changed(self.CHANGE) == ("spleen", pytest.approx(0.3))
        assert self.found(("cyst",)).most_changed(self.CHANGE) is None

    def test_without_any_label_there_is_no_dice(self) -> None:
        assert math.isnan(self.found(("cyst",)).dice)
        assert math.isnan(self.found(("cyst",)).falls(self.CHANGE))

    def test_names_are_for_tables(self) -> None:
        names = [change.name for change in (Change("zeroed", 2), Change("mean", 2), Change("cut", 3), Change("cut", 1))]
        assert names == ["skip 2 zeroed", "skip 2 by its mean", "only levels 1 to 3", "only level 1"]
