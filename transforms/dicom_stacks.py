"""One SeriesInstanceUID -> the volumes in it, each of slices that can be one stack.

A scanner may put a planning image, several orientations, or every echo and phase into one series. Slices are told
apart by where they lie, then by the tags of `dicom_phases`; what is set apart says so in a finding.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom

from transforms.dicom_checks import kind_findings, pixel_findings
from transforms.dicom_findings import Finding, Headers, distinct, files, is_refused, mend, refuse
from transforms.dicom_header import PARSE_FAULTS, Header, Plane, quiet_pydicom
from transforms.dicom_phases import separate
from transforms.dicom_placing import (
    COSINE_TOLERANCE,
    SAME_SPACING,
    place_numbers,
    place_slices,
    plane_findings,
)
from transforms.geometry import Geometry

MANY_STACKS = 12
"""A series of more groups of slices than this, with two slices each or fewer, is no set of volumes."""

LOCALIZER = "localizer"

_MOST_GROUPS = 200
_PLANES = ("sagittal", "coronal", "axial")


@dataclass(frozen=True, eq=False)
class _Group:
    """Slices that belong together, what they are called, and what told them from the others."""

    name: str
    words: tuple[str, ...]
    slices: list[Header]


@dataclass(frozen=True, eq=False)
class Stack:
    """One volume of a series. `name` is empty, or what sets it apart from the others.

    `slices` are in order along the normal when `geometry` is known; `slice_positions_k` as in `Placement`.
    """

    name: str
    slices: tuple[Header, ...]
    geometry: Geometry | None
    slice_positions_k: tuple[float, ...] | None
    findings: tuple[Finding, ...]


def stacks_of(headers: Headers, *, resample_uneven: bool = False) -> list[Stack]:
    """The volumes that the slices of one series make, readable or not.

    A series that mixes patients, studies or modalities, or holds no images, is one stack with its problem.
    """
    findings = list(series_findings(headers))
    if is_refused(findings):
        return [Stack("", tuple(headers), None, None, tuple(findings))]
    scouts = [header for header in headers if is_localizer(header)]
    images = [header for header in headers if not is_localizer(header)]
    if not scouts or not images:
        return _placed(headers, findings, resample_uneven=resample_uneven)
    aside = mend(LOCALIZER, f"planning images set aside as a stack of their own: {files(scouts)}")
    planning = mend(LOCALIZER, f"planning images of a series that holds {len(images)} other slices")
    stacks = _placed(images, [*findings, aside], resample_uneven=resample_uneven)
    others = _placed(scouts, [*findings, planning], resample_uneven=resample_uneven)
    return stacks + [_renamed(stack, f"{LOCALIZER} {stack.name}".strip()) for stack in others]


def series_findings(headers: Headers) -> Iterator[Finding]:
    """Whether these files can be one series at all."""
    if not headers[0].series_uid:
        yield mend("no-series-uid", f"SeriesInstanceUID was removed; the {len(headers)} like files of a folder are one")
    for what, value in _OF_ONE_SERIES.items():
        if len(distinct(headers, value)) > 1:
            yield refuse("mixed-series", f"one SeriesInstanceUID, but {what} differs between its files")


def is_localizer(header: Header) -> bool:
    """Whether it is a planning image (PS3.3 C.8.2.1.1.1, ImageType value 3)."""
    return LOCALIZER.upper() in header.image_type[2:3]


def _renamed(stack: Stack, name: str) -> Stack:
    return Stack(name, stack.slices, stack.geometry, stack.slice_positions_k, stack.findings)


def _placed(headers: Headers, findings: Sequence[Finding], *, resample_uneven: bool) -> list[Stack]:
    """Stacks of images of one purpose."""
    kept, dropped = _without_copies(headers)
    found = [*findings, *dropped, *kind_findings(kept)]
    if not is_refused(found):
        found += plane_findings(kept)
    if is_refused(found):
        return [Stack("", tuple(kept), None, None, tuple(found))]
    frames = _by_frame(kept)
    if len(frames) > _MOST_GROUPS or (len(frames) > MANY_STACKS and len(kept) <= 2 * len(frames)):
        return [Stack("", tuple(kept), None, None, (*found, _scattered(kept, frames)))]
    parts = [part for frame in frames for part in _by_phase(frame)]
    if len(parts) > 1:
        apart = sorted({word for part, _ in parts for word in part.words})
        how = f", told apart by {', '.join(apart)}" if apart else ""
        found.append(mend("split-series", f"one of {len(parts)} volumes in its series{how}"))
    return [_stack(part, [*found, *twins], resample_uneven=resample_uneven) for part, twins in parts]


def _stack(group: _Group, findings: list[Finding], *, resample_uneven: bool) -> Stack:
    slices = group.slices
    found = [*findings, *pixel_findings(slices)]
    if is_refused(found):
        return Stack(group.name, tuple(slices), None, None, tuple(found))
    placed = place_slices(slices, resample_uneven=resample_uneven)
    return Stack(group.name, placed.slices, placed.geometry, placed.slice_positions_k, (*found, *placed.findings))


def _by_phase(group: _Group) -> list[tuple[_Group, list[Finding]]]:
    """Parts with one slice a place, and what was dropped on the way; one part where nothing tells them apart."""
    parts, dropped = separate(group.slices, place_numbers(group.slices).tolist()), list[Finding]()
    if parts is None:
        kept, dropped = _without_twins(group.slices)
        parts = separate(kept, place_numbers(kept).tolist()) if dropped else None
    if parts is None:
        return [(group, [])]
    return [
        (_Group(", ".join(filter(None, (group.name, part.name))), group.words + part.words, list(part.slices)), dropped)
        for part in parts
    ]


def _by_frame(headers: Headers) -> list[_Group]:
    """Slices of one matrix, orientation, pixel spacing, frame of reference and StackID, most slices first."""
    stack_ids = [dict(header.kinds).get("stack", b"") for header in headers]
    # A StackID for each slice alone says nothing of stacks.
    told = min(Counter(stack_ids).values()) > 1
    exact: defaultdict[tuple[_Frame, tuple[float, ...]], list[Header]] = defaultdict(list)
    for header, stack_id in zip(headers, stack_ids, strict=True):
        frame = (header.rows, header.columns, header.frame_of_reference, stack_id if told else b"")
        exact[frame, _numbers(header.plane)].append(header)
    groups: list[list[Header]] = []
    known: defaultdict[_Frame, list[tuple[tuple[float, ...], list[Header]]]] = defaultdict(list)
    for (frame, numbers), alike in sorted(exact.items(), key=lambda item: (-len(item[1]), item[0])):
        near = _nearest(numbers, [reference for reference, _ in known[frame]])
        if near is not None:
            known[frame][near][1].extend(alike)
            continue
        groups.append(alike)
        known[frame].append((numbers, alike))
        if len(groups) > _MOST_GROUPS:
            break
    return _named(groups)


def _numbers(plane: Plane | None) -> tuple[float, ...]:
    if plane is None:
        raise AssertionError("slices without a plane were refused before")
    return (*plane.row_cosines_lps, *plane.column_cosines_lps, plane.row_spacing_mm, plane.column_spacing_mm)


def _nearest(numbers: tuple[float, ...], references: list[tuple[float, ...]]) -> int | None:
    """The first reference with these cosines and spacings, within the tolerances."""
    if not references:
        return None
    known, mine = np.array(references), np.array(numbers)
    tolerance = np.where(np.arange(8) < 6, COSINE_TOLERANCE, SAME_SPACING * mine[6:].min())
    fits = (np.abs(known - mine) <= tolerance).all(axis=1)
    return int(np.argmax(fits)) if fits.any() else None


def _named(groups: list[list[Header]]) -> list[_Group]:
    """Groups with names made of what differs between them."""
    firsts = [group[0] for group in groups]
    values = {word: [what(header) for header in firsts] for word, what in _FRAME_WORDS.items()}
    telling = tuple(word for word in _FRAME_WORDS if len(set(values[word])) > 1)
    shown = [word for word in telling if word not in _UNSHOWN]
    names = [" ".join(values[word][n] for word in shown) for n in range(len(groups))]
    counts, seen = Counter(names), Counter[str]()
    for n, name in enumerate(names):
        seen[name] += 1
        names[n] = f"{name} part {seen[name]}".strip() if counts[name] > 1 and len(groups) > 1 else name
    return [_Group(name, telling, group) for name, group in zip(names, groups, strict=True)]


def _orientation(header: Header) -> str:
    normal = np.cross(_numbers(header.plane)[:3], _numbers(header.plane)[3:6])
    return _PLANES[int(np.argmax(np.abs(normal)))]


def _matrix(header: Header) -> str:
    return f"{header.columns}x{header.rows}"


def _pixels(header: Header) -> str:
    down_mm, across_mm = _numbers(header.plane)[6:]
    return f"{across_mm:.3g}x{down_mm:.3g} mm"


def _scattered(headers: Headers, groups: Sequence[_Group]) -> Finding:
    firsts = [group.slices[0] for group in groups]
    counts = {word: len({what(header) for header in firsts}) for word, what in _FRAME_WORDS.items()}
    counts["orientation"] = len({_numbers(header.plane)[:6] for header in firsts})
    word, count = max(counts.items(), key=lambda item: item[1])
    return refuse("scattered-slices", f"{len(headers)} slices with {count} values of {word}: pictures, not a stack")


def _without_copies(headers: Headers) -> tuple[Headers, list[Finding]]:
    """Drop what repeats the same instance: identifier, frame, place, rescaling and pixels."""
    return _without_alike(
        headers, lambda header: (header.sop_uid or str(header.path), header.frame), "copies of the same instance"
    )


def _without_twins(headers: Headers) -> tuple[Headers, list[Finding]]:
    """Drop instances that show the same pixels at the same place under another identifier."""
    places = dict(zip(map(id, headers), place_numbers(headers).tolist(), strict=True))
    return _without_alike(headers, lambda header: places[id(header)], "slices with the same pixels at the same place")


def _without_alike(headers: Headers, same: Callable[[Header], object], what: str) -> tuple[Headers, list[Finding]]:
    alike: defaultdict[tuple[object, ...], list[Header]] = defaultdict(list)
    for header in headers:
        alike[(same(header), header.plane, header.slope, header.intercept)].append(header)
    digests: dict[Path, bytes | None] = {}
    copies = [copy for twins in alike.values() if len(twins) > 1 for copy in _copies(twins, digests)]
    if not copies:
        return headers, []
    dropped = set(map(id, copies))
    return [header for header in headers if id(header) not in dropped], [
        mend("duplicate", f"{what} dropped: {files(copies)}")
    ]


def _copies(twins: Sequence[Header], digests: dict[Path, bytes | None]) -> Iterable[Header]:
    """Those of a few slices whose pixels another one before them has."""
    seen = set()
    for twin in twins:
        if twin.path not in digests:
            digests[twin.path] = _pixel_digest(twin.path)
        digest = (digests[twin.path], twin.frame)
        if digest[0] is not None and digest in seen:
            yield twin
        seen.add(digest)


def _pixel_digest(path: Path) -> bytes | None:
    try:
        with quiet_pydicom():
            pixels = pydicom.dcmread(path, specific_tags=["PixelData"], force=True).get("PixelData")
    except PARSE_FAULTS:
        return None
    return hashlib.sha256(pixels).digest() if isinstance(pixels, bytes) and pixels else None


_OF_ONE_SERIES: dict[str, Callable[[Header], object]] = {
    "the patient": lambda header: header.patient_key,
    "StudyInstanceUID": lambda header: header.study_uid,
    "Modality": lambda header: header.modality,
}

_Frame = tuple[int, int, str, bytes]
_FRAME_WORDS: dict[str, Callable[[Header], str]] = {
    "orientation": _orientation,
    "matrix": _matrix,
    "pixel spacing": _pixels,
    "frame of reference": lambda header: header.frame_of_reference,
    "stack": lambda header: dict(header.kinds).get("stack", b"").hex(),
}
_UNSHOWN = {"frame of reference", "stack"}
