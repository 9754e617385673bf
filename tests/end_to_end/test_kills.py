"""Killed at any moment, a training goes on and ends with the weights of one that nothing disturbed."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Generator
from pathlib import Path

import pytest

from .conftest import Outcome, World, environment, make_world
from .lives import Death, Life, Lives, open_lives

WEIGHTS = Path("bundle") / "weights.safetensors"
OFTEN = ("--checkpoint-every", 1e-6, "--set", "train.steps=24", "--set", "train.validations=2")
MOST_LIVES = 60


@pytest.fixture(scope="module")
def lives(tmp_path_factory: pytest.TempPathFactory) -> Generator[Lives]:
    with open_lives(tmp_path_factory.mktemp("lives"), environment()) as opened:
        yield opened


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, in_process: Callable[..., Outcome]) -> World:
    return make_world(tmp_path_factory.mktemp("kills"), in_process)


@pytest.fixture(scope="module")
def straight(world: World, lives: Lives) -> Path:
    """The fold of a training that nothing disturbed, with the cache warm for all."""
    run = world.folder / "runs" / "straight"
    done = train(lives, world, run)
    assert done.code == 0, done.err
    return run / "fold_0"


def train(lives: Lives, world: World, run: Path, *extra: object, death: Death | None = None) -> Life:
    return lives.run("train", world.config, "--fold", 0, "--out", run, *OFTEN, *extra, death=death)


def in_one_line(life: Life) -> bool:
    return "Traceback" not in life.err and sum(line.startswith("error") for line in life.err.splitlines()) <= 1


def assert_same_end(fold: Path, straight: Path) -> None:
    """The same weights and scores, nothing left over, and no row twice."""
    assert (fold / WEIGHTS).read_bytes() == (straight / WEIGHTS).read_bytes()
    assert (fold / "report.json").read_bytes() == (straight / "report.json").read_bytes()
    assert {p.name for p in fold.iterdir()} == {p.name for p in straight.iterdir()}
    assert not list(fold.rglob(".writing-*"))


def test_killed_again_and_again(lives: Lives, world: World, straight: Path) -> None:
    """Each life ends before a touch of a file that nobody chose, or is cut short in the midst of writing one."""
    run, chance = world.folder / "runs" / "many", random.Random(20261122)
    for count in range(MOST_LIVES):
        death = Death(nth=chance.randint(1, 120)) if count % 4 else Death(size_bytes=chance.randint(100, 60_000))
        life = train(lives, world, run, "--resume", death=death if count < MOST_LIVES // 2 else None)
        assert in_one_line(life), life.err
        if life.code == 0:
            break
        assert life.code in (-signal.SIGKILL, -signal.SIGXFSZ), life.err
    assert count >= 4
    assert_same_end(run / "fold_0", straight)
    assert not list(run.rglob(".writing-*"))


def test_a_scheduler_that_ends_the_job_leaves_a_checkpoint(lives: Lives, world: World, straight: Path) -> None:
    run = world.folder / "runs" / "terminated"
    long = ("--set", "train.steps=100000", "--checkpoint-every", 60)
    child = lives.start("train", world.config, "--fold", 0, "--out", run, *OFTEN[2:], *long)
    history = run / "fold_0" / "history.jsonl"
    while not (history.exists() and history.stat().st_size):
        time.sleep(0.01)
    os.kill(child, signal.SIGTERM)
    life = lives.end()
    assert (life.code, life.err.splitlines()[-1]) == (
        130,
        "interrupted; finished parts are kept, and an unfinished training goes on with --resume",
    )
    assert (run / "fold_0" / "checkpoint.pt").exists()


NAMED = {
    "before the first checkpoint": Death(("tempfile.mkstemp", "checkpoint")),
    "in the middle of writing a checkpoint": Death(size_bytes=30_000),
    "before the checkpoint is moved aside": Death(("os.rename", "checkpoint.previous.pt"), 7),
    "between the two renames": Death(("os.rename", "-checkpoint.pt"), 7),
    "as the history is written": Death(("open", "history.jsonl"), 4),
    "after the last update, before the bundle": Death(("tempfile.mkdtemp", "bundle")),
    "as the bundle's weights are written": Death(("open", "weights.safetensors")),
    "as the bundle takes its place": Death(("os.rename", "bundle")),
    "in the prediction of the held-out cases": Death(("open", "validation"), 2),
    "as the scores are written": Death(("os.rename", "report.json")),
    "as the curves are drawn": Death(("open", "curves.png")),
    "before it is said to be done": Death(("os.rename", "done.json")),
    "after it was said to be done": Death(("os.remove", "checkpoint")),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMED)
def test_killed_at_a_named_point(lives: Lives, world: World, straight: Path, name: str) -> None:
    run = world.folder / "runs" / f"named_{list(NAMED).index(name)}"
    killed = train(lives, world, run, death=NAMED[name])
    assert killed.code in (-signal.SIGKILL, -signal.SIGXFSZ), f"{name} never came: {killed.err}"
    resumed = train(lives, world, run, "--resume")
    assert resumed.code == 0, resumed.err
    assert in_one_line(resumed)
    assert_same_end(run / "fold_0", straight)


@pytest.mark.slow
def test_killed_from_outside_at_random_times(lives: Lives, world: World, straight: Path) -> None:
    run, chance = world.folder / "runs" / "times", random.Random(4)
    kills = 0
    for _ in range(MOST_LIVES):
        child = lives.start("train", world.config, "--fold", 0, "--out", run, *OFTEN, "--resume")
        time.sleep(chance.uniform(0.05, 0.8))
        os.kill(child, signal.SIGKILL)
        life = lives.end()
        kills += life.code == -signal.SIGKILL
        if (run / "fold_0" / "done.json").exists():
            break
    last = train(lives, world, run, "--resume")
    assert last.code == 0, last.err
    assert kills >= 2
    assert_same_end(run / "fold_0", straight)


@pytest.mark.slow
def test_a_cross_validation_is_started_again(lives: Lives, world: World) -> None:
    crossval = ("crossval", world.config, *OFTEN, "--out")
    whole, broken = world.folder / "runs" / "whole", world.folder / "runs" / "broken"
    assert lives.run(*crossval, whole).code == 0
    for words, nth in ((("checkpoint.pt",), 30), (("fold_0", "report.csv"), 1), (("fold_1", "checkpoint"), 40)):
        assert lives.run(*crossval, broken, death=Death(words, nth)).code == -signal.SIGKILL
    assert lives.run(*crossval, broken, death=Death((str(broken / "report.json"),))).code in (-signal.SIGKILL, 0)
    last = lives.run(*crossval, broken)
    assert last.code == 0, last.err
    for fold in ("fold_0", "fold_1"):
        assert_same_end(broken / fold, whole / fold)
    assert (broken / "report.json").read_bytes() == (whole / "report.json").read_bytes()


class TestWhatIsTold:
    """One line each, for whoever comes back to a run."""

    def test_nothing_to_go_on_from(self, lives: Lives, world: World) -> None:
        run = world.folder / "runs" / "nothing"
        life = train(lives, world, run, "--resume", death=Death(("tempfile.mkstemp", "checkpoint")))
        assert f"{run / 'fold_0'}: there is no checkpoint to go on from; the training begins" in life.err

    def test_a_finished_fold(self, lives: Lives, world: World, straight: Path) -> None:
        life = train(lives, world, straight.parent, "--resume")
        assert life.code == 0
        assert life.err == "fold 0 is finished already (24 steps); choose another --out\n"

    def test_another_config(self, lives: Lives, world: World, straight: Path) -> None:
        life = train(lives, world, straight.parent, "--resume", "--set", "train.seed=3")
        assert life.code == 1
        assert "a run with another config is here (train.seed was 0, is now 3); choose another --out" in life.err
        assert life.err.count("\n") == 1

    def test_the_time_between_checkpoints_may_change(self, lives: Lives, world: World, straight: Path) -> None:
        life = train(lives, world, straight.parent, "--resume", "--checkpoint-every", 7)
        assert life.code == 0, life.err
