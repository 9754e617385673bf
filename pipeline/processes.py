"""The processes of one training, one device each: how they are joined, what each of them does, what they agree on.

Every update is that of one process with the whole batch: each makes and computes an equal share of its patches, the
gradients are averaged (DistributedDataParallel), and whatever one of them decides, all do. Validation cases are shared
out as well.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins import MixedPrecision, Precision
from lightning_fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from lightning_fabric.strategies.ddp import DDPStrategy
from torch import Tensor, nn

from pipeline.config import LossConfig
from pipeline.device import Hardware
from pipeline.errors import PlanError, RunError, describe_fault
from pipeline.files import write_text
from pipeline.models.needs import needs_of
from pipeline.plan import Plan

T = TypeVar("T")

LONGEST_WAIT = timedelta(hours=2)
"""For the slowest process: one that preprocesses, or validates larger cases than the others."""

THIS_MACHINE = "127.0.0.1"
"""Where each machine looks for the first process if nothing says where that is: at itself."""

SEEN_WITHIN_S = 60.0
"""A network disk may show one machine later what another one wrote (NFS keeps attributes for up to a minute)."""


def open_fabric(hardware: Hardware) -> Fabric:
    """Fabric for `hardware`, its processes joined: those of torchrun or SLURM, or started here.

    Processes that are started here run the same command again from its beginning.

    Raises:
        RunError: several machines are asked for and nothing says where they meet, or other numbers than were started.
    """
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    plugin: Precision = Precision()
    if hardware.precision != "32-true":
        # Given as a plugin rather than by its name, which Fabric would announce.
        plugin = MixedPrecision(hardware.precision, hardware.device)
    strategy = DDPStrategy(timeout=LONGEST_WAIT) if hardware.processes > 1 else "auto"
    devices: int | list[int] = hardware.devices
    if hardware.device == "cuda" and hardware.processes == 1:
        # The one that this process has been given, where folds run side by side on several.
        devices = [torch.cuda.current_device()]
    fabric = Fabric(
        accelerator=hardware.device,
        devices=devices,
        num_nodes=hardware.nodes,
        strategy=strategy,
        plugins=[plugin],
    )
    if hardware.processes > 1:
        _require_launcher(fabric, hardware)
        fabric.launch()
    return fabric


def _require_launcher(fabric: Fabric, hardware: Hardware) -> None:
    """Refuse processes that would wait in vain for each other, until `LONGEST_WAIT` is over."""
    launcher = cast("ClusterEnvironment", cast("DDPStrategy", fabric.strategy).cluster_environment)
    if hardware.nodes > 1 and isinstance(launcher, LightningEnvironment) and launcher.main_address == THIS_MACHINE:
        raise RunError(
            f"--nodes {hardware.nodes}: start it on each machine by torchrun or srun "
            f"(MASTER_ADDR is not set, or is {THIS_MACHINE})"
        )
    try:
        launcher.validate_settings(hardware.devices, hardware.nodes)
    except ValueError as error:
        raise RunError(
            f"--devices {hardware.devices} --nodes {hardware.nodes}: torchrun or srun started other numbers of "
            "processes and machines; give the same ones to both"
        ) from error


def gradient_scaler(fabric: Fabric) -> torch.amp.GradScaler | None:
    """What keeps float16 gradients from vanishing; None in every other precision."""
    return getattr(fabric.strategy.precision, "scaler", None)


def share_of_batch(fabric: Fabric, batch_size: int) -> range:
    """The rows of each batch that this process makes and computes.

    Raises:
        PlanError: the batch cannot be shared out evenly; the nearest that can be are named.
    """
    world, rank = fabric.world_size, fabric.global_rank
    if batch_size % world:
        below, above = batch_size // world * world, (batch_size // world + 1) * world
        near = f"{below} or {above}" if below else f"{above}"
        raise PlanError(
            f"a batch of {batch_size} patches cannot be shared out evenly to {world} devices; "
            f"set plan.batch_size to {near}"
        )
    each = batch_size // world
    return range(rank * each, (rank + 1) * each)


def whole_batch_only(plan: Plan, loss: LossConfig) -> str | None:
    """The key of what looks at a batch as a whole, so that it cannot be computed in parts; None if nothing does."""
    if plan.unet.normalisation == "batch":
        return "network.normalisation=batch"
    if needs_of(plan.network).batch_normalised:
        return f"network.name={plan.network}"
    return "loss.batch_dice" if loss.batch_dice else None


def require_sharable(fabric: Fabric, plan: Plan, loss: LossConfig) -> None:
    """Raise PlanError if several processes could not give the update of one."""
    whole = whole_batch_only(plan, loss)
    if fabric.world_size > 1 and whole:
        raise PlanError(f"{whole} looks at a batch as a whole, which {fabric.world_size} devices share out: change it")


def without_exchange(fabric: Fabric, network: nn.Module, *, wanted: bool = True) -> AbstractContextManager[None]:
    """Inside, if `wanted`, gradients stay in this process; forward and backward both have to be inside."""
    if fabric.world_size == 1 or not wanted:
        return nullcontext()
    inner: AbstractContextManager[None] = cast("Any", fabric).no_backward_sync(network)
    return inner


def any_of(fabric: Fabric, flag: bool) -> bool:
    """True on every process when it is on one; every process has to ask."""
    if fabric.world_size == 1:
        return flag
    total = fabric.all_reduce(torch.tensor(float(flag), device=fabric.device), reduce_op="sum")
    return bool(total)


def mean_of(fabric: Fabric, figures: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each figure (a scalar) averaged over the processes."""
    if fabric.world_size == 1:
        return figures
    together = fabric.all_reduce(torch.stack(list(figures.values())), reduce_op="mean")
    return dict(zip(figures, together, strict=True))


def names_of_all(fabric: Fabric, names: Iterable[str]) -> list[str]:
    """The names that the processes hold, each once, sorted."""
    return sorted({name for held in held_by_all(fabric, sorted(set(names))) for name in held})


def held_by_all(fabric: Fabric, value: T) -> list[T]:
    """The value that each process holds, by their numbers; every process has to ask."""
    if fabric.world_size == 1:
        return [value]
    values: list[T] = [value] * fabric.world_size
    torch.distributed.all_gather_object(values, value)
    return values


def done_by_all(fabric: Fabric, work: Callable[[], T]) -> list[T]:
    """What `work` gives in each process, by their numbers; once all are through, an error in one is raised in all.

    Raises:
        RunError: `work` raised in another process; what it raises in this one comes through as it is.
    """
    if fabric.world_size == 1:
        return [work()]
    result, fault = None, None
    try:
        result = work()
    except Exception as error:  # whatever it is, the others wait for an answer
        fault = error
    told = held_by_all(fabric, (result, None if fault is None else describe_fault(fault)))
    if fault is not None:
        raise fault
    for number, (_, message) in enumerate(told):
        if message is not None:
            raise RunError(f"process {number} of {fabric.world_size}: {message}")
    return [cast("T", given) for given, _ in told]


def largest_share(fabric: Fabric, count: int) -> int:
    """How many of `count` things that are shared out one by one the first process does, which has no fewer than any."""
    return -(-count // fabric.world_size)


@contextmanager
def first_process_first(fabric: Fabric) -> Iterator[None]:
    """What the first process does inside is done before the others come to it."""
    if not fabric.is_global_zero:
        fabric.barrier()
    yield
    if fabric.is_global_zero:
        fabric.barrier()


def require_shared(fabric: Fabric, folder: Path, *, within_s: float = SEEN_WITHIN_S) -> None:
    """Raise RunError, in every process, unless they all see the same files in `folder`; each has it already."""
    word = fabric.broadcast(secrets.token_hex(8))
    # A name of its own: another training may be asking the same of this folder.
    mark = folder / f".joined-{word}"
    if fabric.is_global_zero:
        write_text(mark, word)
    fabric.barrier()
    unseen = any_of(fabric, not _comes_to_hold(mark, word, within_s))
    if fabric.is_global_zero:
        mark.unlink(missing_ok=True)
    if unseen:
        raise RunError(
            f"{folder}: not the same folder on every machine; choose an --out on a disk that all of them share"
        )


def _comes_to_hold(file: Path, word: str, within_s: float) -> bool:
    until = time.monotonic() + within_s
    while True:
        with suppress(OSError):
            if file.read_text(encoding="utf-8") == word:
                return True
        if time.monotonic() > until:
            return False
        time.sleep(0.2)
