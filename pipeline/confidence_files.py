"""What a prediction tells beside its labels, as files: maps for viewers, a table of studies, scores to decide again."""

from __future__ import annotations

from pathlib import Path

from pipeline.confidence import Asked, Confidence
from pipeline.export.nifti import write_scaled
from pipeline.files import atomic_path, safe_name
from pipeline.kept_scores import SUFFIX, write_scores
from pipeline.quality import QUALITY_CSV, QUALITY_JSON, forget_quality, record_quality
from transforms.geometry import Geometry

MAPS, SCORES = "uncertainty", "scores"
"""Folders of their own within that of the label maps, in which everything that ends in .nii.gz is taken for one."""

_WHAT = {
    "entropy": "entropy of the mean probabilities, as a part of the highest there is",
    "disagreement": "disagreement of folds and mirrored passes, same unit as the entropy",
}


def map_file(out: Path, name: str, what: str) -> Path:
    """Where the map `what`, "entropy" or "disagreement", of a study is."""
    return out / MAPS / f"{safe_name(name)}_{what}.nii.gz"


def scores_file(out: Path, name: str) -> Path:
    """Where a study's kept scores are."""
    return out / SCORES / (safe_name(name) + SUFFIX)


def files_of(out: Path, name: str, asked: Asked, *, disagrees: bool) -> list[Path]:
    """The files that `write_confidence` will have written for a study; `disagrees`: there are several answers."""
    maps = [what for what in _WHAT if asked.maps and (disagrees or what != "disagreement")]
    files = [map_file(out, name, what) for what in maps]
    files += [out / QUALITY_JSON, out / QUALITY_CSV] if asked.maps or asked.estimate else []
    return files + ([scores_file(out, name)] if asked.keep_scores else [])


def write_confidence(out: Path, name: str, found: Confidence, geometry: Geometry) -> list[Path]:
    """Write what there is of a study on the grid `geometry`; gives its own files. The files of many are added to.

    Raises:
        RunError: the folder cannot be written.
    """
    files = []
    for what, volume in (("entropy", found.entropy), ("disagreement", found.disagreement)):
        if volume is not None:
            files.append(map_file(out, name, what))
            with atomic_path(files[-1]) as temporary:
                write_scaled(temporary, volume.values, geometry, step=volume.step, description=_WHAT[what])
    if found.scores is not None:
        write_scores(scores_file(out, name), found.scores)
        files.append(scores_file(out, name))
    if found.estimate is not None:
        record_quality(out, safe_name(name), found.estimate)
    return files


def discard_confidence(out: Path, name: str) -> None:
    """Take away what lies there of a study: it may be another model's.

    Raises:
        RunError: the folder cannot be written.
    """
    for path in (*(map_file(out, name, what) for what in _WHAT), scores_file(out, name)):
        path.unlink(missing_ok=True)
    forget_quality(out, safe_name(name))
