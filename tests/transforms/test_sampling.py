"""Voxels gathered at places: against PyTorch's own resampling, and the same however the work is cut into slabs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from transforms import sampling
from transforms.sampling import linear, nearest, places_in

VOLUME = (9, 11, 8)


def random_places(seed: int) -> Tensor:
    """Inside, on the border, beside and far outside of a volume."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.rand(3, 7, 6, 5, generator=generator) * 30 - 10
    places[:, 0] = places[:, 0].round()
    return places


def grid_of(places: Tensor) -> Tensor:
    """The same places as `grid_sample` has them."""
    sides = torch.tensor(VOLUME).reshape(3, 1, 1, 1)
    return ((places + 0.5) * 2 / sides - 1).flip(0).permute(1, 2, 3, 0)[None]


@pytest.mark.parametrize("seed", range(3))
def test_pytorch_resamples_the_same(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(2, *VOLUME, generator=generator)
    places = random_places(seed)
    expected = F.grid_sample(image[None], grid_of(places), align_corners=False)[0]
    found = linear(image, places_in((slice(0, 9), slice(0, 11), slice(0, 8)), places.clone()), fill=0.0)
    np.testing.assert_allclose(found.numpy(), expected.numpy(), atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int64])
def test_classes_keep_their_type_and_take_the_nearest(dtype: torch.dtype) -> None:
    classes = torch.randint(1, 200, (1, *VOLUME), generator=torch.Generator().manual_seed(0))
    places = random_places(5) + 1e-3  # off the ties
    expected = F.grid_sample(classes.float()[None], grid_of(places), mode="nearest", align_corners=False)[0]
    found = nearest(classes.to(dtype), places_in((slice(0, 9), slice(0, 11), slice(0, 8)), places.clone()))
    assert found.dtype == dtype
    assert torch.equal(found.int(), expected.int())


def test_a_part_of_a_volume_is_read_as_the_volume_is() -> None:
    image = torch.randn(1, *VOLUME, generator=torch.Generator().manual_seed(0))
    whole = torch.rand(3, 4, 4, 4, generator=torch.Generator().manual_seed(1)) * 3 + 3.5
    first = torch.tensor([3.0, 2.0, 3.0]).reshape(3, 1, 1, 1)
    part = (slice(3, 8), slice(2, 9), slice(3, 8))
    from_part = linear(image, places_in(part, whole - first), fill=-7.0)
    from_all = linear(image, places_in((slice(0, 9), slice(0, 11), slice(0, 8)), whole.clone()), fill=-7.0)
    np.testing.assert_allclose(from_part.numpy(), from_all.numpy(), atol=1e-5)


@pytest.mark.parametrize("slab", [1, 70, 10_000])
def test_slabs_change_no_bit(monkeypatch: pytest.MonkeyPatch, slab: int) -> None:
    image = torch.randn(2, *VOLUME, generator=torch.Generator().manual_seed(0))
    classes = torch.randint(0, 5, (1, *VOLUME), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    places = places_in((slice(0, 9), slice(0, 11), slice(0, 8)), random_places(1))
    expected = linear(image, places, fill=1.0), nearest(classes, places)
    monkeypatch.setattr(sampling, "SLAB_PLACES", slab)
    assert torch.equal(linear(image, places, fill=1.0), expected[0])
    assert torch.equal(nearest(classes, places), expected[1])
