"""Islands and holes placed by hand, and laws that hold for any label map."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from pipeline.cleaning import background_pockets, postprocessed
from pipeline.postprocessing import LIBRARY_BYTES, Action, PostProcessing, cleaning_bytes
from transforms.geometry import Geometry
from transforms.labels import Label, LabelSchema, Region, schema_from_names

Array = npt.NDArray[Any]

SCHEMA = schema_from_names({1: "liver", 2: "tumour", 7: "spleen"})


def largest(*labels: str, becomes: str | None = None) -> Action:
    return Action(kind="largest", name=" and ".join(labels), labels=labels, becomes=becomes)


def islands(below_mm3: float, *labels: str, becomes: str | None = None) -> Action:
    return Action(kind="islands", name=" and ".join(labels), labels=labels, below_mm3=below_mm3, becomes=becomes)


def holes(*labels: str, becomes: str | None = None) -> Action:
    return Action(kind="holes", name=" and ".join(labels), labels=labels, becomes=becomes)


def clean(label_map: Array, *actions: Action, spacing_mm: tuple[float, ...] = (1, 1, 1), schema: Any = SCHEMA) -> Array:
    geometry = Geometry(label_map.shape, np.diag([*spacing_mm, 1.0]))
    return postprocessed(label_map, PostProcessing(actions=actions), schema, geometry)


def empty() -> Array:
    return np.zeros((10, 10, 10), np.uint8)


class TestIslands:
    def test_the_largest_stays_and_other_labels_are_not_touched(self) -> None:
        world = empty()
        world[1:4, 1:4, 1:4] = 1
        world[7:9, 7:9, 7:9] = 1
        world[0, 9, 0] = 2
        expected = world.copy()
        expected[7:9, 7:9, 7:9] = 0
        assert (clean(world, largest("liver")) == expected).all()

    def test_edges_and_corners_hold_together(self) -> None:
        world = empty()
        world[1:4, 1:4, 1:4] = 1
        world[4, 4, 4] = world[5, 5, 4] = 1
        assert clean(world, largest("liver")) is world

    def test_of_equal_ones_the_first_stays(self) -> None:
        world = empty()
        world[2, 2, 2] = world[2, 2, 8] = world[8, 2, 2] = 1
        found = clean(world, largest("liver"))
        assert np.argwhere(found).tolist() == [[2, 2, 2]]
        assert (clean(np.asfortranarray(world), largest("liver")) == found).all()

    @pytest.mark.parametrize(("below_mm3", "left"), [(6, 4), (6.1, 3), (12, 3), (12.5, 1), (1000, 0)])
    def test_sizes_are_in_mm3_on_a_grid_that_is_coarse_in_one_axis(self, below_mm3: float, left: int) -> None:
        """Islands of 1, 2, 2 and 3 voxels of 6 mm3; one of exactly the limit stays."""
        world = empty()
        world[0, 0, 0] = 1
        world[3, 0, 0:2] = world[6, 0:2, 0] = 1
        world[9, 9, 0:3] = 1
        found = clean(world, islands(below_mm3, "liver"), spacing_mm=(1, 2, 3))
        assert ndimage.label(found, np.ones((3, 3, 3)))[1] == left

    def test_a_structure_of_several_labels_is_one(self) -> None:
        """The tumour outside hangs together with nothing, the one at the rim with the liver."""
        world = empty()
        world[1:4, 1:4, 1:4] = 1
        world[4, 1:4, 1:4] = 2
        world[8, 8, 8] = 2
        found = clean(world, largest("liver", "tumour"))
        assert np.argwhere(world != found).tolist() == [[8, 8, 8]]
        apart = clean(world, largest("liver"), largest("tumour"))
        assert (apart == found).all()

    def test_an_island_that_one_label_surrounds_becomes_that_label(self) -> None:
        world = empty()
        world[1:9, 1:9, 1:9] = 1
        world[3, 3, 3] = 2
        world[5, 5, 5:7] = 2
        world[0:1, 0:3, 0:3] = 2
        found = clean(world, largest("tumour"))
        assert found[3, 3, 3] == found[5, 5, 5] == found[5, 5, 6] == 1
        assert (found[0:1, 0:3, 0:3] == 2).all()

    def test_at_the_rim_of_a_label_or_of_the_volume_it_becomes_background(self) -> None:
        world = empty()
        world[0:5] = 1
        world[4, 4, 4] = 2
        world[0, 4, 4] = 2
        world[7:9, 7:9, 7:9] = 2
        found = clean(world, largest("tumour"))
        assert found[4, 4, 4] == found[0, 4, 4] == 0

    def test_between_two_labels_it_becomes_background(self) -> None:
        world = empty()
        world[0:5], world[5:] = 1, 7
        world[4:6, 4, 4] = 2
        assert (clean(world, islands(5, "tumour"))[4:6, 4, 4] == 0).all()

    def test_a_label_that_is_not_there(self) -> None:
        world = empty()
        assert clean(world, largest("liver"), islands(10, "spleen"), holes("liver")) is world

    def test_the_given_map_stays_as_it_is(self) -> None:
        world = empty()
        world[0, 0, 0] = 1
        before = world.copy()
        assert clean(world, islands(10, "liver")).sum() == 0
        assert (world == before).all()


class TestHoles:
    @staticmethod
    def shell() -> Array:
        world = empty()
        world[1:6, 1:6, 1:6] = 1
        world[3, 3, 3] = 0
        return world

    def test_a_hole_is_filled_with_what_is_around_it(self) -> None:
        world = self.shell()
        found = clean(world, holes("liver"))
        assert np.argwhere(found != world).tolist() == [[3, 3, 3]]
        assert found[3, 3, 3] == 1

    def test_a_way_out_over_an_edge_is_none(self) -> None:
        world = self.shell()
        world[4, 4, 3] = 0  # beside the hole over an edge: two holes, each closed
        assert (clean(world, holes("liver"))[1:6, 1:6, 1:6] == 1).all()

    def test_a_way_out_over_faces_is_one(self) -> None:
        world = self.shell()
        world[3, 3, 4:6] = 0
        assert clean(world, holes("liver")) is world

    def test_another_label_is_never_filled_over(self) -> None:
        world = self.shell()
        world[3, 3, 3] = 2
        assert clean(world, holes("liver")) is world

    def test_nor_is_a_hole_that_two_labels_share(self) -> None:
        world = self.shell()
        world[3, 3, 4] = 2
        assert clean(world, holes("liver")) is world
        found = clean(world, holes("liver", "tumour", becomes="liver"))
        assert np.argwhere(found != world).tolist() == [[3, 3, 3]]
        assert found[3, 3, 3] == 1

    def test_a_bay_at_the_end_of_the_volume_is_open(self) -> None:
        world = empty()
        world[0:3, 0:3, 0:3] = 1
        world[0, 1, 1] = 0
        assert clean(world, holes("liver")) is world

    def test_the_smaller_structure_fills_first(self) -> None:
        world = self.shell()
        found = clean(world, holes("liver"), holes("liver", "tumour", becomes="tumour"))
        assert found[3, 3, 3] == 1


class TestRegions:
    SCHEMA = LabelSchema(
        labels=tuple(
            Label(id=i, name=n, colour=(i, 0, 0)) for i, n in ((1, "necrosis"), (2, "oedema"), (3, "enhancing"))
        ),
        regions=(
            Region(name="whole", labels=("necrosis", "oedema", "enhancing"), paints="oedema"),
            Region(name="core", labels=("necrosis", "enhancing"), paints="necrosis"),
            Region(name="active", labels=("enhancing",), paints="enhancing"),
        ),
    )

    def test_what_leaves_a_region_stays_in_the_one_around_it(self) -> None:
        world = empty()
        world[1:8, 1:8, 1:8] = 2
        world[2:5, 2:5, 2:5] = 1
        world[3, 3, 3] = 3
        world[9, 9, 9] = 3
        found = clean(world, islands(5, "enhancing", becomes="necrosis"), schema=self.SCHEMA)
        assert found[3, 3, 3] == found[9, 9, 9] == 1
        found = clean(
            world,
            islands(5, "enhancing", becomes="necrosis"),
            largest("enhancing", "necrosis", "oedema"),
            schema=self.SCHEMA,
        )
        assert (found[3, 3, 3], found[9, 9, 9]) == (1, 0)
        found = clean(world, islands(50, "enhancing", "necrosis", becomes="oedema"), schema=self.SCHEMA)
        assert set(np.unique(found)) == {0, 2}


def maps() -> st.SearchStrategy[Array]:
    """Of three labels, blocks of them more often than single voxels."""

    def drawn(seed: int) -> Array:
        random = np.random.default_rng(seed)
        world = random.choice([0, 0, 0, 1, 2, 7], size=(7, 6, 8)).astype(np.uint8)
        for _ in range(int(random.integers(0, 5))):
            low, size = random.integers(0, 5, 3), random.integers(1, 5, 3)
            box = tuple(slice(a, a + n) for a, n in zip(low, size, strict=True))
            world[box] = random.choice([0, 1, 2, 7])
        return world

    return st.integers(0, 2**32 - 1).map(drawn)


def some_actions() -> st.SearchStrategy[tuple[Action, ...]]:
    every = [
        *(largest(name) for name in SCHEMA.names),
        *(islands(size, name) for name in SCHEMA.names for size in (3.0, 20.0)),
        *(holes(name) for name in SCHEMA.names),
        largest(*SCHEMA.names),
        islands(15.0, *SCHEMA.names),
    ]
    return st.lists(
        st.sampled_from(every), min_size=1, max_size=6, unique_by=lambda action: (action.removes, action.labels)
    ).map(tuple)


class TestLaws:
    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(maps(), some_actions())
    def test_twice_is_once_and_the_order_says_nothing(self, world: Array, actions: tuple[Action, ...]) -> None:
        """Where a structure and a part of it lose islands, the structure may fall apart the second time."""
        found = clean(world, *actions)
        removing = {len(action.labels) for action in actions if action.removes}
        if len(removing) < 2:
            assert clean(found, *actions) is found
        assert (clean(world, *reversed(actions)) == found).all()
        assert PostProcessing(actions=actions).digest == PostProcessing(actions=actions[::-1]).digest

    @settings(max_examples=40, deadline=None, derandomize=True)
    @given(maps(), st.sampled_from([2.0, 4.0, 9.0, 40.0]), st.sampled_from([(1, "liver"), (2, "tumour")]))
    def test_removing_islands_only_takes_away(self, world: Array, below_mm3: float, which: tuple[int, str]) -> None:
        value, name = which
        found = clean(world, islands(below_mm3, name), spacing_mm=(0.5, 1, 4))
        numbers, count = ndimage.label(world == value, np.ones((3, 3, 3)))
        small = [n for n in range(1, count + 1) if (numbers == n).sum() * 2 < below_mm3]
        expected = (world == value) & ~np.isin(numbers, small)
        assert ((found == value) == expected).all()
        assert (found[(world != value)] == world[world != value]).all()

    @settings(max_examples=40, deadline=None, derandomize=True)
    @given(maps())
    def test_holes_are_those_of_scipy_where_there_is_one_label(self, world: Array) -> None:
        one = (world > 0).astype(np.uint8)
        assert (clean(one, holes("liver")) == ndimage.binary_fill_holes(one)).all()

    @settings(max_examples=30, deadline=None, derandomize=True)
    @given(maps())
    def test_a_pocket_borders_on_what_is_beside_it(self, world: Array) -> None:
        pockets = background_pockets(world)
        padded = np.pad(world, 1)
        numbers, _ = ndimage.label(padded == 0)
        found = {}
        for number in set(np.unique(numbers)) - {0, numbers[0, 0, 0]}:
            inside = numbers == number
            around = ndimage.binary_dilation(inside) & ~inside
            found[tuple(np.argwhere(inside)[0] - 1)] = set(padded[around].tolist())
        firsts = [tuple(pockets.places[pockets.numbers == n][0]) for n in range(len(pockets.borders))]
        assert {place: set(pockets.borders[n]) for n, place in enumerate(firsts)} == found


@pytest.mark.parametrize("kind", ["largest", "islands", "holes"])
def test_it_takes_the_memory_that_was_promised(kind: str) -> None:
    world = np.zeros((96, 96, 96), np.uint8)
    world[2:90, 2:90, 2:90] = 1
    world[30:40, 30:40, 30:40] = 0
    world[94:, ::3, ::3] = 1
    action = {"largest": largest("liver"), "islands": islands(20, "liver"), "holes": holes("liver")}[kind]
    clean(world, action)
    tracemalloc.start()
    found = clean(world, action)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (found != world).any()
    assert peak <= cleaning_bytes(world.size) - LIBRARY_BYTES


class TestRefusals:
    def test_another_grid(self) -> None:
        with pytest.raises(ValueError, match="on a grid of"):
            postprocessed(empty(), PostProcessing(actions=(largest("liver"),)), SCHEMA, Geometry((9, 9, 9), np.eye(4)))

    def test_another_label(self) -> None:
        with pytest.raises(ValueError, match="post-processing of kidney, which is no label of the model"):
            clean(empty(), largest("kidney"))

    @pytest.mark.parametrize(
        ("values", "says"),
        [
            ({"kind": "islands", "labels": ("liver",)}, "`below_mm3` belongs to islands"),
            ({"kind": "largest", "labels": ("liver",), "below_mm3": 3.0}, "`below_mm3` belongs to islands"),
            ({"kind": "holes", "labels": ("liver", "tumour")}, "name it in `becomes`"),
            ({"kind": "largest", "labels": ("liver",), "becomes": "liver"}, "of which it is a part"),
            ({"kind": "largest", "labels": ("liver", "liver")}, "stands twice"),
        ],
    )
    def test_an_action_that_says_too_little_or_too_much(self, values: dict[str, Any], says: str) -> None:
        with pytest.raises(ValueError, match=says):
            Action.model_validate({"name": "x", **values})

    @pytest.mark.parametrize(
        ("actions", "says"),
        [
            ((largest("liver"), largest("liver")), "stands beside another removal of the same labels"),
            ((largest("liver", "tumour"), islands(9, "tumour", "liver")), "another removal of the same labels"),
            ((islands(9, "liver"), islands(5, "liver")), "another removal of the same labels"),
            ((holes("liver"), holes("liver")), "another filling of the same labels"),
            ((largest("liver", "tumour"), largest("tumour", "spleen")), "neither holds the other"),
            ((largest("tumour", becomes="liver"), largest("liver")), "which is cleaned itself"),
        ],
    )
    def test_actions_that_do_not_go_together(self, actions: tuple[Action, ...], says: str) -> None:
        with pytest.raises(ValueError, match=says):
            PostProcessing(actions=actions)
