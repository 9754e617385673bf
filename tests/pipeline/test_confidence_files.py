"""Uncertainty and kept scores as their user meets them: files beside the labels, and label maps made again."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import typer

from pipeline.bundle import load_bundle
from pipeline.cli import app
from pipeline.cli_scores import tell_quality
from pipeline.combining import segment_scores
from pipeline.confidence_files import DESCRIPTIONS, discard_confidence, map_file
from pipeline.console import Silence
from pipeline.errors import ConfigError, RunError, VolumeError
from pipeline.folder_lock import LOCK_NAME
from pipeline.kept_scores import read_scores, write_scores
from pipeline.predict import Model
from pipeline.quality import read_quality
from pipeline.references import match_by_name
from pipeline.segment import SegmentSettings, segment_studies
from pipeline.segmentation import Algorithm
from pipeline.studies import Wanted, find_studies
from transforms.labels import schema_from_names
from transforms.volume import read_volume

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = SegmentSettings(("nifti",), mirror=False, series=None, force=False)
ASKED = replace(SETTINGS, uncertainty=True, keep_scores=2)
CASES = ("hippocampus_001", "hippocampus_015")


class Listener(Silence):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


@pytest.fixture(scope="module")
def model(small_bundle: Path) -> Model:
    """Two networks that differ: their weights are of opposite signs."""
    first, second = load_bundle(small_bundle), load_bundle(small_bundle)
    for values in second.network.parameters():
        values.requires_grad_(False).mul_(-1)
    return Model((first, second))


@pytest.fixture(scope="module")
def images(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for name in CASES:
        shutil.copy(data_dir / "hippocampus" / "images" / f"{name}.nii.gz", folder)
    return folder


@pytest.fixture(scope="module")
def made(model: Model, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("results") / "out"
    assert segment(model, images, out, ASKED)[1] == []
    return out


def segment(model: Model, images: Path, out: Path, settings: SegmentSettings) -> tuple[list[str], list[str]]:
    """The files that were written, and what was told."""
    studies = find_studies([images], Wanted(model.plan.channels), console=Silence())
    console = Listener()
    written, failures = segment_studies(model, studies, out, settings=settings, console=console)
    assert failures == []
    return [file.path.relative_to(out).as_posix() for file in written], console.notes


def combine(*arguments: str | Path) -> None:
    command: Any = typer.main.get_command(app)
    command.main(["scores", "combine", *map(str, arguments)], standalone_mode=False)


class TestFiles:
    def test_all_that_was_asked_for_lies_there(self, made: Path) -> None:
        for name in CASES:
            for what in ("entropy", "disagreement"):
                path = made / "uncertainty" / f"{name}_{what}.nii.gz"
                image, labels = nib.load(path), nib.load(made / f"{name}.nii.gz")  # type: ignore[attr-defined]
                assert np.array_equal(image.affine, labels.affine)
                values = image.get_fdata()
                assert 0 <= values.min() < 0.5 * values.max() <= 0.5001  # steps are rounded to float32
                assert what in str(image.header["descrip"])
                # Others read the same values: by the header's slope, on the same grid.
                other = sitk.ReadImage(path)
                np.testing.assert_allclose(sitk.GetArrayFromImage(other).T, values, atol=1e-6)
                np.testing.assert_allclose(read_volume(path).voxels, values, atol=1e-6)
            assert read_scores(made / "scores" / f"{name}.scores.npz").levels.shape[0] == 2
        assert set(read_quality(made)) == set(CASES)

    def test_headers_of_maps_hold_all_of_what_they_say(self) -> None:
        assert [len(what) for what in DESCRIPTIONS.values() if len(what) > 79] == []

    def test_disagreement_is_a_part_of_entropy(self, made: Path) -> None:
        maps = [made / "uncertainty" / f"{CASES[0]}_{what}.nii.gz" for what in ("entropy", "disagreement")]
        entropy, disagreement = (nib.load(path).get_fdata() for path in maps)  # type: ignore[attr-defined]
        assert (disagreement <= entropy + 0.01).all()

    def test_an_evaluation_does_not_take_maps_for_labels(self, made: Path) -> None:
        assert set(match_by_name(made, made)[0]) == set(CASES)

    def test_nothing_of_it_lies_there_unasked_and_labels_are_the_same(
        self, model: Model, images: Path, made: Path, tmp_path: Path
    ) -> None:
        segment(model, images, tmp_path, SETTINGS)
        assert {path.name for path in tmp_path.iterdir()} == {
            *(f"{name}{suffix}" for name in CASES for suffix in (".nii.gz", ".verification.json")),
            *("labels.json", "predictions.json", "sources.json", LOCK_NAME),
        }
        for name in CASES:
            assert (tmp_path / f"{name}.nii.gz").read_bytes() == (made / f"{name}.nii.gz").read_bytes()

    def test_what_is_there_is_kept_and_what_is_missing_made(self, model: Model, images: Path, tmp_path: Path) -> None:
        assert len(segment(model, images, tmp_path, SETTINGS)[0]) == 2
        assert len(segment(model, images, tmp_path, ASKED)[0]) == 2 * 4
        assert segment(model, images, tmp_path, ASKED)[0] == []
        assert segment(model, images, tmp_path, SETTINGS)[0] == []
        (tmp_path / "uncertainty" / f"{CASES[1]}_disagreement.nii.gz").unlink()
        assert len(segment(model, images, tmp_path, ASKED)[0]) == 4

    def test_more_scores_than_were_kept_are_made(self, model: Model, images: Path, tmp_path: Path) -> None:
        def kept(count: int) -> tuple[int, list[int]]:
            written = segment(model, images, tmp_path, replace(SETTINGS, keep_scores=count))[0]
            files = (tmp_path / "scores" / f"{name}.scores.npz" for name in CASES)
            return len(written), [len(read_scores(file).levels) for file in files]

        assert kept(2) == (2 * 2, [2, 2])
        assert kept(1) == (0, [2, 2])
        assert kept(3) == (2 * 2, [3, 3])
        # There are no more than three outputs.
        assert kept(9) == (0, [3, 3])

    def test_what_another_model_said_does_not_stay_beside_new_labels(
        self, model: Model, images: Path, tmp_path: Path
    ) -> None:
        segment(model, images, tmp_path, ASKED)
        segment(Model(model.bundles[:1]), images / f"{CASES[0]}.nii.gz", tmp_path, replace(SETTINGS, force=True))
        assert list(tmp_path.rglob(f"{CASES[0]}_*")) == []
        assert [path.name for path in (tmp_path / "scores").iterdir()] == [f"{CASES[1]}.scores.npz"]
        # The other is no longer among the folder's results, nor in the table of these.
        assert not (tmp_path / "quality.csv").exists()
        # And what the first model said of it goes when its turn comes, which needs no force.
        segment(Model(model.bundles[:1]), images, tmp_path, SETTINGS)
        assert [path for name in ("scores", "quality", "uncertainty") for path in (tmp_path / name).iterdir()] == []

    def test_models_are_not_mixed_in_a_table_nor_combined(
        self, model: Model, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        segment(model, images, tmp_path, ASKED)
        one = images / f"{CASES[0]}.nii.gz"
        segment(Model(model.bundles[:1]), one, tmp_path, replace(ASKED, force=True))
        rows = list(csv.DictReader((tmp_path / "quality.csv").read_text().splitlines()))
        assert [row["study"] for row in rows] == [CASES[0]]
        tell_quality(tmp_path)
        assert CASES[1] not in capsys.readouterr().out
        with pytest.raises(VolumeError, match=f"{CASES[1]}.*of another model"):
            combine(tmp_path, "--out", tmp_path / "combined")
        assert not (tmp_path / "combined").exists()

    def test_the_same_model_may_do_one_again(self, model: Model, images: Path, tmp_path: Path) -> None:
        segment(model, images, tmp_path, ASKED)
        record = json.loads((tmp_path / "predictions.json").read_text())
        rows = (tmp_path / "quality.csv").read_text()
        assert len(segment(model, images / f"{CASES[0]}.nii.gz", tmp_path, replace(ASKED, force=True))[0]) == 4
        assert json.loads((tmp_path / "predictions.json").read_text()) == record
        assert (tmp_path / "quality.csv").read_text() == rows
        assert segment(model, images, tmp_path, ASKED)[0] == []

    def test_old_maps_stay_with_an_old_label_map(self, model: Model, images: Path, tmp_path: Path) -> None:
        """What cannot be written takes nothing away."""
        out = tmp_path / "out"
        segment(model, images, out, ASKED)
        before = sorted(out.rglob("*"))
        (out / f"{CASES[0]}.nii.gz").unlink()
        (out / f"{CASES[0]}.nii.gz").mkdir()
        with pytest.raises(RunError, match="cannot write"):
            segment(model, images, out, replace(ASKED, force=True))
        assert sorted(out.rglob("*")) == before

    def test_a_run_that_is_cut_short_keeps_what_it_had(self, model: Model, images: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        (out / f"{CASES[1]}.nii.gz").mkdir(parents=True)
        with pytest.raises(RunError, match="cannot write"):
            segment(model, images, out, replace(ASKED, force=True))
        assert list(read_quality(out)) == [CASES[0]]
        (out / f"{CASES[1]}.nii.gz").rmdir()
        assert len(segment(model, images, out, ASKED)[0]) == 4
        rows = csv.DictReader((out / "quality.csv").read_text().splitlines())
        assert {row["study"] for row in rows} == set(CASES)

    def test_a_map_that_cannot_be_taken_away_is_told_in_a_line(self, tmp_path: Path) -> None:
        map_file(tmp_path, "x", "entropy").mkdir(parents=True)
        with pytest.raises(RunError, match="cannot write"):
            discard_confidence(tmp_path, "x", ["x_entropy.nii.gz"])

    def test_one_network_is_told_to_have_nobody_to_disagree_with(
        self, model: Model, images: Path, tmp_path: Path
    ) -> None:
        written, notes = segment(Model(model.bundles[:1]), images, tmp_path, replace(ASKED, keep_scores=0))
        assert [note for note in notes if "disagree" in note] == notes
        assert len(notes) == 1
        assert [path for path in written if "disagreement" in path] == []
        # And it is not looked for the next time.
        assert segment(Model(model.bundles[:1]), images, tmp_path, replace(ASKED, keep_scores=0))[0] == []


class TestCombine:
    def test_the_same_label_maps_come_of_them(self, made: Path, tmp_path: Path) -> None:
        # The study's grid is the network's, so that nothing is interpolated.
        combine(made, "--out", tmp_path)
        combine(made, made, "--out", tmp_path / "twice")
        for name in CASES:
            for folder in (tmp_path, tmp_path / "twice"):
                assert (folder / f"{name}.nii.gz").read_bytes() == (made / f"{name}.nii.gz").read_bytes()

    def test_models_that_were_asked_apart_are_averaged(self, model: Model, images: Path, tmp_path: Path) -> None:
        for n, bundle in enumerate(model.bundles):
            segment(Model((bundle,)), images, tmp_path / str(n), replace(SETTINGS, keep_scores=3))
        segment(model, images, tmp_path / "both", SETTINGS)
        combine(tmp_path / "0", tmp_path / "1", "--out", tmp_path / "combined")
        for name in CASES:
            maps = [nib.load(tmp_path / f / f"{name}.nii.gz").get_fdata() for f in ("0", "1", "both", "combined")]  # type: ignore[attr-defined]
            assert np.mean(maps[2] != maps[3]) < 0.01
            assert min(np.mean(maps[n] != maps[2]) for n in (0, 1)) > 0.05

    def test_a_lower_threshold_finds_more(self, made: Path, tmp_path: Path) -> None:
        for threshold in ("0.2", "0.7"):
            combine(made, "--out", tmp_path / threshold, "--threshold", f"Anterior={threshold}", "--as", "nifti,nrrd")
        counts = [
            int((nib.load(folder / f"{CASES[0]}.nii.gz").get_fdata() == 1).sum())  # type: ignore[attr-defined]
            for folder in (tmp_path / "0.2", made, tmp_path / "0.7")
        ]
        assert counts[0] > counts[1] > counts[2]
        assert (tmp_path / "0.2" / f"{CASES[0]}.seg.nrrd").is_file()
        assert (tmp_path / "0.2" / "labels.json").is_file()

    @pytest.mark.parametrize(
        ("options", "words", "error"),
        [
            (["--threshold", "0.3"], "expected a label and a probability", ConfigError),
            (["--threshold", "Tail=0.3"], "the model's outputs are Anterior, Posterior", ConfigError),
            (["--as", "overlay"], "without the image there are nifti", ConfigError),
        ],
    )
    def test_refusals(self, made: Path, tmp_path: Path, options: Sequence[str], words: str, error: Any) -> None:
        with pytest.raises(error, match=words):
            combine(made, "--out", tmp_path, *options)

    def test_nothing_is_replaced_unasked(self, made: Path, tmp_path: Path) -> None:
        one = made / "scores" / f"{CASES[0]}.scores.npz"
        combine(one, "--out", tmp_path)
        with pytest.raises(RunError, match="give --force"):
            combine(one, "--out", tmp_path)
        combine(one, "--out", tmp_path, "--force")

    def test_a_folder_of_predictions_is_not_written_to(self, made: Path) -> None:
        before = {path: path.read_bytes() for path in made.iterdir() if path.is_file()}
        with pytest.raises(RunError, match="holds results of `volseg predict`"):
            combine(made, "--out", made, "--force")
        assert {path: path.read_bytes() for path in made.iterdir() if path.is_file()} == before

    def test_nothing_is_written_where_one_target_is_there(self, made: Path, tmp_path: Path) -> None:
        (tmp_path / f"{CASES[1]}.nii.gz").write_text("mine")
        with pytest.raises(RunError, match=f"{CASES[1]}.nii.gz exists already"):
            combine(made, "--out", tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [f"{CASES[1]}.nii.gz"]

    def test_other_labels_are_not_replaced_unasked(self, made: Path, tmp_path: Path) -> None:
        other = schema_from_names({1: "liver"}).model_dump_json()
        (tmp_path / "labels.json").write_text(other)
        with pytest.raises(RunError, match=r"labels\.json is of other labels"):
            combine(made, "--out", tmp_path)
        assert [path.read_text() for path in tmp_path.iterdir()] == [other]
        combine(made, "--out", tmp_path, "--force")
        assert "Anterior" in (tmp_path / "labels.json").read_text()

    def test_studies_of_other_labels_are_not_put_into_one_folder(self, made: Path, tmp_path: Path) -> None:
        folder = tmp_path / "scores"
        shutil.copytree(made / "scores", folder)
        scores = read_scores(folder / f"{CASES[1]}.scores.npz")
        other = schema_from_names({1: "front", 2: "back"})
        write_scores(folder / f"{CASES[1]}.scores.npz", replace(scores, schema=other))
        with pytest.raises(VolumeError, match="other labels"):
            combine(folder, "--out", tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_what_a_kill_left_is_no_study(self, made: Path, tmp_path: Path) -> None:
        shutil.copy(made / "scores" / f"{CASES[0]}.scores.npz", tmp_path / f".writing-x-{CASES[0]}.scores.npz")
        with pytest.raises(VolumeError, match="no file that ends in"):
            combine(tmp_path, "--out", tmp_path / "out")
        shutil.copy(made / "scores" / f"{CASES[1]}.scores.npz", tmp_path)
        combine(tmp_path, "--out", tmp_path / "out")
        assert sorted(path.name for path in (tmp_path / "out").glob("*.nii.gz")) == [f"{CASES[1]}.nii.gz"]

    def test_all_models_are_named(self, made: Path) -> None:
        one = made / "scores" / f"{CASES[0]}.scores.npz"
        scores = read_scores(one)
        found = segment_scores([scores, scores, replace(scores, made_by=("volseg other", "2"))])
        assert found.algorithm == Algorithm("volseg small and volseg other", "0 and 2")

    def test_inputs_are_of_the_same_studies(self, made: Path, tmp_path: Path) -> None:
        one = made / "scores" / f"{CASES[0]}.scores.npz"
        with pytest.raises(VolumeError, match=f"no scores of {CASES[1]}"):
            combine(made, one, "--out", tmp_path)
        with pytest.raises(VolumeError, match="no file that ends in"):
            combine(tmp_path, "--out", tmp_path)


def test_the_worst_are_told_first(made: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    tell_quality(made)
    lines = capsys.readouterr().out.splitlines()
    found = {name: estimate.mean for name, estimate in read_quality(made).items()}
    first = min(found, key=lambda name: found[name] or 0)
    assert lines[0] == "Dice to expect by the model's own probabilities, to look at first:"
    assert lines[1] == f"  {first}: {found[first]:.3f}"
    rows = list(csv.DictReader((made / "quality.csv").read_text().splitlines()))
    assert rows[0]["study"] == first
    assert json.loads((made / "quality" / f"{first}.quality.json").read_text())["mean"] == found[first]
    tell_quality(tmp_path)
    assert capsys.readouterr().out == ""
