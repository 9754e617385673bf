"""Reads a measurement report with pydicom alone, and judges every number, unit and reference in it.

The numbers are measured anew by `verify_measurements`, which shares no code with what the writer measures.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydicom import Dataset, dcmread

from pipeline.errors import ExportError
from pipeline.export import Job
from pipeline.export.verify import LabelFigures, Verification
from pipeline.export.verify_links import check_links
from pipeline.export.verify_measurements import (
    Body,
    crossings_mm,
    intensities,
    largest_bodies,
    longest_in_plane_mm,
    longest_mm,
    placed_mm,
    widths_mm,
)
from pipeline.quiet import quiet
from transforms.labels import Label

Floats = npt.NDArray[np.float64]
Key = tuple[str, str, str]

NUMBER_PART, DIAMETER_PART = 1e-6, 2e-3
"""How far a number may be off, as a part of it: rounding, and for diameters the directions that were tried."""

_VOLUME: Key = ("118565006", "", "mm3")
_DIAMETER: Key = ("L0JK", "", "mm")
_LONG: Key = ("103339001", "", "mm")
_SHORT: Key = ("103340004", "", "mm")
_DERIVATIONS = {"mean": "373098007", "deviation": "386136009", "minimum": "255605001", "maximum": "56851009"}
_QUANTITIES = {"CT": ("112031", "[hnsf'U]"), "MR": ("110852", "[arb'U]")}
_PET_QUANTITIES = {
    "BQML": ("110821", "Bq/ml"),
    "CNTS": ("110821", "{counts}"),
    "CPS": ("110821", "{counts}/s"),
    "PROPCPS": ("110821", "{propcounts}/s"),
    "PROPCNTS": ("110821", "{propcounts}"),
    "GML": ("126401", "g/ml{SUVbw}"),
}
_TRACKING_ID, _TRACKING_UID = "112039", "112040"
_PRESENT, _ABSENT = "52101004", "272519000"


@dataclass(frozen=True, eq=False)
class _Group:
    """A measurement group (TID 1410 or 1411): its items by concept, its numbers by concept, derivation and unit."""

    template: str
    items: Mapping[str, Dataset]
    numbers: Mapping[Key, float]

    def value(self, concept: str) -> str:
        """The text, code or identifier of the item with this concept; empty where there is none."""
        item = self.items.get(concept, Dataset())
        codes = item.get("ConceptCodeSequence")
        return str(codes[0].CodeValue if codes else item.get("TextValue") or item.get("UID") or "")


def verify_sr(path: Path, job: Job) -> Verification:
    """Compare a measurement report with the segmentation, the image and the DICOM SEG that it refers to.

    Raises:
        ExportError: anything differs.
    """
    with quiet():
        report, segmentation = dcmread(path), dcmread(job.files["seg"], stop_before_pixels=True)
        check_links(report, job.series)
        _check_evidence(report, segmentation, job)
        groups = [_group(item) for item in _measurement_groups(report)]
        quantity = _quantity(job)
        figures = []
        for label in job.segmentation.schema.labels:
            segment = _segment(segmentation, label)
            own = [group for group in groups if group.value(_TRACKING_UID) == segment.TrackingUID]
            groups = [group for group in groups if group not in own]
            figures.append(_judge(_Labelled(label, segment, segmentation, job), own, quantity))
    if groups:
        raise ExportError("it holds measurements of what is no segment")
    return Verification("pydicom", 0.0, tuple(figures))


@dataclass(frozen=True, eq=False)
class _Labelled:
    """A label, its segment in the DICOM SEG, and what both belong to."""

    label: Label
    segment: Dataset
    segmentation: Dataset
    job: Job

    def fault(self, what: str) -> ExportError:
        return ExportError(f"label '{self.label.name}' is reported with {what}")


def _check_evidence(report: Dataset, segmentation: Dataset, job: Job) -> None:
    """Everything that is referred to is listed with its series: the source's slices and the segmentation."""
    listed = {
        (str(series.SeriesInstanceUID), str(item.ReferencedSOPInstanceUID))
        for study in report.CurrentRequestedProcedureEvidenceSequence
        for series in study.ReferencedSeriesSequence
        for item in series.ReferencedSOPSequence
    }
    expected = {(job.series.series_uid, found.sop_uid) for found in job.series.slices}
    expected.add((str(segmentation.SeriesInstanceUID), str(segmentation.SOPInstanceUID)))
    if listed != expected:
        raise ExportError("its evidence is not the source series and the segmentation")


def _measurement_groups(report: Dataset) -> Iterator[Dataset]:
    if report.ContentTemplateSequence[0].TemplateIdentifier != "1500":
        raise ExportError("it is no measurement report (TID 1500)")
    for item in report.ContentSequence:
        if _concept(item) == "126010":
            yield from item.ContentSequence


def _concept(item: Dataset) -> str:
    return str(item.ConceptNameCodeSequence[0].CodeValue)


def _group(item: Dataset) -> _Group:
    children = list(item.ContentSequence)
    numbers = [_number(child) for child in children if child.ValueType == "NUM"]
    if len(dict(numbers)) != len(numbers):
        raise ExportError("it holds a measurement twice")
    template = str(item.ContentTemplateSequence[0].TemplateIdentifier)
    others = {_concept(child): child for child in children if child.ValueType != "NUM"}
    return _Group(template, others, dict(numbers))


def _number(item: Dataset) -> tuple[Key, float]:
    [measured] = item.MeasuredValueSequence
    value = float(measured.NumericValue)
    if abs(float(measured.get("FloatingPointValue", value)) - value) > 1e-9 * abs(value):
        raise ExportError("it holds a number that is given in two ways, which differ")
    derivations = [
        str(child.ConceptCodeSequence[0].CodeValue)
        for child in item.get("ContentSequence", [])
        if _concept(child) == "121401"
    ]
    unit = str(measured.MeasurementUnitsCodeSequence[0].CodeValue)
    return (_concept(item), "".join(derivations), unit), value


def _quantity(job: Job) -> tuple[str, str] | None:
    header = dcmread(job.series.paths[0], stop_before_pixels=True, force=True)
    if header.get("Modality") == "PT" and header.get("SUVType", "BW") == "BW":
        return _PET_QUANTITIES.get(str(header.get("Units")))
    return _QUANTITIES.get(str(header.get("Modality")))


def _segment(segmentation: Dataset, label: Label) -> Dataset:
    found: list[Dataset] = [item for item in segmentation.SegmentSequence if item.SegmentLabel == label.name]
    if len(found) != 1:
        raise ExportError(f"the segmentation has no segment for label '{label.name}'")
    return found[0]


def _judge(labelled: _Labelled, groups: list[_Group], quantity: tuple[str, str] | None) -> LabelFigures:
    mask = labelled.job.segmentation.mask(labelled.label.id)
    count = int(mask.sum())
    templates = [group.template for group in groups]
    # What does not occur stands in the report of an empty result only.
    unseen = [] if labelled.job.segmentation.label_map.any() else ["1411"]
    if templates != (["1411", "1410"] if count else unseen):
        raise labelled.fault(f"groups {templates}")
    if not groups:
        return LabelFigures(labelled.label.id, labelled.label.name, 0, 0.0, 0.0, None, None)
    for group in groups:
        _check_names(group, labelled)
    _check_references(groups[0], labelled)
    if groups[0].value("705057003") != (_PRESENT if count else _ABSENT):
        raise labelled.fault("the wrong presence")
    i_mm, j_mm, k_mm = labelled.job.segmentation.geometry.affine_ras[:3, :3].T
    volume_mm3 = count * abs(float(np.cross(i_mm, j_mm) @ k_mm))
    expected = {_VOLUME: volume_mm3}
    if count and quantity is not None:
        measured = intensities(labelled.job.source.image.voxels[mask])
        expected |= {(quantity[0], code, quantity[1]): measured[what] for what, code in _DERIVATIONS.items()}
    exact = {key: value for key, value in groups[0].numbers.items() if key != _DIAMETER}
    _check_numbers(exact, expected, labelled)
    if count:
        _check_diameters(groups, mask, labelled)
    return LabelFigures(
        labelled.label.id, labelled.label.name, count, groups[0].numbers[_VOLUME], volume_mm3, None, None
    )


def _check_names(group: _Group, labelled: _Labelled) -> None:
    label, segment = labelled.label, labelled.segment
    found = (group.value(_TRACKING_ID), group.value("121071"), group.value("276214006"))
    if found != (str(segment.TrackingID), label.code.value, label.category.value):
        raise labelled.fault("another tracking identifier, finding or category than its segment")


def _check_references(group: _Group, labelled: _Labelled) -> None:
    [image] = group.items["121191"].ReferencedSOPSequence
    found = (image.ReferencedSOPClassUID, image.ReferencedSOPInstanceUID, image.ReferencedSegmentNumber)
    seg = labelled.segmentation
    if found != (seg.SOPClassUID, seg.SOPInstanceUID, labelled.segment.SegmentNumber):
        raise labelled.fault("a reference to another segment")
    if group.value("121232") != labelled.job.series.series_uid:
        raise labelled.fault("a reference to another series than the source")


def _check_numbers(found: Mapping[Key, float], expected: Mapping[Key, float], labelled: _Labelled) -> None:
    if found.keys() != expected.keys():
        raise labelled.fault("other measurements or units than it should have")
    for key, value in expected.items():
        # What cancels out, as a mean near 0, is judged by the size of what it was made from.
        size = max(abs(value), *(abs(x) for k, x in expected.items() if k[2] == key[2]))
        if not abs(found[key] - value) <= NUMBER_PART * size:
            raise labelled.fault(f"{found[key]:g} {key[2]} where {value:g} is measured")


def _check_diameters(groups: list[_Group], mask: npt.NDArray[np.bool_], labelled: _Labelled) -> None:
    """Of several largest pieces the report may have measured any."""
    volumetric, planar = groups
    if volumetric.numbers.get(_DIAMETER) is None or planar.numbers.keys() != {_LONG, _SHORT}:
        raise labelled.fault("other diameters or units than it should have")
    outline_ij, k = _outline(planar, labelled)
    geometry = labelled.job.segmentation.geometry
    faults = [_diameter_fault(groups, outline_ij, k, body) for body in largest_bodies(mask, geometry)]
    if None not in faults:
        raise labelled.fault(faults[0] or "")


def _outline(planar: _Group, labelled: _Labelled) -> tuple[Floats, int]:
    """The corners (N, 2) of the region in voxel indices, and the slice that it refers to."""
    region = planar.items["111030"]
    corners = np.array(region.GraphicData, dtype=np.float64).reshape(-1, 2) - 0.5
    [image] = region.ContentSequence[0].ReferencedSOPSequence
    named = (str(image.ReferencedSOPInstanceUID), image.get("ReferencedFrameNumber"))
    slices = [(found.sop_uid, found.frame) for found in labelled.job.series.slices]
    if named not in slices or region.GraphicType != "POLYLINE" or not np.array_equal(corners[0], corners[-1]):
        raise labelled.fault("a region that is no outline on a source slice")
    return corners[:-1], slices.index(named)


def _diameter_fault(groups: list[_Group], outline_ij: Floats, k: int, body: Body) -> str | None:
    """What does not fit one piece of the label, in words."""
    volumetric, planar = groups
    long_mm, short_mm = planar.numbers[_LONG], planar.numbers[_SHORT]
    if not _is_close(volumetric.numbers[_DIAMETER], longest_mm(body)):
        return f"a longest diameter of {volumetric.numbers[_DIAMETER]:.2f} mm where {longest_mm(body):.2f} is measured"
    on_slice = body.on_slice(k)
    if not len(on_slice.ends_ijk) or not _is_outline(outline_ij, on_slice.ends_ijk[:, :2]):
        return "an outline that is not its own"
    found_mm = longest_in_plane_mm(on_slice)
    if not _is_close(long_mm, found_mm) or widths_mm(body).max() > long_mm * (1 + DIAMETER_PART):
        return f"a long axis of {long_mm:.2f} mm where {max(found_mm, widths_mm(body).max()):.2f} is measured"
    outline_mm = placed_mm(np.insert(outline_ij, 2, k, axis=1), body.geometry)
    ways_mm = outline_mm - outline_mm[0]
    lengths_mm = np.linalg.norm(ways_mm, axis=1)
    # Where several diameters are the longest, any may have been crossed.
    shorts_mm = [
        crossings_mm(outline_mm, way / length)
        for way, length in zip(ways_mm, lengths_mm, strict=True)
        if length and _is_close(length, long_mm)
    ]
    if not any(_is_close(short_mm, candidate_mm) for candidate_mm in shorts_mm):
        return f"a short axis of {short_mm:.2f} mm where {shorts_mm} is measured"
    return None


def _is_close(value: float, expected: float) -> bool:
    return abs(value - expected) <= DIAMETER_PART * abs(expected)


def _is_outline(corners_ij: Floats, ends_ij: npt.NDArray[np.int64]) -> bool:
    """Every corner is the middle of a pixel's side, and the middles of all sides are inside."""
    sides = np.array([(0.5, 0.0), (-0.5, 0.0), (0.0, 0.5), (0.0, -0.5)])
    middles = (ends_ij[:, None] + sides).reshape(-1, 2)
    known = {(float(i), float(j)) for i, j in middles}
    edges = np.roll(corners_ij, -1, axis=0) - corners_ij
    offsets = middles[:, None] - corners_ij
    turns = edges[:, 0] * offsets[..., 1] - edges[:, 1] * offsets[..., 0]
    is_inside = bool((turns >= -1e-6).all() or (turns <= 1e-6).all())
    return is_inside and all((float(i), float(j)) in known for i, j in corners_ij)
