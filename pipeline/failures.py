"""Cases and studies that are set aside while the others go on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Failure:
    """A case that was set aside, and why, in one line."""

    case_id: str
    reason: str


def describe_failures(failures: Sequence[Failure]) -> list[dict[str, str]]:
    """JSON rows of cases that were set aside."""
    return [asdict(failure) for failure in failures]
