"""Files in, files out: what `volseg predict` does around `predict`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pydantic import ValidationError

from pipeline.confidence import answer_count
from pipeline.confidence_files import MAPS, SCORES, discard_confidence, files_of, write_confidence
from pipeline.console import Console
from pipeline.errors import PlanError, RunError, VolsegError
from pipeline.export import (
    ExportedFile,
    Options,
    Source,
    check_formats,
    discard_exports,
    export,
    path_of,
    written_formats,
)
from pipeline.failures import Failure
from pipeline.files import remove_leftovers, write_text
from pipeline.folder_lock import held
from pipeline.free_memory import free_bytes, held_bytes
from pipeline.kept_scores import kept_count
from pipeline.manifest import load_dataset
from pipeline.memory_plan import MemoryPlan
from pipeline.overlap import Stages, one_at_a_time, overlapped
from pipeline.postprocessing import described
from pipeline.predict import FREE_SHARE, Model, PredictSettings, cleans_labels, explain, members_of, predict
from pipeline.quality import QUALITY, write_quality_table
from pipeline.record import Beside, Origin, Record, open_record, origin_of, recorded_quality
from pipeline.references import SCHEMA_FILE
from pipeline.results import record_sources
from pipeline.segmentation import Segmentation
from pipeline.settled_memory import settled_bytes
from pipeline.sources import Opened, open_study, reading_bytes
from pipeline.studies import Study
from pipeline.windows import Progress
from transforms.labels import LabelSchema
from transforms.quiet_warnings import quiet_warnings
from transforms.volume import Volume

if TYPE_CHECKING:
    from pipeline.export.confidentiality import Confidentiality

BESIDE = "beside the labels"
"""What the files of a `Confidence` are called in a list of results, in place of a format."""

WRITING_BYTES = 24
"""What writing a voxel's label and reading it back takes at most, beside the image (measured: NIfTI 5, pictures 7)."""


@dataclass(frozen=True)
class SegmentSettings:
    """How results are made. `mirror` None takes what the bundle says; the rest of reading is as in `read_volume`.

    `confidentiality`, if given, says how the sources' identity is removed; `smoothing` as in `Options`;
    `max_memory_bytes`, `tile_step`, `uncertainty`, `keep_scores` and `postprocess` as in `PredictSettings`; `backend`
    is what runs the network, for the record.
    """

    formats: tuple[str, ...]
    mirror: bool | None
    series: str | None
    force: bool
    resample_uneven: bool = False
    confidentiality: Confidentiality | None = None
    smoothing: int = 0
    max_memory_bytes: int | None = None
    tile_step: float | None = None
    backend: str = "torch"
    uncertainty: bool = False
    keep_scores: int = 0
    postprocess: bool = True
    skip_air: bool = True


def segment_studies(
    model: Model, studies: Sequence[Study], out: Path, *, settings: SegmentSettings, console: Console
) -> tuple[list[ExportedFile], list[Failure]]:
    """Segment every study into `out`; one that fails is set aside and named, the others go on.

    Results that this model made before are kept unless `force`. The next study is read and the one before is written
    while one passes through the network, where memory allows; files and their order are the same either way.

    Raises:
        RunError: `out` holds another model's results, another process is at work there, or it cannot be written.
    """
    check_formats(settings.formats)
    with held(out, required=False) as alone:
        for folder in (out, *(out / name for name in (MAPS, SCORES, QUALITY))) if alone else ():
            remove_leftovers(folder)
        results = _segmented_into(out, model, studies, settings, console)
    files = [file for result in results if isinstance(result, list) for file in result]
    return files, [result for result in results if isinstance(result, Failure)]


def _segmented_into(
    out: Path, model: Model, studies: Sequence[Study], settings: SegmentSettings, console: Console
) -> list[list[ExportedFile] | Failure]:
    """What became of each study."""
    record = _record(out, model, settings)
    _refuse_other_names(record, model.schema, [study.name for study in studies])
    work = _Work(model, settings, record, console, len(studies))
    work.begin()
    outcomes = {study.name: work.before(study) for study in studies}
    wanted = [study for study in studies if outcomes[study.name] is None]
    stages = Stages(work.open, reading_bytes, work.read, work.room, work.segment, work.write)
    with record:
        if len(wanted) == 1:
            outcomes |= {study.name: work.told(study, outcome) for study, outcome in one_at_a_time(wanted, stages)}
        else:
            work.share_memory()
            stream = overlapped(wanted, stages)
            with quiet_warnings(), closing(stream) as ending:
                outcomes |= {study.name: work.told(study, outcome) for study, outcome in ending}
    if record.owns_table:
        write_quality_table(out, recorded_quality(out))
    return [outcome for outcome in outcomes.values() if outcome is not None]


def explain_studies(
    model: Model, studies: Sequence[Study], *, settings: SegmentSettings
) -> tuple[list[tuple[str, MemoryPlan]], list[Failure]]:
    """What `segment_studies` would hold in memory for each study by itself, by the headers of its images alone."""
    plans: list[tuple[str, MemoryPlan]] = []
    failures: list[Failure] = []
    wanted = predict_settings(model, settings)
    for study in studies:
        try:
            images = open_study(study, model.plan, series=settings.series, resample_uneven=settings.resample_uneven)
            plan = explain(model, images[0].grid, settings=wanted, device=device_of(model))
            plans.append((study.name, plan))
        except VolsegError as error:
            failures.append(_failure(study, error))
    return plans, failures


@dataclass(frozen=True, eq=False)
class _Segmented:
    """What is left to be written of a study."""

    segmentation: Segmentation
    source: Source


class _Work:
    """The stages of one study: the console is told by the thread that segments, the record belongs to the writer."""

    def __init__(
        self, model: Model, settings: SegmentSettings, record: Record, console: Console, study_count: int
    ) -> None:
        self._model, self._settings, self._record, self._console = model, settings, record, console
        self._study_count = study_count
        self._done = 0
        self._options = Options(smoothing=settings.smoothing, confidentiality=settings.confidentiality)
        self._origins: dict[str, Origin] = {}
        self._axes_told: set[str] = set()
        self._predicting = predict_settings(model, settings)
        self._names_are_written = False
        self._disagrees = answer_count(members_of(model, self._predicting)) > 1
        if settings.uncertainty and not self._disagrees:
            console.note(
                "one network without mirrored passes has nothing to disagree with: no map of disagreement is written; "
                "a run folder with several folds gives one"
            )

    def begin(self) -> None:
        """Have the labels' names in the folder, unless label maps lie there that are read by others: then they come
        with the first result."""
        record = self._record
        if not _names_otherwise(record.out, self._model.schema) or (record.is_on_disk and not record.unvouched()):
            self._write_names()

    def share_memory(self) -> None:
        """From now on other studies are in memory beside the one that is segmented."""
        limit = self._settings.max_memory_bytes or held_bytes() + round(FREE_SHARE * free_bytes())
        self._predicting = replace(self._predicting, max_memory_bytes=limit)

    def before(self, study: Study) -> list[ExportedFile] | Failure | None:
        """What is known of a study without reading it; None if it is to be segmented."""
        out, settings = self._record.out, self._settings
        # Before a voxel is read: what comes into a folder later is not what was segmented.
        origin = self._origins[study.name] = origin_of(
            study, out, series=settings.series, resample_uneven=settings.resample_uneven
        )
        self._record.doubt(study, origin)
        if self._record.is_of_another(study, origin):
            what = f"{out} holds the result of another input named {study.name}"
            return self.told(study, VolsegError(f"{study.paths[0]}: {what}; choose another --out, or give --force"))
        if (obstacle := self._record.in_the_way(study, self._files(study))) is not None:
            return self.told(study, VolsegError(obstacle))
        if self._record.holds(study, written_formats(settings.formats, self._options), self._beside(study)):
            self._console.note(f"{study.name} was segmented by this model before, kept; give --force to do it again")
            return self.told(study, [])
        return None

    def open(self, study: Study) -> list[Opened]:
        settings = self._settings
        return open_study(study, self._model.plan, series=settings.series, resample_uneven=settings.resample_uneven)

    def read(self, study: Study, images: list[Opened]) -> list[Source]:
        return [image.read() for image in images]

    def room(self, sources: list[Source], writing: _Segmented | None) -> int | None:
        """What may be read beside: a study like this one, if this one fits into what is left then.

        The plan of this one counts what reading and writing may take, whether or not they have taken it yet.
        """
        like_this = reading_bytes([Opened(Path(), s.image.geometry, s.series) for s in sources])
        held = settled_bytes(cleans=cleans_labels(self._model, self._predicting))
        held -= sum(source.image.voxels.nbytes for source in sources)
        beside = held + like_this + (0 if writing is None else _writing_bytes(writing))
        shared = replace(self._predicting, held_bytes=beside)
        self._predicting = replace(self._predicting, held_bytes=None)
        try:
            explain(self._model, sources[0].image.geometry, settings=shared, device=device_of(self._model))
        except PlanError:
            return None
        except VolsegError:
            return like_this  # `segment` says why.
        self._predicting = shared
        return like_this

    def segment(self, study: Study, sources: list[Source]) -> _Segmented:
        self._tell_findings(study, sources)
        found = predict(
            self._model,
            _in_their_places(self._model, study, sources),
            settings=self._predicting,
            device=device_of(self._model),
            on_window=self._windows_of(study),
        )
        if found.skipped_windows:
            told = "windows are darker than any with a label in training and were skipped; --no-skip-air computes them"
            self._console.note(f"{study.name}: {found.skipped_windows} {told}")
        return _Segmented(found, sources[0])

    def write(self, study: Study, made: _Segmented) -> list[ExportedFile]:
        settings, out = self._settings, self._record.out
        self._record.begin(study, self._files(study))
        if not self._names_are_written:
            # Label maps that another model made must not be read by this one's names, even after a kill.
            for name, stale in self._record.unvouched().items():
                discard_exports(out, name, stale)
                discard_confidence(out, name, stale)
            self._write_names()
        files = export(
            made.segmentation,
            formats=settings.formats,
            out=out,
            name=study.name,
            source=made.source,
            options=self._options,
        )
        if not self._record.vouches_for(study):
            ours = self._record.ours(study)
            discard_exports(out, study.name, ours - {file.path.name for file in files})
            discard_confidence(out, study.name, ours)
        labels = [file.format for file in files]
        if (beside := made.segmentation.confidence) is not None:
            found = write_confidence(out, study.name, beside, made.segmentation.geometry)
            files += [ExportedFile(BESIDE, path, None) for path in found]
        self._record.add(study, labels, self._origins[study.name], self._beside(study))
        if settings.confidentiality is None:
            record_sources(out, study.name, study.paths)
        return files

    def told(self, study: Study, outcome: list[ExportedFile] | VolsegError) -> list[ExportedFile] | Failure:
        """What became of a study, after the console has heard that it is over."""
        self._done += 1
        self._console.progress("segmenting", self._done, self._study_count, study.name)
        if not isinstance(outcome, VolsegError):
            return outcome
        return _failure(study, outcome)

    def _tell_findings(self, study: Study, sources: Sequence[Source]) -> None:
        """What is missing or was put right in reading; what could not be is an error."""
        if study.missing:
            plural = "s" if len(study.missing) > 1 else ""
            names = ", ".join(study.missing)
            self._console.note(f"{study.name}: without the optional channel{plural} {names}")
        for series in (source.series for source in sources if source.series is not None):
            for finding in series.findings:
                self._console.note(f"{study.name}: {finding}")
        axes = sources[0].image.geometry.axis_codes
        if self._model.plan.takes_stored_axes and axes not in self._axes_told:
            self._axes_told.add(axes)
            told = "as they are stored, and saw its training's so; stored otherwise it may see the patient mirrored"
            self._console.note(f"{study.name}: axes are {axes}; this model takes them {told}")

    def _windows_of(self, study: Study) -> Progress:
        """Tells of a study's windows within the line or bar of all studies, which a long one would keep silent."""

        def tell(window: int, windows: int) -> None:
            detail = f"{study.name}, window {window} of {windows}"
            self._console.progress("segmenting", self._done, self._study_count, detail)

        return tell

    def _write_names(self) -> None:
        write_text(self._record.out / SCHEMA_FILE, _schema_text(self._model.schema))
        self._names_are_written = True

    def _beside(self, study: Study) -> Beside:
        asked = self._predicting.asked
        files = files_of(self._record.out, study.name, asked, disagrees=self._disagrees)
        return Beside(tuple(files), kept_count(self._model.schema, asked.keep_scores))

    def _files(self, study: Study) -> list[Path]:
        """All that is to be written of a study."""
        formats = written_formats(self._settings.formats, self._options)
        labels = [path_of(self._record.out, study.name, form) for form in formats]
        return [*labels, *self._beside(study).files]


def _record(out: Path, model: Model, settings: SegmentSettings) -> Record:
    cleaning = model.postprocessing if settings.postprocess else None
    made: dict[str, bool | int | float | str] = {
        "mirror": model.mirror if settings.mirror is None else settings.mirror,
        "deidentified": settings.confidentiality is not None,
        "smoothing": settings.smoothing,
        "tile_step": settings.tile_step or model.tile_step,
        "backend": settings.backend,
        "postprocessing": "none" if cleaning is None else f"{described(cleaning.actions)} ({cleaning.digest[:8]})",
        "skip_air": settings.skip_air and model.air is not None,
    }
    usual: dict[str, bool | int | float | str] = {
        "mirror": False,
        "deidentified": False,
        "smoothing": 0,
        "tile_step": model.tile_step,
        "backend": "torch",
        "postprocessing": "none",
        "skip_air": False,
    }
    return open_record(out, [b.digest for b in model.bundles], made, usual=usual, force=settings.force)


def _refuse_other_names(record: Record, schema: LabelSchema, studies: Sequence[str]) -> None:
    """Refuse to put `labels.json` in the place of one by which label maps are read that stay."""
    target = record.out / SCHEMA_FILE
    is_other = target.exists() and target.read_bytes() != _schema_text(schema).encode()
    if record.is_fresh and is_other and not record.force:
        raise RunError(f"{target} is of other label maps; choose another --out, or give --force")
    staying = [name for name in record.unvouched() if name not in studies]
    if staying and _names_otherwise(record.out, schema):
        more = f" and {len(staying) - 1} more" if len(staying) > 1 else ""
        raise RunError(
            f"{record.out}: holds results of {staying[0]}{more} with labels of other names, which are not made again; "
            "choose another --out, or take them away"
        )


def _names_otherwise(out: Path, schema: LabelSchema) -> bool:
    """Whether the label maps of a folder are read by other names than this schema's."""
    target = out / SCHEMA_FILE
    if not target.exists():
        return False
    try:
        return not LabelSchema.model_validate_json(target.read_bytes()).matches(schema)
    except ValidationError:
        return True


def _schema_text(schema: LabelSchema) -> str:
    return schema.model_dump_json(indent=2) + "\n"


def predict_settings(model: Model, settings: SegmentSettings) -> PredictSettings:
    """What of the settings concerns the network."""
    mirror = model.mirror if settings.mirror is None else settings.mirror
    wanted = PredictSettings(mirror, settings.max_memory_bytes, settings.tile_step)
    return replace(
        wanted,
        uncertainty=settings.uncertainty,
        keep_scores=settings.keep_scores,
        postprocess=settings.postprocess,
        skip_air=settings.skip_air,
    )


def device_of(model: Model) -> torch.device:
    """Where the network's weights are; the CPU for one that a backend runs."""
    weights = next(model.bundles[0].network.parameters(), None)
    return torch.device("cpu") if weights is None else weights.device


def _failure(study: Study, error: VolsegError) -> Failure:
    # What only the voxels tell is told without a path by `predict`, which knows none.
    known = any(str(path) in str(error) for path in study.paths)
    return Failure(study.name, str(error) if known else f"{study.paths[0]}: {error}")


def _writing_bytes(made: _Segmented) -> int:
    beside = made.segmentation.confidence
    return WRITING_BYTES * math.prod(made.segmentation.geometry.shape) + (0 if beside is None else beside.byte_count)


def _in_their_places(model: Model, study: Study, sources: Sequence[Source]) -> list[Volume | None]:
    """One image a channel of the model, None where the study lacks it."""
    volumes: list[Volume | None] = [source.image for source in sources]
    for number, channel in enumerate(model.plan.channels):
        if channel.name in study.missing:
            volumes.insert(number, None)
    return volumes


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
