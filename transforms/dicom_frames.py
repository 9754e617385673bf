"""One Frame for each slice of a DICOM object: where it lies, how it is rescaled, and what tells it from others.

A file of one slice says so in its own elements. An enhanced multi-frame object (PS3.3 C.7.6.16) says it in
functional groups, one item shared by all frames and one item a frame; what a frame says of itself comes first.
Older multi-frame objects are taken apart only where the standard says where their frames lie.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace

from transforms.dicom_elements import Elements, Numbers, Text, Triple

MAX_FRAMES = 2**17
"""A header that promises more frames than this is taken for damaged."""

Place = tuple[str, ...]
"""Keywords on the way to an element: through sequences, of which the first item is meant."""

KINDS: dict[str, tuple[Place, ...]] = {
    "acquisition": (("FrameContentSequence", "FrameAcquisitionNumber"), ("AcquisitionNumber",)),
    "acquisition time": (("FrameContentSequence", "FrameAcquisitionDateTime"), ("AcquisitionTime",)),
    "b-value": (("MRDiffusionSequence", "DiffusionBValue"), ("DiffusionBValue",)),
    "echo": (("EchoNumbers",),),
    "echo time": (("MREchoSequence", "EffectiveEchoTime"), ("EchoTime",)),
    "gradient direction": (
        ("MRDiffusionSequence", "DiffusionGradientDirectionSequence", "DiffusionGradientOrientation"),
        ("DiffusionGradientOrientation",),
    ),
    "image component": (("MRImageFrameTypeSequence", "ComplexImageComponent"), ("ComplexImageComponent",)),
    "image type": (
        ("MRImageFrameTypeSequence", "FrameType"),
        ("CTImageFrameTypeSequence", "FrameType"),
        ("PETFrameTypeSequence", "FrameType"),
        ("ImageType",),
    ),
    "instance number": (("InstanceNumber",),),
    "inversion time": (("MRModifierSequence", "InversionTimes"), ("InversionTime",)),
    "stack": (("FrameContentSequence", "StackID"), ("StackID",)),
    "temporal position": (
        ("FrameContentSequence", "TemporalPositionIndex"),
        ("TemporalPositionSequence", "TemporalPositionTimeOffset"),
        ("TemporalPositionIdentifier",),
    ),
    "trigger time": (("CardiacSynchronizationSequence", "NominalCardiacTriggerDelayTime"), ("TriggerTime",)),
}
"""What tells volumes of one series apart, and where it stands, the most telling place first."""

_POSITION: tuple[Place, ...] = (("PlanePositionSequence", "ImagePositionPatient"),)
_ORIENTATION: tuple[Place, ...] = (
    ("PlaneOrientationSequence", "ImageOrientationPatient"),
    ("ImageOrientationPatient",),
)
_SPACING: tuple[Place, ...] = (("PixelMeasuresSequence", "PixelSpacing"), ("PixelSpacing",))
_SLICE_SPACING: tuple[Place, ...] = (("PixelMeasuresSequence", "SpacingBetweenSlices"), ("SpacingBetweenSlices",))
_THICKNESS: tuple[Place, ...] = (("PixelMeasuresSequence", "SliceThickness"), ("SliceThickness",))
_SLOPE: tuple[Place, ...] = (("PixelValueTransformationSequence", "RescaleSlope"), ("RescaleSlope",))
_INTERCEPT: tuple[Place, ...] = (("PixelValueTransformationSequence", "RescaleIntercept"), ("RescaleIntercept",))
_PRESENTATION = tuple((f"{kind}FrameTypeSequence", "PixelPresentation") for kind in ("MRImage", "CTImage", "PET"))
# (2005,100E), in enhanced objects within Philips' private sequence of what a single slice would say.
_PRIVATE_SCALE: tuple[Place, ...] = (("2005140F", "2005100E"), ("2005100E",))
_SLICE_VECTOR = (0x0054, 0x0080)
HEADER_TAGS = (
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
    *("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SpacingBetweenSlices", "SliceThickness"),
    *("RescaleSlope", "RescaleIntercept", "ImageType", "PixelPresentation"),
    *("2005100E", "FrameIncrementPointer", "SliceVector", "DetectorInformationSequence"),
    *{place[-1] for places in KINDS.values() for place in places if len(place) == 1},
)
"""The elements of a dataset that frames are made from."""


@dataclass(frozen=True, slots=True)
class Plane:
    """Where the pixels of one slice lie, LPS+ mm (PS3.3 C.7.6.2).

    `row_cosines_lps` points along a row, to the next column, whose distance is `column_spacing_mm`.
    """

    position_lps_mm: Triple
    row_cosines_lps: Triple
    column_cosines_lps: Triple
    row_spacing_mm: float
    column_spacing_mm: float


@dataclass(frozen=True, slots=True)
class Frame:
    """What one slice has of its own. `number` is None for a file of one slice, else counts from 1.

    `has_colours` is true where some values stand for colours (PixelPresentation, PS3.3 C.8.16.2.1.1),
    `has_private_scaling` where Philips names a scale of its own.
    """

    number: int | None
    plane: Plane | None
    slope: float | None
    intercept: float | None
    image_type: Text
    slice_spacing_tag_mm: float | None
    thickness_mm: float | None
    has_colours: bool
    has_private_scaling: bool
    kinds: tuple[tuple[str, bytes], ...]


def read_frames(elements: Elements, count: int) -> tuple[tuple[Frame, ...], str]:
    """The `count` frames of a dataset; when it cannot be taken apart, one for the whole of it, and why.

    Each functional group is parsed once: the time is linear in the number of frames.
    """
    alone = _Groups(elements, ())
    whole = _frame(alone, None, bool(alone.find(_PRIVATE_SCALE)[1]))
    if not 1 <= count <= MAX_FRAMES:
        return (whole,), f"{count} frames, expected 1 to {MAX_FRAMES}; is the header damaged?"
    described = elements.items("PerFrameFunctionalGroupsSequence")
    if len(described) not in (0, count):
        return (whole,), f"{count} frames, but functional groups of {len(described)}"
    if described:
        shared = elements.items("SharedFunctionalGroupsSequence")[:1]
        groups = [_Groups(elements, (own, *shared)) for own in described]
        # All frames have a private scale or none, and it lies among much else.
        has_scale = bool(groups[0].find(_PRIVATE_SCALE)[1])
        return tuple(_frame(group, number, has_scale) for number, group in enumerate(groups, start=1)), ""
    if count == 1:
        return (whole,), ""
    planes = tuple(_reconstructed_planes(elements, count))
    if not planes:
        return (whole,), f"{count} frames, and nothing says where each one lies"
    return tuple(replace(whole, number=number, plane=plane) for number, plane in enumerate(planes, start=1)), ""


class _Groups:
    """Where the values of one frame are looked up: its own groups, the shared ones, the whole dataset."""

    def __init__(self, dataset: Elements, groups: tuple[Elements, ...]) -> None:
        self._dataset = dataset
        self._groups = groups
        self.is_frame = bool(groups)

    def find(self, places: tuple[Place, ...]) -> tuple[Elements, str]:
        """The item that holds the first of these places that exists, and the keyword in it."""
        for place in places:
            for item in self._groups if len(place) > 1 else (self._dataset,):
                holder = _descend(item, place[:-1])
                if holder is not None and place[-1] in holder:
                    return holder, place[-1]
        return self._dataset, ""

    def number(self, places: tuple[Place, ...], absent: float | None = None) -> float | None:
        item, keyword = self.find(places)
        return item.number(keyword, absent) if keyword else absent

    def numbers(self, places: tuple[Place, ...]) -> Numbers:
        item, keyword = self.find(places)
        return item.numbers(keyword) if keyword else ()

    def texts(self, places: tuple[Place, ...]) -> Text:
        item, keyword = self.find(places)
        return tuple(part.upper() for part in item.texts(keyword)) if keyword else ()

    def shown(self, places: tuple[Place, ...]) -> bytes:
        item, keyword = self.find(places)
        return item.shown(keyword) if keyword else b""


def _descend(item: Elements, sequences: Place) -> Elements | None:
    found: Elements | None = item
    for sequence in sequences:
        found = None if found is None else found.within(sequence)
    return found


def _frame(groups: _Groups, number: int | None, has_private_scaling: bool) -> Frame:
    # An object of several frames may name a position for all of them: that of none.
    position = _POSITION if groups.is_frame else (("ImagePositionPatient",),)
    return Frame(
        number=number,
        plane=_plane(groups.numbers(position), groups.numbers(_ORIENTATION), groups.numbers(_SPACING)),
        slope=groups.number(_SLOPE, absent=1.0),
        intercept=groups.number(_INTERCEPT, absent=0.0),
        image_type=groups.texts(KINDS["image type"]),
        slice_spacing_tag_mm=groups.number(_SLICE_SPACING),
        thickness_mm=groups.number(_THICKNESS),
        has_colours=groups.texts((*_PRESENTATION, ("PixelPresentation",)))[:1] in (("COLOR",), ("MIXED",)),
        has_private_scaling=has_private_scaling,
        kinds=tuple((word, groups.shown(places)) for word, places in KINDS.items()),
    )


def _plane(position: Numbers, orientation: Numbers, spacing: Numbers) -> Plane | None:
    if (len(position), len(orientation), len(spacing)) != (3, 6, 2) or min(spacing) <= 0:
        return None
    # PixelSpacing is the distance between rows, then between columns (PS3.3 10.7.1.3).
    return Plane(_triple(position), _triple(orientation[:3]), _triple(orientation[3:]), spacing[0], spacing[1])


def _reconstructed_planes(elements: Elements, count: int) -> Iterator[Plane]:
    """The planes of a reconstructed nuclear medicine volume (PS3.3 C.8.4.10, C.8.4.15); none of anything else.

    Its detector names the first slice; the others follow at SpacingBetweenSlices along the normal, against it where
    that is negative.
    """
    vector = elements.binary("SliceVector")
    detector = elements.within("DetectorInformationSequence") or elements
    first = _plane(
        detector.numbers("ImagePositionPatient"),
        detector.numbers("ImageOrientationPatient"),
        elements.numbers("PixelSpacing"),
    )
    step_mm = elements.number("SpacingBetweenSlices")
    is_volume = "RECON TOMO" in elements.texts("ImageType")[2:3] and _pointers(elements) == (_SLICE_VECTOR,)
    if not is_volume or first is None or not step_mm or sorted(vector) != list(range(1, count + 1)):
        return
    normal = _cross(first.row_cosines_lps, first.column_cosines_lps)
    for number in vector:
        away_mm = (number - 1) * step_mm
        place = [x + away_mm * n for x, n in zip(first.position_lps_mm, normal, strict=True)]
        yield _plane(tuple(place), (*first.row_cosines_lps, *first.column_cosines_lps), _spacing(first)) or first


def _pointers(elements: Elements) -> tuple[tuple[int, int], ...]:
    """The elements that FrameIncrementPointer names."""
    raw, little = elements.raw("FrameIncrementPointer")
    return tuple(struct.iter_unpack(f"{'<' if little else '>'}HH", raw[: len(raw) // 4 * 4]))


def _spacing(plane: Plane) -> Numbers:
    return plane.row_spacing_mm, plane.column_spacing_mm


def _cross(a: Triple, b: Triple) -> Triple:
    return a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]


def _triple(values: Numbers) -> Triple:
    return values[0], values[1], values[2]
