"""A JSON object on disk that grows entry by entry, each at the same cost however many there are.

A change is a line that is appended to a journal beside the file, NAME.jsonl of NAME.json, and once it is there it is
not lost. Now and then the two are folded into the file alone, which is what others than volseg read. A line is a JSON
merge patch (RFC 7396): members that are objects are merged, others put in place, and null takes away. To apply lines
once more changes nothing, so a kill may come anywhere in between.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import RunError
from pipeline.files import explain_os_error, json_text, write_json
from pipeline.line_file import LineFile, read_lines


def journal_of(file: Path) -> Path:
    """Where the changes lie that are not yet in a file."""
    return file.with_suffix(".jsonl")


def read_object(file: Path) -> dict[str, Any]:
    """The object of a file with all changes; empty where there is none.

    Raises:
        RunError: the file or its journal is damaged.
    """
    journal = journal_of(file)
    # First: what another process folds into the file in between is then there twice, and not lost.
    lines = read_lines(journal)
    try:
        value: Any = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    except (OSError, ValueError):
        value = None
    if not isinstance(value, dict):
        raise RunError(f"{file}: not a JSON object; it is damaged, take it away")
    for number, line in enumerate(lines, start=1):
        try:
            change: Any = json.loads(line)
        except ValueError:
            change = None
        if not isinstance(change, dict):
            raise RunError(f"{journal}: line {number} is no JSON object; it is damaged, take it away")
        _merge(value, change)
    return value


def change_object(file: Path, change: Mapping[str, Any]) -> int:
    """Have a change on disk; gives how long the journal is now, in bytes.

    Raises:
        RunError: the folder cannot be written.
    """
    lines = LineFile(journal_of(file))
    lines.append(json_text(change).encode())
    return lines.size_bytes


def fold_object(file: Path) -> None:
    """Have all changes in the file itself.

    Raises:
        RunError: the folder cannot be written, or the file or its journal is damaged.
    """
    if journal_of(file).exists():
        write_json(file, read_object(file))
        _discard(journal_of(file))


def replace_object(file: Path, value: Mapping[str, Any]) -> None:
    """Have another object in the place of what is there.

    Raises:
        RunError: the folder cannot be written.
    """
    journal = journal_of(file)
    if journal.exists():
        # What the journal took back must not be believed again, nor its lines of the new object.
        try:
            before = read_object(file)
        except RunError:
            before = {}
        write_json(file, before)
        _discard(journal)
    write_json(file, value)


def _merge(value: dict[str, Any], change: Mapping[str, Any]) -> None:
    for name, new in change.items():
        if new is None:
            value.pop(name, None)
        elif isinstance(new, dict):
            if not isinstance(value.get(name), dict):
                value[name] = {}
            _merge(value[name], new)
        else:
            value[name] = new


def _discard(journal: Path) -> None:
    try:
        journal.unlink(missing_ok=True)
    except OSError as error:
        raise explain_os_error(error, journal) from error
