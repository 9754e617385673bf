"""Secondary capture series (PS3.3 section A.8.1): the source's slices with coloured outlines, for viewers without SEG.

One RGB instance a slice, in a new series of the same study. The outline of a label is the pixels of it that touch,
by a side and within the slice, a pixel that is not of it or the edge of the image: it lies inside the label, one
pixel wide, so the smallest label shows. Position and orientation are kept (a standard extended SOP class), so that
viewers can line the captures up with the source. No text is drawn; names and colours stand in Image Comments.

Brightness follows the source's own window (PS3.3 section C.11.2), else percentiles of the whole series.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydicom import Dataset, dcmread
from pydicom.dataset import FileMetaDataset
from pydicom.uid import PYDICOM_IMPLEMENTATION_UID, ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

from pipeline.export import Job
from pipeline.export.capture_colours import outline_colours
from pipeline.export.dicom_source import (
    decimal_strings,
    description,
    frame_of_reference,
    source_header,
    source_image,
    take_identity,
)
from pipeline.quiet import quiet
from transforms.dicom_checks import is_inverted
from transforms.dicom_header import Header
from transforms.labels import LabelSchema

SERIES_NUMBER_OFFSET = 1300
"""Added to the source's series number, so that viewers list the captures behind the study's images."""

WINDOW_PERCENTILES = (1.0, 99.0)
"""The values of the whole series that become black and white where the source names no window."""

DERIVATION = "Source image with outlines of a segmentation made by software. For research, not for diagnosis."

_COMMENT_CHARACTERS = 10240
_PLACE_KEYWORDS = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing")

Array = npt.NDArray[Any]
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Window:
    """Which values become black to white: centre, width and function of PS3.3 section C.11.2.1."""

    centre: float
    width: float
    function: str = "LINEAR_EXACT"


def write_capture(target: Path, job: Job) -> None:
    """Write a file a slice into the folder `target`.

    Raises:
        ExportError: a slice cannot be referred to.
    """
    with quiet():
        shared = _shared(job)
        ordinary = _ordinary_window(job.source.image.voxels)
        windows = _Windows(ordinary)
        colours = np.array([(0, 0, 0), *outline_colours(job.segmentation.schema)], dtype=np.uint8)
        classes = job.segmentation.schema.classes_from_ids(job.segmentation.label_map)
        for k, found in enumerate(job.series.slices):
            grey = to_grey(job.source.image.voxels[:, :, k], windows.of(found))
            # A unit keeps its sign in the volume, but is shown the other way round.
            if found.photometric == "MONOCHROME1" and not is_inverted(found):
                grey = 255 - grey
            outlines = outlines_of(classes[:, :, k])
            pixels = np.where(outlines[..., None] > 0, colours[outlines], grey[..., None])
            dataset = _slice(found, k, pixels.transpose(1, 0, 2))
            dataset.update(shared)
            dataset.save_as(target / f"{k + 1:05d}.dcm", enforce_file_format=True)


def outlines_of(classes: Array) -> Array:
    """(I, J) of one slice: the class of a pixel on its outline, else 0."""
    padded = np.pad(classes, 1)
    inner = padded[1:-1, 1:-1]
    neighbours = (padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:])
    is_inside = np.logical_and.reduce([inner == other for other in neighbours])
    return np.asarray(np.where(is_inside, 0, inner))


def to_grey(values: Array, window: Window) -> Bytes:
    """Values in the modality's unit to 0..255 (PS3.3 sections C.11.2.1.2 and C.11.2.1.3)."""
    x = values.astype(np.float64)
    if window.function == "SIGMOID":
        part = 1 / (1 + np.exp(np.clip(-4 * (x - window.centre) / window.width, -50, 50)))
    elif window.function == "LINEAR_EXACT":
        part = (x - window.centre) / window.width + 0.5
    else:
        # The width counts values, the first and the last among them.
        part = (x - (window.centre - 0.5)) / max(window.width - 1, 1e-6) + 0.5
    return np.asarray(np.rint(255 * np.clip(part, 0.0, 1.0)), dtype=np.uint8)


def _ordinary_window(voxels: Array) -> Window:
    low, high = np.percentile(voxels, WINDOW_PERCENTILES)
    if high <= low:
        low, high = float(voxels.min()), float(voxels.max())
    return Window((low + high) / 2, max(high - low, 1e-6))


class _Windows:
    """The window that each slice names; a multi-frame file is opened once."""

    def __init__(self, ordinary: Window) -> None:
        self._ordinary = ordinary
        self._path, self._dataset = Path(), Dataset()

    def of(self, found: Header) -> Window:
        if is_inverted(found):
            # Its window counts stored values, of which the volume holds the mirror image.
            return self._ordinary
        if found.path != self._path:
            self._path = found.path
            self._dataset = dcmread(found.path, stop_before_pixels=True, force=True)
        named = [_window(place) for place in _window_places(self._dataset, found.frame)]
        return next((window for window in named if window is not None), self._ordinary)


def _window_places(dataset: Dataset, frame: int | None) -> Iterator[Dataset]:
    """Where a slice's window may stand: in its frame's functional groups, in those of all frames, in the file."""
    groups = []
    if frame is not None:
        groups += list(dataset.get("PerFrameFunctionalGroupsSequence") or [])[frame - 1 : frame]
        groups += list(dataset.get("SharedFunctionalGroupsSequence") or [])
    for group in groups:
        yield from group.get("FrameVOILUTSequence") or []
    yield dataset


def _window(place: Dataset) -> Window | None:
    """The first window named, if it makes sense."""
    try:
        centre, width = (np.atleast_1d(place[x].value)[0] for x in ("WindowCenter", "WindowWidth"))
        function = str(place.get("VOILUTFunction") or "LINEAR").upper()
        window = Window(float(centre), float(width), function)
    except (KeyError, IndexError, TypeError, ValueError):
        return None
    least = 1.0 if function == "LINEAR" else 0.0
    return window if np.isfinite(window.centre) and least < window.width < np.inf else None


def _shared(job: Job) -> Dataset:
    """The elements that all instances have."""
    header = source_header(job.series.slices[0])
    shared = take_identity(header)
    shared.StudyInstanceUID = header.StudyInstanceUID
    made = description(job.segmentation.algorithm, header, what="Outlines", number_offset=SERIES_NUMBER_OFFSET)
    shared.SpecificCharacterSet = "ISO_IR 192"
    shared.Modality, shared.ConversionType = "OT", "WSD"
    shared.SeriesInstanceUID, shared.SeriesNumber = made["series_instance_uid"], made["series_number"]
    shared.SeriesDescription = made["series_description"]
    shared.Manufacturer, shared.ManufacturerModelName = made["manufacturer"], made["manufacturer_model_name"]
    shared.DeviceSerialNumber, shared.SoftwareVersions = made["device_serial_number"], made["software_versions"]
    shared.FrameOfReferenceUID, shared.PositionReferenceIndicator = frame_of_reference(job.series), ""
    # Without a body part, which might be one of a pair, a laterality must stand there, if only as unknown.
    for keyword in ("BodyPartExamined", "Laterality"):
        if header.get(keyword):
            setattr(shared, keyword, header[keyword].value)
    if "BodyPartExamined" not in shared:
        shared.Laterality = header.get("Laterality") or ""
    i_mm, j_mm, _ = job.segmentation.geometry.spacing_mm
    [shared.SliceThickness] = decimal_strings([job.segmentation.geometry.voxel_volume_mm3 / (i_mm * j_mm)])
    now = datetime.now(UTC).astimezone()
    shared.ContentDate, shared.ContentTime = now.strftime("%Y%m%d"), now.strftime("%H%M%S")
    shared.ImageComments = _legend(job.segmentation.schema, job.segmentation.present())
    return shared


def _legend(schema: LabelSchema, present: list[int]) -> str:
    """Names and colours of the labels that occur, as far as they fit."""
    rows = zip(schema.labels, outline_colours(schema), strict=True)
    lines = [f"{label.name}: #{bytes(colour).hex()}" for label, colour in rows if label.id in present]
    text = "\r\n".join(lines or ["No label occurs."])
    if len(text.encode()) > _COMMENT_CHARACTERS:
        text = text.encode()[: _COMMENT_CHARACTERS - 3].decode(errors="ignore") + "..."
    return text


def _slice(found: Header, k: int, pixels: Bytes) -> Dataset:
    """One instance: `pixels` (rows, columns, 3)."""
    header = source_header(found)
    dataset = Dataset()
    dataset.SOPClassUID, dataset.SOPInstanceUID = SecondaryCaptureImageStorage, generate_uid(prefix=None)
    dataset.ImageType, dataset.DerivationDescription = ["DERIVED", "SECONDARY"], DERIVATION
    dataset.BurnedInAnnotation, dataset.InstanceNumber = "NO", k + 1
    for keyword in _PLACE_KEYWORDS:
        setattr(dataset, keyword, header[keyword].value)
    cosines = np.array(header.ImageOrientationPatient, dtype=np.float64)
    dataset.PatientOrientation = [_letters(cosines[:3]), _letters(cosines[3:])]
    dataset.SourceImageSequence = [source_image(found)]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation, dataset.PlanarConfiguration = 3, "RGB", 0
    dataset.Rows, dataset.Columns = pixels.shape[:2]
    dataset.BitsAllocated = dataset.BitsStored = 8
    dataset.HighBit, dataset.PixelRepresentation = 7, 0
    content = np.ascontiguousarray(pixels, dtype=np.uint8).tobytes()
    dataset.PixelData = content + b"\0" * (len(content) % 2)
    dataset["PixelData"].VR = "OB"
    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.ImplementationClassUID = ExplicitVRLittleEndian, PYDICOM_IMPLEMENTATION_UID
    dataset.file_meta = meta
    return dataset


def _letters(direction_lps: npt.NDArray[np.float64]) -> str:
    """Where a direction points, its largest part first (PS3.3 section C.7.6.1.1.1)."""
    order = np.argsort(-np.abs(direction_lps), kind="stable")
    return "".join("LPH"[a] if direction_lps[a] > 0 else "RAF"[a] for a in order if abs(direction_lps[a]) > 0.1)
