"""Normalisation worked out by hand and by NumPy in float64."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from monai.data import MetaTensor
from monai.transforms import NormalizeIntensity
from pydantic import ValidationError
from torch import Tensor

from transforms.intensity import normalise, normalise_channels
from transforms.intensity_spec import Normalisation
from transforms.steps import NormaliseIntensityd

CT = Normalisation(kind="window", lower=-100, upper=300, mean=50, deviation=100)
MR = Normalisation(kind="zscore")
MASKED = Normalisation(kind="zscore", nonzero=True)
NNUNET: dict[str, Normalisation] = {
    kind: Normalisation.model_validate({"kind": kind, "smallest_divisor": 1e-8})
    for kind in ("zscore", "inside", "unit")
}


def line(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).reshape(len(values), 1, 1)


def volume(seed: int = 0, mean: float = 400.0, deviation: float = 90.0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(mean, deviation, (12, 10, 9)).astype(np.float32))


def test_a_window_by_hand() -> None:
    found = normalise(line(-1024, -100, 0, 50, 150, 300, 3000), CT)
    assert found.flatten().tolist() == pytest.approx([-1.5, -1.5, -0.5, 0.0, 1.0, 2.5, 2.5])


def test_a_zscore_by_hand() -> None:
    """Mean 5; squares 9, 1, 1, 1, 0, 0, 4, 16 add up to 32, so the deviation is 2."""
    found = normalise(line(2, 4, 4, 4, 5, 5, 7, 9), MR)
    assert found.flatten().tolist() == pytest.approx([-1.5, -0.5, -0.5, -0.5, 0, 0, 1, 2])


def test_a_masked_zscore_by_hand() -> None:
    """Zeros count nowhere, and become the lowest of the rest."""
    found = normalise(line(0, 2, 4, 0, 4, 4, 5, 5, 7, 9, 0), MASKED)
    assert found.flatten().tolist() == pytest.approx([-1.5, -1.5, -0.5, -1.5, -0.5, -0.5, 0, 0, 1, 2, -1.5])


@pytest.mark.parametrize("how", [MR, MASKED])
@pytest.mark.parametrize("mean", [0.3, 400.0, 20_000.0])
def test_a_zscore_is_numpys(how: Normalisation, mean: float) -> None:
    before = volume(mean=mean)
    exact = before.double().numpy()
    np.testing.assert_allclose(
        normalise(before, how), (exact - exact.mean()) / exact.std(), atol=2e-6 * mean / 90 + 1e-5
    )


def test_monai_agrees() -> None:
    before = volume()
    before[:6] = 0
    inside = before != 0
    theirs = NormalizeIntensity(nonzero=True)(before[None])[0]
    found = normalise(before, MASKED)
    np.testing.assert_allclose(found[inside], theirs[inside], atol=1e-5)
    assert bool((found[~inside] == found[inside].min()).all())
    np.testing.assert_allclose(normalise(before, MR), NormalizeIntensity()(before[None])[0], atol=1e-5)


@given(st.floats(-1e4, 1e4), st.floats(0.5, 1e3), st.integers(0, 99))
def test_a_zscore_forgets_scale_and_offset(offset: float, scale: float, seed: int) -> None:
    before = volume(seed, 0.0, 1.0)
    moved = normalise(before * scale + offset, MR)
    np.testing.assert_allclose(moved, normalise(before, MR), atol=1e-5 + 1e-6 * abs(offset) / scale)


@pytest.mark.parametrize("how", [CT, MR, MASKED])
def test_the_input_stays_as_it_is(how: Normalisation) -> None:
    before = volume()
    before[0] = 0
    kept = before.clone()
    found = normalise(before, how)
    assert torch.equal(before, kept)
    assert found.dtype == torch.float32
    assert found.shape == before.shape
    found.zero_()
    assert torch.equal(before, kept)


@pytest.mark.parametrize(
    ("how", "values"),
    [(MR, (7, 7, 7)), (MR, (0, 0)), (MR, (3,)), (MASKED, (0, 0, 0)), (MASKED, (0, 5, 5, 0)), (MASKED, (0, 5, 0))],
)
def test_a_constant_volume_has_no_zscore(how: Normalisation, values: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="one value everywhere"):
        normalise(line(*values), how)


def test_a_constant_volume_in_a_window_is_what_the_window_says() -> None:
    assert normalise(line(50, 50), CT).flatten().tolist() == [0.0, 0.0]


def test_each_channel_by_its_own() -> None:
    image = torch.stack([volume(1), volume(2)])
    other = volume(3)
    found = NormaliseIntensityd("image", [CT, MR])({"image": image, "other": other})
    assert torch.equal(found["image"][0], normalise(image[0], CT))
    assert torch.equal(found["image"][1], normalise(image[1], MR))
    assert found["other"] is other


def test_the_grid_is_kept() -> None:
    affine = torch.tensor([[0, 0, 2, 5], [1, 0, 0, 6], [0, 3, 0, 7], [0, 0, 0, 1]], dtype=torch.float64)
    image = MetaTensor(torch.stack([volume(1), volume(2)]), affine=affine)
    found = NormaliseIntensityd("image", [MR, MR])({"image": image})["image"]
    assert isinstance(found, MetaTensor)
    assert found.shape == image.shape
    assert torch.equal(found.affine, affine)


@pytest.mark.parametrize("channels", [1, 3])
def test_another_number_of_channels_is_refused(channels: int) -> None:
    with pytest.raises(ValueError, match=f"{channels} channels, expected 2"):
        NormaliseIntensityd("image", [MR, MR])({"image": torch.rand(channels, 3, 3, 3)})


@pytest.mark.parametrize("wrong", [{"lower": 5, "upper": 5}, {"lower": 6, "upper": 5}, {"upper": 1, "deviation": 0}])
def test_an_empty_window_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match="is empty"):
        Normalisation(kind="window", **wrong)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValidationError, match="'window', 'zscore', 'inside'"):
        Normalisation(kind="minmax")


def test_inside_by_hand() -> None:
    """Mean 5 and deviation 2 of the eight inside; what is outside stays as it is."""
    voxels, inside = line(2, 4, 4, 4, 5, 5, 7, 9, 0), torch.arange(9).reshape(9, 1, 1) < 8
    found = normalise(voxels, Normalisation(kind="inside"), inside=inside)
    assert found.flatten().tolist() == pytest.approx([-1.5, -0.5, -0.5, -0.5, 0, 0, 1, 2, 0])


def test_inside_needs_a_body() -> None:
    with pytest.raises(ValueError, match="needs its mask"):
        normalise(line(1, 2), Normalisation(kind="inside"))


@pytest.mark.parametrize(
    ("kind", "expected"), [("unit", [0, 0.4, 1]), ("byte", [0, 0.2, 0.5]), ("none", [0, 51, 127.5])]
)
def test_other_makers_ranges_by_hand(kind: Literal["unit", "byte", "none"], expected: list[float]) -> None:
    voxels = line(0, 51, 127.5)
    found = normalise(voxels, Normalisation(kind=kind))
    assert found.flatten().tolist() == pytest.approx(expected)
    found.zero_()
    assert voxels.max() == 127.5


@pytest.mark.parametrize("values", [(-1, 5), (0, 256)])
def test_what_is_no_byte_is_refused(values: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="bytes"):
        normalise(line(*values), Normalisation(kind="byte"))


@pytest.mark.parametrize("kind", ["unit", "inside"])
def test_a_constant_volume_has_no_range_of_its_own(kind: Literal["unit", "inside"]) -> None:
    with pytest.raises(ValueError, match="one value everywhere"):
        normalise(line(3, 3, 3), Normalisation(kind=kind), inside=torch.ones(3, 1, 1, dtype=torch.bool))


EVERYWHERE = torch.ones(60, 50, 40, dtype=torch.bool)


@pytest.mark.parametrize("value", [0.0, 7.0, 1000.1, -1023.7])
@pytest.mark.parametrize("kind", NNUNET)
def test_with_a_smallest_divisor_one_value_becomes_0(kind: str, value: float) -> None:
    """Also where the float32 mean of many equal values is not that value, as of 1000.1."""
    found = normalise(torch.full((60, 50, 40), value), NNUNET[kind], inside=EVERYWHERE)
    assert torch.equal(found, torch.zeros(60, 50, 40))


@pytest.mark.parametrize(("spread", "factor"), [(4e-7, 1.0), (1e-7, 1.0), (2e-9, 0.2)])
def test_a_smallest_divisor_by_hand(spread: float, factor: float) -> None:
    """0 and the spread in equal numbers: the deviation is half of it, and 1e-8 divides where that is less."""
    before, inside = line(0, spread, 0, spread), torch.ones(4, 1, 1, dtype=torch.bool)
    smaller = spread / 2 / max(spread / 2, 1e-8)
    for kind in ("zscore", "inside"):
        found = normalise(before, NNUNET[kind], inside=inside)
        assert found.flatten().tolist() == pytest.approx([-smaller, smaller, -smaller, smaller], rel=1e-4)
    found = normalise(before, NNUNET["unit"])
    assert found.flatten().tolist() == pytest.approx([0, factor, 0, factor], rel=1e-4)


@pytest.mark.parametrize("kind", NNUNET)
def test_a_smallest_divisor_changes_nothing_where_there_is_something_to_see(kind: str) -> None:
    before, plain = volume(), NNUNET[kind].model_copy(update={"smallest_divisor": None})
    inside = before > 300
    assert torch.equal(normalise(before, NNUNET[kind], inside=inside), normalise(before, plain, inside=inside))


def test_a_channel_that_was_filled_with_zeros_beside_one_with_an_image() -> None:
    image = torch.stack([torch.zeros(12, 10, 9), volume()])
    found = normalise_channels(image, [NNUNET["zscore"]] * 2)
    assert torch.equal(found[0], image[0])
    assert torch.equal(found[1], normalise(image[1], MR))
    with pytest.raises(ValueError, match="one value everywhere"):
        normalise_channels(image, [MR, MR])


def test_where_every_channel_has_one_value_there_is_nothing_to_see() -> None:
    flat = torch.stack([torch.zeros(4, 3, 2), torch.full((4, 3, 2), 5.0)])
    with pytest.raises(ValueError, match="every channel has one value everywhere"):
        normalise_channels(flat, [NNUNET["zscore"], NNUNET["unit"]])
    with pytest.raises(ValueError, match="the volume has one value everywhere"):
        normalise_channels(flat[1:], [NNUNET["zscore"]])
    with pytest.raises(ValueError, match="the volume has one value everywhere"):
        normalise(flat[0], NNUNET["inside"], inside=torch.zeros(4, 3, 2, dtype=torch.bool))


def test_a_mean_that_was_rounded_hides_no_constant_volume() -> None:
    with pytest.raises(ValueError, match="one value everywhere"):
        normalise(torch.full((200, 200, 150), 1000.1), MR)


def test_what_is_written_without_a_smallest_divisor_is_as_it_was_before_there_was_one() -> None:
    written = {"kind": "zscore", "lower": 0.0, "upper": 0.0, "mean": 0.0, "deviation": 1.0, "nonzero": False}
    assert MR.model_dump(mode="json") == written
    assert Normalisation.model_validate(written) == MR
    for how in (CT, MASKED, NNUNET["unit"]):
        assert Normalisation.model_validate_json(how.model_dump_json()) == how
    assert NNUNET["zscore"].model_dump() == {**written, "smallest_divisor": 1e-8}


@pytest.mark.parametrize("wrong", [0, -1e-8])
def test_a_smallest_divisor_is_above_0(wrong: float) -> None:
    with pytest.raises(ValidationError, match="greater than 0"):
        Normalisation(kind="zscore", smallest_divisor=wrong)
