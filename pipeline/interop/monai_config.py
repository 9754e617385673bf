"""The configuration of a MONAI bundle, read as data: references are followed, no expression in it is ever run.

In such a file `@a#b` (or `@a::b`) stands for another value and `$...` is Python code. Of the code only what is
harmless is understood, by this module's own reading: a reference (`$@a`), a literal (`$[1, 2]`), the name of a type
of numbers (`$torch.float32`) and texts joined by + (`$@bundle_root + '/models'`). Everything else is refused by name
when its value is needed; what is never needed, as the device or the list of files, is never looked at. MONAI's own
ConfigParser evaluates, so it is not used.

Source: docs/source/mb_specification.rst and config_syntax.md of Project-MONAI/MONAI, version 1.6.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import BundleError

METADATA = "metadata.json"
INFERENCE = ("inference.json", "inference.yaml", "inference.yml")

_TERM = r"""@[\w:#.-]+|'[^'\\]*'|"[^"\\]*\""""
_REFERENCE = re.compile(r"@([\w:#.-]+)")
_ALIAS = re.compile(r"\$?\s*@([\w:#.-]+)")
_JOINED = re.compile(rf"(?:{_TERM})(?:\s*\+\s*(?:{_TERM}))+")
_NUMBERS = re.compile(r"(?:(?:torch|np|numpy)\.)?(u?int\d*|b?float\d*|half|double|short|long|bool_?)")
_SHOWN = 60


@dataclass(frozen=True)
class MonaiConfig:
    """A configuration file's content; `source` names it in errors."""

    document: Mapping[str, Any]
    source: str

    def has(self, key: str) -> bool:
        """Whether there is something at `a#b`."""
        try:
            self._at(key)
        except BundleError:
            return False
        return True

    def value(self, key: str) -> Any:
        """The value at `a#b`, with every reference in it followed.

        Raises:
            BundleError: there is none, or it needs code to be run, or refers to itself.
        """
        return self._resolved(self._at(key), key, (key,))

    def shallow(self, key: str) -> Any:
        """The value at `a#b`; what it holds is not looked into."""
        return self._at(key)

    def lead(self, key: str) -> tuple[str, Any] | None:
        """Where `a#b` leads and what stands there, not looked into; references on the way and at its end are followed.

        None where there is no such key.

        Raises:
            BundleError: a reference on the way leads nowhere, or to itself.
        """
        return self._led(key, ())

    def resolve(self, value: Any, key: str) -> Any:
        """A value that stands at `key`, with every reference in it followed; raises as `value`."""
        return self._resolved(value, key, (key,))

    def _at(self, key: str) -> Any:
        found: Any = self.document
        for part in _parts(key):
            if isinstance(found, Mapping) and part in found:
                found = found[part]
            elif isinstance(found, list) and part.isdecimal() and int(part) < len(found):
                found = found[int(part)]
            else:
                raise BundleError(f"{self.source}: there is no {key}")
        return found

    def _led(self, key: str, trail: tuple[str, ...]) -> tuple[str, Any] | None:
        if key in trail:
            raise BundleError(f"{self.source}: {key} refers to itself by way of {', '.join(trail)}")
        place, found = "", None
        for part in _parts(key):
            place = f"{place}#{part}" if place else part
            if not self.has(place):
                return None
            found = self._at(place)
            match = _ALIAS.fullmatch(found.strip()) if isinstance(found, str) else None
            if match is not None:
                led = self._led(match[1], (*trail, key))
                if led is None:
                    raise BundleError(f"{self.source}: {place} is '{_short(found)}', but there is no {match[1]}")
                place, found = led
        return place, found

    def _resolved(self, value: Any, key: str, trail: tuple[str, ...]) -> Any:
        if isinstance(value, Mapping):
            return {name: self._resolved(item, f"{key}#{name}", trail) for name, item in value.items()}
        if isinstance(value, list):
            return [self._resolved(item, f"{key}#{n}", trail) for n, item in enumerate(value)]
        if not isinstance(value, str):
            return value
        text = value.strip()
        if text.startswith("%"):
            raise BundleError(f"{self.source}: {key} is '{_short(text)}', a macro, which is not read; write its value")
        if text.startswith("$"):
            return self._evaluated(text[1:].strip(), key, trail)
        return self._followed(text, key, trail) if text.startswith("@") else value

    def _followed(self, text: str, key: str, trail: tuple[str, ...]) -> Any:
        match = _REFERENCE.fullmatch(text)
        if match is None or not all(_parts(match[1])):
            raise BundleError(f"{self.source}: {key} is '{_short(text)}', which is no reference that is understood")
        target = match[1]
        if target in trail:
            raise BundleError(f"{self.source}: {key} refers to itself by way of {', '.join(trail)}")
        return self._resolved(self._at(target), target, (*trail, target))

    def _evaluated(self, text: str, key: str, trail: tuple[str, ...]) -> Any:
        if _REFERENCE.fullmatch(text):
            return self._followed(text, key, trail)
        if numbers := _NUMBERS.fullmatch(text):
            return numbers[1]
        if _JOINED.fullmatch(text):
            parts = [self._term(term, key, trail) for term in re.findall(_TERM, text)]
            if all(isinstance(part, str) for part in parts):
                return "".join(parts)
        try:
            return ast.literal_eval(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            raise BundleError(
                f"{self.source}: {key} is code, '${_short(text)}', which is not run; give its value, as "
                f"--set {key}=VALUE (JSON)"
            ) from None

    def _term(self, term: str, key: str, trail: tuple[str, ...]) -> Any:
        return self._followed(term, key, trail) if term.startswith("@") else term[1:-1]


def read_monai_config(folder: Path, overrides: Sequence[str] = ()) -> MonaiConfig:
    """The inference configuration of a bundle, values replaced as `KEY=JSON` says.

    Raises:
        BundleError: there is none, it is not JSON or YAML, or an override is not as described.
    """
    places = [folder / "configs" / name for name in INFERENCE]
    found = next((path for path in places if path.is_file()), None)
    if found is None:
        raise BundleError(f"{folder}: no MONAI bundle with a configuration for inference (looked for {places[0]})")
    document = _read(found)
    for override in overrides:
        _replace(document, override)
    return MonaiConfig(document, str(found))


def read_metadata(folder: Path) -> MonaiConfig:
    """metadata.json of a bundle, in configs or beside it.

    Raises:
        BundleError: there is none, or it is not JSON.
    """
    places = [folder / "configs" / METADATA, folder / METADATA]
    found = next((path for path in places if path.is_file()), None)
    if found is None:
        raise BundleError(f"{folder}: no {METADATA}, which says what the network's channels mean")
    return MonaiConfig(_read(found), str(found))


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        document = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"{path}: cannot be read as text ({type(error).__name__})") from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise BundleError(f"{path}: not valid {path.suffix[1:].upper()}: {' '.join(str(error).split())}") from error
    if not isinstance(document, dict):
        raise BundleError(f"{path}: a configuration is a table of keys, found {type(document).__name__}")
    return document


def _replace(document: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not (key and separator):
        raise BundleError(f"--set {override}: expected KEY=VALUE, such as pixdim=[1.5,1.5,1.5]")
    try:
        value = json.loads(text)
    except ValueError as error:
        raise BundleError(f"--set {override}: the value is no JSON; texts are quoted, as '\"nearest\"'") from error
    *parents, last = _parts(key)
    found: Any = document
    for part in parents:
        found = _child(found, part)
    if isinstance(found, dict):
        found[last] = value
    elif isinstance(found, list) and last.isdecimal() and int(last) < len(found):
        found[int(last)] = value
    else:
        raise BundleError(f"--set {override}: the configuration has no {'#'.join(parents)}")


def _child(found: Any, part: str) -> Any:
    if isinstance(found, dict):
        return found.get(part)
    return found[int(part)] if isinstance(found, list) and part.isdecimal() and int(part) < len(found) else None


def _parts(key: str) -> list[str]:
    return re.split(r"#|::", key)


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
