"""Amounts of memory as people write them."""

from __future__ import annotations

import re

from pipeline.errors import ConfigError

UNITS = {
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
"""Bytes, by unit in upper case."""


def bytes_of(text: str, option: str) -> int:
    """The bytes that a text such as 6GB, 5.5 GiB or 800MB means; `option` is named if it means nothing.

    Raises:
        ConfigError: no number above 0 with one of the units.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", text)
    unit = UNITS.get(found[2].upper()) if found else None
    size = int(float(found[1]) * unit) if found and unit else 0
    if size < 1:
        raise ConfigError(f"{option} {text}: expected a number and a unit, as 6GB, 5.5GiB or 800MB")
    return size
