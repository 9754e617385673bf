"""Amounts of memory as people write them."""

from __future__ import annotations

import pytest

from pipeline.errors import ConfigError
from pipeline.memory_size import bytes_of


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("6GB", 6_000_000_000),
        ("6 gb", 6_000_000_000),
        ("5.5GiB", 5_905_580_032),
        ("800MB", 800_000_000),
        ("512MiB", 536_870_912),
        ("1TB", 10**12),
        (" 2.31GB ", 2_310_000_000),
    ],
)
def test_a_number_and_a_unit(text: str, expected: int) -> None:
    assert bytes_of(text, "--max-memory") == expected


@pytest.mark.parametrize(
    "text", ["", "6", "GB", "6G", "-1GB", "0GB", "6,5GB", "1e3MB", "six GB", "6GB or so", "nan GB"]
)
def test_anything_else_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(ConfigError) as error:
        bytes_of(text, "--max-memory")
    assert str(error.value) == f"--max-memory {text}: expected a number and a unit, as 6GB, 5.5GiB or 800MB"
