"""Scores, summaries and the matching of files, in worlds small enough to work out by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from pipeline.config import EvaluateConfig
from pipeline.errors import ConfigError, GeometryMismatch, ManifestError, VolumeError
from pipeline.evaluate import evaluate_files, score_case
from pipeline.manifest import Case, Channel, Dataset, Manifest
from pipeline.references import references_of_dataset
from pipeline.report_values import CaseScores, LabelScore, Report
from pipeline.summary import summarise
from transforms.labels import LabelSchema, schema_from_names

SCHEMA = schema_from_names({1: "Anterior", 2: "Posterior"})
SETTINGS = EvaluateConfig(bootstrap_samples=400, seed=7)
SPACING_MM = (2.0, 3.0, 4.0)
SHAPE = (4, 3, 2)


def labels(**voxels: int) -> np.ndarray[Any, Any]:
    """A label map in which label n of `_n=k` fills the next k voxels."""
    flat = np.repeat([int(name[1:]) for name in voxels], list(voxels.values()))
    padding = np.zeros(int(np.prod(SHAPE)) - flat.size, dtype=int)
    return np.r_[flat, padding].astype(np.uint8).reshape(SHAPE)


def write_label(path: Path, label_map: np.ndarray[Any, Any], *, shift_mm: float = 0.0) -> Path:
    """To NIfTI by nibabel, to all else by SimpleITK, on the same grid."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.name.endswith((".nii", ".nii.gz")):
        affine = np.diag([*SPACING_MM, 1.0])
        affine[0, 3] = shift_mm
        nib.save(nib.Nifti1Image(label_map, affine), path)
        return path
    image = sitk.GetImageFromArray(label_map.T)
    image.SetSpacing(SPACING_MM)
    image.SetDirection((-1, 0, 0, 0, -1, 0, 0, 0, 1))
    image.SetOrigin((-shift_mm, 0, 0))
    sitk.WriteImage(image, str(path))
    return path


def case(name: str, dice: Sequence[float | None], *, patient: str | None = None, fold: int | None = None) -> CaseScores:
    scores = tuple(
        LabelScore(
            label=label,
            status="absent" if value is None else "scored",
            dice=value,
            prediction_mm3=1.0,
            reference_mm3=1.0,
        )
        for label, value in zip(SCHEMA.names, dice, strict=True)
    )
    return CaseScores(case_id=name, patient_id=patient or name, fold=fold, labels=scores)


def summary(cases: Sequence[CaseScores]) -> Report:
    return summarise(cases, settings=SETTINGS)


class TestScoreCase:
    def test_each_status(self) -> None:
        schema = schema_from_names({1: "a", 2: "b", 3: "c", 9: "d", 200: "e"})
        prediction, reference = labels(_1=6, _2=2), labels(_0=3, _1=3, _2=1, _9=4)
        scores = score_case(prediction, reference, schema, spacing_mm=(0.5, 1.0, 1.0))
        found = [(s.label, s.status, s.dice, s.prediction_mm3, s.reference_mm3) for s in scores]
        assert found == [
            ("a", "scored", 2 * 3 / 9, 3.0, 1.5),
            ("b", "scored", 2 * 1 / 3, 1.0, 0.5),
            ("c", "absent", None, 0.0, 0.0),
            ("d", "missed", 0.0, 0.0, 2.0),
            ("e", "absent", None, 0.0, 0.0),
        ]
        turned = score_case(reference, prediction, schema, spacing_mm=(0.5, 1.0, 1.0))
        assert [s.status for s in turned] == ["scored", "scored", "absent", "false", "absent"]
        assert turned[3].dice == 0.0

    def test_an_unknown_value_is_refused_and_its_side_named(self) -> None:
        with pytest.raises(ValueError, match=r"the prediction holds label values \[3\], the schema knows \[1, 2\]"):
            score_case(labels(_3=1), labels(_1=1), SCHEMA, spacing_mm=(1.0, 1.0, 1.0))
        with pytest.raises(ValueError, match=r"the reference holds label values \[3\]"):
            score_case(labels(_1=1), labels(_3=1), SCHEMA, spacing_mm=(1.0, 1.0, 1.0))

    def test_a_value_beyond_all_ids_takes_no_memory(self) -> None:
        far = labels(_1=1).astype(np.int64) * 2**40
        with pytest.raises(ValueError, match="label value of 1099511627776"):
            score_case(far, labels(_1=1), SCHEMA, spacing_mm=(1.0, 1.0, 1.0))


class TestSummary:
    def test_of_one_label_by_hand(self) -> None:
        values = [0.9, 0.5, None, 0.7, 0.8, 0.6, 1.0]
        report = summary([case(f"c{i}", (value, None)) for i, value in enumerate(values)])
        anterior = report.labels[0]
        assert (anterior.label, anterior.n_scored, anterior.n_absent) == ("Anterior", 6, 1)
        assert anterior.mean == pytest.approx(0.75)
        assert anterior.median == pytest.approx(0.75)
        assert (anterior.first_quartile, anterior.third_quartile) == pytest.approx((0.625, 0.875))
        assert (anterior.minimum, anterior.maximum) == (0.5, 1.0)
        assert anterior.std == pytest.approx(np.sqrt(0.175 / 5))
        assert [(w.case_id, w.dice) for w in anterior.worst] == [
            ("c1", 0.5),
            ("c5", 0.6),
            ("c3", 0.7),
            ("c4", 0.8),
            ("c0", 0.9),
        ]

    def test_a_label_that_no_case_has_is_no_number(self) -> None:
        report = summary([case("a", (0.5, None)), case("b", (0.7, None))])
        posterior = report.labels[1]
        assert (posterior.n_scored, posterior.n_absent, posterior.worst) == (0, 2, ())
        figures = posterior.model_dump(include={"mean", "interval_95", "std", "median", "minimum", "maximum"})
        assert set(figures.values()) == {None}
        assert report.overall.mean == pytest.approx(0.6)

    def test_missed_and_false_count_as_zero(self) -> None:
        scored = case("a", (1.0, 1.0))
        missed = score_case(labels(), labels(_1=4, _2=1), SCHEMA, spacing_mm=(1.0, 1.0, 1.0))
        false = score_case(labels(_1=4), labels(), SCHEMA, spacing_mm=(1.0, 1.0, 1.0))
        cases = [
            CaseScores(case_id=name, patient_id=name, labels=scores)
            for name, scores in (("a", scored.labels), ("b", missed), ("c", false))
        ]
        anterior, posterior = summary(cases).labels
        assert (anterior.n_scored, anterior.n_missed, anterior.n_false, anterior.n_absent) == (3, 1, 1, 0)
        assert anterior.mean == pytest.approx(1 / 3)
        assert (posterior.n_scored, posterior.n_missed, posterior.n_false, posterior.n_absent) == (2, 1, 0, 1)
        assert posterior.mean == pytest.approx(0.5)

    def test_mean_over_labels_weighs_labels_not_scores(self) -> None:
        cases = [case("a", (0.9, 0.1)), case("b", (0.9, None)), case("c", (0.9, None))]
        overall = summary(cases).overall
        assert overall.mean == pytest.approx((0.9 + 0.1) / 2)
        assert [w.case_id for w in overall.worst] == ["a", "b", "c"]
        assert overall.worst[0].dice == pytest.approx(0.5)

    def test_folds(self) -> None:
        cases = [
            case("a", (0.2, 0.4), fold=0),
            case("b", (0.4, None), fold=0),
            case("c", (0.8, None), fold=2),
            case("d", (0.6, None)),
        ]
        report = summary(cases)
        assert [(f.fold, f.mean) for f in report.labels[0].folds] == [(0, pytest.approx(0.3)), (2, 0.8)]
        assert [(f.fold, f.mean) for f in report.labels[1].folds] == [(0, 0.4), (2, None)]
        assert [(f.fold, f.mean) for f in report.overall.folds] == [(0, pytest.approx(0.35)), (2, 0.8)]
        assert summary([case("a", (0.5, 0.5))]).overall.folds == ()

    @pytest.mark.parametrize(
        ("cases", "message"),
        [
            ([], "no case"),
            ([case("a", (1, 1)), case("b", (1, 1)), case("a", (1, 1))], "stand twice: a"),
            (
                [case("a", (1, 1)), case("b", (1, 1)).model_copy(update={"labels": ()})],
                "not scored with the same labels",
            ),
        ],
    )
    def test_what_makes_no_sense_is_refused(self, cases: list[CaseScores], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            summary(cases)


class TestIntervals:
    def test_are_the_percentiles_of_a_loop_over_patients(self) -> None:
        """Labels in every patient, so that every resample holds both; draws as the seed gives them."""
        generator = np.random.default_rng(1)
        cases = [case(f"c{i}", tuple(generator.random(2).tolist()), patient=f"p{i % 5}") for i in range(13)]
        draws = np.random.default_rng(SETTINGS.seed).multinomial(5, [0.2] * 5, size=SETTINGS.bootstrap_samples)
        means = []
        for times in draws:
            drawn = [c for c in cases for _ in range(times[int(c.patient_id[1:])])]
            means.append([np.mean([c.labels[k].dice or 0 for c in drawn]) for k in range(2)])
        report = summary(cases)
        for k in range(2):
            expected = np.percentile([m[k] for m in means], (2.5, 97.5))
            assert report.labels[k].interval_95 == pytest.approx(tuple(expected))
        expected = np.percentile([np.mean(m) for m in means], (2.5, 97.5))
        assert report.overall.interval_95 == pytest.approx(tuple(expected))
        assert report.overall.n_patients == 5

    def test_many_alike_cases_of_a_patient_narrow_nothing(self) -> None:
        values = np.random.default_rng(0).random(8).tolist()
        single = [case(f"c{i}", (v, v)) for i, v in enumerate(values)]
        many = [case(f"c{i}-{k}", (v, v), patient=f"c{i}") for i, v in enumerate(values) for k in range(6)]
        assert summary(many).labels[0].interval_95 == pytest.approx(summary(single).labels[0].interval_95)
        independent = [c.model_copy(update={"patient_id": c.case_id}) for c in many]
        low, high = summary(independent).labels[0].interval_95 or (0, 1)
        patient_low, patient_high = summary(many).labels[0].interval_95 or (0, 1)
        assert high - low < 0.6 * (patient_high - patient_low)

    def test_one_patient_gives_none(self) -> None:
        cases = [case("a", (0.5, 0.9), patient="p"), case("b", (0.7, None), patient="p")]
        report = summary(cases)
        assert report.labels[0].interval_95 is None
        assert report.overall.interval_95 is None
        report = summary([*cases, case("c", (0.6, None))])
        assert report.labels[0].interval_95 is not None
        assert report.labels[1].interval_95 is None

    def test_of_the_mean_over_labels_uses_resamples_with_all_labels(self) -> None:
        """Posterior at 0.1 in one of six patients: without it a resample's mean would jump from 0.5 to 0.9."""
        cases = [case("a", (0.9, 0.1)), *[case(name, (0.9, None)) for name in "bcdef"]]
        overall = summary(cases).overall
        assert overall.mean == pytest.approx(0.5)
        assert overall.interval_95 == pytest.approx((0.5, 0.5))

    def test_order_and_repetition_change_nothing(self) -> None:
        cases = [case(f"c{i}", (i / 10, 1 - i / 20), patient=f"p{i // 2}", fold=i % 2) for i in range(10)]
        assert summary(cases).to_json() == summary(cases[::-1]).to_json() == summary(cases).to_json()

    def test_the_seed_is_used(self) -> None:
        cases = [case(f"c{i}", (i / 10, 0.5)) for i in range(10)]
        other = summarise(cases, settings=EvaluateConfig(bootstrap_samples=400, seed=8))
        assert other.labels[0].interval_95 != summary(cases).labels[0].interval_95


class TestFiles:
    def test_two_files(self, tmp_path: Path) -> None:
        prediction = write_label(tmp_path / "out" / "x.nii.gz", labels(_1=4))
        reference = write_label(tmp_path / "ref" / "y.nii", labels(_1=2))
        report = evaluate_files(prediction, reference, SCHEMA)
        assert [c.case_id for c in report.cases] == ["y"]
        assert report.labels[0].mean == pytest.approx(2 * 2 / 6)
        score = report.cases[0].labels[0]
        assert (score.prediction_mm3, score.reference_mm3) == pytest.approx((4 * 24.0, 2 * 24.0))

    def test_folders_match_by_name_whatever_the_format(self, tmp_path: Path) -> None:
        for name, predicted, suffix, expected, reference_suffix in (
            ("case.01", labels(_1=4), ".nii.gz", labels(_1=4), ".mha"),
            ("case.02", labels(_1=4), ".nrrd", labels(_1=2), ".nii"),
            ("case.0", labels(_1=1), ".mha", labels(_0=1, _1=1), ".nii.gz"),
        ):
            write_label(tmp_path / "out" / (name + suffix), predicted)
            write_label(tmp_path / "ref" / (name + reference_suffix), expected)
        (tmp_path / "out" / "overlay.png").touch()
        (tmp_path / "out" / ".writing-case.03.nii.gz").touch()
        done: list[tuple[int, int]] = []
        report = evaluate_files(
            tmp_path / "out",
            tmp_path / "ref",
            SCHEMA,
            settings=SETTINGS,
            progress=lambda *counts: done.append(counts),
        )
        found = {c.case_id: c.labels[0].dice for c in report.cases}
        assert found == {"case.0": 0.0, "case.01": 1.0, "case.02": pytest.approx(2 * 2 / 6)}
        assert (report.extra_predictions, report.missing_predictions, report.failures) == ((), (), ())
        assert done == [(1, 3), (2, 3), (3, 3)]
        assert report.settings == SETTINGS

    def test_a_named_file_needs_no_suffix(self, tmp_path: Path) -> None:
        plain = write_label(tmp_path / "a.nii", labels(_1=2)).rename(tmp_path / "plain")
        assert evaluate_files(plain, plain, SCHEMA).labels[0].mean == 1.0
        (tmp_path / "text").write_text("no volume", encoding="utf-8")
        with pytest.raises(VolumeError, match="text: neither NIfTI"):
            evaluate_files(tmp_path / "text", plain, SCHEMA)

    def test_one_prediction_is_looked_up_in_a_folder(self, tmp_path: Path) -> None:
        for name in "ab":
            write_label(tmp_path / "ref" / f"{name}.nii.gz", labels(_1=2))
        prediction = write_label(tmp_path / "b.nrrd", labels(_1=2))
        report = evaluate_files(prediction, tmp_path / "ref", SCHEMA)
        assert [c.case_id for c in report.cases] == ["b"]
        with pytest.raises(VolumeError, match="no prediction has the name of a reference: predictions z"):
            evaluate_files(prediction.rename(tmp_path / "z.nrrd"), tmp_path / "ref", SCHEMA)

    def test_missing_predictions_are_refused_by_name(self, tmp_path: Path) -> None:
        for name in "abc":
            write_label(tmp_path / "ref" / f"{name}.nii.gz", labels(_1=2))
        for name in ("a", "b_0000"):
            write_label(tmp_path / "out" / f"{name}.nii.gz", labels(_1=2))
        with pytest.raises(VolumeError, match=r"2 of 3 references have no prediction: b, c; .*: b_0000;"):
            evaluate_files(tmp_path / "out", tmp_path / "ref", SCHEMA)
        report = evaluate_files(tmp_path / "out", tmp_path / "ref", SCHEMA, allow_missing=True)
        assert (report.missing_predictions, report.extra_predictions) == (("b", "c"), ("b_0000",))
        assert report.overall.n_cases == 1

    def test_a_prediction_of_a_name_that_was_made_safe_finds_its_reference(self, tmp_path: Path) -> None:
        prediction = write_label(tmp_path / "out" / "case_1.nii.gz", labels(_1=2)).parent
        reference = write_label(tmp_path / "ref" / "case 1.nii.gz", labels(_1=2)).parent
        assert [c.case_id for c in evaluate_files(prediction, reference, SCHEMA).cases] == ["case_1"]

    def test_long_lists_are_cut(self, tmp_path: Path) -> None:
        for i in range(14):
            write_label(tmp_path / "ref" / f"c{i:02}.nii", labels(_1=1))
        write_label(tmp_path / "out" / "c00.nii", labels(_1=1))
        with pytest.raises(VolumeError, match=r"13 of 14 .*: c01, .*, c10 and 3 more;"):
            evaluate_files(tmp_path / "out", tmp_path / "ref", SCHEMA)

    def test_two_files_of_one_case_are_ambiguous(self, tmp_path: Path) -> None:
        write_label(tmp_path / "ref" / "a.nii", labels(_1=1))
        for suffix in (".nii.gz", ".nrrd"):
            write_label(tmp_path / "out" / f"a{suffix}", labels(_1=1))
        with pytest.raises(VolumeError, match=r"both a\.nii\.gz and a\.nrrd are case 'a'"):
            evaluate_files(tmp_path / "out", tmp_path / "ref", SCHEMA)

    def test_paths_that_hold_nothing(self, tmp_path: Path) -> None:
        label = write_label(tmp_path / "a.nii", labels(_1=1))
        (tmp_path / "empty").mkdir()
        with pytest.raises(VolumeError, match="gone: no such file or folder"):
            evaluate_files(tmp_path / "gone", label, SCHEMA)
        with pytest.raises(VolumeError, match="empty: no label map here"):
            evaluate_files(label, tmp_path / "empty", SCHEMA)
        with pytest.raises(ManifestError, match=r"gone\.json"):
            evaluate_files(label, tmp_path / "gone.json", SCHEMA)


class TestBadCases:
    @pytest.fixture
    def folders(self, tmp_path: Path) -> tuple[Path, Path]:
        for name in "abcd":
            write_label(tmp_path / "ref" / f"{name}.nii.gz", labels(_1=4))
        predictions = tmp_path / "out"
        write_label(predictions / "a.nii.gz", labels(_1=4))
        write_label(predictions / "b.nii.gz", labels(_1=4), shift_mm=1.0)
        write_label(predictions / "c.nii.gz", labels(_1=4, _7=1))
        whole = write_label(predictions / "d.nii.gz", labels(_1=4)).read_bytes()
        (predictions / "d.nii.gz").write_bytes(whole[: len(whole) // 2])
        return predictions, tmp_path / "ref"

    def test_are_set_aside_and_named(self, folders: tuple[Path, Path]) -> None:
        report = evaluate_files(*folders, SCHEMA)
        assert [c.case_id for c in report.cases] == ["a"]
        assert [f.case_id for f in report.failures] == ["b", "c", "d"]
        grid, values, truncated = (failure.reason for failure in report.failures)
        assert "lie on different grids: 4x3x2 voxels of 2x3x4 mm" in grid
        assert "the prediction holds label values [7], the schema knows [1, 2]" in values
        assert str(folders[0] / "d.nii.gz") in truncated
        assert not any("\n" in failure.reason for failure in report.failures)
        assert Report.from_json(json.loads(json.dumps(report.to_json()))) == report

    def test_alone_are_errors(self, folders: tuple[Path, Path]) -> None:
        predictions, references = folders
        with pytest.raises(GeometryMismatch, match=r"b\.nii\.gz and its reference .* different grids"):
            evaluate_files(predictions / "b.nii.gz", references / "b.nii.gz", SCHEMA)
        with pytest.raises(VolumeError, match=r"c\.nii\.gz against .*: the prediction holds"):
            evaluate_files(predictions / "c.nii.gz", references, SCHEMA)

    def test_altogether_are_an_error(self, folders: tuple[Path, Path]) -> None:
        (folders[0] / "a.nii.gz").unlink()
        with pytest.raises(VolumeError, match=r"none of the 3 cases can be scored; the first: .*grids"):
            evaluate_files(*folders, SCHEMA, allow_missing=True)


class TestSchema:
    def save(self, folder: Path, schema: LabelSchema) -> None:
        (folder / "labels.json").write_text(schema.model_dump_json(), encoding="utf-8")

    @pytest.fixture
    def folders(self, tmp_path: Path) -> tuple[Path, Path]:
        write_label(tmp_path / "out" / "a.nii", labels(_1=4))
        write_label(tmp_path / "out" / "b.nii", labels(_4=2))
        write_label(tmp_path / "ref" / "a.nii", labels(_1=4))
        write_label(tmp_path / "ref" / "b.nii", labels(_4=1))
        return tmp_path / "out", tmp_path / "ref"

    def test_is_made_from_the_ids_of_all_cases(self, folders: tuple[Path, Path]) -> None:
        report = evaluate_files(*folders)
        assert [summary.label for summary in report.labels] == ["label 1", "label 4"]
        assert [[s.status for s in c.labels] for c in report.cases] == [
            ["scored", "absent"],
            ["absent", "scored"],
        ]

    def test_lies_beside_the_predictions(self, folders: tuple[Path, Path]) -> None:
        self.save(folders[0], schema_from_names({1: "one", 4: "four", 5: "five"}))
        expected = ["one", "four", "five"]
        assert [x.label for x in evaluate_files(*folders).labels] == expected
        alone = evaluate_files(folders[0] / "a.nii", folders[1] / "a.nii")
        assert [x.label for x in alone.labels] == expected

    def test_that_is_given_wins(self, folders: tuple[Path, Path]) -> None:
        self.save(folders[0], schema_from_names({1: "one", 4: "four"}))
        given = schema_from_names({1: "eins", 4: "vier"})
        assert [x.label for x in evaluate_files(*folders, given).labels] == ["eins", "vier"]

    @pytest.mark.parametrize("text", ["{", '{"labels": []}', '{"label": 1}'])
    def test_that_is_damaged_is_refused(self, folders: tuple[Path, Path], text: str) -> None:
        (folders[0] / "labels.json").write_text(text, encoding="utf-8")
        with pytest.raises(VolumeError, match=r"labels\.json: not a label schema: \w"):
            evaluate_files(*folders)

    def test_nothing_labelled_at_all(self, tmp_path: Path) -> None:
        empty = write_label(tmp_path / "a.nii", labels())
        with pytest.raises(VolumeError, match="nothing to score"):
            evaluate_files(empty, empty)


class TestDataset:
    @pytest.fixture
    def dataset(self, tmp_path: Path) -> Dataset:
        cases = []
        for name, patient, fold in (("a", "p1", 0), ("b", "p1", 0), ("c", "p2", 1), ("unlabelled", "p3", 1)):
            write_label(tmp_path / "data" / f"{name}_image.nii", labels())
            label = None if name == "unlabelled" else f"truth_of_{name}.nii"
            if label:
                write_label(tmp_path / "data" / label, labels(_1=4))
            cases.append(
                Case(case_id=name, patient_id=patient, images={"T1": f"{name}_image.nii"}, label=label, fold=fold)
            )
            write_label(tmp_path / "out" / f"{name}.nii.gz", labels(_1=4))
        manifest = Manifest(
            name="world", channels=(Channel(name="T1", modality="MR"),), labels=SCHEMA, cases=tuple(cases)
        )
        return Dataset(manifest=manifest, root=tmp_path / "data")

    def test_gives_labels_patients_and_folds(self, dataset: Dataset) -> None:
        references = references_of_dataset(dataset)
        assert [(r.case_id, r.path.name, r.patient_id, r.fold) for r in references] == [
            ("a", "truth_of_a.nii", "p1", 0),
            ("b", "truth_of_b.nii", "p1", 0),
            ("c", "truth_of_c.nii", "p2", 1),
        ]

    def test_as_a_value_and_as_a_manifest(self, dataset: Dataset, tmp_path: Path) -> None:
        file = tmp_path / "data" / "world.json"
        file.write_text(dataset.manifest.model_dump_json(exclude_none=True), encoding="utf-8")
        report = evaluate_files(tmp_path / "out", dataset, settings=SETTINGS)
        assert evaluate_files(tmp_path / "out", file, settings=SETTINGS) == report
        assert (report.overall.n_cases, report.overall.n_patients) == (3, 2)
        assert [(c.case_id, c.fold) for c in report.cases] == [("a", 0), ("b", 0), ("c", 1)]
        assert report.extra_predictions == ("unlabelled",)

    def test_in_a_folder_with_a_dataset_json(self, tmp_path: Path) -> None:
        write_label(tmp_path / "raw" / "imagesTr" / "a.nii.gz", labels())
        write_label(tmp_path / "raw" / "labelsTr" / "a.nii.gz", labels(_1=4))
        document = {
            "name": "decathlon",
            "modality": {"0": "MRI"},
            "labels": {"0": "background", "1": "Anterior", "2": "Posterior"},
            "training": [{"image": "./imagesTr/a.nii.gz", "label": "./labelsTr/a.nii.gz"}],
            "test": [],
        }
        (tmp_path / "raw" / "dataset.json").write_text(json.dumps(document), encoding="utf-8")
        prediction = write_label(tmp_path / "out" / "a.nii.gz", labels(_1=4)).parent
        report = evaluate_files(prediction, tmp_path / "raw")
        assert [(x.label, x.n_scored) for x in report.labels] == [("Anterior", 1), ("Posterior", 0)]

    def test_a_dataset_json_beside_label_maps_says_nothing(self, tmp_path: Path) -> None:
        """nnU-Net writes one into the folder of its predictions, which may be the reference for others."""
        prediction = write_label(tmp_path / "out" / "a.nii.gz", labels(_1=4)).parent
        reference = write_label(tmp_path / "ref" / "a.nii.gz", labels(_1=4)).parent
        (reference / "dataset.json").write_text("{}", encoding="utf-8")
        assert [x.label for x in evaluate_files(prediction, reference).labels] == ["label 1"]

    def test_a_contradicting_schema_beside_the_predictions_is_refused(self, dataset: Dataset, tmp_path: Path) -> None:
        swapped = schema_from_names({1: "Posterior", 2: "Anterior"})
        (tmp_path / "out" / "labels.json").write_text(swapped.model_dump_json(), encoding="utf-8")
        message = r"predictions' labels are 1 Posterior, 2 Anterior, .* 'world' are 1 Anterior, 2 Posterior"
        with pytest.raises(VolumeError, match=message):
            evaluate_files(tmp_path / "out", dataset)


class TestSettings:
    def test_tolerances_are_of_single_labels(self, tmp_path: Path) -> None:
        """Each label is moved by one voxel of 2 mm along the first axis: within 2 mm, and not within 1 mm."""
        reference, prediction = np.zeros((2, 8, 6, 6), dtype=np.uint8)
        for label_map, start in ((reference, 2), (prediction, 3)):
            label_map[start : start + 3, 1:3] = 1
            label_map[start : start + 3, 3:5] = 2
        pair = [write_label(tmp_path / f"{n}.nii", m) for n, m in (("p", prediction), ("r", reference))]
        settings = EvaluateConfig(tolerances_mm={"Posterior": 1.0})
        anterior, posterior = evaluate_files(*pair, SCHEMA, settings=settings).cases[0].labels
        assert (anterior.tolerance_mm, anterior.surface_dice) == (2.0, 1.0)
        assert posterior.tolerance_mm == 1.0
        assert 0 < (posterior.surface_dice or 0) < 1
        assert (anterior.hausdorff_mm, anterior.volume_difference_mm3) == (2.0, 0.0)

    @pytest.mark.parametrize("settings", [{"tolerances_mm": {"Anterio": 1.0}}, {"lesions": ("Anterio",)}])
    def test_a_name_that_is_no_label_is_refused(self, tmp_path: Path, settings: dict[str, Any]) -> None:
        label_map = write_label(tmp_path / "a.nii", labels(_1=4))
        option = "--lesions / evaluate.lesions" if "lesions" in settings else "--tolerance / evaluate.tolerances_mm"
        message = f"^{option}: Anterio is no label; the labels are Anterior, Posterior"
        with pytest.raises(ConfigError, match=message):
            evaluate_files(label_map, label_map, SCHEMA, settings=EvaluateConfig(**settings))
        with pytest.raises(ConfigError, match="the labels are label 1"):
            evaluate_files(label_map, label_map, settings=EvaluateConfig(**settings))
