"""Cache entries: what is damaged is found and made again; nothing is left where there was no room."""

from __future__ import annotations

import io
import re
import resource
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline import cache_entry
from pipeline.cache_entry import PreparedCase
from pipeline.config import AugmentConfig
from pipeline.console import Silence
from pipeline.dataset import Patches, dataset_digest, prepare_case, prepare_cases
from pipeline.errors import RunError
from pipeline.manifest import Dataset
from pipeline.plan import Plan

pytestmark = pytest.mark.usefixtures("one_thread")


class Told(Silence):
    """What a console was told."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.done: list[tuple[str, int, int]] = []

    def note(self, message: str) -> None:
        self.lines.append(message)

    def progress(self, what: str, done: int, total: int, detail: str = "") -> None:
        self.done.append((what, done, total))


FILES = ("image.npy", "classes.npy", "positions.npy", "geometry.json", "digests.json")


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def entries(cache: Path) -> list[Path]:
    return sorted(p for p in cache.glob("*/*") if not p.name.startswith("."))


def hidden(cache: Path) -> list[Path]:
    return [p for p in cache.rglob("*") if p.name.startswith(".")]


@pytest.mark.parametrize("shape", [(2, 3, 4), (0, 4)])
def test_arrays_are_written_as_numpy_does(tmp_path: Path, shape: tuple[int, ...]) -> None:
    for array in (np.random.default_rng(0).random(shape), np.ones(shape[::-1], np.int32).T):
        cache_entry._save_array(tmp_path / "ours.npy", array)
        assert np.array_equal(np.load(tmp_path / "ours.npy"), array)


def test_a_full_disk_is_one_line_and_leaves_nothing(world: Dataset, small_plan: Plan, tmp_path: Path) -> None:
    """A limit on the size of files strikes in the same call; Python turns its signal into an error."""
    cache = tmp_path / "cache"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(RunError, match=r"^cannot write .*: file too large$"):
            prepare_case(world, world.manifest.cases[0], small_plan, cache)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert entries(cache) == hidden(cache) == []


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [flip_a_bit, cut_short, empty, Path.unlink])
def test_a_damaged_entry_is_made_again(
    world: Dataset, small_plan: Plan, tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    case, cache, told = world.manifest.cases[0], tmp_path / "cache", Told()
    before = prepare_case(world, case, small_plan, cache)
    (entry,) = entries(cache)
    good = {path.name: path.read_bytes() for path in entry.iterdir()}
    del before  # a mapped file that is cut short ends the process that reads it
    damage(entry / name)
    prepare_case(world, case, small_plan, cache, console=told)
    (line,) = told.lines
    assert re.fullmatch(rf"{re.escape(str(entry))}: a damaged cache entry, {name} .*; it is made again", line)
    assert {path.name: path.read_bytes() for path in entry.iterdir()} == good
    assert hidden(cache) == []
    prepare_case(world, case, small_plan, cache, console=told)
    assert len(told.lines) == 1


def test_arrays_that_do_not_belong_together_are_damage(world: Dataset, small_plan: Plan, tmp_path: Path) -> None:
    cache, told = tmp_path / "cache", Told()
    for case in world.manifest.cases[:2]:
        prepare_case(world, case, small_plan, cache)
    first, second = entries(cache)
    shutil.copy(first / "classes.npy", second / "classes.npy")
    prepare_cases(world, world.manifest.cases[:2], small_plan, cache, workers=2, console=told)
    assert len([line for line in told.lines if "classes.npy is not as it was written" in line]) == 1


def test_many_entries_take_no_file_descriptors(world: Dataset, small_plan: Plan, tmp_path: Path) -> None:
    """Most systems allow a process 1,024."""
    opened = Path("/dev/fd")
    before = len(list(opened.iterdir()))
    cases = [prepare_case(world, world.manifest.cases[0], small_plan, tmp_path) for _ in range(20)]
    assert len(list(opened.iterdir())) == before
    assert len(cases) == 20


def test_a_training_begins_with_what_was_found_when_its_entries_were_opened(
    world: Dataset, small_plan: Plan, tmp_path: Path
) -> None:
    """Voxels that change on disk afterwards change neither: nothing is read a second time for them."""
    cases = [prepare_case(world, case, small_plan, tmp_path) for case in world.manifest.cases[:2]]
    in_memory = [
        replace(case, image=case.image.clone(), classes=case.classes.clone(), minima=None, digests=None)
        for case in cases
    ]
    for case in cases:
        assert case.entry is not None
        for name in ("image.npy", "classes.npy"):
            overwrite_the_voxels(case.entry / name)
        assert not case.image.any()

    def minima(of: list[PreparedCase]) -> list[torch.Tensor]:
        made = Patches(of, small_plan, augment=AugmentConfig(), twin_classes=(0, 1, 2), foreground_share=0.5, seed=0)
        return made.minima

    assert all(torch.equal(a, b) and a.all() for a, b in zip(minima(cases), minima(in_memory), strict=True))
    assert dataset_digest(cases) == dataset_digest(in_memory)


def overwrite_the_voxels(path: Path) -> None:
    """With zeros, in place."""
    start = 128  # of the header
    with path.open("r+b") as stream:
        stream.seek(start)
        stream.write(bytes(path.stat().st_size - start))


def test_another_process_is_sent_where_a_case_lies_not_its_voxels(
    world: Dataset, small_plan: Plan, tmp_path: Path
) -> None:
    case = replace(prepare_case(world, world.manifest.cases[0], small_plan, tmp_path), annotated=torch.ones(3))
    sent = io.BytesIO()
    torch.save(case.values(), sent)
    assert len(sent.getbuffer()) < 5_000
    sent.seek(0)
    received = PreparedCase.from_values(torch.load(sent, weights_only=True))
    for key in ("image", "classes", "annotated"):
        assert torch.equal(getattr(received, key), getattr(case, key))
    assert np.array_equal(received.positions, case.positions)
    assert received.geometry.difference(case.geometry) is None
