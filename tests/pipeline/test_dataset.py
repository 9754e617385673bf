"""The cache: keyed by content, whole or not there. The patches: a function of the seed and their number."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline import cache_entry
from pipeline import dataset as module
from pipeline.config import AugmentConfig
from pipeline.console import Silence
from pipeline.dataset import (
    Patches,
    PreparedCase,
    apply_chain,
    content_digest,
    dataset_digest,
    prepare_case,
    prepare_cases,
    spatial_settings,
)
from pipeline.errors import RunError, VolumeError
from pipeline.manifest import Dataset
from pipeline.plan import Plan
from transforms.geometry import Geometry
from transforms.labels import LabelSchema
from transforms.patches import class_positions

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[2]
STILL = AugmentConfig(
    rotation_probability=0,
    scaling_probability=0,
    elastic_probability=0,
    noise_probability=0,
    blur_probability=0,
    brightness_probability=0,
    contrast_probability=0,
    gamma_probability=0,
    low_resolution_probability=0,
)


class Told(Silence):
    """What a console was told."""

    def __init__(self) -> None:
        self.done: list[tuple[str, int, int]] = []

    def progress(self, what: str, done: int, total: int, detail: str = "") -> None:
        self.done.append((what, done, total))


def entries(cache: Path) -> list[Path]:
    return sorted(p for p in cache.glob("*/*") if not p.name.startswith("."))


def hidden(cache: Path) -> list[Path]:
    return [p for p in cache.rglob("*") if p.name.startswith(".")]


class TestCache:
    def test_a_case_is_made_once_and_then_found(self, world: Dataset, small_plan: Plan, tmp_path: Path) -> None:
        case, cache = world.manifest.cases[0], tmp_path / "cache"
        first = prepare_case(world, case, small_plan, cache)
        (entry,) = entries(cache)
        made = {p.name: p.stat().st_mtime_ns for p in entry.iterdir()}
        second = prepare_case(world, case, small_plan, cache)
        assert {p.name: p.stat().st_mtime_ns for p in entry.iterdir()} == made
        assert torch.equal(first.image, second.image)
        assert torch.equal(first.classes, second.classes)
        assert np.array_equal(first.positions, second.positions)
        assert hidden(cache) == []

    def test_it_holds_what_the_chain_gives(self, world: Dataset, small_plan: Plan, tmp_path: Path) -> None:
        import nibabel as nib

        case = world.manifest.cases[0]
        prepared = prepare_case(world, case, small_plan, tmp_path / "cache")
        label = nib.as_closest_canonical(nib.load(world.label_path(case)))  # type: ignore[attr-defined]
        # The bundled cases are 1 mm, as the plan is, so labels only turn to RAS axes.
        assert np.array_equal(prepared.classes[0].numpy(), np.asarray(label.dataobj))
        assert prepared.geometry.axis_codes == "RAS"
        assert prepared.image.dtype == torch.float32
        assert abs(float(prepared.image.mean())) < 1e-4
        assert float(prepared.image.std(correction=0)) == pytest.approx(1.0, abs=1e-4)

    def test_what_it_is_made_from_decides_its_key(self, world: Dataset, small_plan: Plan, tmp_path: Path) -> None:
        case, cache = world.manifest.cases[0], tmp_path / "cache"

        def entries_after(dataset: Dataset, plan: Plan) -> int:
            prepare_case(dataset, case, plan, cache)
            return len(entries(cache))

        assert entries_after(world, small_plan) == 1
        another_network = small_plan.model_copy(update={"patch_shape": (8, 8, 8), "batch_size": 7})
        assert entries_after(world, another_network) == 1
        assert entries_after(world, small_plan.model_copy(update={"spacing_mm": (2.0, 2.0, 2.0)})) == 2
        schema = world.manifest.labels
        turned = LabelSchema(labels=schema.labels[::-1])
        relabelled = world.model_copy(update={"manifest": world.manifest.model_copy(update={"labels": turned})})
        assert entries_after(relabelled, small_plan) == 3
        other = world.image_paths(world.manifest.cases[1])[0]
        label = world.label_path(world.manifest.cases[1])
        assert label is not None
        shutil.copy(other, world.image_paths(case)[0])
        shutil.copy(label, str(world.label_path(case)))
        assert entries_after(world, small_plan) == 4

    def test_where_the_files_lie_does_not(self, world: Dataset, small_plan: Plan, tmp_path: Path) -> None:
        case, cache = world.manifest.cases[0], tmp_path / "cache"
        prepare_case(world, case, small_plan, cache)
        moved = world.model_copy(update={"root": Path(shutil.move(world.root, tmp_path / "elsewhere"))})
        prepare_case(moved, case, small_plan, cache)
        assert len(entries(cache)) == 1

    def test_other_code_makes_another_entry(
        self, world: Dataset, small_plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cache = tmp_path / "cache"
        prepare_case(world, world.manifest.cases[0], small_plan, cache)
        monkeypatch.setattr(module, "code_digest", lambda: "changed")
        prepare_case(world, world.manifest.cases[0], small_plan, cache)
        assert len(entries(cache)) == 2

    def test_every_module_that_decides_is_watched(self) -> None:
        folder = ROOT / "transforms"
        watched = {p.name for n in module.PREPROCESSING_MODULES for p in folder.glob(f"{n}*.py")}
        undecided = {"__init__.py", "errors.py", "augment.py", "sampling.py", "sanity.py", "colours.py", "concepts.py"}
        # Of imported models, which are not trained; and silence.
        undecided |= {"recipe.py", "recipe_spec.py", "process_wide.py", "quiet_warnings.py"}
        ours = {p.name for p in folder.glob("*.py")} - undecided
        assert ours <= watched


RIVAL = """
import os, signal, sys, time
from pathlib import Path
import torch
from pipeline import cache_entry
from pipeline.dataset import prepare_case
from pipeline.manifest import load_dataset
from pipeline.plan import read_plan

torch.set_num_threads(1)
folder, manifest, plan = Path(sys.argv[1]), sys.argv[2], read_plan(Path(sys.argv[3]))
dataset = load_dataset(Path(manifest))
first, second = [c for c in dataset.manifest.cases if c.case_id in sys.argv[4:]]
save = cache_entry._save_array

def slow(path, array):
    (folder / "rival_is_writing").touch()
    while not (folder / "we_are_writing").exists():
        time.sleep(0.01)
    save(path, array)

cache_entry._save_array = slow
prepare_case(dataset, first, plan, folder / "cache")
(folder / "rival_has_it").touch()

def deadly(path, array):
    save(path, array)
    os.kill(os.getpid(), signal.SIGKILL)

cache_entry._save_array = deadly
prepare_case(dataset, second, plan, folder / "cache")
"""


def test_two_processes_at_once_and_a_kill(
    small_dataset: Dataset, small_plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both write the same entry at the same moment; then the other is killed while it writes the next."""
    plan_file, cache = tmp_path / "plan.json", tmp_path / "cache"
    plan_file.write_text(small_plan.model_dump_json())
    contested, killed = small_dataset.manifest.cases[:2]
    manifest = ROOT / "data_manifests" / "hippocampus_demo.json"
    command = [sys.executable, "-c", RIVAL, tmp_path, manifest, plan_file, contested.case_id, killed.case_id]
    with subprocess.Popen([str(x) for x in command], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}) as rival:
        save = cache_entry._save_array

        def after_the_rival(path: Path, array: Any) -> None:
            (tmp_path / "we_are_writing").touch()
            wait_for(tmp_path / "rival_is_writing")
            save(path, array)

        monkeypatch.setattr(cache_entry, "_save_array", after_the_rival)
        ours = prepare_case(small_dataset, contested, small_plan, cache)
        wait_for(tmp_path / "rival_has_it")
        assert len(entries(cache)) == 1
        assert rival.wait() == -signal.SIGKILL
    assert len(entries(cache)) == 1
    assert len(hidden(cache)) == 1, "the killed one left its beginnings, under a name that nobody takes for an entry"
    assert (hidden(cache)[0] / "image.npy").exists()
    assert torch.equal(prepare_case(small_dataset, contested, small_plan, cache).image, ours.image)
    prepare_case(small_dataset, killed, small_plan, cache)
    assert len(entries(cache)) == 2


def wait_for(path: Path) -> None:
    """Until another process has made it; the test's own time limit ends a wait in vain."""
    pause = threading.Event()
    while not path.exists():
        pause.wait(0.02)


class TestPrepareCases:
    def test_a_case_that_fails_is_set_aside_and_named(self, world: Dataset, small_plan: Plan, tmp_path: Path) -> None:
        bad = world.manifest.cases[1]
        content = world.image_paths(bad)[0].read_bytes()
        world.image_paths(bad)[0].write_bytes(content[: len(content) // 2])
        told = Told()
        prepared, failures = prepare_cases(
            world,
            world.manifest.cases,
            small_plan,
            tmp_path / "cache",
            workers=2,
            console=told,
        )
        assert [case.case_id for case in prepared] == [
            c.case_id for c in world.manifest.cases if c.case_id != bad.case_id
        ]
        assert [failure.case_id for failure in failures] == [bad.case_id]
        assert "cut short" in failures[0].reason
        assert "\n" not in failures[0].reason
        assert told.done == [("preprocessing", n, 4) for n in range(1, 5)]

    def test_labels_outside_the_schema_are_named(self, world: Dataset, small_plan: Plan, tmp_path: Path) -> None:
        schema = LabelSchema(labels=world.manifest.labels.labels[:1])
        small = world.model_copy(update={"manifest": world.manifest.model_copy(update={"labels": schema})})
        with pytest.raises(VolumeError, match=r"label values \[2\] are not in the schema, which knows \[1\]"):
            prepare_case(small, small.manifest.cases[0], small_plan, tmp_path / "cache")

    def test_a_cache_that_cannot_be_written_stops_all(self, world: Dataset, small_plan: Plan, tmp_path: Path) -> None:
        (tmp_path / "cache").write_text("a file")
        with pytest.raises(RunError, match="a file stands where a folder is needed"):
            prepare_cases(world, world.manifest.cases, small_plan, tmp_path / "cache", workers=1, console=Told())

    def test_what_cannot_be_trained_on(self, world: Dataset, small_plan: Plan, tmp_path: Path) -> None:
        bare = world.manifest.cases[0].model_copy(update={"label": None})
        with pytest.raises(RunError, match="has no label, so it cannot be trained on"):
            prepare_case(world, bare, small_plan, tmp_path)
        world.image_paths(world.manifest.cases[0])[0].unlink()
        with pytest.raises(RunError, match="no such file or folder; run `volseg check`"):
            prepare_case(world, world.manifest.cases[0], small_plan, tmp_path)

    def test_a_series_is_known_by_its_files_whatever_their_names(self, tmp_path: Path) -> None:
        for folder, names in (("a", "12"), ("b", "zy"), ("c", "1")):
            (tmp_path / folder).mkdir()
            for name, content in zip(names, ("first", "second"), strict=False):
                (tmp_path / folder / name).write_text(content)
        a, b, c = (content_digest(tmp_path / name) for name in "abc")
        assert a == b != c

    def test_a_fault_inside_a_chain_is_our_own_error(self) -> None:
        from monai.transforms import Compose, Lambda

        def refuse(_: Any) -> None:
            raise ValueError("the volume is flat")

        with pytest.raises(VolumeError, match=r"^the volume is flat$"):
            apply_chain(Compose([Lambda(refuse)]), {})


def prepared(name: str, image: Tensor, classes: Tensor) -> PreparedCase:
    positions = class_positions(classes[0].numpy(), class_count=3)
    return PreparedCase(name, Geometry(tuple(image.shape[1:]), np.eye(4)), image, classes, positions)  # type: ignore[arg-type]


def flat_case(number: int, shape: tuple[int, int, int] = (12, 12, 12)) -> PreparedCase:
    """Every voxel says which case it is of."""
    classes = torch.zeros(1, *shape, dtype=torch.uint8)
    classes[0, 4:8, 4:8, 4:8] = 1
    return prepared(f"case_{number}", torch.full((1, *shape), float(number)), classes)


@pytest.fixture
def plan(small_plan: Plan) -> Plan:
    return small_plan.model_copy(update={"patch_shape": (8, 8, 8), "batch_size": 2, "mirror_axes": (0,)})


def patches_of(cases: list[PreparedCase], plan: Plan, **values: Any) -> Patches:
    settings: dict[str, Any] = {
        "augment": AugmentConfig(),
        "twin_classes": (0, 1, 2),
        "foreground_share": 0.5,
        "seed": 0,
    }
    return Patches(cases, plan, **{**settings, **values})


class TestPatches:
    def test_a_batch_depends_on_the_seed_and_its_number_alone(self, plan: Plan) -> None:
        generator = torch.Generator().manual_seed(0)
        cases = [
            prepared(str(n), torch.randn(1, 12, 12, 12, generator=generator), flat_case(n).classes) for n in (1, 2)
        ]
        forth, back = patches_of(cases, plan), patches_of(cases, plan)
        first = {n: forth.batch(n) for n in range(4)}
        second = {n: back.batch(n) for n in reversed(range(4))}
        for number in range(4):
            assert torch.equal(first[number].images, second[number].images)
            assert torch.equal(first[number].classes, second[number].classes)
            assert first[number].case_ids == second[number].case_ids
        assert not torch.equal(first[0].images, first[1].images)
        assert not torch.equal(first[0].images, patches_of(cases, plan, seed=1).batch(0).images)

    def test_shapes_and_types(self, plan: Plan) -> None:
        batch = patches_of([flat_case(1)], plan).batch(0)
        assert (batch.images.shape, batch.images.dtype) == ((2, 1, 8, 8, 8), torch.float32)
        assert (batch.classes.shape, batch.classes.dtype) == ((2, 1, 8, 8, 8), torch.uint8)
        assert batch.case_ids == ("case_1", "case_1")

    def test_what_was_annotated_goes_with_each_patch(self, plan: Plan) -> None:
        known = torch.tensor([True, False, True])
        cases = [flat_case(1), replace(flat_case(2), annotated=known)]
        rows = dict(zip((batch := patches_of(cases, plan).batch(0)).case_ids, batch.annotated.tolist(), strict=True))
        assert rows == {"case_1": [True, True, True], "case_2": [True, False, True]}

    def test_each_epoch_sees_every_case_once_in_its_own_order(self, plan: Plan) -> None:
        patches = patches_of([flat_case(n) for n in range(1, 7)], plan, augment=STILL)
        seen = [float(x) for step in range(12) for x in patches.batch(step).images.amax(dim=(1, 2, 3, 4))]
        epochs = [seen[n : n + 6] for n in range(0, 24, 6)]
        assert all(sorted(epoch) == [1, 2, 3, 4, 5, 6] for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) > 1

    def test_the_foreground_share_is_kept(self, plan: Plan) -> None:
        """A single labelled voxel in the corner of a long volume is in a patch when the patch was drawn for it."""
        classes = torch.zeros(1, 80, 8, 8, dtype=torch.uint8)
        classes[0, 2, 4, 4] = 2
        case = prepared("long", torch.rand(1, 80, 8, 8, generator=torch.Generator().manual_seed(0)), classes)
        shares = {}
        for share in (0.0, 0.5, 1.0):
            patches = patches_of([case], plan, augment=STILL, foreground_share=share)
            shares[share] = np.mean([bool(c.any()) for n in range(60) for c in patches.batch(n).classes])
        assert shares[1.0] == 1
        assert 0.4 < shares[0.5] < 0.75
        assert shares[0.0] < 0.25

    def test_mirrored_patients_keep_left_on_the_left(self, plan: Plan) -> None:
        """Left is class 1 and dark, right is class 2 and bright; mirrored, the left is bright and still class 1."""
        classes = torch.ones(1, 8, 8, 8, dtype=torch.uint8)
        classes[:, 4:] = 2
        case = prepared("twins", classes.float(), classes)
        patches = patches_of([case], plan, augment=STILL, twin_classes=(0, 2, 1))
        mirrored = 0
        for number in range(10):
            batch = patches.batch(number)
            for image, label in zip(batch.images, batch.classes, strict=True):
                assert (label[0, :4] == 1).all()
                assert (label[0, 4:] == 2).all()
                mirrored += bool((image[0, :4] == 2).all())
        assert 0 < mirrored < 20

    def test_labels_without_twins_are_mirrored_with_the_image(self, plan: Plan) -> None:
        classes = torch.ones(1, 8, 8, 8, dtype=torch.uint8)
        classes[:, 4:] = 2
        case = prepared("plain", classes.float(), classes)
        for number in range(5):
            batch = patches_of([case], plan, augment=STILL).batch(number)
            assert torch.equal(batch.images, batch.classes.float())

    def test_outside_the_volume_is_its_minimum(self, plan: Plan) -> None:
        case = prepared("small", torch.full((1, 4, 8, 8), -3.0), torch.zeros(1, 4, 8, 8, dtype=torch.uint8))
        assert (patches_of([case], plan, augment=STILL).batch(0).images == -3).all()

    def test_the_cases_themselves_are_never_changed(self, plan: Plan) -> None:
        case = flat_case(5)
        before = case.image.clone()
        patches = patches_of([case], plan)
        for number in range(6):
            patches.batch(number).images.zero_()
        assert torch.equal(case.image, before)

    def test_no_cases_is_an_error(self, plan: Plan) -> None:
        with pytest.raises(RunError, match="no case to train on"):
            patches_of([], plan)

    def test_mirror_axes_are_the_plans_unless_set_by_hand(self, plan: Plan) -> None:
        assert spatial_settings(AugmentConfig(), plan).mirror_axes == (0,)
        assert spatial_settings(AugmentConfig(mirror_axes=(1, 2)), plan).mirror_axes == (1, 2)


def test_the_digest_of_a_dataset_is_of_its_voxels() -> None:
    cases = [flat_case(1), flat_case(2)]
    assert dataset_digest(cases) == dataset_digest(cases[::-1])
    assert dataset_digest(cases) != dataset_digest([flat_case(1), flat_case(3)])
    assert len(dataset_digest(cases)) == 16
