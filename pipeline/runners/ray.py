"""Folds as tasks of a Ray cluster (`volseg[ray]`): of machines that see the run's folder, data and cache alike.

A fold whose worker or node is lost is submitted again and goes on from its checkpoint, wherever that is. Without an
address a cluster is started on this machine for the time of the run, and nothing of it stays.
"""

from __future__ import annotations

import logging
import socket
import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.console import Console
from pipeline.errors import ConfigError, RunError, describe_fault
from pipeline.runners.job import FoldJob, Message, Outcomes, do_job, job_document, job_of, make_cache, retell

if TYPE_CHECKING:
    from pipeline.crossval import FoldRunner
    from pipeline.runs import Run

OBJECT_STORE_BYTES = 100 * 1024**2
"""For a cluster that is started here: tasks are handed settings and give back a line, never arrays."""

CONNECT_S = 10.0
POLL_S = 0.25


@dataclass(frozen=True)
class Needs:
    """What the task of a fold is given by the cluster."""

    cpus: int
    gpus: int


def on_ray(address: str | None, *, parallel: int | None = None, threads: int | None = None) -> FoldRunner:
    """A runner on the Ray cluster at `address` (`auto`: the one that runs on this machine; None: one of its own).

    At most `parallel` folds run at a time, as many as the cluster can take if that is None; each has `threads` CPUs,
    and a GPU if the run has one.

    Raises:
        ConfigError: Ray is not installed.
    """
    try:
        import ray  # noqa: F401
    except ModuleNotFoundError as error:
        raise ConfigError("--runner ray: Ray is not installed; pip install 'volseg[ray]'") from error

    def run_folds(run: Run, folds: Sequence[int], console: Console) -> dict[int, Exception]:
        if not folds:
            return {}
        make_cache(run, folds, console)
        with _connected(address):
            at_a_time = min(parallel or len(folds), len(folds))
            needs = needs_of(_nodes(), at_a_time, threads=threads, gpus=int(run.hardware.device == "cuda"))
            return _Tasks(run, console, needs).run(folds, at_a_time)

    return run_folds


def needs_of(nodes: Sequence[dict[str, float]], at_a_time: int, *, threads: int | None, gpus: int) -> Needs:
    """CPUs (default: an equal share of the cluster's, but no more than any node has) and GPUs of each fold.

    Raises:
        RunError: no node has that much; Ray would wait for one for ever.
    """
    able = [int(node.get("CPU", 0)) for node in nodes if node.get("GPU", 0) >= gpus]
    able = [cpus for cpus in able if cpus >= (threads or 1)]
    if not able:
        wanted = f"{threads or 1} CPU" + " and a GPU" * gpus
        raise RunError(f"no node of the Ray cluster has {wanted} for a fold, {len(nodes)} nodes were asked")
    return Needs(threads or max(1, min(min(able), sum(able) // at_a_time)), gpus)


class Mailbox:
    """The actor that folds tell their progress to, on the node of whoever waits for them."""

    def __init__(self) -> None:
        self._messages: list[tuple[int, Message]] = []

    def tell(self, fold: int, message: Message) -> None:
        """Keep a message."""
        self._messages.append((fold, message))

    def collect(self) -> list[tuple[int, Message]]:
        """All that came since the last time."""
        messages, self._messages = self._messages, []
        return messages


def fold_task(document: dict[str, Any], mailbox: Any) -> str | None:
    """What a worker does; gives the reason if the fold could not be finished."""
    reasons: list[str] = []
    job = FoldJob(**document)

    def tell(message: Message) -> None:
        if message[0] == "failed":
            reasons.append(message[1])
        else:
            mailbox.tell.remote(job.fold, message)

    do_job(job, tell)
    return reasons[0] if reasons else None


class _Tasks:
    """The folds' tasks, and what became of them."""

    def __init__(self, run: Run, console: Console, needs: Needs) -> None:
        self._run, self._console, self._needs = run, console, needs
        self._mailbox = _mailbox_here()
        self._running: dict[Any, int] = {}
        self._outcomes = Outcomes(run, console)

    def run(self, folds: Sequence[int], at_a_time: int) -> dict[int, Exception]:
        """All the folds; gives what stopped the ones that are not done."""
        import ray

        waiting = deque(folds)
        try:
            while waiting or self._running:
                while waiting and len(self._running) < at_a_time:
                    self._submit(waiting.popleft())
                done, _ = ray.wait(list(self._running), timeout=POLL_S)
                self._listen()
                waiting.extendleft(fold for task in done if (fold := self._settle(task)) is not None)
        except BaseException:
            self._stop()
            raise
        return self._outcomes.faults()

    def _submit(self, fold: int) -> None:
        import ray

        # Ray's own retries say nothing to the user, and would begin a fold of a wrong config again.
        options = {"num_cpus": self._needs.cpus, "num_gpus": self._needs.gpus, "max_retries": 0, "name": f"fold {fold}"}
        job = job_of(self._run, fold, threads=self._needs.cpus)
        task = ray.remote(fold_task).options(**options).remote(job_document(job), self._mailbox)
        self._running[task] = fold

    def _listen(self) -> None:
        import ray

        for fold, message in ray.get(self._mailbox.collect.remote()):
            retell(message, fold, self._console)

    def _settle(self, task: Any) -> int | None:
        """Keep the fault of a fold that has one; gives the fold if it is to be submitted again."""
        import ray
        from ray.exceptions import RayError, RayTaskError

        fold = self._running.pop(task)
        try:
            reason = ray.get(task)
        except RayTaskError as error:
            cause = error.cause if isinstance(error.cause, Exception) else error
            reason = f"its worker could not begin: {describe_fault(cause)[:300]}"
        except RayError as error:
            how = f"its worker or node was lost ({type(error).__name__})"
            return fold if self._outcomes.is_to_restart(fold, how) else None
        if reason is not None:
            self._outcomes.fail(fold, reason)
        return None

    def _stop(self) -> None:
        """Have every fold write a checkpoint and end; at once if that is interrupted too."""
        import ray

        if not self._running:
            return
        tasks = list(self._running)
        folds = ", ".join(map(str, sorted(self._running.values())))
        self._console.note(f"stopping fold {folds} once a checkpoint is written; Ctrl-C again: at once")
        for task in tasks:
            ray.cancel(task)
        try:
            ray.wait(tasks, num_returns=len(tasks), timeout=None)
        except KeyboardInterrupt:
            for task in tasks:
                ray.cancel(task, force=True)
            raise


@contextmanager
def _connected(address: str | None) -> Iterator[None]:
    """Connected to a cluster: the one that the caller's process is connected to already, the given one, or a new one.

    Raises:
        RunError: there is no cluster at `address`.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    quietly: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    with ExitStack() as stack:
        if address is None:
            folder = tempfile.TemporaryDirectory(prefix="volseg-ray-", ignore_cleanup_errors=True)
            own = {"_temp_dir": stack.enter_context(folder), "object_store_memory": OBJECT_STORE_BYTES}
            quietly |= {"include_dashboard": False, **own}
        try:
            _require_listener(address or "")
            ray.init(address or "local", **quietly)
        except (OSError, ValueError, RuntimeError) as error:
            where = f"at {address}" if address else "on this machine"
            raise RunError(f"no Ray cluster {where} could be reached: {' '.join(str(error).split())[:200]}") from error
        stack.callback(ray.shutdown)
        yield


def _require_listener(address: str) -> None:
    """Raise OSError if nothing listens at HOST:PORT, for which Ray itself would wait for minutes."""
    host, _, port = address.rpartition(":")
    if port.isdecimal():
        with socket.create_connection((host, int(port)), timeout=CONNECT_S):
            pass


def _nodes() -> list[dict[str, float]]:
    """The resources of each node."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _mailbox_here() -> Any:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    return ray.remote(Mailbox).options(num_cpus=0, scheduling_strategy=here).remote()
