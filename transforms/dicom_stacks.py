"""One SeriesInstanceUID -> the volumes in it."""

from __future__ import annotations

from collections.abc import Iterator

from transforms.dicom_findings import Finding, Headers, distinct, mend, refuse


def series_findings(headers: Headers) -> Iterator[Finding]:
    if not headers[0].series_uid:
        yield mend("no-series-uid", f"SeriesInstanceUID was removed; the {len(headers)} like files of a folder are one")
    for what, value in (
        ("StudyInstanceUID", lambda header: header.study_uid),
        ("Modality", lambda header: header.modality),
        ("FrameOfReferenceUID", lambda header: header.frame_of_reference),
    ):
        if len(distinct(headers, value)) > 1:
            yield refuse("mixed-series", f"one SeriesInstanceUID, but {what} differs between its files")
