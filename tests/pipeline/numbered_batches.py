"""Batches that hold their number, from sources that die, hang or refuse: light, as other processes import it."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.batch import Batch
from pipeline.errors import VolumeError


@dataclass(frozen=True)
class Numbers:
    """Batch n holds n; some do something first, as often as there are lives in `folder`."""

    folder: Path
    deeds: tuple[tuple[int, str], ...] = ()
    lives: int = 1

    def batch(self, number: int) -> Batch:
        for deed in [deed for at, deed in self.deeds if at == number]:
            done = len(list(self.folder.glob(f"{number}-*")))
            if done < self.lives:
                (self.folder / f"{number}-{done}").touch()
                self.do(deed)
        return numbered(number)

    def do(self, deed: str) -> None:
        if deed == "refuse":
            raise VolumeError("case of_2: two channels differ")
        if deed == "divide":
            raise ZeroDivisionError("by nothing\nat all")
        if deed == "exit":
            os._exit(7)
        os.kill(os.getpid(), signal.Signals[deed])

    def case_ids(self, number: int) -> tuple[str, ...]:
        return (f"of_{number}", f"of_{number}")

    def recipe(self) -> tuple[str, dict[str, Any]]:
        deeds = [list(deed) for deed in self.deeds]
        return f"{__name__}:numbers", {"folder": str(self.folder), "deeds": deeds, "lives": self.lives}


def numbers(folder: str, deeds: list[list[Any]], lives: int) -> Numbers:
    return Numbers(Path(folder), tuple((at, deed) for at, deed in deeds), lives)


class Unloadable:
    """Cannot be received by another process."""

    def recipe(self) -> tuple[str, dict[str, Any]]:
        return "os:_exit", {"status": 3}

    def batch(self, number: int) -> Batch:
        return numbered(number)

    def case_ids(self, number: int) -> tuple[str, ...]:
        return (str(number),)


def numbered(number: int) -> Batch:
    # Batches grow, so that the memory that is shared has to as well.
    images = torch.full((1, 1, number + 1, 2, 2), float(number))
    return Batch(images, images.to(torch.uint16), torch.ones(1, 3, dtype=torch.bool), (f"of_{number}",))


def same(a: Batch, b: Batch) -> bool:
    pairs = [(a.images, b.images), (a.classes, b.classes), (a.annotated, b.annotated)]
    return a.case_ids == b.case_ids and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs)
