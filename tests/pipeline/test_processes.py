"""Two gloo processes on the CPU learn what one learns with the whole batch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_fabric import Fabric

from pipeline import processes
from pipeline.device import Hardware
from pipeline.errors import RunError
from pipeline.history import HISTORY
from pipeline.plan import Plan
from pipeline.processes import open_fabric, require_shared
from pipeline.train import train

from .tiny_training import Listener, same
from .two_processes import gradients, task_of_four, validated

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]

ROOT = Path(__file__).parents[2]
ONE = Hardware("cpu", "32-true")


@pytest.fixture(scope="module")
def folder(small_plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes have left what they found."""
    folder = tmp_path_factory.mktemp("two")
    for name in ("straight", "resumed", "alone"):
        (folder / name).mkdir()
    (folder / "plan.json").write_text(small_plan.model_dump_json())
    command = [sys.executable, "-m", "tests.pipeline.two_processes", str(folder)]
    outcome = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert outcome.returncode == 0, outcome.stderr
    return folder


@pytest.fixture
def found(folder: Path) -> list[dict[str, Any]]:
    """By each of the two."""
    return [torch.load(folder / f"rank_{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("which", ["gradients", "short of memory"])
def test_the_gradients_are_those_of_one_with_the_whole_batch(
    folder: Path, found: list[dict[str, Any]], which: str
) -> None:
    expected = gradients(task_of_four(folder), open_fabric(ONE), range(4))
    for rank in (0, 1):
        # One process that is short of memory makes both take their patches one by one.
        assert found[rank][which].pop("parts") == (1 if which == "gradients" else 2)
        assert found[rank][which].keys() == expected.keys() - {"parts"}
        for name, gradient in found[rank][which].items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-6, atol=1e-6)


def test_all_leave_out_what_is_not_finite_in_one(found: list[dict[str, Any]]) -> None:
    assert [list(rank["skipped"]) for rank in found] == [[1, [["a", "b", "c", "d"]]]] * 2


def test_both_end_with_the_same_weights_as_one_alone(folder: Path, found: list[dict[str, Any]]) -> None:
    assert same(found[0]["straight"], found[1]["straight"])
    alone = train(task_of_four(folder, "alone"), ONE, Listener(), resume=False).weights
    for name, weights in found[0]["straight"].items():
        torch.testing.assert_close(weights, alone[name], rtol=1e-4, atol=1e-5)


def test_an_interrupt_of_one_stops_both_and_they_go_on_to_the_same_bits(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert same(rank["resumed"], rank["straight"])


def test_one_history_is_written(folder: Path) -> None:
    rows = [json.loads(line) for line in (folder / "straight" / HISTORY).read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [10, 20]


def test_validation_cases_are_shared_out_and_give_the_bits_of_one(folder: Path, found: list[dict[str, Any]]) -> None:
    dice, asked = validated(task_of_four(folder), open_fabric(ONE))
    assert len(set(dice.values())) > 1
    assert [rank["validated"] for rank in found] == [(dice, asked * 3 // 5), (dice, asked * 2 // 5)]


def test_both_know_the_dice_that_the_history_has(folder: Path, found: list[dict[str, Any]]) -> None:
    rows = [json.loads(line) for line in (folder / "straight" / HISTORY).read_text().splitlines()]
    last = [row for row in rows if "dice/mean" in row][-1]
    assert {key: last[f"dice/{key}"] for key in found[0]["dice"]} == found[0]["dice"] == found[1]["dice"]


def test_a_case_that_fails_in_one_ends_both(found: list[dict[str, Any]]) -> None:
    fault = found[1]["failed validation"]
    assert fault
    assert found[0]["failed validation"] == f"RunError: process 1 of 2: {fault}"


def test_both_refuse_cases_that_only_one_has(found: list[dict[str, Any]]) -> None:
    assert [rank["other cases"] for rank in found] == [
        "RunError: case case_9 could be prepared in some of the 2 processes only; every machine has to read all files "
        "of the data"
    ] * 2


def test_all_refuse_a_folder_that_is_not_the_same_for_all(folder: Path, found: list[dict[str, Any]]) -> None:
    for number, rank in enumerate(found):
        assert rank["shared"] == ""
        assert rank["not shared"] == (
            f"RunError: {folder}/of_{number}: not the same folder on every machine; "
            "choose an --out on a disk that all of them share"
        )
    assert not list((folder / "shared").iterdir())


def test_two_trainings_may_ask_of_one_folder_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As two folds of a run do: here the second asks while the first still looks for its mark."""
    fabric, look = open_fabric(ONE), processes._comes_to_hold

    def another_asks_first(file: Path, word: str, within_s: float) -> bool:
        monkeypatch.setattr(processes, "_comes_to_hold", look)
        require_shared(fabric, tmp_path, within_s=0.5)
        return look(file, word, within_s)

    monkeypatch.setattr(processes, "_comes_to_hold", another_asks_first)
    require_shared(fabric, tmp_path, within_s=0.5)
    assert not list(tmp_path.iterdir())


TORCHRUN = {"TORCHELASTIC_RUN_ID": "one", "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "here"}
SLURM = {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1", "SLURM_JOB_NAME": "train", "SLURM_PROCID": "0",
         "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NNODES": "2"}  # fmt: skip


class TestTwoMachines:
    """Whether they are waited for; the waiting itself is left out."""

    @pytest.fixture
    def launched(self, monkeypatch: pytest.MonkeyPatch) -> list[Fabric]:
        for name in ("MASTER_PORT", "NODE_RANK", *TORCHRUN, *SLURM):
            monkeypatch.delenv(name, raising=False)
        launched: list[Fabric] = []
        monkeypatch.setattr(Fabric, "launch", lambda fabric: launched.append(fabric))
        return launched

    @pytest.mark.parametrize(
        "variables", [{}, {"WORLD_SIZE": "2", "NODE_RANK": "1"}, {"MASTER_ADDR": "127.0.0.1", "NODE_RANK": "1"}]
    )
    def test_nobody_is_waited_for_who_cannot_come(
        self, launched: list[Fabric], monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]
    ) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(RunError) as error:
            open_fabric(Hardware("cpu", "32-true", nodes=2))
        assert str(error.value) == (
            "--nodes 2: start it on each machine by torchrun or srun (MASTER_ADDR is not set, or is 127.0.0.1)"
        )
        assert launched == []

    @pytest.mark.parametrize(
        "variables", [TORCHRUN, SLURM, {"MASTER_ADDR": "here", "MASTER_PORT": "29500", "NODE_RANK": "1"}]
    )
    def test_a_launcher_says_where_they_meet(
        self, launched: list[Fabric], monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]
    ) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        assert open_fabric(Hardware("cpu", "32-true", nodes=2)) in launched

    @pytest.mark.parametrize("variables", [TORCHRUN, SLURM])
    def test_other_numbers_than_were_started_are_refused(
        self, launched: list[Fabric], monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]
    ) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(RunError, match=r"^--devices 2 --nodes 2: torchrun or srun started other numbers"):
            open_fabric(Hardware("cpu", "32-true", devices=2, nodes=2))
        assert launched == []
