"""Batches made ahead: the same whoever makes them, whoever dies, and nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.cache_entry import PreparedCase
from pipeline.config import AugmentConfig
from pipeline.dataset import Patches, patches_from_recipe
from pipeline.errors import RunError, VolumeError
from pipeline.loader import PREFETCHED_BATCHES, Timed, batches, count_workers, load, prefetch
from pipeline.loader_memory import Slot, new_memory
from pipeline.plan import Plan
from tests.pipeline.numbered_batches import Numbers, Unloadable, numbered, same
from transforms.geometry import Geometry
from transforms.patches import class_positions

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[2]


def children(parent: int | None = None) -> set[int]:
    """Processes whose parent is this one or the one given, dead ones that nobody waited for among them."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it may end while it is looked at
            if f"PPid:\t{parent or os.getpid()}\n" in (process / "status").read_text():
                found.add(int(process.name))
    return found


def running(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def wait_until(true: Callable[[], bool]) -> None:
    """The test's own time limit ends a wait in vain."""
    pause = threading.Event()
    while not true():
        pause.wait(0.02)


@pytest.fixture
def patches(small_plan: Plan) -> Patches:
    """Real patches of two cases that are in memory only."""
    plan = small_plan.model_copy(update={"patch_shape": (8, 10, 6), "batch_size": 2})
    generator = torch.Generator().manual_seed(0)
    cases = []
    for name in ("first", "second"):
        classes = torch.zeros(1, 14, 12, 10, dtype=torch.uint8)
        classes[0, 4:8, 4:8, 4:8] = 1
        positions = class_positions(classes[0].numpy(), class_count=3)
        image = torch.randn(1, 14, 12, 10, generator=generator)
        cases.append(PreparedCase(name, Geometry((14, 12, 10), np.eye(4)), image, classes, positions))
    return Patches(cases, plan, augment=AugmentConfig(), twin_classes=(0, 1, 2), foreground_share=0.5, seed=3)


def test_a_process_that_makes_them_reads_no_whole_volume_first(
    patches: Patches, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, (_, recipe) = patches.batch(5), patches.recipe()
    monkeypatch.delattr("pipeline.dataset.channel_minima")
    assert same(patches_from_recipe(**recipe).batch(5), expected)


def test_whoever_makes_them_and_whoever_is_killed_batches_are_the_same(patches: Patches) -> None:
    told: list[str] = []
    before = children()
    for workers in (0, 1, 2):
        with closing(batches(patches, 3, 16, workers=workers, note=told.append)) as made:
            found = [next(made)]
            for pid in list(children() - before)[:1]:
                os.kill(pid, signal.SIGKILL)
            found += list(made)
        assert len(found) == 13
        assert all(same(batch, patches.batch(n)) for n, batch in enumerate(found, start=3))
    assert len(told) == 1
    assert children() == before


def test_nothing_to_make_starts_nothing(tmp_path: Path) -> None:
    for workers in (0, 2):
        assert list(batches(Numbers(tmp_path), 4, 4, workers=workers)) == []


@pytest.mark.slow
def test_processes_that_die_are_replaced_and_told_of_once(tmp_path: Path) -> None:
    told: list[str] = []
    source = Numbers(tmp_path, ((1, "SIGKILL"), (4, "SIGSEGV"), (5, "exit")))
    found = list(batches(source, 0, 8, workers=2, note=told.append))
    assert all(same(batch, numbered(n)) for n, batch in enumerate(found))
    assert len(found) == 8
    assert {path.name for path in tmp_path.iterdir()} == {"1-0", "4-0", "5-0"}
    assert told == [
        "a process that loads batches was ended by SIGKILL, as when memory runs out; it was replaced, "
        "and what is learnt stays the same (told once)"
    ]


@pytest.mark.slow
def test_a_batch_that_kills_whoever_makes_it_is_named(tmp_path: Path) -> None:
    before = children()
    made = batches(Numbers(tmp_path, ((1, "SIGKILL"),), lives=9), 0, 8, workers=2)
    assert same(next(made), numbered(0))
    with pytest.raises(RunError) as caught:
        next(made)
    assert str(caught.value) == (
        "batch 1 ended 3 loading processes (the last was ended by SIGKILL, as when memory runs out); its cases: of_1"
    )
    assert len(list(tmp_path.iterdir())) == 3
    assert children() == before


@pytest.mark.slow
def test_a_process_that_hangs_is_replaced(tmp_path: Path) -> None:
    told: list[str] = []
    source = Numbers(tmp_path, ((2, "SIGSTOP"),))
    found = list(batches(source, 0, 5, workers=2, note=told.append, stalled_s=0.5))
    assert all(same(batch, numbered(n)) for n, batch in enumerate(found))
    assert told[0].startswith("a process that loads batches gave no sign for 0.5 s; ")


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_comes_through_in_its_one_line(tmp_path: Path, workers: int) -> None:
    before = children()
    made = batches(Numbers(tmp_path, ((2, "refuse"),)), 0, 8, workers=workers)
    assert [float(next(made).images[0, 0, 0, 0, 0]) for _ in range(2)] == [0, 1]
    with pytest.raises(VolumeError, match=r"^case of_2: two channels differ$"):
        next(made)
    assert children() == before


@pytest.mark.slow
def test_a_fault_of_ours_says_where_it_arose(tmp_path: Path) -> None:
    with pytest.raises(RunError) as caught:
        list(batches(Numbers(tmp_path, ((0, "divide"),)), 0, 2, workers=2))
    told = "batch 0 could not be made: ZeroDivisionError: by nothing at all; its cases: of_0"
    assert str(caught.value) == told
    assert "in do\n" in caught.value.__notes__[0]


@pytest.mark.slow
def test_processes_that_cannot_start(tmp_path: Path) -> None:
    before = children()
    with pytest.raises(RunError, match=r"^3 loading processes could not start \(ended with exit status 3\); set train"):
        list(batches(Unloadable(), 0, 4, workers=2))
    assert children() == before


def test_ending_early_leaves_nothing(tmp_path: Path) -> None:
    threads, processes = threading.active_count(), children()
    handles = len(list(Path("/proc/self/fd").iterdir()))
    made = batches(Numbers(tmp_path), 0, 1000, workers=2)
    next(made)
    assert len(children() - processes) == 2
    made.close()  # type: ignore[attr-defined]
    assert children() == processes
    assert threading.active_count() == threads
    assert len(list(Path("/proc/self/fd").iterdir())) == handles


PARENT = """
import sys, threading
from pathlib import Path
import torch
from tests.pipeline.numbered_batches import Numbers
from pipeline.loader import batches

torch.set_num_threads(1)
for number, batch in enumerate(batches(Numbers(Path(sys.argv[1])), 0, 10**6, workers=2)):
    if number == 3:
        print("started", flush=True)
        threading.Event().wait()
"""


@pytest.mark.parametrize(
    "ending", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGINT]
)
def test_workers_end_with_their_parent(tmp_path: Path, ending: signal.Signals) -> None:
    """Killed, terminated, or by Ctrl-C in a terminal, which goes to the whole group of processes."""
    command = [sys.executable, "-c", PARENT, str(tmp_path)]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0
    ) as parent:
        assert parent.stdout is not None
        assert parent.stderr is not None
        assert parent.stdout.readline() == "started\n"
        workers = children(parent.pid)
        assert len(workers) == 2
        assert all(running(pid) for pid in workers)
        os.killpg(parent.pid, ending)
        said = parent.stderr.read()
    wait_until(lambda: not any(running(pid) for pid in workers))
    if ending == signal.SIGINT:
        assert said.rstrip().endswith("KeyboardInterrupt")
        assert said.count("Traceback") == 1


def test_a_batch_keeps_its_values_in_shared_memory() -> None:
    handle = new_memory()
    try:
        theirs, ours = Slot(handle), Slot(handle)
        for number in (1, 9, 2):
            batch = numbered(number)
            found = ours.read(theirs.write(batch))
            assert same(found, batch)
            theirs.write(numbered(7))
            assert same(found, batch), "a copy, which the next batch does not write over"
    finally:
        os.close(handle)


def test_who_makes_the_batches() -> None:
    cores = len(os.sched_getaffinity(0))
    assert count_workers("auto", "cpu") == 0
    assert count_workers("auto", "cuda", processes_here=cores) == 0
    assert count_workers("auto", "cuda") == (min(12, cores - 1) if cores > 2 else 0)
    assert count_workers(5, "cpu") == 5


def test_waiting_is_timed() -> None:
    def slowly() -> Iterator[int]:
        for number in range(3):
            time.sleep(0.05)
            yield number

    timed = Timed(slowly())
    for _ in timed:
        time.sleep(0.02)
    assert 0.14 < timed.waited_s < 0.25
    assert 0.5 < timed.wait_share() < 0.8  # 150 of 210 ms
    time.sleep(0.01)
    assert timed.wait_share() == 0


def test_a_training_loads_by_its_config(tmp_path: Path) -> None:
    before = children()
    device = torch.device("cpu")
    with closing(load(Numbers(tmp_path), 0, 9, wanted="auto", device=device)) as loading:
        assert same(next(loading), numbered(0))
        assert children() == before
    with closing(load(Numbers(tmp_path), 0, 9, wanted=2, device=device)) as loading:
        assert same(next(loading), numbered(0))
        assert len(children() - before) == 2
    assert children() == before


def number(n: int) -> Tensor:
    return torch.tensor(n)


class TestPrefetch:
    @pytest.mark.parametrize(("start", "stop"), [(0, 10), (4, 6), (7, 7), (0, PREFETCHED_BATCHES)])
    def test_batches_come_in_order(self, start: int, stop: int) -> None:
        assert [int(made) for made in prefetch(number, start, stop)] == list(range(start, stop))

    def test_it_stays_a_few_ahead_and_no_more(self) -> None:
        made: list[int] = []

        def make(n: int) -> Tensor:
            made.append(n)
            return number(n)

        batches = prefetch(make, 0, 100)
        next(batches)
        batches.close()  # type: ignore[attr-defined]
        assert len(made) <= 1 + PREFETCHED_BATCHES

    def test_a_fault_while_making_one_comes_through(self) -> None:
        def make(n: int) -> Tensor:
            if n == 2:
                raise VolumeError("batch 2 is bad")
            return number(n)

        batches = prefetch(make, 0, 10)
        assert [int(next(batches)) for _ in range(2)] == [0, 1]
        with pytest.raises(VolumeError, match="batch 2 is bad"):
            next(batches)
