"""Sentences about figures that are given, word by word."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest

from pipeline.inspection.contributions import Change, Contributions
from pipeline.inspection.figures import LevelFigures
from pipeline.inspection.receptive import ReceptiveField
from pipeline.inspection.result import Inspection
from pipeline.inspection.words import score_text, words_of

FEATURES = (32, 64, 128, 256, 320, 320)
NO_SIGHT = ReceptiveField(None, None, (96.0, 96.0, 96.0), None, None, 0)


def level(name: str, **changes: Any) -> LevelFigures:
    kind, _, number = name.partition(" ")
    values: dict[str, Any] = {"channels": 320, "shape": (4, 4, 4), "dead_share": 0.0, "sparsity": 0.5, "energy": 0.7}
    values |= {"effective_rank": 200.0, "redundant_share": 0.0, "voxels": 6400}
    return LevelFigures(name=name, kind=kind, level=int(number), **(values | changes))  # type: ignore[arg-type]


def found(
    falls: Mapping[Change, Sequence[float] | float] | None = None,
    *,
    dice: float = 0.9,
    against: Any = "reference",
    figures: Sequence[LevelFigures] = (level("bottleneck 6"),),
    sight: ReceptiveField = NO_SIGHT,
) -> Inspection:
    """Of one case for each fall."""
    contributions, count = None, 1
    if falls is not None:
        rows = {change: [fall] if isinstance(fall, float) else list(fall) for change, fall in falls.items()}
        count = len(next(iter(rows.values())))
        changed = {change: tuple({"liver": dice - fall} for fall in of) for change, of in rows.items()}
        contributions = Contributions(against, ("liver",), ({"liver": dice},) * count, changed)
    cases = tuple(f"case_{n}" for n in range(count))
    return Inspection("model", cases, FEATURES, tuple(figures), contributions, sight)


def texts(inspection: Inspection) -> list[str]:
    return [sentence.text for sentence in words_of(inspection)]


class TestDepth:
    def test_levels_that_change_nothing(self) -> None:
        falls = {Change("cut", 5): 0.0001, Change("cut", 4): 0.0004, Change("cut", 3): 0.03, Change("cut", 2): 0.2}
        assert texts(found(falls)) == [
            "The bottleneck is too deep: levels 5 and 6 change nothing (Dice falls by 0.0004 without them, in this one "
            "case). A training with plan.features [32, 64, 128, 256] would show whether they can go."
        ]

    def test_one_level_that_changes_nothing(self) -> None:
        (text,) = texts(found({Change("cut", 5): -0.0004, Change("cut", 4): 0.02}))
        assert text.startswith(
            "The bottleneck is too deep: level 6 changes nothing (Dice rises by 0.0004 without it, in this one case)."
        )
        assert text.endswith("would show whether it can go.")

    def test_levels_that_harm(self) -> None:
        (text,) = texts(found({Change("cut", 5): -0.004, Change("cut", 4): -0.012, Change("cut", 3): 0.1}))
        assert "levels 5 and 6 do harm (Dice rises by 0.012 without them, in this one case)" in text

    def test_depth_that_is_used(self) -> None:
        (text,) = texts(found({Change("cut", 5): 0.062, Change("cut", 4): 0.3}))
        assert text == "The depth is used, down to level 6 (Dice falls by 0.062 without it, in this one case)."

    def test_a_level_that_no_case_needs(self) -> None:
        (text,) = texts(found({Change("cut", 5): (0.001, -0.003, -0.0025), Change("cut", 4): (0.1, 0.1, 0.1)}))
        assert text.startswith("The bottleneck is too deep: level 6 helps in no case (Dice rises by 0.0015 without it")

    def test_nothing_is_nothing_in_every_case(self) -> None:
        """A mean of 0.0005 hides a case that needs the level."""
        (text,) = texts(found({Change("cut", 5): (0.03, -0.029, 0.0005)}))
        assert text == (
            "Level 6 helps in 1 of 3 cases and harms in 1 (Dice falls by 0.0005 without it, in the mean of 3 cases)."
        )

    def test_a_network_that_is_not_ours_has_no_features_to_try(self) -> None:
        (text,) = texts(replace(found({Change("cut", 5): 0.0}), features=None))
        assert text.endswith("(Dice falls by less than 0.0001 without it, in this one case).")


class TestSkips:
    def test_noise(self) -> None:
        (text,) = texts(found({Change("mean", 1): -0.003, Change("zeroed", 1): 0.1}))
        assert text == ("Skip 1 carries noise (Dice rises by 0.003 when it is replaced by its mean, in this one case).")

    def test_noise_is_not_said_of_one_case_among_many(self) -> None:
        (text,) = texts(found({Change("mean", 1): (-0.05, 0.01, 0.01), Change("zeroed", 1): (0.1, 0.1, 0.1)}))
        assert text == (
            "Skip 1 helps in 2 of 3 cases and harms in 1 (Dice rises by 0.010 when it is replaced by its mean, in the "
            "mean of 3 cases)."
        )

    def test_a_skip_that_no_case_needs(self) -> None:
        (text,) = texts(found({Change("mean", 1): (0.001, -0.003, -0.0025), Change("zeroed", 1): (0.1, 0.1, 0.1)}))
        assert text.startswith("Skip 1 helps in no case and harms in 2 of 3 (Dice rises by 0.0015 when")

    def test_nothing(self) -> None:
        (text,) = texts(found({Change("mean", 2): 0.0003, Change("zeroed", 2): 0.001}))
        assert text.startswith("Skip 2 brings nothing (Dice falls by 0.0003 when it is replaced by its mean")

    def test_a_constant(self) -> None:
        (text,) = texts(found({Change("mean", 2): 0.0003, Change("zeroed", 2): 0.2}))
        assert text == (
            "Skip 2 is used as a constant, not for its detail (Dice falls by 0.20 when it is zeroed, by 0.0003 when it "
            "is replaced by its mean, in this one case)."
        )

    @pytest.mark.parametrize(("spleen", "told"), [(0.4, "spleen falls by 0.50"), (1.0, "spleen rises by 0.40")])
    def test_the_label_that_changes_most_falls_or_rises(self, spleen: float, told: str) -> None:
        change, start = Change("mean", 1), 0.9 if spleen < 0.6 else 0.6
        before: Any = {"liver": 0.9, "lung": 0.9, "spleen": start}
        after: Any = {"liver": 0.6, "lung": 0.6, "spleen": spleen}
        contributions = Contributions("reference", ("liver", "lung", "spleen"), (before,), {change: (after,)})
        (text,) = texts(replace(found({change: 0.1}), contributions=contributions))
        assert text.startswith("Skip 1 brings detail (Dice falls by ")
        assert f"in this one case; {told})" in text

    def test_those_that_work_are_ranked(self) -> None:
        falls = {Change("mean", n): fall for n, fall in ((1, 0.02), (2, 0.31), (3, 0.004))}
        assert texts(found(falls)) == [
            "Skip 2 brings most (Dice falls by 0.31 when it is replaced by its mean, in this one case), then skip 1 "
            "(0.020), skip 3 (0.004)."
        ]


class TestCases:
    def test_a_network_that_fails_tells_nothing_of_its_parts(self) -> None:
        (text,) = texts(found({Change("cut", 5): 0.0, Change("mean", 1): -0.1}, dice=0.12))
        assert text == "The network does not work in this one case (Dice 0.12): what its parts bring cannot be told."

    def test_without_any_label(self) -> None:
        (text,) = texts(found({Change("cut", 5): 0.0}, dice=math.nan))
        assert text.startswith("No label is to be found in this one case (no Dice)")

    def test_without_a_reference_it_is_said(self) -> None:
        first, second = texts(found({Change("cut", 5): 0.015}, dice=1.0, against="untouched"))
        assert first.startswith("Without a reference")
        assert "level 6 changes nothing (agreement falls by 0.015 without it" in second

    def test_a_quick_look_says_nothing_of_parts(self) -> None:
        assert texts(found(None)) == []


class TestChannels:
    @pytest.mark.parametrize(
        ("changes", "text"),
        [
            ({"dead_share": 42 / 320}, "42 of 320 channels of the bottleneck are dead: they never rise above zero."),
            ({"sparsity": 0.97}, "The bottleneck is nearly silent: 97% of its activations are zero or below."),
            ({"redundant_share": 0.5}, "160 of 320 channels of the bottleneck repeat others: fewer would do."),
            (
                {"effective_rank": 30.0},
                "The bottleneck uses few of its 320 channels' directions (effective rank 30 of at most 320): fewer "
                "might do.",
            ),
            (
                {"energy": math.nan, "effective_rank": math.nan},
                "Bottleneck 6 holds values that are not finite (RMS nan): no result can be trusted.",
            ),
        ],
    )
    def test_what_stands_out(self, changes: dict[str, float], text: str) -> None:
        assert texts(found(figures=[level("bottleneck 6", **changes)])) == [text]

    def test_one_dead_channel(self) -> None:
        figures = [level("bottleneck 6", channels=8, dead_share=1 / 8, effective_rank=8.0)]
        assert texts(found(figures=figures)) == [
            "1 of 8 channels of the bottleneck is dead: it never rises above zero."
        ]

    def test_a_rank_that_few_voxels_bound_is_not_low(self) -> None:
        assert texts(found(figures=[level("bottleneck 6", effective_rank=30.0, voxels=64)])) == []

    def test_what_a_skip_hands_on_is_said_once(self) -> None:
        figures = [level("encoder 1", dead_share=0.5), level("skip 1", dead_share=0.5), level("bottleneck 2")]
        assert texts(found(figures=figures)) == [
            "160 of 320 channels of encoder 1 are dead: they never rise above zero."
        ]

    def test_a_gate_that_is_shut(self) -> None:
        figures = [level("encoder 1"), level("skip 1", energy=0.028), level("bottleneck 2")]
        assert texts(found(figures=figures)) == [
            "The gate of skip 1 is nearly shut: it lets through 4% of the encoder's RMS."
        ]


class TestSight:
    def sight(self, radius_mm: float, extent_mm: float, deepest_mm: float = 200.0, patch_mm: float = 96.0) -> list[str]:
        sides, patch = (deepest_mm,) * 3, (patch_mm,) * 3
        reach = (radius_mm,) * 3
        return texts(found(sight=ReceptiveField((99, 99, 99), sides, patch, radius_mm, reach, 8, {"liver": extent_mm})))

    def test_whole(self) -> None:
        (text,) = self.sight(31.0, 25.0)
        assert text == (
            "The network looks 31 mm around a voxel (95 % of its gradient lies there); liver is 25 mm long, so that it "
            "sees all of it from anywhere in it."
        )

    def test_from_the_middle(self) -> None:
        (text,) = self.sight(31.0, 58.0)
        assert text.endswith("liver is 58 mm long, so that it sees all of it from its middle, but not from its ends.")

    def test_in_part(self) -> None:
        (text,) = self.sight(9.5, 58.0)
        assert text.startswith("The network looks 9.5 mm around a voxel")
        assert text.endswith("so that it does not see all of it at once: it decides by what is near.")

    def test_what_bounds_it(self) -> None:
        assert self.sight(20.0, 120.0)[1] == (
            "A patch shows 96 mm at its narrowest, less than the 120 mm of liver: a larger patch or a coarser spacing "
            "would see all of it."
        )
        assert self.sight(20.0, 120.0, deepest_mm=47.0)[1] == (
            "Its deepest level sees 47 mm at its narrowest, less than the 120 mm of liver: a deeper network or a "
            "coarser spacing would see all of it."
        )
        assert self.sight(46.0, 90.0)[1] == (
            "It looks as far as its patch goes (48 mm from the middle): a larger patch might help."
        )

    def test_slices_bound_what_a_2d_network_sees_and_that_is_no_news(self) -> None:
        sight = ReceptiveField(
            (99, 99, 1), (99.0, 99.0, 5.0), (96.0, 96.0, 5.0), 20.0, (20.0, 20.0, 0.0), 8, {"a": 50.0}, 2
        )
        (text,) = texts(found(sight=sight))
        assert text.startswith("The network looks 20 mm around a voxel in its slice (95 %")


def test_every_sentence_has_its_figure() -> None:
    falls = {Change("cut", 5): 0.0, Change("mean", 1): -0.01, Change("zeroed", 1): 0.2, Change("mean", 2): 0.2}
    sight = ReceptiveField((9, 9, 9), (9.0, 9.0, 9.0), (32.0, 32.0, 32.0), 4.0, (3.0, 3.0, 3.0), 8, {"a": 40.0})
    figures = [level("encoder 1", dead_share=0.5, redundant_share=0.4), level("bottleneck 6", sparsity=0.99)]
    sentences = words_of(found(falls, figures=figures, sight=sight))
    assert len(sentences) == 8
    assert all(any(letter.isdigit() for letter in sentence.text) for sentence in sentences)
    assert all(sentence.text.endswith(".") and sentence.text[0] == sentence.text[0].upper() for sentence in sentences)


def test_scores_are_told_with_as_few_digits_as_say_them() -> None:
    assert [score_text(value) for value in (0.00001, 0.0004, 0.003, 0.0199, 0.31, 0.996)] == [
        "less than 0.0001", "0.0004", "0.003", "0.020", "0.31", "1.00",
    ]  # fmt: skip


def test_json_has_no_nan() -> None:
    figures = [level("bottleneck 6", energy=math.nan)]
    value = found({Change("cut", 5): math.nan}, dice=math.nan, figures=figures).to_json()
    read = json.loads(json.dumps(value, allow_nan=False))
    assert read["levels"][0]["energy"] is None
    assert read["contributions"]["changes"][0]["falls_by"] is None
    assert read["contributions"]["dice"] is None
    assert read["receptive_field"]["radius_mm"] is None
