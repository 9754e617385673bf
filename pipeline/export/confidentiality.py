"""The rules of de-identification: DICOM's basic confidentiality profile (PS3.15 Annex E), pseudonyms, and who is meant.

The profile's table of attributes is dicom-anonymizer's (2026c). Identifiers are replaced by a keyed hash (HMAC with
SHA-256, RFC 2104): with the same key the same patient and the same instances get the same pseudonyms, in all objects
and in every call; without the key nothing leads back.
"""

from __future__ import annotations

import hmac
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from uuid import UUID

from dicomanonymizer.simpledicomanonymizer import initialize_actions
from pydicom import DataElement, Dataset
from pydicom.datadict import repeater_has_tag
from pydicom.tag import BaseTag

from pipeline.errors import ExportError

KEY_BYTES = 32
STANDARD_UIDS = "1.2.840.10008."
"""Identifiers that begin so are DICOM's own: of SOP classes, transfer syntaxes, code groups (PS3.6 Annex A)."""

OWN_KEYWORDS = frozenset(
    (
        *("SeriesDescription", "DerivationDescription", "ImageComments", "DeviceSerialNumber", "ContentSequence"),
        *("ROIName", "ROIDescription", "ROIGenerationDescription", "StructureSetLabel", "StructureSetName"),
        *("StructureSetDescription", "ROIObservationLabel", "ROIObservationDescription", "ReferencedStudySequence"),
        *("SourceImageSequence", "ReferencedImageSequence"),
    )
)
"""What the profile would remove, but volseg has written itself: names of labels, and what refers to the source.
They are kept in its own objects (Clean Descriptors and Clean Structured Content options) and searched for names."""

_REFERENCES = frozenset(("SourceImageSequence", "ReferencedImageSequence"))
_IDENTITY_KEYWORDS = (
    *(
        "PatientID",
        "OtherPatientIDs",
        "PatientBirthDate",
        "AccessionNumber",
        "StudyID",
        "AdmissionID",
        "IssuerOfPatientID",
    ),
    *("InstitutionName", "InstitutionAddress", "InstitutionalDepartmentName", "StationName", "PatientAddress"),
    *(
        "PatientTelephoneNumbers",
        "MedicalRecordLocator",
        "MilitaryRank",
        "EthnicGroup",
        "Occupation",
        "PatientComments",
    ),
    *("PatientReligiousPreference", "RequestingService", "FillerOrderNumberImagingServiceRequest"),
    *(
        "PlacerOrderNumberImagingServiceRequest",
        "RequestedProcedureID",
        "ScheduledProcedureStepID",
        "PatientInsurancePlan",
    ),
    *("CountryOfResidence", "RegionOfResidence", "PersonAddress", "PersonTelephoneNumbers", "CurrentPatientLocation"),
)
_LEAST_CHARACTERS = 3
_CODE_KEYWORDS = ("CodeValue", "CodeMeaning", "CodingSchemeDesignator", "LongCodeValue")
_TEXTUAL = frozenset(
    (*("AE", "AS", "CS", "DA", "DS", "DT", "IS", "LO", "LT"), *("OB", "PN", "SH", "ST", "TM", "UC", "UN", "UR", "UT"))
)
_LIKE_UID = re.compile(r"\d\.\d+\.\d")


@dataclass(frozen=True)
class Confidentiality:
    """How exports are de-identified: `key` makes the pseudonyms; the source is copied too if asked for."""

    key: bytes = field(repr=False)
    copies_source: bool = False

    def uid(self, original: str) -> str:
        """The identifier that takes the place of `original`; DICOM's own stay (PS3.5 section B.2)."""
        if not original or original.startswith(STANDARD_UIDS):
            return original
        return f"2.25.{UUID(bytes=self._digest('uid', original)[:16], version=4).int}"

    def patient(self, header: Dataset) -> str:
        """The name and ID that take the place of a patient's; of the study where it names no patient."""
        for keywords in (("PatientID",), ("PatientName", "PatientBirthDate"), ("StudyInstanceUID",)):
            values = [str(header.get(keyword) or "").strip() for keyword in keywords]
            if any(values):
                return f"VS-{self._digest('patient', *values).hex()[:12].upper()}"
        return "VS-UNKNOWN"

    def _digest(self, *texts: str) -> bytes:
        return hmac.digest(self.key, "\0".join(texts).encode(), "sha256")


def new_key() -> bytes:
    """A random key."""
    return secrets.token_bytes(KEY_BYTES)


def load_key(path: Path) -> bytes:
    """The key in a file, which is made, for its owner alone to read, where it does not exist.

    Raises:
        ExportError: the file cannot be read or written, or holds no key.
    """
    try:
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            text = path.read_text(encoding="ascii").strip()
        else:
            text = new_key().hex()
            with os.fdopen(handle, "w", encoding="ascii") as file:
                file.write(text + "\n")
    except (OSError, UnicodeError) as error:
        raise ExportError(f"the key file {path} cannot be used ({type(error).__name__}); name another one") from None
    if not re.fullmatch(rf"[0-9a-f]{{{2 * KEY_BYTES}}}", text):
        raise ExportError(
            f"{path} holds no key of volseg: {2 * KEY_BYTES} hexadecimal digits are expected; name a file that does "
            "not exist, and it is made"
        )
    return bytes.fromhex(text)


def chosen(*, deidentify: bool, copies_source: bool, key_file: Path | None) -> Confidentiality | None:
    """What the options of the command line ask for; without a key file, a key that is forgotten afterwards.

    Raises:
        ExportError: a key for nothing, or a key file that cannot be used.
    """
    if not (deidentify or copies_source):
        if key_file is not None:
            raise ExportError("--key is for --deidentify and --deidentify-source; give one of them, or leave it out")
        return None
    return Confidentiality(new_key() if key_file is None else load_key(key_file), copies_source)


@cache
def profile() -> Mapping[tuple[int, int], str]:
    """The basic profile: per tag, `delete`, `empty`, `dummy`, `uid` or `recurse`."""
    meaning = {
        "delete": "delete",
        "empty": "empty",
        "delete_or_empty": "empty",
        "replace": "dummy",
        "empty_or_replace": "dummy",
        "delete_or_replace": "dummy",
        "delete_or_empty_or_replace": "dummy",
        "replace_UID": "uid",
        "delete_or_empty_or_replace_UID": "recurse",
    }
    actions = initialize_actions("dicomfields_2026c")
    return {(tag[0], tag[1]): meaning[action.__name__] for tag, action in actions.items() if len(tag) == 2}


def action_for(tag: BaseTag, vr: str, keyword: str, *, is_own: bool) -> str:
    """What the rules do with an element: as `profile`, or `keep`. Sequences that are kept are gone through."""
    if tag.is_private or 0x5000 <= tag.group <= 0x50FF or (0x6000 <= tag.group <= 0x60FF and tag.element == 0x4000):
        return "delete"
    if not keyword and not repeater_has_tag(tag):
        # The standard does not know it, so nobody can say what it holds.
        return "delete"
    if keyword in ("PatientID", "PatientName"):
        return "pseudonym"
    if vr == "UI":
        return "uid"
    if keyword in _REFERENCES or (is_own and keyword in OWN_KEYWORDS):
        return "keep"
    listed = profile().get((tag.group, tag.element))
    if listed is None:
        # A name that the table forgets is still one.
        return "delete" if vr == "PN" else "keep"
    return "keep" if listed in ("recurse", "uid") else listed


def has_own_items(keyword: str, *, is_own: bool) -> bool:
    """Whether the items of a sequence are volseg's own writing: its objects also tell of the scanner of the source."""
    return is_own and keyword != "ContributingEquipmentSequence"


def texts_of(element: DataElement) -> list[str]:
    """What of an element may be read as text; bytes of an unknown kind as well."""
    if element.VR not in _TEXTUAL or element.value is None or element.keyword == "PixelData":
        return []
    values = element.value if element.VM > 1 and not isinstance(element.value, (str, bytes)) else [element.value]
    return [x.decode("latin-1") if isinstance(x, bytes) else str(x) for x in values]


def is_told(element: DataElement, identity: Identity, *, is_own: bool) -> bool:
    """Whether an element leads to the patient. Coded words mean what the standard says they do, so only whole values
    count in them: a patient may be called Long, as an axis is.
    """
    is_vocabulary = element.VR == "CS" or (is_own and element.keyword in _CODE_KEYWORDS)
    return any(identity.is_in(text, words=not is_vocabulary) for text in texts_of(element))


@dataclass(frozen=True)
class Identity:
    """What leads to a patient: whole values, and the parts of names as words."""

    values: frozenset[str]
    words: frozenset[str]
    uids: frozenset[str]

    def __or__(self, other: Identity) -> Identity:
        return Identity(self.values | other.values, self.words | other.words, self.uids | other.uids)

    def is_in(self, text: str, *, words: bool = True) -> bool:
        """Whether a value, an identifier or (with `words`) a part of a name occurs in `text`."""
        lower = text.casefold()
        if any(_stands_in(value, lower) for value in self.values):
            return True
        if _LIKE_UID.search(text) and any(uid in text for uid in self.uids):
            return True
        return words and any(_stands_in(word, lower) for word in self.words)


def _stands_in(wanted: str, text: str) -> bool:
    if wanted not in text:
        return False
    if len(wanted) > 6:
        return True
    # Short ones only as words of their own, or a number would be found in every longer one.
    return re.search(rf"(?<![^\W_]){re.escape(wanted)}(?![^\W_])", text) is not None


def identity_of(dataset: Dataset) -> Identity:
    """All names of persons in a dataset, and what else tells the patient, the place or the study."""
    values, words, uids = set(), set(), set()
    for element in walk(dataset):
        if element.VR == "UI":
            uids |= {str(x) for x in _several(element) if x and not str(x).startswith(STANDARD_UIDS)}
        elif element.VR == "PN":
            for text in texts_of(element):
                values.add(text)
                values.add(" ".join(re.split(r"[\^=\s]+", text)).strip())
                words |= _name_words(text)
        elif element.keyword in _IDENTITY_KEYWORDS:
            values |= set(texts_of(element))
            if element.VR == "DA":
                values |= {f"{x[:4]}-{x[4:6]}-{x[6:8]}" for x in texts_of(element) if len(x) == 8}
    strings = {value.strip().casefold() for value in values}
    return Identity(frozenset(x for x in strings if len(x) >= _LEAST_CHARACTERS), frozenset(words), frozenset(uids))


def _name_words(text: str) -> set[str]:
    """Family, given and middle names in all their spellings; prefixes and suffixes lead to nobody."""
    words = set()
    for spelling in text.split("="):
        for part in spelling.split("^")[:3]:
            words |= {word.casefold() for word in re.split(r"[\s,.\-]+", part) if len(word) > 1}
    return words


def _several(element: DataElement) -> list[str]:
    return [str(x) for x in (element.value if element.VM > 1 else [element.value])]


def walk(dataset: Dataset) -> Iterator[DataElement]:
    """All standard elements, those of nested sequences too. Private ones may be damaged, and are never kept."""
    for tag in tuple(tag for tag in dataset.keys() if not tag.is_private):  # noqa: SIM118
        element = dataset[tag]
        yield element
        if element.VR == "SQ":
            for item in element.value:
                yield from walk(item)
