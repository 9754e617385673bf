"""Channels that cases may lack: from the manifest to the prediction, in worlds of two channels made by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from pipeline.bundle import BundleFacts, load_bundle, save_bundle
from pipeline.checks import CheckReport, check_dataset
from pipeline.config import AugmentConfig, NetworkConfig, PlanConfig, TrainConfig
from pipeline.console import Silence
from pipeline.dataset import CHANNEL_DROPOUT, Patches, PreparedCase, channel_dropout, prepare_case
from pipeline.describe import facts_of
from pipeline.device import Hardware
from pipeline.errors import ConfigError, ManifestError, PlanError, RunError, VolumeError
from pipeline.fingerprint import Measuring
from pipeline.manifest import Channel, Dataset, Manifest, parse_manifest, save_manifest
from pipeline.manifest_build import PatientRule, build_manifest
from pipeline.mlflow_model import ServedModel
from pipeline.models.registry import build_network
from pipeline.plan import Budget, Fingerprint, Plan
from pipeline.planner import make_plan
from pipeline.predict import Model, PredictSettings, predict
from pipeline.segment import SegmentSettings, segment_studies
from pipeline.studies import Wanted, find_studies
from pipeline.task import TrainingTask
from pipeline.train import train
from transforms.geometry import Geometry
from transforms.labels import schema_from_names
from transforms.patches import class_positions
from transforms.volume import Volume

pytestmark = pytest.mark.usefixtures("one_thread")

Files = dict[str, Sequence[str]]
"""Case to the channels that it has."""

FLAIR, T1C = Channel(name="FLAIR", modality="MR"), Channel(name="T1c", modality="MR", optional=True)
SHAPE = (6, 7, 8)


def save(path: Path, voxels: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), path)  # type: ignore[attr-defined]


def write_world(folder: Path, files: Files, shape: tuple[int, int, int] = SHAPE) -> Dataset:
    """Noise about 100 (FLAIR) and 1000 (T1c), and a label of one box."""
    cases = []
    for number, (case, names) in enumerate(files.items()):
        random = np.random.default_rng(number)
        label = np.zeros(shape, np.uint8)
        label[1:4, 2:5, 3:6] = 1
        save(folder / "labels" / f"{case}.nii.gz", label)
        for name in names:
            level = {"FLAIR": 100, "T1c": 1000}[name]
            save(folder / "images" / f"{case}_{name}.nii.gz", random.normal(level, 10, shape).astype(np.float32))
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


def planned(dataset: Dataset, patch_shape: tuple[int, int, int] = (4, 4, 4)) -> Plan:
    measuring = Measuring(dataset.manifest)
    check_dataset(dataset, visit=measuring.visit)
    return make_plan(
        measuring.fingerprint([case.case_id for case in dataset.manifest.cases]),
        Budget("cpu", memory_gb=2.0, minutes=None, gflops=30.0),
        settings=PlanConfig(features=(4, 8), patch_shape=patch_shape, batch_size=2),
        network=NetworkConfig(),
    )


def write_bundle(folder: Path, plan: Plan, weights: Mapping[str, Tensor] | None = None) -> Model:
    if weights is None:
        network = build_network(plan.network, plan.unet, plan.patch_shape, generator=torch.Generator().manual_seed(1))
        weights = network.state_dict()
    facts = BundleFacts("two", 0, False, 0.5, plan, schema_from_names({1: "box"}), "name: two\n", {})
    save_bundle(folder, dict(weights), facts)
    return Model((load_bundle(folder),))


class TestPatches:
    @pytest.fixture
    def cases(self, tmp_path: Path) -> tuple[list[PreparedCase], Plan]:
        dataset = write_world(tmp_path, BOTH)
        plan = planned(dataset, (16, 16, 16))
        return [prepare_case(dataset, case, plan, tmp_path / "cache") for case in dataset.manifest.cases], plan

    def test_a_case_lacks_what_its_files_lack(self, cases: tuple[list[PreparedCase], Plan]) -> None:
        prepared, _ = cases
        assert [case.present for case in prepared] == [(True, True), (True, False), (True, True)]
        assert prepared[1].image.shape == (2, *SHAPE)
        assert prepared[1].image[1].abs().max() == 0
        assert [round(float(case.image[0].std()), 1) for case in prepared] == [1.0] * 3

    def test_which_channels_are_there_decides_the_key(self, tmp_path: Path) -> None:
        """The same file, once as the one channel and once as the other."""
        either = [FLAIR.model_copy(update={"optional": True}), T1C]
        dataset = write_world(tmp_path, BOTH)
        plan = planned(dataset)
        for name in ("FLAIR", "T1c"):
            case = dataset.manifest.cases[1].model_copy(update={"images": {name: "images/b_FLAIR.nii.gz"}})
            manifest = dataset.manifest.model_copy(update={"cases": (case,), "channels": tuple(either)})
            prepared = prepare_case(Dataset(manifest=manifest, root=tmp_path), case, plan, tmp_path / "cache")
            assert [bool(channel.any()) for channel in prepared.image] == [name == "FLAIR", name == "T1c"]

    def test_patches_end_in_each_channels_own_minimum(self, cases: tuple[list[PreparedCase], Plan]) -> None:
        """Patches larger than every case, of which only the volume's own voxels change."""
        prepared, plan = cases
        still = {name: 0.0 for name in AugmentConfig.model_fields if name.endswith("_probability")}
        augment = AugmentConfig(**still, mirror_axes=(), channel_dropout=0.0)  # type: ignore[arg-type]
        patches = Patches(prepared, plan, augment=augment, twin_classes=(0, 1), foreground_share=0.5, seed=0)
        seen = set()
        for step in range(6):
            batch = patches.batch(step)
            for image, case_id in zip(batch.images, batch.case_ids, strict=True):
                case = next(case for case in prepared if case.case_id == case_id)
                seen.add(case_id)
                minima = case.image.flatten(1).amin(dim=1)
                assert torch.equal(image[:, 0, 0, 0], minima)
                assert torch.equal(image[:, -1, -1, -1], minima)
                assert torch.equal(image.flatten(1).amax(dim=1), case.image.flatten(1).amax(dim=1))
        assert seen == {"a", "b", "c"}
        assert float(prepared[0].image[0].min()) != float(prepared[0].image[1].min())

    def test_only_the_optional_channel_is_dropped(self, cases: tuple[list[PreparedCase], Plan]) -> None:
        prepared, plan = cases
        patches = Patches(
            prepared[:1], plan, augment=AugmentConfig(), twin_classes=(0, 1), foreground_share=0.5, seed=0
        )
        images = torch.cat([patches.batch(step).images for step in range(60)])
        empty = images.flatten(2).abs().amax(dim=2) == 0
        assert not empty[:, 0].any()
        assert float(empty[:, 1].float().mean()) == pytest.approx(CHANNEL_DROPOUT, abs=0.12)

    def test_a_probability_for_nothing_is_refused(self, cases: tuple[list[PreparedCase], Plan]) -> None:
        _, plan = cases
        none = plan.model_copy(
            update={"channels": tuple(c.model_copy(update={"optional": False}) for c in plan.channels)}
        )
        with pytest.raises(ConfigError, match=r"augment\.channel_dropout: 0\.5, but no channel may be missing"):
            channel_dropout(AugmentConfig(channel_dropout=0.5), none)
        assert channel_dropout(AugmentConfig(), none).optional == (False, False)

    def test_a_fold_without_a_channel_is_refused(self, cases: tuple[list[PreparedCase], Plan]) -> None:
        prepared, plan = cases
        with pytest.raises(RunError, match="none of the 1 training cases has the channel 'T1c'"):
            Patches(prepared[1:2], plan, augment=AugmentConfig(), twin_classes=(0, 1), foreground_share=0.5, seed=0)


class Listener(Silence):
    """Remembers its notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


class TestPrediction:
    def test_studies_without_a_channel(self, tmp_path: Path) -> None:
        """One has both, one lacks the optional one, and one lacks the one that is needed."""
        dataset = write_world(tmp_path, BOTH)
        model = write_bundle(tmp_path / "bundle", planned(dataset))
        case = dataset.manifest.cases[2]
        last = case.model_copy(update={"images": {"T1c": case.images["T1c"]}})
        optional = [channel.model_copy(update={"optional": True}) for channel in dataset.manifest.channels]
        changes = {"cases": (*dataset.manifest.cases[:2], last), "channels": tuple(optional)}
        manifest = dataset.manifest.model_copy(update=changes)
        save_manifest(Dataset(manifest=manifest, root=tmp_path), tmp_path / "world.json")
        settings = SegmentSettings(formats=("nifti",), mirror=False, series=None, force=False)
        studies = find_studies([tmp_path / "world.json"], Wanted(model.plan.channels), console=Silence())
        listener, out = Listener(), tmp_path / "out"
        written, failures = segment_studies(model, studies, out, settings=settings, console=listener)
        assert [file.path.name for file in written] == ["a.nii.gz", "b.nii.gz"]
        assert listener.notes == ["b: without the optional channel T1c"]
        told = "channel FLAIR (MR) is missing; the model wants FLAIR (MR), T1c (MR, optional)"
        assert [(failure.case_id, failure.reason) for failure in failures] == [
            ("c", f"{tmp_path / 'images' / 'c_T1c.nii.gz'}: {told}")
        ]
        assert json.loads((out / "predictions.json").read_text())["missing"] == {"b": ["T1c"]}

    def test_missing_is_zero_after_normalisation(self, tmp_path: Path) -> None:
        """Against the network by hand: 6 x 7 x 8 voxels in a patch of 8 x 8 x 8, which goes on with the minimum."""
        model = write_bundle(tmp_path / "bundle", planned(write_world(tmp_path, BOTH), (8, 8, 8)))
        voxels = np.random.default_rng(0).normal(100, 10, SHAPE).astype(np.float32)
        volume = Volume(voxels, Geometry(SHAPE, np.eye(4)), "MR", 0.0)
        found = predict(model, [volume, None], settings=PredictSettings(False), device=torch.device("cpu")).label_map
        normalised = torch.from_numpy((voxels - voxels.mean()) / voxels.std())
        image = torch.zeros(2, 8, 8, 8)
        image[0] = normalised.min()
        image[0, 1:7, :7] = normalised
        with torch.inference_mode():
            expected = model.bundles[0].network(image[None])[0].argmax(dim=0)[1:7, :7]
        assert np.array_equal(found, expected.numpy())
        assert 0 < found.mean() < 1

    def test_never_all_and_never_a_needed_one(self, tmp_path: Path) -> None:
        model = write_bundle(tmp_path / "bundle", planned(write_world(tmp_path, BOTH)))
        voxels = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
        volume = Volume(voxels, Geometry(SHAPE, np.eye(4)), "MR", 0.0)
        for channels in ([None, volume], [None, None]):
            with pytest.raises(VolumeError, match=r"channel FLAIR \(MR\) is missing"):
                predict(model, channels, settings=PredictSettings(False), device=torch.device("cpu"))
        plan = model.plan
        either = tuple(channel.model_copy(update={"optional": True}) for channel in plan.channels)
        loose = write_bundle(tmp_path / "loose", plan.model_copy(update={"channels": either}))
        with pytest.raises(VolumeError, match="every channel is missing"):
            predict(loose, [None, None], settings=PredictSettings(False), device=torch.device("cpu"))

    def test_mlflow_takes_nan_for_missing(self, tmp_path: Path) -> None:
        model = write_bundle(tmp_path / "bundle", planned(write_world(tmp_path, BOTH)))
        voxels = np.random.default_rng(0).normal(100, 10, (1, 2, *SHAPE)).astype(np.float32)
        voxels[0, 1] = np.nan
        served = ServedModel(model, torch.device("cpu"))
        found = served.predict(voxels)
        volume = Volume(voxels[0, 0], Geometry(SHAPE, np.eye(4)), None, 0.0)
        assert np.array_equal(
            found[0],
            predict(model, [volume, None], settings=PredictSettings(False), device=torch.device("cpu")).label_map,
        )
        with pytest.raises(VolumeError, match=r"channel FLAIR \(MR\) is missing"):
            served.predict(voxels[:, ::-1])

    def test_info_says_which_are_optional(self, tmp_path: Path) -> None:
        dataset = write_world(tmp_path, BOTH)
        write_bundle(tmp_path / "bundle", planned(dataset))
        save_manifest(dataset, tmp_path / "world.json")
        told = [
            next(row["value"] for row in facts_of(tmp_path / name)[1] if row["what"] == "channels")
            for name in ("bundle", "world.json")
        ]
        assert told == ["FLAIR (MR), T1c (MR, optional)", "FLAIR (MR), T1c (MR, optional, 2 of 3 cases have it)"]


SIDE = (12, 12, 12)


def phantom(number: int) -> PreparedCase:
    """A box in noise that is faint in the first channel and bright in the second; either is enough to see it."""
    random = np.random.default_rng(number)
    image = random.normal(0, 0.5, (2, *SIDE)).astype(np.float32)
    classes = np.zeros((1, *SIDE), np.uint8)
    box = tuple(slice(start, start + 5) for start in random.integers(1, 6, 3))
    classes[(0, *box)] = 1
    image[(0, *box)] += 0.7
    image[(1, *box)] += 3.0
    image = (image - image.mean(axis=(1, 2, 3), keepdims=True)) / image.std(axis=(1, 2, 3), keepdims=True)
    return PreparedCase(
        f"case_{number}",
        Geometry(SIDE, np.eye(4)),
        torch.from_numpy(image),
        torch.from_numpy(classes),
        class_positions(classes[0], class_count=2),
    )


class TestTraining:
    @pytest.fixture
    def plan(self, tmp_path: Path) -> Plan:
        plan = planned(write_world(tmp_path / "world", BOTH, SIDE), SIDE)
        either = tuple(channel.model_copy(update={"optional": True}) for channel in plan.channels)
        return plan.model_copy(update={"channels": either})

    def trained(self, plan: Plan, folder: Path, dropout: Any) -> dict[str, Tensor]:
        folder.mkdir()
        task = TrainingTask(
            plan=plan,
            schema=schema_from_names({1: "box"}),
            training=[phantom(number) for number in range(6)],
            validation=[phantom(20)],
            settings=TrainConfig(steps=60, validations=1, learning_rate=0.02, weight_average=0.9),
            augment=AugmentConfig(channel_dropout=dropout),
            tile_step=0.5,
            folder=folder,
        )
        return train(task, Hardware("cpu", "32-true"), Deaf(), resume=False).weights

    def dice(self, model: Model, missing: int | None) -> float:
        scores = []
        for number in range(20, 26):
            case = phantom(number)
            volumes = [Volume(voxels, case.geometry, "MR", 0.0) for voxels in case.image.numpy()]
            given = [None if place == missing else volume for place, volume in enumerate(volumes)]
            found = predict(model, given, settings=PredictSettings(False), device=torch.device("cpu")).label_map == 1
            truth = case.classes[0].numpy() == 1
            scores.append(2 * float((found & truth).sum()) / float(found.sum() + truth.sum()))
        return float(np.mean(scores))

    def test_dropout_teaches_to_do_without(self, plan: Plan, tmp_path: Path) -> None:
        """Without it the network looks at the bright channel alone; with it, it still sees the box in the faint one."""
        weights = self.trained(plan, tmp_path / "with", "auto")
        with_dropout = write_bundle(tmp_path / "one", plan, weights)
        without = write_bundle(tmp_path / "other", plan, self.trained(plan, tmp_path / "without", 0.0))
        neither, faint, bright = (self.dice(with_dropout, missing) for missing in (None, 0, 1))
        assert min(neither, faint, bright) > 0.65
        neither, faint, alone = (self.dice(without, missing) for missing in (None, 0, 1))
        assert min(neither, faint) > 0.65
        assert alone < bright - 0.3

    def test_the_same_seed_gives_the_same_weights(self, plan: Plan, tmp_path: Path) -> None:
        first, second = (self.trained(plan, tmp_path / name, 0.5) for name in ("first", "second"))
        assert all(torch.equal(first[name], second[name]) for name in first)


class Deaf:
    """Hears nothing of a training."""

    def progress(self, step: int, steps: int, loss: float) -> None: ...

    def metrics(self, step: int, values: Mapping[str, float]) -> None: ...

    def note(self, message: str) -> None: ...
