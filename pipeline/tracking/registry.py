"""Versions of models in MLflow's registry, and the aliases that say which of them counts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pipeline.errors import RunError
from pipeline.tracking.queries import open_client, read_json_of

DATASET_TAG, DATASET_HASH_TAG = "dataset", "dataset_sha256"
"""Tags of a run: the name of its dataset, after which its model is called, and the hash of cases and references."""


@dataclass(frozen=True)
class Candidate:
    """A run's model, registered or not, under the name that it has or would get.

    The hash is of the run's dataset, None where it is not known.
    """

    model: str
    model_id: str
    run_id: str
    run_name: str
    dataset_sha256: str | None


@dataclass(frozen=True)
class Version:
    """A version of a model, and the run that made it; the hash as in `Candidate`."""

    model: str
    number: int
    run_id: str
    run_name: str
    dataset_sha256: str | None

    @property
    def told(self) -> str:
        """As it is named in a sentence."""
        return f"version {self.number} (run {self.run_name})"


class Registry:
    """The registry of a store or server; `open_registry` gives one."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def candidate(self, run_id: str, *, model: str | None = None) -> Candidate:
        """The model that a run was last said to have. `model` names it in the registry; None takes the run's dataset.

        Raises:
            RunError: the run has no model, or no dataset to call it after.
        """
        from pipeline.tracking.logged_model import TIME_TAG, registered_name

        run = self._client.get_run(run_id)
        tags, run_name = run.data.tags, run.info.run_name or run_id
        name = model or tags.get(DATASET_TAG)
        if not name:
            raise RunError(f"run {run_name} does not say what its dataset is; give --model NAME")
        outputs = run.outputs.model_outputs if run.outputs else []
        logged = [self._client.get_logged_model(output.model_id) for output in outputs]
        if not logged:
            raise RunError(
                f"run {run_name} has no model; a cross-validation has one once all its folds are finished: "
                "run `volseg crossval` again, finished folds are kept, or give the folder of one fold"
            )
        newest = max(logged, key=lambda found: int(found.tags.get(TIME_TAG, found.creation_timestamp)))
        return Candidate(registered_name(name), newest.model_id, run_id, run_name, tags.get(DATASET_HASH_TAG))

    def register(self, candidate: Candidate) -> Version:
        """The candidate's version, which is made if there is none."""
        from pipeline.tracking.logged_model import register

        number = register(self._client, candidate.model, candidate.model_id, run_id=candidate.run_id)
        return Version(candidate.model, number, candidate.run_id, candidate.run_name, candidate.dataset_sha256)

    def aliased(self, model: str, alias: str) -> Version | None:
        """The version that has the alias; None if none has."""
        for registered in self._client.search_registered_models(f"name = '{model}'"):
            if alias in registered.aliases:
                return self._version(model, registered.aliases[alias])
        return None

    def _version(self, model: str, number: str) -> Version:
        found = self._client.get_model_version(model, number)
        if not found.run_id:
            raise RunError(f"version {number} of {model} was made by no run, so there is nothing to compare with")
        run = self._client.get_run(found.run_id)
        name = run.info.run_name or found.run_id
        return Version(model, int(number), found.run_id, name, run.data.tags.get(DATASET_HASH_TAG))

    def move(self, version: Version, alias: str, *, because: str) -> None:
        """Give the alias to a version, which keeps the reason as a tag."""
        self._client.set_model_version_tag(version.model, str(version.number), f"{alias}_because", because)
        self._client.set_registered_model_alias(version.model, alias, str(version.number))

    def read_json(self, run_id: str, name: str) -> dict[str, Any]:
        """A JSON file among a run's artifacts.

        Raises:
            RunError: it has no such file.
        """
        return read_json_of(self._client, run_id, name)


@contextmanager
def open_registry(uri: str) -> Iterator[Registry]:
    """The registry of a store or server, whose every failure is one line.

    Raises:
        ConfigError: `uri` is neither a server's address nor an SQLite store.
        RunError: there is no store, or it cannot be reached or does not let us.
    """
    with open_client(uri) as client:
        yield Registry(client)
