"""A dataset as a value: its channels, labels and cases. Paths, never voxels; pseudonyms, never identities.

`load_dataset` reads a volseg manifest, and the dataset.json of MSD and nnU-Net as they are.
"""

from __future__ import annotations

import difflib
import json
import os
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline.errors import ManifestError
from pipeline.files import sha256_of_json, write_json
from pipeline.manifest_formats import AS_DECLARED, FOREIGN_FORMATS, Stated, foreign_format
from transforms.annotation import Annotation
from transforms.labels import MAX_LABEL_ID, CodedConcept, Label, LabelSchema

Modality = Literal["CT", "MR", "PT", "NM", "US"]
"""DICOM's codes (PS3.3 C.7.3.1.1.1) of the volumes that can be planned for; a closed list on purpose."""

_ERRORS_SHOWN = 5
_LONGEST_VALUE = 80
_GIVE_ROOT = (
    "set root in the manifest or data.root in a config (--set data.root=FOLDER), or give the right folder with --root"
)


def _inside_root(path: str) -> str:
    parts = PurePosixPath(path).parts
    if not parts or "\\" in path or parts[0] == "/" or PureWindowsPath(path).drive:
        raise ValueError(f"'{path}' is not a path relative to the root, written with '/'")
    if ".." in parts:
        raise ValueError(f"'{path}' leaves the root; move the root up instead")
    return path


RelativePath = Annotated[str, AfterValidator(_inside_root)]
"""A file, or a folder of DICOM files, below the dataset's root."""


LabelValue = Annotated[int, Field(ge=1, le=MAX_LABEL_ID)]


class Frozen(BaseModel):
    """An immutable value; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Channel(Frozen):
    """One input channel of the network. Cases may lack an `optional` one, in training and in prediction."""

    name: str = Field(min_length=1)
    modality: Modality
    optional: bool = False


class Case(Frozen):
    """One study to segment. `images` maps the name of each channel that it has to a path relative to the root.

    `annotated` names the labels that were looked for in this case (None: all); of the others nothing is known here.
    `label_values` gives the labels that have another voxel value in this case's file than their id.
    """

    # It becomes part of file names, so it can neither hide a file nor climb out of a folder.
    case_id: str = Field(min_length=1, max_length=200, pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$")
    patient_id: str = Field(min_length=1)
    images: dict[str, RelativePath]
    label: RelativePath | None = None
    annotated: tuple[str, ...] | None = None
    label_values: dict[str, LabelValue] | None = None
    fold: int | None = Field(None, ge=0)


class Manifest(Frozen):
    """A dataset. `root` is relative to the manifest's own folder unless another root is given on loading."""

    format: Literal["volseg-manifest-1"] = "volseg-manifest-1"
    name: str = Field(min_length=1)
    description: str = ""
    source: str = ""
    licence: str = ""
    channels: tuple[Channel, ...] = Field(min_length=1)
    labels: LabelSchema
    root: str = "."
    cases: tuple[Case, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if repeated := _repeated([channel.name for channel in self.channels]):
            raise ValueError(f"channel {', '.join(repeated)} stands more than once")
        # Results are named after the case, and some file systems do not tell A from a.
        if repeated := _repeated([case.case_id.casefold() for case in self.cases]):
            raise ValueError(f"case_id {', '.join(repeated)} stands more than once (capitals ignored)")
        for case in self.cases:
            _require_channels(case, self.channels)
            if repeated := _repeated([*case.images.values(), case.label or ""]):
                raise ValueError(f"case '{case.case_id}' names the file {repeated[0]} twice")
            _require_annotation(case, self.labels)
        return self


class Dataset(Frozen):
    """A manifest and the folder on this machine that its paths start from."""

    manifest: Manifest
    root: Path

    def image_paths(self, case: Case) -> list[Path]:
        """Of the channels that the case has, in the order of the manifest's channels."""
        return [path for path in self.channel_paths(case) if path is not None]

    def channel_paths(self, case: Case) -> list[Path | None]:
        """One a channel of the manifest; None where the case lacks it."""
        files = (case.images.get(channel.name) for channel in self.manifest.channels)
        return [None if file is None else self.root / file for file in files]

    def label_path(self, case: Case) -> Path | None:
        """None when the case is not annotated."""
        return None if case.label is None else self.root / case.label

    def annotation(self, case: Case) -> Annotation:
        """How the case's label file is read."""
        return Annotation(self.manifest.labels, case.annotated, case.label_values or {})


def load_dataset(path: Path, root: Path | None = None, *, stated: Stated = AS_DECLARED) -> Dataset:
    """Read a volseg manifest, an MSD or nnU-Net `dataset.json`, or the folder that holds the latter.

    The paths of the cases start from `root` if it is given; otherwise from the manifest's own `root`, which
    is relative to the manifest's folder, or from the folder of `dataset.json`. Only the JSON is opened. `stated` adds
    to the channels of a `dataset.json`.

    Raises:
        ManifestError: no such file, not one of the formats, a key or value that does not fit, a path that
            leaves the root, or a root that holds none of the images.
    """
    file = _description_file(path)
    document = _read_document(file)
    kind = foreign_format(document)
    if kind is None:
        manifest = parse_manifest(document, source=str(file))
        folder = file.parent / manifest.root if root is None else root
    else:
        folder = file.parent if root is None else root
        manifest = parse_manifest(FOREIGN_FORMATS[kind](document, folder, str(file), stated), source=str(file))
    dataset = Dataset(manifest=manifest, root=folder.resolve())
    _require_some_image(dataset, file)
    return dataset


def parse_manifest(document: dict[str, Any], *, source: str) -> Manifest:
    """Check a JSON document against the schema; `source` names it in errors.

    Raises:
        ManifestError: an unknown key (the nearest is named) or a value that does not fit.
    """
    try:
        manifest = Manifest.model_validate(document)
    except ValidationError as error:
        raise ManifestError(f"{source}: {_explain(error)}") from error
    if PurePosixPath(manifest.root).is_absolute() or PureWindowsPath(manifest.root).is_absolute():
        raise ManifestError(
            f"{source}: root is an absolute path, which is another on each machine; "
            "write it relative to the manifest's folder, or leave it out and give --root (with a config: data.root)"
        )
    return manifest


def save_manifest(dataset: Dataset, path: Path) -> None:
    """Write the manifest atomically, with its root relative to `path`; `load_dataset` reads it back the same.

    Raises:
        RunError: the file cannot be written.
    """
    root = os.path.relpath(dataset.root.resolve(), path.parent.resolve())
    manifest = dataset.manifest.model_copy(update={"root": Path(root).as_posix()})
    write_json(path, manifest.model_dump(mode="json", exclude_none=True))


def manifest_hash(manifest: Manifest) -> str:
    """Hex SHA-256 of everything but the root, which is another on each machine."""
    return sha256_of_json(manifest.model_dump(mode="json", exclude={"root"}))


def _description_file(path: Path) -> Path:
    file = path / "dataset.json" if path.is_dir() else path
    if file.is_file():
        return file
    if path.is_dir():
        raise ManifestError(
            f"{path}: this folder has no dataset.json (MSD, nnU-Net); name a manifest, "
            "or make one with `volseg manifest build`"
        )
    raise ManifestError(f"{path}: no such manifest; see data_manifests/ for examples")


def _read_document(file: Path) -> dict[str, Any]:
    try:
        document = json.loads(file.read_text(encoding="utf-8-sig"), object_pairs_hook=_unique_keys)
    except (OSError, UnicodeDecodeError) as error:
        raise ManifestError(f"{file}: cannot be read as text ({type(error).__name__})") from error
    except json.JSONDecodeError as error:
        raise ManifestError(
            f"{file}: not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{file}: {error}") from error
    if not isinstance(document, dict):
        raise ManifestError(f"{file}: a manifest is a JSON object, found {type(document).__name__}")
    return document


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON lets the last of two equal keys win; in a label table that would lose a label silently."""
    if repeated := _repeated([key for key, _ in pairs]):
        raise ValueError(f"the key '{repeated[0]}' stands more than once in one object")
    return dict(pairs)


def _require_channels(case: Case, channels: tuple[Channel, ...]) -> None:
    """At least one image, each of a channel, and every channel that is not optional."""
    names = {channel.name for channel in channels}
    required = {channel.name for channel in channels if not channel.optional}
    if not case.images or not required <= set(case.images) <= names:
        optional = sorted(names - required)
        rest = f"; only {', '.join(optional)} may be missing, and never all" if optional else ""
        raise ValueError(f"case '{case.case_id}' has images {sorted(case.images)}, expected {sorted(names)}{rest}")


def _require_annotation(case: Case, labels: LabelSchema) -> None:
    if case.label is None and (case.annotated is not None or case.label_values):
        raise ValueError(f"case '{case.case_id}' says what was annotated, but has no label")
    try:
        Annotation(labels, case.annotated, case.label_values or {})
    except ValueError as error:
        raise ValueError(f"case '{case.case_id}': {error}") from error


def _repeated(values: list[str]) -> list[str]:
    if len(set(values)) == len(values):
        return []
    return sorted({value for value in values if values.count(value) > 1})


def _require_some_image(dataset: Dataset, file: Path) -> None:
    if not dataset.root.is_dir():
        raise ManifestError(f"{file}: its root {dataset.root} is not a folder; {_GIVE_ROOT}")
    if not any(path.exists() for case in dataset.manifest.cases for path in dataset.image_paths(case)):
        first = dataset.image_paths(dataset.manifest.cases[0])[0]
        raise ManifestError(
            f"{file}: none of its {len(dataset.manifest.cases)} cases is below {dataset.root} "
            f"(looked for {first.relative_to(dataset.root)} first); {_GIVE_ROOT}"
        )


def _explain(error: ValidationError) -> str:
    errors = error.errors()
    parents = {e["loc"][:depth] for e in errors for depth in range(len(e["loc"]))}
    # A list whose items are all wrong counts as empty as well, which would only confuse.
    told = [e for e in errors if not (e["type"] == "too_short" and e["loc"] in parents)]
    misshapen = next((e for e in told if _has_no_labels_shape(e["loc"], e["type"])), None)
    if misshapen is not None:
        # What else is said of labels follows from this.
        told = [e for e in told if e is misshapen or e["loc"][:1] != ("labels",)]
    lines = [_explain_one(e["loc"], e["type"], e["msg"], e.get("input")) for e in told]
    more = len(lines) - _ERRORS_SHOWN
    return "; ".join(lines[:_ERRORS_SHOWN]) + (f"; and {more} more" if more > 0 else "")


def _explain_one(location: tuple[int | str, ...], kind: str, message: str, found: Any) -> str:
    key = ".".join(str(part) for part in location)
    last = str(location[-1]) if location else ""
    if _has_no_labels_shape(location, kind):
        return f"{_LABELS}, found {_shortened(found)}"
    if location[:2] == ("labels", "regions") and kind not in ("missing", "value_error"):
        return f"{key}: {_REGIONS}, found {_shortened(found)}"
    if kind == "too_short":
        return f"has no {key}; at least one is needed"
    if kind == "extra_forbidden":
        return f"unknown key '{key}'; {_nearest(last, _keys_beside(location))}"
    if kind == "missing":
        return f"the key '{key}' is missing"
    if last == "modality":
        known = get_args(Modality)
        return f"{key}: {found!r} is none of {', '.join(known)}; {_nearest(str(found), known)}"
    text = message.removeprefix("Value error, ")
    if kind == "value_error":
        return f"{key}: {text}" if key else text
    expected = _EXPECTED_OF_TYPE.get(kind, f"{text[:1].lower()}{text[1:]}")
    return f"{key}: {expected}, found {_shortened(found)}"


def _has_no_labels_shape(location: tuple[int | str, ...], kind: str) -> bool:
    """Whether an error says that labels are no object with a list of objects; their values are another matter."""
    if location == ("labels",):
        return kind == "model_type"
    if location == ("labels", "labels"):
        return kind in ("missing", "tuple_type")
    return location[:2] == ("labels", "labels") and len(location) == 3 and kind == "model_type"


def _shortened(found: Any) -> str:
    text = json.dumps(found, default=str) if isinstance(found, (dict, list)) else repr(found)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."


def _keys_beside(location: tuple[int | str, ...]) -> tuple[str, ...]:
    """The keys that are known where an unknown one stands."""
    return tuple(_MODEL_AT[tuple(part for part in location[:-1] if isinstance(part, str))].model_fields)


def _nearest(word: str, known: tuple[str, ...]) -> str:
    by_folded = {name.casefold(): name for name in known}
    near = difflib.get_close_matches(word.casefold(), by_folded, n=1, cutoff=0.5)
    return f"did you mean '{by_folded[near[0]]}'?" if near else f"known: {', '.join(known)}"


_REGIONS = 'expected a list of {"name": ..., "labels": [names of labels], "paints": one of these names}'

_LABELS = 'labels is an object with "labels": [{"id": 1, "name": "A", "colour": [230, 159, 0]}]'

_EXPECTED_OF_TYPE = {
    "tuple_type": "expected a list",
    "model_type": "expected an object",
    "dict_type": "expected an object",
    "string_type": "expected text",
}
"""By pydantic's name of an error, in the words of JSON."""

_MODEL_AT: dict[tuple[str, ...], type[BaseModel]] = {
    (): Manifest,
    ("channels",): Channel,
    ("cases",): Case,
    ("labels",): LabelSchema,
    ("labels", "labels"): Label,
    ("labels", "labels", "code"): CodedConcept,
    ("labels", "labels", "category"): CodedConcept,
}
"""What stands at the end of a row of keys; numbers of list items left out."""
