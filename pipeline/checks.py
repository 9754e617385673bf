"""Open every file of a dataset and report every fault of every case at once.

Cases are read in threads, one case a thread in memory; decompression and numpy let the threads run at once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from pipeline.errors import VolsegError
from pipeline.manifest import Case, Channel, Dataset
from transforms.geometry import Geometry
from transforms.labels import MAX_LABEL_ID

if TYPE_CHECKING:
    from transforms.annotation import Annotation
    from transforms.volume import Volume

# "unreadable" is whatever a reader refuses: damage, NaN or infinite voxels, labels with fractions; its line says which.
FaultKind = Literal[
    "missing-file",
    "unreadable",
    "modality",
    "constant",
    "channel-grid",
    "label-grid",
    "unknown-label",
    "unannotated-label",
    "nothing-annotated",
    "ignored-voxels",
    "empty-label",
    "absent-label",
    "absent-channel",
    "shared-label",
    "outlying-volume",
    "duplicate",
    "repeated",
    "nothing-labelled",
]
Severity = Literal["error", "note"]

_OUTLYING_DEVIATIONS = 6.0
_OUTLYING_FACTOR = 3.0
_FEWEST_TO_COMPARE = 10

Visit = Callable[[Case, "Sequence[Volume | None]", "Volume | None"], None]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong. `case_id` and `file` are None where it concerns the whole dataset."""

    case_id: str | None
    file: str | None
    kind: FaultKind
    message: str
    severity: Severity = "error"


@dataclass(frozen=True)
class CaseFacts:
    """What folds need to know of a case whose files could be read and share a grid.

    image_sha256: one a channel that the case has, of the voxels and nothing else (see `voxel_sha256`).
    label_volumes_mm3: by label name, every label that was annotated in the case; None when there is no label file.
    """

    case_id: str
    patient_id: str
    fold: int | None
    image_sha256: tuple[str, ...]
    label_volumes_mm3: dict[str, float] | None
    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> CaseFacts:
        """The inverse of `dataclasses.asdict` through JSON."""
        tuples = {key: tuple(value[key]) for key in ("image_sha256", "shape", "spacing_mm")}
        return cls(**{**value, **tuples})


@dataclass(frozen=True)
class CheckReport:
    """The outcome of `check_dataset`: faults in the manifest's order of cases, then those of the whole.

    `channel_counts` is by channel name, how many of the cases have it.
    """

    dataset: str
    case_count: int
    faults: tuple[Fault, ...]
    facts: tuple[CaseFacts, ...]
    channel_counts: dict[str, int] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """True when nothing but notes was found."""
        return all(fault.severity == "note" for fault in self.faults)

    def to_json(self) -> dict[str, Any]:
        """Everything, as a JSON value."""
        return {**asdict(self), "ok": self.ok}


def check_dataset(
    dataset: Dataset, *, workers: int = 2, on_progress: Progress | None = None, visit: Visit | None = None
) -> CheckReport:
    """Read every image and label, `workers` cases at a time; one bad case never stops the rest.

    `on_progress(done, total)` is called in this thread after each case. `visit(case, images, label)` is
    called in a worker's thread for each case without an error, so that others can measure on the same pass;
    the label has the schema's ids, whatever its file has;
    its images are one a channel, None where the case lacks it, and what it raises ends the check.
    """
    cases = dataset.manifest.cases
    outcomes: dict[str, _Outcome] = {}
    with ThreadPoolExecutor(max_workers=max(1, workers)) as pool:
        futures = {pool.submit(_check_case, dataset, case, visit): case.case_id for case in cases}
        try:
            for future in as_completed(futures):
                outcomes[futures[future]] = future.result()
                if on_progress is not None:
                    on_progress(len(outcomes), len(cases))
        finally:
            # Without this an interrupt would wait for every case that is still to come.
            pool.shutdown(wait=False, cancel_futures=True)
    ordered = [outcomes[case.case_id] for case in cases]
    faults = [fault for outcome in ordered for fault in outcome.faults]
    facts = tuple(outcome.facts for outcome in ordered if outcome.facts is not None)
    faults += [*_shared_labels(cases), *_same_voxels(cases, ordered), *_outlying_volumes(cases, facts)]
    counts = {c.name: sum(c.name in case.images for case in cases) for c in dataset.manifest.channels}
    faults += [*_absent_labels(dataset, ordered), *_absent_channels(counts), *_nothing_labelled(cases)]
    return CheckReport(dataset.manifest.name, len(cases), tuple(faults), facts, counts)


def voxel_sha256(voxels: npt.NDArray[Any]) -> str:
    """Hex SHA-256 of shape and values, whatever the stored type and wherever the grid lies in the patient.

    A copy that was flipped, resampled or rescaled is another volume to it.
    """
    values = np.array(voxels, dtype="<f4", order="C")
    values += 0  # makes -0.0 and 0.0 alike
    digest = hashlib.sha256(str(values.shape).encode())
    digest.update(values.data)
    return digest.hexdigest()


@dataclass
class _Outcome:
    """What one case gave; filled while its files are read."""

    case: Case
    faults: list[Fault] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)
    present: set[str] | None = None
    facts: CaseFacts | None = None

    @property
    def is_sound(self) -> bool:
        """True when nothing but notes was found."""
        return all(fault.severity == "note" for fault in self.faults)

    def add(self, kind: FaultKind, file: str, message: str, severity: Severity = "error") -> None:
        self.faults.append(Fault(self.case.case_id, file, kind, message, severity))


def _check_case(dataset: Dataset, case: Case, visit: Visit | None) -> _Outcome:
    from transforms.volume import read_label, read_volume

    outcome = _Outcome(case)
    images: dict[str, Volume] = {}
    for channel in (c for c in dataset.manifest.channels if c.name in case.images):
        image = _read(dataset, case.images[channel.name], read_volume, outcome)
        if image is not None:
            _check_image(image, channel, outcome)
            images[channel.name] = image
    label = None if case.label is None else _read(dataset, case.label, read_label, outcome)
    _check_grids(images, label, outcome)
    annotation = dataset.annotation(case)
    volumes_mm3 = None if label is None else _check_label(label, annotation, outcome)
    if outcome.is_sound:
        outcome.facts = _facts(outcome, next(iter(images.values())).geometry, volumes_mm3)
        if visit is not None:
            known = None if label is None else replace(label, voxels=annotation.ids(label.voxels))
            visit(case, [images.get(channel.name) for channel in dataset.manifest.channels], known)
    return outcome


def _read(dataset: Dataset, file: str, reader: Callable[[Path], Volume], outcome: _Outcome) -> Volume | None:
    path = dataset.root / file
    if not path.exists():
        outcome.add("missing-file", file, "no such file below the dataset's root")
        return None
    try:
        return reader(path)
    except VolsegError as error:
        outcome.add("unreadable", file, str(error).removeprefix(f"{path}: "))
    except Exception as error:  # a reader's own fault must not hide the faults of the other cases
        outcome.add("unreadable", file, f"the reader failed with {type(error).__name__}")
    return None


def _check_image(image: Volume, channel: Channel, outcome: _Outcome) -> None:
    file = outcome.case.images[channel.name]
    outcome.digests[file] = voxel_sha256(image.voxels)
    if image.modality is not None and image.modality != channel.modality:
        outcome.add("modality", file, f"{image.modality} by its header, {channel.modality} by the manifest")
    if image.voxels.min() == image.voxels.max():
        outcome.add("constant", file, f"every voxel has the value {image.voxels.flat[0]:g}")


def _check_grids(images: Mapping[str, Volume], label: Volume | None, outcome: _Outcome) -> None:
    """Against the first image that could be read; each difference shows both grids. `images` are by channel."""
    if not images:
        return
    first, reference = next((name, image.geometry) for name, image in images.items())
    for name, image in images.items():
        if (difference := reference.difference(image.geometry)) is not None:
            message = f"channels '{first}' and '{name}' differ: {difference}"
            outcome.add("channel-grid", outcome.case.images[name], message)
    if label is not None and (difference := reference.difference(label.geometry)) is not None:
        outcome.add("label-grid", outcome.case.label or "", f"image and label differ: {difference}")


def _check_label(label: Volume, annotation: Annotation, outcome: _Outcome) -> dict[str, float]:
    """Volume of each annotated label."""
    counts = _voxel_counts(label.voxels)
    names, file, ignore = annotation.name_of_value, outcome.case.label or "", annotation.schema.ignore
    if unknown := sorted(set(counts) - {0, ignore} - set(names)):
        voxels = sum(counts[i] for i in unknown)
        known = ", ".join(f"{value} {name}" for value, name in sorted(names.items()))
        outcome.add("unknown-label", file, f"values {unknown} in {voxels} voxels; the schema knows {known}")
    sizes = {name: counts[value] for value, name in names.items() if value in counts}
    outcome.present = set(sizes)
    for name in annotation.unannotated_in(set(counts)):
        message = f"'{name}' occurs in {sizes[name]} voxels, but is not among what the manifest says was annotated"
        outcome.add("unannotated-label", file, message)
    if not set(counts) - {0, ignore}:
        outcome.add("empty-label", file, "no voxel is labelled")
    _check_extent(counts.get(ignore, 0) if ignore else 0, label.voxels.size, annotation, outcome)
    mm3 = label.geometry.voxel_volume_mm3
    return {name: sizes.get(name, 0) * mm3 for name in annotation.annotated_names}


def _check_extent(ignored: int, voxels: int, annotation: Annotation, outcome: _Outcome) -> None:
    """How much of the volume, and whether any label, was annotated at all."""
    file = outcome.case.label or ""
    if not annotation.annotated_names:
        outcome.add("nothing-annotated", file, "no label is annotated by the manifest; leave out the case's label")
    elif ignored == voxels:
        outcome.add("nothing-annotated", file, f"every voxel is to be ignored ({annotation.schema.ignore})")
    elif ignored:
        message = f"{ignored / voxels:.1%} of the voxels are to be ignored ({annotation.schema.ignore})"
        outcome.add("ignored-voxels", file, message, "note")


def _voxel_counts(label_map: npt.NDArray[Any]) -> dict[int, int]:
    """Voxels of each value that occurs."""
    if label_map.min() < 0 or label_map.max() > MAX_LABEL_ID:
        ids, counts = np.unique(label_map, return_counts=True)
        return {int(i): int(n) for i, n in zip(ids, counts, strict=True)}
    # Plane by plane, because bincount widens what it is given to eight bytes a voxel.
    total = np.zeros(MAX_LABEL_ID + 1, dtype=np.int64)
    for plane in label_map:
        total += np.bincount(plane.ravel(), minlength=MAX_LABEL_ID + 1)
    return {int(i): int(total[i]) for i in np.flatnonzero(total)}


def _facts(outcome: _Outcome, geometry: Geometry, volumes_mm3: dict[str, float] | None) -> CaseFacts:
    return CaseFacts(
        case_id=outcome.case.case_id,
        patient_id=outcome.case.patient_id,
        fold=outcome.case.fold,
        image_sha256=tuple(outcome.digests.values()),
        label_volumes_mm3=volumes_mm3,
        shape=geometry.shape,
        spacing_mm=geometry.spacing_mm,
    )


def _shared_labels(cases: Sequence[Case]) -> Iterator[Fault]:
    first: dict[str, str] = {}
    for case in cases:
        if case.label is not None and first.setdefault(case.label, case.case_id) != case.case_id:
            message = f"also the label of case {first[case.label]}"
            yield Fault(case.case_id, case.label, "shared-label", message)


def _same_voxels(cases: Sequence[Case], outcomes: Sequence[_Outcome]) -> Iterator[Fault]:
    """Each image against the first with the same voxels: an error under two patients, else a note."""
    first: dict[str, tuple[Case, str]] = {}
    for case, outcome in zip(cases, outcomes, strict=True):
        for file, digest in outcome.digests.items():
            other, other_file = first.setdefault(digest, (case, file))
            if (other, other_file) == (case, file):
                continue
            message = f"the same voxels as {other_file} of case {other.case_id}"
            if other.patient_id == case.patient_id:
                yield Fault(case.case_id, file, "repeated", f"{message}, the same patient", "note")
            else:
                yield Fault(case.case_id, file, "duplicate", f"{message}, another patient")


def _outlying_volumes(cases: Sequence[Case], facts: Sequence[CaseFacts]) -> Iterator[Fault]:
    """Labels many times as large or small as in the other cases, where those agree: often a wrong contour.

    Judged by the robust standard deviation (1.4826 times the median deviation) of the logarithm of the volume.
    """
    file_of = {case.case_id: case.label for case in cases}
    for name in {name: None for fact in facts for name in fact.label_volumes_mm3 or {}}:
        volumes = {f.case_id: (f.label_volumes_mm3 or {}).get(name, 0.0) for f in facts}
        present = {case_id: volume for case_id, volume in volumes.items() if volume > 0}
        if len(present) < _FEWEST_TO_COMPARE:
            continue
        logs = np.log(list(present.values()))
        middle = np.median(logs)
        limit = _OUTLYING_DEVIATIONS * 1.4826 * np.median(np.abs(logs - middle))
        for case_id, log in zip(present, logs, strict=True):
            if abs(log - middle) > max(limit, np.log(_OUTLYING_FACTOR)):
                message = f"'{name}' has {np.exp(log - middle):.2g} times the volume of the middle case"
                yield Fault(case_id, file_of[case_id], "outlying-volume", message, "note")


def _absent_labels(dataset: Dataset, outcomes: Sequence[_Outcome]) -> Iterator[Fault]:
    """Labels that occur in no case that they are annotated in."""
    read = [(o.present, dataset.annotation(o.case).annotated_names) for o in outcomes if o.present is not None]
    for label in dataset.manifest.labels.labels:
        where = [present for present, annotated in read if label.name in annotated]
        if read and not any(label.name in present for present in where):
            found = f"occurs in none of the {len(where)} labels that were read" if where else "is annotated in no case"
            yield Fault(None, None, "absent-label", f"label {label.id} '{label.name}' {found}")


def _absent_channels(counts: Mapping[str, int]) -> Iterator[Fault]:
    """An optional channel that no case has: fit for prediction, but nothing can be learnt of it."""
    for name in (name for name, count in counts.items() if not count):
        yield Fault(None, None, "absent-channel", f"no case has the optional channel '{name}'", "note")


def _nothing_labelled(cases: Sequence[Case]) -> Iterator[Fault]:
    """No case names a label map: fit for prediction, but a training would find nothing to learn from."""
    if all(case.label is None for case in cases):
        yield Fault(None, None, "nothing-labelled", "no case has a label: nothing to train on", "note")
