"""What thresholds would do, told against deciding again, and small worlds by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from pipeline.cleaning_effects import CaseEffect
from pipeline.combining import segment_scores
from pipeline.kept_scores import LEVELS, Grids, Keeper, KeptScores
from pipeline.postprocessing import Action
from pipeline.threshold_effects import THRESHOLDS, threshold_candidates, threshold_effects
from transforms.geometry import Geometry
from transforms.labels import LabelSchema, Region, schema_from_names

pytestmark = pytest.mark.usefixtures("one_thread")

Array = npt.NDArray[Any]

ABC = schema_from_names({10: "a", 20: "b", 30: "c"})
IGNORING = ABC.model_copy(update={"ignore": 99})
REGIONS = LabelSchema(
    labels=schema_from_names({1: "a", 2: "b"}).labels,
    ignore=9,
    regions=(Region(name="whole", labels=("a", "b"), paints="b"), Region(name="core", labels=("a",), paints="a")),
)


def kept(probabilities: torch.Tensor, schema: LabelSchema, count: int = 3) -> KeptScores:
    """Scores (O, I, J, K) as a prediction keeps them."""
    grid = Geometry(tuple(probabilities.shape[1:]), np.eye(4))
    keeper = Keeper(grid.shape, schema, count)
    for plane in range(grid.shape[0]):
        keeper.add(0, plane, probabilities[:, plane])
    return keeper.kept(Grids(grid, grid, grid, grid), ("volseg x", "1"), ("f00d",))


def drawn(outputs: int, seed: int) -> torch.Tensor:
    """Smooth values (O, 12, 13, 14)."""
    coarse = torch.randn(1, outputs, 4, 4, 4, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(3 * coarse, size=(12, 13, 14), mode="trilinear")[0]


def dice(found: Array, truth: Array, counted: Array) -> float:
    found, truth = found & counted, truth & counted
    return 2.0 * (found & truth).sum() / (found.sum() + truth.sum()) if found.any() or truth.any() else 1.0


class TestAgainstDecidingAgain:
    @pytest.mark.parametrize("schema", [ABC, IGNORING], ids=["all", "ignoring"])
    def test_labels(self, schema: LabelSchema) -> None:
        changed = 0
        for seed in range(4):
            scores = kept(drawn(4, seed).softmax(dim=0), schema, count=4)
            random = np.random.default_rng(seed)
            classes = drawn(4, seed + 100).argmax(dim=0).numpy()
            classes = np.where(random.random(classes.shape) < 0.7, segment_classes(scores, {}), classes)
            if schema.ignored_class is not None:
                classes[random.random(classes.shape) < 0.1] = schema.ignored_class
            # Levels are whole numbers, of which none has exactly such a share: it would be a matter of rounding.
            actions = [a.model_copy(update={"threshold": a.threshold + 0.0017}) for a in threshold_candidates(schema)]
            effects = threshold_effects(scores, classes, actions, annotated=(True,) * 4)
            for action, effect in zip(actions, effects, strict=True):
                before, after = segment_classes(scores, {}), segment_classes(scores, {action.name: action.threshold})
                own = schema.names.index(action.name) + 1
                gains = [_gain(before, after, classes, c) for c in (1, 2, 3)]
                assert effect.before == pytest.approx(dice(before == own, classes == own, classes != 4))
                assert effect.after == pytest.approx(effect.before + sum(gains)), action.words
                assert effect.total == pytest.approx(sum(gains))
                assert effect.worst == pytest.approx(min(gains))
                assert effect.is_changed == bool((before != after).any())
                changed += effect.is_changed
        assert changed > 50

    def test_regions(self) -> None:
        scores = kept(drawn(2, 0).sigmoid(), REGIONS)
        random = np.random.default_rng(0)
        classes = random.choice([0, 1, 2, 3], size=(12, 13, 14), p=[0.4, 0.25, 0.25, 0.1])
        counted = classes != 3
        actions = threshold_candidates(REGIONS)
        assert len(actions) == 2 * len(THRESHOLDS)
        level = scores.dense(0, 0, 12).numpy() * LEVELS
        effects = threshold_effects(scores, classes, actions, annotated=(True, True, True))
        for action, effect in zip(actions, effects, strict=True):
            number, union = {"whole": (0, [1, 2]), "core": (1, [1])}[action.name]
            truth = np.isin(classes, union)
            assert effect.before == pytest.approx(dice(level[number] > 0.5 * LEVELS, truth, counted))
            assert effect.after == pytest.approx(dice(level[number] > action.threshold * LEVELS, truth, counted))
            assert effect.total == effect.worst == effect.after - effect.before
            assert effect.is_changed


class TestByHand:
    """A line of ten voxels, a tumour of four of them, which the network is 0.45 sure of in two."""

    ONE = schema_from_names({1: "tumour"})
    TRUTH = np.array([0, 0, 1, 1, 1, 1, 0, 0, 0, 1]).reshape(10, 1, 1)

    def effect(self, threshold: float, sure: list[float], **options: Any) -> CaseEffect:
        line = torch.tensor(sure).reshape(10, 1, 1)
        action = Action(kind="threshold", name="tumour", labels=("tumour",), threshold=threshold)
        scores = kept(torch.stack([1 - line, line]), self.ONE)
        return threshold_effects(scores, self.TRUTH, [action], annotated=(True, True), **options)[0]

    def test_a_lower_one_finds_what_was_doubted(self) -> None:
        found = self.effect(0.4, [0, 0, 0.45, 0.9, 0.9, 0.45, 0, 0, 0, 0])
        assert (found.before, found.after) == (pytest.approx(4 / 7), pytest.approx(8 / 9))
        assert (found.is_changed, found.parts_lost) == (True, 0)

    def test_a_higher_one_loses_a_part(self) -> None:
        """The last voxel is a tumour of its own, found with 0.55; of the other one only an end is lost."""
        found = self.effect(0.6, [0, 0, 0.55, 0.9, 0.9, 0.9, 0, 0, 0, 0.55])
        assert found.parts_lost == 1
        assert (found.before, found.after) == (1.0, pytest.approx(6 / 8))

    def test_nothing_is_doubted(self) -> None:
        found = self.effect(0.2, [0, 0, 0.9, 0.9, 0.9, 0.9, 0, 0, 0, 0.1])
        assert found == CaseEffect(pytest.approx(8 / 9), pytest.approx(8 / 9), is_changed=False)

    def test_a_label_that_was_not_annotated_says_nothing(self) -> None:
        scores = kept(drawn(4, 0).softmax(dim=0), ABC)
        actions = threshold_candidates(ABC)
        found = threshold_effects(scores, segment_classes(scores, {}), actions, annotated=(True, True, False, True))
        assert {a.name for a, e in zip(actions, found, strict=True) if e.before is None} == {"b"}

    def test_shapes_that_differ(self) -> None:
        with pytest.raises(ValueError, match=r"a reference of \(2, 2, 2\) against scores of \(12, 13, 14\)"):
            threshold_effects(kept(drawn(4, 0).softmax(dim=0), ABC), np.zeros((2, 2, 2)), [], annotated=(True,) * 4)


def _gain(before: Array, after: Array, classes: Array, number: int) -> float:
    truth, counted = classes == number, classes != 4
    return dice(after == number, truth, counted) - dice(before == number, truth, counted)


def segment_classes(scores: KeptScores, thresholds: dict[str, float | None]) -> Array:
    """As `volseg scores combine` decides them, in classes."""
    limits = {name: limit for name, limit in thresholds.items() if limit is not None}
    return scores.schema.classes_from_ids(segment_scores([scores], limits).label_map)
