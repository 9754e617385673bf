"""The training loop: one readable function, and what it needs around it.

Step n of a run depends on the seed, n and the weights alone: patches are drawn from (seed, n), so a resumed run
goes on exactly as the interrupted one would have.
"""

from __future__ import annotations

import copy
import io
import json
import math
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from pipeline.batch import Batch
from pipeline.config import AugmentConfig, TrainConfig
from pipeline.dataset import Patches, PreparedCase
from pipeline.device import Hardware, peak_memory_gb
from pipeline.errors import RunError
from pipeline.files import atomic_path, explain_os_error, sha256_of_json, write_json
from pipeline.loader import prefetch
from pipeline.losses import Loss, build_loss, deep_supervision_loss
from pipeline.metrics import confusion_counts, dice_from_counts
from pipeline.models.registry import build_network
from pipeline.models.slices import as_volume_network
from pipeline.plan import Plan
from pipeline.windows import WindowSettings, predict_windows
from transforms.labels import LabelSchema

CHECKPOINT, HISTORY, STEPS = "checkpoint.pt", "history.jsonl", "steps.json"
CHECKPOINT_FORMAT = "volseg-checkpoint-1"

TIMED_STEPS, WARM_STEPS = 12, 3
"""Updates that are timed to turn minutes into steps, after some that are not."""

LOGGED_EVERY = 10
"""Updates between two rows of the history."""

SGD_MOMENTUM = 0.99
ADAMW_BETAS = (0.9, 0.99)


class Observer(Protocol):
    """Told what happens while a training goes on."""

    def progress(self, step: int, steps: int, loss: float) -> None:
        """After every update."""

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Every few updates, and after each validation."""

    def note(self, message: str) -> None:
        """One line worth telling."""


@dataclass(frozen=True, eq=False)
class TrainingTask:
    """All that a training is made of."""

    plan: Plan
    schema: LabelSchema
    training: Sequence[PreparedCase]
    validation: Sequence[PreparedCase]
    settings: TrainConfig
    augment: AugmentConfig
    tile_step: float
    folder: Path

    def key(self) -> str:
        """Hash of what must be the same for a checkpoint to be resumed."""
        return sha256_of_json(
            {
                "plan": self.plan.model_dump(mode="json"),
                # How long to go on and how often to look may change; what is learnt may not.
                "settings": self.settings.model_dump(
                    mode="json",
                    exclude={
                        "budget_minutes",
                        "steps",
                        "checkpoint_minutes",
                        "validations",
                        "validation_cases",
                        "device",
                    },
                ),
                "augment": self.augment.model_dump(mode="json"),
                "cases": [case.case_id for case in self.training],
            }
        )


@dataclass
class _State:
    """What changes from step to step."""

    network: nn.Module
    averaged: nn.Module
    optimiser: torch.optim.Optimizer
    step: int
    steps: int
    elapsed_s: float


@dataclass(frozen=True)
class TrainingResult:
    """Weights to keep (averaged, if that is on) and how the training went."""

    weights: dict[str, Tensor]
    steps: int
    elapsed_s: float
    dice: dict[str, float]


def train(task: TrainingTask, hardware: Hardware, observer: Observer, *, resume: bool) -> TrainingResult:
    """Train until the budget's steps are done; a checkpoint in `task.folder` lets it be resumed at any time.

    Raises:
        RunError: a checkpoint is there and `resume` is off, or it belongs to another plan or config.
        KeyboardInterrupt: after a checkpoint has been written.
    """
    fabric = Fabric(accelerator=hardware.device, devices=1, precision=hardware.precision)
    patches = _patches(task)
    loss = build_loss(task.settings.loss, class_count=task.plan.class_count)
    state = _start(task, fabric)
    checkpoint = task.folder / CHECKPOINT
    if checkpoint.exists():
        if not resume:
            raise RunError(f"{task.folder}: an unfinished training is here; give --resume, or another --out")
        _load(checkpoint, state, task)
        observer.note(f"resumed at step {state.step} of {state.steps}")
    else:
        state.steps = task.settings.steps or _timed_steps(task, fabric, patches, loss, observer)
    validate_at = {round(state.steps * (n + 1) / task.settings.validations) for n in range(task.settings.validations)}
    dice: dict[str, float] = {}
    started, saved = time.monotonic() - state.elapsed_s, time.monotonic()
    with _interruptible() as interrupted, _History(task.folder / HISTORY, state.step, observer) as history:
        for batch in prefetch(patches.batch, state.step, state.steps):
            rate = learning_rate(task.settings, state.step, state.steps)
            values = _update(task, fabric, state, loss, batch.to(fabric.device), rate)
            state.step += 1
            state.elapsed_s = time.monotonic() - started
            history.update(state, values, rate, len(batch))
            if state.step in validate_at:
                dice = validate(task, state.averaged, last=state.step == state.steps)
                history.add(state.step, {f"dice/{k}": v for k, v in dice.items()})
            if interrupted() or time.monotonic() - saved > 60 * task.settings.checkpoint_minutes:
                save_checkpoint(checkpoint, state, task)
                saved = time.monotonic()
            if interrupted():
                raise KeyboardInterrupt
        history.add(state.step, {"memory_gb": peak_memory_gb(hardware)})
    save_checkpoint(checkpoint, state, task)
    weights = {k: v.detach().cpu().clone() for k, v in state.averaged.state_dict().items()}
    return TrainingResult(weights, state.steps, state.elapsed_s, dice)


def learning_rate(settings: TrainConfig, step: int, steps: int) -> float:
    """Linear rise over the warm-up, then half a cosine to zero at the last step (Loshchilov and Hutter 2017)."""
    warm = max(1, round(settings.warmup * steps))
    if step < warm:
        return settings.learning_rate * (step + 1) / warm
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def average_decay(settings: TrainConfig, step: int) -> float:
    """Decay of the averaged weights: short at first, so that the random start is forgotten."""
    return min(settings.weight_average, (1 + step) / (10 + step)) if settings.weight_average else 0.0


def validate(task: TrainingTask, network: nn.Module, *, last: bool) -> dict[str, float]:
    """Mean Dice per label name and `mean`, on whole validation volumes on the plan's grid, without mirroring.

    Labels absent from both sides count nowhere; a label that occurs in no case is left out.
    """
    cases = task.validation if last else task.validation[: task.settings.validation_cases]
    window = WindowSettings(task.plan.patch_shape, task.plan.factor, task.tile_step, (), task.schema.twin_classes)
    per_case = []
    device = next(network.parameters()).device
    network.eval()
    with torch.inference_mode():
        for case in cases:
            scores = predict_windows(network, case.image.to(device), window)
            found = scores.argmax(dim=0).cpu().numpy()
            counts = confusion_counts(found, case.classes[0].numpy(), task.plan.class_count)
            per_case.append([float(x) for x in dice_from_counts(counts)[1:]])
    return _mean_dice(per_case, task.schema.names)


def save_checkpoint(path: Path, state: _State, task: TrainingTask) -> None:
    """Write all that a resumed run needs, atomically, as tensors and plain values (no pickled objects)."""
    document = {
        "format": CHECKPOINT_FORMAT,
        "key": task.key(),
        "step": state.step,
        "steps": state.steps,
        "elapsed_s": state.elapsed_s,
        "network": _bare(state.network).state_dict(),
        "averaged": state.averaged.state_dict(),
        "optimiser": state.optimiser.state_dict(),
        "torch_random": torch.get_rng_state(),
    }
    # In memory first: torch reports a full disk as a RuntimeError, a plain write as what it is.
    buffer = io.BytesIO()
    torch.save(document, buffer)
    with atomic_path(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def _patches(task: TrainingTask) -> Patches:
    return Patches(
        task.training,
        task.plan,
        augment=task.augment,
        twin_classes=task.schema.twin_classes,
        foreground_share=task.settings.foreground_share,
        seed=task.settings.seed,
    )


def _start(task: TrainingTask, fabric: Fabric) -> _State:
    shape = tuple(n for a, n in enumerate(task.plan.patch_shape) if a != task.plan.slice_axis)
    generator = torch.Generator().manual_seed(task.settings.seed)
    network = build_network(task.plan.network, task.plan.unet, shape, generator=generator)
    network = as_volume_network(network, task.plan.slice_axis)
    averaged = fabric.to_device(copy.deepcopy(network)).eval().requires_grad_(False)
    optimiser = _optimiser(network, task.settings)
    network, optimiser = fabric.setup(network, optimiser)
    torch.manual_seed(task.settings.seed)
    return _State(network, averaged, optimiser, step=0, steps=0, elapsed_s=0.0)


def _optimiser(network: nn.Module, settings: TrainConfig) -> torch.optim.Optimizer:
    """Weight decay is for kernels only: biases and normalisation scales have nothing to shrink for."""
    kernels = [p for p in network.parameters() if p.ndim > 1]
    others = [p for p in network.parameters() if p.ndim <= 1]
    groups = [{"params": kernels, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    if settings.optimiser == "sgd":
        return torch.optim.SGD(groups, lr=settings.learning_rate, momentum=SGD_MOMENTUM, nesterov=True)
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=ADAMW_BETAS)


def _update(
    task: TrainingTask, fabric: Fabric, state: _State, loss: Loss, batch: Batch, rate: float
) -> dict[str, Tensor]:
    for group in state.optimiser.param_groups:
        group["lr"] = rate
    state.network.train()
    state.optimiser.zero_grad(set_to_none=True)
    total, terms = deep_supervision_loss(loss, state.network(batch.images), batch.classes)
    fabric.backward(total)
    norm = fabric.clip_gradients(
        state.network, state.optimiser, max_norm=task.settings.gradient_norm, error_if_nonfinite=False
    )
    state.optimiser.step()
    _average(state, average_decay(task.settings, state.step))
    return {
        "loss": total.detach(),
        **{f"loss/{k}": v for k, v in terms.items()},
        "gradient_norm": torch.as_tensor(norm),
    }


@torch.no_grad()
def _average(state: _State, decay: float) -> None:
    current, averaged = _bare(state.network).state_dict(), state.averaged.state_dict()
    floats = [name for name, value in current.items() if value.is_floating_point()]
    torch._foreach_lerp_([averaged[n] for n in floats], [current[n] for n in floats], 1.0 - decay)
    for name in current.keys() - set(floats):
        averaged[name].copy_(current[name])


def _bare(network: nn.Module) -> nn.Module:
    """The network inside Fabric's wrapper."""
    inner = getattr(network, "module", network)
    if not isinstance(inner, nn.Module):
        raise TypeError("a wrapped network holds a network")
    return inner


def _timed_steps(task: TrainingTask, fabric: Fabric, patches: Patches, loss: Loss, observer: Observer) -> int:
    """The updates that `budget_minutes` hold: timed once, recorded at once, and from then on what the record says."""
    if task.settings.budget_minutes is None:
        raise RunError("train.steps and train.budget_minutes are both null; set one of them")
    record = {"key": task.key(), "budget_minutes": task.settings.budget_minutes}
    path = task.folder / STEPS
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        if {key: before[key] for key in record} == record:
            observer.note(f"{before['steps']} updates, as timed when this training began")
            return int(before["steps"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # none yet, or one that says nothing
    steps = _count_steps(task, fabric, patches, loss, observer)
    write_json(path, {**record, "steps": steps})
    return steps


def _count_steps(task: TrainingTask, fabric: Fabric, patches: Patches, loss: Loss, observer: Observer) -> int:
    """Timed on a throw-away start, so that the run is unaffected."""
    settings, minutes = task.settings, task.settings.budget_minutes or 0.0
    begin = time.monotonic()
    trial = _start(task, fabric)
    step_s = _time_updates(task, fabric, trial, patches, loss)
    stamp = time.monotonic()
    first = replace(task, validation=task.validation[:1])
    validate(first, trial.averaged, last=True)
    early = (settings.validations - 1) * min(settings.validation_cases, len(task.validation))
    validation_s = (time.monotonic() - stamp) * (early + len(task.validation))
    # The run itself starts from the seed, as if nothing had been timed.
    torch.manual_seed(settings.seed)
    left_s = 60 * minutes - (time.monotonic() - begin) - validation_s
    steps = max(settings.validations, int(left_s / step_s))
    observer.note(f"{step_s:.3f} s an update: {minutes:g} minutes hold {steps} updates")
    return steps


def _time_updates(task: TrainingTask, fabric: Fabric, trial: _State, patches: Patches, loss: Loss) -> float:
    """Median seconds an update, loading included, after some to warm up; a moment's disturbance does not count."""
    seconds = []
    stamp = time.monotonic()
    for batch in prefetch(patches.batch, 0, WARM_STEPS + TIMED_STEPS):
        _update(task, fabric, trial, loss, batch.to(fabric.device), 1e-6)
        if fabric.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.monotonic() - stamp)
        stamp = time.monotonic()
    return statistics.median(seconds[WARM_STEPS:])


def _load(path: Path, state: _State, task: TrainingTask) -> None:
    try:
        document = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged file makes torch raise is not to be listed
        raise RunError(f"{path}: not a readable checkpoint; delete it to start anew") from error
    if not isinstance(document, dict) or document.get("format") != CHECKPOINT_FORMAT:
        raise RunError(f"{path}: not a checkpoint of this version of volseg; delete it to start anew")
    if document["key"] != task.key():
        raise RunError(
            f"{path}: made with another plan, config or set of cases than this run's; "
            "use the same ones to resume, or another --out"
        )
    _bare(state.network).load_state_dict(document["network"])
    state.averaged.load_state_dict(document["averaged"])
    state.optimiser.load_state_dict(document["optimiser"])
    state.step, state.elapsed_s = document["step"], document["elapsed_s"]
    state.steps = task.settings.steps or document["steps"]
    torch.set_rng_state(document["torch_random"])


def _mean_dice(per_case: Sequence[Sequence[float]], names: Sequence[str]) -> dict[str, float]:
    means = {}
    for column, name in enumerate(names):
        scored = [row[column] for row in per_case if not math.isnan(row[column])]
        if scored:
            means[name] = sum(scored) / len(scored)
    if means:
        means["mean"] = sum(means.values()) / len(means)
    return means


class _History:
    """Rows of figures, appended to a file as they come and handed to the observer.

    On resume, rows beyond the checkpoint are dropped: their steps are done again.
    """

    def __init__(self, path: Path, step: int, observer: Observer) -> None:
        self._path, self._observer = path, observer
        self._pending: list[dict[str, Tensor]] = []
        self._stamp, self._patches = time.monotonic(), 0
        kept = [row for row in read_history(path) if row["step"] <= step]
        with atomic_path(path) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")

    def __enter__(self) -> _History:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def update(self, state: _State, values: dict[str, Tensor], rate: float, patches: int) -> None:
        """After each update; figures are averaged over some of them and the device is asked only then."""
        self._pending.append(values)
        self._patches += patches
        if state.step % LOGGED_EVERY and state.step != state.steps:
            return
        means = {k: float(torch.stack([row[k] for row in self._pending]).float().mean()) for k in values}
        now = time.monotonic()
        means |= {"learning_rate": rate, "patches_per_s": self._patches / max(1e-9, now - self._stamp)}
        self._pending, self._patches, self._stamp = [], 0, now
        self._observer.progress(state.step, state.steps, means["loss"])
        self.add(state.step, means)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Append one row."""
        try:
            with self._path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps({"step": step, **values}) + "\n")
        except OSError as error:
            raise explain_os_error(error, self._path) from error
        self._observer.metrics(step, values)


def read_history(path: Path) -> list[dict[str, Any]]:
    """The rows written so far; a last line cut short by a kill is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C into a flag that the loop asks for between updates; a second one ends at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    before = signal.getsignal(signal.SIGINT)

    def ask(_signal: int, _frame: object) -> None:
        asked.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, ask)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGINT, before)
