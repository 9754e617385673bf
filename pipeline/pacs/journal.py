"""What an archive has acknowledged, line by line on disk, so that a send that was cut off goes on where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import RunError
from pipeline.files import explain_os_error, write_text
from pipeline.pacs.node import Node

_FORMAT = "volseg send journal 1"


def journal_path(data: Path, node: Node) -> Path:
    """Where the journal of sending `data` to `node` lies unless it is said: beside the data, hidden."""
    data = data.resolve()
    return data.parent / f".{data.name}.sent-{node.key}.jsonl"


@dataclass(frozen=True)
class Journal:
    """A file of JSON lines: the node, then each SOP Instance UID that the node acknowledged."""

    path: Path
    node: Node

    def read(self) -> set[str]:
        """The acknowledged instances; a last line that was cut short is left out.

        Raises:
            RunError: the file is another node's, or no journal.
        """
        try:
            lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        except FileNotFoundError:
            return set()
        except OSError as error:
            raise RunError(f"{self.path}: {(error.strerror or 'cannot be read').lower()}; see --journal") from error
        rows = [row for row in map(_row, lines) if row is not None]
        if lines and (not rows or rows[0].get("format") != _FORMAT or rows[0].get("node") != str(self.node)):
            raise RunError(f"{self.path}: not the journal of sends to {self.node}; give another --journal")
        return {row["sop_instance_uid"] for row in rows[1:] if isinstance(row.get("sop_instance_uid"), str)}

    def add(self, sop_instance_uids: Iterable[str]) -> None:
        """Note instances as acknowledged; they are on disk when this returns.

        Raises:
            RunError: the file cannot be written.
        """
        rows = [{"sop_instance_uid": uid} for uid in sop_instance_uids]
        if not rows:
            return
        if not self.path.exists():
            write_text(self.path, json.dumps({"format": _FORMAT, "node": str(self.node)}) + "\n")
        try:
            with self.path.open("rb+") as stream:
                stream.seek(-1, os.SEEK_END)
                if stream.read(1) != b"\n":
                    stream.write(b"\n")
                stream.write("".join(json.dumps(row) + "\n" for row in rows).encode())
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise explain_os_error(error, self.path) from error


def _row(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None
