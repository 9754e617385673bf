"""The dataset.json of the Medical Segmentation Decathlon and of nnU-Net, as a volseg manifest document.

Both are read as they are: nothing is copied or rewritten. What has no place in a manifest yet (channels packed into
one 4D file) is refused by name. Test cases without labels are left out.

Sources: MSD, Antonelli et al. 2022, Nature Communications 13:4128, and the dataset.json of its releases;
nnU-Net v2, documentation/dataset_format.md, region_based_training.md and ignore_label.md of its repository.
"""

from __future__ import annotations

import difflib
import posixpath
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from typing import Any

from pipeline.errors import ManifestError
from pipeline.files import safe_name
from pipeline.label_tables import read_labels

Document = dict[str, Any]


@dataclass(frozen=True)
class Stated:
    """What a user says of channels, by their names, where a format cannot: the modality, and which cases may lack."""

    modalities: Mapping[str, str] = field(default_factory=dict)
    optional: frozenset[str] = frozenset()


AS_DECLARED = Stated()
"""Nothing beyond what the file says."""

Reader = Callable[[Document, Path, str, Stated], Document]

MODALITY_OF_CHANNEL: dict[str, str] = {
    "ct": "CT",
    "cta": "CT",
    "cbct": "CT",
    "ncct": "CT",
    "cect": "CT",
    "mr": "MR",
    "mra": "MR",
    "mri": "MR",
    "t1": "MR",
    "t1w": "MR",
    "t1c": "MR",
    "t1ce": "MR",
    "t1gd": "MR",
    "t2": "MR",
    "t2w": "MR",
    "t2*": "MR",
    "flair": "MR",
    "t2-flair": "MR",
    "pd": "MR",
    "pdw": "MR",
    "adc": "MR",
    "dwi": "MR",
    "swi": "MR",
    "dce": "MR",
    "pt": "PT",
    "pet": "PT",
    "fdg-pet": "PT",
    "psma-pet": "PT",
    "nm": "NM",
    "spect": "NM",
    "us": "US",
    "ultrasound": "US",
}
"""Channel names of other formats, capitals ignored. Closed: the modality decides the normalisation, so a
misspelt one must not pass as another (as 'ct' for 'CT' did in nnU-Net issue 2073)."""

VOLUME_SUFFIXES = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd")
"""Files that are taken for volumes when a folder is listed; what they are is decided by their content."""

_CHANNEL_FILE = re.compile(r"(?P<case>.+)_(?P<channel>\d{4})")
_NAMES_SHOWN = 20


def foreign_format(document: Document) -> str | None:
    """The key in `FOREIGN_FORMATS` of a foreign document, None for volseg's own."""
    if "cases" in document or "format" in document:
        return None
    if "channel_names" in document or "file_ending" in document:
        return "nnunet"
    return "msd" if "modality" in document or "training" in document else None


def volume_stem(path: PurePath) -> str:
    """The file's name without the suffix of its format; a folder (DICOM) keeps its whole name."""
    suffix = next((s for s in VOLUME_SUFFIXES if path.name.lower().endswith(s)), "")
    return path.name[: len(path.name) - len(suffix)]


def named(names: list[str]) -> str:
    """Up to twenty names in a line, and how many more there are."""
    more = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def refuse_all(problems: dict[str, list[str]], source: str) -> None:
    """Raise one ManifestError for everything in `problems`, a table of what is wrong and with which names."""
    found = [f"{len(names)} {what}: {named(names)}" for what, names in problems.items() if names]
    if found:
        raise ManifestError(f"{source}: {'; '.join(found)}")


def split_channel_files(names: list[str], channel_count: int) -> tuple[dict[str, dict[int, str]], list[str]]:
    """File names like case_0000 (suffix of the format removed or not) as case to channel index to name.

    Returns:
        The cases, and the names that do not end in a channel's number below `channel_count`.
    """
    cases: dict[str, dict[int, str]] = defaultdict(dict)
    strangers = []
    for name in names:
        match = _CHANNEL_FILE.fullmatch(volume_stem(PurePosixPath(name)))
        if match is None or int(match["channel"]) >= channel_count:
            strangers.append(name)
        else:
            cases[match["case"]][int(match["channel"])] = name
    return dict(cases), strangers


def _read_msd(document: Document, root: Path, source: str, stated: Stated) -> Document:
    channels = _channels(document, "modality", source, stated)
    listed = document.get("training")
    if not isinstance(listed, list) or not all(isinstance(e, dict) and "image" in e for e in listed):
        raise ManifestError(f"{source}: training is not a list of objects with image and label")
    cases = [_msd_case(entry, channels, root, source) for entry in listed]
    return _manifest_document(document, channels, cases, source)


def _msd_case(entry: Document, channels: list[Document], root: Path, source: str) -> Document:
    image = _relative(entry["image"], root, source)
    label = entry.get("label")
    case_id = safe_name(volume_stem(PurePosixPath(image)))
    return {
        "case_id": case_id,
        "patient_id": case_id,
        "images": _msd_images(image, channels, root, source),
        "label": None if label is None else _relative(label, root, source),
    }


def _msd_images(image: str, channels: list[Document], root: Path, source: str) -> dict[str, str]:
    """One file a channel: as listed, or with _0000, ... added, as nnU-Net v1 stored what it listed."""
    names = [channel["name"] for channel in channels]
    stem = volume_stem(PurePosixPath(image))
    suffix = PurePosixPath(image).name[len(stem) :]
    split = [str(PurePosixPath(image).with_name(f"{stem}_{i:04d}{suffix}")) for i in range(len(names))]
    if not (root / image).exists() and (root / split[0]).exists():
        return dict(zip(names, split, strict=True))
    if len(names) > 1:
        raise ManifestError(
            f"{source}: its {len(names)} channels ({', '.join(names)}) are packed into one 4D file a case, "
            f"such as {image}, which is not read yet; split them into one file a channel, "
            "named case_0000, case_0001, ..."
        )
    return {names[0]: image}


def _read_nnunet(document: Document, root: Path, source: str, stated: Stated) -> Document:
    channels = _channels(document, "channel_names", source, stated)
    if "dataset" in document:
        files = _nnunet_listed(document["dataset"], len(channels), root, source)
    else:
        files = _nnunet_found(document, channels, root, source)
    cases = [
        {
            "case_id": safe_name(case),
            "patient_id": safe_name(case),
            "images": {channels[i]["name"]: image for i, image in sorted(images.items())},
            "label": label,
        }
        for case, (images, label) in sorted(files.items())
    ]
    return _manifest_document(document, channels, cases, source)


def _nnunet_listed(listed: Any, channel_count: int, root: Path, source: str) -> dict[str, tuple[dict[int, str], str]]:
    if not isinstance(listed, dict):
        raise ManifestError(f"{source}: dataset is not an object of cases with images and label")
    files = {}
    for case, entry in listed.items():
        images = entry.get("images") if isinstance(entry, dict) else None
        if not isinstance(images, list) or len(images) != channel_count or "label" not in entry:
            raise ManifestError(f"{source}: dataset.{case} needs a label and {channel_count} images in a list")
        paths = {i: _relative(image, root, source) for i, image in enumerate(images)}
        files[str(case)] = (paths, _relative(entry["label"], root, source))
    return files


def _nnunet_found(
    document: Document, channels: list[Document], root: Path, source: str
) -> dict[str, tuple[dict[int, str], str]]:
    ending = document.get("file_ending")
    if not isinstance(ending, str) or not ending.startswith("."):
        raise ManifestError(f"{source}: file_ending is needed, such as '.nii.gz', found {ending!r}")
    if not ending.lower().endswith(VOLUME_SUFFIXES):
        raise ManifestError(
            f"{source}: its files end in '{ending}', which is not read as a volume; convert them to one of "
            f"{', '.join(VOLUME_SUFFIXES)}"
        )
    images, labels = (_listing(root / folder, ending, source) for folder in ("imagesTr", "labelsTr"))
    by_case, strangers = split_channel_files(images, len(channels))
    required = {i for i, channel in enumerate(channels) if not channel["optional"]}
    cases = {case for case, found in by_case.items() if required <= set(found)}
    labelled = {name.removesuffix(ending) for name in labels}
    problems = {
        f"without the channel's number (below {len(channels)})": strangers,
        "without all of their channels": sorted(set(by_case) - cases),
        "without a label": sorted(cases - labelled),
        "without an image": sorted(labelled - set(by_case)),
    }
    refuse_all(problems, source)
    expected = document.get("numTraining", len(cases))
    if str(expected) != str(len(cases)):  # some write it in quotes
        raise ManifestError(f"{source}: numTraining is {expected}, but imagesTr holds {len(cases)} cases")
    return {
        case: ({i: f"imagesTr/{name}" for i, name in by_case[case].items()}, f"labelsTr/{case}{ending}")
        for case in cases
    }


def _listing(folder: Path, ending: str, source: str) -> list[str]:
    if not folder.is_dir():
        raise ManifestError(f"{source}: the folder {folder.name} is not beside it, as nnU-Net has it")
    # Archives made on a Mac bring a hidden ._ twin of every file.
    return sorted(p.name for p in folder.iterdir() if p.name.endswith(ending) and not p.name.startswith("."))


def _manifest_document(document: Document, channels: list[Document], cases: list[Document], source: str) -> Document:
    folder = Path(source).resolve().parent.name
    return {
        "name": str(document.get("name") or document.get("dataset_name") or folder),
        "description": str(document.get("description", "")),
        "source": str(document.get("reference", "")).strip(),
        "licence": str(document.get("licence", document.get("license", ""))),
        "channels": channels,
        "labels": read_labels(document.get("labels"), document.get("regions_class_order"), source),
        "cases": cases,
    }


def _channels(document: Document, key: str, source: str, stated: Stated) -> list[Document]:
    """The values of {"0": "CT", "1": ...} in order; a repeated name gets its number to be unique."""
    table = document.get(key)
    numbers = [str(i) for i in range(len(table))] if isinstance(table, dict) else []
    if not isinstance(table, dict) or not table or set(table) != set(numbers):
        raise ManifestError(f'{source}: {key} is needed as {{"0": "CT", "1": ...}}, found {table!r}')
    given = [str(table[number]) for number in numbers]
    names = numbered_names(given)
    if unknown := sorted((stated.modalities.keys() | stated.optional) - set(names)):
        raise ManifestError(f"{source}: it has no channel '{unknown[0]}'; its channels are {', '.join(names)}")
    return [
        {
            "name": name,
            "modality": stated.modalities.get(name) or modality_of_channel(plain, f"{source}: {key}.{number}"),
            "optional": name in stated.optional,
        }
        for name, plain, number in zip(names, given, numbers, strict=True)
    ]


def numbered_names(given: list[str]) -> list[str]:
    """Names of channels in order; one that comes again gets its channel's number, each time."""
    return [name if given.count(name) == 1 else f"{name}_{number}" for number, name in enumerate(given)]


def known_modality(name: str) -> str | None:
    """DICOM's code for a free channel name, None if it is not in `MODALITY_OF_CHANNEL`."""
    return MODALITY_OF_CHANNEL.get(name.strip().casefold())


def modality_of_channel(name: str, source: str) -> str:
    """DICOM's code for a free channel name.

    Raises:
        ManifestError: not in `MODALITY_OF_CHANNEL`; the nearest entry is named.
    """
    if found := known_modality(name):
        return found
    near = difflib.get_close_matches(name.strip().casefold(), MODALITY_OF_CHANNEL, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0].upper()}'? " if near else ""
    raise ManifestError(
        f"{source}: the modality of channel '{name}' is unknown; {hint}"
        f"known: {', '.join(n.upper() for n in MODALITY_OF_CHANNEL)}; for another, make a manifest with "
        f"`volseg manifest build` and say it: --channel '{name}:MR'"
    )


def _relative(path: Any, root: Path, source: str) -> str:
    """A foreign path, './', '..' and absolute ones included, as a path below the root."""
    if not isinstance(path, str) or not path:
        raise ManifestError(f"{source}: a path is needed, found {path!r}")
    plain = posixpath.normpath(path.replace("\\", "/"))
    # The root may be reached through a link, so that it has two absolute names.
    for start in (root.absolute().as_posix(), root.resolve().as_posix()):
        plain = plain.removeprefix(start + "/")
    if plain == ".." or plain.startswith(("/", "../")) or PureWindowsPath(plain).drive:
        raise ManifestError(
            f"{source}: '{path}' lies outside the dataset's folder; move it inside, "
            "or write a volseg manifest with a root above both"
        )
    return plain


FOREIGN_FORMATS: dict[str, Reader] = {"msd": _read_msd, "nnunet": _read_nnunet}
"""By the name that `foreign_format` gives: document, root, source and what a user states, to a manifest document."""
