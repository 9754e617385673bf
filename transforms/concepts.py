"""Coded concepts of structures, and those of well-known names: DICOM's own lists, as pydicom carries them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from pydantic import BaseModel, ConfigDict


class CodedConcept(BaseModel):
    """A coded concept (DICOM PS3.3 section 8.8): SNOMED CT unless another scheme is named."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    value: str
    meaning: str
    scheme: str = "SCT"


TISSUE = CodedConcept(value="85756007", meaning="Tissue")
"""Segmented property type and category when a schema names none."""


@dataclass(frozen=True)
class Property:
    """What a segment shows (PS3.3 C.8.20.2): its type and that type's category."""

    code: CodedConcept = TISSUE
    category: CodedConcept = TISSUE


# Segmentation property types by category (PS3.16 CID 7192, 7194, 7197, 7191), each with its code in CID 7150.
_CATEGORIES = (
    (7192, CodedConcept(value="91723000", meaning="Anatomical Structure")),
    (7194, CodedConcept(value="49755003", meaning="Morphologically Abnormal Structure")),
    (7197, CodedConcept(value="91720002", meaning="Body Substance")),
    (7191, TISSUE),
)
_SYNONYMS = {
    "tumor": "neoplasm",
    "tumour": "neoplasm",
    "cancer": "neoplasm",
    "urinarybladder": "bladder",
    "oedema": "edema",
    "haemorrhage": "hemorrhage",
}
_SIDES = {"left", "right", "l", "r", "lt", "rt"}
# The head of what? Parts of organs are called so too.
_AMBIGUOUS = {"head", "neck", "trunk", "background", "normal", "mass", "organ"}


def concepts_of(names: Sequence[str]) -> list[Property]:
    """What each name says it is, sides left aside; tissue for names that are not known word by word."""
    words = ["".join(_words(name)) for name in names]
    # The lists take a moment to load, and names that are mere numbers are in none.
    known = _known() if any(words) else {}
    return [known.get(_SYNONYMS.get(word, word)) or known.get(word.removesuffix("s")) or Property() for word in words]


def _words(name: str) -> list[str]:
    """'LeftParotid_gland' as parotid, gland; nothing where a number makes it one of many."""
    if re.search(r"\d", name):
        return []
    found = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)
    return [word.casefold() for word in found if word.casefold() not in _SIDES]


@lru_cache(maxsize=1)
def _known() -> dict[str, Property]:
    from pydicom.sr.codedict import codes

    known: dict[str, Property] = {}
    for number, category in _CATEGORIES:
        listed = getattr(codes, f"cid{number}")
        for keyword in listed.dir():
            code = getattr(listed, keyword)
            concept = CodedConcept(value=code.value, meaning=code.meaning, scheme=code.scheme_designator)
            if keyword.casefold() not in _AMBIGUOUS:
                known.setdefault(keyword.casefold(), Property(concept, category))
    return known
