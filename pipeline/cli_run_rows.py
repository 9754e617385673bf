"""Rows of `volseg runs`: which run comes before which, and what is shown of it."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from pipeline.errors import ConfigError
from pipeline.tracking.queries import TrackedRun

Key = tuple[bool, Any]


def in_order(runs: Sequence[TrackedRun], sort: str) -> list[TrackedRun]:
    """Largest or newest first, names from A on; folds stand below their cross-validation, in the same order.

    A run that lacks the value goes by the best of its folds; what has none comes last.

    Raises:
        ConfigError: no run has a metric of that name.
    """
    by_name = {"started", "minutes", "name"}
    if sort not in by_name:
        _require_metric(runs, sort, option="--sort", beside=sorted(by_name))
    ids = {run.run_id for run in runs}
    folds: dict[str, list[TrackedRun]] = {}
    for run in runs:
        if run.parent_id in ids:
            folds.setdefault(str(run.parent_id), []).append(run)

    def key(run: TrackedRun) -> Key:
        own = _key(run, sort)
        return own if own[0] else max([own, *(_key(fold, sort) for fold in folds.get(run.run_id, []))])

    is_falling = sort != "name"
    roots = sorted((run for run in runs if run.parent_id not in ids), key=key, reverse=is_falling)
    return [
        run
        for root in roots
        for run in (root, *sorted(folds.get(root.run_id, []), key=lambda r: _key(r, sort), reverse=is_falling))
    ]


def require_metrics(runs: Sequence[TrackedRun], names: Sequence[str]) -> None:
    """Refuse a column that would be empty.

    Raises:
        ConfigError: no run has a metric of one of these names.
    """
    for name in names:
        _require_metric(runs, name, option="--metric")


def row_of(run: TrackedRun, metrics: Sequence[str], *, offline: bool) -> dict[str, Any]:
    """One row of the table."""
    started = datetime.fromtimestamp(run.started_ms / 1000).astimezone()
    last = {"not sent": run.unsent or None} if offline else {"model": ", ".join(run.models) or None}
    return {
        "run": ("  " if run.parent_id else "") + run.name,
        "experiment": run.experiment,
        "status": run.status,
        "started": f"{started:%Y-%m-%d %H:%M}",
        "minutes": None if run.minutes is None else f"{run.minutes:.1f}",
        **{name: run.metrics.get(name) for name in metrics},
        **last,
        "id": run.run_id,
    }


def _require_metric(runs: Sequence[TrackedRun], name: str, *, option: str, beside: Sequence[str] = ()) -> None:
    known = sorted({metric for run in runs for metric in run.metrics})
    if runs and name not in known:
        there = ", ".join([*beside, *known]) or "none"
        raise ConfigError(f"{option} {name}: no run has that metric; there are {there}")


def _key(run: TrackedRun, sort: str) -> Key:
    values: dict[str, Any] = {"started": run.started_ms, "minutes": run.minutes, "name": run.name}
    value = values[sort] if sort in values else run.metrics.get(sort)
    if isinstance(value, float) and value != value:
        value = None
    return (value is not None, value if value is not None else 0)
