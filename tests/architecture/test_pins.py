"""constraints.txt pins every direct dependency, inside its range, at the version that is being tested."""

from __future__ import annotations

import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REQUIREMENTS = [Requirement(text) for text in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]]
PINS = dict(
    line.split("==")
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if not line.startswith("#")
)


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=lambda requirement: requirement.name)
def test_pin(requirement: Requirement) -> None:
    pinned = {canonicalize_name(name): pin for name, pin in PINS.items()}[canonicalize_name(requirement.name)]
    assert pinned in requirement.specifier
    assert Version(version(requirement.name)).public == pinned


def test_version_has_one_source() -> None:
    assert version("volseg") == PROJECT["version"]
