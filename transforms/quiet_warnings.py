"""Silence for Python warnings, whose filters belong to the whole process and know no threads before Python 3.14."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from transforms.process_wide import shared


@contextmanager
def _ignored() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


quiet_warnings = shared(_ignored)
"""No warning is shown while any thread is inside.

Libraries catch warnings too, uncounted. Where threads run beside each other, the one that starts them stays inside
until they have ended: whatever a library puts back is then as quiet.
"""
