"""One prediction against one reference, voxel by voxel, where not everything counts: counted by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from pipeline.config import EvaluateConfig
from pipeline.evaluate import evaluate_files
from pipeline.manifest import Dataset, parse_manifest
from pipeline.report import dice_distribution
from pipeline.report_tables import tables
from pipeline.report_values import Report
from pipeline.scores import CaseMeasures, dice_of_classes, label_scores, measure_ids, region_scores
from transforms.labels import LabelSchema, Region, schema_from_names

LABELS = schema_from_names({1: "core", 2: "rim", 4: "spot"}).labels
REGIONS = (
    Region(name="whole", labels=("core", "rim", "spot"), paints="rim"),
    Region(name="inner", labels=("core", "spot"), paints="core"),
)
NESTED = LabelSchema(labels=LABELS, regions=REGIONS, ignore=9)

REFERENCE = np.array([0, 0, 1, 1, 2, 2, 4, 4, 9, 9])
PREDICTION = np.array([0, 1, 1, 2, 2, 2, 1, 4, 4, 1])


def measured(prediction: np.ndarray[Any, Any], reference: np.ndarray[Any, Any]) -> CaseMeasures:
    """Of voxels of 0.5 mm3 in a row."""
    pair = [row.reshape(10, 1, 1) for row in (prediction, reference)]
    return measure_ids(*pair, NESTED, spacing_mm=(0.5, 1.0, 1.0), settings=EvaluateConfig())


def scores(annotated: tuple[str, ...] | None = None) -> dict[str, Any]:
    found = measured(PREDICTION, REFERENCE)
    known = NESTED.are_annotated(annotated)
    rows = (
        *label_scores(found, NESTED, annotated=known),
        *region_scores(found, NESTED, annotated=known),
    )
    return {row.label: (row.status, row.dice, row.prediction_mm3, row.reference_mm3) for row in rows}


def test_by_hand() -> None:
    """The last two voxels count nowhere. Inside the union it does not matter which of its labels was meant."""
    assert scores() == {
        "core": ("scored", 2 * 1 / (3 + 2), 1.5, 1.0),
        "rim": ("scored", 2 * 2 / (3 + 2), 1.5, 1.0),
        "spot": ("scored", 2 * 1 / (1 + 2), 0.5, 1.0),
        "whole": ("scored", 2 * 6 / (7 + 6), 3.5, 3.0),
        "inner": ("scored", 2 * 3 / (4 + 4), 2.0, 2.0),
    }


def test_what_was_not_annotated_has_no_score_and_no_volume() -> None:
    """Nor has a union that it belongs to."""
    found = scores(("rim", "core"))
    assert found["spot"] == ("unannotated", None, 0.5, None)
    assert found["whole"] == ("unannotated", None, 3.5, None)
    assert found["inner"] == ("unannotated", None, 2.0, None)
    assert found["core"] == scores()["core"]


def test_class_maps_score_the_same() -> None:
    to_class = {0: 0, 1: 1, 2: 2, 4: 3, 9: 4}
    prediction, reference = (np.array([to_class[int(v)] for v in x]) for x in (PREDICTION, REFERENCE))
    found = dice_of_classes(prediction, reference, NESTED, annotated=NESTED.are_annotated(("core", "spot")))
    expected = scores(("core", "spot"))
    assert list(found) == ["core", "rim", "spot", "whole", "inner"]
    for name, dice in found.items():
        assert math.isnan(dice) if expected[name][1] is None else dice == pytest.approx(expected[name][1])


def test_a_reference_that_is_ignored_altogether_counts_nothing() -> None:
    found = measured(PREDICTION, np.full(10, 9))
    assert {s.status for s in label_scores(found, NESTED, annotated=NESTED.are_annotated(None))} == {"absent"}


def test_a_prediction_may_not_ignore() -> None:
    with pytest.raises(ValueError, match=r"the prediction holds label values \[9\], the schema knows \[1, 2, 4\]"):
        measured(REFERENCE[::-1], np.zeros(10, int))


def write(path: Path, values: np.ndarray[Any, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    nib.save(nib.Nifti1Image(values.astype(np.uint8).reshape(10, 1, 1), np.eye(4)), path)


def world(folder: Path) -> Dataset:
    """Case a is whole; in b the spot was not annotated, and core and rim have each other's value."""
    exchanged = np.array([0, 0, 2, 2, 1, 1, 0, 0, 9, 9])
    for name, reference in (("a", REFERENCE), ("b", exchanged)):
        write(folder / "references" / f"{name}.nii.gz", reference)
        write(folder / "predictions" / f"{name}.nii.gz", PREDICTION)
    cases = [
        {"case_id": n, "patient_id": n, "images": {"CT": f"{n}.nii"}, "label": f"references/{n}.nii.gz"} for n in "ab"
    ]
    cases[1] |= {"annotated": ["core", "rim"], "label_values": {"core": 2, "rim": 1}}
    document = {"name": "w", "channels": [{"name": "CT", "modality": "CT"}], "labels": NESTED.model_dump()}
    return Dataset(manifest=parse_manifest({**document, "cases": cases}, source="here"), root=folder)


class TestReport:
    @pytest.fixture
    def report(self, tmp_path: Path) -> Report:
        return evaluate_files(tmp_path / "predictions", world(tmp_path))

    def test_counts_only_what_was_annotated(self, report: Report) -> None:
        core, rim, spot = report.labels
        whole, inner = report.regions
        assert (core.n_scored, core.n_unannotated) == (2, 0)
        assert core.mean == pytest.approx((2 / 5 + 2 / 5) / 2)
        assert rim.mean == pytest.approx(4 / 5)
        assert (spot.n_scored, spot.n_absent, spot.n_unannotated) == (1, 0, 1)
        assert spot.mean == pytest.approx(2 / 3)
        assert (whole.n_scored, whole.n_unannotated) == (1, 1)
        assert report.overall.mean == pytest.approx((12 / 13 + 6 / 8) / 2)
        assert inner.mean == pytest.approx(6 / 8)

    def test_json_has_null_where_nothing_is_known(self, report: Report) -> None:
        value = json.loads(json.dumps(report.to_json()))
        assert Report.from_json(value) == report
        spot = value["cases"][1]["labels"][2]
        assert (spot["status"], spot["dice"], spot["reference_mm3"]) == ("unannotated", None, None)

    def test_a_report_of_before_is_read(self, report: Report) -> None:
        value = report.to_json()
        del value["regions"]
        for row in value["labels"]:
            del row["n_unannotated"]
        for case in value["cases"]:
            del case["regions"]
        assert Report.from_json(value).regions == ()

    def test_rows_and_csv_have_the_regions_after_the_labels(self, report: Report) -> None:
        dice, *_, counts = tables(report)
        assert [row["label"] for row in dice.rows] == ["core", "rim", "spot", "whole", "inner", "mean of regions"]
        assert [row["unannotated"] for row in counts.rows] == [0, 0, 1, 1, 1]
        lines = report.to_csv().splitlines()
        assert [line.split(",")[3] for line in lines[1:6]] == ["core", "rim", "spot", "whole", "inner"]
        assert lines[8] == "b,b,,spot,unannotated,,1.0," + 14 * ","

    def test_tables_of_whole_cases_have_no_such_column(self, tmp_path: Path) -> None:
        dataset = world(tmp_path)
        alone = dataset.manifest.model_copy(update={"cases": dataset.manifest.cases[:1]})
        report = evaluate_files(tmp_path / "predictions", dataset.model_copy(update={"manifest": alone}))
        assert all("unannotated" not in row for table in tables(report) for row in table.rows)

    def test_it_can_be_drawn(self, report: Report, tmp_path: Path) -> None:
        dice_distribution(report, tmp_path / "dice.svg")
        drawn = (tmp_path / "dice.svg").read_text()
        assert "mean of regions" in drawn
        assert "inner" in drawn
