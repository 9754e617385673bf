"""Whether a DICOM object belongs to its source's patient and study, for the readers of objects other than SEG."""

from __future__ import annotations

from pydicom import Dataset, dcmread

from pipeline.errors import ExportError
from transforms.dicom import DicomSeries

_LINKS = (
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex"),
    *("StudyInstanceUID", "AccessionNumber", "StudyID", "StudyDate"),
)


def check_links(dataset: Dataset, series: DicomSeries) -> None:
    """Patient and study are the source's; the series is a new one.

    Raises:
        ExportError: they are not. Values stay out of the message: they are the patient's.
    """
    source = dcmread(series.paths[0], stop_before_pixels=True, force=True)
    for keyword in _LINKS:
        if str(dataset.get(keyword) or "") != str(source.get(keyword) or ""):
            raise ExportError(f"its {keyword} is not the source's")
    if dataset.SeriesInstanceUID == series.series_uid:
        raise ExportError("it claims to be of the source series itself")
    if dataset.SOPInstanceUID in {found.sop_uid for found in series.slices}:
        raise ExportError("it has the SOPInstanceUID of a source image")
