"""Outlines of labels: worked out by hand, and filled again by two rules that know nothing of how they were made."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pipeline.export.contours import outlines

planes = st.tuples(st.integers(1, 9), st.integers(1, 9)).flatmap(
    lambda shape: arrays(np.uint8, shape, elements=st.integers(0, 3))
)
fuller_planes = st.tuples(st.integers(5, 14), st.integers(5, 14)).flatmap(
    lambda shape: arrays(np.uint8, shape, elements=st.sampled_from([1, 1, 1, 1, 0]))
)


def plane_of(*rows: str) -> np.ndarray:
    """A plane (I, J) from a picture, row by row; '.' is background."""
    return np.array([[0 if c == "." else int(c) for c in row] for row in rows], dtype=np.uint8).T


def points(plane: np.ndarray) -> list[list[list[float]]]:
    return [outline.points_ij.tolist() for outline in outlines(plane)]


def windings(points_ij: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """How often a polygon runs round each pixel's centre, counted edge by edge."""
    i, j = np.indices(shape)
    turns = np.zeros(shape, dtype=int)
    for (i0, j0), (i1, j1) in zip(points_ij, np.roll(points_ij, -1, axis=0), strict=True):
        if j0 != j1:
            is_left = i > i0 + (j - j0) * (i1 - i0) / (j1 - j0)
            turns += np.sign(j1 - j0).astype(int) * (is_left & (j > min(j0, j1)) & (j < max(j0, j1)))
    return turns


def check_fills_back(plane: np.ndarray) -> None:
    found = {int(label): np.zeros(plane.shape, dtype=int) for label in np.unique(plane) if label}
    for outline in outlines(plane):
        assert len(outline.points_ij) >= 4
        turns = windings(outline.points_ij, plane.shape)
        # Once round or not at all: the even-odd and the non-zero rule fill the same.
        assert len(np.unique(turns[turns != 0])) == 1
        assert np.abs(turns).max() == 1
        found[outline.label] += np.abs(turns)
    for label, filled in found.items():
        assert np.array_equal(filled, plane == label), (label, plane.T.tolist())


def test_one_pixel() -> None:
    assert points(plane_of("...", ".1.")) == [[[0.5, 0.5], [1.5, 0.5], [1.5, 1.5], [0.5, 1.5]]]


def test_points_on_a_line_are_one_edge() -> None:
    assert points(plane_of("111", "111")) == [[[-0.5, -0.5], [2.5, -0.5], [2.5, 1.5], [-0.5, 1.5]]]


def test_pixels_that_touch_at_a_corner_are_two_outlines() -> None:
    for plane in (plane_of("1.", ".1"), plane_of(".1", "1.")):
        assert [len(outline) for outline in points(plane)] == [4, 4]
        check_fills_back(plane)


def test_a_hole_is_joined_by_a_bridge_there_and_back() -> None:
    outer = [[-0.5, -0.5], [2.5, -0.5], [2.5, 2.5], [-0.5, 2.5]]
    bridge_end, hole_start = [-0.5, 0.5], [0.5, 0.5]
    hole = [hole_start, [0.5, 1.5], [1.5, 1.5], [1.5, 0.5], hole_start]
    assert points(plane_of("111", "1.1", "111")) == [[*outer, bridge_end, *hole, bridge_end]]


@pytest.mark.parametrize(
    "rows",
    [
        ("11111", "1.1.1", "11111"),
        ("11111", "1.1.1", "11111", "1.1.1", "11111"),
        ("1111111", "1.....1", "1.111.1", "1.1.1.1", "1.111.1", "1.....1", "1111111"),
        ("11111", ".1.11", "11111"),
        ("111111", "1.1..1", "11.1.1", "111111"),
        ("1111", "1221", "1221", "1111"),
        ("2222", "2..2", "2.12", "2222"),
        (".111", "11.1", "1.11", "111."),
    ],
    ids=["two", "four", "nested", "bay", "touching holes", "filled by another", "partly filled", "across"],
)
def test_holes(rows: tuple[str, ...]) -> None:
    check_fills_back(plane_of(*rows))


def test_an_empty_plane() -> None:
    assert points(plane_of("...", "...")) == []


def test_labels_come_in_order_with_their_ids() -> None:
    plane = plane_of("3.1", "2.1").astype(np.uint16) * 20_000
    assert [outline.label for outline in outlines(plane)] == [20_000, 40_000, 60_000]


@given(planes)
@settings(max_examples=150, deadline=None)
def test_any_plane_fills_back(plane: np.ndarray) -> None:
    check_fills_back(plane)


@given(fuller_planes)
@settings(max_examples=150, deadline=None)
def test_many_holes_fill_back(plane: np.ndarray) -> None:
    check_fills_back(plane)


@given(planes)
@settings(max_examples=50, deadline=None)
def test_edges_follow_pixels(plane: np.ndarray) -> None:
    for outline in outlines(plane):
        steps = np.roll(outline.points_ij, -1, axis=0) - outline.points_ij
        assert ((steps != 0).sum(axis=1) == 1).all()
        assert (outline.points_ij % 1 == 0.5).all()
