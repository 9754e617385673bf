"""`volseg inspect` on real cases with a small model, as a user runs it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from pipeline.bundle import load_bundle
from pipeline.cli import app
from pipeline.console import Silence
from pipeline.errors import BundleError, ConfigError, GeometryMismatch, ManifestError, PlanError, RunError, VolsegError
from pipeline.gradients import is_out_of_memory
from pipeline.inspection.reading import Asked, find_subjects, read_case
from pipeline.inspection.result import Inspection
from pipeline.inspection.run import inspect_cases, open_model
from pipeline.inspection.words import words_of
from pipeline.manifest import Dataset
from pipeline.predict import Model, PredictSettings, predict
from pipeline.scores import dice_of_classes

ROOT = Path(__file__).parents[3]
MANIFEST = ROOT / "data_manifests" / "hippocampus_demo.json"
CASE, OTHER = "hippocampus_001", "hippocampus_015"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(small_bundle: Path) -> Model:
    return open_model(small_bundle, "cpu")


@pytest.fixture(scope="module")
def paths(small_dataset: Dataset) -> tuple[Path, Path]:
    case = next(case for case in small_dataset.manifest.cases if case.case_id == CASE)
    label = small_dataset.label_path(case)
    assert label is not None
    return small_dataset.image_paths(case)[0], label


def looked(model: Model, *cases: str, quick: bool = False, **options: Any) -> Inspection:
    return inspect_cases(model, Asked(cases, **options), console=Silence(), quick=quick)[0]


@pytest.fixture(scope="module")
def found(model: Model) -> Inspection:
    torch.set_num_threads(1)
    return looked(model, CASE, manifest=MANIFEST)


class TestCase:
    def test_dice_is_that_of_a_prediction(self, model: Model, found: Inspection) -> None:
        asked = Asked((CASE,), manifest=MANIFEST)
        (subject,) = find_subjects(model, asked, console=Silence())
        case = read_case(model, subject, asked)
        settings = PredictSettings(mirror=False)
        ids = predict(model, case.channels, settings=settings, device=torch.device("cpu")).label_map
        assert case.reference is not None
        classes = model.schema.classes_from_ids(ids)
        expected = dice_of_classes(classes, case.reference, model.schema, annotated=case.annotated)
        assert found.contributions is not None
        assert found.contributions.untouched == (expected,)

    def test_the_network_is_itself_afterwards(self, model: Model, small_bundle: Path, found: Inspection) -> None:
        assert found.cases == (CASE,)
        fresh = load_bundle(small_bundle).network
        image = torch.randn(1, 1, 24, 36, 28, generator=torch.Generator().manual_seed(1))
        with torch.inference_mode():
            assert torch.equal(fresh(image), model.bundles[0].network(image))
        assert not any(module._forward_hooks for module in model.bundles[0].network.modules())

    def test_every_level_and_part_is_there(self, found: Inspection) -> None:
        names = ["encoder 1", "bottleneck 2", "skip 1", "decoder 1"]
        assert [level.name for level in found.figures] == names
        assert found.contributions is not None
        assert [c.name for c in found.contributions.changed] == ["skip 1 zeroed", "skip 1 by its mean", "only level 1"]
        assert set(found.receptive.extents_mm) == {"Anterior", "Posterior"}
        assert found.receptive.radius_mm is not None
        assert found.receptive.deepest_voxels == (11, 11, 11)
        assert found.receptive.voxels == 8

    def test_files_are_the_same_case_by_path_and_label(
        self, model: Model, found: Inspection, paths: tuple[Path, Path]
    ) -> None:
        image, label = paths
        again = looked(model, str(image), labels=label)
        assert replace(again, cases=(CASE,)).to_json() == found.to_json()

    def test_without_a_reference_results_are_compared_with_themselves(
        self, model: Model, paths: tuple[Path, Path]
    ) -> None:
        found = looked(model, str(paths[0]))
        assert found.contributions is not None
        assert found.contributions.against == "untouched"
        assert found.contributions.dice == 1.0
        assert words_of(found)[0].text.startswith("Without a reference")

    def test_several_cases_are_taken_together(self, model: Model, found: Inspection) -> None:
        both = looked(model, CASE, OTHER, manifest=MANIFEST)
        assert both.contributions is not None
        assert found.contributions is not None
        assert both.cases == (CASE, OTHER)
        assert both.contributions.untouched[0] == found.contributions.untouched[0]
        assert both.figures[0].voxels > found.figures[0].voxels
        assert both.receptive.voxels == 16

    def test_a_quick_look_leaves_out_contributions(self, model: Model, found: Inspection) -> None:
        quick = looked(model, CASE, manifest=MANIFEST, quick=True)
        assert quick.contributions is None
        assert quick.figures == found.figures


class TestCommand:
    def run(self, *arguments: object) -> str:
        result = CliRunner().invoke(app, ["inspect", *map(str, arguments)], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.stdout

    def test_tables_words_and_files(self, small_bundle: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        text = self.run(small_bundle, CASE, "--manifest", MANIFEST, "--out", out)
        assert "bottleneck 2" in text
        assert "skip 1 by its mean" in text
        assert max(map(len, text.replace(str(out), "").splitlines())) <= 80
        value = json.loads((out / "inspection.json").read_text())
        assert value["format"] == "volseg-inspection-1"
        assert [row["text"] for row in value["words"]]
        for row in value["words"]:
            assert " ".join(row["text"].split()) in " ".join(text.split())
        assert (out / "inspection.html").stat().st_size > 100_000
        assert {"overview.png", "encoder_1.png", "bottleneck_2.png"} <= {p.name for p in (out / CASE).iterdir()}

    def test_an_inspection_is_replaced_only_when_told_to(
        self, model: Model, small_bundle: Path, tmp_path: Path
    ) -> None:
        out = tmp_path / "out"
        self.run(small_bundle, CASE, "--manifest", MANIFEST, "--out", out, "--quick")
        (out / CASE / "encoder_9.png").write_bytes(b"of a deeper network")
        before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
        asked = Asked((CASE,), manifest=MANIFEST)
        with pytest.raises(RunError, match=r"out: holds an inspection; choose another --out, or give --force"):
            inspect_cases(model, asked, console=Silence(), out=out, quick=True)
        assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
        self.run(small_bundle, CASE, "--manifest", MANIFEST, "--out", out, "--quick", "--force")
        assert set(before) - set(out.rglob("*")) == {out / CASE / "encoder_9.png"}

    @pytest.mark.parametrize("force", [False, True])
    def test_a_folder_of_other_files_is_never_replaced(self, model: Model, tmp_path: Path, force: bool) -> None:
        """As the case's own, where --out is the folder above it."""
        (tmp_path / CASE).mkdir()
        (tmp_path / CASE / "0001.dcm").touch()
        asked = Asked((CASE,), manifest=MANIFEST)
        with pytest.raises(RunError, match="pictures are to be here, and other files are"):
            inspect_cases(model, asked, console=Silence(), out=tmp_path, quick=True, force=force)
        assert (tmp_path / CASE / "0001.dcm").exists()

    def test_nothing_is_written_unless_asked(self, small_bundle: Path, tmp_path: Path) -> None:
        shutil.copytree(small_bundle, tmp_path / "bundle")
        before = sorted(tmp_path.rglob("*"))
        self.run(tmp_path / "bundle", CASE, "--manifest", MANIFEST, "--quick")
        assert sorted(tmp_path.rglob("*")) == before


Refused = Callable[[], object]


class TestRefusals:
    def refused(self, kind: type[VolsegError], what: Refused) -> str:
        with pytest.raises(kind) as caught:
            what()
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def test_cases_that_are_not_there(self, model: Model) -> None:
        text = self.refused(ManifestError, lambda: looked(model, "hippocampus_01", manifest=MANIFEST))
        assert "no case 'hippocampus_01'; did you mean hippocampus_" in text

    def test_one_reference_for_several_cases(self, model: Model, paths: tuple[Path, Path], tmp_path: Path) -> None:
        image, label = paths
        other = tmp_path / "other.nii.gz"
        shutil.copy(image, other)
        text = self.refused(ConfigError, lambda: looked(model, str(image), str(other), labels=label))
        assert "reference of one case, found 2" in text

    def test_labels_beside_a_manifest(self, model: Model, paths: tuple[Path, Path]) -> None:
        self.refused(ConfigError, lambda: looked(model, CASE, manifest=MANIFEST, labels=paths[1]))

    def test_a_reference_on_another_grid(self, model: Model, small_dataset: Dataset, paths: tuple[Path, Path]) -> None:
        other = next(case for case in small_dataset.manifest.cases if case.case_id == OTHER)
        label = small_dataset.label_path(other)
        text = self.refused(GeometryMismatch, lambda: looked(model, str(paths[0]), labels=label))
        assert "the reference lies on another grid than the image" in text

    def test_a_manifest_of_other_labels(self, model: Model, tmp_path: Path) -> None:
        document = json.loads(MANIFEST.read_text())
        document["labels"]["labels"][0]["name"] = "Head"
        (tmp_path / "cases.json").write_text(json.dumps(document))
        data = (MANIFEST.parent / document["root"]).resolve()
        asked = {"manifest": tmp_path / "cases.json", "root": data}
        text = self.refused(ManifestError, lambda: looked(model, CASE, **asked))
        assert "its labels are Head, Posterior, the model's are Anterior, Posterior" in text

    def test_several_folds(self, small_bundle: Path, tmp_path: Path) -> None:
        for fold in (0, 1):
            shutil.copytree(small_bundle, tmp_path / f"fold_{fold}" / "bundle")
        text = self.refused(BundleError, lambda: open_model(tmp_path, "cpu"))
        assert f"2 folds, and one network is inspected at a time; give {tmp_path / 'fold_0'}" in text

    def test_no_such_device(self, small_bundle: Path) -> None:
        self.refused(ConfigError, lambda: open_model(small_bundle, "tpu"))

    def test_a_network_of_unknown_levels(self, model: Model) -> None:
        other = Model((replace(model.bundles[0], network=torch.nn.Conv3d(1, 3, 1)),))
        text = self.refused(PlanError, lambda: looked(other, CASE, manifest=MANIFEST))
        assert "network Conv3d: its levels are not known" in text


def test_where_memory_does_not_suffice_for_pictures_none_are_left(
    model: Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def attention_maps(*_: object) -> None:
        raise RuntimeError("CUDA out of memory. Tried to allocate 1 GiB")

    monkeypatch.setattr("pipeline.inspection.pictures.attention_maps", attention_maps)
    asked = Asked((CASE,), manifest=MANIFEST)
    with pytest.raises(PlanError, match="memory does not suffice to draw the levels of the network in a patch of 24x3"):
        inspect_cases(model, asked, console=Silence(), out=tmp_path / "out", quick=True)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("how", ["by an error", "by what is free"])
def test_where_memory_does_not_suffice_for_gradients_the_rest_is_told(
    model: Model, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    full = MemoryError("not enough")
    assert is_out_of_memory(full)

    def gradient_energy(*_: object) -> None:
        assert how == "by an error"
        raise full

    monkeypatch.setattr("pipeline.inspection.case.gradient_energy", gradient_energy)
    if how == "by what is free":
        monkeypatch.setattr("pipeline.inspection.case.free_bytes", lambda: 1000)
    found = looked(model, CASE, manifest=MANIFEST, quick=True)
    assert found.receptive.radius_mm is None
    assert found.figures
    assert not np.isnan(found.figures[0].energy)
