"""Partial labels and ignored voxels from the manifest to the fingerprint: hand-made cases on a grid of 2x1x1 mm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
import pytest
import torch

from pipeline.checks import Fault, check_dataset
from pipeline.config import Config
from pipeline.console import Silence
from pipeline.dataset import prepare_case, prepare_cases
from pipeline.device import Hardware
from pipeline.errors import ManifestError, PlanError
from pipeline.fingerprint import Measuring
from pipeline.folds import assign_folds
from pipeline.manifest import Dataset, load_dataset, parse_manifest, save_manifest
from pipeline.plan import Plan
from pipeline.runs import Run, run_fold_cases

SHAPE = (8, 9, 10)
AFFINE = np.diag([2.0, 1.0, 1.0, 1.0])
LABELS = [{"id": i, "name": n, "colour": [i, i, i]} for i, n in ((1, "stem"), (5, "gullet"), (7, "jaw"))]

Array = npt.NDArray[Any]


class World:
    """Cases written to disk: `add` one with what its label file holds and what the manifest says of it."""

    def __init__(self, folder: Path, **labels: Any) -> None:
        self.folder, self.labels, self.cases = folder, {"labels": LABELS, **labels}, []

    def add(self, label: Array, /, **says: Any) -> None:
        name = f"c{len(self.cases)}"
        image = np.random.default_rng(len(self.cases)).normal(100, 1, SHAPE)
        image[np.asarray(label) != 0] += 1000
        for what, voxels in (("image", image.astype(np.float32)), ("label", label)):
            nib.save(nib.Nifti1Image(voxels, AFFINE), self.folder / f"{name}_{what}.nii.gz")
        case = {"case_id": name, "patient_id": name, "images": {"CT": f"{name}_image.nii.gz"}}
        self.cases.append({**case, "label": f"{name}_label.nii.gz", **says})

    def dataset(self) -> Dataset:
        channels = [{"name": "CT", "modality": "CT"}]
        document = {"name": "w", "channels": channels, "labels": self.labels, "cases": self.cases}
        return Dataset(manifest=parse_manifest(document, source="here"), root=self.folder)

    def faults(self) -> list[Fault]:
        return list(check_dataset(self.dataset()).faults)


def label_map(**voxels: int) -> npt.NDArray[np.uint8]:
    """`_5=3`: three voxels of value 5, in planes of their own."""
    found = np.zeros(SHAPE, np.uint8)
    for plane, (name, count) in enumerate(voxels.items()):
        found[plane].flat[:count] = int(name[1:])
    return found


@pytest.fixture
def world(tmp_path: Path) -> World:
    """One whole case, and one without the gullet in whose file 5 is the jaw."""
    world = World(tmp_path)
    world.add(label_map(_1=4, _5=2, _7=6))
    world.add(label_map(_1=3, _5=8), annotated=["stem", "jaw"], label_values={"jaw": 5})
    return world


def sparse(folder: Path) -> World:
    """One case of which all but two planes are to be ignored."""
    world = World(folder, ignore=255)
    label = label_map(_1=4, _5=2, _7=6)
    label[3:] = 255
    world.add(label)
    return world


class TestManifest:
    def test_it_survives_writing(self, world: World, tmp_path: Path) -> None:
        save_manifest(world.dataset(), tmp_path / "m.json")
        cases = load_dataset(tmp_path / "m.json").manifest.cases
        assert (cases[0].annotated, cases[0].label_values) == (None, None)
        assert (cases[1].annotated, cases[1].label_values) == (("stem", "jaw"), {"jaw": 5})

    @pytest.mark.parametrize(
        ("says", "message"),
        [
            ({"annotated": ["jaws"]}, "case 'c2': jaws is no label of the schema: stem, gullet, jaw"),
            ({"label_values": {"jaw": 5}}, "case 'c2': the value 5 stands for both gullet and jaw"),
            ({"label_values": {"jaw": 0}}, "input should be greater than or equal to 1"),
            ({"label": None, "annotated": ["jaw"]}, "case 'c2' says what was annotated, but has no label"),
        ],
    )
    def test_what_it_cannot_mean_is_refused(self, world: World, says: dict[str, Any], message: str) -> None:
        world.add(label_map(_1=1), **says)
        with pytest.raises(ManifestError, match=message):
            world.dataset()


class TestCheck:
    def test_a_sound_world(self, world: World) -> None:
        report = check_dataset(world.dataset())
        assert report.faults == ()
        volumes = [fact.label_volumes_mm3 for fact in report.facts]
        assert volumes == [{"stem": 8.0, "gullet": 4.0, "jaw": 12.0}, {"stem": 6.0, "jaw": 16.0}]

    def test_a_label_that_was_not_annotated_is_named(self, world: World) -> None:
        world.add(label_map(_1=3, _5=9), annotated=["stem", "jaw"])
        (fault,) = world.faults()
        assert (fault.case_id, fault.kind, fault.severity) == ("c2", "unannotated-label", "error")
        assert fault.message == "'gullet' occurs in 9 voxels, but is not among what the manifest says was annotated"

    def test_values_of_the_other_file_are_unknown(self, world: World) -> None:
        world.add(label_map(_7=3), annotated=["stem", "jaw"], label_values={"jaw": 5})
        (fault,) = world.faults()
        assert fault.kind == "unknown-label"
        assert fault.message == "values [7] in 3 voxels; the schema knows 1 stem, 5 jaw"

    def test_what_is_ignored_is_a_note_with_its_share(self, tmp_path: Path) -> None:
        (fault,) = sparse(tmp_path).faults()
        assert (fault.kind, fault.severity) == ("ignored-voxels", "note")
        assert fault.message == "62.5% of the voxels are to be ignored (255)"

    def test_nothing_annotated(self, world: World, tmp_path: Path) -> None:
        world.add(label_map(), annotated=[])
        assert [(f.case_id, f.kind) for f in world.faults()] == [("c2", "empty-label"), ("c2", "nothing-annotated")]
        other = sparse(tmp_path)
        other.add(np.full(SHAPE, 255, np.uint8))
        assert ("c1", "nothing-annotated") in [(f.case_id, f.kind) for f in other.faults()]

    def test_a_label_that_occurs_in_no_case_that_it_is_annotated_in(self, tmp_path: Path) -> None:
        world = World(tmp_path)
        world.add(label_map(_1=4, _7=2))
        world.add(label_map(_1=4), annotated=["stem"])
        assert [f.message for f in world.faults()] == ["label 5 'gullet' occurs in none of the 1 labels that were read"]


class TestFingerprint:
    def measured(self, world: World) -> Measuring:
        measuring = Measuring(world.dataset().manifest)
        check_dataset(world.dataset(), visit=measuring.visit)
        return measuring

    def test_values_are_those_of_the_schema(self, world: World) -> None:
        cases = self.measured(world).fingerprint(["c0", "c1"]).cases
        assert cases[1].label_volumes_mm3 == {"stem": 6.0, "jaw": 16.0}

    def test_what_is_ignored_enters_nothing(self, tmp_path: Path) -> None:
        """Ignored voxels shine as labels do: with them the mean inside labels would be another."""
        world = sparse(tmp_path)
        fingerprint = self.measured(world).fingerprint(["c0"])
        image = np.asarray(nib.load(tmp_path / "c0_image.nii.gz").dataobj)
        label = np.asarray(nib.load(tmp_path / "c0_label.nii.gz").dataobj)
        inside = image[(label != 0) & (label != 255)]
        assert fingerprint.channels[0].inside_mean == pytest.approx(float(inside.mean()), abs=1e-3)
        assert fingerprint.cases[0].label_volumes_mm3 == {"stem": 8.0, "gullet": 4.0, "jaw": 12.0}

    def test_a_label_that_no_case_has_annotated_cannot_be_learnt(self, world: World) -> None:
        with pytest.raises(PlanError, match="none of the 1 training cases has gullet annotated"):
            self.measured(world).fingerprint(["c1"])

    def test_regions_decide_how_many_outputs_there_are(self, tmp_path: Path) -> None:
        regions = [{"name": "all", "labels": ["stem", "gullet", "jaw"], "paints": "jaw"}]
        world = World(tmp_path, regions=regions)
        world.add(label_map(_1=4, _5=2, _7=6))
        fingerprint = self.measured(world).fingerprint(["c0"])
        assert (fingerprint.class_count, fingerprint.regions, fingerprint.output_count) == (4, ("all",), 1)


class TestCache:
    @pytest.fixture
    def plan(self, small_plan: Plan) -> Plan:
        return small_plan.model_copy(update={"spacing_mm": (2.0, 1.0, 1.0), "class_count": 4})

    def test_classes_and_what_was_annotated(self, world: World, plan: Plan, tmp_path: Path) -> None:
        dataset = world.dataset()
        whole, part = (prepare_case(dataset, case, plan, tmp_path / "cache") for case in dataset.manifest.cases)
        assert whole.annotated is None
        assert part.annotated is not None
        assert part.annotated.tolist() == [True, True, False, True]
        assert torch.unique(part.classes).tolist() == [0, 1, 3]
        assert set(part.positions[:, 0].tolist()) == {1, 3}

    def test_ignored_voxels_are_a_class_of_their_own(self, plan: Plan, tmp_path: Path) -> None:
        dataset = sparse(tmp_path).dataset()
        case = prepare_case(dataset, dataset.manifest.cases[0], plan, tmp_path / "cache")
        assert (case.classes == 4).float().mean() == pytest.approx(0.625)
        assert set(case.positions[:, 0].tolist()) == {0, 1, 2, 3}
        assert not bool((case.classes[0][tuple(case.positions[:, 1:].T)] == 4).any())

    def test_another_annotation_is_another_entry(self, world: World, plan: Plan, tmp_path: Path) -> None:
        """Or what was made without looking would be taken for what was looked at."""
        dataset = world.dataset()
        case = dataset.manifest.cases[0]
        prepare_case(dataset, case, plan, tmp_path / "cache")
        narrower = case.model_copy(update={"annotated": ("stem", "jaw")})
        _, failures = prepare_cases(dataset, [narrower], plan, tmp_path / "cache", workers=1, console=Silence())
        assert [f.reason for f in failures] == ["gullet occurs, which the manifest says was not annotated in this case"]


class TestFold:
    @pytest.fixture
    def run(self, world: World, small_plan: Plan, tmp_path: Path) -> Run:
        """Fold 0 is trained on the whole case, fold 1 on the one without the gullet."""
        world.cases[0]["fold"], world.cases[1]["fold"] = 1, 0
        dataset = world.dataset()
        config = Config.model_validate({"name": "w", "data": {"manifest": "m.json", "cache": tmp_path / "cache"}})
        plan = small_plan.model_copy(update={"spacing_mm": (2.0, 1.0, 1.0), "class_count": 4})
        folds = assign_folds(check_dataset(dataset).facts, count=2, seed=0)
        return Run(tmp_path / "run", config, dataset, folds, plan, Hardware("cpu", "32-true"))

    def test_every_label_is_annotated_somewhere_in_its_training_cases(self, run: Run) -> None:
        training, validation = run_fold_cases(run, 0, Silence())
        assert [case.case_id for case in (*training, *validation)] == ["c0", "c1"]
        with pytest.raises(PlanError, match="fold 1: none of its 1 training cases has gullet annotated"):
            run_fold_cases(run, 1, Silence())
