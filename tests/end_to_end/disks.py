"""What a full and a read-only disk do, run as a script in a process of its own: it prints what happened as JSON.

Where the process may mount, the folder becomes a small file system of its own that really fills up and really turns
read-only. Elsewhere the system is told to let no file grow, which fails in the same places.
"""

from __future__ import annotations

import errno
import json
import resource
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

SIZE = "4m"


class Disk:
    """A folder whose room can be taken away."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", folder], capture_output=True)
        self.is_real = mounted.returncode == 0
        self._limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(self) -> None:
        if not self.is_real:
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, self._limits[1]))
            return
        try:
            with (self.folder / "ballast").open("wb", buffering=0) as stream:
                while stream.write(b"x" * 512):
                    pass
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise

    def free(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self._limits)
        (self.folder / "ballast").unlink(missing_ok=True)

    def turn_read_only(self) -> bool:
        """False where nothing can be mounted."""
        if self.is_real:
            subprocess.run(["mount", "-o", "remount,ro", self.folder], check=True)
        return self.is_real

    def turn_writable(self) -> None:
        if self.is_real:
            subprocess.run(["mount", "-o", "remount,rw", self.folder], check=True)


def refusal(act: Callable[[], Any]) -> str:
    """What an act was refused with, in volseg's words."""
    from pipeline.errors import RunError

    try:
        act()
    except RunError as error:
        return str(error)
    return "it was done"


class Listener:
    """Has things happen at some updates, and remembers what it is told."""

    def __init__(self, at: Mapping[int, Callable[[], Any]]) -> None:
        self.at, self.notes, self.steps = at, [], []

    def progress(self, step: int, steps: int, loss: float) -> None:
        self.at.get(step, lambda: None)()

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        self.steps.append(step)

    def note(self, message: str) -> None:
        self.notes.append(message)


def tell(disk: Disk, config: Path) -> dict[str, Any]:
    """A training that is refused its disk for a while, one that is refused it to the end, and what else writes."""
    from pipeline.checkpoint import CHECKPOINT
    from pipeline.config import load_config
    from pipeline.console import Silence
    from pipeline.crossval import _save
    from pipeline.runs import open_run, run_fold_cases
    from pipeline.task import TrainingTask
    from pipeline.train import train

    often = ["train.steps=60", "train.checkpoint_minutes=1e-9", f"data.cache={config.parent / 'warm'}"]
    run = open_run(load_config(config, often), disk.folder / "run", Silence())
    training, validation = run_fold_cases(run, 0, Silence())

    def task(name: str) -> TrainingTask:
        (disk.folder / name).mkdir(exist_ok=True)
        sections = {"settings": run.config.train, "augment": run.config.augment, "loss": run.config.loss}
        return TrainingTask(plan=run.plan, schema=run.dataset.manifest.labels, training=training, validation=validation,
                            tile_step=1.0, folder=disk.folder / name, **sections)  # fmt: skip

    def learn(name: str, listener: Listener, *, resume: bool = False) -> Any:
        return train(task(name), run.hardware, listener, resume=resume)

    def digest(weights: Mapping[str, Any]) -> str:
        return str([float(value.double().sum()) for value in weights.values()])

    told: dict[str, Any] = {"is_real": disk.is_real}
    undisturbed = learn("undisturbed", Listener({}))
    told["weights"] = digest(undisturbed.weights)

    for_a_while = Listener({20: disk.fill, 40: disk.free})
    told["for a while"] = digest(learn("while", for_a_while).weights)
    told["notes for a while"] = for_a_while.notes
    history = (disk.folder / "while" / "history.jsonl").read_text().splitlines()
    told["steps for a while"] = [json.loads(row)["step"] for row in history]

    to_the_end = Listener({20: disk.fill})
    told["to the end"] = refusal(lambda: learn("end", to_the_end))
    told["notes to the end"] = to_the_end.notes
    told["checkpoint is kept"] = (disk.folder / "end" / CHECKPOINT).exists()
    told["leftovers"] = [path.name for path in (disk.folder / "end").glob(".writing-*")]
    told["bundle"] = refusal(lambda: _save(run, 0, undisturbed))
    told["new run"] = refusal(lambda: open_run(load_config(config, often), disk.folder / "new", Silence()))
    told["cache"] = refusal(lambda: fill_cache(config, disk))
    disk.free()
    told["after space was made"] = digest(learn("end", Listener({}), resume=True).weights)

    if disk.turn_read_only():
        told["read-only"] = [
            refusal(lambda: learn("end", Listener({}), resume=True)),
            refusal(lambda: fill_cache(config, disk)),
        ]
        disk.turn_writable()
        meanwhile = Listener({20: disk.turn_read_only, 40: disk.turn_writable})
        told["read-only for a while"] = digest(learn("meanwhile", meanwhile).weights)
        told["notes read-only"] = meanwhile.notes
    return told


def fill_cache(config: Path, disk: Disk) -> None:
    """Preprocess into a cache on the disk."""
    from pipeline.config import load_config
    from pipeline.console import Silence
    from pipeline.runs import open_run, run_fold_cases

    run = open_run(load_config(config, [f"data.cache={disk.folder / 'cold'}"]), config.parent / "elsewhere", Silence())
    run_fold_cases(run, 0, Silence())


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    print(json.dumps(tell(Disk(Path(sys.argv[1])), Path(sys.argv[2]))))
