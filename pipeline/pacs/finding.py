"""What `find` asks and shows: filters by DICOM keyword, and rows in which a patient is a salted hash."""

from __future__ import annotations

import hashlib
import hmac
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import PacsError
from pipeline.pacs.archive import Level, Match

# What may stand in a file of filters, for each level.
FILTERS: dict[Level, tuple[str, ...]] = {
    "STUDY": ("PatientID", "PatientName", "PatientBirthDate", "AccessionNumber", "StudyID", "ReferringPhysicianName"),
    "SERIES": ("SeriesNumber", "BodyPartExamined", "ProtocolName"),
}
_KEY_LENGTH = 12


def read_filters(path: Path, level: Level) -> dict[str, str]:
    """Filters from a TOML file: who a patient is has no place on a command line, which others can see.

    Raises:
        PacsError: the file cannot be read or holds something else. No value of it is quoted.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PacsError(f"{path}: {(error.strerror or 'cannot be read').lower()}") from None
    except ValueError:
        raise PacsError(f'{path}: not TOML; expected lines as PatientID = "..."') from None
    for key, value in values.items():
        if key not in FILTERS[level] or not isinstance(value, str):
            known = ", ".join(FILTERS[level])
            raise PacsError(f"{path}: {key}: expected a text for one of {known}")
    return values


def rows_to_show(found: Sequence[Match], level: Level, *, salt: bytes) -> list[dict[str, Any]]:
    """One row a study or series, without any identity; `patient` is the same for one patient under one salt."""
    show = _study if level == "STUDY" else _series
    return [show(match, salt) for match in found]


def _study(match: Match, salt: bytes) -> dict[str, Any]:
    return {
        "patient": _patient_key(match, salt),
        "study": match["StudyInstanceUID"],
        "date": match["StudyDate"],
        "description": match["StudyDescription"],
        "modalities": match["ModalitiesInStudy"].replace("\\", " "),
        "series": _number(match, "NumberOfStudyRelatedSeries"),
        "instances": _number(match, "NumberOfStudyRelatedInstances"),
    }


def _series(match: Match, salt: bytes) -> dict[str, Any]:
    return {
        "patient": _patient_key(match, salt),
        "number": match["SeriesNumber"],
        "series": match["SeriesInstanceUID"],
        "modality": match["Modality"],
        "date": match["SeriesDate"],
        "description": match["SeriesDescription"],
        "instances": _number(match, "NumberOfSeriesRelatedInstances"),
    }


def _patient_key(match: Match, salt: bytes) -> str:
    identity = match["PatientID"]
    return hmac.new(salt, identity.encode(), hashlib.sha256).hexdigest()[:_KEY_LENGTH] if identity else ""


def _number(match: Mapping[str, str], keyword: str) -> int | None:
    return int(match[keyword]) if match[keyword].isdigit() else None
