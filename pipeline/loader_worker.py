"""A process that makes batches: it is sent numbers and answers each, until nobody is there to send more.

It starts from nothing (no fork), so that neither threads nor a GPU of its parent are in its way, and knows its parent
only by a socket: when the parent is gone, however it went, the socket ends and so does the process.
"""

from __future__ import annotations

import importlib
import io
import json
import mmap
import os
import signal
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.loader_memory import Slot
    from pipeline.loader_team import Source


def main(socket: int, source_memory: int, slots: Sequence[int]) -> None:
    """Answer numbers that come through `socket` with batches in the memory of `slots`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which tells its workers
    connection: Connection[Any, Any] = Connection(socket)
    try:
        import torch

        from pipeline.loader_memory import Slot

        torch.set_num_threads(1)
        source = _load(source_memory)
        places = [Slot(handle) for handle in slots]
        connection.send_bytes(b'{"ready": true}')
        while True:
            number, place = json.loads(connection.recv_bytes())
            connection.send_bytes(json.dumps(_answer(source, number, places[place])).encode())
    except (EOFError, ConnectionError):
        return  # the parent is gone


def _answer(source: Source, number: int, slot: Slot) -> dict[str, Any]:
    try:
        return slot.write(source.batch(number))
    except Exception as error:  # whatever it is, the parent raises it
        return {"error": type(error).__name__, "message": str(error), "traceback": traceback.format_exc()}


def _load(memory: int) -> Source:
    import torch

    # All processes share one place in the file, so each reads it through a map of its own.
    with mmap.mmap(memory, os.fstat(memory).st_size) as content:
        name, values = torch.load(io.BytesIO(content), weights_only=True)
    module, _, function = name.partition(":")
    source: Source = getattr(importlib.import_module(module), function)(**values)
    return source
