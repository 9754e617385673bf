"""One module a format; each export is read back and compared before it is called done."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import ExportError
from pipeline.files import atomic_folder, atomic_path, explain_os_error, safe_name, write_json
from pipeline.segmentation import Segmentation

if TYPE_CHECKING:
    from pipeline.export.confidentiality import Confidentiality
    from pipeline.export.verify import Verification
    from transforms.dicom import DicomSeries
    from transforms.volume import Volume


COPIES = "source"
"""What de-identified copies of the source are called among formats; their folder's name ends in it."""


@dataclass(frozen=True, eq=False)
class Source:
    """What was segmented: the image, and the DICOM series that it came from, if it did."""

    image: Volume
    series: DicomSeries | None = None


@dataclass(frozen=True)
class ExportedFile:
    """A file that was written, and how it read back; None for pictures, which hold no label map."""

    format: str
    path: Path
    verification: Verification | None


@dataclass(frozen=True)
class Options:
    """How exports are made. `smoothing` is the number of rounds by which meshes are smoothed, 0 for none.

    `confidentiality`, if given, says how the source's identity is removed from them.
    """

    smoothing: int = 0
    confidentiality: Confidentiality | None = None


@dataclass(frozen=True, eq=False)
class Job:
    """What a writer is given. `files` holds what was written before, by format, for formats that refer to others."""

    segmentation: Segmentation
    source: Source
    options: Options = field(default_factory=Options)
    files: Mapping[str, Path] = field(default_factory=dict)

    @property
    def series(self) -> DicomSeries:
        """The source's DICOM series; formats that need one are asked for only where there is one."""
        if self.source.series is None:
            raise ExportError("the source is no DICOM series")
        return self.source.series


Write = Callable[[Path, Job], None]
Verify = Callable[[Path, Job], "Verification"]


@dataclass(frozen=True)
class Format:
    """How one kind of file, or folder of files, is named, written and read back.

    `refers_to` names the format whose file must lie beside it; it is written too, and first. `takes_uneven`: it can
    put the label map back on slices that were interpolated onto an even grid.
    """

    suffix: str
    title: str
    write: Write
    verify: Verify | None = None
    needs_dicom: bool = False
    is_folder: bool = False
    refers_to: str | None = None
    takes_uneven: bool = False


def export(
    segmentation: Segmentation,
    *,
    formats: Sequence[str],
    out: Path,
    name: str,
    source: Source,
    options: Options | None = None,
) -> list[ExportedFile]:
    """Write `segmentation` as `out`/`name` in each of `formats`, and the figures of reading back beside them.

    Each file is compared with the segmentation before it takes its name; files of that name are replaced, and the
    figures of other formats that lie there stay.
    A format that refers to another one brings it along.

    Raises:
        ExportError: a format is unknown or does not fit the source, the segmentation is not on the source's grid
            or holds unknown labels, or a file did not read back the same. That file is not written.
        RunError: the folder cannot be written.
    """
    check_formats(formats)
    if options is not None and options.confidentiality is not None:
        from pipeline.export.confidential import export_confidentially

        return export_confidentially(segmentation, formats=formats, out=out, name=name, source=source, options=options)
    chosen = {key: FORMATS[key] for key in _with_referred(formats)}
    for key, form in chosen.items():
        _check_source(key, form, source)
    _check(segmentation, source)
    name = safe_name(name)
    files: list[ExportedFile] = []
    for key, form in chosen.items():
        job = Job(segmentation, source, options or Options(), {file.format: file.path for file in files})
        files.append(_write(key, form, path_of(out, name, key), job))
    _write_report(_report_of(out, name), files)
    return files


def written_formats(formats: Sequence[str], options: Options) -> tuple[str, ...]:
    """All that `export` writes when these are asked for."""
    copies = options.confidentiality is not None and options.confidentiality.copies_source
    return (*dict.fromkeys(_with_referred(formats)), *([COPIES] if copies else []))


def path_of(out: Path, name: str, form: str) -> Path:
    """Where a result is in a format, or the copies of its source are."""
    return out / (safe_name(name) + (f".{COPIES}" if form == COPIES else FORMATS[form].suffix))


def discard_exports(out: Path, name: str, stale: Collection[str]) -> None:
    """Take away the files of a result, of any format, that are called as in `stale`, and their figures.

    Raises:
        RunError: the folder cannot be written.
    """
    paths = (path_of(out, name, form) for form in (*FORMATS, COPIES))
    for path in (path for path in paths if path.name in stale):
        _remove(path)
    report = _report_of(out, name)
    if not stale or not report.exists():
        return
    if rows := _earlier(report):
        write_json(report, {"files": rows})
    else:
        _remove(report)


def _remove(path: Path) -> None:
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise explain_os_error(error, path) from error


def _report_of(out: Path, name: str) -> Path:
    return out / f"{safe_name(name)}.verification.json"


def _with_referred(formats: Sequence[str]) -> Iterator[str]:
    for key in formats:
        if (referred := FORMATS[key].refers_to) is not None:
            yield referred
        yield key


def check_formats(formats: Sequence[str]) -> None:
    """Refuse what no writer is known for, before anything is computed.

    Raises:
        ExportError: a format is unknown, the nearest and all others are named; or there is none.
    """
    if not formats:
        raise ExportError(f"no export format is named; the formats are {', '.join(FORMATS)}")
    for name in formats:
        if name not in FORMATS:
            near = get_close_matches(name, FORMATS, n=1, cutoff=0.4)
            hint = f"did you mean '{near[0]}'? The" if near else "the"
            raise ExportError(f"no export format '{name}': {hint} formats are {', '.join(FORMATS)}")


def _check_source(key: str, form: Format, source: Source) -> None:
    if not form.needs_dicom:
        return
    if source.series is None:
        raise ExportError(
            f"format '{key}' refers to a DICOM series, and the source is none: "
            "name the folder of the series as the source, or choose another format, as nifti"
        )
    if source.series.slice_positions_k is not None and not form.takes_uneven:
        fitting = [name for name, other in FORMATS.items() if other.takes_uneven or not other.needs_dicom]
        raise ExportError(
            f"format '{key}' needs the source's own slices, and they were interpolated onto an even grid "
            f"(--resample-uneven): choose {', '.join(fitting)}"
        )
    from pipeline.export.dicom_source import check_series

    check_series(source.series)


def _check(segmentation: Segmentation, source: Source) -> None:
    series_geometry = None if source.series is None else source.series.geometry
    for what, geometry in (("image", source.image.geometry), ("series", series_geometry)):
        difference = geometry and segmentation.geometry.difference(geometry)
        if difference:
            raise ExportError(
                f"the segmentation is not on the grid of its source {what}: {difference}; "
                "name the source that it was made from"
            )
    try:
        segmentation.schema.classes_from_ids(segmentation.label_map)
    except ValueError as error:
        raise ExportError(f"the segmentation cannot be exported: {error}") from error


def _write(key: str, form: Format, target: Path, job: Job) -> ExportedFile:
    with _place(form, target) as temporary:
        form.write(temporary, job)
        verification = None if form.verify is None else _read_back(form.verify, temporary, target, job)
    return ExportedFile(key, target, verification)


def _place(form: Format, target: Path) -> AbstractContextManager[Path]:
    return atomic_folder(target, force=True) if form.is_folder else atomic_path(target)


def _read_back(verify: Verify, written: Path, target: Path, job: Job) -> Verification:
    try:
        return verify(written, job)
    except ExportError as error:
        raise ExportError(f"{target} was not written: {error}") from error
    except MemoryError:
        raise
    except Exception as error:  # Whatever a library makes of a file that is none of its own.
        raise ExportError(
            f"{target} was not written: it cannot be read back ({type(error).__name__}); "
            "this is a fault of volseg, please report it"
        ) from error


def _write_report(target: Path, files: Sequence[ExportedFile]) -> None:
    rows = [
        {"format": x.format, "file": x.path.name, "verification": x.verification.to_json()}
        for x in files
        if x.verification is not None
    ]
    if rows:
        written = {x.path.name for x in files}
        kept = [row for row in _earlier(target) if row.get("file") not in written]
        write_json(target, {"files": [*kept, *rows]})


def _earlier(report: Path) -> list[dict[str, Any]]:
    """The figures of files that still lie beside a report; a damaged report has none."""
    try:
        rows = json.loads(report.read_text(encoding="utf-8"))["files"]
        return [row for row in rows if (report.parent / row["file"]).exists()]
    except (OSError, ValueError, LookupError, TypeError):
        return []


# The libraries of a format are imported when the format is used.


def _write_seg(target: Path, job: Job) -> None:
    from pipeline.export.dicom_seg import write_seg

    write_seg(target, job.segmentation, job.series)


def _verify_seg(path: Path, job: Job) -> Verification:
    from pipeline.export.verify_seg import verify_seg

    return verify_seg(path, job.segmentation, job.series)


def _write_labelmap(target: Path, job: Job) -> None:
    from pipeline.export.dicom_seg import write_labelmap

    write_labelmap(target, job.segmentation, job.series)


def _write_sr(target: Path, job: Job) -> None:
    from pipeline.export.dicom_sr import write_sr

    write_sr(target, job)


def _verify_sr(path: Path, job: Job) -> Verification:
    from pipeline.export.verify_sr import verify_sr

    return verify_sr(path, job)


def _write_capture(target: Path, job: Job) -> None:
    from pipeline.export.capture import write_capture

    write_capture(target, job)


def _verify_capture(path: Path, job: Job) -> Verification:
    from pipeline.export.verify_capture import verify_capture

    return verify_capture(path, job)


def _write_rtstruct(target: Path, job: Job) -> None:
    from pipeline.export.rtstruct import write_rtstruct

    write_rtstruct(target, job.segmentation, job.series)


def _verify_rtstruct(path: Path, job: Job) -> Verification:
    from pipeline.export.verify_rtstruct import verify_rtstruct

    return verify_rtstruct(path, job.segmentation, job.series)


def _write_nifti(target: Path, job: Job) -> None:
    from pipeline.export.nifti import write_nifti

    write_nifti(target, job.segmentation)


def _verify_nifti(path: Path, job: Job) -> Verification:
    from pipeline.export.verify_nifti import verify_nifti

    return verify_nifti(path, job.segmentation)


def _write_seg_nrrd(target: Path, job: Job) -> None:
    from pipeline.export.seg_nrrd import write_seg_nrrd

    write_seg_nrrd(target, job.segmentation)


def _verify_seg_nrrd(path: Path, job: Job) -> Verification:
    from pipeline.export.verify_seg_nrrd import verify_seg_nrrd

    return verify_seg_nrrd(path, job.segmentation)


def _write_stl(target: Path, job: Job) -> None:
    from pipeline.export.meshes import write_stl

    write_stl(target, job.segmentation, smoothing=job.options.smoothing)


def _verify_stl(path: Path, job: Job) -> Verification:
    from pipeline.export.verify_meshes import verify_stl

    return verify_stl(path, job.segmentation)


def _write_gltf(target: Path, job: Job) -> None:
    from pipeline.export.meshes import write_gltf

    write_gltf(target, job.segmentation, smoothing=job.options.smoothing)


def _verify_gltf(path: Path, job: Job) -> Verification:
    from pipeline.export.verify_meshes import verify_gltf

    return verify_gltf(path, job.segmentation)


def _write_overlay(target: Path, job: Job) -> None:
    from pipeline.export.overlay import write_overlay

    write_overlay(target, job.segmentation, job.source.image)


FORMATS: dict[str, Format] = {
    "seg": Format(".seg.dcm", "DICOM SEG, BINARY", _write_seg, _verify_seg, needs_dicom=True, takes_uneven=True),
    "labelmap": Format(
        *(".labelmap.dcm", "DICOM SEG, LABELMAP", _write_labelmap, _verify_seg), needs_dicom=True, takes_uneven=True
    ),
    "sr": Format(
        ".sr.dcm", "DICOM SR, measurements of the SEG", _write_sr, _verify_sr, needs_dicom=True, refers_to="seg"
    ),
    "capture": Format(
        ".capture",
        "DICOM secondary captures, slices with outlines",
        _write_capture,
        _verify_capture,
        needs_dicom=True,
        is_folder=True,
    ),
    "rtstruct": Format(".rtstruct.dcm", "DICOM RT Structure Set", _write_rtstruct, _verify_rtstruct, needs_dicom=True),
    "nifti": Format(".nii.gz", "NIfTI label map with a table of its labels", _write_nifti, _verify_nifti),
    "nrrd": Format(".seg.nrrd", "segmentation for 3D Slicer", _write_seg_nrrd, _verify_seg_nrrd),
    "stl": Format(".meshes", "STL meshes in LPS+ mm, a file a label", _write_stl, _verify_stl, is_folder=True),
    "gltf": Format(".glb", "one coloured mesh file (glTF)", _write_gltf, _verify_gltf),
    "overlay": Format(".png", "picture in three planes", _write_overlay),
}
