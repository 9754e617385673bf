"""Which prediction belongs to which reference, and what their labels mean: label maps on disk, by name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from pipeline.errors import VolumeError
from pipeline.files import safe_name
from pipeline.manifest import Dataset, load_dataset
from pipeline.manifest_formats import VOLUME_SUFFIXES, volume_stem
from transforms.annotation import Annotation
from transforms.labels import LabelSchema

SCHEMA_FILE = "labels.json"
"""The label schema that prediction writes beside its results."""


@dataclass(frozen=True)
class Reference:
    """An annotated case: where its label map is, whose it is, and how it is read if not as it is."""

    case_id: str
    path: Path
    patient_id: str
    fold: int | None = None
    annotation: Annotation | None = None


def references_of_dataset(dataset: Dataset) -> tuple[Reference, ...]:
    """The annotated cases of a dataset, with their patients and folds."""
    labelled = [(case, dataset.label_path(case)) for case in dataset.manifest.cases]
    return tuple(
        Reference(c.case_id, path, c.patient_id, c.fold, dataset.annotation(c))
        for c, path in labelled
        if path is not None
    )


def dataset_at(references: Path) -> Dataset | None:
    """The dataset when the path is a manifest, or a folder with nnU-Net's or MSD's dataset.json."""
    is_folder = (references / "dataset.json").is_file() and not _volumes_by_name(references)
    return load_dataset(references) if is_folder or references.suffix.lower() == ".json" else None


def match_by_name(predictions: Path, references: Path | Dataset) -> tuple[dict[str, Path], dict[str, Reference]]:
    """Predictions and references by case id. One prediction file asks for its own reference alone."""
    found = _some_volumes(predictions)
    if isinstance(references, Dataset):
        wanted = {reference.case_id: reference for reference in references_of_dataset(references)}
    else:
        wanted = {name: Reference(name, path, name) for name, path in _some_volumes(references).items()}
        if predictions.is_file() and references.is_file():
            return dict.fromkeys(wanted, predictions), wanted
    if predictions.is_file():
        wanted = {name: reference for name, reference in wanted.items() if name in found} or wanted
    return found, wanted


def _some_volumes(path: Path) -> dict[str, Path]:
    if not path.exists():
        raise VolumeError(f"{path}: no such file or folder")
    if volumes := _volumes_by_name(path):
        return volumes
    raise VolumeError(f"{path}: no label map here; one is a file that ends in {' or '.join(VOLUME_SUFFIXES)}")


def _volumes_by_name(path: Path) -> dict[str, Path]:
    """The volume files of a folder, or the one file, by name: without the suffix, as prediction names its results."""
    if path.is_file():
        return {safe_name(volume_stem(path)): path}
    try:
        files = sorted(file for file in path.iterdir() if file.name.lower().endswith(VOLUME_SUFFIXES))
    except OSError as error:
        raise VolumeError(f"{path}: this folder cannot be read ({error.strerror})") from error
    named: dict[str, Path] = {}
    for file in files:
        if file.name.startswith(".") or not file.is_file():
            continue
        name = safe_name(volume_stem(file))
        if name in named:
            raise VolumeError(f"{path}: both {named[name].name} and {file.name} are case '{name}'; keep one of them")
        named[name] = file
    return named


def known_schema(predictions: Path, dataset: Dataset | None) -> LabelSchema | None:
    """The dataset's schema, or the one beside the predictions; the two may not contradict each other."""
    file = (predictions if predictions.is_dir() else predictions.parent) / SCHEMA_FILE
    beside = _read_schema(file) if file.is_file() else None
    if dataset is None:
        return beside
    labels = dataset.manifest.labels
    if beside and not beside.matches(labels):
        raise VolumeError(
            f"{file}: the predictions' labels are {_listed(beside)}, those of the manifest "
            f"'{dataset.manifest.name}' are {_listed(labels)}"
        )
    return labels


def _read_schema(file: Path) -> LabelSchema:
    try:
        return LabelSchema.model_validate_json(file.read_bytes())
    except OSError as error:
        raise VolumeError(f"{file}: cannot be read ({error.strerror})") from error
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "content"
        raise VolumeError(f"{file}: not a label schema: {key}: {first['msg']}") from error


def _listed(schema: LabelSchema) -> str:
    return ", ".join(f"{label.id} {label.name}" for label in schema.labels)
