"""Missing channels are exactly 0, dropped ones are drawn as said, and each channel ends in its own lowest value."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from torch import Tensor

from transforms.augment import IntensitySettings, PatchDraw, RandIntensityd, SpatialSettings, cut_patch
from transforms.chains import placing_steps, reseed, training_chain
from transforms.channels import (
    channel_minima,
    draw_kept,
    insert_missing,
    pad_channels,
)
from transforms.geometry import Geometry
from transforms.intensity_spec import Normalisation
from transforms.load import as_metatensor, geometry_of
from transforms.steps import InsertMissingd, RandDropChannelsd

SHAPE = (5, 6, 7)


def image(*levels: float) -> Tensor:
    """Channels of small noise about their own levels; a level of 0 is a missing channel."""
    noise = torch.rand(len(levels), *SHAPE, generator=torch.Generator().manual_seed(1))
    return torch.stack([level + (channel if level else 0 * channel) for level, channel in zip(levels, noise)])  # noqa: B905


class TestBeyondTheBorder:
    def test_each_channel_has_its_own_lowest_value_and_a_missing_one_0(self) -> None:
        volume = image(10, -20, 0)
        minima = channel_minima(volume)
        assert minima.tolist() == [float(volume[0].min()), float(volume[1].min()), 0.0]

    @pytest.mark.parametrize("angle", [0.0, 0.3])
    def test_patches_and_windows_go_on_alike(self, angle: float) -> None:
        """A patch about a corner, plain or turned, and a window that is larger than the volume."""
        volume = image(10, -20, 0)
        minima = channel_minima(volume)
        turn = np.eye(3)
        turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
        draw = PatchDraw(np.array([-0.5, -0.5, -0.5]), turn, None, ())
        patch, _ = cut_patch(volume, torch.zeros(1, *SHAPE), draw, (8, 8, 8), fill=minima)
        beyond = patch[:, :2, :2, :2]  # at least two voxels off the corner, however the patch is turned
        assert torch.equal(beyond, minima.reshape(3, 1, 1, 1).expand_as(beyond))
        assert patch[0].min() >= 10
        assert patch[1].max() <= -19
        assert patch[2].abs().max() == 0
        padded = pad_channels(volume, [(2, 1), (0, 0), (0, 3)])
        assert padded.shape == (3, 8, 6, 10)
        assert torch.equal(padded[:, 2:-1, :, :-3], volume)
        for outside in (padded[:, :2], padded[:, -1:], padded[..., -3:]):
            assert torch.equal(outside, minima.reshape(3, 1, 1, 1).expand_as(outside))

    def test_one_channel_is_filled_as_by_one_value(self) -> None:
        volume = image(10)
        draw = PatchDraw(np.array([0.0, 0.0, 0.0]), np.eye(3), None, (0,))
        none = torch.zeros(1, *SHAPE)
        one, _ = cut_patch(volume, none, draw, (7, 7, 7), fill=float(volume.min()))
        other, _ = cut_patch(volume, none, draw, (7, 7, 7), fill=channel_minima(volume))
        assert torch.equal(one, other)

    def test_what_fits_is_not_copied(self) -> None:
        volume = image(1, 2)
        assert pad_channels(volume, [(0, 0)] * 3) is volume


class TestMissing:
    def test_zeros_are_put_in_their_places(self) -> None:
        volume = image(3, 4)
        whole = insert_missing(volume, [False, True, False, True])
        assert torch.equal(whole[[1, 3]], volume)
        assert whole[[0, 2]].abs().max() == 0
        with pytest.raises(ValueError, match="2 channels, expected 1 of 2"):
            insert_missing(volume, [True, False])

    def test_preprocessing_leaves_0_on_the_same_grid(self) -> None:
        geometry = Geometry(SHAPE, np.diag([2.0, -1.0, 1.5, 1.0]))
        hows = [Normalisation(kind="zscore"), Normalisation(kind="window", lower=0, upper=9, mean=5, deviation=2)]
        steps = placing_steps(["image"], [], "RAS", (1.0, 1.0, 1.0), hows, [True, False])
        alone = placing_steps(["image"], [], "RAS", (1.0, 1.0, 1.0), hows[:1])
        assert isinstance(steps[-1], InsertMissingd)
        found, expected = ({"image": as_metatensor(image(7), geometry)} for _ in range(2))
        for step in steps:
            found = step(found)
        for step in alone:
            expected = step(expected)
        assert torch.equal(found["image"][0], expected["image"][0])
        assert found["image"][1].abs().max() == 0
        assert geometry_of(found["image"]).difference(geometry_of(expected["image"])) is None


class TestDropping:
    def kept(self, present: list[bool], optional: list[bool], probability: float, count: int = 4000) -> Counter[str]:
        random = np.random.RandomState(0)
        draws = (draw_kept(random, present, optional=optional, probability=probability) for _ in range(count))
        return Counter("".join(str(int(keep)) for keep in draw) for draw in draws)

    def test_only_optional_channels_are_dropped(self) -> None:
        found = self.kept([True] * 3, [False, True, False], 0.25)
        assert set(found) == {"111", "101"}
        assert found["101"] / 4000 == pytest.approx(0.25, abs=0.03)
        assert self.kept([True] * 3, [False] * 3, 1.0) == {"111": 4000}
        assert self.kept([True] * 3, [True] * 3, 0.0) == {"111": 4000}

    def test_one_always_stays_and_each_as_often(self) -> None:
        found = self.kept([True] * 3, [True] * 3, 1.0)
        assert set(found) == {"100", "010", "001"}
        assert min(found.values()) / 4000 == pytest.approx(1 / 3, abs=0.03)

    def test_a_missing_one_never_stays(self) -> None:
        """Where both of the two that are there would go, one of those stays."""
        found = self.kept([True, False, True], [True, True, True], 0.5)
        assert set(found) == {"101", "100", "001"}
        assert found["101"] / 4000 == pytest.approx(0.25, abs=0.03)
        assert self.kept([False, True], [True, True], 1.0) == {"01": 4000}

    def test_draws_are_as_many_whatever_happens(self) -> None:
        states = []
        for present, optional, probability in (([True] * 2, [False] * 2, 0.0), ([True, False], [True] * 2, 1.0)):
            random = np.random.RandomState(5)
            draw_kept(random, present, optional=optional, probability=probability)
            states.append(random.random_sample())
        assert states[0] == states[1]

    def test_others_keep_their_voxels_and_the_input_stays(self) -> None:
        volume = image(1, 2)
        drop = RandDropChannelsd([False, True], 1.0)
        before = volume.clone()
        result = drop({"image": volume, "case": "a"})
        assert torch.equal(result["image"][0], volume[0])
        assert result["image"][1].abs().max() == 0
        assert torch.equal(volume, before)
        assert set(result) == {"image", "case"}

    def test_no_noise_lies_in_a_missing_channel(self) -> None:
        """Through the whole chain of training, with a patch that reaches over the border."""
        noisy = IntensitySettings(
            noise_probability=1.0, noise_deviation=0.5, gamma_probability=1.0, gamma_range=(0.5, 2)
        )
        arguments = {"spatial": SpatialSettings(), "intensity": noisy, "twin_classes": (0, 1), "foreground_share": 0.0}
        drop = RandDropChannelsd([False, True, True], 0.0)
        chain = training_chain((8, 8, 8), (1, 1, 1), dropout=drop, **arguments)  # type: ignore[arg-type]
        reseed(chain, 3)
        volume = image(10, 0, -20)
        data = {"image": volume, "label": torch.zeros(1, *SHAPE), "fill": channel_minima(volume)}
        patch = chain({**data, "present": (True, False, True)})["image"]
        assert patch[1].abs().max() == 0
        assert (patch[[0, 2]] != 0).all()

    def test_without_optional_channels_a_seed_gives_what_it_gave(self) -> None:
        """The chain without the step, against the chain with it: the same patches, one after the other."""
        noisy = IntensitySettings(noise_probability=0.5, noise_deviation=0.5)
        turning = SpatialSettings(rotation_probability=0.5, rotation_degrees=20)
        volume = image(10, -20)
        data = {"image": volume, "label": torch.zeros(1, *SHAPE), "fill": channel_minima(volume)}
        chains = [
            training_chain(
                (4, 4, 4),
                (1, 1, 1),
                spatial=turning,
                intensity=noisy,
                twin_classes=(0,),
                foreground_share=0.3,
                dropout=dropout,
            )
            for dropout in (None, RandDropChannelsd([False, False], 0.3))
        ]
        for number in range(8):
            patches = []
            for chain in chains:
                reseed(chain, [1, number])
                patches.append(chain(data)["image"])
            assert torch.equal(*patches)


def test_the_intensities_of_a_zero_channel_stay_finite() -> None:
    everything = IntensitySettings(
        gamma_probability=1, gamma_range=(0.5, 2), contrast_probability=1, blur_probability=1
    )
    change = RandIntensityd(everything)
    change.set_random_state(seed=0)
    assert torch.isfinite(change({"image": torch.zeros(1, *SHAPE)})["image"]).all()
