"""A choice on disk: predictions with islands placed by hand, what is chosen for them, and where it goes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from pipeline.bundle import load_bundle
from pipeline.combining import segment_scores
from pipeline.confidence_files import scores_file
from pipeline.config import EvaluateConfig, parse_config
from pipeline.console import Silence
from pipeline.device import Hardware
from pipeline.errors import BundleError, RunError
from pipeline.evaluate import evaluate_files
from pipeline.export.nifti import write_nifti
from pipeline.folds import Folds
from pipeline.interop.exporting import export_model
from pipeline.kept_scores import Grids, Keeper, KeptScores, write_scores
from pipeline.manifest import Case, Channel, Dataset, Manifest
from pipeline.plan import Plan
from pipeline.postprocess_run import (
    find_postprocessing,
    settle_postprocessing,
    store_postprocessing,
    want_postprocessing,
    with_postprocessing,
)
from pipeline.postprocessing import Action, Found, PostProcessing
from pipeline.postprocessing_tables import honesty, postprocessing_tables
from pipeline.predict import Model, PredictSettings, explain, predict
from pipeline.report_page import RunFacts
from pipeline.report_page import page as page_of
from pipeline.report_values import Report
from pipeline.runs import Run
from pipeline.segment import SegmentSettings, segment_studies
from pipeline.segmentation import Algorithm, Segmentation
from pipeline.studies import Study
from pipeline.threshold_effects import KEPT
from transforms.geometry import Geometry
from transforms.labels import schema_from_names
from transforms.volume import read_label, read_volume

Array = npt.NDArray[Any]

SCHEMA = schema_from_names({1: "liver", 2: "tumour", 3: "spleen"})
GRID = Geometry((18, 16, 14), np.diag([1.0, 1.0, 2.0, 1.0]))
CASES = 24
SETTINGS = EvaluateConfig(bootstrap_samples=100)

ISLANDS_OF_TUMOUR = Action(kind="islands", name="tumour", labels=("tumour",), below_mm3=10)
KEEP_TUMOUR = Action(kind="largest", name="tumour", labels=("tumour",))


def truth() -> Array:
    """A liver with a tumour in it."""
    world = np.zeros(GRID.shape, np.uint8)
    world[2:12, 2:12, 2:10] = 1
    world[4:8, 4:8, 4:8] = 2
    return world


def with_island(number: int) -> Array:
    """The truth with a false tumour of one or two voxels of 2 mm3 and some missing, so that no two gain the same."""
    world = truth()
    world[15, 14, 1 : 2 + number % 2] = 2
    world[4, 4, 4 : 4 + number % 4] = 1
    world[4, 5, 4 : 4 + number // 4 % 4] = 1
    return world


Doubted = Callable[[int], Array]
"""Where the network of a world thinks of a tumour, but more of what it says."""


def scores_of(prediction: Array, doubted: Array) -> KeptScores:
    """Sure of a label map by 0.94, where there is no doubt."""
    classes = torch.from_numpy(prediction.astype(np.int64))
    sure = torch.full((4, *GRID.shape), 0.02).scatter_(0, classes[None], 0.94)
    doubt = torch.zeros(4, *GRID.shape).scatter_(0, classes[None], 0.65)
    doubt[2] += 0.35
    keeper = Keeper(GRID.shape, SCHEMA, KEPT)
    for plane, values in enumerate(torch.where(torch.from_numpy(doubted), doubt, sure).unbind(1)):
        keeper.add(0, plane, values)
    return keeper.kept(Grids(GRID, GRID, GRID, GRID), ("by hand", ""), ())


def world_of(
    folder: Path,
    plan: Plan,
    prediction: Callable[[int], Array],
    reference: Callable[[int], Array],
    doubted: Doubted = lambda _: np.zeros(GRID.shape, np.bool_),
) -> Run:
    """Two finished folds of cases of as many patients."""
    algorithm, cases = Algorithm("by hand", ""), []
    for number in range(CASES):
        name, fold = f"case_{number:02}", number % 2
        places = (folder / "labels" / f"{name}.nii.gz", folder / f"fold_{fold}" / "validation" / f"{name}.nii.gz")
        for place, drawn in zip(places, (reference(number), prediction(number)), strict=True):
            place.parent.mkdir(parents=True, exist_ok=True)
            write_nifti(place, Segmentation(drawn, GRID, SCHEMA, algorithm))
        scores = scores_file(places[1].parent, name)
        scores.parent.mkdir(exist_ok=True)
        write_scores(scores, scores_of(prediction(number), doubted(number)))
        images = {"CT": f"images/{name}.nii.gz"}
        cases.append(
            Case(case_id=name, patient_id=f"p{number}", images=images, label=f"labels/{name}.nii.gz", fold=fold)
        )
    manifest = Manifest(name="world", channels=(Channel(name="CT", modality="CT"),), labels=SCHEMA, cases=tuple(cases))
    document = {"name": "world", "data": {"manifest": "x.json"}, "evaluate": {"bootstrap_samples": 100}}
    folds = Folds(count=2, seed=0, fixed=False, fold_of={}, cases=())
    config = parse_config(document, source="test")
    return Run(folder, config, Dataset(manifest=manifest, root=folder), folds, plan, Hardware("cpu", "32-true"))


def report_of(run: Run, folds: tuple[int, ...] = (0, 1)) -> Report:
    """As a cross-validation makes it."""
    from pipeline.summary import summarise

    cases = [
        case
        for fold in folds
        for case in evaluate_files(
            run.fold_folder(fold) / "validation", run.dataset, settings=SETTINGS, allow_missing=True
        ).cases
    ]
    return summarise(cases, settings=SETTINGS)


def found_in(folder: Path, plan: Plan, prediction: Callable[[int], Array], reference: Callable[[int], Array]) -> Found:
    run = world_of(folder, plan, prediction, reference)
    return find_postprocessing(run, report_of(run), Silence())


@pytest.fixture(scope="module")
def helped(tmp_path_factory: pytest.TempPathFactory, small_plan: Plan) -> tuple[Run, Report, Found]:
    """Every patient has a false island."""
    run = world_of(tmp_path_factory.mktemp("helped"), small_plan, with_island, lambda _: truth())
    report = report_of(run)
    return run, report, find_postprocessing(run, report, Silence())


class TestChoice:
    def test_islands_of_everyone_are_taken_away_by_the_mildest_that_does(
        self, helped: tuple[Run, Report, Found]
    ) -> None:
        _, _, found = helped
        assert found.chosen == PostProcessing(actions=(ISLANDS_OF_TUMOUR,))
        assert found.note == "chosen: tumour: remove islands under 10 mm3"
        assert [choice.actions for choice in found.folds] == [(ISLANDS_OF_TUMOUR,)] * 2
        assert (found.cases, found.patients) == (CASES, CASES)

    def test_before_and_after_are_those_of_the_files(self, helped: tuple[Run, Report, Found]) -> None:
        run, _, found = helped
        before, after = [], []
        for number in range(CASES):
            world = read_label(run.fold_folder(number % 2) / "validation" / f"case_{number:02}.nii.gz").voxels.copy()
            before.append(dice_of(world))
            world[15, 14] = 0
            after.append(dice_of(world))
        effects = {(effect.label, effect.figure): effect for effect in found.effects}
        tumour = effects["tumour", "dice"]
        assert tumour.before == pytest.approx(np.mean(before))
        assert tumour.nested == tumour.chosen == pytest.approx(np.mean(after))
        assert effects["liver", "dice"].before == effects["liver", "dice"].chosen
        assert effects["spleen", "dice"].before == 1.0
        assert ("spleen", "hausdorff_95_mm") not in effects

    def test_a_tumour_that_one_patient_would_lose_stops_it(self, tmp_path: Path, small_plan: Plan) -> None:
        """Patient 5 has a second tumour, a little larger than the islands of the others, and it was found."""

        def second(number: int) -> Array:
            world = truth()
            if number == 5:
                world[15, 12:14, 1:3] = 2
            return world

        def predicted(number: int) -> Array:
            world = with_island(number)
            if number == 5:
                world[15, 14] = 0
                world[15, 12:14, 1:3] = 2
            return world

        found = found_in(tmp_path, small_plan, predicted, second)
        why = {row.action.words: row.why for row in found.tried}
        assert why["tumour: keep the largest component"] == "deletes 1 part that had been found"
        assert why["tumour: remove islands under 10 mm3"] == "deletes 1 part that had been found"
        assert found.chosen is None
        assert found.note.startswith("nothing chosen: of 47 actions")

    def test_a_larger_second_tumour_leaves_the_milder_action(self, tmp_path: Path, small_plan: Plan) -> None:
        def second(number: int) -> Array:
            world = truth()
            if number == 5:
                world[13:17, 12:15, 1:3] = 2
            return world

        def predicted(number: int) -> Array:
            return np.maximum(with_island(number), second(number))

        found = found_in(tmp_path, small_plan, predicted, second)
        assert found.chosen == PostProcessing(actions=(ISLANDS_OF_TUMOUR,))
        why = {row.action.words: row.why for row in found.tried}
        assert why["tumour: keep the largest component"] == "deletes 1 part that had been found"

    def test_what_one_fold_knows_does_not_help_the_other_in_the_nested_figures(
        self, tmp_path: Path, small_plan: Plan
    ) -> None:
        """Only the cases of fold 0 have islands: fold 1 chooses nothing for them."""
        found = found_in(tmp_path, small_plan, lambda n: with_island(n) if n % 2 == 0 else truth(), lambda _: truth())
        assert found.chosen is not None
        assert {choice.fold: bool(choice.actions) for choice in found.folds} == {0: False, 1: True}
        tumour = next(e for e in found.effects if (e.label, e.figure) == ("tumour", "dice"))
        assert tumour.nested == tumour.before
        assert tumour.chosen is not None
        assert tumour.before is not None
        assert tumour.chosen > tumour.before

    def test_an_island_whose_place_harms_its_neighbour_is_left(self, tmp_path: Path, small_plan: Plan) -> None:
        """A false tumour inside a small liver, where the spleen is: the liver would take the place and lose."""

        def expected(_: int) -> Array:
            world = np.zeros(GRID.shape, np.uint8)
            world[2:6, 2:6, 2:6] = 1
            world[3, 3, 3:5] = 3
            world[10:14, 10:14, 8:12] = 2
            return world

        def predicted(number: int) -> Array:
            world = expected(number)
            world[3, 3, 3:5] = 2
            world[10, 10, 8 : 8 + number % 4] = 0
            world[10, 11, 8 : 8 + number // 4 % 4] = 0
            return world

        found = found_in(tmp_path, small_plan, predicted, expected)
        assert found.chosen is None
        assert found.note.startswith("nothing chosen: of 47 actions ")
        assert not any(row.is_chosen for row in found.tried)
        assert any(row.why.startswith("done, it costs a label of a case 0.0") for row in found.tried)
        # Nor does it look better in the figures that are to be honest: the folds choose as all do.
        assert [choice.actions for choice in found.folds] == [(), ()]
        assert found.effects == ()

    def test_too_few_patients_or_folds(self, helped: tuple[Run, Report, Found]) -> None:
        run, report, _ = helped
        one = find_postprocessing(run, report_of(run, (0,)), Silence())
        assert one == Found(
            cases=12,
            patients=12,
            note="nothing chosen: 12 patients in 1 finished fold; at least 10 patients in two folds are needed",
        )
        few = report.model_copy(update={"cases": report.cases[:9]})
        assert find_postprocessing(run, few, Silence()).note.startswith(
            "nothing chosen: 9 patients in 2 finished folds"
        )


class TestThresholds:
    """A tumour of which the network is not sure enough at some voxels, more or fewer of them in each patient."""

    @staticmethod
    def doubted(number: int) -> Array:
        doubts = np.zeros(GRID.shape, np.bool_)
        doubts[4, 4, 4 : 5 + number % 4] = True
        doubts[4, 5, 4 : 4 + number // 4 % 4] = True
        return doubts

    def predicted(self, number: int) -> Array:
        return np.where(self.doubted(number), np.uint8(1), truth())

    @pytest.fixture
    def run(self, tmp_path: Path, small_plan: Plan) -> Run:
        return world_of(tmp_path, small_plan, self.predicted, lambda _: truth(), self.doubted)

    def test_the_nearest_to_a_half_that_helps(self, run: Run) -> None:
        """A higher threshold of the liver does the same to the same voxels, so it is not taken beside it."""
        found = find_postprocessing(run, report_of(run), Silence())
        lower = Action(kind="threshold", name="tumour", labels=("tumour",), threshold=0.3)
        assert found.chosen == PostProcessing(actions=(lower,))
        assert found.note == "chosen: tumour: taken from a probability of 0.3 on"
        assert [choice.actions for choice in found.folds] == [(lower,)] * 2
        tumour = next(e for e in found.effects if (e.label, e.figure) == ("tumour", "dice"))
        assert tumour.before == pytest.approx(np.mean([dice_of(self.predicted(n)) for n in range(CASES)]))
        assert (tumour.nested, tumour.chosen) == (1.0, 1.0)

    def test_a_threshold_that_harms_the_liver_as_much_is_left(self, run: Run, small_plan: Plan) -> None:
        """Half of what is doubted is liver."""

        def expected(number: int) -> Array:
            world = truth()
            world[4, 4, 4:8] = 1 if number % 2 else 2
            world[4, 5, 4:8] = 1 if number % 2 else 2
            return world

        other = world_of(run.folder / "other", small_plan, self.predicted, expected, self.doubted)
        found = find_postprocessing(other, report_of(other), Silence())
        assert found.chosen is None
        assert any(row.action.kind == "threshold" and row.worst_change < 0 for row in found.tried)

    def test_a_run_without_scores_says_so(self, run: Run) -> None:
        scores_file(run.fold_folder(1) / "validation", "case_01").unlink()
        found = find_postprocessing(run, report_of(run), Silence())
        assert found.chosen is None
        assert found.note.endswith("; thresholds were not tried: of these predictions no scores were kept")
        assert not any(row.action.kind == "threshold" for row in found.tried)


def dice_of(world: Array) -> float:
    found, expected = world == 2, truth() == 2
    return float(2 * (found & expected).sum() / (found.sum() + expected.sum()))


class TestReport:
    def test_it_comes_back_from_json(self, helped: tuple[Run, Report, Found]) -> None:
        _, report, found = helped
        told = report.model_copy(update={"postprocessing": found})
        assert Report.from_json(json.loads(json.dumps(told.to_json()))) == told

    def test_tables_and_page_say_what_was_chosen_and_how_honest_the_figures_are(
        self, helped: tuple[Run, Report, Found]
    ) -> None:
        _, report, found = helped
        tables = postprocessing_tables(found)
        assert tables[0].rows[0]["action"] == "tumour: remove islands under 10 mm3"
        assert tables[0].rows[0]["verdict"] == "chosen"
        assert {(row["label"], row["figure"]) for row in tables[1].rows} >= {("tumour", "Dice"), ("tumour", "HD95 mm")}
        assert [row["fold"] for row in tables[2].rows] == [0, 1]
        text = page_of(report.model_copy(update={"postprocessing": found}), RunFacts("world"))
        assert "Chosen: tumour: remove islands under 10 mm3." in text
        assert "an honest estimate" in honesty(found)
        assert "measured on the very cases that chose it" in text
        assert "Post-processing" not in page_of(report, RunFacts("world"))


class TestStoring:
    @pytest.fixture
    def run(self, helped: tuple[Run, Report, Found], small_bundle: Path, tmp_path: Path, small_dataset: Dataset) -> Run:
        """Two folds with bundles, of labels that these have."""
        for fold in (0, 1):
            shutil.copytree(small_bundle, tmp_path / f"fold_{fold}" / "bundle")
        return replace(helped[0], folder=tmp_path)

    ANTERIOR = PostProcessing(actions=(Action(kind="largest", name="Anterior", labels=("Anterior",)),))

    def model(self, run: Run, *folds: int) -> Model:
        return Model(tuple(load_bundle(run.fold_folder(fold) / "bundle") for fold in folds))

    def test_every_fold_gets_it_and_may_lose_it(self, run: Run) -> None:
        store_postprocessing(run, [0, 1], self.ANTERIOR)
        assert self.model(run, 0, 1).postprocessing == self.ANTERIOR
        store_postprocessing(run, [0, 1], None)
        assert self.model(run, 0, 1).postprocessing is None

    def test_what_is_not_found_again_is_taken_out(self, run: Run, helped: tuple[Run, Report, Found]) -> None:
        store_postprocessing(run, [0, 1], self.ANTERIOR)
        few = helped[1].model_copy(update={"cases": helped[1].cases[:3]})
        report = with_postprocessing(run, [0, 1], few, Silence())
        assert report.postprocessing is not None
        assert report.postprocessing.chosen is None
        assert self.model(run, 0, 1).postprocessing is None

    def test_none_stays_none_until_it_is_asked_for(self, run: Run, helped: tuple[Run, Report, Found]) -> None:
        few = helped[1].model_copy(update={"cases": helped[1].cases[:3]})
        store_postprocessing(run, [0, 1], self.ANTERIOR)
        want_postprocessing(run, False)
        for _ in range(2):  # as a cross-validation of the finished run does, as often as it is run
            report = with_postprocessing(run, [0, 1], few, Silence())
            assert report.postprocessing is not None
            assert report.postprocessing.note.startswith("none is wanted (`volseg postprocess RUN --none`)")
            assert "None is wanted" in page_of(report, RunFacts("world"))
            assert self.model(run, 0, 1).postprocessing is None
        want_postprocessing(run, True)
        found = settle_postprocessing(run, [0, 1], few, Silence())
        assert found == find_postprocessing(run, few, Silence())

    def test_an_ensemble_that_disagrees_is_refused_unless_it_is_left_out(
        self, run: Run, small_dataset: Dataset
    ) -> None:
        store_postprocessing(run, [0], self.ANTERIOR)
        model = self.model(run, 0, 1)
        volume = read_volume(small_dataset.image_paths(small_dataset.manifest.cases[0])[0])
        cpu = torch.device("cpu")
        with pytest.raises(BundleError, match=r"post-processed differently.*`volseg postprocess RUN`"):
            predict(model, [volume], settings=PredictSettings(False), device=cpu)
        plain = predict(model, [volume], settings=PredictSettings(False, postprocess=False), device=cpu)
        assert plain.postprocessing is None

    def test_a_prediction_is_that_of_the_network_and_then_cleaned(self, run: Run, small_dataset: Dataset) -> None:
        from pipeline.cleaning import postprocessed

        store_postprocessing(run, [0], self.ANTERIOR)
        model = self.model(run, 0)
        volume = read_volume(small_dataset.image_paths(small_dataset.manifest.cases[0])[0])
        cpu = torch.device("cpu")
        found = predict(model, [volume], settings=PredictSettings(False), device=cpu)
        plain = predict(model, [volume], settings=PredictSettings(False, postprocess=False), device=cpu)
        expected = postprocessed(plain.label_map, self.ANTERIOR, model.schema, volume.geometry)
        assert (found.label_map == expected).all()
        assert (found.label_map != plain.label_map).any()
        assert (found.postprocessing, plain.postprocessing) == (self.ANTERIOR, None)

    def test_thresholds_are_those_of_the_kept_scores(self, run: Run, small_dataset: Dataset) -> None:
        lower = Action(kind="threshold", name="Anterior", labels=("Anterior",), threshold=0.3)
        store_postprocessing(run, [0], PostProcessing(actions=(lower,)))
        model = self.model(run, 0)
        volume = read_volume(small_dataset.image_paths(small_dataset.manifest.cases[0])[0])
        settings = PredictSettings(False, keep_scores=3)
        found = predict(model, [volume], settings=settings, device=torch.device("cpu"))
        assert found.confidence is not None
        assert found.confidence.scores is not None
        again = segment_scores([found.confidence.scores], {"Anterior": 0.3}).label_map
        plain = segment_scores([found.confidence.scores]).label_map
        # Levels are rounded, and a network that has learnt nothing is near the threshold everywhere.
        assert np.count_nonzero(found.label_map != again) < 0.005 * again.size
        assert np.count_nonzero(found.label_map != plain) > 0.05 * again.size

    def test_a_threshold_of_what_the_network_does_not_say(self, run: Run) -> None:
        wrong = Action(kind="threshold", name="Liver", labels=("Anterior",), threshold=0.3)
        with pytest.raises(BundleError, match=r"a threshold of Liver; the model's outputs are Anterior, Posterior"):
            store_postprocessing(run, [0], PostProcessing(actions=(wrong,)))

    def test_results_with_and_without_it_share_no_folder(self, run: Run, small_dataset: Dataset) -> None:
        store_postprocessing(run, [0], self.ANTERIOR)
        model, out = self.model(run, 0), run.folder / "results"
        image = small_dataset.image_paths(small_dataset.manifest.cases[0])[0]
        settings = SegmentSettings(("nifti",), False, None, False)
        segment_studies(model, [Study("a", (image,))], out, settings=settings, console=Silence())
        record = json.loads((out / "predictions.json").read_text())
        assert record["postprocessing"].startswith("Anterior: keep the largest component (")
        without = replace(settings, postprocess=False)
        with pytest.raises(RunError, match="holds results of another model or setting"):
            segment_studies(model, [Study("a", (image,))], out, settings=without, console=Silence())

    def test_an_exported_network_comes_with_what_it_does_not_do(self, run: Run) -> None:
        out, words = run.folder / "model.pt", "Anterior: keep the largest component"
        bundle = run.fold_folder(0) / "bundle"
        plain = export_model(bundle, out, to="torchscript", force=False)
        store_postprocessing(run, [0], self.ANTERIOR)
        lines = export_model(bundle, out, to="torchscript", force=True)
        assert lines[-1] == f"not part of it: the post-processing that volseg does afterwards ({words}); do it too"
        assert len(lines) == len(plain) + 1
        card = json.loads((run.folder / "model.pt.json").read_text())
        assert PostProcessing.model_validate(card["postprocessing"]) == self.ANTERIOR
        assert card["steps"][-1].endswith(f"{words}.")

    def test_its_memory_is_planned(self, run: Run) -> None:
        grid, cpu = Geometry((64, 64, 64), np.eye(4)), torch.device("cpu")
        store_postprocessing(run, [0], self.ANTERIOR)
        named = {
            wanted: [
                stage.name
                for stage in explain(
                    self.model(run, 0), grid, settings=PredictSettings(False, postprocess=wanted), device=cpu
                ).stages
            ]
            for wanted in (True, False)
        }
        assert named[True] == [*named[False], "post-processing"]
