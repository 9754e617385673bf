"""Phantom series written with pydicom, and the values that exports need around them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.datadict import dictionary_VR
from pydicom.dataelem import DataElement
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid

from pipeline.export import Source
from pipeline.segmentation import Algorithm, Segmentation
from transforms.dicom import read_series
from transforms.labels import CodedConcept, Label, LabelSchema
from transforms.volume import Volume

DATA = Path(__file__).parents[2] / "data"
SHAPE_IJK = (11, 7, 6)  # columns, rows, slices: all different, and no multiple of 8 pixels a slice
PIXEL_SPACING_MM = (2.0, 0.7)  # between rows, between columns
GAP_MM = 3.5

TILTED = np.linalg.qr(np.array([[1.0, 0.3, -0.2], [-0.25, 1.0, 0.15], [0.2, -0.1, 1.0]]))[0]
ROW_AND_COLUMN_LPS = {
    "axial": ((1, 0, 0), (0, 1, 0)),
    "coronal": ((1, 0, 0), (0, 0, -1)),
    "sagittal": ((0, 1, 0), (0, 0, -1)),
    "upside down": ((-1, 0, 0), (0, 1, 0)),
    "oblique": (tuple(TILTED[:, 0]), tuple(TILTED[:, 1])),
}

SCHEMA = LabelSchema(
    labels=(
        Label(
            id=200,
            name="Höcker",
            colour=(230, 159, 0),
            code=CodedConcept(value="4421005", meaning="Cell structure"),
            category=CodedConcept(value="91723000", meaning="Anatomical Structure"),
        ),
        Label(id=3, name="Right half", colour=(86, 180, 233)),
        Label(id=7, name="Nowhere", colour=(0, 0, 0)),
    )
)


def write_series(folder: Path, orientation: str = "axial", **tags: Any) -> Path:
    """An MR series with its files in no order; `tags` replace elements, None deletes them."""
    row, column = (np.array(v, dtype=float) for v in ROW_AND_COLUMN_LPS[orientation])
    study, series, frame = generate_uid(), generate_uid(), generate_uid()
    columns, rows, count = SHAPE_IJK
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(count):
        dataset = _instance(generate_uid())
        dataset.update({"StudyInstanceUID": study, "SeriesInstanceUID": series, "FrameOfReferenceUID": frame})
        position = np.array([-31.25, 12.5, 40.0]) + k * GAP_MM * np.cross(row, column)
        dataset.ImagePositionPatient = [f"{x:.9g}" for x in position]
        dataset.ImageOrientationPatient = [f"{x:.9g}" for x in (*row, *column)]
        dataset.PixelSpacing = list(PIXEL_SPACING_MM)
        dataset.Rows, dataset.Columns, dataset.InstanceNumber = rows, columns, count - k
        dataset.PixelData = (np.arange(rows * columns, dtype=np.int16) + 100 * k).tobytes()
        with pydicom.config.disable_value_validation():
            _change(dataset, tags)
            dataset.save_as(folder / f"{(k * 5) % count}.dcm", enforce_file_format=True)
    return folder


def _change(dataset: FileDataset, tags: dict[str, Any]) -> None:
    for keyword, value in tags.items():
        if value is None:
            dataset.pop(keyword, None)
        else:
            vr = dictionary_VR(keyword)
            dataset.add(DataElement(keyword, vr, value, validation_mode=pydicom.config.IGNORE))


def _instance(uid: str) -> FileDataset:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = MRImageStorage, uid
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.SOPClassUID, dataset.SOPInstanceUID, dataset.Modality = MRImageStorage, uid, "MR"
    dataset.PatientName, dataset.PatientID, dataset.PatientBirthDate = "Muster^Erika", "ID-4711", "19600102"
    dataset.PatientSex, dataset.AccessionNumber, dataset.StudyID = "F", "ACC-99", "S1"
    dataset.StudyDate, dataset.StudyTime, dataset.StudyDescription = "20200304", "101112", "Brain"
    dataset.ReferringPhysicianName, dataset.SeriesNumber, dataset.Manufacturer = "Arzt^Anton", 4, "Maker"
    # Neither says how far apart the slices are.
    dataset.SliceThickness, dataset.SpacingBetweenSlices = 5.0, -1.0
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated = dataset.BitsStored = 16
    dataset.HighBit, dataset.PixelRepresentation = 15, 1
    return dataset


def source_of(folder: Path) -> Source:
    voxels, geometry, series = read_series(folder)
    return Source(Volume(voxels, geometry, series.modality, 0.0), series)


def label_map() -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Two lopsided labels, so that no mirroring, turn or exchange leaves them where they are."""
    labels = np.zeros(SHAPE_IJK, dtype=np.uint8)
    labels[1:5, 1:3, 1:3] = 200
    labels[4, 2, 4] = 200
    labels[6:10, 2:6, 2:4] = 3
    labels[9, 5, 5] = 3
    return labels


def segmentation_of(source: Source, labels: Any = None, schema: LabelSchema = SCHEMA) -> Segmentation:
    return Segmentation(
        label_map() if labels is None else labels, source.image.geometry, schema, Algorithm("phantom", "1.2")
    )


@pytest.fixture(scope="session")
def phantoms() -> SimpleNamespace:
    """The makers and constants above, for the test modules."""
    return SimpleNamespace(
        write_series=write_series,
        source_of=source_of,
        label_map=label_map,
        segmentation_of=segmentation_of,
        schema=SCHEMA,
        orientations=ROW_AND_COLUMN_LPS,
    )


@pytest.fixture
def source(tmp_path: Path) -> Source:
    """An oblique phantom series."""
    return source_of(write_series(tmp_path / "series", "oblique"))


@pytest.fixture
def phantom(source: Source) -> Segmentation:
    return segmentation_of(source)


@pytest.fixture(scope="session")
def hippocrop() -> Source:
    """A real MR crop around a hippocampus."""
    return source_of(DATA / "dicom_hippocrop")
