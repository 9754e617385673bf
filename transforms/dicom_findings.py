"""A finding: one named fault of a DICOM series, and the words for its evidence."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transforms.dicom_header import Header

Outcome = Literal["mend", "ask", "refuse"]
Headers = Sequence[Header]

NAMED = 3
"""So many files are named in an evidence."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A named fault: mended (the volume is right), asked (the caller must choose) or refused."""

    name: str
    outcome: Outcome
    evidence: str

    def __str__(self) -> str:
        return f"{self.name}: {self.evidence}"


def names(paths: Sequence[Path]) -> str:
    """A few file names, for evidence."""
    shown = [path.name for path in paths[:NAMED]]
    rest = len(paths) - len(shown)
    return ", ".join(shown) + (f" and {rest} more" if rest else "")


def files(headers: Headers) -> str:
    """A few of the files that these slices lie in, for evidence."""
    return names(list(dict.fromkeys(header.path for header in headers)))


def slice_name(header: Header) -> str:
    """What a slice is called: its file, and its frame in a file of several."""
    return header.path.name if header.frame is None else f"frame {header.frame} of {header.path.name}"


def ask(name: str, evidence: str) -> Finding:
    """What only the caller can decide."""
    return Finding(name, "ask", evidence)


def refuse(name: str, evidence: str) -> Finding:
    """A fault that keeps the series from being read."""
    return Finding(name, "refuse", evidence)


def mend(name: str, evidence: str) -> Finding:
    """A fault that was set right."""
    return Finding(name, "mend", evidence)


def is_refused(findings: Iterable[Finding]) -> bool:
    """Whether any finding keeps the series from being read."""
    return any(finding.outcome != "mend" for finding in findings)


def where(headers: Headers, test: Callable[[Header], bool]) -> list[Header]:
    """The slices for which `test` holds."""
    return [header for header in headers if test(header)]


def distinct(headers: Headers, value: Callable[[Header], object]) -> list[str]:
    """The different values of something, in order."""
    return sorted({str(value(header)) for header in headers})
