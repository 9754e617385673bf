"""What the stages of the pipeline see of tracking: `Tracker`, which writes a journal or nothing at all."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, Self

from pipeline.errors import RunError
from pipeline.files import sha256_of_folders
from pipeline.tracking.delivery import Deliverer
from pipeline.tracking.journal import Fact, Journal, Kind, ended
from pipeline.tracking.machine import PREFIX, Sampler

Status = Literal["FINISHED", "FAILED", "KILLED"]
Context = Literal["train", "validation", "test", "cross-validation"]

_PATIENCE_S = 60.0


@dataclass(frozen=True)
class ModelCard:
    """What MLflow shows of a model.

    `patch_shape` (I, J, K) and `spacing_mm` are the plan's. `channels` and `labels` are named as a person would.
    `metrics` are the model's own, as `Tracker.metrics` takes them, after `step` steps. `register_as` is the name under
    which it becomes a version in the registry at once; None leaves it where it can still be registered. `result` says
    in a sentence how good it is.
    """

    patch_shape: Sequence[int]
    spacing_mm: Sequence[float]
    channels: Sequence[str]
    labels: Sequence[str]
    metrics: Mapping[str, float] = field(default_factory=dict)
    step: int = 0
    register_as: str | None = None
    result: str = ""


class Tracker(Protocol):
    """What a run tells. Leaving its `with` ends the run: FINISHED, or FAILED or KILLED by an exception.

    All of it is shown to others: nothing here may come from a patient. Of texts, `discreet` takes out what it can.
    """

    def params(self, values: Mapping[str, str]) -> None:
        """Settings, as `pipeline.config.flatten` gives; one that a resumed run changes becomes a tag."""

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Numbers at a step, `dice/Anterior` in the group `dice`; what a resumed run repeats is not told twice."""

    def dataset(self, name: str, digest: str, context: Context, *, source: str, case_count: int) -> None:
        """Data that the run reads; `digest` is a hash of its content, `source` says where it is from."""

    def artifact(self, path: Path, folder: str = "") -> None:
        """A file or folder inside the run folder, shown in `folder`; its content when it is sent counts."""

    def model(self, bundles: Sequence[Path], card: ModelCard) -> None:
        """A bundle folder inside the run folder, or several whose predictions are averaged."""

    def note(self, markdown: str) -> None:
        """What MLflow shows as the run's description; a link to `artifact:NAME` leads to that artifact's page."""

    def finish(self, status: Status) -> None:
        """The run is over. Waits, for a bounded time, until all is delivered."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def null_tracker() -> Tracker:
    """Tells nobody anything."""
    return _NullTracker()


class JournalTracker:
    """Writes a journal, whose facts are delivered in the background.

    Metrics that a full disk refuses are kept and come before the next fact: they stop no training. All else insists.
    With `samples_machine` it also tells what the machine does meanwhile. What comes after the end of a run that is not
    begun or resumed is told, and leaves its end as it is.
    """

    def __init__(self, journal: Journal, deliverer: Deliverer, *, samples_machine: bool = False) -> None:
        self._journal = journal
        self._deliverer = deliverer
        self._sampler = Sampler(self._tell_machine, journal.run_folder) if samples_machine else None
        self._moments = 0
        self._finished = False
        self._params: dict[str, str] = {}
        self._points: dict[tuple[str, int], float | str] = {}
        self._datasets: list[dict[str, Any]] = []
        self._newest: dict[Kind, dict[str, Any]] = {}
        self._owed: list[dict[str, Any]] = []
        for fact in journal.facts:
            self._remember(fact)
        if self._sampler is not None:
            self._sampler.start()

    def params(self, values: Mapping[str, str]) -> None:
        values = discreet(values)
        new = {key: value for key, value in values.items() if key not in self._params}
        changed = {key: value for key, value in values.items() if self._params.get(key, value) != value}
        if new:
            self._tell("params", {"values": new})
        if changed:
            self._tell("tags", {"tags": {f"resumed.{key}": value for key, value in changed.items()}})

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        told = {key: _as_json(value) for key, value in values.items()}
        new = {key: value for key, value in told.items() if self._points.get((key, step)) != value}
        if new:
            self._require_running("metrics")
            self._owed.append({"step": step, "values": new})
            # The run itself tells of a full disk; it writes its history beside the journal.
            with suppress(RunError):
                self._pay()

    def dataset(self, name: str, digest: str, context: Context, *, source: str, case_count: int) -> None:
        texts = discreet({"name": name, "digest": digest, "context": context, "source": source})
        if (body := {**texts, "cases": case_count}) not in self._datasets:
            self._tell("dataset", body)

    def artifact(self, path: Path, folder: str = "") -> None:
        self._tell("artifact", {"path": self._inside(path), "folder": folder})

    def model(self, bundles: Sequence[Path], card: ModelCard) -> None:
        body = {
            "name": self._journal.facts[0].body["run_name"],
            "paths": [self._inside(bundle) for bundle in bundles],
            "sha256": sha256_of_folders(bundles),
            "patch_shape": [int(size) for size in card.patch_shape],
            "spacing_mm": [float(step) for step in card.spacing_mm],
            "channels": list(card.channels),
            "labels": list(card.labels),
            "metrics": {key: _as_json(value) for key, value in card.metrics.items()},
            "step": card.step,
            "register_as": card.register_as,
            "result": card.result,
        }
        self._tell_anew("model", body)

    def note(self, markdown: str) -> None:
        self._tell_anew("note", discreet({"markdown": markdown}))

    def finish(self, status: Status) -> None:
        if self._sampler is not None:
            self._sampler.stop()
        try:
            if ended(self._journal.facts) is None:
                self._tell("end", {"status": status})
            else:
                self._pay()
        finally:
            self._finished = True
            self._deliverer.close(_PATIENCE_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._finished:
            return
        if error is None:
            self.finish("FINISHED")
            return
        # What stopped the run is worth more than that its end could not be written.
        with suppress(RunError):
            self.finish("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")

    def _tell_machine(self, figures: Mapping[str, float]) -> None:
        """From the sampler's thread, so past everything here but the journal, which takes one line at a time."""
        self._moments += 1
        self._journal.append("metrics", {"step": self._moments, "values": dict(figures)})

    def _tell_anew(self, kind: Kind, body: dict[str, Any]) -> None:
        """What the last of its kind said already is not told; what one before that said is, for it holds again."""
        if body != self._newest.get(kind):
            self._tell(kind, body)

    def _tell(self, kind: Kind, body: dict[str, Any]) -> None:
        self._require_running(kind)
        self._pay()
        self._remember(self._journal.append(kind, body))

    def _require_running(self, kind: Kind) -> None:
        if self._finished:
            raise ValueError(f"this run is finished; its {kind} come too late")

    def _pay(self) -> None:
        while self._owed:
            self._remember(self._journal.append("metrics", self._owed[0]))
            del self._owed[0]

    def _remember(self, fact: Fact) -> None:
        if fact.kind == "params":
            self._params.update(fact.body["values"])
        elif fact.kind == "metrics":
            step = fact.body["step"]
            if any(key.startswith(PREFIX) for key in fact.body["values"]):
                self._moments = max(self._moments, step)
                return
            self._points.update({(key, step): value for key, value in fact.body["values"].items()})
        elif fact.kind == "dataset":
            self._datasets.append(fact.body)
        elif fact.kind in {"model", "note"}:
            self._newest[fact.kind] = fact.body

    def _inside(self, path: Path) -> str:
        root = self._journal.run_folder.resolve()
        if not path.resolve().is_relative_to(root):
            raise ValueError(f"{path} is not inside the run folder {root}")
        return path.resolve().relative_to(root).as_posix()


class _NullTracker:
    def params(self, values: Mapping[str, str]) -> None: ...

    def metrics(self, values: Mapping[str, float], step: int) -> None: ...

    def dataset(self, name: str, digest: str, context: Context, *, source: str, case_count: int) -> None: ...

    def artifact(self, path: Path, folder: str = "") -> None: ...

    def model(self, bundles: Sequence[Path], card: ModelCard) -> None: ...

    def note(self, markdown: str) -> None: ...

    def finish(self, status: Status) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def discreet(values: Mapping[str, str]) -> dict[str, str]:
    """See `discreet_text`, of each value."""
    return {key: discreet_text(value) for key, value in values.items()}


def discreet_text(text: str) -> str:
    """Without passwords in addresses, and with `~` for the home folder, whose name is the user's.

    A text that is to be escaped goes through here first: the name would not be found in it afterwards.
    """
    home = str(Path.home()).rstrip(os.sep)
    told = re.sub(r"(?<=://)[^/@\s]*@", "", text)
    return re.sub(rf"(?<![\w.-]){re.escape(home)}(?![\w.-])", "~", told) if home else told


def _as_json(value: float) -> float | str:
    """JSON has no NaN and no infinity; `float` reads the words back."""
    number = float(value)
    return number if math.isfinite(number) else str(number)
