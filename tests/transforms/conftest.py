"""A writer of DICOM phantoms: single-frame slices on any grid, in any state of disorder."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage

from transforms.geometry import Geometry

PATIENT = "Nightingale^Florence"
Edit = Callable[[Dataset, int], None]
WriteSeries = Callable[..., Path]


def slice_dataset(geometry: Geometry, voxels: np.ndarray, k: int) -> Dataset:
    """Slice k of int16 `voxels` (I, J, K) on `geometry`, complete and correct (PS3.3 C.7.6.2)."""
    direction = geometry.affine_lps[:3, :3] / geometry.spacing_mm
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = MRImageStorage
    dataset.SOPInstanceUID = f"1.2.3.{1000 + k}"
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID, dataset.FrameOfReferenceUID = "1.2.1", "1.2.2", "1.2.4"
    dataset.Modality, dataset.SeriesDescription, dataset.SeriesNumber = "MR", "phantom", 5
    dataset.PatientName, dataset.PatientID, dataset.PatientBirthDate = PATIENT, "1820-0512", "18200512"
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "M"]
    dataset.ImagePositionPatient = [f"{x:.10g}" for x in geometry.affine_lps[:3] @ [0, 0, k, 1]]
    dataset.ImageOrientationPatient = [f"{x:.10f}" for x in (*direction[:, 0], *direction[:, 1])]
    dataset.PixelSpacing = [f"{geometry.spacing_mm[1]:.10g}", f"{geometry.spacing_mm[0]:.10g}"]
    dataset.Columns, dataset.Rows = geometry.shape[0], geometry.shape[1]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 16, 15, 1
    dataset.PixelData = voxels[:, :, k].T.astype("<i2").tobytes()
    return dataset


@pytest.fixture
def write_series(tmp_path: Path) -> WriteSeries:
    """Write slices of a phantom in disorder; `edit(dataset, k)` changes what is written."""

    def write(
        geometry: Geometry,
        voxels: np.ndarray,
        *,
        folder: str = "series",
        edit: Edit | None = None,
        slices: Iterable[int] | None = None,
    ) -> Path:
        home = tmp_path / folder
        home.mkdir(parents=True, exist_ok=True)
        chosen = list(range(geometry.shape[2]) if slices is None else slices)
        # Neither names nor instance numbers follow the anatomy.
        order = np.random.default_rng(len(chosen)).permutation(len(chosen))
        for number, k in zip(order, chosen, strict=True):
            dataset = slice_dataset(geometry, voxels, k)
            dataset.InstanceNumber = int(number) + 1
            if edit is not None:
                edit(dataset, k)
            dataset.save_as(home / f"IM{number:03d}", enforce_file_format=True)
        return home

    return write
