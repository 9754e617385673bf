"""What the output folder of `volseg predict` says of itself: which model made which study's files, from what."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pipeline.confidence_files import MAPS, SCORES
from pipeline.errors import RunError
from pipeline.export import COPIES, FORMATS, path_of
from pipeline.files import UNFINISHED, safe_name, sha256_of_json
from pipeline.growing_json import change_object, fold_object, read_object, replace_object
from pipeline.quality import QUALITY, QUALITY_CSV, QualityEstimate, quality_file, read_quality
from pipeline.results import RECORD, SOURCES, forget_sources
from pipeline.studies import Study
from transforms.dicom_magic import is_dicom
from transforms.errors import VolumeError

Made = Mapping[str, bool | int | float | str]
"""Settings that change what results hold."""

_PARTS = ("studies", "origins", "missing", "beside", "kept_scores", "begun")
"""Of a record, by study. `begun` names files of volseg's own that the record does not vouch for: those of a study that
was being written, or that another model had made."""

_TABLE = "table"
"""Of a record: whether the table of estimates in its folder is volseg's."""

_RESULT_ENDS = (*(form.suffix for form in FORMATS.values()), f".{COPIES}", ".json", ".jsonl", ".csv")
_RESULT_FOLDERS = (MAPS, SCORES, QUALITY)


@dataclass(frozen=True)
class Beside:
    """What is wanted beside the labels of a study: files, and of how many outputs a voxel scores are kept."""

    files: tuple[Path, ...] = ()
    kept_scores: int = 0


@dataclass(frozen=True)
class Origin:
    """What a study is read from, as a digest. `by_paths` is the one that older records hold, which know of a folder, or
    of voxels beside their header, no more than where they are; the same where a study has neither."""

    digest: str
    by_paths: str


@dataclass(eq=False)
class Record:
    """Of the folder `out`; `value` is what it says there. With `force` all that is asked for is made again. `is_fresh`:
    the folder was there before it had a record. One thread adds to it.

    A study costs two lines in a journal, one when it is begun; leaving its `with` brings file and journal together.
    `is_on_disk`: the folder's record is of this model and these settings, which are then not written once more.
    """

    out: Path
    value: dict[str, Any]
    force: bool
    is_fresh: bool = False
    is_on_disk: bool = False
    _doubted: set[str] = field(default_factory=set)

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

    def begin(self, study: Study, files: Collection[Path]) -> None:
        """Have on disk which files of a study are to be written before the first is: they are volseg's from now on. Of
        a study that is made again the record says nothing else from now on, until all of it is there.

        Raises:
            RunError: the folder cannot be written.
        """
        left = self.ours(study)
        if not self.is_on_disk:
            replace_object(self.out / RECORD, self.value)
            self.is_on_disk = True
        if self._has_estimate(study, files) and not self.owns_table:
            change_object(self.out / RECORD, {_TABLE: True})
            self.value[_TABLE] = True
        is_kept = self.vouches_for(study)
        kept = {part: self.value[part][study.name] for part in _PARTS if is_kept and study.name in self.value[part]}
        self._change(study, kept | {"begun": sorted(left | {path.name for path in files})})
        if (left and not is_kept) or self.force:
            # Another model's record, of which nothing is left, may have known it.
            forget_sources(self.out, study.name)

    def ours(self, study: Study) -> frozenset[str]:
        """Names of the files of a study that volseg made, or was at when it was cut short, whatever made them."""
        return frozenset(_files_of(self.value, study.name))

    def unvouched(self) -> dict[str, list[str]]:
        """By study, the files of those of which some lie here that another model made, or no one who finished."""
        left = {name: files for name, files in self.value["begun"].items() if name not in self.value["studies"]}
        return {name: files for name, files in left.items() if any((self.out / file).exists() for file in files)}

    def in_the_way(self, study: Study, files: Collection[Path]) -> str | None:
        """Why the files of a study cannot be written: one would replace what it is read from, which `force` does not
        change either, or a file that is no result."""
        ours = self.ours(study) | ({QUALITY_CSV} if self.owns_table else set())
        table = [self.out / QUALITY_CSV] if self._has_estimate(study, files) else []
        for target in filter(Path.exists, (*files, *table)):
            if any(target.samefile(path) for path in study.paths if path.exists()):
                return f"{target} is what is to be segmented, and its result would replace it; choose another --out"
            if target.name not in ours and not self.force:
                return f"{target} exists already and is no result of volseg; choose another --out, or give --force"
        return None

    @property
    def owns_table(self) -> bool:
        """Whether the table of estimates in the folder is volseg's, to be written and taken away."""
        return bool(self.value[_TABLE])

    def doubt(self, study: Study, origin: Origin) -> None:
        """Have a study made again of which the record does not say from which content it was made."""
        if origin.digest != self.value["origins"].get(study.name) == origin.by_paths:
            self._doubted.add(study.name)

    def is_of_another(self, study: Study, origin: Origin) -> bool:
        """Whether the folder holds a result of this name that was made from another input, and is to stay."""
        if self._is_again(study) or study.name not in self.value["origins"]:
            return False
        # The same files, each as the image of another channel, are another input.
        missing = self.value["missing"].get(study.name, [])
        return bool(self.value["origins"][study.name] != origin.digest or list(study.missing) != missing)

    def vouches_for(self, study: Study) -> bool:
        """Whether what lies there of a study was made as the record says, and is to stay."""
        return not self._is_again(study) and study.name in self.value["studies"]

    def holds(self, study: Study, formats: Sequence[str], beside: Beside) -> bool:
        """Recorded in all that these formats mean, not taken away since, and not to be made again."""
        if self._is_again(study) or not set(formats) <= set(self.value["studies"].get(study.name, [])):
            return False
        if not {path.name for path in beside.files} <= set(self.value["beside"].get(study.name, [])):
            return False
        if beside.kept_scores > self.value["kept_scores"].get(study.name, 0):
            return False
        labels = (path_of(self.out, study.name, name) for name in formats)
        return all(path.exists() for path in (*labels, *beside.files))

    def add(self, study: Study, formats: Sequence[str], origin: Origin, beside: Beside) -> None:
        """Note, on disk too, that the files of a study are there, and those beside its labels.

        Raises:
            RunError: the folder cannot be written.
        """
        made, names, kept_scores = set(formats), {path.name for path in beside.files}, beside.kept_scores
        if self.vouches_for(study):
            # What was asked for before is there still.
            made |= set(self.value["studies"][study.name])
            names |= set(self.value["beside"].get(study.name, []))
            kept_scores = kept_scores or self.value["kept_scores"].get(study.name, 0)
        facts: dict[str, Any] = {"studies": sorted(made), "origins": origin.digest}
        facts |= {"missing": list(study.missing)} if study.missing else {}
        facts |= {"beside": sorted(names)} if names else {}
        self._change(study, facts | ({"kept_scores": kept_scores} if kept_scores else {}))

    def _is_again(self, study: Study) -> bool:
        return self.force or study.name in self._doubted

    def _has_estimate(self, study: Study, files: Collection[Path]) -> bool:
        return quality_file(self.out, study.name) in files

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
    has_record = (out / RECORD).exists()
    before = _read(out)
    # Of a record that was taken away a journal says nothing.
    left = {name: sorted(_files_of(before, name)) for name in _known(before)} if has_record else {}
    has_table = before.get(_TABLE) is True or any(quality_file(out, name).name in files for name, files in left.items())
    value: dict[str, Any] = {"model": list(model), **made, **{part: {} for part in _PARTS}, _TABLE: has_table}
    is_same = before.get("model") == value["model"]
    is_same &= all(before.get(name, usual[name]) == wanted for name, wanted in made.items())
    if is_same:
        value |= {part: dict(before.get(part, {})) for part in _PARTS}
    elif has_record and not force:
        raise RunError(f"{out}: holds results of another model or setting; choose another --out, or give --force")
    else:
        value["begun"] = left
    is_fresh = out.is_dir() and not has_record
    return Record(out, value, force, is_fresh, is_on_disk=is_same and value.keys() <= before.keys())


def _known(record: Mapping[str, Any]) -> list[str]:
    """The studies of which a record says anything about files."""
    return list(dict.fromkeys(name for part in ("studies", "begun") for name in record.get(part) or {}))


def _files_of(record: Mapping[str, Any], name: str) -> set[str]:
    """The names of the files that a record calls its own of a study."""
    formats, *others = ((record.get(part) or {}).get(name, []) for part in ("studies", "beside", "begun"))
    labels = {path_of(Path(), name, key).name for key in formats if key in FORMATS or key == COPIES}
    return labels.union(*others)


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


def origin_of(study: Study, out: Path, *, series: str | None, resample_uneven: bool) -> Origin:
    """Digests of what a study is read from, so that inputs of one name are told apart; paths may name patients.

    No header of a slice is read: a file is its name, its size and when it was changed. Results in `out`, which may lie
    in the folder of the study, are no part of it.
    """
    files = [path.stat() if path.is_file() else None for path in study.paths]
    known = {
        "paths": [str(path.resolve()) for path in study.paths],
        "files": [found and [found.st_size, found.st_mtime_ns] for found in files],
        "series": study.series.series_uid if study.series else series,
        "stack": study.series.stack_number if study.series else None,
        "resample_uneven": resample_uneven,
    }
    by_paths = sha256_of_json(known)
    content = [sorted(_content(study, path, out)) for path in study.paths]
    return Origin(sha256_of_json(known | {"content": content}) if any(content) else by_paths, by_paths)


_File = tuple[str, int, int]
"""Name, size in bytes, and when it was changed in ns."""


def _content(study: Study, path: Path, out: Path) -> Iterator[_File]:
    """The files that are read for a path, other than itself."""
    if study.series is not None:
        # Found by one index of a tree that many studies share, which is not walked again for each.
        files: Iterator[Path] = iter(dict.fromkeys(study.series.paths))
    elif path.is_dir():
        files = _files_below(path, out)
    else:
        files = _detached_voxels(path)
    for file in files:
        # What is gone or locked is refused where it is read.
        with suppress(OSError):
            found = file.stat()
            yield os.path.relpath(file, path), found.st_size, found.st_mtime_ns


def _files_below(folder: Path, out: Path) -> Iterator[Path]:
    """As a DICOM folder is searched: links to folders are not followed."""
    folders: list[Path] = []
    with suppress(OSError), os.scandir(folder) as entries:
        is_out = out.exists() and folder.samefile(out)
        for entry in entries:
            path = folder / entry.name
            # A link may lead nowhere, or to itself.
            with suppress(OSError):
                if entry.name.startswith(UNFINISHED) or (is_out and _is_result(entry.name)):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    folders.append(path)
                # What a desktop leaves in a folder that is looked at is no slice.
                elif entry.is_file() and not (entry.name.startswith(".") and not is_dicom(path)):
                    yield path
    for path in folders:
        yield from _files_below(path, out)


def _is_result(name: str) -> bool:
    """Whether a file or folder in an output folder is called as results are, or as what is at work there."""
    return name.startswith(".") or name.endswith(_RESULT_ENDS) or name in _RESULT_FOLDERS


def _detached_voxels(path: Path) -> Iterator[Path]:
    """The file in which an NRRD or MetaImage header has its voxels, if that is another."""
    from transforms.nifti import is_gzip, is_nifti

    with suppress(OSError, VolumeError):
        if is_nifti(path) or is_gzip(path):
            return
        # Loading the library of these formats takes time.
        from transforms.itk_files import file_of_voxels, is_itk

        if is_itk(path) and (voxels := file_of_voxels(path)) != path:
            yield voxels
