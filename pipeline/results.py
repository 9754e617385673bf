"""The output folder of `volseg predict`: what it records, and which image each result was made from.

The paths of the images stand in a file of their own, relative to the folder: paths may tell whose images they are,
so results are passed on without that file. `volseg view` reads it and can do without; a served model, which writes it
too, replaces a result only where it says that the same images were behind it. Beside each of the two files lies, while
something is at work in the folder or after a kill, a journal of what is not in it yet (`pipeline.growing_json`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import RunError
from pipeline.files import safe_name
from pipeline.growing_json import change_object, fold_object, journal_of, read_object

RECORD = "predictions.json"
SOURCES = "sources.json"

LABEL_MAP = ".nii.gz"
DICOM_SEG = ".seg.dcm"


@dataclass(frozen=True)
class Result:
    """A segmentation on disk and the images of its study, one a channel, where they are recorded."""

    name: str
    labels: Path
    images: tuple[Path, ...] = ()


def record_sources(out: Path, name: str, paths: Sequence[Path]) -> None:
    """Note which images the result `name` in `out` was made from.

    Raises:
        RunError: the folder cannot be written.
    """
    file = out / SOURCES
    journal_bytes = change_object(file, {name: [_relative(path, out) for path in paths]})
    # A file that is written whole once it would double is written, all in all, in step with what it holds.
    if not file.exists() or journal_bytes >= file.stat().st_size:
        fold_object(file)


def forget_sources(out: Path, name: str) -> None:
    """Note that the result `name` in `out` is about to be replaced.

    Raises:
        RunError: the folder cannot be written.
    """
    if (out / SOURCES).exists() or journal_of(out / SOURCES).exists():
        change_object(out / SOURCES, {name: None})


def find_results(folder: Path) -> list[Result]:
    """The label maps, or failing that the DICOM SEGs, of every study that `folder` records and still holds.

    Raises:
        RunError: it holds no such record, or none of what it records.
    """
    file = folder / RECORD
    if not file.is_file():
        raise RunError(f"{folder}: no {RECORD}; expected an output folder of `volseg predict`, or name a label map")
    studies = read_object(file).get("studies")
    # A record that was tampered with leads to no file outside the folder.
    names = [name for name in studies if safe_name(name) == name] if isinstance(studies, dict) else []
    results = [result for name in names if (result := _result(folder, name)) is not None]
    if not results:
        raise RunError(f"{folder}: holds no NIfTI label map and no DICOM SEG of the studies that {RECORD} names")
    return results


def result_of(labels: Path) -> Result:
    """The result that a label map or DICOM SEG is, with its images if they are recorded beside it."""
    suffix = next((s for s in (LABEL_MAP, DICOM_SEG) if labels.name.endswith(s)), labels.suffix)
    name = labels.name.removesuffix(suffix)
    return Result(name, labels, _images(labels.parent, name))


def _result(folder: Path, name: str) -> Result | None:
    files = (folder / f"{name}{suffix}" for suffix in (LABEL_MAP, DICOM_SEG))
    found = next((file for file in files if file.is_file()), None)
    return None if found is None else Result(name, found, _images(folder, name))


def _images(folder: Path, name: str) -> tuple[Path, ...]:
    paths = read_object(folder / SOURCES).get(name, [])
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise RunError(f"{folder / SOURCES}: expected a list of paths for {name}; name the image yourself, by --image")
    return tuple(folder / path for path in paths)


def _relative(path: Path, folder: Path) -> str:
    try:
        return Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix()
    except ValueError:  # Another drive.
        return path.resolve().as_posix()
