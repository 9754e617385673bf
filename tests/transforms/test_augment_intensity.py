"""Changes of intensity: each against its formula, NumPy's or SciPy's; none may make NaN or write into its input."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter, map_coordinates
from torch import Tensor

from transforms.augment import IntensityDraw, IntensitySettings, RandIntensityd, change_intensity, draw_intensity

Triple = tuple[int, int, int]

NOTHING = IntensityDraw(None, None, 1.0, 1.0, 1.0, None, 0)

EVERYTHING = IntensitySettings(
    noise_probability=1.0,
    noise_deviation=0.2,
    blur_probability=1.0,
    blur_voxels=(0.5, 1.5),
    brightness_probability=1.0,
    brightness_range=(0.7, 1.3),
    contrast_probability=1.0,
    contrast_range=(0.7, 1.3),
    gamma_probability=1.0,
    gamma_range=(0.7, 1.5),
    low_resolution_probability=1.0,
    low_resolution_range=(0.5, 0.9),
)


def voxels(shape: Triple = (9, 12, 7), seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(0.3, 1.2, shape).astype(np.float32))


def changed(channel: Tensor, **what: float | None) -> npt.NDArray[np.float32]:
    before = channel.clone()
    after = change_intensity(channel, replace(NOTHING, **what))
    assert torch.equal(channel, before)
    assert after.dtype == torch.float32
    assert after.shape == channel.shape
    return after.numpy()


def test_nothing_drawn_changes_no_bit() -> None:
    image = voxels()[None]
    assert torch.equal(change_intensity(image[0], NOTHING), image[0])
    after = RandIntensityd(IntensitySettings()).set_random_state(seed=0)({"image": image, "case": "a"})
    assert torch.equal(after["image"], image)
    assert after["case"] == "a"
    after["image"].zero_()
    assert bool(image.any())


def test_brightness_is_a_factor() -> None:
    assert np.array_equal(changed(voxels(), brightness=1.25), voxels().numpy() * np.float32(1.25))


@pytest.mark.parametrize("contrast", [0.75, 1.5])
def test_contrast_spreads_about_the_mean_and_stays_in_range(contrast: float) -> None:
    before = voxels().numpy().astype(np.float64)
    expected = np.clip((before - before.mean()) * contrast + before.mean(), before.min(), before.max())
    np.testing.assert_allclose(changed(voxels(), contrast=contrast), expected, atol=1e-6)


@pytest.mark.parametrize("gamma", [0.7, 1.5])
def test_gamma_is_a_power_that_keeps_mean_and_deviation(gamma: float) -> None:
    before, after = voxels().numpy().astype(np.float64), changed(voxels(), gamma=gamma)
    assert float(after.mean()) == pytest.approx(before.mean(), abs=1e-5)
    assert float(after.std()) == pytest.approx(before.std(), rel=1e-5)
    curve = ((before - before.min()) / (before.max() - before.min())) ** gamma
    slope, offset = np.polyfit(curve.ravel(), after.ravel(), 1)
    assert slope > 0
    np.testing.assert_allclose(after, slope * curve + offset, atol=1e-5)


@pytest.mark.parametrize("shape", [(9, 12, 7), (1, 12, 7), (12, 1, 1), (2, 3, 4)])
@pytest.mark.parametrize("sigma", [0.5, 0.8, 1.0, 1.4])
def test_blur_is_scipys_with_edges_repeated(shape: Triple, sigma: float) -> None:
    """Cut off at three sigmas, and normalised."""
    expected = gaussian_filter(
        voxels(shape).double().numpy(),
        [sigma if n > 1 else 0 for n in shape],
        mode="nearest",
        radius=int(np.ceil(3 * sigma)),
    )
    np.testing.assert_allclose(changed(voxels(shape), blur_voxels=sigma), expected, atol=1e-5)


@pytest.mark.parametrize("zoom", [0.5, 0.63, 0.9, 1.0])
@pytest.mark.parametrize("shape", [(10, 12, 7), (9, 1, 3)])
def test_low_resolution_takes_the_nearest_and_interpolates_back(shape: Triple, zoom: float) -> None:
    expected = voxels(shape).double().numpy()
    for axis, side in enumerate(shape):
        small = max(1, round(side * zoom))
        nearest = np.floor((np.arange(small) + 0.5) * side / small).astype(int)
        places = np.indices([side if a == axis else n for a, n in enumerate(expected.shape)]).astype(float)
        places[axis] = (places[axis] + 0.5) * small / side - 0.5
        expected = map_coordinates(expected.take(nearest, axis), places, order=1, mode="nearest")
    np.testing.assert_allclose(changed(voxels(shape), low_resolution=zoom), expected, atol=1e-5)


def test_low_resolution_by_hand() -> None:
    """Of 0 1 2 3 4 5 the coarse voxels take 1, 3 and 5; back in between at quarters, the ends repeated."""
    line = torch.arange(6.0).reshape(6, 1, 1)
    assert changed(line, low_resolution=0.5).ravel().tolist() == pytest.approx([1, 1.5, 2.5, 3.5, 4.5, 5])


def test_noise_has_the_deviation_that_was_drawn() -> None:
    channel = voxels((40, 40, 40))
    noise = changed(channel, noise_deviation=0.2, noise_seed=4) - channel.numpy()
    assert abs(float(noise.mean())) < 4 * 0.2 / np.sqrt(noise.size)
    assert float(noise.std()) == pytest.approx(0.2, rel=0.02)
    assert abs(float(np.corrcoef(noise[:-1].ravel(), noise[1:].ravel())[0, 1])) < 0.02
    assert float((np.abs(noise) < 0.2).mean()) == pytest.approx(0.683, abs=0.01)


def test_noise_is_that_of_its_seed() -> None:
    first, again, other = (changed(voxels(), noise_deviation=0.2, noise_seed=s) for s in (7, 7, 8))
    assert np.array_equal(first, again)
    assert not np.allclose(first, other, atol=0.05)


def test_changes_follow_one_another_in_a_fixed_order() -> None:
    """Optics first, then brightness, contrast and gamma; noise comes last and is never blurred."""
    parts = {
        "blur_voxels": 0.8,
        "low_resolution": 0.6,
        "brightness": 1.2,
        "contrast": 0.8,
        "gamma": 1.3,
        "noise_deviation": 0.1,
    }
    expected = voxels()
    for name, value in parts.items():
        expected = change_intensity(expected, replace(NOTHING, **{name: value}))
    assert torch.equal(change_intensity(voxels(), replace(NOTHING, **parts)), expected)


@given(
    st.tuples(*[st.integers(1, 6)] * 3),
    st.sampled_from([0.0, -1.3, 700.0]),
    st.sampled_from([0.0, 1e-9, 1e-4]),
    st.integers(0, 1000),
)
@settings(max_examples=80)
def test_flat_channels_stay_flat_numbers(shape: Triple, value: float, spread: float, seed: int) -> None:
    """Constant, almost constant and single-voxel channels: no NaN, and nothing but noise and brightness moves them."""
    ripple = np.random.default_rng(seed).uniform(-spread, spread, shape)
    channel = torch.from_numpy((value + ripple).astype(np.float32))
    draw = draw_intensity(np.random.RandomState(seed), EVERYTHING)
    after = changed(channel, **{f.name: getattr(draw, f.name) for f in fields(draw)})
    assert np.isfinite(after).all()
    quiet = changed(channel, blur_voxels=0.8, low_resolution=0.6, contrast=1.3, gamma=0.7)
    np.testing.assert_allclose(quiet, value, atol=2 * spread + 1e-6 * abs(value) + 1e-7)


def test_a_seed_gives_the_same_draw() -> None:
    first, again, other = (draw_intensity(np.random.RandomState(s), EVERYTHING) for s in (3, 3, 4))
    assert first == again
    assert first != other


@given(st.lists(st.sampled_from([0.0, 0.4, 1.0]), min_size=6, max_size=6), st.integers(0, 10_000))
def test_what_happens_never_moves_what_is_drawn_next(probabilities: list[float], seed: int) -> None:
    """The same numbers are used up, so one change can be switched off and all others stay as they were."""
    names = [f.name for f in fields(IntensitySettings) if f.name.endswith("_probability")]
    some = replace(EVERYTHING, **dict(zip(names, probabilities, strict=True)))
    random, reference = np.random.RandomState(seed), np.random.RandomState(seed)
    draw, full = draw_intensity(random, some), draw_intensity(reference, EVERYTHING)
    assert random.randint(2**31) == reference.randint(2**31)
    for field in fields(IntensityDraw):
        assert getattr(draw, field.name) in (getattr(full, field.name), getattr(NOTHING, field.name))
    assert draw.noise_seed == full.noise_seed


def test_probabilities_and_ranges_are_kept() -> None:
    some = replace(EVERYTHING, noise_probability=0.1, blur_probability=0.5, gamma_probability=0.8)
    draws = [draw_intensity(np.random.RandomState(seed), some) for seed in range(2000)]
    assert np.mean([d.noise_deviation is not None for d in draws]) == pytest.approx(0.1, abs=0.03)
    assert np.mean([d.blur_voxels is not None for d in draws]) == pytest.approx(0.5, abs=0.04)
    assert np.mean([d.gamma != 1.0 for d in draws]) == pytest.approx(0.8, abs=0.03)
    for name, (low, high) in (
        ("blur_voxels", some.blur_voxels),
        ("low_resolution", some.low_resolution_range),
        ("brightness", some.brightness_range),
        ("contrast", some.contrast_range),
        ("noise_deviation", (0.0, some.noise_deviation)),
    ):
        values = np.asarray([getattr(d, name) for d in draws if getattr(d, name) is not None])
        assert low <= values.min()
        assert values.max() <= high
        assert values.mean() == pytest.approx((low + high) / 2, abs=0.08 * (high - low))
    # As often below the geometric middle of the range as above.
    gammas = np.asarray([d.gamma for d in draws if d.gamma != 1.0])
    assert np.mean(gammas < np.sqrt(0.7 * 1.5)) == pytest.approx(0.5, abs=0.04)


def test_each_channel_has_its_own_draw() -> None:
    image = voxels()[None].repeat(3, 1, 1, 1)
    after = RandIntensityd(EVERYTHING).set_random_state(seed=2)({"image": image})["image"]
    assert after.shape == image.shape
    assert not torch.equal(after[0], after[1])
    random = np.random.RandomState(2)
    for channel, found in zip(image, after, strict=True):
        assert torch.equal(found, change_intensity(channel, draw_intensity(random, EVERYTHING)))


def test_memory_mapped_images_are_never_written(tmp_path: Path) -> None:
    stored = voxels()[None].numpy()
    np.save(tmp_path / "image.npy", stored)
    image = torch.from_numpy(np.load(tmp_path / "image.npy", mmap_mode="c"))
    change = RandIntensityd(replace(EVERYTHING, gamma_probability=0.5, noise_probability=0.5))
    change.set_random_state(seed=0)
    for _ in range(5):
        change({"image": image})["image"].fill_(7.0)
    assert np.array_equal(image.numpy(), stored)
