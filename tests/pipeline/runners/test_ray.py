"""Folds on a Ray cluster of two nodes, of which one is killed while it trains."""

from __future__ import annotations

import time
from collections.abc import Generator
from pathlib import Path

import pytest

from pipeline.checkpoint import CHECKPOINT
from pipeline.console import Silence
from pipeline.crossval import cross_validate
from pipeline.errors import RunError
from pipeline.runners.ray import Needs, needs_of, on_ray
from pipeline.runs import Run, open_run

from .conftest import Listener, config_at, kill, processes, weights

pytestmark = pytest.mark.usefixtures("one_thread")

# Ray leaves sockets and the processes of its cluster to be collected at the end.
QUIET = ("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::FutureWarning")


class Killer(Listener):
    """Kills the node that trains fold 1 as soon as there is a checkpoint to go on from, once."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run
        self.killed: list[int] = []

    def progress(self, what: str, done: int, total: int, detail: str = "") -> None:
        checkpoint = self.run.fold_folder(1) / CHECKPOINT
        if what == "training fold 1" and done < total and checkpoint.exists() and not self.killed:
            (worker,) = processes("ray::fold 1")
            node = int(Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[1])
            self.killed = [node, worker]
            for pid in self.killed:
                kill(pid)


@pytest.fixture
def cluster(tmp_path: Path) -> Generator[str]:
    """The address of a cluster with two nodes for work, one CPU each."""
    import ray
    from ray.cluster_utils import Cluster

    size = {"object_store_memory": 80 * 1024**2}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **size})
    for _ in range(2):
        cluster.add_node(num_cpus=1, **size)
    yield cluster.address
    ray.shutdown()
    cluster.shutdown()


@pytest.mark.slow
@pytest.mark.filterwarnings(*QUIET)
def test_a_fold_whose_node_is_killed_goes_on_elsewhere(home: Path, undisturbed: Run, cluster: str) -> None:
    run = open_run(config_at(home), home / "runs" / "on_ray", Silence())
    console = Killer(run)
    cross_validate(run, [0, 1], console, runner=on_ray(cluster))
    assert len(console.killed) == 2
    lost = [note for note in console.notes if "its worker or node was lost" in note]
    assert len(lost) == 1
    assert lost[0].startswith("fold 1: ")
    assert lost[0].endswith("started again, 1 of 3 times")
    assert any(note.startswith("fold 1: resumed at step ") for note in console.notes)
    for fold in (0, 1):
        assert weights(run, fold) == weights(undisturbed, fold)
    for name in ("report.json", "report.csv"):
        assert (run.folder / name).read_bytes() == (undisturbed.folder / name).read_bytes()


@pytest.mark.slow
@pytest.mark.filterwarnings(*QUIET)
def test_a_cluster_of_its_own_is_gone_afterwards(home: Path) -> None:
    """Also a fold's own fault is told, without a second try."""
    run = open_run(config_at(home), home / "runs" / "own_cluster", Silence())
    run.fold_folder(0).mkdir()
    (run.fold_folder(0) / CHECKPOINT).write_text("not a checkpoint")
    console = Listener()
    with pytest.raises(RunError, match=r"^no fold was finished; fold 0: .* not a readable checkpoint"):
        cross_validate(run, [0], console, runner=on_ray(None, threads=1))
    assert not any("started again" in note for note in console.notes)
    deadline = time.monotonic() + 20
    while processes("ray::IDLE") + processes("ray::Mailbox") + processes("ray::fold 0") and time.monotonic() < deadline:
        time.sleep(0.2)
    assert processes("ray::IDLE") + processes("ray::Mailbox") + processes("ray::fold 0") == []


@pytest.mark.filterwarnings(*QUIET)
def test_no_cluster_at_the_address_is_one_line(undisturbed: Run) -> None:
    with pytest.raises(RunError, match=r"no Ray cluster at 127\.0\.0\.1:9 could be reached"):
        on_ray("127.0.0.1:9")(undisturbed, [0], Silence())


@pytest.mark.parametrize(
    ("nodes", "at_a_time", "threads", "gpus", "expected"),
    [
        ([{"CPU": 8.0}, {"CPU": 8.0}], 5, None, 0, Needs(3, 0)),
        ([{"CPU": 8.0}], 2, None, 0, Needs(4, 0)),
        ([{"CPU": 2.0}, {"CPU": 64.0}], 2, None, 0, Needs(2, 0)),  # any node can take any fold
        ([{"CPU": 1.0}], 5, None, 0, Needs(1, 0)),
        ([{"CPU": 2.0}, {"CPU": 64.0}], 2, 16, 0, Needs(16, 0)),
        ([{}, {"CPU": 16.0, "GPU": 4.0}, {"CPU": 64.0}], 4, None, 1, Needs(4, 1)),
    ],
)
def test_what_a_fold_is_given(
    nodes: list[dict[str, float]], at_a_time: int, threads: int | None, gpus: int, expected: Needs
) -> None:
    assert needs_of(nodes, at_a_time, threads=threads, gpus=gpus) == expected


@pytest.mark.parametrize(
    ("nodes", "threads", "gpus", "says"),
    [
        ([{"CPU": 8.0}], 16, 0, "has 16 CPU for a fold, 1 nodes"),
        ([{"CPU": 8.0}, {"CPU": 8.0}], None, 1, "has 1 CPU and a GPU for a fold, 2 nodes"),
    ],
)
def test_what_no_node_has_is_told(nodes: list[dict[str, float]], threads: int | None, gpus: int, says: str) -> None:
    with pytest.raises(RunError, match=says):
        needs_of(nodes, 1, threads=threads, gpus=gpus)
