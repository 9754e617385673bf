"""Slices that share their places -> volumes, by the tag that differs: echoes, phases, b-values, passes.

A tag tells volumes apart when each part that it makes has one slice a place and all parts have the same places, by
itself or together with another tag. Where no value does that, the order of a time within each place may.
"""

from __future__ import annotations

import re
import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from transforms.dicom_findings import Headers
from transforms.dicom_placing import place_slices

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
_Split = list[tuple[tuple[tuple[str, str], ...], Integers]]

TOLD_APART_BY = (
    "echo",
    "echo time",
    "temporal position",
    "b-value",
    "gradient direction",
    "trigger time",
    "inversion time",
    "image component",
    "image type",
    "acquisition",
    "acquisition time",
)
"""The tags by which volumes are told apart, what they measure first and when they were measured last."""

ORDERED_BY = ("trigger time", "acquisition time", "instance number")
"""Tags whose order within each place may tell volumes apart."""

MOST_TAGS = 3
"""So many tags together may tell volumes apart."""

_UNITS = {"echo time": " ms", "trigger time": " ms", "inversion time": " ms"}
_NUMBERED = {"gradient direction", "acquisition time"}
_COMPONENTS = {"M": "magnitude", "P": "phase", "R": "real", "I": "imaginary"}
_CODE = re.compile(r"[A-Z0-9_ ]{1,16}")


@dataclass(frozen=True, eq=False)
class Part:
    """Slices of one volume, what they are called, and the tags that told them from the others."""

    name: str
    words: tuple[str, ...]
    slices: Headers


def separate(headers: Headers, places: Sequence[int]) -> list[Part] | None:
    """Parts with one slice a place, in the order of the tags' values; None where no tag tells them apart.

    Args:
        headers: slices of one matrix, orientation and frame of reference.
        places: the place of each along the normal, as `place_numbers` gives it.
    """
    everyone, at = np.arange(len(headers)), np.asarray(places)
    if len(set(places)) == len(places):
        return [Part("", (), headers)]
    if len(set(places)) == 1:
        # One slice again and again (a bolus being watched) is no volume, whatever tells the pictures apart.
        return None
    tags = _Tags(headers)
    split = _by_values(everyone, at, tags, TOLD_APART_BY) or _by_stacks(everyone, at, tags, headers)
    split = split or _by_order(everyone, at, tags)
    if split is None:
        return None
    parts = [(label, [headers[n] for n in part.tolist()]) for label, part in split]
    return [Part(", ".join(name for _, name in label), tuple(word for word, _ in label), s) for label, s in parts]


class _Tags:
    """The values of the slices' tags as whole numbers in the order of the values, and what they are called."""

    def __init__(self, headers: Headers) -> None:
        self._raw = [dict(header.kinds) for header in headers]
        self._known: dict[str, tuple[Integers, list[bytes]]] = {}

    def codes(self, word: str) -> Integers:
        """(N,) rank of each slice's value among all values."""
        return self._ranked(word)[0]

    def numbers(self, word: str) -> Floats:
        """(N,) values as numbers; NaN where they are none."""
        codes, values = self._ranked(word)
        return np.array([np.nan if (x := number_of(value)) is None else x for value in values])[codes]

    def names(self, word: str, codes: Sequence[int]) -> list[str]:
        """What values are called beside each other."""
        values = [self._ranked(word)[1][code] for code in codes]
        if word == "image type":
            return _image_types(values)
        numbers = [number_of(value) for value in values]
        texts = [f"{x:.10g}{_UNITS.get(word, '')}" if x is not None else "" for x in numbers]
        if word in _NUMBERED or "" in texts or len(set(texts)) < len(texts):
            texts = [str(n) for n in range(1, len(values) + 1)]
        title = "pass" if word == "acquisition time" else word
        return [f"{title} {text}" for text in texts]

    def _ranked(self, word: str) -> tuple[Integers, list[bytes]]:
        if word not in self._known:
            column = [kinds.get(word, b"") for kinds in self._raw]
            values = sorted(set(column), key=_by_number)
            ranks = {value: rank for rank, value in enumerate(values)}
            self._known[word] = np.array([ranks[value] for value in column]), values
        return self._known[word]


def number_of(value: bytes) -> float | None:
    """The number that an element holds, as text (DS, IS, TM) or as a double (FD); None when it is none."""
    try:
        number = float(value.decode("ascii").strip(" \0"))
    except ValueError:
        if len(value) != 8 or (value.isascii() and value.decode("ascii").isprintable()):
            return None
        number = float(struct.unpack("<d", value)[0])
    return number if np.isfinite(number) else None


def _by_number(value: bytes) -> tuple[float, bytes]:
    number = number_of(value)
    return (float("-inf") if number is None else number, value)


def _by_values(
    indices: Integers, at: Integers, tags: _Tags, words: Sequence[str], depth: int = MOST_TAGS
) -> _Split | None:
    """Parts of equal places by the values of one tag, or of several, one after the other."""
    if _is_single(at[indices]):
        return [((), indices)]
    if not depth:
        return None
    for n, word in enumerate(words):
        codes, parts = _parts(indices, tags.codes(word)[indices])
        if len(parts) < 2 or not _same_places(parts, at):
            continue
        solved = [_by_values(part, at, tags, words[n + 1 :], depth - 1) for part in parts]
        names = tags.names(word, codes)
        if all(solved):
            return [
                (((word, name), *label), part)
                for name, split in zip(names, solved, strict=True)
                for label, part in split or ()
            ]
    return None


def _by_stacks(indices: Integers, at: Integers, tags: _Tags, headers: Headers) -> _Split | None:
    """Parts by the values of one tag that have other places, but each of them an even stack."""
    for word in TOLD_APART_BY:
        codes, parts = _parts(indices, tags.codes(word)[indices])
        if 2 <= len(parts) <= len(indices) / 2 and all(_is_single(at[part]) for part in parts):
            placed = (place_slices([headers[n] for n in part.tolist()]) for part in parts)
            if all(len(part) > 1 for part in parts) and all(p.geometry is not None for p in placed):
                names = tags.names(word, codes)
                return [(((word, name),), part) for name, part in zip(names, parts, strict=True)]
    return None


def _by_order(indices: Integers, at: Integers, tags: _Tags) -> _Split | None:
    """Parts by the order of a time within each place, where each place was measured as often."""
    counts = np.bincount(at[indices])
    repeats = int(counts.max())
    if (counts != repeats).any():
        return None
    for word in ORDERED_BY:
        values = tags.numbers(word)[indices]
        order = np.lexsort((values, at[indices]))
        table = values[order].reshape(-1, repeats)
        if not (np.diff(table, axis=1) > 0).all():
            continue
        # Instance numbers are only an order: they count when each volume was numbered after the one before.
        if word == "instance number" and not (table[:, :-1].max(axis=0) < table[:, 1:].min(axis=0)).all():
            continue
        sorted_indices = indices[order].reshape(-1, repeats)
        title = "phase" if word == "trigger time" else "pass"
        told = f"the order of {word}s"
        return [(((told, f"{title} {n + 1}"),), np.sort(sorted_indices[:, n])) for n in range(repeats)]
    return None


def _parts(indices: Integers, codes: Integers) -> tuple[list[int], list[Integers]]:
    """The different codes, and the indices that have each."""
    order = np.argsort(codes, kind="stable")
    values, starts = np.unique(codes[order], return_index=True)
    return values.tolist(), np.split(indices[order], starts[1:])


def _is_single(places: Integers) -> bool:
    return len(np.unique(places)) == len(places)


def _same_places(parts: Sequence[Integers], at: Integers) -> bool:
    """Whether all parts have the same places, whole times each."""
    first = np.unique(at[parts[0]])
    return all(len(part) >= len(first) and np.array_equal(np.unique(at[part]), first) for part in parts)


def _image_types(values: Sequence[bytes]) -> list[str]:
    """ImageType by the parts that not all values share, as magnitude and phase where it is that."""
    split = [[part.strip().upper() for part in value.decode("ascii", "replace").split("\\")] for value in values]
    shared = Counter(part for parts in split for part in set(parts))
    differing = [[part for part in parts if shared[part] < len(values) and _CODE.fullmatch(part)] for parts in split]
    for named in (
        ["/".join(dict.fromkeys(_components(parts))) for parts in differing],
        [" ".join(parts).lower() for parts in differing],
    ):
        if all(named) and len(set(named)) == len(named):
            return named
    return [f"image type {n}" for n in range(1, len(values) + 1)]


def _components(parts: Sequence[str]) -> Iterator[str]:
    for part in parts:
        yield from (_COMPONENTS[piece] for piece in part.split("_") if piece in _COMPONENTS)
