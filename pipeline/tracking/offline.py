"""What run folders themselves know of their runs, for when MLflow cannot be asked: read from their journals."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from pipeline.errors import RunError
from pipeline.tracking.delivery import read_sent
from pipeline.tracking.journal import JOURNAL_NAME, Fact, ended, read_facts
from pipeline.tracking.queries import TrackedRun

_DEPTH = 3


def list_folders(runs: Path) -> list[TrackedRun]:
    """The runs whose journals lie in `runs`, newest first; each says how much of it MLflow has not been told.

    Raises:
        RunError: there is no such folder, or no journal in it, or one is damaged.
    """
    journals = sorted(_journals(runs))
    if not journals:
        raise RunError(f"{runs}: no run folder with a {JOURNAL_NAME} there; give the folder of the runs with --runs")
    found = {path.parent.resolve(): read_facts(path.parent) for path in journals}
    told = [_told(folder, facts, found) for folder, facts in found.items() if facts]
    return sorted(told, key=lambda run: -run.started_ms)


def _journals(runs: Path) -> Iterator[Path]:
    for depth in range(1, _DEPTH + 1):
        yield from runs.glob("/".join(["*"] * depth + [JOURNAL_NAME]))


def _told(folder: Path, facts: Sequence[Fact], others: dict[Path, list[Fact]]) -> TrackedRun:
    start = facts[0].body
    parent = (folder / start["parent"]).resolve() if start["parent"] else None
    sent = read_sent(folder, destination=start["store"], key=start["key"])
    end = ended(facts)
    return TrackedRun(
        run_id=sent.ids.get("run", start["key"]),
        name=start["run_name"],
        experiment=start["experiment"],
        status="running" if end is None else str(end.body["status"]).lower(),
        started_ms=facts[0].time_ms,
        ended_ms=None if end is None else end.time_ms,
        parent_id=None if parent not in others else _id_of(parent, others[parent]),
        metrics=_last(facts),
        tags=dict(start["tags"]),
        unsent=len(facts) - sent.number,
    )


def _id_of(folder: Path, facts: Sequence[Fact]) -> str:
    start = facts[0].body
    return read_sent(folder, destination=start["store"], key=start["key"]).ids.get("run", str(start["key"]))


def _last(facts: Sequence[Fact]) -> dict[str, float]:
    """The value of each metric at its last step, as MLflow shows it."""
    newest: dict[str, tuple[int, float]] = {}
    for fact in facts:
        if fact.kind == "metrics":
            for key, value in fact.body["values"].items():
                if key not in newest or fact.body["step"] >= newest[key][0]:
                    newest[key] = (fact.body["step"], float(value))
    return {key: value for key, (_, value) in newest.items()}
