"""BIDS datasets as manifests: a subject is a patient, a session a case, files are used where they lie.

Images are sub-X/[ses-Y/]DATATYPE/sub-X_[ses-Y_][ENTITIES_]SUFFIX.nii.gz; label maps have the same names below
derivatives/PIPELINE, with the suffix dseg (or mask), and a table beside or above them, [ENTITIES_]dseg.tsv, names
their values. Source: the BIDS specification 1.10, "Common principles" (entities, inheritance), "Imaging
derivatives" (segmentations, `index` and `name` of their tables) and "Data summary files" (participants.tsv).
"""

from __future__ import annotations

import csv
import json
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.errors import ManifestError
from pipeline.manifest import Channel, Dataset, parse_manifest
from pipeline.manifest_build import PatientRule, below, label_ids_in, patients_of, schema_of
from pipeline.manifest_formats import VOLUME_SUFFIXES, named, refuse_all, volume_stem

DESCRIPTION, PARTICIPANTS, DERIVATIVES = "dataset_description.json", "participants.tsv", "derivatives"

Session = tuple[str, ...]
"""('sub-01',) or ('sub-01', 'ses-02')."""

_ORIGINAL = "space-orig"
"""Says of a file that it lies in its image's own space, as a name without any `space-` does."""


@dataclass(frozen=True)
class Kind:
    """Which files are meant: those of this suffix that have at least these entities, as in 'acq-mprage_T1w'."""

    entities: frozenset[str]
    suffix: str

    def takes(self, other: Kind) -> bool:
        """Whether files of the other kind are of this one too."""
        return self.suffix == other.suffix and self.entities <= other.entities


@dataclass(frozen=True)
class LabelRule:
    """Where label maps are and what they mean.

    `folder` None: the one folder below derivatives that has any. `ending` is how their names end, as 'dseg' or
    'desc-lesion_mask'. `names` None: from their tables, else label_1, ... for the values that occur.
    """

    folder: Path | None = None
    ending: str = "dseg"
    names: Mapping[int, str] | None = None


def is_bids(folder: Path) -> bool:
    """Whether a folder describes itself as BIDS, or its subjects' files are named and placed so."""
    if (folder / DESCRIPTION).is_file():
        return True
    return any(True for _ in folder.glob("sub-*/*/sub-*_*.nii*")) or any(True for _ in folder.glob("sub-*/ses-*/*/*"))


def build_bids(
    folder: Path,
    *,
    channels: Sequence[Channel],
    name: str | None = None,
    labels: LabelRule | None = None,
    patients: PatientRule | None = None,
) -> Dataset:
    """A case for each session that has an image of any channel; its patient is the subject unless a rule says else.

    A channel's name is how the names of its files end: 'T1w', or with entities, 'ce-gadolinium_T1w'; a file is of
    the channel that says most about it. Sessions without a label map are cases without a label.

    Raises:
        ManifestError: two files for one channel or label of a session, files of different kinds for one channel or
            label in different sessions, required channels that are missing, labels without an image or of another
            run, acquisition or space than their image, links to content that is not here, or no table or several
            that name the labels.
    """
    rule = labels or LabelRule()
    files = _images(folder, channels)
    found = _labels(folder, rule, files)
    root = Path(os.path.commonpath([path.resolve() for path in (folder, rule.folder or folder)]))
    ids = {session: "_".join(session) for session in files}
    if patients is None:
        patient_of = {ids[session]: session[0] for session in files}
    else:
        patient_of = patients_of({ids[session]: found_here for session, found_here in files.items()}, folder, patients)
    described = _description(folder)
    document = {
        "name": name or str(described.get("Name") or folder.resolve().name),
        "licence": str(described.get("License", "")),
        "source": str(described.get("DatasetDOI", "")),
        "channels": [channel.model_dump() for channel in channels],
        "labels": schema_of(_names(folder, rule, list(found.values())), str(folder)).model_dump(),
        "cases": [
            {
                "case_id": ids[session],
                "patient_id": patient_of[ids[session]],
                "images": {channel: below(root, path) for channel, path in files[session].items()},
                "label": below(root, found[session]) if session in found else None,
            }
            for session in sorted(files)
        ],
    }
    return Dataset(manifest=parse_manifest(document, source=str(folder)), root=root)


def image_kinds(folder: Path) -> dict[str, int]:
    """The suffixes of a BIDS folder's volumes, and in how many files each occurs, most frequent first."""
    counts: dict[str, int] = defaultdict(int)
    for _, kind, _ in _files(folder):
        counts[kind.suffix] += 1
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def unlisted_subjects(folder: Path) -> tuple[list[str], list[str]]:
    """Subjects of participants.tsv without a folder, and folders that it does not list; none where it is missing."""
    table = folder / PARTICIPANTS
    if not table.is_file():
        return [], []
    listed = {row["participant_id"] for row in _rows(table, ("participant_id",))}
    there = {path.name for path in folder.glob("sub-*") if path.is_dir()}
    return sorted(listed - there), sorted(there - listed)


def _images(folder: Path, channels: Sequence[Channel]) -> dict[Session, dict[str, Path]]:
    """By session, the path of each channel that it has, in the channels' order."""
    kinds = {channel.name: _kind(channel.name, "--channel") for channel in channels}
    found: dict[Session, dict[str, list[Path]]] = defaultdict(lambda: defaultdict(list))
    for session, kind, path in _files(folder):
        takers = [name for name, wanted in kinds.items() if wanted.takes(kind)]
        if takers:
            found[session][max(takers, key=lambda name: len(kinds[name].entities))].append(path)
    if not found:
        known = ", ".join(f"{suffix} ({count})" for suffix, count in image_kinds(folder).items()) or "no volume"
        raise ManifestError(f"{folder}: no file of {named(list(kinds))} in sub-*/; found {known}")
    several = [(name, paths) for by_name in found.values() for name, paths in by_name.items() if len(paths) > 1]
    _refuse_choice(several, folder, "--channel")
    for name in kinds:
        chosen = [by_name[name][0] for by_name in found.values() if name in by_name]
        _refuse_mixture(name, chosen, str(folder), "--channel")
    required = {channel.name for channel in channels if not channel.optional}
    lacking: dict[str, list[str]] = defaultdict(list)
    for session, by_name in sorted(found.items()):
        for name in sorted(required - set(by_name)):
            lacking[f"sessions without {name} (leave them out of the folder, or give --optional {name})"].append(
                "_".join(session)
            )
    refuse_all(lacking, str(folder))
    order = [channel.name for channel in channels]
    return {s: {name: by_name[name][0] for name in order if name in by_name} for s, by_name in found.items()}


def _labels(folder: Path, rule: LabelRule, images: Mapping[Session, Mapping[str, Path]]) -> dict[Session, Path]:
    """By session, its label map; `images` are those of each session by channel."""
    wanted = _kind(rule.ending, "--label-file")
    place = rule.folder or _pipeline_with(folder / DERIVATIVES, wanted)
    found: dict[Session, list[Path]] = defaultdict(list)
    for session, kind, path in _files(place) if place is not None else ():
        if wanted.takes(kind):
            found[session].append(path)
    if not found and rule.folder is not None:
        known = ", ".join(f"{suffix} ({count})" for suffix, count in image_kinds(rule.folder).items()) or "no volume"
        raise ManifestError(f"{rule.folder}: no label map *_{rule.ending} in sub-*/; found {known}")
    _refuse_choice([(rule.ending, paths) for paths in found.values() if len(paths) > 1], folder, "--label-file")
    refuse_all({"label maps without an image": sorted("_".join(s) for s in found.keys() - images)}, str(place))
    chosen = {session: paths[0] for session, paths in found.items()}
    _refuse_mixture(rule.ending, list(chosen.values()), str(place), "--label-file")
    _refuse_mismatch(chosen, images, str(place))
    return chosen


def _pipeline_with(derivatives: Path, wanted: Kind) -> Path | None:
    """The one folder below derivatives that holds such files; derivatives itself where it holds the subjects."""
    places = [derivatives, *sorted(p for p in derivatives.glob("*") if p.is_dir() and not p.name.startswith("sub-"))]
    having = [place for place in places if any(wanted.takes(kind) for _, kind, _ in _files(place))]
    if len(having) > 1:
        raise ManifestError(
            f"{derivatives}: label maps lie in {named([place.name for place in having])}; choose one with --labels"
        )
    return having[0] if having else None


def _files(folder: Path) -> Iterator[tuple[Session, Kind, Path]]:
    """The volumes of all subjects by name, links included whose content is not here."""
    for subject in sorted(path for path in folder.glob("sub-*") if path.is_dir()):
        for path in sorted(subject.rglob("sub-*")):
            if path.name.lower().endswith(VOLUME_SUFFIXES) and not path.is_dir():
                parsed = _parsed(path)
                if parsed is not None and parsed[0][0] == subject.name:
                    yield *parsed, path


def _parsed(path: Path) -> tuple[Session, Kind] | None:
    *entities, suffix = volume_stem(PurePosixPath(path.name)).split("_")
    if not entities or "-" in suffix or not all("-" in entity for entity in entities):
        return None
    session = tuple(e for e in entities if e.startswith(("sub-", "ses-")))
    return session, Kind(frozenset(entities) - frozenset(session), suffix)


def _kind(text: str, option: str) -> Kind:
    """'ce-gadolinium_T1w' as a kind."""
    *entities, suffix = text.split("_")
    if not suffix or "-" in suffix or not all("-" in entity for entity in entities):
        raise ManifestError(
            f"{option} {text}: a BIDS file is named by the end of its name, such as T1w or ce-gadolinium_T1w"
        )
    return Kind(frozenset(entities), suffix)


def _refuse_choice(several: Sequence[tuple[str, Sequence[Path]]], folder: Path, option: str) -> None:
    """One line where a session has two files for one thing, with what would tell them apart."""
    for name, paths in several:
        kinds = [parsed[1] for path in paths if (parsed := _parsed(path)) is not None]
        entities = [kind.entities for kind in kinds]
        apart = sorted(frozenset.union(*entities) - frozenset.intersection(*entities))
        how = f"say which, as {option} {apart[0]}_{name.split('_')[-1]}" if apart else "keep one of them"
        files = named([path.relative_to(folder).as_posix() if folder in path.parents else path.name for path in paths])
        raise ManifestError(f"{folder}: {name} stands for {len(paths)} files of one session ({files}); {how}")


def _refuse_mixture(what: str, paths: Sequence[Path], source: str, option: str) -> None:
    """One line where the files of one thing are of different kinds in different sessions.

    With and without contrast agent, or masks of the brain and of a lesion, are different things under one suffix.
    Runs are not: they are repetitions "with the same acquisition parameters" (entity `run` of the specification).
    Acquisitions neither, since sites name theirs as they like (`acq`).
    """
    asked = _kind(what, option).entities
    by_kind: dict[Kind, list[Path]] = defaultdict(list)
    for path in paths:
        kind = _kind_of(path)
        told = frozenset(
            entity for entity in kind.entities if entity in asked or not entity.startswith(("run-", "acq-"))
        )
        by_kind[Kind(told, kind.suffix)].append(path)
    if len(by_kind) > 1:
        kinds = sorted(by_kind, key=lambda kind: -len(by_kind[kind]))
        counts = [f"{_ending(kind)} in {len(by_kind[kind])} (such as {by_kind[kind][0].name})" for kind in kinds]
        fullest = max(kinds, key=lambda kind: len(kind.entities))
        raise ManifestError(
            f"{source}: {what} stands for files of different kinds in different sessions, {named(counts)}; choose "
            f"one, such as {option} {_ending(fullest)}, or leave the files of the others out of the folder"
        )


def _refuse_mismatch(labels: Mapping[Session, Path], images: Mapping[Session, Mapping[str, Path]], source: str) -> None:
    """One line where a label map was made for another image, by its name, than those of its session."""
    apart: dict[str, list[str]] = defaultdict(list)
    for session, label in sorted(labels.items()):
        beside = images[session].values()
        names = " and ".join(image.name for image in beside)
        for key in _contradicted(_said(label), [_said(image) for image in beside]):
            what = f"label maps of another {key} than their image (choose both of one, by --channel and --label-file)"
            apart[what].append(f"{label.name} with {names}")
    refuse_all(apart, source)


def _contradicted(label: Mapping[str, str], images: Sequence[Mapping[str, str]]) -> list[str]:
    """Entities of which a label map says something else than every image of its session that has them.

    It may say more or less than an image, and agree with one channel only. But what does not say its space is in
    the scanner's, so that one alone that says a space lies on another grid. `desc` is each file's own.
    """
    keys = []
    for key in sorted(label.keys() - {"desc", "space"}):
        there = {image[key] for image in images if key in image}
        if there and label[key] not in there:
            keys.append(key)
    if any(image.get("space") != label.get("space") for image in images):
        keys.append("space")
    return keys


def _said(path: Path) -> dict[str, str]:
    """The entities of a file by their keys; numbers without leading zeros, as run-01 and run-1 are one run."""
    pairs = (entity.split("-", 1) for entity in _kind_of(path).entities - {_ORIGINAL})
    return {key: str(int(value)) if value.isdecimal() else value for key, value in pairs}


def _kind_of(path: Path) -> Kind:
    parsed = _parsed(path)
    assert parsed is not None, f"{path} is none of _files"
    return parsed[1]


def _ending(kind: Kind) -> str:
    """A kind as the options name it."""
    return "_".join([*sorted(kind.entities), kind.suffix])


def _names(folder: Path, rule: LabelRule, found: list[Path]) -> Mapping[int, str]:
    """Label values and names: given, from the tables that belong to the label maps, or by number."""
    if rule.names:
        return rule.names
    if not found:
        raise ManifestError(
            f"{folder}: no label map *_{rule.ending} below {DERIVATIVES}; give --labels, --label-file (such as mask), "
            "or the labels themselves, such as --label 1:lesion"
        )
    missing = [path.name for path in found if not path.exists()]
    names: dict[int, str] = {}
    for table in _tables(folder, rule, found):
        for row in _rows(table, ("index", "name")):
            if not row["index"].isdecimal():
                raise ManifestError(f"{table}: the index '{row['index']}' of '{row['name']}' is no whole number")
            index = int(row["index"])
            if index and names.setdefault(index, row["name"]) != row["name"]:
                raise ManifestError(
                    f"{table}: {index} is '{row['name']}' here and '{names[index]}' in another table; give --label"
                )
    if names:
        return names
    refuse_all({"label maps that are links to content that is not here (datalad get)": missing}, str(folder))
    return {i: f"label_{i}" for i in label_ids_in(found)}


def _tables(folder: Path, rule: LabelRule, found: list[Path]) -> list[Path]:
    """The tables of values that apply to any of the label maps: in its folder or above, with no entity it lacks."""
    tables = []
    kinds = {path: parsed[1] for path in found if (parsed := _parsed(path)) is not None}
    top = rule.folder or folder
    places = sorted({parent for path in found for parent in path.parents if parent == top or top in parent.parents})
    for place in places:
        for table in sorted(place.glob("*dseg.tsv")):
            *entities, _ = table.name.removesuffix(".tsv").split("_")
            own = frozenset(e for e in entities if not e.startswith(("sub-", "ses-")))
            if any(own <= kind.entities and place in path.parents for path, kind in kinds.items()):
                tables.append(table)
    return tables


def _rows(table: Path, columns: tuple[str, ...]) -> list[dict[str, str]]:
    try:
        with table.open(encoding="utf-8-sig", newline="") as stream:
            rows = list(csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ManifestError(f"{table}: cannot be read as a table ({type(error).__name__})") from error
    for line, row in enumerate(rows, start=2):
        for column in columns:
            if not row.get(column):
                raise ManifestError(f"{table}: line {line} has no {column}; the columns are separated by tabs")
    return [{column: row[column].strip() for column in columns} for row in rows]


def _description(folder: Path) -> dict[str, Any]:
    path = folder / DESCRIPTION
    if not path.is_file():
        return {}
    try:
        document = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise ManifestError(f"{path}: cannot be read as JSON ({type(error).__name__})") from error
    return document if isinstance(document, dict) else {}
