"""volseg against dicom2nifti, case by case, over dicom2nifti's own test data and what it made of them.

    python benchmarks/dicom_ground_truths.py ARCHIVE_OR_FOLDER

Beside most folders of DICOM files lies NAME_ground_truth.nii.gz. Both are turned to the same order of axes, then
voxels and affine are compared, volume by volume of what is 4D.
"""

from __future__ import annotations

import sys
import tarfile
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.funcs import as_closest_canonical
from nibabel.nifti1 import Nifti1Image

from transforms.dicom import DicomSeries, index_series, read_voxels
from transforms.errors import DicomError

SAME_MM, SAME_PART = 2e-3, 1e-5
"""Grids may differ by this much (cosines are rounded in headers), values by this part of the largest."""

SUFFIX = "_ground_truth.nii.gz"

REASONS = {
    "failing/sliceincrement/002": " | they fill the gap unasked; so does --resample-uneven, when asked",
    "ge/anatomical/001_single_slice": " | its header has no thickness; theirs is made up",
    "generic/rgb/001": " | a network is trained on one value a voxel",
    "siemens/fmri/001": " | where its tiles lie stands in a private header alone",
}
"""Why we are right to refuse what dicom2nifti converts."""


def cases(folder: Path) -> list[Path]:
    """The folders that hold files themselves."""
    return sorted({path.parent for path in folder.rglob("*.dcm")})


def truths(case: Path) -> list[Nifti1Image]:
    """The volumes that dicom2nifti made of a case, axes in canonical order; none where it refuses, or has colours."""
    path = case.with_name(case.name + SUFFIX)
    image = nib.loadsave.load(path) if path.exists() else None
    if not isinstance(image, Nifti1Image) or image.get_data_dtype().fields:
        return []
    values = np.asarray(image.dataobj, dtype=np.float64)
    volumes = [values] if values.ndim == 3 else list(np.moveaxis(values, 3, 0))
    return [as_closest_canonical(Nifti1Image(volume, image.affine)) for volume in volumes]


def read(series: DicomSeries) -> Nifti1Image | str:
    """A volume with its axes in canonical order, or why it is refused."""
    if series.problems or series.geometry is None:
        return str(series.problems[0]) if series.problems else "no grid"
    try:
        voxels = read_voxels(series)
    except DicomError as fault:
        return str(fault)
    return as_closest_canonical(Nifti1Image(voxels, series.geometry.affine_ras))


def difference(ours: Nifti1Image, theirs: Nifti1Image) -> str:
    """How two volumes differ; empty when they are the same."""
    if ours.shape != theirs.shape:
        return f"grid of {ours.shape}, theirs of {theirs.shape}"
    apart = []
    corners = np.array([[i, j, k, 1] for i in (0, 1) for j in (0, 1) for k in (0, 1)]) * (
        *np.subtract(ours.shape, 1),
        1,
    )
    away_mm = np.linalg.norm((corners @ ours.affine.T - corners @ theirs.affine.T)[:, :3], axis=1).max()
    if away_mm > SAME_MM:
        apart.append(f"a corner is {away_mm:.3g} mm away")
    values, expected = ours.get_fdata(), theirs.get_fdata()
    wrong = np.abs(values - expected)
    if wrong.max() > SAME_PART * max(np.abs(expected).max(), 1.0):
        count = int((wrong > SAME_PART * np.abs(expected).max()).sum())
        apart.append(f"{count} voxels differ, by up to {wrong.max():.4g}")
    return "; ".join(apart)


def judge(case: Path) -> list[str]:
    """One line for each volume of a case."""
    expected = truths(case)
    lines = []
    for number, series in enumerate(index_series(case)):
        ours = read(series)
        what = f" {series.stack}" if series.stack else ""
        if isinstance(ours, str):
            too = "" if case.with_name(case.name + SUFFIX).exists() else " (dicom2nifti too)"
            lines.append(f"refused{what}{too}: {ours}{REASONS.get('/'.join(case.parts[-3:]), '')}")
        elif number >= len(expected):
            lines.append(f"read{what}, no ground truth: {ours.shape}")
        else:
            apart = difference(ours, expected[number])
            lines.append(f"differs{what}: {apart}" if apart else f"same{what}: {ours.shape}")
        mended = ", ".join(finding.name for finding in series.findings if finding.outcome == "mend")
        lines[-1] += f" [{mended}]" if mended else ""
    if len(expected) > len(lines):
        lines.append(f"{len(expected)} volumes in the ground truth")
    return lines


def main() -> None:
    """Print each case with what became of it."""
    if len(sys.argv) < 2:
        sys.exit(f"usage: {sys.argv[0]} ARCHIVE_OR_FOLDER")
    source = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as scratch:
        if source.is_file():
            with tarfile.open(source) as archive:
                archive.extractall(scratch, filter="data")
            source = Path(scratch)
        for case in cases(source):
            print(case.relative_to(source).as_posix())
            for line in judge(case):
                print(f"    {line.replace(scratch, '')}")


if __name__ == "__main__":
    main()
