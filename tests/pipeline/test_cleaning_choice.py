"""Which post-processing is chosen: effects told against doing it, and worlds in which the answer is known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from pipeline.cleaning import postprocessed
from pipeline.cleaning_choice import JudgedCase, Trials, choose
from pipeline.cleaning_effects import CaseEffect, candidates, effects_on, parts_of
from pipeline.config import EvaluateConfig
from pipeline.postprocessing import Action, PostProcessing, Tried
from transforms.geometry import Geometry
from transforms.labels import Label, LabelSchema, Region, schema_from_names

from .test_compare import few_gain_much

Array = npt.NDArray[Any]

SCHEMA = schema_from_names({1: "liver", 4: "tumour"})
REGIONS = LabelSchema(
    labels=tuple(Label(id=i, name=n, colour=(i, 0, 0)) for i, n in ((1, "necrosis"), (2, "oedema"), (3, "active"))),
    ignore=9,
    regions=(
        Region(name="whole", labels=("necrosis", "oedema", "active"), paints="oedema"),
        Region(name="core", labels=("necrosis", "active"), paints="necrosis"),
        Region(name="enhancing", labels=("active",), paints="active"),
    ),
)


def dice(prediction: Array, reference: Array, counted: Array) -> float:
    p, r = prediction & counted, reference & counted
    return 1.0 if not (p.any() or r.any()) else 2 * (p & r).sum() / (p.sum() + r.sum())


def scored(label_map: Array, reference: Array, action: Action, schema: LabelSchema) -> float:
    """The mean Dice of an action's parts, the long way."""
    ids = {label.name: label.id for label in schema.labels}
    counted = reference != (schema.ignore or -1)
    parts = [[ids[name] for name in part] for part in parts_of(action, schema)]
    return float(np.mean([dice(np.isin(label_map, p), np.isin(reference, p), counted) for p in parts]))


def blocks(random: np.random.Generator, ids: Sequence[int]) -> Array:
    world = np.zeros((14, 12, 13), np.uint8)
    for _ in range(12):
        low, size = random.integers(0, 11, 3), random.integers(1, 6, 3)
        world[tuple(slice(a, a + n) for a, n in zip(low, size, strict=True))] = random.choice([0, *ids])
    return world


@pytest.mark.parametrize("schema", [SCHEMA, REGIONS], ids=["labels", "regions"])
def test_effects_are_those_of_doing_it(schema: LabelSchema) -> None:
    """Where removed islands are not given to a neighbour: that changes other labels, which is measured at the end."""
    spacing_mm = (1.0, 1.5, 2.0)
    changed = 0
    for seed in range(12):
        random = np.random.default_rng(seed)
        prediction = blocks(random, schema.ids)
        reference = np.where(random.random(prediction.shape) < 0.2, blocks(random, schema.ids), prediction)
        if schema.ignore:
            reference[random.random(prediction.shape) < 0.1] = schema.ignore
        geometry = Geometry(prediction.shape, np.diag([*spacing_mm, 1.0]))
        tried = candidates(schema)
        effects = effects_on(
            prediction, reference, tried, schema, voxel_volume_mm3=3.0, annotated=[True] * schema.class_count
        )
        for action, effect in zip(tried, effects, strict=True):
            after = postprocessed(prediction, PostProcessing(actions=(action,)), schema, geometry)
            assert effect.before == pytest.approx(scored(prediction, reference, action, schema))
            assert effect.is_changed == bool((after != prediction).any())
            inside = np.isin(prediction, [x.id for x in schema.labels if x.name in action.labels])
            if action.removes and len(action.labels) == len(schema.labels):
                after = np.where(inside & (after != prediction), 0, after)
            assert effect.after == pytest.approx(scored(after, reference, action, schema)), action.words
            changed += effect.is_changed
    assert changed > 50


def effect_of(prediction: Array, reference: Array, kind: str) -> CaseEffect:
    tried = candidates(SCHEMA)
    found = effects_on(prediction, reference, tried, SCHEMA, voxel_volume_mm3=1.0, annotated=(True, True, True))
    return next(e for a, e in zip(tried, found, strict=True) if a.kind == kind and a.labels == ("tumour",))


class TestParts:
    """Two tumours, a large and a small one, and a prediction that finds both."""

    @staticmethod
    def world() -> Array:
        reference = np.zeros((20, 20, 20), np.uint8)
        reference[1:11, 1:11, 1:11] = 4
        reference[15:17, 15:17, 15:17] = 4
        return reference

    def test_the_second_tumour_is_lost_though_the_dice_hardly_falls(self) -> None:
        effect = effect_of(self.world(), self.world(), "largest")
        assert (effect.before, effect.parts_lost) == (1.0, 1)
        assert effect.after == pytest.approx(2 * 1000 / (1000 + 1008))

    def test_a_piece_of_the_first_is_no_part_of_its_own(self) -> None:
        """The prediction tears the large tumour in two; the second was not found in the first place."""
        prediction = self.world()
        prediction[8, 1:11, 1:11] = 0
        prediction[15:17, 15:17, 15:17] = 0
        assert effect_of(prediction, self.world(), "largest").parts_lost == 0

    def test_a_false_island(self) -> None:
        prediction = self.world()
        prediction[1, 18, 18] = 4
        prediction[15:17, 15:17, 15:17] = 0
        effect = effect_of(prediction, self.world(), "largest")
        assert effect.parts_lost == 0
        assert effect.after > effect.before
        assert effect.is_changed

    def test_to_find_nothing_where_nothing_is_is_right(self) -> None:
        nothing, island = np.zeros((20, 20, 20), np.uint8), np.zeros((20, 20, 20), np.uint8)
        assert effect_of(nothing, nothing, "islands") == CaseEffect(1.0, 1.0, is_changed=False)
        island[0, 0, 0] = 4
        assert effect_of(island, nothing, "islands") == CaseEffect(0.0, 1.0, is_changed=True, total=1.0, worst=1.0)

    def test_a_label_that_was_not_annotated_says_nothing(self) -> None:
        effects = effects_on(
            self.world(),
            np.zeros((20, 20, 20), np.uint8),
            candidates(SCHEMA),
            SCHEMA,
            voxel_volume_mm3=1.0,
            annotated=(True, True, False),
        )
        names = {a.name: e.before is None for a, e in zip(candidates(SCHEMA), effects, strict=True)}
        assert names == {"liver": False, "tumour": True, "all labels": True}

    def test_shapes_that_differ(self) -> None:
        with pytest.raises(ValueError, match=r"a prediction of \(20, 20, 20\) against a reference of \(2, 2, 2\)"):
            effect_of(self.world(), np.zeros((2, 2, 2), np.uint8), "largest")


class TestCandidates:
    def test_labels_and_all_of_them(self) -> None:
        found = candidates(SCHEMA)
        assert [a.words for a in found[:6]] == [
            "liver: keep the largest component",
            "liver: remove islands under 10 mm3",
            "liver: remove islands under 100 mm3",
            "liver: remove islands under 1000 mm3",
            "liver: remove islands under 10000 mm3",
            "liver: fill holes",
        ]
        assert {a.labels for a in found} == {("liver",), ("tumour",), ("liver", "tumour")}
        assert not any(a.kind == "holes" and len(a.labels) > 1 for a in found)

    def test_a_region_falls_back_on_the_one_around_it(self) -> None:
        found = {a.name: a for a in candidates(REGIONS) if a.kind == "largest"}
        assert {name: a.becomes for name, a in found.items()} == {
            "whole": None,
            "core": "oedema",
            "enhancing": "necrosis",
        }
        holes = {a.name: a.becomes for a in candidates(REGIONS) if a.kind == "holes"}
        assert holes == {"whole": "oedema", "core": "necrosis", "enhancing": "active"}

    def test_regions_that_overlap_are_left_out(self) -> None:
        regions = (
            Region(name="both", labels=("necrosis", "oedema"), paints="oedema"),
            Region(name="core", labels=("necrosis", "active"), paints="necrosis"),
            Region(name="enhancing", labels=("active",), paints="active"),
        )
        schema = LabelSchema(labels=REGIONS.labels, regions=regions)
        assert {a.name for a in candidates(schema)} == set()


LARGEST = Action(kind="largest", name="tumour", labels=("tumour",))
SMALL = Action(kind="islands", name="tumour", labels=("tumour",), below_mm3=10)
LARGE = Action(kind="islands", name="tumour", labels=("tumour",), below_mm3=100)
LIVER = Action(kind="largest", name="liver", labels=("liver",))
ALL = Action(kind="largest", name="all labels", labels=("liver", "tumour"))


def cases_of(
    *columns: Sequence[float], lost: Sequence[int] = (), patients: Sequence[str] = (), of_parts: Sequence[int] = ()
) -> list[JudgedCase]:
    """A case a row; a column of changes of Dice an action, from 0.8; where it is exactly 0 nothing is changed.

    What an action is of has one part, or as many as `of_parts` says; each changes as their mean does.
    """
    rows = list(zip(*columns, strict=True))
    return [
        JudgedCase(
            f"case_{n}",
            patients[n] if patients else f"patient_{n}",
            n % 4,
            tuple(
                CaseEffect(0.8, 0.8 + x, x != 0, lost[n] if lost else 0, total=x * parts, worst=x)
                for x, parts in zip(row, of_parts or [1] * len(row), strict=True)
            ),
        )
        for n, row in enumerate(rows)
    ]


def no_surface(action: Action) -> npt.NDArray[np.float64]:
    pytest.fail(f"the surface was asked for: {action.words}")


def surface(values: dict[Action, float], cases: int) -> Callable[[Action], npt.NDArray[np.float64]]:
    return lambda action: np.full(cases, values[action])


def no_harm(actions: Sequence[Action], rows: Sequence[int]) -> npt.NDArray[np.float64]:
    return np.zeros(len(rows))


def chosen_of(
    actions: Sequence[Action], cases: Sequence[JudgedCase], gains: Any = no_surface, worst: Any = no_harm
) -> tuple[tuple[Action, ...], tuple[Tried, ...]]:
    return choose(actions, cases, trials=Trials(gains, worst), settings=EvaluateConfig(bootstrap_samples=200))


def told(actions: Sequence[Action], cases: Sequence[JudgedCase], gains: Any = no_surface) -> dict[Action, Tried]:
    return {row.action: row for row in chosen_of(actions, cases, gains)[1]}


CLEAR = [0.01 + 0.001 * n for n in range(12)]


class TestChoosing:
    def test_what_helps_everyone_is_chosen(self) -> None:
        chosen, (row,) = chosen_of([LARGEST], cases_of(CLEAR))
        assert chosen == (LARGEST,)
        assert (row.cases, row.patients_changed, row.why, row.is_chosen) == (12, 12, "chosen", True)
        assert row.p_value == row.p_corrected == pytest.approx(2 / 2**12)
        assert (row.before, row.after) == pytest.approx((0.8, 0.8 + np.mean(CLEAR)))

    def test_one_patient_who_loses_stops_it(self) -> None:
        """Eleven gain a lot, the twelfth loses more than a hundredth."""
        row = told([LARGEST], cases_of([0.2 + 0.001 * n for n in range(11)] + [-0.011]))[LARGEST]
        assert row.p_corrected is not None
        assert row.p_corrected < 0.05
        assert (row.is_chosen, row.why) == (False, "a label of a case loses 0.011")

    def test_so_does_a_single_label_whatever_the_others_gain(self) -> None:
        """The mean over sixteen labels falls by 0.0075 where one of them falls by 0.12."""
        cases = cases_of([0.01] * 11 + [-0.0075], of_parts=[16])
        (last,) = cases[-1].effects
        cases[-1] = replace(cases[-1], effects=(replace(last, worst=-0.12),))
        row = told([ALL], cases)[ALL]
        assert (row.is_chosen, row.why, row.worst_change) == (False, "a label of a case loses 0.120", -0.12)

    def test_so_does_a_tumour_that_had_been_found(self) -> None:
        row = told([LARGEST], cases_of(CLEAR, lost=[0] * 11 + [1]))[LARGEST]
        assert (row.is_chosen, row.why, row.parts_lost) == (False, "deletes 1 part that had been found", 1)

    def test_five_patients_are_too_few(self) -> None:
        row = told([LARGEST], cases_of([0.05, 0.06, 0.07, 0.08, 0.09] + [0.0] * 20))[LARGEST]
        assert row.why == "only 5 patients changed, too few to tell"

    def test_many_cases_of_one_patient_are_one(self) -> None:
        row = told([LARGEST], cases_of(CLEAR, patients=["p0"] * 8 + ["p1"] * 4))[LARGEST]
        assert row.why == "only 2 patients changed, too few to tell"

    def test_each_action_tried_makes_it_harder(self) -> None:
        """Six gains of six give p = 0.03: enough for one, not for the first of two."""
        six = [0.01, 0.02, 0.03, 0.04, 0.05, 0.06] + [0.0] * 6
        assert told([LARGEST], cases_of(six))[LARGEST].is_chosen
        other = [0.0] * 6 + [0.011, -0.002, 0.003, -0.004, 0.005, -0.006]
        rows = told([LARGEST, LIVER], cases_of(six, other))
        assert rows[LARGEST].p_corrected == pytest.approx(4 / 2**6)
        assert rows[LARGEST].why == rows[LIVER].why == "no evidence that it helps"
        nothing = told([LARGEST, LIVER], cases_of(six, [0.0] * 12))
        assert nothing[LARGEST].is_chosen
        assert nothing[LIVER].why == "changes nothing"

    def test_luck_is_not_chosen(self) -> None:
        """Sixty worlds of ten actions that move Dice up and down at random."""
        random = np.random.default_rng(6)
        actions = [
            Action(kind="largest", name=f"label {n}", labels=(f"label {n}",)) for n in range(10)
        ]  # each a label of its own: any may be chosen beside any other
        worlds = 0
        for _ in range(60):
            columns = random.normal(0.0, 0.003, (10, 24)).clip(-0.0099, None)
            chosen, _ = chosen_of(actions, cases_of(*columns))
            worlds += bool(chosen)
        assert worlds <= 3  # 5 %

    def test_what_harms_most_patients_is_no_help_whatever_a_few_gain(self) -> None:
        row = told([LARGEST], cases_of(few_gain_much()))[LARGEST]
        assert row.p_corrected is not None
        assert row.p_corrected < 0.001
        assert row.gain > 0.004
        assert (row.is_chosen, row.why) == (False, "no evidence that it helps")

    def test_what_gains_next_to_nothing_is_left(self) -> None:
        tiny = [0.0001 + 0.00001 * n for n in range(12)]
        gains = surface({LARGEST: 0.0009}, 12)
        assert told([LARGEST], cases_of(tiny), gains)[LARGEST].why == "gains too little"

    def test_unless_the_surface_gains(self) -> None:
        """As of small islands far away."""
        tiny = [0.0001 + 0.00001 * n for n in range(12)]
        assert told([LARGEST], cases_of(tiny), surface({LARGEST: 0.004}, 12))[LARGEST].is_chosen

    def test_a_loss_on_the_whole(self) -> None:
        assert told([LARGEST], cases_of([-0.001 * n for n in range(1, 10)]))[LARGEST].why == "gains nothing"


class TestOneOfMany:
    def test_the_most_gain_of_one_structure(self) -> None:
        more = [x + 0.01 for x in CLEAR]
        rows = told([LARGEST, SMALL, LARGE], cases_of(CLEAR, CLEAR, more))
        assert [a for a in rows if rows[a].is_chosen] == [LARGE]
        assert rows[SMALL].why == rows[LARGEST].why == "helps, another is chosen"

    def test_of_equal_dice_the_better_surface_and_then_the_mildest(self) -> None:
        both = cases_of(CLEAR, [x + 0.00001 * (-1) ** n for n, x in enumerate(CLEAR)])
        rows = told([SMALL, LARGE], both, surface({SMALL: 0.01, LARGE: 0.02}, 12))
        assert [a for a in rows if rows[a].is_chosen] == [LARGE]
        rows = told([SMALL, LARGE], both, surface({SMALL: 0.01, LARGE: 0.01}, 12))
        assert [a for a in rows if rows[a].is_chosen] == [SMALL]

    def test_what_does_the_same_to_every_case_is_not_measured(self) -> None:
        rows = told([LARGEST, LARGE, SMALL], cases_of(CLEAR, CLEAR, CLEAR), no_surface)
        assert [a for a in rows if rows[a].is_chosen] == [SMALL]

    def test_labels_of_their_own_are_chosen_beside_each_other(self) -> None:
        rows = told([LARGEST, LIVER], cases_of(CLEAR, CLEAR))
        assert all(row.is_chosen for row in rows.values())

    @pytest.mark.parametrize(("gain", "expected"), [(0.001, {ALL}), (-0.001, {LARGEST, LIVER})])
    def test_all_together_or_each_by_itself(self, gain: float, expected: set[Action]) -> None:
        """Of two labels the mean counts twice."""
        rows = told([LARGEST, LIVER, ALL], cases_of(CLEAR, CLEAR, [x + gain for x in CLEAR], of_parts=[1, 1, 2]))
        assert {a for a in rows if rows[a].is_chosen} == expected

    def test_a_region_counts_as_often_as_regions_lie_in_it(self) -> None:
        """However many labels it has: the whole of three labels is two regions, its core of two labels is one."""
        regions = tuple(region for region in REGIONS.regions if region.name != "enhancing")
        schema = REGIONS.model_copy(update={"regions": regions})
        tried = [action for action in candidates(schema) if action.kind == "largest"]
        reference = np.zeros((9, 9, 9), np.uint8)
        reference[1:4, 1:4, 1:4] = 2
        reference[2, 2, 2:4] = 1
        prediction = reference.copy()
        prediction[7, 7, 7] = 1
        whole, core = effects_on(prediction, reference, tried, schema, voxel_volume_mm3=1.0, annotated=[True] * 4)
        gains = (1 - 2 * 27 / 55, 1 - 2 * 2 / 5)
        assert (whole.total, whole.worst) == (pytest.approx(sum(gains)), pytest.approx(min(gains)))
        assert (core.total, core.worst) == (pytest.approx(gains[1]), pytest.approx(gains[1]))


class TestDone:
    """What is chosen harms only when it is done: a label takes the place of an island."""

    @staticmethod
    def costly(*costs: tuple[set[Action], int, float]) -> Any:
        """Each costs a case so much where all of its actions are done."""

        def worst(actions: Sequence[Action], rows: Sequence[int]) -> npt.NDArray[np.float64]:
            return np.array(
                [min([0.0, *(-x for who, case, x in costs if case == row and who <= {*actions})]) for row in rows]
            )

        return worst

    def test_only_what_harms_is_left_out_and_another_takes_its_place(self) -> None:
        less = [x - 0.002 for x in CLEAR]
        worst = self.costly(({LARGEST}, 5, 0.03))
        chosen, tried = chosen_of([LIVER, LARGEST, SMALL], cases_of(CLEAR, CLEAR, less), worst=worst)
        assert chosen == (LIVER, SMALL)
        assert [row.why for row in tried] == ["chosen", "done, it costs a label of a case 0.030", "chosen"]

    def test_where_none_does_it_alone_none_is_done(self) -> None:
        worst = self.costly(({LARGEST, LIVER}, 5, 0.03))
        chosen, tried = chosen_of([LIVER, LARGEST], cases_of(CLEAR, CLEAR), worst=worst)
        assert chosen == ()
        assert {row.why for row in tried} == {"all that was chosen costs a label of a case 0.030"}

    def test_a_little_is_borne(self) -> None:
        chosen, _ = chosen_of([LIVER], cases_of(CLEAR), worst=self.costly(({LIVER}, 5, 0.0099)))
        assert chosen == (LIVER,)

    def test_others_ask_of_their_own_cases(self) -> None:
        """A trial of some cases knows these by their own numbers."""
        trials = Trials(no_surface, self.costly(({LIVER}, 5, 0.03))).of([3, 5, 7])
        assert trials.worst([LIVER], [0, 1, 2]).tolist() == [0.0, -0.03, 0.0]
