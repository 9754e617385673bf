"""RT Structure Sets as Plastimatch (Debian's 1.9) reads them: the same voxels, by both of its ways to fill contours.

Plastimatch finds a contour's slice by its z, so it cannot judge sagittal and coronal stacks: other tests do.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from pipeline.export import Source, export
from pipeline.segmentation import Algorithm, Segmentation
from tests.pipeline.export.conftest import DATA, source_of, write_series
from transforms.labels import schema_from_names

pytestmark = pytest.mark.viewers

SCHEMA = schema_from_names({1: "shell", 2: "core", 3: "nowhere"})


def shell_and_core(shape: tuple[int, ...]) -> np.ndarray:
    """A thick shell, empty but for a small core: holes, islands, and corners that touch. It has no symmetry."""
    at = np.stack(np.indices(shape), axis=-1) / np.array(shape)
    distance = np.linalg.norm((at - (0.45, 0.52, 0.48)) / (0.38, 0.3, 0.36), axis=-1)
    labels = np.where(distance < 1, np.where(distance < 0.3, 2, np.where(distance < 0.6, 0, 1)), 0)
    labels[: shape[0] // 4, : shape[1] // 4, shape[2] // 2] = 1
    labels[0, 0, shape[2] // 2] = 0
    labels[1, 1, shape[2] // 2] = 0
    return labels.astype(np.uint8)


def read_by_plastimatch(path: Path, series: Path, *options: str) -> dict[str, np.ndarray]:
    prefix = path.parent / "masks"
    command = ["plastimatch", "convert", "--input", path, "--referenced-ct", series, "--output-prefix", prefix]
    subprocess.run([*command, "--prefix-format", "nii.gz", *options], check=True, capture_output=True)
    return {mask.name.split(".")[0]: sitk.GetArrayFromImage(sitk.ReadImage(mask)).T > 0 for mask in prefix.iterdir()}


def check(source: Source, series: Path, folder: Path, options: tuple[str, ...]) -> None:
    labels = shell_and_core(source.image.geometry.shape)
    segmentation = Segmentation(labels, source.image.geometry, SCHEMA, Algorithm("phantom", "1"))
    [file] = export(segmentation, formats=["rtstruct"], out=folder, name="x", source=source)
    masks = read_by_plastimatch(file.path, series, *options)
    assert set(masks) == {"shell", "core"}
    for label in SCHEMA.labels[:2]:
        assert np.array_equal(masks[label.name], labels == label.id), label.name


@pytest.mark.parametrize("options", [(), ("--xor-contours",)], ids=["or", "xor"])
@pytest.mark.parametrize("orientation", ["axial", "upside down", "oblique"])
def test_phantoms(tmp_path: Path, orientation: str, options: tuple[str, ...]) -> None:
    series = write_series(tmp_path / "in", orientation)
    check(source_of(series), series, tmp_path, options)


@pytest.mark.parametrize("options", [(), ("--xor-contours",)], ids=["or", "xor"])
def test_a_real_series(tmp_path: Path, options: tuple[str, ...]) -> None:
    series = DATA / "dicom_hippocrop"
    check(source_of(series), series, tmp_path, options)
