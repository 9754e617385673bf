"""Compares a de-identified file with what it was made from: what had to go is gone, what had to stay is the same."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydicom import DataElement, Dataset, dcmread

from pipeline.errors import ExportError
from pipeline.export.confidentiality import (
    STANDARD_UIDS,
    Confidentiality,
    Identity,
    action_for,
    has_own_items,
    is_told,
    walk,
)
from pipeline.quiet import quiet

_DECLARED = (
    *("PatientIdentityRemoved", "DeidentificationMethod", "DeidentificationMethodCodeSequence"),
    "LongitudinalTemporalInformationModified",
)


def verify_deidentified(path: Path, original: Path, how: Confidentiality, *, identity: Identity, is_own: bool) -> None:
    """Read a de-identified DICOM file and its original, and refuse any fault of the one.

    Raises:
        ExportError: identity is left, pixels or other content changed, or an identifier is not its pseudonym.
    """
    with quiet():
        found, before = dcmread(path), dcmread(original, force=True)
        _check_gone(found, identity, is_own=is_own)
        _check_header(found, path)
        _check_content(found, before, _Rules(how, identity, is_own))
    if found.get("PatientIdentityRemoved") != "YES" or not found.get("DeidentificationMethodCodeSequence"):
        raise ExportError("it does not say that its identity was removed")
    pseudonym = how.patient(before)
    if (found.get("PatientID"), str(found.get("PatientName"))) != (pseudonym, pseudonym):
        raise ExportError("its patient has not the pseudonym that the key gives")


def verify_plain(path: Path, identity: Identity) -> None:
    """Search a file that is no DICOM (or all files of a folder) for values and identifiers of the source.

    Raises:
        ExportError: one is there.
    """
    for file in sorted(x for x in path.rglob("*") if x.is_file()) if path.is_dir() else [path]:
        content = file.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
        if any(uid.encode() in content for uid in identity.uids):
            raise ExportError("it holds an identifier of the source")
        lower = content.lower()
        # Short values stand in any file by chance.
        if any(value.encode() in lower for value in identity.values if len(value) > 6):
            raise ExportError("it holds a value of the source's identity")


def _check_gone(found: Dataset, identity: Identity, *, is_own: bool) -> None:
    """Nothing of the identity, and nothing that cannot be searched, at any depth."""
    for dataset in _datasets(found):
        if any(tag.is_private for tag in dataset.keys()):  # noqa: SIM118
            raise ExportError("it holds private elements")
    for element in walk(found):
        values = element.value if element.VM > 1 else [element.value]
        if element.VR == "UI" and identity.uids & {str(x) for x in values}:
            raise ExportError(f"its {element.keyword} is an identifier of the source")
        if is_told(element, identity, is_own=is_own):
            raise ExportError(f"its {element.keyword or element.tag} holds a part of the source's identity")


def _datasets(dataset: Dataset) -> Iterator[Dataset]:
    yield dataset
    for element in dataset:
        if element.VR == "SQ":
            for item in element.value:
                yield from _datasets(item)


def _check_header(found: Dataset, path: Path) -> None:
    """The file's header names nobody, and the object that is inside."""
    allowed = {"FileMetaInformationGroupLength", "FileMetaInformationVersion", "ImplementationVersionName"}
    allowed |= {"MediaStorageSOPClassUID", "MediaStorageSOPInstanceUID", "TransferSyntaxUID", "ImplementationClassUID"}
    with path.open("rb") as file:
        preamble = file.read(128)
    if any(preamble) or not {element.keyword for element in found.file_meta} <= allowed:
        raise ExportError("the header of the file holds more than it needs")
    if found.file_meta.MediaStorageSOPInstanceUID != found.SOPInstanceUID:
        raise ExportError("the header of the file names another instance")


@dataclass(frozen=True)
class _Rules:
    how: Confidentiality
    identity: Identity
    is_own: bool


def _check_content(found: Dataset, before: Dataset, rules: _Rules) -> None:
    """What the rules keep is the same, at every depth; identifiers are their pseudonyms."""
    for element in before:
        if element.keyword in _DECLARED:
            continue
        action = action_for(element.tag, element.VR, element.keyword, is_own=rules.is_own)
        kept = found.get(element.tag)
        if action == "uid":
            _check_uids(element, kept, rules.how)
        elif action == "keep" and element.VR == "SQ":
            if kept is None or len(kept.value) != len(element.value):
                raise ExportError(f"its {element.keyword} has other items than before")
            inner = replace(rules, is_own=has_own_items(element.keyword, is_own=rules.is_own))
            for item, earlier in zip(kept.value, element.value, strict=True):
                _check_content(item, earlier, inner)
        elif action == "keep" and not _is_same(kept, element):
            # A text in which identity stood may be gone.
            is_gone = kept is None and is_told(element, rules.identity, is_own=rules.is_own)
            if not is_gone:
                raise ExportError(f"its {element.keyword or element.tag} is not what it was")


def _is_same(kept: DataElement | None, element: DataElement) -> bool:
    if kept is None:
        return False
    a: Any = kept.value
    b: Any = element.value
    if element.VR in ("FD", "FL", "OF", "OD") and element.value is not None and not isinstance(b, bytes):
        return bool(np.array_equal(np.atleast_1d(a), np.atleast_1d(b), equal_nan=True))
    return bool(a == b)


def _check_uids(element: DataElement, kept: DataElement | None, how: Confidentiality) -> None:
    before, after = (
        [] if x is None or not x.value else [str(v) for v in (x.value if x.VM > 1 else [x.value])]
        for x in (element, kept)
    )
    if after != [uid if uid.startswith(STANDARD_UIDS) else how.uid(uid) for uid in before]:
        raise ExportError(f"its {element.keyword} is not the pseudonym that the key gives")
