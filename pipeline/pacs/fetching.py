"""From an archive to a folder: one file an instance, whole or not there, and only those that are missing."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.console import Console
from pipeline.errors import PacsError
from pipeline.files import atomic_path, remove_leftovers
from pipeline.pacs.archive import Archive, Match, Unreachable, is_whole_file
from pipeline.pacs.node import check_uid
from pipeline.pacs.patience import Effort


@dataclass(frozen=True)
class FetchedSeries:
    """A series as it lies in its folder; `new_count` of its instances were fetched now."""

    series_uid: str
    folder: Path
    modality: str
    instance_count: int
    new_count: int


def series_of_study(archive: Archive, study_uid: str, *, effort: Effort) -> list[Match]:
    """The series that the archive holds of a study, in the order of their numbers.

    Raises:
        PacsError: it holds none.
    """
    matching = {"StudyInstanceUID": check_uid(study_uid, "--study")}
    found = [row for row in effort.run(lambda: archive.find("SERIES", matching)) if row["SeriesInstanceUID"]]
    if not found:
        raise PacsError(f"the archive holds no study {study_uid}; see what it holds: volseg pacs find NODE")
    return sorted(found, key=lambda row: (_whole(row["SeriesNumber"]), row["SeriesInstanceUID"]))


def folder_name(series_uid: str) -> str:
    """A short name for the folder of a series, the same each time."""
    return f"series-{hashlib.sha256(series_uid.encode()).hexdigest()[:12]}"


def fetch(
    archive: Archive, series: Sequence[Match], out: Path, *, effort: Effort, console: Console
) -> list[FetchedSeries]:
    """Fetch each of `series` into a folder of `out`; files are named by SOP Instance UID.

    Instances that lie there whole already are not asked for again.

    Raises:
        PacsError: something is still missing after all attempts; the same call goes on from there.
        RunError: the folder cannot be written.
    """
    return [_fetch(archive, row, out, effort, console) for row in series]


def _fetch(archive: Archive, row: Match, out: Path, effort: Effort, console: Console) -> FetchedSeries:
    study_uid = check_uid(row["StudyInstanceUID"], "a study of the archive")
    series_uid = check_uid(row["SeriesInstanceUID"], "a series of the archive")
    folder = out / folder_name(series_uid)
    remove_leftovers(folder)
    held = effort.run(lambda: archive.instances(study_uid, series_uid))
    for uid in held:
        check_uid(uid, "an instance of the archive")
    missing = {uid: kind for uid, kind in held.items() if not is_whole_file(folder / f"{uid}.dcm", uid)}
    new_count = len(missing)
    if not held:
        raise PacsError(f"the archive lists no instance of the series {series_uid}")

    def keep(uid: str, write: Callable[[Path], None]) -> None:
        _keep(folder, uid, write)
        missing.pop(uid, None)
        console.progress("fetching", len(held) - len(missing), len(held), row["Modality"])

    try:
        effort.persist(lambda: _retrieve(archive, (study_uid, series_uid), missing, keep), lambda: len(missing))
    except PacsError as error:
        raise PacsError(
            f"{len(held) - len(missing)} of {len(held)} instances are here; {error}; run the same command again to "
            "fetch the rest"
        ) from error
    return FetchedSeries(series_uid, folder, row["Modality"], len(held), new_count)


def _retrieve(
    archive: Archive,
    series: tuple[str, str],
    missing: Mapping[str, str],
    keep: Callable[[str, Callable[[Path], None]], None],
) -> None:
    archive.retrieve(*series, dict(missing), keep)
    if missing:
        raise Unreachable("the archive did not give every instance that it lists")


def _keep(folder: Path, uid: str, write: Callable[[Path], None]) -> None:
    with atomic_path(folder / f"{uid}.dcm") as temporary:
        write(temporary)
        if not is_whole_file(temporary, uid):
            raise Unreachable("an instance came incomplete")


def _whole(text: str) -> int:
    return int(text) if text.lstrip("-").isdigit() else 0
