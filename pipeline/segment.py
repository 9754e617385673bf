"""Files in, files out: what `volseg predict` does around `predict`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from pipeline.console import Console
from pipeline.errors import DicomError, RunError, SeveralSeries, VolsegError
from pipeline.evaluate import SCHEMA_FILE
from pipeline.export import FORMATS, ExportedFile, Options, Source, check_formats, export
from pipeline.failures import Failure
from pipeline.files import sha256_of_json, write_json, write_text
from pipeline.manifest import load_dataset
from pipeline.predict import Model, PredictSettings, predict, refuse_missing, refuse_modality
from pipeline.results import RECORD, record_sources
from pipeline.studies import EVERY_SERIES, Study
from pipeline.windows import Progress
from transforms.dicom import DicomSeries, read_series, read_voxels
from transforms.dicom_header import is_dicom
from transforms.labels import LabelSchema
from transforms.volume import Volume, read_volume

if TYPE_CHECKING:
    from pipeline.export.confidentiality import Confidentiality


@dataclass(frozen=True)
class SegmentSettings:
    """How results are made. `mirror` None takes what the bundle says; the rest of reading is as in `read_volume`.

    `confidentiality`, if given, says how the sources' identity is removed; `smoothing` as in `Options`.
    """

    formats: tuple[str, ...]
    mirror: bool | None
    series: str | None
    force: bool
    resample_uneven: bool = False
    confidentiality: Confidentiality | None = None
    smoothing: int = 0


def segment_studies(
    model: Model, studies: Sequence[Study], out: Path, *, settings: SegmentSettings, console: Console
) -> tuple[list[ExportedFile], list[Failure]]:
    """Segment every study into `out`; one that fails is set aside and named, the others go on.

    Results that this model made before are kept unless `force`.

    Raises:
        RunError: `out` holds another model's results, or cannot be written.
    """
    check_formats(settings.formats)
    mirror = model.mirror if settings.mirror is None else settings.mirror
    chosen = replace(settings, mirror=mirror)
    made = {"mirror": mirror, "deidentified": settings.confidentiality is not None, "smoothing": settings.smoothing}
    record = _open_record(out, model, made, force=settings.force)
    write_text(out / SCHEMA_FILE, model.schema.model_dump_json(indent=2) + "\n")
    written: list[ExportedFile] = []
    failures: list[Failure] = []
    for done, study in enumerate(studies, start=1):
        origin = _origin(study, settings)
        if record["origins"].get(study.name, origin) != origin:
            other = f"{out} holds the result of another input named {study.name}"
            failures.append(Failure(study.name, f"{study.paths[0]}: {other}; choose another --out, or give --force"))
        elif _is_kept(record, study, out, settings.formats):
            console.note(f"{study.name} was segmented by this model before, kept; give --force to do it again")
        else:
            try:
                refuse_missing(study.missing, model.plan)
                sources = _sources(model, study, settings)
                _tell_findings(study, sources, console)
                tell = _windows_of(study, done - 1, len(studies), console)
                files = _segment(model, study, sources, out, settings=chosen, on_window=tell)
                written += files
                record["studies"][study.name] = sorted(f.format for f in files)
                record["origins"][study.name] = origin
                record["missing"].pop(study.name, None)
                record["missing"] |= {study.name: list(study.missing)} if study.missing else {}
                write_json(out / RECORD, record)
                if settings.confidentiality is None:
                    record_sources(out, study.name, study.paths)
            except RunError:
                raise
            except VolsegError as error:
                # What only the voxels tell is told without a path by `predict`, which knows none.
                known = any(str(path) in str(error) for path in study.paths)
                failures.append(Failure(study.name, str(error) if known else f"{study.paths[0]}: {error}"))
        console.progress("segmenting", done, len(studies), study.name)
    return written, failures


def _sources(model: Model, study: Study, settings: SegmentSettings) -> list[Source]:
    """The study's image, or one for each channel that it has."""
    if study.series is not None:
        refuse_modality(study.series.modality or None, model.plan.channels[0])
        return [_source_of(study.series)]
    return [_study_source(path, settings) for path in study.paths]


def _tell_findings(study: Study, sources: Sequence[Source], console: Console) -> None:
    """What is missing or was put right in reading; what could not be is an error."""
    if study.missing:
        plural = "s" if len(study.missing) > 1 else ""
        console.note(f"{study.name}: without the optional channel{plural} {', '.join(study.missing)}")
    for series in (source.series for source in sources if source.series is not None):
        for finding in series.findings:
            console.note(f"{study.name}: {finding}")


def _segment(
    model: Model, study: Study, sources: Sequence[Source], out: Path, *, settings: SegmentSettings, on_window: Progress
) -> list[ExportedFile]:
    device = next(model.bundles[0].network.parameters()).device
    volumes = _in_their_places(model, study, sources)
    segmentation = predict(
        model, volumes, settings=PredictSettings(bool(settings.mirror)), device=device, on_window=on_window
    )
    options = Options(smoothing=settings.smoothing, confidentiality=settings.confidentiality)
    return export(segmentation, formats=settings.formats, out=out, name=study.name, source=sources[0], options=options)


def _windows_of(study: Study, done: int, total: int, console: Console) -> Progress:
    """Tells of the windows of a study within the line or bar of all studies, which a long one would keep silent."""

    def tell(window: int, windows: int) -> None:
        console.progress("segmenting", done, total, f"{study.name}, window {window} of {windows}")

    return tell


def _in_their_places(model: Model, study: Study, sources: Sequence[Source]) -> list[Volume | None]:
    """One image a channel of the model, None where the study lacks it."""
    volumes: list[Volume | None] = [source.image for source in sources]
    for number, channel in enumerate(model.plan.channels):
        if channel.name in study.missing:
            volumes.insert(number, None)
    return volumes


def _study_source(path: Path, settings: SegmentSettings) -> Source:
    series = None if settings.series == EVERY_SERIES else settings.series
    try:
        return read_source(path, series=series, resample_uneven=settings.resample_uneven)
    except SeveralSeries as several:
        raise SeveralSeries(f"{several}; or give --series {EVERY_SERIES} to segment each") from None


def read_source(path: Path, *, series: str | None, resample_uneven: bool = False) -> Source:
    """The image at a path, and its DICOM series where it is one.

    Raises:
        VolumeError: see `transforms.load.read_volume`.
    """
    if not path.is_dir() and (not path.exists() or not is_dicom(path)):
        return Source(read_volume(path))
    voxels, geometry, chosen = read_series(path, series=series, resample_uneven=resample_uneven)
    return Source(Volume(voxels, geometry, chosen.modality or None, chosen.background), chosen)


def _source_of(series: DicomSeries) -> Source:
    if series.problems or series.geometry is None:
        faults = "; ".join(str(problem) for problem in series.problems)
        raise DicomError(f"not readable: {faults}")
    volume = Volume(read_voxels(series), series.geometry, series.modality or None, series.background)
    return Source(volume, series)


def schema_for(labels: Path, given: Path | None) -> LabelSchema | None:
    """The schema of a label map: of a manifest or `labels.json` that is given, else of the one beside it, if any.

    Raises:
        ManifestError: what is given is neither.
    """
    path = given or labels.parent / SCHEMA_FILE
    if given is None and not path.is_file():
        return None
    try:
        return LabelSchema.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return load_dataset(path).manifest.labels


def _open_record(out: Path, model: Model, made: dict[str, bool | int], *, force: bool) -> dict[str, Any]:
    record: dict[str, Any] = {
        "model": [b.digest for b in model.bundles],
        **made,
        "studies": {},
        "origins": {},
        "missing": {},
    }
    path = out / RECORD
    if not path.exists():
        return record
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(before, dict):
            raise TypeError
    except (OSError, ValueError, TypeError):
        before = {}
    if force:
        return record
    same_setting = all(before.get(name, False) == value for name, value in made.items())
    if before.get("model") != record["model"] or not same_setting:
        raise RunError(f"{out}: holds results of another model or setting; choose another --out, or give --force")
    return {**record, **{part: dict(before.get(part, {})) for part in ("studies", "origins", "missing")}}


def _origin(study: Study, settings: SegmentSettings) -> str:
    """A digest of what a study is read from, so that inputs of one name are told apart; paths may name patients."""
    files = [path.stat() if path.is_file() else None for path in study.paths]
    return sha256_of_json(
        {
            "paths": [str(path.resolve()) for path in study.paths],
            "files": [found and [found.st_size, found.st_mtime_ns] for found in files],
            "series": study.series.series_uid if study.series else settings.series,
            "stack": study.series.stack_number if study.series else None,
            "resample_uneven": settings.resample_uneven,
        }
    )


def _is_kept(record: dict[str, Any], study: Study, out: Path, formats: Sequence[str]) -> bool:
    """Recorded, and not taken away since."""
    if not set(formats) <= set(record["studies"].get(study.name, [])):
        return False
    return all((out / f"{study.name}{FORMATS[name].suffix}").exists() for name in formats)
