"""The cases that `volseg inspect` is given: paths as `volseg predict` takes them, or cases of a manifest by id."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

from pipeline.console import Console
from pipeline.errors import ConfigError, GeometryMismatch, ManifestError, VolumeError
from pipeline.inspection.case import Case, Classes
from pipeline.manifest import Dataset, load_dataset
from pipeline.predict import Model
from pipeline.sources import open_study
from pipeline.studies import EVERY_SERIES, Study, Wanted, find_studies
from transforms.annotation import Annotation
from transforms.geometry import Geometry
from transforms.volume import read_label


@dataclass(frozen=True, eq=False)
class Subject:
    """A case that is not read yet; `labels` is the file of its reference, read as `annotation` says."""

    study: Study
    labels: Path | None
    annotation: Annotation


@dataclass(frozen=True)
class Asked:
    """What is to be looked at: `cases` are paths, or ids where there is a `manifest`, whose paths start from `root`.

    `labels` is the reference of the only case; `series` as in `volseg predict`.
    """

    cases: tuple[str, ...]
    labels: Path | None = None
    manifest: Path | None = None
    root: Path | None = None
    series: str | None = None


def find_subjects(model: Model, asked: Asked, *, console: Console) -> list[Subject]:
    """What is asked for, in that order; a manifest's cases have their references.

    Raises:
        ConfigError: options that do not go together.
        ManifestError: the manifest has no such case, or other labels than the model.
        VolumeError: see `find_studies`.
    """
    if asked.manifest is not None:
        return _of_manifest(model, asked, asked.manifest, console)
    if asked.series == EVERY_SERIES:
        raise ConfigError(f"--series {EVERY_SERIES}: a look is at one case; give the number of a series")
    wanted = Wanted(model.plan.channels, asked.root, asked.series)
    studies = find_studies([Path(case) for case in asked.cases], wanted, console=console)
    if asked.labels is not None and len(studies) != 1:
        raise ConfigError(f"--labels is the reference of one case, found {len(studies)}; give --manifest for several")
    return [Subject(study, asked.labels, Annotation(model.schema)) for study in studies]


def read_case(model: Model, subject: Subject, asked: Asked) -> Case:
    """The case with its voxels, and its reference if it has one.

    Raises:
        VolumeError: an image or the reference cannot be read, or holds values that mean nothing.
        GeometryMismatch: the reference lies on another grid than the image.
    """
    study = subject.study
    images = iter(open_study(study, model.plan, series=asked.series, resample_uneven=False))
    read = [None if c.name in study.missing else next(images).read().image for c in model.plan.channels]
    there = [volume for volume in read if volume is not None]
    if subject.labels is None:
        return Case(study.name, tuple(read))
    grid = there[0].geometry
    return Case(study.name, tuple(read), _reference(subject.labels, subject.annotation, grid), subject.annotation.mask)


def _reference(path: Path, annotation: Annotation, grid: Geometry) -> Classes:
    found = read_label(path)
    if difference := grid.difference(found.geometry):
        raise GeometryMismatch(f"{path}: the reference lies on another grid than the image: {difference}")
    try:
        return annotation.classes(found.voxels)
    except ValueError as error:
        raise VolumeError(f"{path}: {error}") from error


def _of_manifest(model: Model, asked: Asked, manifest: Path, console: Console) -> list[Subject]:
    if asked.labels is not None:
        raise ConfigError("--labels: the manifest says where references are; give one of the two")
    dataset = load_dataset(manifest, asked.root)
    if not dataset.manifest.labels.matches(model.schema):
        theirs, ours = (", ".join(schema.names) for schema in (dataset.manifest.labels, model.schema))
        raise ManifestError(f"{manifest}: its labels are {theirs}, the model's are {ours}; give the model's manifest")
    wanted = Wanted(model.plan.channels, asked.root, asked.series)
    studies = {study.name: study for study in find_studies([manifest], wanted, console=console)}
    return [_subject(dataset, studies, case_id, manifest) for case_id in asked.cases]


def _subject(dataset: Dataset, studies: dict[str, Study], case_id: str, manifest: Path) -> Subject:
    case = next((case for case in dataset.manifest.cases if case.case_id == case_id), None)
    if case is None:
        near = difflib.get_close_matches(case_id, [c.case_id for c in dataset.manifest.cases], n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ManifestError(f"{manifest}: no case '{case_id}'; {hint}it has {len(dataset.manifest.cases)} cases")
    return Subject(studies[case_id], dataset.label_path(case), dataset.annotation(case))
