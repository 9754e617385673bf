"""Make a manifest from folders: pair images with labels, find the label ids, tell the patients apart."""

from __future__ import annotations

import csv
import hmac
import os
import re
import secrets
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipeline.errors import ManifestError
from pipeline.files import safe_name
from pipeline.manifest import Channel, Dataset, parse_manifest
from pipeline.manifest_formats import VOLUME_SUFFIXES, refuse_all, split_channel_files, volume_stem
from transforms.dicom_magic import is_dicom
from transforms.labels import MAX_LABEL_ID, LabelSchema, schema_from_names

LABEL_SUFFIXES = ("_seg", "_label", "_labels", "_mask", "_gt")
"""Endings of a label's file name that its image does not have."""

_LABELS_BESIDE = {"images": "labels", "imagesTr": "labelsTr"}
_TABLE_COLUMNS = ("case_id", "patient_id")
_SEPARATORS = "_-."
_SHORTEST_IDENTITY = 3
_PSEUDONYM_DIGITS = 16

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class PatientRule:
    """Which cases belong to one patient; without a rule each is a patient, or as the DICOM files say.

    pattern: a regular expression searched in the image's path below `images`; its group 1 is the patient id.
    table: case id to patient id, as `read_patient_table` gives it.
    salt: key of the hash that stands for a DICOM PatientID; by default a new one each time, then forgotten.
    """

    pattern: str | None = None
    table: Mapping[str, str] | None = None
    salt: str | None = None


def build_manifest(
    images: Path,
    labels: Path | None,
    *,
    name: str,
    channels: Sequence[Channel],
    label_names: Mapping[int, str] | None = None,
    patients: PatientRule | None = None,
) -> Dataset:
    """Pair what lies in two folders; the root is the folder that holds both. Write it with `save_manifest`.

    A case of one channel is a file, or a folder of one DICOM series. Several channels are told apart by
    subfolders of `images` named after them, or by an ending of the file name (case_T1, or case_0000 as in
    nnU-Net), all files together or in a folder a case. A case may lack channels that are optional. Labels are
    named after the case, `LABEL_SUFFIXES` allowed. Without `label_names` every label is read and its values are
    called label_1, .... Without `labels` too the manifest is fit for prediction only; as a manifest has one label at
    least, it has label_1.

    Raises:
        ManifestError: images and labels that have no partner (all are listed), a rule for patients that
            does not cover every case, a DICOM folder that carries its patient's name, or a folder that holds
            the images and the labels.
    """
    source = f"{images}"
    _refuse_folder_of_both(images, channels)
    files = _image_files(images, channels)
    label_of = _label_files(labels, set(files), source) if labels is not None else {}
    root = Path(os.path.commonpath([p.resolve() for p in (images, labels) if p is not None]))
    patient_of = patients_of(files, images, patients or PatientRule())
    document = {
        "name": name,
        "channels": [channel.model_dump() for channel in channels],
        "labels": schema_of(label_names or _numbered_names(labels), source).model_dump(),
        "cases": [
            {
                "case_id": safe_name(case),
                "patient_id": patient_of[case],
                "images": {name: below(root, path) for name, path in files[case].items()},
                "label": below(root, label_of[case]) if case in label_of else None,
            }
            for case in sorted(files)
        ],
    }
    return Dataset(manifest=parse_manifest(document, source=source), root=root)


def find_label_ids(labels: Path, on_progress: Progress | None = None) -> list[int]:
    """Read every label of a folder: the values that occur, 0 left out, sorted.

    Raises:
        VolumeError: a label that cannot be read, or is no label.
    """
    return label_ids_in([path for _, path in _entries(labels)], on_progress)


def label_ids_in(paths: Sequence[Path], on_progress: Progress | None = None) -> list[int]:
    """The same of these files."""
    import numpy as np

    from transforms.volume import read_label

    found: set[int] = set()
    for done, path in enumerate(paths, start=1):
        found.update(int(i) for i in np.unique(read_label(path).voxels))
        if on_progress is not None:
            on_progress(done, len(paths))
    return sorted(found - {0})


def read_patient_table(path: Path) -> dict[str, str]:
    """Case to patient, of a CSV file with the columns case_id and patient_id (others are ignored).

    Raises:
        ManifestError: unreadable, without these columns, or a case with two patients.
    """
    table: dict[str, str] = {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream, skipinitialspace=True)
            columns, rows = list(reader.fieldnames or ()), list(reader)
    except FileNotFoundError as error:
        raise ManifestError(f"{path}: no such file; expected a CSV file of patients") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ManifestError(f"{path}: cannot be read as CSV ({type(error).__name__})") from error
    if not set(_TABLE_COLUMNS) <= set(columns):
        found = ",".join(columns) or "an empty file"
        raise ManifestError(f"{path}: expected the columns {','.join(_TABLE_COLUMNS)}; found {found}")
    for line, row in enumerate(rows, start=2):
        case, patient = row.get("case_id"), row.get("patient_id")
        if not case or not patient:
            raise ManifestError(f"{path}: line {line} has no case_id or no patient_id, which are both needed")
        if table.setdefault(case.strip(), patient.strip()) != patient.strip():
            raise ManifestError(f"{path}: line {line} gives case '{case}' a second patient")
    return table


def _image_files(images: Path, channels: Sequence[Channel]) -> dict[str, dict[str, Path]]:
    """Case to the paths of the channels that it has, by their names in the channels' order."""
    by_case: dict[str, dict[int, Path]] = {}
    problems: dict[str, list[str]] = {"of a channel twice": [], "without a channel's name or number": []}
    for case, channel, path in _channel_entries(images, [channel.name for channel in channels]):
        if channel is None:
            problems["without a channel's name or number"].append(path.name)
        elif channel in by_case.setdefault(case, {}):
            problems["of a channel twice"].append(case)
        else:
            by_case[case][channel] = path
    required = {index for index, channel in enumerate(channels) if not channel.optional}
    problems["without all of their channels"] = sorted(case for case, found in by_case.items() if required - set(found))
    refuse_all(problems, str(images))
    if not by_case and any(path.is_file() and is_dicom(path) for path in _visible(images)):
        raise ManifestError(f"{images}: this is one DICOM series; give the folder above it")
    if not by_case:
        raise ManifestError(f"{images}: no volume here ({', '.join(VOLUME_SUFFIXES)}, or DICOM folders)")
    return {case: {channels[i].name: found[i] for i in sorted(found)} for case, found in by_case.items()}


def question_of_both(folder: Path) -> str | None:
    """What to ask of a folder that holds those of the images and of the labels, by their usual names; else None."""
    pairs = ((folder / images, folder / labels) for images, labels in _LABELS_BESIDE.items())
    asked = (
        f"did you mean {images} --labels {labels}?" for images, labels in pairs if images.is_dir() and labels.is_dir()
    )
    return next(asked, None)


def _refuse_folder_of_both(images: Path, channels: Sequence[Channel]) -> None:
    """Its label maps would pass for images, unless the folders of the channels are all that is looked at."""
    question = question_of_both(images)
    if question is not None and not _has_folder_of_each(images, [channel.name for channel in channels]):
        raise ManifestError(f"{images}: label maps lie below this folder of images; {question}")


def _has_folder_of_each(images: Path, channels: Sequence[str]) -> bool:
    return all((images / channel).is_dir() for channel in channels)


def _channel_entries(images: Path, channels: list[str]) -> Iterator[tuple[str, int | None, Path]]:
    """Each image as its case, the index of its channel (None: not to be told) and its path."""
    if _has_folder_of_each(images, channels):
        for index, channel in enumerate(channels):
            yield from ((case, index, path) for case, path in _entries(images / channel))
        return
    entries = _entries(images)
    numbered, strangers = split_channel_files([stem for stem, _ in entries], len(channels))
    if entries and not strangers:
        paths = dict(entries)
        for case, found in numbered.items():
            yield from ((case, index, paths[stem]) for index, stem in found.items())
        return
    split = [(*_split_channel(stem, channels), path) for stem, path in entries]
    if len(channels) == 1 and any(channel is None for _, channel, _ in split):
        split = [(stem, 0, path) for stem, path in entries]
    yield from split


def _split_channel(stem: str, channels: list[str]) -> tuple[str, int | None]:
    for index, channel in enumerate(channels):
        head, separator = stem[: -len(channel) - 1], stem[-len(channel) - 1 : -len(channel)]
        if stem.casefold().endswith(channel.casefold()) and head and separator in _SEPARATORS:
            return head, index
    return stem, None


def _entries(folder: Path) -> list[tuple[str, Path]]:
    """The volumes of a folder by their stems: files, DICOM folders, files in the folder of a case."""
    if not folder.is_dir():
        raise ManifestError(f"{folder}: {'is a file; expected a folder' if folder.exists() else 'no such folder'}")
    entries: list[tuple[str, Path]] = []
    for path in _visible(folder):
        if not path.is_dir():
            entries += [(volume_stem(path), path)] if _is_volume(path) else []
            continue
        inside = [p for p in _visible(path) if _is_volume(p)]
        if len(inside) == 1:
            entries.append((path.name, inside[0]))
        elif inside:
            entries += [(_joined_stem(path.name, volume_stem(p)), p) for p in inside]
        elif any(_visible(path)):
            entries.append((path.name, path))
    counts = Counter(stem for stem, _ in entries)
    twice = sorted(stem for stem, count in counts.items() if count > 1)
    refuse_all({"names that stand for two volumes": twice}, str(folder))
    return entries


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _is_volume(path: Path) -> bool:
    return path.is_file() and path.name.lower().endswith(VOLUME_SUFFIXES)


def _joined_stem(case: str, stem: str) -> str:
    return stem if stem.startswith(case) else f"{case}_{stem}"


def _label_files(labels: Path, cases: set[str], source: str) -> dict[str, Path]:
    by_case: dict[str, Path] = {}
    problems: dict[str, list[str]] = {"labels that are a second one": [], "labels without an image": []}
    entries = _entries(labels)
    if not entries:
        raise ManifestError(f"{labels}: no label map here ({', '.join(VOLUME_SUFFIXES)}, or DICOM folders)")
    for stem, path in entries:
        short = next((stem.removesuffix(s) for s in LABEL_SUFFIXES if stem.endswith(s)), stem)
        case = stem if stem in cases else short
        if case not in cases:
            problems["labels without an image"].append(path.name)
        elif case in by_case:
            problems["labels that are a second one"].append(path.name)
        else:
            by_case[case] = path
    problems["images without a label"] = sorted(cases - set(by_case))
    refuse_all(problems, source)
    return by_case


def _numbered_names(labels: Path | None) -> dict[int, str]:
    return {i: f"label_{i}" for i in ([1] if labels is None else find_label_ids(labels))}


def schema_of(names: Mapping[int, str], source: str) -> LabelSchema:
    """Labels by their values; raises ManifestError if there are none or they contradict each other."""
    if not names:
        raise ManifestError(
            f"{source}: no label is known; name them, as --label 1:liver, or give their folder with --labels"
        )
    if wrong := [i for i in names if not 1 <= i <= MAX_LABEL_ID]:
        raise ManifestError(
            f"{source}: label {wrong[0]} ({names[wrong[0]]}): a label's id is a whole number from 1 to {MAX_LABEL_ID}"
        )
    try:
        return schema_from_names(dict(names))
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise ManifestError(f"{source}: labels: {reason}") from error


def below(root: Path, path: Path) -> str:
    """A path as a manifest has it: relative to a resolved `root`; the file itself may be a link."""
    return (path.parent.resolve() / path.name).relative_to(root).as_posix()


def patients_of(files: Mapping[str, Mapping[str, Path]], images: Path, rule: PatientRule) -> dict[str, str]:
    """Case to patient, for cases with their files below `images` by channel.

    Raises:
        ManifestError: the rule does not cover every case, or a DICOM folder carries its patient's name.
    """
    if rule.pattern is not None:
        first = {case: next(iter(paths.values())).relative_to(images).as_posix() for case, paths in files.items()}
        found = {case: _first_group(rule.pattern, path) for case, path in first.items()}
    elif rule.table is not None:
        found = {case: rule.table.get(case) or rule.table.get(safe_name(case)) for case in files}
    else:
        found = _own_patients(files, rule.salt or secrets.token_hex())
    missing = sorted(case for case, patient in found.items() if not patient)
    refuse_all({"cases without a patient by the given rule": missing}, str(images))
    return {case: patient for case, patient in found.items() if patient}


def _first_group(pattern: str, text: str) -> str | None:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ManifestError(f"the patient pattern '{pattern}' is no regular expression: {error}") from error
    if compiled.groups < 1:
        raise ManifestError(f"the patient pattern '{pattern}' needs a group in round brackets")
    match = compiled.search(text)
    return match[1] if match else None


def _own_patients(files: Mapping[str, Mapping[str, Path]], salt: str) -> dict[str, str | None]:
    """Each case its own patient, unless its DICOM files name one: a keyed hash of that name stands for it."""
    found: dict[str, str | None] = {}
    problems: dict[str, list[str]] = {"cases with channels of different patients": []}
    speaking = 0
    for case, paths in files.items():
        headers = [_dicom_identity(path) for path in paths.values() if path.is_dir()]
        identities = {header["PatientID"] for header in headers} - {""}
        digests = [hmac.new(salt.encode(), i.encode(), "sha256").hexdigest() for i in identities]
        found[case] = f"p{digests[0][:_PSEUDONYM_DIGITS]}" if digests else safe_name(case)
        speaking += any(_names_its_patient(case, header) for header in headers)
        if len(identities) > 1:
            problems["cases with channels of different patients"].append(case)
    if speaking:
        # Naming the folders here would repeat what must not be told.
        raise ManifestError(
            f"{speaking} of {len(files)} DICOM folders carry their patient's name or id in their own name; "
            "rename them to pseudonyms first"
        )
    refuse_all(problems, "DICOM headers")
    return found


def _dicom_identity(folder: Path) -> dict[str, str]:
    import pydicom
    from pydicom.errors import InvalidDicomError

    from transforms.dicom_header import PARSE_FAULTS, quiet_pydicom

    tags = ["PatientID", "PatientName", "PatientIdentityRemoved"]
    for path in (p for p in sorted(folder.rglob("*")) if p.is_file() and not p.name.startswith(".")):
        try:
            # Its remarks would quote the very values that must not be told.
            with quiet_pydicom():
                header: Any = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=tags)
                return {tag: str(header.get(tag, "") or "").strip() for tag in tags}
        except (InvalidDicomError, *PARSE_FAULTS):
            continue
    raise ManifestError(f"{folder}: no DICOM file in this folder")


def _names_its_patient(folder_name: str, header: dict[str, str]) -> bool:
    if header.get("PatientIdentityRemoved", "").upper() == "YES":
        return False
    words = [header.get("PatientID", ""), *re.split(r"[\^\s=]+", header.get("PatientName", ""))]
    plain = [re.sub(r"[\W_]", "", word).casefold() for word in words]
    name = re.sub(r"[\W_]", "", folder_name).casefold()
    return any(len(word) >= _SHORTEST_IDENTITY and word in name for word in plain)
