"""Which code ran, in which versions, on which kind of machine; never who ran it or where."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_DECISIVE = ("volseg", "torch", "monai", "numpy")
_GIT_SECONDS = 5


def provenance_tags() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result, the platform, and the commit in a checkout."""
    tags = {name: found for name in _DECISIVE if (found := _version(name))}
    tags["python"] = platform.python_version()
    tags["platform"] = f"{platform.system()} {platform.release()} {platform.machine()}"
    if commit := git_commit():
        tags["git_commit"] = commit
    return tags


def git_commit(checkout: Path | None = None) -> str | None:
    """The commit of the checkout that this code runs from, with `-dirty` where tracked files differ from it.

    None for an installed package, without git, or where git does not answer.
    """
    checkout = checkout or Path(__file__).resolve().parents[1]
    # An installed package may lie inside someone else's repository.
    if not (checkout / ".git").exists():
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        answer = subprocess.run(
            command, capture_output=True, text=True, timeout=_GIT_SECONDS, stdin=subprocess.DEVNULL, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() or None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
