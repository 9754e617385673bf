"""Class maps from scores that come slab by slab: equal to interpolating every score, whatever the slabs' sizes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import uniform_filter
from scipy.spatial.transform import Rotation

from transforms.geometry import Geometry
from transforms.resample import move, move_argmax, move_regions
from transforms.restore import SlabRestorer, slab_axis

CODES = ("RAS", "LPS", "RIP", "SLA", "ASR", "PIL", "LIA", "SPR")


def oblique(shape: tuple[int, int, int], spacing_mm: tuple[float, float, float], codes: str = "RAS") -> Geometry:
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", (11, -17, 23), degrees=True).as_matrix() * spacing_mm
    affine[:3, 3] = (-20.0, 35.0, 4.0)
    return Geometry(shape, affine).oriented(codes)


def scores_of(geometry: Geometry, *, outputs: int, smooth: bool, seed: int = 0) -> torch.Tensor:
    """Logits that change from voxel to voxel, or probabilities with large parts in which one class wins."""
    scores = torch.from_numpy(np.random.default_rng(seed).normal(size=(outputs, *geometry.shape)).astype(np.float32))
    if not smooth:
        return scores
    blurred = uniform_filter(scores.numpy() * 60, (0, 5, 5, 5), mode="nearest")
    return torch.from_numpy(blurred).softmax(dim=0)


def restored(scores: torch.Tensor, restorer: SlabRestorer, target: Geometry, sizes: Sequence[int]) -> torch.Tensor:
    """The class map from slabs of these sizes, each planes that were told as complete and none twice."""
    classes = torch.full(target.shape, 99, dtype=torch.int32)
    written: list[int] = []
    for slab in scores.split(list(sizes), dim=restorer.axis + 1):
        planes = restorer.add(slab, classes)
        assert not set(planes) & set(written)
        written += planes
        assert set(written) == set(restorer.complete(restorer.received))
        # What is not complete is not touched.
        rest = [t for t in range(target.shape[restorer.target_axis]) if t not in written]
        assert bool((classes.index_select(restorer.target_axis, torch.tensor(rest, dtype=torch.int64)) == 99).all())
    assert sorted(written) == list(range(target.shape[restorer.target_axis]))
    return classes


def all_at_once(scores: torch.Tensor, source: Geometry, target: Geometry) -> torch.Tensor:
    """By interpolating every score to full size."""
    return torch.cat([move(score[None], source, target) for score in scores]).argmax(dim=0).int()


@st.composite
def placed(draw: st.DrawFn) -> tuple[Geometry, Geometry]:
    """Two parallel grids, one of them turned, of another spacing, and cut or padded."""
    sides, spacing = st.integers(1, 9), st.floats(0.5, 2.0)
    source = oblique((draw(sides), draw(sides), draw(sides)), (1.0, 1.3, 2.0))
    other = (draw(spacing), draw(st.sampled_from((1.3, 0.65, 0.9))), draw(spacing))
    target = source.oriented(draw(st.sampled_from(CODES))).respaced(other)
    start = [draw(st.integers(-2, 2)) for _ in range(3)]
    return source, target.window(start, [draw(st.integers(1, 10)) for _ in range(3)])


@given(placed(), st.integers(1, 7), st.booleans(), st.integers(0, 2), st.data())
@settings(max_examples=60, deadline=None)
def test_every_score_interpolated_gives_the_same(
    grids: tuple[Geometry, Geometry], outputs: int, smooth: bool, axis: int, data: st.DataObject
) -> None:
    source, target = grids
    scores = scores_of(source, outputs=outputs, smooth=smooth)
    sizes = []
    while sum(sizes) < source.shape[axis]:
        sizes.append(data.draw(st.integers(1, source.shape[axis] - sum(sizes))))
    found = restored(scores, SlabRestorer(source, target, axis), target, sizes)
    assert torch.equal(found, all_at_once(scores, source, target))


@pytest.mark.parametrize(("codes", "axis"), list(zip(CODES, (0, 1, 2, 0, 1, 2, 0, 1), strict=True)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_slabs_of_any_size_give_the_same_bytes(codes: str, axis: int, dtype: torch.dtype) -> None:
    source = oblique((11, 10, 9), (1.0, 1.3, 2.0))
    target = source.oriented(codes).respaced((0.7, 0.8, 0.9))
    scores = scores_of(source, outputs=14, smooth=True).to(dtype)
    whole = restored(scores, SlabRestorer(source, target, axis), target, [source.shape[axis]])
    assert len(whole.unique()) > 8
    for size in (1, 2, 5):
        sizes = [len(part) for part in torch.arange(source.shape[axis]).split(size)]
        assert torch.equal(restored(scores, SlabRestorer(source, target, axis), target, sizes), whole)
    assert torch.equal(all_at_once(scores, source, target), whole)


def test_more_classes_than_a_byte_holds() -> None:
    source = oblique((13, 12, 11), (1.0, 1.3, 2.0))
    target = source.respaced((0.7, 0.8, 0.9))
    scores = scores_of(source, outputs=300, smooth=True)
    found = restored(scores, SlabRestorer(source, target, 1), target, [6, 6])
    assert int(found.max()) > 255
    assert torch.equal(found, all_at_once(scores, source, target))


def test_a_class_that_wins_at_no_corner_can_win_between() -> None:
    """0.5 against 0 and 0 against 0.5 at the ends, and 0.4 all along: half-way it is 0.25, 0.25, 0.4."""
    source = Geometry((2, 1, 1), np.eye(4))
    target = Geometry((5, 1, 1), np.diag([0.25, 1, 1, 1]))
    scores = torch.tensor([[0.5, 0.0], [0.0, 0.5], [0.4, 0.4], [0.1, 0.1]]).view(4, 2, 1, 1)
    found = restored(scores, SlabRestorer(source, target, 0), target, [1, 1])
    assert found.flatten().tolist() == [0, 2, 2, 2, 1]


def test_the_first_of_equals_wins() -> None:
    source = Geometry((4, 4, 4), np.eye(4))
    target = source.respaced((0.4, 0.5, 0.6))
    found = restored(torch.full((5, 4, 4, 4), 0.2), SlabRestorer(source, target, 2), target, [1, 3])
    assert not bool(found.any())
    # Half-way between two corners both have a half.
    halves = torch.tensor([[0.0, 1.0], [1.0, 0.0]]).view(2, 2, 1, 1)
    middle = Geometry((3, 1, 1), np.diag([0.5, 1, 1, 1]))
    source = Geometry((2, 1, 1), np.eye(4))
    assert restored(halves, SlabRestorer(source, middle, 0), middle, [2]).flatten().tolist() == [1, 0, 0]


@given(placed(), st.integers(0, 2), st.sampled_from((0.5, 0.0)))
@settings(max_examples=40, deadline=None)
def test_regions_are_each_interpolated(grids: tuple[Geometry, Geometry], axis: int, above: float) -> None:
    source, target = grids
    scores, painted = scores_of(source, outputs=3, smooth=False), (2, 7, 7)
    expected = torch.zeros(target.shape, dtype=torch.int32)
    for score, number in zip(scores, painted, strict=True):
        expected[move(score[None], source, target, fill=-1.0)[0] > above] = number
    restorer = SlabRestorer(source, target, axis, painted=painted, above=above)
    sizes = [len(part) for part in torch.arange(source.shape[axis]).split(2)]
    assert torch.equal(restored(scores, restorer, target, sizes), expected)
    assert above == 0.0 or torch.equal(move_regions(scores, painted, source, target, dtype=torch.int32)[0], expected)


def test_a_sheared_target_is_restored_along_its_stack() -> None:
    leaning = np.diag([1.0, 1.0, 3.0, 1.0])
    leaning[1, 2] = -1.3
    target = Geometry((9, 8, 5), leaning)
    source = target.orthogonal().oriented("LSA").respaced((1.2, 2.5, 0.9))
    scores = scores_of(source, outputs=5, smooth=False)
    axis = slab_axis(source, target)
    assert axis == 1
    found = restored(scores, SlabRestorer(source, target, axis), target, [1] * source.shape[1])
    assert torch.equal(found, all_at_once(scores, source, target))
    assert torch.equal(move_argmax(scores, source, target, dtype=torch.int32)[0], found)
    for one, two, along in ((source, target, 0), (target, source, 2)):
        with pytest.raises(ValueError, match=f"cannot be restored along axis {along}"):
            SlabRestorer(one, two, along)


def test_what_cannot_be_added() -> None:
    source = Geometry((4, 5, 6), np.eye(4))
    target = source.respaced((0.5, 0.5, 0.5))
    classes = torch.zeros(target.shape, dtype=torch.uint8)
    restorer = SlabRestorer(source, target, 0, painted=(1, 2))
    for scores, message in (
        (torch.zeros(2, 1, 5, 7), r"\(2, 1, 5, 7\), of a grid of \(4, 5, 6\)"),
        (torch.zeros(3, 1, 5, 6), "3 regions that paint 2 classes"),
        (torch.zeros(2, 5, 5, 6), "5 planes of scores of 4"),
    ):
        with pytest.raises(ValueError, match=message):
            restorer.add(scores, classes)
    with pytest.raises(ValueError, match="a class map of shape"):
        restorer.add(torch.zeros(2, 1, 5, 6), classes[1:])


MEMORY = """
import re, numpy as np, torch
from pathlib import Path
from transforms.geometry import Geometry
from transforms.restore import SlabRestorer
torch.set_num_threads(1)
def peak():  # ru_maxrss would be the parent's where that was larger
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
target = Geometry((256, 256, 96), np.diag([1.0, 1.0, 1.0, 1.0]))
source = target.respaced((2.0, 2.0, 2.0))
classes = torch.zeros(target.shape, dtype=torch.uint8)
restorer = SlabRestorer(source, target, 2)
slab = torch.rand((4, 61, 128, 128)).mul_(0.01).permute(1, 2, 3, 0)
slab[3, 30:90, 30:90] = 1.0
before = peak()
for start in range(0, 48, 4):
    slab[(start + 4) // 4, 50:90, 20:40] = 2.0
    restorer.add(slab, classes)
print(peak() - before, 4 * slab.shape[0] * classes.numel(), slab.nbytes, len(classes.unique()))
"""


@pytest.mark.slow
def test_scores_never_exist_at_full_size() -> None:
    """61 classes, of which all but a few win nowhere, at full size would be 1.5 GB."""
    run = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    taken, full, slab, classes = map(int, run.stdout.split())
    assert classes > 5
    assert taken < 6 * slab < full / 15
