"""Resizing over the same field of view: equal to SciPy and skimage, in hardly more memory than in and out take."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import zoom
from skimage.transform import resize as skimage_resize

from transforms.geometry import Geometry
from transforms.resample import move, resize
from transforms.separable import interpolate
from transforms.spline import Ends, Order, placed_weights, resized_weights

SIDES = st.tuples(*[st.integers(1, 24)] * 3)
SCIPY_MODES = {"mirror": "mirror", "edge": "nearest"}
SKIMAGE_MODES = {"mirror": "reflect", "edge": "edge"}


def noise(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(7).normal(size=shape).astype(np.float32))


def scipy_resize(voxels: torch.Tensor, shape: tuple[int, ...], order: int, ends: Ends) -> np.ndarray:
    factors = [m / n for n, m in zip(voxels.shape, shape, strict=True)]
    return zoom(voxels.double().numpy(), factors, order=order, mode=SCIPY_MODES[ends], grid_mode=True)


@given(SIDES, SIDES, st.sampled_from((0, 1, 3)), st.sampled_from(("mirror", "edge")))
@settings(max_examples=60, deadline=None)
def test_scipy_agrees(sides: tuple[int, ...], shape: tuple[int, ...], order: Order, ends: Ends) -> None:
    voxels = noise(sides)
    found = resize(voxels[None], shape, orders=(order, order, order), ends=ends)[0]
    np.testing.assert_allclose(found.numpy(), scipy_resize(voxels, shape, order, ends), atol=1e-5)


@pytest.mark.parametrize("ends", ["mirror", "edge"])
@pytest.mark.parametrize("order", [1, 3])
@pytest.mark.parametrize("shape", [(53, 90, 41), (120, 31, 77)])
def test_skimage_agrees_over_several_slabs_and_blocks(shape: tuple[int, ...], order: Order, ends: Ends) -> None:
    voxels = noise((80, 61, 70))
    theirs = skimage_resize(
        voxels.double().numpy(), shape, order=order, mode=SKIMAGE_MODES[ends], anti_aliasing=False, clip=False
    )
    found = resize(voxels[None], shape, orders=(order, order, order), ends=ends)[0]
    np.testing.assert_allclose(found.numpy(), theirs, atol=1e-5)


@pytest.mark.parametrize("order", [1, 3])
def test_grids_through_the_outermost_centres_are_a_move(order: Order) -> None:
    """scipy.ndimage.zoom with `grid_mode=False`: voxel t of m at t (n - 1) / (m - 1)."""
    voxels, shape = noise((9, 12, 40)), (17, 7, 23)
    steps = [(n - 1) / (m - 1) for n, m in zip(voxels.shape, shape, strict=True)]
    target = Geometry(shape, np.diag([*steps, 1.0]))
    factors = [m / n for n, m in zip(voxels.shape, shape, strict=True)]
    theirs = zoom(voxels.double().numpy(), factors, order=order, mode="mirror")
    found = move(voxels[None], Geometry((9, 12, 40), np.eye(4)), target, order=order)[0]
    np.testing.assert_allclose(found.numpy(), theirs, atol=1e-5)


def test_each_axis_has_its_own_order() -> None:
    voxels = noise((11, 12, 13))
    found = resize(voxels[None], (20, 9, 30), orders=(0, 1, 3))
    for axis, order in enumerate((0, 1, 3)):
        shape = list(voxels.shape)
        shape[axis] = (20, 9, 30)[axis]
        voxels = torch.from_numpy(scipy_resize(voxels, tuple(shape), order, "mirror"))
    np.testing.assert_allclose(found[0].numpy(), voxels.numpy(), atol=1e-5)


def test_the_same_shape_is_the_same_volume() -> None:
    voxels = noise((2, 5, 6, 7))
    assert torch.equal(resize(voxels, (5, 6, 7), orders=(3, 3, 3)), voxels)


@pytest.mark.parametrize("dtype", [torch.float16, torch.int16, torch.uint8, torch.float64])
def test_types_go_in_and_come_out(dtype: torch.dtype) -> None:
    voxels = (noise((1, 20, 21, 22)) * 30 + 128).clamp(0, 255).to(dtype)
    expected = resize(voxels.float(), (31, 15, 40), orders=(3, 3, 3))
    assert torch.equal(resize(voxels, (31, 15, 40), orders=(3, 3, 3)), expected)
    found = resize(voxels, (31, 15, 40), orders=(3, 3, 3), dtype=dtype)
    assert found.dtype == dtype
    if dtype.is_floating_point:
        assert torch.equal(found, expected.to(dtype))
    else:
        limits = torch.iinfo(dtype)
        assert torch.equal(found, expected.round().clamp(limits.min, limits.max).to(dtype))


def test_any_strides_and_channels() -> None:
    voxels = noise((2, 30, 20, 25)).permute(0, 3, 1, 2)
    found = resize(voxels, (40, 33, 10), orders=(3, 1, 3))
    assert torch.equal(found, resize(voxels.contiguous(), (40, 33, 10), orders=(3, 1, 3)))
    assert torch.equal(found[1:], resize(voxels[1:], (40, 33, 10), orders=(3, 1, 3)))


@given(st.integers(1, 90), st.integers(1, 90), st.sampled_from((0, 1, 3)), st.sampled_from(("mirror", "edge")))
@settings(max_examples=40, deadline=None)
def test_blocks_are_parts_of_the_whole_matrix(n: int, m: int, order: Order, ends: Ends) -> None:
    weights = resized_weights(n, m, order, ends)
    np.testing.assert_allclose(weights.dense().sum(dim=1).numpy(), 1.0, atol=1e-5)
    low, high = weights.span(m // 2, m)
    whole = weights.dense()[m // 2 :]
    assert torch.equal(weights.block(m // 2, m), whole[:, low:high])
    assert torch.count_nonzero(whole) == torch.count_nonzero(whole[:, low:high])


def test_outside_is_filled_on_every_axis() -> None:
    """One axis that lies inside, one that reaches out by three voxels: their edge's value one voxel out, then fill."""
    inside, beyond = placed_weights(4, 3, 0.9, 0.1, 1), placed_weights(3, 9, 1.0, -3.0, 1)
    found = interpolate(torch.ones(1, 4, 3, 3), (inside, beyond, beyond), fill=5.0)[0]
    row = torch.tensor([5.0, 5, 1, 1, 1, 1, 1, 5, 5])
    expected = torch.where((row[:, None] == 1) & (row == 1), 1.0, 5.0)
    np.testing.assert_allclose(found.numpy(), expected.expand(3, 9, 9).numpy(), atol=1e-6)


def test_what_cannot_be_resized() -> None:
    for shape in ((1, 2), (0, 1, 1)):
        with pytest.raises(ValueError, match="cannot be resized to"):
            resize(noise((1, 2, 3, 4)), shape, orders=(1, 1, 1))
    with pytest.raises(ValueError, match=r"shape \(2, 3, 4\) cannot"):
        resize(noise((2, 3, 4)), (2, 2, 2), orders=(1, 1, 1))


MEMORY = """
import re, sys, torch
from pathlib import Path
from transforms.resample import resize
torch.set_num_threads(1)
dtype = getattr(torch, sys.argv[1])
def peak():  # ru_maxrss would be the parent's where that was larger
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
resize(torch.ones(1, 40, 40, 40), (48, 48, 48), orders=(3, 3, 3), dtype=dtype)
before = peak()
voxels = torch.ones((1, 320, 320, 320), dtype=dtype)
moved = resize(voxels, (280, 360, 360), orders=(3, 3, 3), dtype=dtype)
print((peak() - before) / (voxels.nbytes + moved.nbytes))
"""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16", "int16"])
def test_memory_is_what_goes_in_and_comes_out_and_a_tenth(dtype: str) -> None:
    run = subprocess.run([sys.executable, "-c", MEMORY, dtype], capture_output=True, text=True, check=True)
    assert 0.9 < float(run.stdout) < 1.1
