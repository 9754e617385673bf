"""Exports without identity: written and verified against the real source first, then de-identified and compared.

What has not been de-identified yet lies in a folder beside the results that only its owner can enter, and goes when
the work is done.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

from pipeline.errors import ExportError
from pipeline.export import FORMATS, ExportedFile, Options, Source, export
from pipeline.export.confidentiality import Confidentiality, Identity
from pipeline.export.deidentify import deidentify_file, series_identity
from pipeline.export.verify_deidentified import verify_deidentified, verify_plain
from pipeline.files import atomic_folder, atomic_path, explain_os_error, safe_name, unfinished_folder
from pipeline.segmentation import Segmentation
from transforms.dicom import DicomSeries

SOURCE_FORMAT, SOURCE_SUFFIX = "source", ".source"


def export_confidentially(
    segmentation: Segmentation,
    *,
    formats: Sequence[str],
    out: Path,
    name: str,
    source: Source,
    options: Options,
) -> list[ExportedFile]:
    """As `pipeline.export.export`, with `options.confidentiality`; copies of the source last, if asked for.

    Raises:
        ExportError: as there; or the name of the results, or an object, holds identity that cannot be removed.
        RunError: the folder cannot be written.
    """
    how = options.confidentiality
    assert how is not None
    if source.series is None:
        raise ExportError("the source is no DICOM series, so there is no identity to remove; leave --deidentify out")
    identity = series_identity(source.series)
    name = safe_name(name)
    # Underscores may stand for what a file name cannot hold.
    if identity.is_in(name) or identity.is_in(name.replace("_", " ")):
        raise ExportError(
            "the name of the results, which is that of the input, holds a part of the source's identity: "
            "rename or copy the input, and run again"
        )
    plain = replace(options, confidentiality=None)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with unfinished_folder(out, name) as folder:
            files = export(segmentation, formats=formats, out=folder, name=name, source=source, options=plain)
            done = [_finish(file, out, how, identity) for file in files]
            report = folder / f"{name}.verification.json"
            if report.exists():
                _copy_plain(report, out / report.name, identity)
    except OSError as error:
        raise explain_os_error(error, out) from error
    if how.copies_source:
        done.append(_copy_source(source.series, out / (name + SOURCE_SUFFIX), how, identity))
    return done


def _finish(file: ExportedFile, out: Path, how: Confidentiality, identity: Identity) -> ExportedFile:
    """Take a finished export to its place, de-identified if it is DICOM."""
    target = out / file.path.name
    if not FORMATS[file.format].needs_dicom:
        _copy_plain(file.path, target, identity)
        return replace(file, path=target)
    with _place(file.path, target) as temporary:
        for original in sorted(file.path.iterdir()) if file.path.is_dir() else [file.path]:
            written = temporary / original.name if file.path.is_dir() else temporary
            _deidentify(original, written, target, how=how, identity=identity, is_own=True)
    return replace(file, path=target)


def _copy_source(series: DicomSeries, target: Path, how: Confidentiality, identity: Identity) -> ExportedFile:
    with atomic_folder(target, force=True) as temporary:
        for number, path in enumerate(dict.fromkeys(series.paths), start=1):
            written = temporary / f"{number:05d}.dcm"
            _deidentify(path, written, target, how=how, identity=identity, is_own=False)
    return ExportedFile(SOURCE_FORMAT, target, None)


def _deidentify(
    original: Path, written: Path, target: Path, *, how: Confidentiality, identity: Identity, is_own: bool
) -> None:
    try:
        deidentify_file(original, written, how, identity=identity, is_own=is_own)
        verify_deidentified(written, original, how, identity=identity, is_own=is_own)
    except ExportError as error:
        raise ExportError(f"{target} was not written: {error}") from error
    except (AttributeError, LookupError, NotImplementedError, TypeError, ValueError) as error:
        # The library's own words may quote a value.
        raise ExportError(f"{target} was not written: it cannot be de-identified ({type(error).__name__})") from None


def _copy_plain(path: Path, target: Path, identity: Identity) -> None:
    try:
        verify_plain(path, identity)
    except ExportError as error:
        raise ExportError(f"{target} was not written: {error}") from error
    with _place(path, target) as temporary:
        if path.is_dir():
            shutil.copytree(path, temporary, dirs_exist_ok=True)
        else:
            shutil.copyfile(path, temporary)


def _place(path: Path, target: Path) -> AbstractContextManager[Path]:
    return atomic_folder(target, force=True) if path.is_dir() else atomic_path(target)
