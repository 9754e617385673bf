"""What a prediction tells beside its labels, as files: maps for viewers, a table of studies, scores to decide again."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from pipeline.confidence import Asked, Confidence
from pipeline.export.nifti import write_scaled
from pipeline.files import atomic_path, explain_os_error, safe_name
from pipeline.kept_scores import SUFFIX, write_scores
from pipeline.quality import quality_file, record_quality
from transforms.geometry import Geometry

MAPS, SCORES = "uncertainty", "scores"
"""Folders of their own within that of the label maps, in which everything that ends in .nii.gz is taken for one."""

DESCRIPTIONS = {
    "entropy": "entropy of the averaged answer, as a part of the highest there is",
    "disagreement": "disagreement of averaged folds, mirrorings and windows; unit as entropy",
}
"""At most 79 characters, as a NIfTI header holds them."""


def map_file(out: Path, name: str, what: str) -> Path:
    """Where the map `what`, "entropy" or "disagreement", of a study is."""
    return out / MAPS / f"{safe_name(name)}_{what}.nii.gz"


def scores_file(out: Path, name: str) -> Path:
    """Where a study's kept scores are."""
    return out / SCORES / (safe_name(name) + SUFFIX)


def files_of(out: Path, name: str, asked: Asked, *, disagrees: bool) -> list[Path]:
    """The files that `write_confidence` will have written for a study; `disagrees`: there are several answers."""
    maps = [what for what in DESCRIPTIONS if asked.maps and (disagrees or what != "disagreement")]
    files = [map_file(out, name, what) for what in maps]
    files += [quality_file(out, name)] if asked.maps or asked.estimate else []
    return files + ([scores_file(out, name)] if asked.keep_scores else [])


def write_confidence(out: Path, name: str, found: Confidence, geometry: Geometry) -> list[Path]:
    """Write what there is of a study on the grid `geometry`; gives the maps and the scores.

    Raises:
        RunError: the folder cannot be written.
    """
    files = []
    for what, volume in (("entropy", found.entropy), ("disagreement", found.disagreement)):
        if volume is not None:
            files.append(map_file(out, name, what))
            with atomic_path(files[-1]) as temporary:
                write_scaled(temporary, volume.values, geometry, step=volume.step, description=DESCRIPTIONS[what])
    if found.scores is not None:
        write_scores(scores_file(out, name), found.scores)
        files.append(scores_file(out, name))
    if found.estimate is not None:
        record_quality(out, name, found.estimate)
    return files


def discard_confidence(out: Path, name: str, ours: Collection[str]) -> None:
    """Take away what lies there of a study, which may be another model's, of the files that are called as in `ours`.

    Raises:
        RunError: the folder cannot be written.
    """
    of_study = (*(map_file(out, name, what) for what in DESCRIPTIONS), scores_file(out, name), quality_file(out, name))
    for path in (path for path in of_study if path.name in ours):
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise explain_os_error(error, path) from error
