"""A small world for the command line: phantoms of 16 x 16 x 12 voxels, a config, a model that is trained once."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
SHAPE = (16, 16, 12)
SPACING_MM = (1.0, 1.5, 2.0)

CONFIG = """\
name: tiny
runs: {runs}
data: {{manifest: cases.json}}
folds: {{count: 2}}
plan: {{features: [4, 8], patch_shape: [8, 8, 8], batch_size: 1}}
train: {{steps: 12, validations: 1, device: cpu}}
predict: {{mirror: false, tile_step: 1.0}}
evaluate: {{bootstrap_samples: 100}}
tracking: {{enabled: false}}
"""


@dataclass(frozen=True)
class Outcome:
    """What a command ended with."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class World:
    """Where the files of a small dataset lie."""

    folder: Path

    @property
    def manifest(self) -> Path:
        return self.folder / "cases.json"

    @property
    def config(self) -> Path:
        return self.folder / "tiny.yaml"

    @property
    def run(self) -> Path:
        return self.folder / "runs" / "tiny"

    def image(self, number: int) -> Path:
        return self.folder / "images" / f"case_{number}.nii.gz"

    def label(self, number: int) -> Path:
        return self.folder / "labels" / f"case_{number}.nii.gz"


def save(path: Path, voxels: np.ndarray, *, shift_mm: float = 0.0) -> Path:
    affine = np.diag([*SPACING_MM, 1.0])
    affine[0, 3] = shift_mm
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels, affine), path)  # type: ignore[attr-defined]
    return path


def phantom(number: int) -> tuple[np.ndarray, np.ndarray]:
    """A bright and a dark box in noise."""
    random = np.random.default_rng(number)
    image = random.normal(100, 5, SHAPE).astype(np.float32)
    label = np.zeros(SHAPE, np.uint8)
    for value, (step, k) in {1: (40, 1), 2: (-40, 6)}.items():
        i, j = random.integers(1, 9, 2)
        box = (slice(i, i + 6), slice(j, j + 6), slice(k, k + 5))
        image[box] += step
        label[box] = value
    return image, label


def make_world(folder: Path, call: Callable[..., Outcome], cases: int = 4) -> World:
    """Files, a manifest made by `volseg manifest build`, and a config."""
    world = World(folder)
    for number in range(cases):
        image, label = phantom(number)
        save(world.image(number), image)
        save(world.label(number), label)
    built = call("manifest", "build", folder / "images", "--labels", folder / "labels", "--name", "phantoms",
                 "--channel", "T1:MR", "--label", "1:bright", "--label", "2:dark", "--out", world.manifest)  # fmt: skip
    assert built.code == 0, built.err
    world.config.write_text(CONFIG.format(runs=folder / "runs"))
    return world


def environment() -> dict[str, str]:
    """One thread, as the tests in this process have, so that sums come out the same."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def command(*arguments: Any) -> list[str]:
    return [sys.executable, "-m", "pipeline.cli", *map(str, arguments)]


@pytest.fixture(scope="session")
def one_thread() -> Generator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def in_process(one_thread: None) -> Callable[..., Outcome]:
    """Run a command in this process: the same `main`, without the seconds that a start takes."""

    def run(*arguments: Any) -> Outcome:
        import contextlib
        import io

        from pipeline.cli import main

        out, err = io.StringIO(), io.StringIO()
        before = sys.argv
        sys.argv = ["volseg", *map(str, arguments)]
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        finally:
            sys.argv = before
        return Outcome(code, out.getvalue(), err.getvalue())

    return run


@pytest.fixture(scope="session")
def real_process() -> Callable[..., Outcome]:
    """Run a command as its user does."""

    def run(*arguments: Any, cwd: Path = ROOT) -> Outcome:
        done = subprocess.run(
            command(*arguments), cwd=cwd, env=environment(), capture_output=True, text=True, check=False
        )
        return Outcome(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def world(tmp_path: Path, in_process: Callable[..., Outcome]) -> World:
    """A world to spoil."""
    return make_world(tmp_path, in_process)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, in_process: Callable[..., Outcome]) -> World:
    """A world with a finished fold; not to be changed."""
    world = make_world(tmp_path_factory.mktemp("trained"), in_process)
    done = in_process("train", world.config, "--fold", 0)
    assert done.code == 0, done.err
    return world
