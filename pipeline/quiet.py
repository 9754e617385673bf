"""Silence for the DICOM and network libraries: their warnings and log lines may quote patients, addresses, queries."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from transforms.process_wide import shared
from transforms.quiet_warnings import quiet_warnings

_LOGGERS = ("highdicom", "pydicom", "pynetdicom", "dicomweb_client", "urllib3", "requests", "keyring")


@contextmanager
def quiet() -> Iterator[None]:
    """No warning and no log line of these libraries inside. What matters is judged by reading back, or raised."""
    with quiet_warnings(), _quiet_loggers():
        yield


@contextmanager
def _silenced() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


_quiet_loggers = shared(_silenced)
