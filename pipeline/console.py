"""What a stage may tell while it works. The command line has one implementation, silence is the other."""

from __future__ import annotations

from typing import Protocol


class Console(Protocol):
    """Told of progress and of what is worth reading; identities of patients are never handed to it."""

    def progress(self, what: str, done: int, total: int, detail: str = "") -> None:
        """`done` of `total` of `what`."""

    def note(self, message: str) -> None:
        """One line worth reading."""


class Silence:
    """Tells nothing."""

    def progress(self, what: str, done: int, total: int, detail: str = "") -> None:
        """Nothing."""

    def note(self, message: str) -> None:
        """Nothing."""
