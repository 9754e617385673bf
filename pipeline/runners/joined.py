"""One training in several processes, one device each: of torchrun or SLURM, or started here by Fabric.

Each runs the same command. The first does all that a training alone does; the others take their share of every
update, write nothing and say nothing. When one is lost the rest end with one line, and --resume goes on.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import NoReturn

import torch
from lightning_fabric import Fabric

from pipeline.console import Console, Silence
from pipeline.crossval import help_train, train_fold
from pipeline.device import Hardware
from pipeline.errors import ConfigError, RunError, VolsegError, describe_fault
from pipeline.processes import first_process_first, open_fabric, require_shared
from pipeline.report_values import Report
from pipeline.runners.job import make_cache
from pipeline.runs import Run, open_run_tracker

GRACE_S = 10.0
"""Time that the first process has to notice by itself that another is lost; one that waits for a GPU never does."""

FIRST_SPEAKS_S = 3.0
"""What all processes raise, the first one tells, and ends the others in that time."""

LOST = "another process of this training was lost; --resume goes on from the last checkpoint"


def with_devices(hardware: Hardware, devices: int, nodes: int) -> Hardware:
    """The hardware of `nodes` machines with `devices` such devices each.

    Raises:
        ConfigError: this machine has fewer GPUs.
    """
    there = torch.cuda.device_count() if hardware.device == "cuda" else devices
    if devices > there:
        raise ConfigError(f"--devices {devices}: this machine has {there} GPUs")
    return replace(hardware, devices=devices, nodes=nodes)


def train_together(
    opened: Callable[[Console], Run], fold: int, console: Console, *, hardware: Hardware, resume: bool
) -> tuple[Run, Report | None] | None:
    """Train a fold of the run that `opened` gives, in all processes; None in those that are not the first.

    The report is None where the fold was finished before.

    Raises:
        RunError: a process was lost; see also `pipeline.crossval.train_fold`.
    """
    with joined(hardware, console) as fabric:
        teller = console if fabric.is_global_zero else Silence()
        with first_process_first(fabric):
            run = replace(opened(teller), hardware=hardware)
            done = run.is_done(fold)
            if fabric.is_global_zero and not done:
                make_cache(run, [fold], console)
        require_shared(fabric, run.folder)
        if not fabric.is_global_zero:
            if not done:
                help_train(run, fold)
            return None
        if done:
            return run, None
        with open_run_tracker(run, console, fold=None):
            return run, train_fold(run, fold, console, resume=resume)


@contextmanager
def joined(hardware: Hardware, console: Console) -> Iterator[Fabric]:
    """The processes of `hardware`, until all of them are through."""
    fabric = open_fabric(hardware)
    others = _taken_over(fabric)
    through = threading.Event()
    threading.Thread(target=_watch, args=(others, through, console), daemon=True).start()
    try:
        yield fabric
        for other in others:
            other.wait()
    except KeyboardInterrupt:
        if not fabric.is_global_zero:
            sys.exit(1)
        _wait(others, GRACE_S)
        raise
    except Exception as error:
        if not fabric.is_global_zero:
            _leave(fabric, error)
        if not isinstance(error, VolsegError) and _is_loss(error, others):
            raise RunError(LOST) from error
        raise
    finally:
        through.set()
        for other in others:
            other.kill()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _taken_over(fabric: Fabric) -> list[subprocess.Popen[bytes]]:
    """The processes that Fabric started: it would end all without a word when one is lost."""
    launched: list[subprocess.Popen[bytes]] = getattr(fabric.strategy.launcher, "procs", [])
    others = list(launched)
    launched.clear()
    return others


def _watch(others: Sequence[subprocess.Popen[bytes]], through: threading.Event, console: Console) -> None:
    while not through.wait(0.5):
        if any(other.poll() for other in others) and not through.wait(GRACE_S):
            console.note(f"error: {LOST}")
            for other in others:
                other.kill()
            os._exit(1)


def _wait(others: Sequence[subprocess.Popen[bytes]], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while any(other.poll() is None for other in others) and time.monotonic() < deadline:
        time.sleep(0.05)


def _leave(fabric: Fabric, error: Exception) -> NoReturn:
    """End a process that is not the first."""
    if not isinstance(error, VolsegError) and _is_loss(error, ()):
        sys.exit(1)
    time.sleep(FIRST_SPEAKS_S)
    raise RunError(f"process {fabric.global_rank} of {fabric.world_size}: {describe_fault(error)}") from error


def _is_loss(error: Exception, others: Sequence[subprocess.Popen[bytes]]) -> bool:
    """Whether an error comes of another process's end: gloo has no type of its own for that."""
    _wait(others, 1.0)
    gone = any(other.poll() for other in others)
    return gone or isinstance(error, torch.distributed.DistError) or "gloo" in str(error).lower()
