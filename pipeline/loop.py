"""The loop through an archive around a prediction: which series to fetch, and which results to send back."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from pipeline.errors import ExportError, RunError, VolumeError
from pipeline.export import FORMATS
from pipeline.files import safe_name
from pipeline.pacs.archive import Match
from pipeline.studies import EVERY_SERIES

IMAGE_MODALITIES = ("CT", "MR", "PT")
SOURCE_FOLDER = "source"
REPORT_SUFFIX = ".verification.json"


def choose_series(found: Sequence[Match], wanted: str | None) -> tuple[list[Match], str | None]:
    """The series to segment, and what is left of `wanted` to be settled when they are read.

    `wanted` is None for the only image series there is, 'all', a number in the listing (from 1), or the beginning of
    a SeriesInstanceUID, with #VOLUME behind it for a volume of a series that holds several.

    Raises:
        VolumeError: none or several fit; the message lists the choices.
    """
    images = [row for row in found if row["Modality"] in IMAGE_MODALITIES]
    if not images:
        others = ", ".join(sorted({row["Modality"] or "?" for row in found}))
        raise VolumeError(f"the study holds no series of images ({', '.join(IMAGE_MODALITIES)}), only {others}")
    if wanted == EVERY_SERIES:
        return images, EVERY_SERIES
    if wanted is None:
        fitting, volume = images, ""
    elif wanted.isdecimal() and 1 <= int(wanted) <= len(images):
        fitting, volume = [images[int(wanted) - 1]], ""
    else:
        beginning, _, volume = wanted.partition("#")
        fitting = [row for row in images if beginning and row["SeriesInstanceUID"].startswith(beginning)]
        fitting = [row for row in fitting if row["SeriesInstanceUID"] == beginning] or fitting
    if len(fitting) != 1:
        raise VolumeError(
            f"{len(fitting)} image series of the study fit, name one with --series, by number or SeriesInstanceUID: "
            + "; ".join(_lines(images))
        )
    return fitting, f"{fitting[0]['SeriesInstanceUID']}#{volume}" if volume else None


def check_sendable(formats: Sequence[str]) -> None:
    """Refuse to send where nothing of `formats` is DICOM, before anything is fetched.

    Raises:
        ExportError: as said.
    """
    if not any(FORMATS[name].needs_dicom for name in formats):
        dicom = ", ".join(name for name, form in FORMATS.items() if form.needs_dicom)
        raise ExportError(f"--send wants results in DICOM, and --as names none; add one of {dicom}")


def verified_results(out: Path, studies: Sequence[str], formats: Sequence[str]) -> list[Path]:
    """The DICOM results in `out` of the studies that are called so, as far as they read back the same.

    Those of other studies that lie there may be another model's, or of fewer slices.

    Raises:
        RunError: there are none.
    """
    files = [file for study in studies for file in _verified(out, study, formats)]
    if not files:
        raise RunError(f"{out}: nothing was sent, as this run has no verified DICOM result")
    return files


def _verified(out: Path, study: str, formats: Sequence[str]) -> Iterator[Path]:
    report = out / f"{safe_name(study)}{REPORT_SUFFIX}"
    if not report.exists():
        return
    try:
        rows = json.loads(report.read_text(encoding="utf-8"))["files"]
        names = [(str(row["format"]), str(row["file"])) for row in rows]
    except (OSError, ValueError, KeyError, TypeError):
        raise RunError(f"{report}: damaged; run the command again with --force") from None
    for form, name in names:
        wanted = form in formats or any(FORMATS[key].refers_to == form for key in formats)
        if wanted and form in FORMATS and FORMATS[form].needs_dicom:
            yield report.parent / Path(name).name


def _lines(images: Sequence[Match]) -> list[str]:
    return [
        f"{number}: {row['Modality']} '{row['SeriesDescription']}', {row['NumberOfSeriesRelatedInstances'] or '?'} "
        f"instances, {row['SeriesInstanceUID']}"
        for number, row in enumerate(images, start=1)
    ]
