"""What tests of the stages share: a few bundled cases, a plan for them that trains in a moment, a bundle."""

from __future__ import annotations

import shutil
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pipeline.manifest import Dataset, load_dataset
from pipeline.plan import Plan

if TYPE_CHECKING:
    from pipeline.predict import Model

ROOT = Path(__file__).parents[2]
SMALL_CASES = ("hippocampus_001", "hippocampus_015", "hippocampus_035", "hippocampus_041")


@pytest.fixture
def one_thread() -> Generator[None]:
    """For tiny networks, where two threads mostly wait for each other; sums come out the same in every run."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def small_dataset() -> Dataset:
    """Four of the bundled cases."""
    dataset = load_dataset(ROOT / "data_manifests" / "hippocampus_demo.json")
    cases = tuple(case for case in dataset.manifest.cases if case.case_id in SMALL_CASES)
    return dataset.model_copy(update={"manifest": dataset.manifest.model_copy(update={"cases": cases})})


@pytest.fixture
def world(small_dataset: Dataset, tmp_path: Path) -> Dataset:
    """A copy of the cases that a test may spoil."""
    for case in small_dataset.manifest.cases:
        for source in (*small_dataset.image_paths(case), small_dataset.label_path(case)):
            assert source is not None
            target = tmp_path / "data" / source.relative_to(small_dataset.root)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
    return small_dataset.model_copy(update={"root": tmp_path / "data"})


@pytest.fixture(scope="session")
def small_plan(small_dataset: Dataset) -> Plan:
    """Two resolutions; a patch that takes a whole bundled case as one tile."""
    from pipeline.checks import check_dataset
    from pipeline.config import NetworkConfig, PlanConfig
    from pipeline.fingerprint import Measuring
    from pipeline.plan import Budget
    from pipeline.planner import make_plan

    measuring = Measuring(small_dataset.manifest)
    check_dataset(small_dataset, visit=measuring.visit)
    settings = PlanConfig(features=(4, 8), patch_shape=(24, 36, 28))
    return make_plan(
        measuring.fingerprint(SMALL_CASES),
        Budget("cpu", memory_gb=2.0, minutes=None, gflops=30.0),
        settings=settings,
        network=NetworkConfig(),
    )


@pytest.fixture(scope="session")
def small_bundle(small_dataset: Dataset, small_plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with weights as drawn: its labels mean nothing, but they are the same for the same voxels."""
    import torch

    from pipeline.bundle import BundleFacts, save_bundle
    from pipeline.models.registry import build_network

    network = build_network(
        small_plan.network,
        small_plan.unet,
        small_plan.patch_shape,
        generator=torch.Generator().manual_seed(3),
    )
    facts = BundleFacts(
        name="small",
        fold=None,
        mirror=True,
        tile_step=0.5,
        plan=small_plan,
        schema=small_dataset.manifest.labels,
        config_yaml="name: small\n",
        provenance={"volseg": "0"},
    )
    folder = tmp_path_factory.mktemp("model") / "bundle"
    save_bundle(folder, network.state_dict(), facts)
    return folder


@pytest.fixture(scope="module")
def model(small_bundle: Path) -> Model:
    """What was read from it."""
    from pipeline.bundle import load_bundle
    from pipeline.predict import Model

    return Model((load_bundle(small_bundle),))


@pytest.fixture
def images(data_dir: Path, tmp_path: Path) -> Path:
    """A folder with two volumes."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("hippocampus_001", "hippocampus_015"):
        shutil.copy(data_dir / "hippocampus" / "images" / f"{name}.nii.gz", folder)
    return folder
