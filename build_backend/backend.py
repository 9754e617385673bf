"""setuptools' build backend; before it builds, it brings in NiiVue's script, which the repository does not hold.

Without a way to fetch it the build goes on, and `volseg view` says what is missing.
"""

from __future__ import annotations

import sys
from typing import Any

from npm import NODE_WHEEL, NpmError, is_vendored, npm_command, vendor_niivue
from setuptools import build_meta

Settings = dict[str, Any] | None

get_requires_for_build_sdist = build_meta.get_requires_for_build_sdist
prepare_metadata_for_build_wheel = build_meta.prepare_metadata_for_build_wheel
prepare_metadata_for_build_editable = build_meta.prepare_metadata_for_build_editable


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    """npm's Python package is asked for only where npm is needed and missing."""
    return [*build_meta.get_requires_for_build_wheel(config_settings), *_npm_requirement()]


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    """As for a wheel."""
    return [*build_meta.get_requires_for_build_editable(config_settings), *_npm_requirement()]


def build_sdist(sdist_directory: str, config_settings: Settings = None) -> str:
    """The sources, with the script if it is there already."""
    return build_meta.build_sdist(sdist_directory, config_settings)


def build_wheel(wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None) -> str:
    """A wheel that holds the script."""
    _vendor()
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(
    wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None
) -> str:
    """An editable install; the script lies in the checkout, where git ignores it."""
    _vendor()
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)


def _npm_requirement() -> list[str]:
    return [] if is_vendored() or npm_command() else [NODE_WHEEL]


def _vendor() -> None:
    try:
        vendor_niivue()
    except NpmError as error:
        print(f"warning: built without NiiVue, so `volseg view` will not run: {error}", file=sys.stderr)
