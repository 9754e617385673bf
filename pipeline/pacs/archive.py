"""What an archive can be asked for, whatever it speaks, and the values that go to and fro."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from pydicom.dataset import Dataset

from pipeline.errors import PacsError
from pipeline.pacs.credentials import Credentials
from pipeline.pacs.node import Node
from pipeline.pacs.patience import Patience, Unreachable

__all__ = ["Access", "Archive", "Instance", "Level", "Match", "NotOffered", "Outcome", "Unreachable"]

Level = Literal["STUDY", "SERIES"]
Match = Mapping[str, str]
"""One row of an answer: text by DICOM keyword. It holds identities and is never shown as it is."""

Keep = Callable[[str, Callable[[Path], None]], None]
"""Told an instance's UID and how to write it to a path."""

STUDY_KEYWORDS = (
    "StudyInstanceUID",
    "StudyDate",
    "StudyDescription",
    "ModalitiesInStudy",
    "NumberOfStudyRelatedSeries",
    "NumberOfStudyRelatedInstances",
    "PatientID",
)
SERIES_KEYWORDS = (
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "Modality",
    "SeriesDate",
    "SeriesDescription",
    "SeriesNumber",
    "NumberOfSeriesRelatedInstances",
    "PatientID",
)


class NotOffered(PacsError):
    """The archive does not offer this service; another way may lead to the same end."""


@dataclass(frozen=True)
class Access:
    """How to reach an archive. `receive_port` is where our own storage service listens for a C-MOVE."""

    node: Node
    credentials: Credentials = field(default_factory=Credentials)
    aet: str = "VOLSEG"
    receive_port: int | None = None
    patience: Patience = field(default_factory=Patience)


@dataclass(frozen=True)
class Instance:
    """A DICOM file to send."""

    path: Path
    sop_instance_uid: str
    sop_class_uid: str
    study_uid: str
    series_uid: str
    transfer_syntax_uid: str
    size_bytes: int


@dataclass(frozen=True)
class Outcome:
    """What became of an instance: whether the archive has it, and its status in words."""

    instance: Instance
    arrived: bool
    status: str


class Archive(Protocol):
    """An archive, over DICOMweb or DIMSE.

    Every method raises `Unreachable` where another try may help, `NotOffered` where the archive lacks the service,
    and PacsError otherwise.
    """

    def echo(self) -> None:
        """Return if it answers."""

    def find(self, level: Level, matching: Mapping[str, str]) -> list[Match]:
        """Studies, or the series of the study that `matching` names, that match by DICOM keyword."""

    def instances(self, study_uid: str, series_uid: str) -> dict[str, str]:
        """SOP class UID by SOP Instance UID of what it holds of a series."""

    def retrieve(self, study_uid: str, series_uid: str, wanted: Mapping[str, str], keep: Keep) -> None:
        """Hand each of the `wanted` (SOP class UID by SOP Instance UID) to `keep`, one in memory at a time."""

    def store(self, batch: Sequence[Instance]) -> Iterator[Outcome]:
        """Send a batch; an outcome each, as they come. One that is missing in the end is unknown."""


def is_whole(dataset: Dataset, sop_instance_uid: str) -> bool:
    """Whether a data set is this instance and none of its pixels are missing: pydicom reads a cut file without a word.

    The length of native pixel data is that of PS3.5 section 8.1.1; encapsulated data that lack their end are absent.
    """
    if dataset.get("SOPInstanceUID") != sop_instance_uid or "SOPClassUID" not in dataset:
        return False
    if "Rows" not in dataset:
        return True
    found = next(
        (dataset[k].value for k in ("PixelData", "FloatPixelData", "DoubleFloatPixelData") if k in dataset), None
    )
    if found is None:
        return False
    syntax = dataset.file_meta.get("TransferSyntaxUID")
    if syntax is not None and syntax.is_encapsulated:
        return len(found) > 0
    bits = _count(dataset, "Rows") * _count(dataset, "Columns") * _count(dataset, "NumberOfFrames")
    bits *= _count(dataset, "SamplesPerPixel") * _count(dataset, "BitsAllocated")
    if str(dataset.get("PhotometricInterpretation")) == "YBR_FULL_422":
        bits = bits * 2 // 3
    return len(found) >= bits // 8


def is_whole_file(path: Path, sop_instance_uid: str) -> bool:
    """`is_whole` of a file."""
    from pydicom import dcmread

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return is_whole(dcmread(path), sop_instance_uid)
        except Exception:  # Whatever is wrong with it, it is not the whole instance.
            return False


def row_of(dataset: Dataset, keywords: Sequence[str]) -> Match:
    """The text of `keywords` in one answer; values that are several are joined by a backslash, as in DICOM."""
    return {keyword: _text(dataset.get(keyword)) for keyword in keywords}


def _text(value: Any) -> str:
    if value is None:
        return ""
    several = isinstance(value, Sequence) and not isinstance(value, str | bytes)
    text = "\\".join(str(part) for part in value) if several else str(value)
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", " ", text).strip()


def _count(dataset: Dataset, keyword: str) -> int:
    try:
        return max(1, int(dataset.get(keyword) or 1))
    except (TypeError, ValueError):
        return 1
