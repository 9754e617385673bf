"""Channels that cases may lack: from the manifest to the plan, in worlds of two channels made by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from pydantic import ValidationError

from pipeline.checks import CheckReport, check_dataset
from pipeline.config import NetworkConfig, PlanConfig
from pipeline.errors import ManifestError, PlanError
from pipeline.fingerprint import Measuring
from pipeline.manifest import Channel, Dataset, Manifest, parse_manifest
from pipeline.manifest_build import PatientRule, build_manifest
from pipeline.plan import Budget, Fingerprint
from pipeline.planner import make_plan

Files = dict[str, Sequence[str]]
"""Case to the channels that it has."""

FLAIR, T1C = Channel(name="FLAIR", modality="MR"), Channel(name="T1c", modality="MR", optional=True)
SHAPE = (6, 7, 8)


def save(path: Path, voxels: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), path)  # type: ignore[attr-defined]


def write_world(folder: Path, files: Files) -> Dataset:
    """Noise about 100 (FLAIR) and 1000 (T1c), and a label of one box."""
    cases = []
    for number, (case, names) in enumerate(files.items()):
        random = np.random.default_rng(number)
        label = np.zeros(SHAPE, np.uint8)
        label[1:4, 2:5, 3:6] = 1
        save(folder / "labels" / f"{case}.nii.gz", label)
        for name in names:
            level = {"FLAIR": 100, "T1c": 1000}[name]
            save(folder / "images" / f"{case}_{name}.nii.gz", random.normal(level, 10, SHAPE).astype(np.float32))
        images = {name: f"images/{case}_{name}.nii.gz" for name in names}
        cases.append({"case_id": case, "patient_id": case, "images": images, "label": f"labels/{case}.nii.gz"})
    document = {
        "name": "world",
        "channels": [FLAIR.model_dump(), T1C.model_dump()],
        "labels": {"labels": [{"id": 1, "name": "box", "colour": [9, 0, 0]}]},
        "cases": cases,
    }
    return Dataset(manifest=parse_manifest(document, source="world"), root=folder)


BOTH: Files = {"a": ["FLAIR", "T1c"], "b": ["FLAIR"], "c": ["FLAIR", "T1c"]}


class TestManifest:
    def images(self, *names: str, channels: Sequence[Channel] = (FLAIR, T1C)) -> Manifest:
        case = {"case_id": "a", "patient_id": "a", "images": {name: f"{name}.nii" for name in names}}
        labels = {"labels": [{"id": 1, "name": "box", "colour": [9, 0, 0]}]}
        document = {"name": "x", "channels": [c.model_dump() for c in channels], "labels": labels, "cases": [case]}
        return Manifest.model_validate(document)

    def test_only_what_is_optional_may_be_missing(self) -> None:
        assert list(self.images("FLAIR").cases[0].images) == ["FLAIR"]
        with pytest.raises(ValidationError, match=r"has images \['T1c'\], expected \['FLAIR', 'T1c'\]; only T1c may"):
            self.images("T1c")
        with pytest.raises(ValidationError, match=r"has images \['FLAIR', 'T2'\]"):
            self.images("FLAIR", "T2")
        with pytest.raises(ValidationError, match=r"has images \['FLAIR'\], expected \['FLAIR', 'T1c'\] \[type"):
            self.images("FLAIR", channels=[FLAIR, T1C.model_copy(update={"optional": False})])

    def test_never_all_are_missing(self) -> None:
        either = [FLAIR.model_copy(update={"optional": True}), T1C]
        assert self.images("T1c", channels=either).cases
        with pytest.raises(ValidationError, match="and never all"):
            self.images(channels=either)

    def test_paths_are_one_a_channel_or_those_that_are_there(self, tmp_path: Path) -> None:
        dataset = write_world(tmp_path, {"b": ["FLAIR"]})
        (case,) = dataset.manifest.cases
        there = tmp_path / "images" / "b_FLAIR.nii.gz"
        assert dataset.channel_paths(case) == [there, None]
        assert dataset.image_paths(case) == [there]


class TestBuilding:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        write_world(tmp_path, BOTH)
        return tmp_path

    def build(self, folder: Path, *channels: Channel) -> Dataset:
        return build_manifest(
            folder / "images", folder / "labels", name="x", channels=channels, patients=PatientRule(pattern=r"^(\w)_")
        )

    def test_a_case_without_an_optional_channel_is_kept(self, folder: Path) -> None:
        dataset = self.build(folder, FLAIR, T1C)
        found = {case.case_id: list(case.images) for case in dataset.manifest.cases}
        assert found == {case: list(names) for case, names in BOTH.items()}
        assert [channel.optional for channel in dataset.manifest.channels] == [False, True]

    def test_one_without_a_required_channel_is_named(self, folder: Path) -> None:
        with pytest.raises(ManifestError, match="1 without all of their channels: b"):
            self.build(folder, FLAIR, T1C.model_copy(update={"optional": False}))


class TestCheckAndPlan:
    def measured(self, dataset: Dataset) -> tuple[CheckReport, Measuring]:
        measuring = Measuring(dataset.manifest)
        return check_dataset(dataset, visit=measuring.visit), measuring

    def test_cases_are_counted_by_channel(self, tmp_path: Path) -> None:
        report, _ = self.measured(write_world(tmp_path, BOTH))
        assert report.ok
        assert report.faults == ()
        assert report.channel_counts == {"FLAIR": 3, "T1c": 2}
        assert [len(fact.image_sha256) for fact in report.facts] == [2, 1, 2]

    def test_a_channel_that_no_case_has_is_noted(self, tmp_path: Path) -> None:
        report, measuring = self.measured(write_world(tmp_path, {"a": ["FLAIR"], "b": ["FLAIR"]}))
        assert [(f.kind, f.severity, f.message) for f in report.faults] == [
            ("absent-channel", "note", "no case has the optional channel 'T1c'")
        ]
        with pytest.raises(PlanError, match="none of the 2 training cases has the channel 'T1c'"):
            measuring.fingerprint(["a", "b"])

    def test_a_file_that_is_named_must_be_there(self, tmp_path: Path) -> None:
        dataset = write_world(tmp_path, BOTH)
        (tmp_path / "images" / "a_T1c.nii.gz").unlink()
        report, _ = self.measured(dataset)
        assert [(f.case_id, f.kind) for f in report.faults] == [("a", "missing-file")]

    def test_grids_are_compared_with_the_first_channel_that_is_there(self, tmp_path: Path) -> None:
        dataset = write_world(tmp_path, BOTH)
        save(tmp_path / "images" / "c_T1c.nii.gz", np.random.default_rng(9).normal(size=(3, 3, 3)).astype(np.float32))
        report, _ = self.measured(dataset)
        assert [(f.case_id, f.kind) for f in report.faults] == [("c", "channel-grid")]
        assert report.faults[0].message.startswith("channels 'FLAIR' and 'T1c' differ")

    def test_a_channel_is_measured_on_the_cases_that_have_it(self, tmp_path: Path) -> None:
        _, measuring = self.measured(write_world(tmp_path, BOTH))
        flair, t1c = measuring.fingerprint(["a", "b", "c"]).channels
        _, alone = self.measured(write_world(tmp_path / "alone", {"a": BOTH["a"], "c": BOTH["c"]}))
        assert (flair.case_count, t1c.case_count) == (3, 2)
        assert flair.inside_mean == pytest.approx(100, abs=5)
        assert t1c.inside_mean == pytest.approx(1000, abs=5)
        # Noise is drawn by a case's place in the world, so only case a is the same in both.
        assert measuring.fingerprint(["a"]).channels[1] == alone.fingerprint(["a"]).channels[1]
        with pytest.raises(PlanError, match="'T1c'"):
            measuring.fingerprint(["b"])

    def test_the_plan_says_which_are_optional(self, tmp_path: Path) -> None:
        _, measuring = self.measured(write_world(tmp_path, BOTH))
        facts = measuring.fingerprint(["a", "b", "c"])
        plan = make_plan(
            Fingerprint.model_validate_json(facts.model_dump_json()),
            Budget("cpu", memory_gb=2.0, minutes=None, gflops=30.0),
            settings=PlanConfig(features=(4,)),
            network=NetworkConfig(),
        )
        assert [channel.optional for channel in plan.channels] == [False, True]
        assert "optional (2 of the training cases have it)" in plan.reasons["normalisation of T1c"]
        assert "optional" not in plan.reasons["normalisation of FLAIR"]
