"""Trainings on regions, on scribbles and on partly annotated cases: phantoms whose truth is known everywhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.bundle import BundleFacts, load_bundle, save_bundle
from pipeline.config import AugmentConfig, TrainConfig
from pipeline.dataset import PreparedCase
from pipeline.device import Hardware
from pipeline.plan import Plan
from pipeline.predict import Model, PredictSettings, predict
from pipeline.task import TrainingResult, TrainingTask
from pipeline.train import train
from transforms.geometry import Geometry
from transforms.labels import LabelSchema, Region, schema_from_names
from transforms.patches import class_positions
from transforms.volume import Volume

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = (12, 14, 10)
GRID = Geometry(SHAPE, np.eye(4))
TUMOUR = LabelSchema(
    labels=schema_from_names({1: "necrosis", 2: "oedema", 4: "enhancing"}).labels,
    regions=(
        Region(name="whole", labels=("necrosis", "oedema", "enhancing"), paints="oedema"),
        Region(name="core", labels=("necrosis", "enhancing"), paints="necrosis"),
        Region(name="active", labels=("enhancing",), paints="enhancing"),
    ),
)
ORGANS = schema_from_names({1: "bright", 2: "dark"})


class Silent:
    def progress(self, step: int, steps: int, loss: float) -> None: ...

    def metrics(self, step: int, values: Mapping[str, float]) -> None: ...

    def note(self, message: str) -> None: ...


def case(number: int, image: np.ndarray[Any, Any], classes: np.ndarray[Any, Any], class_count: int) -> PreparedCase:
    noise = np.random.default_rng(number).normal(0, 0.1, SHAPE)
    return PreparedCase(
        f"case_{number}",
        GRID,
        torch.from_numpy((image + noise).astype(np.float32)[None]),
        torch.from_numpy(classes[None]),
        class_positions(classes, class_count=class_count),
    )


def tumour(number: int) -> PreparedCase:
    """Boxes in boxes: oedema around necrosis around what enhances, each of its own intensity."""
    classes = np.zeros(SHAPE, np.uint8)
    i, j = np.random.default_rng(100 + number).integers(0, 3, 2)
    for label, inset in ((2, 0), (1, 2), (3, 3)):
        classes[i + inset : i + 9 - inset, j + inset : j + 10 - inset, inset : 9 - inset] = label
    return case(number, np.array([0.0, -2.0, 1.0, 3.0])[classes], classes, 4)


def organs(number: int) -> PreparedCase:
    """A bright box and a dark one."""
    classes = np.zeros(SHAPE, np.uint8)
    for label in (1, 2):
        i, j = np.random.default_rng(10 * number + label).integers(0, 8, 2)
        classes[i : i + 4, j : j + 6, 5 * (label - 1) : 5 * label] = label
    return case(number, np.array([0.0, 2.0, -2.0])[classes], classes, 3)


def relabelled(prepared: PreparedCase, classes: Tensor, class_count: int, **values: Any) -> PreparedCase:
    positions = class_positions(classes[0].numpy(), class_count=class_count)
    return replace(prepared, classes=classes, positions=positions, **values)


@pytest.fixture
def plan(small_plan: Plan) -> Plan:
    return small_plan.model_copy(update={"patch_shape": (8, 8, 8), "batch_size": 2, "spacing_mm": (1.0, 1.0, 1.0)})


def task(plan: Plan, folder: Path, schema: LabelSchema, training: list[PreparedCase], **settings: Any) -> TrainingTask:
    folder.mkdir()
    unet = plan.unet.model_copy(update={"out_channels": schema.output_count})
    make = tumour if schema.regions else organs
    return TrainingTask(
        plan=plan.model_copy(update={"unet": unet, "class_count": schema.class_count}),
        schema=schema,
        training=training,
        validation=[make(n) for n in (8, 9)],
        settings=TrainConfig(
            **{"steps": 60, "validations": 1, "learning_rate": 0.02, "weight_average": 0.9, **settings}
        ),
        augment=AugmentConfig(),
        tile_step=0.5,
        folder=folder,
    )


def run(wanted: TrainingTask) -> TrainingResult:
    return train(wanted, Hardware("cpu", "32-true"), Silent(), resume=False)


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_nested_regions_are_learnt_and_painted(plan: Plan, tmp_path: Path) -> None:
    """From patches to a bundle to a label map, whose unions are as good as the validation says."""
    wanted = task(plan, tmp_path / "run", TUMOUR, [tumour(n) for n in range(4)], steps=200)
    result = run(wanted)
    regions = [result.dice[name] for name in ("whole", "core", "active")]
    assert min(regions) > 0.75
    assert result.dice["mean"] == pytest.approx(sum(regions) / 3)
    facts = BundleFacts("tumour", 0, False, 0.5, wanted.plan, TUMOUR, "", {})
    save_bundle(tmp_path / "bundle", result.weights, facts)
    model = Model((load_bundle(tmp_path / "bundle"),))
    assert model.schema == TUMOUR
    unseen = wanted.validation[0]
    found = predict(model, [volume_of(unseen)], settings=PredictSettings(False), device=torch.device("cpu"))
    assert set(found.present()) == {1, 2, 4}
    truth = unseen.classes[0].numpy()
    for members in ((1, 2, 4), (1, 4), (4,)):
        inside = np.isin(found.label_map, members)
        expected = np.isin(np.array([0, 1, 2, 4])[truth], members)
        assert 2 * (inside & expected).sum() / (inside.sum() + expected.sum()) > 0.7


def volume_of(prepared: PreparedCase) -> Volume:
    voxels = prepared.image[0].numpy() * 100 + 1000
    return Volume(voxels, GRID, "MR", float(voxels.min()))


def test_scribbles_teach_the_rest(plan: Plan, tmp_path: Path) -> None:
    """Two planes of ten were drawn on. Were the others called background, the network would believe it."""
    sparse = LabelSchema(labels=ORGANS.labels, ignore=255)
    whole = [organs(n) for n in range(4)]
    drawn = torch.zeros(SHAPE, dtype=torch.bool)
    drawn[:, :, [2, 7]] = True
    ignored = [relabelled(c, torch.where(drawn, c.classes, 3).to(torch.uint8), 3) for c in whole]
    denied = [relabelled(c, torch.where(drawn, c.classes, 0).to(torch.uint8), 3) for c in whole]
    learnt = run(task(plan, tmp_path / "ignored", sparse, ignored, steps=120)).dice
    misled = run(task(plan, tmp_path / "denied", ORGANS, denied, steps=120)).dice
    assert learnt["mean"] > 0.65
    assert learnt["mean"] > misled["mean"] + 0.2


def test_what_was_not_annotated_is_not_looked_at(plan: Plan, tmp_path: Path) -> None:
    """The dark box was annotated in half of the cases. In the others it may stand in the class map or not: the
    weights are the same, to the last bit, and it is learnt from those where it was."""
    whole = [organs(n) for n in range(4)]
    known = torch.tensor([True, True, False])
    without = [relabelled(c, torch.where(c.classes == 2, 0, c.classes), 3, annotated=known) for c in whole[2:]]
    hidden = [replace(c, classes=full.classes) for c, full in zip(without, whole[2:], strict=True)]
    first = run(task(plan, tmp_path / "without", ORGANS, [*whole[:2], *without]))
    second = run(task(plan, tmp_path / "hidden", ORGANS, [*whole[:2], *hidden]))
    assert same(first.weights, second.weights)
    assert first.dice["dark"] > 0.75


def test_a_case_is_validated_where_it_was_annotated(plan: Plan, tmp_path: Path) -> None:
    wanted = task(plan, tmp_path / "run", ORGANS, [organs(n) for n in range(2)], steps=2)
    known = torch.tensor([True, True, False])
    assert set(run(wanted).dice) == {"bright", "dark", "mean"}
    partial = [replace(c, annotated=known) for c in wanted.validation]
    again = replace(wanted, validation=partial, folder=tmp_path / "again")
    again.folder.mkdir()
    dice = run(again).dice
    assert set(dice) == {"bright", "mean"}
    assert dice["mean"] == dice["bright"]
