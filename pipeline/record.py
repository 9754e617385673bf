"""What the output folder of `volseg predict` says of itself: which model made which study's files, from what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pipeline.errors import RunError
from pipeline.export import FORMATS
from pipeline.files import safe_name, sha256_of_json
from pipeline.growing_json import change_object, fold_object, read_object, replace_object
from pipeline.quality import QualityEstimate, read_quality
from pipeline.results import RECORD, SOURCES, forget_sources
from pipeline.studies import Study

Made = Mapping[str, bool | int | float | str]
"""Settings that change what results hold."""

_PARTS = ("studies", "origins", "missing", "beside", "kept_scores")
"""Of a record, by study."""


@dataclass(frozen=True)
class Beside:
    """What is wanted beside the labels of a study: files, and of how many outputs a voxel scores are kept."""

    files: tuple[Path, ...] = ()
    kept_scores: int = 0


@dataclass(eq=False)
class Record:
    """Of the folder `out`; `value` is what it says there. With `force` all that is asked for is made again. `foreign`
    are the names of files that lay there before there was a record. One thread adds to it.

    A study costs a line in a journal; leaving its `with` brings file and journal together. `is_on_disk`: the folder's
    record is of this model and these settings, which are then not written once more.
    """

    out: Path
    value: dict[str, Any]
    force: bool
    foreign: frozenset[str] = frozenset()
    is_on_disk: bool = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if (self.out / RECORD).exists():
                fold_object(self.out / RECORD)
            fold_object(self.out / SOURCES)
        except RunError:
            # What ended the work is worth more than that it stays in the journal.
            if kind is None:
                raise

    def begin(self, study: Study) -> None:
        """Have the record on disk before the first result is: what lies there from now on is a result. Of a study that
        is made again it says nothing from now on, until all of it is there.

        Raises:
            RunError: the folder cannot be written.
        """
        if not self.is_on_disk:
            replace_object(self.out / RECORD, self.value)
            self.is_on_disk = True
        if self.force:
            if study.name in self.value["studies"]:
                self._change(study, {})
            # Another model's record, of which nothing is left, may have known it.
            forget_sources(self.out, study.name)

    def in_the_way(self, study: Study, formats: Sequence[str]) -> str | None:
        """Why the results of a study cannot be written: one would replace what it is read from, which `force` does not
        change either, or a file that is no result."""
        for target in (self.out / f"{study.name}{FORMATS[name].suffix}" for name in formats):
            if target.exists() and any(target.samefile(path) for path in study.paths if path.exists()):
                return f"{target} is what is to be segmented, and its result would replace it; choose another --out"
            if target.name in self.foreign and not self.force:
                return f"{target} exists already and is no result of volseg; choose another --out, or give --force"
        return None

    def is_of_another(self, study: Study, origin: str) -> bool:
        """Whether the folder holds a result of this name that was made from another input, and is to stay."""
        return not self.force and bool(self.value["origins"].get(study.name, origin) != origin)

    def vouches_for(self, study: Study) -> bool:
        """Whether what lies there of a study was made as the record says, and is to stay."""
        return not self.force and study.name in self.value["studies"]

    def holds(self, study: Study, formats: Sequence[str], beside: Beside) -> bool:
        """Recorded, not taken away since, and not to be made again."""
        if self.force or not set(formats) <= set(self.value["studies"].get(study.name, [])):
            return False
        if not {path.name for path in beside.files} <= set(self.value["beside"].get(study.name, [])):
            return False
        if beside.kept_scores > self.value["kept_scores"].get(study.name, 0):
            return False
        labels = (self.out / f"{study.name}{FORMATS[name].suffix}" for name in formats)
        return all(path.exists() for path in (*labels, *beside.files))

    def add(self, study: Study, formats: Sequence[str], origin: str, beside: Beside) -> None:
        """Note, on disk too, that the files of a study are there, and those beside its labels.

        Raises:
            RunError: the folder cannot be written.
        """
        names, kept_scores = {path.name for path in beside.files}, beside.kept_scores
        if self.vouches_for(study):
            # What was asked for before is there still.
            names |= set(self.value["beside"].get(study.name, []))
            kept_scores = kept_scores or self.value["kept_scores"].get(study.name, 0)
        facts: dict[str, Any] = {"studies": sorted(formats), "origins": origin}
        facts |= {"missing": list(study.missing)} if study.missing else {}
        facts |= {"beside": sorted(names)} if names else {}
        self._change(study, facts | ({"kept_scores": kept_scores} if kept_scores else {}))

    def _change(self, study: Study, facts: Mapping[str, Any]) -> None:
        """Say this of a study, on disk too, and nothing else."""
        change_object(self.out / RECORD, {part: {study.name: facts.get(part)} for part in _PARTS})
        for part in _PARTS:
            self.value[part].pop(study.name, None)
        for part, fact in facts.items():
            self.value[part][study.name] = fact


def open_record(out: Path, model: Sequence[str], made: Made, *, usual: Made, force: bool) -> Record:
    """The record of a folder, or a new one; `usual` is what older records, which do not say, were made with.

    Raises:
        RunError: the folder holds results of another model or setting, and not `force`.
    """
    value: dict[str, Any] = {"model": list(model), **made, **{part: {} for part in _PARTS}}
    before = _read(out)
    is_same = before.get("model") == value["model"]
    is_same &= all(before.get(name, usual[name]) == wanted for name, wanted in made.items())
    if is_same:
        value |= {part: dict(before.get(part, {})) for part in _PARTS}
    elif (out / RECORD).exists() and not force:
        raise RunError(f"{out}: holds results of another model or setting; choose another --out, or give --force")
    is_fresh = out.is_dir() and not (out / RECORD).exists()
    foreign = frozenset(path.name for path in out.iterdir()) if is_fresh else frozenset()
    return Record(out, value, force, foreign, is_on_disk=is_same and value.keys() <= before.keys())


def recorded_quality(out: Path) -> dict[str, QualityEstimate]:
    """What is expected of the studies that a folder records, by the model that it records.

    Raises:
        RunError: an estimate is damaged.
    """
    record = _read(out)
    names, models = {safe_name(name) for name in record.get("studies", {})}, tuple(record.get("model", ()))
    return {name: found for name, found in read_quality(out).items() if name in names and found.models == models}


def _read(out: Path) -> dict[str, Any]:
    """What a folder's record says; nothing where there is none, or it is damaged."""
    with suppress(RunError):
        return read_object(out / RECORD)
    return {}


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
