"""Dark windows: which are, by the training cases; when they are skipped; and that held-out cases have the last word."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from pipeline.air import air_levels
from pipeline.air_proof import prove_air
from pipeline.backends import BACKENDS, with_backend
from pipeline.bundle import WEIGHTS, Air, ModelBundle, load_bundle, read_air, set_air, set_mirror
from pipeline.cache_entry import PreparedCase
from pipeline.console import Silence
from pipeline.device import Hardware
from pipeline.files import sha256_of_file, write_json
from pipeline.folds import Folds
from pipeline.held_out import score_fold
from pipeline.manifest import Dataset
from pipeline.plan import Plan
from pipeline.postprocessing import Action, PostProcessing
from pipeline.predict import Model, PredictSettings, air_of, predict, taken_for_air
from pipeline.runs import Run
from pipeline.tiling import WindowSettings, lay_out
from pipeline.windows import Member, Pace, count_taken_for_air, stream_windows
from transforms.geometry import Geometry
from transforms.volume import read_volume

from .conftest import SMALL_CASES
from .test_crossval import Listener, config_at

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


def case_of(image: Tensor, classes: Tensor) -> PreparedCase:
    positions = np.zeros((0, 4), dtype=np.int32)
    return PreparedCase(
        "case",
        Geometry((classes.shape[0], classes.shape[1], classes.shape[2]), np.eye(4)),
        image,
        classes[None],
        positions,
    )


def load_index(bundle: Path) -> Any:
    return json.loads((bundle / "bundle.json").read_text())


def darkest_by_hand(case: PreparedCase, patch: Sequence[int]) -> Tensor:
    """Highest values (C,) of the darkest window with a label, over windows that begin at every voxel."""
    window = [min(p, n) for p, n in zip(patch, case.classes.shape[1:], strict=True)]
    found = []
    for start in product(*(range(n - w + 1) for n, w in zip(case.classes.shape[1:], window, strict=True))):
        box = tuple(slice(a, a + w) for a, w in zip(start, window, strict=True))
        if case.classes[(0, *box)].any():
            found.append(case.image[(slice(None), *box)].amax(dim=(1, 2, 3)))
    return torch.stack(found).amin(dim=0)


class TestLevels:
    @pytest.mark.parametrize("patch", [(8, 8, 8), (16, 12, 20), (1, 16, 16), (5, 9, 40)])
    @pytest.mark.parametrize("seed", [0, 1])
    def test_no_window_with_a_label_stays_below(self, patch: tuple[int, int, int], seed: int) -> None:
        """Whatever its first voxel is, those between blocks too."""
        generator = torch.Generator().manual_seed(seed)
        image = torch.rand(2, 24, 26, 30, generator=generator) ** 8
        classes = (torch.rand(24, 26, 30, generator=generator) > 0.999).to(torch.uint8)
        assert classes.any()
        levels = air_levels([case_of(image, classes)], patch)
        assert levels is not None
        lowest = image.amin(dim=(1, 2, 3))
        assert (
            lowest + 8 * (torch.tensor(levels) - lowest) <= darkest_by_hand(case_of(image, classes), patch) + 1e-6
        ).all()

    def test_an_eighth_of_the_way_to_what_a_label_stands_out_in(self) -> None:
        image, classes = torch.full((1, 48, 16, 16), -4.0), torch.zeros(48, 16, 16, dtype=torch.uint8)
        image[:, 12:36], classes[20:28, 4:12, 4:12] = 4.0, 1
        assert air_levels([case_of(image, classes)], (16, 16, 16)) == (-3.0,)
        # The one that asks for least counts, and one without a label says nothing.
        fainter, bare = case_of(image / 2, classes), case_of(100 * image, torch.zeros_like(classes))
        assert air_levels([case_of(image, classes), fainter, bare], (16, 16, 16)) == (-3.0,)
        assert air_levels([case_of(image - 1, classes), fainter], (16, 16, 16)) == (-4.0,)
        assert air_levels([bare], (16, 16, 16)) is None

    @pytest.mark.parametrize("flip", [False, True])
    def test_windows_begin_between_blocks(self, flip: bool) -> None:
        """The bright voxel lies in the block of the label, but not in the window that begins at the label."""
        image, classes = torch.zeros(1, 48, 1, 1), torch.zeros(48, 1, 1, dtype=torch.uint8)
        image[:, 0], classes[1] = 8.0, 1
        if flip:
            image, classes = image.flip(1), classes.flip(0)
        assert darkest_by_hand(case_of(image, classes), (24, 1, 1)).item() == 0
        assert air_levels([case_of(image, classes)], (24, 1, 1)) == (0.0,)

    def test_many_classes(self) -> None:
        """PyTorch compares no unsigned numbers of 16 bits."""
        image, classes = torch.zeros(1, 16, 16, 16), np.zeros((16, 16, 16), dtype=np.uint16)
        image[:, 8], classes[8] = 8.0, 300
        assert air_levels([case_of(image, torch.from_numpy(classes))], (16, 16, 16)) == (1.0,)

    def test_a_label_in_air_leaves_nothing_to_skip(self) -> None:
        image, classes = torch.zeros(1, 48, 16, 16), torch.zeros(48, 16, 16, dtype=torch.uint8)
        image[:, :8], classes[40] = 5.0, 1
        assert air_levels([case_of(image, classes)], (16, 16, 16)) == (0.0,)


class TestWindows:
    """A long image of two channels with noise on both ends, and an object in the middle."""

    SETTINGS = WindowSettings((8, 8, 8), (1, 1, 1), 0.5, (), (0, 1, 2), air=(0.5, 0.5))

    @staticmethod
    def image() -> Tensor:
        image = 0.4 * torch.rand(2, 64, 16, 16, generator=torch.Generator().manual_seed(1))
        image[:, 24:40, 4:12, 4:12] += 3
        return image

    def scored(self, image: Tensor, pace: Pace, settings: WindowSettings) -> tuple[Tensor, list[Tensor]]:
        seen: list[Tensor] = []
        convolution = torch.nn.Conv3d(2, 3, 3, padding=1)
        for values in convolution.parameters():
            torch.nn.init.normal_(values, generator=torch.Generator().manual_seed(0))

        def network(tiles: Tensor) -> Tensor:
            seen.extend(tiles.clone())
            return convolution(tiles)

        members = [Member(network, settings)]
        layout = lay_out(image.shape[1:], [settings], axis=0)
        with torch.inference_mode():
            slabs = [slab.clone() for _, slab in stream_windows(members, image, layout, pace=pace)]
        return torch.cat(slabs, dim=1), seen

    def test_dark_ones_are_computed_once_as_the_lowest_values(self) -> None:
        image = self.image()
        found, seen = self.scored(image, Pace(), self.SETTINGS)
        lowest = image.amin(dim=(1, 2, 3)).reshape(-1, 1, 1, 1)
        assert len(seen) == 5 * 9 + 1
        assert sum(bool((tile == lowest).all()) for tile in seen) == 1
        whole, every = self.scored(image, Pace(), replace(self.SETTINGS, air=None))
        assert len(every) == 15 * 9
        assert not torch.equal(found, whole)
        # The object is seen by the same windows as before.
        assert torch.equal(found[:, 28:36], whole[:, 28:36])

    def test_memory_changes_no_result(self) -> None:
        found, _ = self.scored(self.image(), Pace(), self.SETTINGS)
        for pace in (Pace(skip_empty=False), Pace(batch=4), Pace(batch=4, skip_empty=False, slab_planes=3)):
            torch.testing.assert_close(self.scored(self.image(), pace, self.SETTINGS)[0], found, atol=1e-6, rtol=0)

    def test_one_bright_channel_is_enough_to_look(self) -> None:
        image = self.image()
        image[1] += 0.6
        _, seen = self.scored(image, Pace(), self.SETTINGS)
        assert len(seen) == 15 * 9

    def test_they_are_counted_beforehand(self) -> None:
        image = self.image()
        members = [Member(torch.nn.Identity(), self.SETTINGS)]
        layout = lay_out(image.shape[1:], [self.SETTINGS])
        assert count_taken_for_air(members, image, layout) == 10 * 9
        assert count_taken_for_air(members, torch.zeros_like(image), layout) == 0, "their answer is exact anyway"
        plain = [Member(torch.nn.Identity(), replace(self.SETTINGS, air=None))]
        assert count_taken_for_air(plain, image, layout) == 0


class TestModel:
    @staticmethod
    def knowing(bundle: ModelBundle, levels: tuple[float, ...] | None, **changes: object) -> ModelBundle:
        air = None if levels is None else Air(levels=levels, cases=3)
        return replace(bundle, index=bundle.index.model_copy(update={"air": air, "mirror": False, **changes}))

    def test_folds_skip_what_all_of_them_would(self, small_bundle: Path) -> None:
        bundle = load_bundle(small_bundle)
        some, others = self.knowing(bundle, (-1.0,)), self.knowing(bundle, (-1.5,))
        assert Model((some, others)).air == (-1.5,)
        for unsure in (
            None,
            Air(levels=(-1.0,)),
            Air(levels=(-1.0,), cases=2),
            Air(levels=(-1.0,), cases=9, changed=1),
        ):
            other = replace(some, index=some.index.model_copy(update={"air": unsure}))
            assert Model((some, other)).air is None

    def test_another_backend_is_another_network(self, small_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        bundle = self.knowing(load_bundle(small_bundle), (-1.0,))
        monkeypatch.setitem(BACKENDS, "another", lambda bundle, **_: bundle)
        assert Model((with_backend(bundle, "torch"),)).air == (-1.0,)
        assert Model((with_backend(bundle, "another"),)).air is None

    @pytest.mark.parametrize(
        ("settings", "skips"),
        [
            (PredictSettings(False), True),
            (PredictSettings(False, tile_step=0.5), True),
            (PredictSettings(False, skip_air=False), False),
            (PredictSettings(True), False),
            (PredictSettings(False, tile_step=0.7), False),
            (PredictSettings(False, keep_scores=2), False),
            (PredictSettings(False, uncertainty=True), False),
        ],
    )
    def test_only_what_was_proven(self, small_bundle: Path, settings: PredictSettings, skips: bool) -> None:
        model = Model((self.knowing(load_bundle(small_bundle), (-1.0,)),))
        assert air_of(model, settings) == ((-1.0,) if skips else None)

    def test_not_where_a_threshold_was_moved(self, small_bundle: Path) -> None:
        bundle = self.knowing(load_bundle(small_bundle), (-1.0,))
        lower = Action(name="Anterior", labels=("Anterior",), kind="threshold", threshold=0.2)
        largest = Action(name="Anterior", labels=("Anterior",), kind="largest")
        moved, islands = PostProcessing(actions=(lower,)), PostProcessing(actions=(largest,))
        assert air_of(Model((replace(bundle, postprocessing=moved),)), PredictSettings(False)) is None
        assert air_of(Model((replace(bundle, postprocessing=islands),)), PredictSettings(False)) == (-1.0,)
        without = PredictSettings(False, postprocess=False)
        assert air_of(Model((replace(bundle, postprocessing=moved),)), without) == (-1.0,)

    def test_other_passes_are_not_proven(self, small_bundle: Path, tmp_path: Path) -> None:
        folder = tmp_path / "bundle"
        shutil.copytree(small_bundle, folder)
        proven = Air(levels=(-1.0,), cases=3, windows=70)
        set_air(folder, proven)
        assert read_air(folder) == load_bundle(folder).index.air == proven
        set_mirror(folder, True, {})
        assert read_air(folder) == proven
        set_mirror(folder, False, {})
        assert read_air(folder) == Air(levels=(-1.0,)), "to be asked again"


class TestProof:
    """Real cases in a frame of noise, and a network that calls noise background, or labels."""

    LEVELS = (-0.3,)

    @pytest.fixture
    def framed(self, world: Dataset) -> Dataset:
        generator = np.random.default_rng(0)
        for case in world.manifest.cases:
            for path in (*world.image_paths(case), world.label_path(case)):
                assert path is not None
                file = nib.load(path)  # type: ignore[attr-defined]
                voxels = np.asarray(file.dataobj)
                frame = np.zeros((voxels.shape[0], voxels.shape[1] + 150, voxels.shape[2]), dtype=voxels.dtype)
                if path != world.label_path(case):
                    frame[:] = voxels.max() * generator.uniform(0, 0.01, frame.shape)
                frame[:, : voxels.shape[1]] = voxels
                nib.save(nib.Nifti1Image(frame, file.affine), path)  # type: ignore[attr-defined]
        return world

    def run(self, dataset: Dataset, plan: Plan, bundle: Path, folder: Path, *, background: float) -> Run:
        run = Run(
            folder, config_at(folder), dataset, Folds(count=1, seed=0, fixed=False, fold_of={}, cases=()), plan,
            Hardware("cpu", "32-true"),
        )  # fmt: skip
        there = run.fold_folder(0) / "bundle"
        shutil.copytree(bundle, there)
        weights = safetensors.torch.load_file(there / WEIGHTS)
        (last,) = (name for name, values in weights.items() if values.shape == (3,))
        weights[last] += torch.tensor([background, 0.0, 0.0])
        safetensors.torch.save_file(weights, there / WEIGHTS)
        index = load_index(there)
        index["sha256"][WEIGHTS] = sha256_of_file(there / WEIGHTS)
        index["air"] = Air(levels=self.LEVELS).model_dump()
        index["mirror"] = False
        write_json(there / "bundle.json", index)
        return run

    def test_same_labels_are_a_proof(
        self, framed: Dataset, small_plan: Plan, small_bundle: Path, tmp_path: Path
    ) -> None:
        run = self.run(framed, small_plan, small_bundle, tmp_path / "run", background=1e3)
        listener = Listener()
        score_fold(run, 0, SMALL_CASES[:3], listener)
        bundle = load_bundle(run.fold_folder(0) / "bundle")
        air = bundle.index.air
        assert air is not None
        assert air == Air(levels=self.LEVELS, cases=3, windows=air.windows)
        told = f"without the {air.windows} dark windows of 3 held-out cases every label is the same"
        assert f"fold 0: air: {told}; such windows are skipped from now on" in listener.notes
        model, volume = Model((bundle,)), read_volume(framed.image_paths(framed.manifest.cases[0])[0])
        assert taken_for_air(model, [volume], PredictSettings(False)) > 0
        assert taken_for_air(model, [volume], PredictSettings(False, skip_air=False)) == 0
        # What was settled is not asked again.
        prove_air(run, 0, SMALL_CASES[:3], listener)
        assert len([note for note in listener.notes if "air:" in note]) == 1

    def test_too_few_cases_are_no_proof(
        self, framed: Dataset, small_plan: Plan, small_bundle: Path, tmp_path: Path
    ) -> None:
        run = self.run(framed, small_plan, small_bundle, tmp_path / "run", background=1e3)
        listener = Listener()
        score_fold(run, 0, SMALL_CASES[:1], listener)
        model = Model((load_bundle(run.fold_folder(0) / "bundle"),))
        assert model.air is None
        assert any("too few cases to skip such windows" in note for note in listener.notes)

    def test_one_changed_case_is_enough_against_it(
        self, framed: Dataset, small_plan: Plan, small_bundle: Path, tmp_path: Path
    ) -> None:
        run = self.run(framed, small_plan, small_bundle, tmp_path / "run", background=0.0)
        score_fold(run, 0, SMALL_CASES[:3], Silence())
        bundle = load_bundle(run.fold_folder(0) / "bundle")
        assert bundle.index.air is not None
        assert bundle.index.air.changed
        assert Model((bundle,)).air is None
        # What the levels would have done, had they been believed.
        believed = Air(levels=self.LEVELS, cases=3)
        skipping = replace(bundle, index=bundle.index.model_copy(update={"air": believed}))
        volume = read_volume(framed.image_paths(framed.manifest.cases[0])[0])
        whole, found = (
            predict(Model((b,)), [volume], settings=PredictSettings(False), device=CPU) for b in (bundle, skipping)
        )
        assert (whole.label_map != found.label_map).any()
        assert (whole.skipped_windows, found.skipped_windows > 0) == (0, True)

    def test_cases_without_dark_windows_prove_nothing(
        self, small_dataset: Dataset, small_plan: Plan, small_bundle: Path, tmp_path: Path
    ) -> None:
        run = self.run(small_dataset, small_plan, small_bundle, tmp_path / "run", background=1e3)
        listener = Listener()
        score_fold(run, 0, SMALL_CASES[:3], listener)
        assert read_air(run.fold_folder(0) / "bundle") == Air(levels=self.LEVELS, cases=0)
        assert any("no held-out case has windows as dark" in note for note in listener.notes)

    def test_a_model_that_knows_no_levels_is_left_alone(
        self, small_dataset: Dataset, small_plan: Plan, small_bundle: Path, tmp_path: Path
    ) -> None:
        run = self.run(small_dataset, small_plan, small_bundle, tmp_path / "run", background=1e3)
        shutil.rmtree(run.fold_folder(0) / "bundle")
        shutil.copytree(small_bundle, run.fold_folder(0) / "bundle")
        before = load_index(run.fold_folder(0) / "bundle")
        prove_air(run, 0, SMALL_CASES[:3], Silence())
        assert load_index(run.fold_folder(0) / "bundle") == before
