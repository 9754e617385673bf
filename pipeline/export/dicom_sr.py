"""DICOM measurement report (PS3.16 TID 1500, as a Comprehensive SR), which refers to the DICOM SEG beside it.

A label that occurs has two groups with the tracking identifier of its segment. The volumetric one (TID 1411) refers to
the segment and holds volume, intensity and the longest diameter in 3D. The planar one (TID 1410) holds the two
diameters on the slice where the label is longest, and the convex outline on that slice, so that viewers which show
only regions find the place. A label that does not occur is left out, since OHIF 3.13 shows nothing of a report in which
a group has no region. A report of an empty result has a volumetric group for each label, with a volume of 0 and a
presence of 'Absent'.

Intensities are reported where DICOM names their unit: in HU for CT, in arbitrary units for MR, for PET in that of the
tag Units. For other modalities they are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import highdicom as hd
import numpy as np
from highdicom import sr
from pydicom import Dataset, dcmread
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code

from pipeline.errors import ExportError
from pipeline.export import Job
from pipeline.export.dicom_source import LO_CHARACTERS, description, source_header, take_identity
from pipeline.export.measurements import InPlane, Intensity, Measures, measure
from pipeline.quiet import quiet
from transforms.dicom import DicomSeries
from transforms.labels import CodedConcept, Label

SERIES_NUMBER_OFFSET = 1200
"""Added to the source's series number, so that viewers list the report behind the images and the segmentation."""

DEVICE_UID = "2.25.232366226330166911467313110713929428083"
"""Names volseg as the observer, in all reports."""

_ANATOMY = ("91723000", "123037004")
"""SNOMED CT's categories of body structures; what is of another category, as a lesion, is no place in the body."""

_PRESENCE = Code("705057003", "SCT", "Presence")
_MM3, _MM = Code("mm3", "UCUM", "cubic millimeter"), Code("mm", "UCUM", "mm")
_ACTIVITY = codes.DCM.NuclearMedicineTomographicActivity
_PET_UNITS = {
    "BQML": (_ACTIVITY, Code("Bq/ml", "UCUM", "Becquerels/milliliter")),
    "CNTS": (_ACTIVITY, Code("{counts}", "UCUM", "Counts")),
    "CPS": (_ACTIVITY, Code("{counts}/s", "UCUM", "Counts per second")),
    "PROPCPS": (_ACTIVITY, Code("{propcounts}/s", "UCUM", "Proportional to counts per second")),
    "PROPCNTS": (_ACTIVITY, Code("{propcounts}", "UCUM", "Proportional to counts")),
    "GML": (Code("126401", "DCM", "SUVbw"), Code("g/ml{SUVbw}", "UCUM", "Standardized Uptake Value body weight")),
}
_PROCEDURES = {
    "CT": codes.LN.CTUnspecifiedBodyRegion,
    "MR": codes.LN.MRIUnspecifiedBodyRegion,
    "PT": codes.LN.PETUnspecifiedBodyRegion,
    "NM": codes.LN.NMUnspecifiedBodyRegion,
}


@dataclass(frozen=True, eq=False)
class _Context:
    """What all groups share: the quantity and unit of intensities (None where unknown), and what is referred to."""

    job: Job
    quantity: tuple[Code, Code] | None
    source_classes: dict[str, str]
    segmentation: Dataset


def write_sr(target: Path, job: Job) -> None:
    """Write the measurement report of a segmentation whose DICOM SEG is `job.files['seg']`.

    Raises:
        ExportError: the source lacks what a report must refer to.
    """
    with quiet():
        headers = _headers(job.series)
        identity = take_identity(headers[0])
        segmentation = dcmread(job.files["seg"], stop_before_pixels=True)
        source_classes = {header.SOPInstanceUID: header.SOPClassUID for header in headers}
        context = _Context(job, _quantity(headers[0]), source_classes, segmentation)
        try:
            dataset = _build(headers, context)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ExportError(
                f"the source series cannot be described in a DICOM SR ({error}); leave the format 'sr' out"
            ) from error
        for element in identity:
            dataset.add(element)
        dataset.save_as(target, enforce_file_format=True)


def _headers(series: DicomSeries) -> list[Dataset]:
    """One an instance: the frames of a multi-frame file share theirs."""
    first = {found.sop_uid: found for found in reversed(series.slices)}
    return [source_header(first[uid]) for uid in dict.fromkeys(found.sop_uid for found in series.slices)]


def _quantity(header: Dataset) -> tuple[Code, Code] | None:
    """What the voxels' values measure, and their unit (PS3.16 CID 7180 and 7181)."""
    if header.Modality == "CT":
        return codes.DCM.AttenuationCoefficient, Code("[hnsf'U]", "UCUM", "Hounsfield unit")
    if header.Modality == "MR":
        return codes.DCM.MRSignalIntensity, Code("[arb'U]", "UCUM", "arbitrary unit")
    # PS3.3 section C.8.9.1.1.3: an uptake value is by body weight unless SUVType says otherwise.
    if header.Modality == "PT" and header.get("SUVType", "BW") == "BW":
        return _PET_UNITS.get(header.get("Units"))
    return None


def _build(headers: Sequence[Dataset], context: _Context) -> Dataset:
    algorithm = context.job.segmentation.algorithm
    report = sr.MeasurementReport(
        observation_context=sr.ObservationContext(observer_device_context=_device()),
        procedure_reported=_PROCEDURES.get(headers[0].Modality, codes.SCT.ImagingProcedure),
        imaging_measurements=list(_groups(context)),
        referenced_images=[_library_entry(header) for header in headers],
    )
    return sr.ComprehensiveSR(
        evidence=[*headers, context.segmentation],
        content=report,
        is_complete=True,
        specific_character_set="ISO_IR 192",
        **description(algorithm, headers[0], what="Measurements", number_offset=SERIES_NUMBER_OFFSET),
    )


def _device() -> sr.ObserverContext:
    device = sr.DeviceObserverIdentifyingAttributes(
        uid=DEVICE_UID, name="volseg", manufacturer_name="volseg", model_name="volseg"
    )
    return sr.ObserverContext(observer_type=codes.DCM.Device, observer_identifying_attributes=device)


def _library_entry(header: Dataset) -> Dataset:
    """What of a slice goes into the image library: its place in the patient stands in the slice itself."""
    entry = Dataset()
    for keyword in ("SOPClassUID", "SOPInstanceUID", "FrameOfReferenceUID", "Rows", "Columns"):
        if keyword in header:
            setattr(entry, keyword, header[keyword].value)
    entry.Modality = "OT"
    return entry


Group = sr.VolumetricROIMeasurementsAndQualitativeEvaluations | sr.PlanarROIMeasurementsAndQualitativeEvaluations


def _groups(context: _Context) -> Iterator[Group]:
    job = context.job
    numbers = {item.SegmentLabel: item for item in context.segmentation.SegmentSequence}
    measures = measure(job.segmentation, job.source.image.voxels)
    is_empty = not any(found.voxels for found in measures)
    for label, found in zip(job.segmentation.schema.labels, measures, strict=True):
        if not (found.voxels or is_empty):
            continue
        segment = numbers[label.name]
        yield _volumetric(found, label, segment, context)
        if found.in_plane is not None:
            yield _planar(found.in_plane, label, segment, context)


def _volumetric(
    found: Measures, label: Label, segment: Dataset, context: _Context
) -> sr.VolumetricROIMeasurementsAndQualitativeEvaluations:
    presence = codes.SCT.Present if found.voxels else codes.SCT.Absent
    return sr.VolumetricROIMeasurementsAndQualitativeEvaluations(
        referenced_segment=sr.ReferencedSegment(
            context.segmentation.SOPClassUID,
            context.segmentation.SOPInstanceUID,
            segment_number=int(segment.SegmentNumber),
            source_series=sr.SourceSeriesForSegmentation(context.job.series.series_uid),
        ),
        measurements=list(_volumetric_measurements(found, context.quantity)),
        qualitative_evaluations=[sr.QualitativeEvaluation(_PRESENCE, presence)],
        **_named(label, segment, context),
    )


def _volumetric_measurements(found: Measures, quantity: tuple[Code, Code] | None) -> Iterator[sr.Measurement]:
    yield sr.Measurement(codes.SCT.Volume, found.volume_mm3, _MM3)
    if quantity is not None and found.intensity is not None:
        yield from _intensities(found.intensity, *quantity)
    if found.longest is not None:
        yield sr.Measurement(codes.IBSI.Maximum3DDiameterOfAMesh, found.longest.length_mm, _MM)


def _intensities(found: Intensity, quantity: Code, unit: Code) -> Iterator[sr.Measurement]:
    yield sr.Measurement(quantity, found.mean, unit, derivation=codes.SCT.Mean)
    yield sr.Measurement(quantity, found.deviation, unit, derivation=codes.SCT.StandardDeviation)
    yield sr.Measurement(quantity, found.minimum, unit, derivation=codes.SCT.Minimum)
    yield sr.Measurement(quantity, found.maximum, unit, derivation=codes.SCT.Maximum)


def _planar(
    found: InPlane, label: Label, segment: Dataset, context: _Context
) -> sr.PlanarROIMeasurementsAndQualitativeEvaluations:
    header = context.job.series.slices[found.k]
    frames = None if header.frame is None else [header.frame]
    # A pixel's centre is at one half (PS3.3 section C.18.6.1.1); the outline ends where it began.
    corners = np.concatenate([found.outline_ij, found.outline_ij[:1]]) + 0.5
    region = sr.ImageRegion(
        sr.GraphicTypeValues.POLYLINE,
        corners,
        sr.SourceImageForRegion(context.source_classes[header.sop_uid], header.sop_uid, frames),
        pixel_origin_interpretation=None if frames is None else sr.PixelOriginInterpretationValues.FRAME,
    )
    return sr.PlanarROIMeasurementsAndQualitativeEvaluations(
        referenced_region=region,
        measurements=[
            sr.Measurement(codes.SCT.LongAxis, found.longest.length_mm, _MM),
            sr.Measurement(codes.SCT.ShortAxis, found.perpendicular.length_mm, _MM),
        ],
        **_named(label, segment, context),
    )


def _named(label: Label, segment: Dataset, context: _Context) -> dict[str, Any]:
    """The arguments of a group that say what was found, where and by what."""
    algorithm = context.job.segmentation.algorithm
    sites = [sr.FindingSite(_code(label.code))] if label.category.value in _ANATOMY else None
    return {
        "tracking_identifier": sr.TrackingIdentifier(segment.TrackingUID, segment.TrackingID),
        "finding_category": _code(label.category),
        "finding_type": _code(label.code),
        "finding_sites": sites,
        "algorithm_id": sr.AlgorithmIdentification(
            algorithm.name[:LO_CHARACTERS], algorithm.version[:LO_CHARACTERS] or "unknown"
        ),
    }


def _code(concept: CodedConcept) -> hd.sr.CodedConcept:
    return hd.sr.CodedConcept(concept.value, concept.scheme, concept.meaning)
