"""De-identified objects: the basic confidentiality profile (PS3.15 Annex E) applied to files that were verified before.

What the table removes, empties or replaces is treated so at every depth; identifiers become keyed pseudonyms that fit
together across files. Private elements, curves, and names that no table lists are removed, and so is any text in which
a part of the patient's name, or another value of the source's identity, still stands. Pixels are not touched: an
image that says that identity is burned into it is refused. Faces can be recognised in images of the head.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from dicomanonymizer.simpledicomanonymizer import replace_element
from pydicom import DataElement, Dataset, Sequence, dcmread
from pydicom.dataset import FileMetaDataset
from pydicom.uid import (
    PYDICOM_IMPLEMENTATION_UID,
    UID,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from pipeline.errors import ExportError
from pipeline.export.confidentiality import (
    OWN_KEYWORDS,
    Confidentiality,
    Identity,
    action_for,
    has_own_items,
    identity_of,
    is_told,
)
from pipeline.quiet import quiet
from transforms.dicom import DicomSeries

METHOD = "volseg: basic profile, keyed pseudonyms"
_PROFILE = ("113100", "Basic Application Confidentiality Profile")
_OPTIONS = (("113104", "Clean Structured Content Option"), ("113105", "Clean Descriptors Option"))
_NO_TIME = {"DA": "19000101", "TM": "000000", "DT": "19000101000000"}
"""What stands for a date that must not be empty."""

_NEEDED = OWN_KEYWORDS | {"SegmentLabel", "TrackingID", "TextValue", "AlgorithmName", "SegmentAlgorithmName"}
"""What says which label or model is meant."""


@dataclass(frozen=True)
class _Rules:
    """What is applied to one object; `is_own` where volseg has made it."""

    how: Confidentiality
    identity: Identity
    pseudonym: str
    is_own: bool


def series_identity(series: DicomSeries) -> Identity:
    """What tells whom a series shows, from all its files."""
    with quiet():
        found = [
            identity_of(dcmread(path, stop_before_pixels=True, force=True)) for path in dict.fromkeys(series.paths)
        ]
    total = found[0]
    for identity in found[1:]:
        total |= identity
    return total


def deidentify_file(source: Path, target: Path, how: Confidentiality, *, identity: Identity, is_own: bool) -> None:
    """Write `source`, a DICOM file, to `target` without identity.

    Args:
        source: the file, which stays as it is.
        target: the new file.
        how: the key.
        identity: what must not be left anywhere.
        is_own: whether volseg has made the file, so that its descriptions are known to be of labels.

    Raises:
        ExportError: identity is burned into the pixels, or stands where the object would break without it.
    """
    with quiet():
        dataset = dcmread(source, force=True)
        if str(dataset.get("BurnedInAnnotation") or "").upper() == "YES":
            raise ExportError(f"{source}: text is burned into its pixels (BurnedInAnnotation), so it cannot be copied")
        rules = _Rules(how, identity | identity_of(dataset), how.patient(dataset), is_own)
        _clean(dataset, rules)
        _declare(dataset, is_own=is_own)
        dataset.file_meta = _meta(dataset)
        dataset.preamble = b"\0" * 128
        dataset.save_as(target, enforce_file_format=True)


def _clean(dataset: Dataset, rules: _Rules) -> None:
    for tag in tuple(dataset.keys()):
        if tag.is_private:
            # Private elements may be damaged, so they are not even parsed.
            del dataset[tag]
            continue
        element = dataset[tag]
        _apply(action_for(tag, element.VR, element.keyword, is_own=rules.is_own), dataset, element, rules)
        if tag in dataset and element.VR == "SQ":
            inner = replace(rules, is_own=has_own_items(element.keyword, is_own=rules.is_own))
            for item in element.value:
                _clean(item, inner)
        elif tag in dataset and _tells(dataset[tag], rules):
            del dataset[tag]


def _apply(action: str, dataset: Dataset, element: DataElement, rules: _Rules) -> None:
    if action == "delete":
        del dataset[element.tag]
    elif action == "pseudonym":
        element.value = rules.pseudonym
    elif action == "uid" and element.value:
        several = element.VM > 1
        uids = [rules.how.uid(str(x)) for x in (element.value if several else [element.value])]
        element.value = uids if several else uids[0]
    elif action in ("empty", "dummy") and element.VR == "SQ":
        element.value = Sequence()
    elif action == "empty":
        element.value = None
    elif action == "dummy":
        _replace(dataset, element)


def _replace(dataset: Dataset, element: DataElement) -> None:
    if element.VR in _NO_TIME:
        element.value = _NO_TIME[element.VR]
        return
    try:
        replace_element(element)
    except NotImplementedError:
        del dataset[element.tag]


def _tells(element: DataElement, rules: _Rules) -> bool:
    if not is_told(element, rules.identity, is_own=rules.is_own):
        return False
    if rules.is_own and element.keyword in _NEEDED:
        raise ExportError(f"{element.keyword} holds a word of the patient's identity; rename the label or the model")
    return True


def _declare(dataset: Dataset, *, is_own: bool) -> None:
    """PS3.3 section C.7.1.1: that, how and how far identity was removed."""
    dataset.PatientIdentityRemoved, dataset.DeidentificationMethod = "YES", METHOD
    items = []
    for value, meaning in (_PROFILE, *(_OPTIONS if is_own else ())):
        item = Dataset()
        item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, "DCM", meaning
        items.append(item)
    dataset.DeidentificationMethodCodeSequence = Sequence(items)
    dataset.LongitudinalTemporalInformationModified = "REMOVED"


def _meta(dataset: Dataset) -> FileMetaDataset:
    """A new header of the file: the old one may name the sender."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = dataset.SOPClassUID, dataset.SOPInstanceUID
    meta.TransferSyntaxUID = UID(dataset.file_meta.get("TransferSyntaxUID") or _syntax(dataset))
    meta.ImplementationClassUID = PYDICOM_IMPLEMENTATION_UID
    return meta


def _syntax(dataset: Dataset) -> str:
    """Of a file that names none, what the parser has seen."""
    is_implicit, is_little_endian = dataset.original_encoding
    explicit = ExplicitVRLittleEndian if is_little_endian else ExplicitVRBigEndian
    return ImplicitVRLittleEndian if is_implicit else explicit
