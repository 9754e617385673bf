"""What the output folder of `volseg predict` says of itself: which model made which study's files, from what."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import RunError
from pipeline.export import FORMATS
from pipeline.files import sha256_of_json, write_json
from pipeline.results import RECORD
from pipeline.studies import Study

Made = Mapping[str, bool | int | float | str]
"""Settings that change what results hold."""


@dataclass(frozen=True, eq=False)
class Record:
    """Of the folder `out`; `value` is what its file holds. One thread adds to it."""

    out: Path
    value: dict[str, Any]

    def is_of_another(self, study: Study, origin: str) -> bool:
        """Whether the folder holds a result of this name that was made from another input."""
        return bool(self.value["origins"].get(study.name, origin) != origin)

    def holds(self, study: Study, formats: Sequence[str], beside: Sequence[Path] = ()) -> bool:
        """Recorded, and not taken away since; `beside` are the files that are wanted beside the labels."""
        if not set(formats) <= set(self.value["studies"].get(study.name, [])):
            return False
        if not {path.name for path in beside} <= set(self.value["beside"].get(study.name, [])):
            return False
        labels = (self.out / f"{study.name}{FORMATS[name].suffix}" for name in formats)
        return all(path.exists() for path in (*labels, *beside))

    def add(self, study: Study, formats: Sequence[str], origin: str, beside: Sequence[Path] = ()) -> None:
        """Note, on disk too, that the files of a study are there, and those beside its labels.

        Raises:
            RunError: the folder cannot be written.
        """
        self.value["studies"][study.name] = sorted(formats)
        self.value["origins"][study.name] = origin
        self.value["missing"].pop(study.name, None)
        self.value["missing"] |= {study.name: list(study.missing)} if study.missing else {}
        # What was asked for before is there still.
        names = {*self.value["beside"].get(study.name, []), *(path.name for path in beside)}
        self.value["beside"] |= {study.name: sorted(names)} if names else {}
        write_json(self.out / RECORD, self.value)


def open_record(out: Path, model: Sequence[str], made: Made, *, usual: Made, force: bool) -> Record:
    """The record of a folder, or a new one; `usual` is what older records, which do not say, were made with.

    Raises:
        RunError: the folder holds results of another model or setting, and not `force`.
    """
    value: dict[str, Any] = {"model": list(model), **made, "studies": {}, "origins": {}, "missing": {}, "beside": {}}
    path = out / RECORD
    if force or not path.exists():
        return Record(out, value)
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(before, dict):
            raise TypeError
    except (OSError, ValueError, TypeError):
        before = {}
    same_setting = all(before.get(name, usual[name]) == wanted for name, wanted in made.items())
    if before.get("model") != value["model"] or not same_setting:
        raise RunError(f"{out}: holds results of another model or setting; choose another --out, or give --force")
    parts = ("studies", "origins", "missing", "beside")
    return Record(out, {**value, **{part: dict(before.get(part, {})) for part in parts}})


def origin_of(study: Study, *, series: str | None, resample_uneven: bool) -> str:
    """A digest of what a study is read from, so that inputs of one name are told apart; paths may name patients."""
    files = [path.stat() if path.is_file() else None for path in study.paths]
    return sha256_of_json(
        {
            "paths": [str(path.resolve()) for path in study.paths],
            "files": [found and [found.st_size, found.st_mtime_ns] for found in files],
            "series": study.series.series_uid if study.series else series,
            "stack": study.series.stack_number if study.series else None,
            "resample_uneven": resample_uneven,
        }
    )
