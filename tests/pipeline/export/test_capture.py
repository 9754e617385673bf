"""Secondary capture series: by hand, by pydicom's own windowing, by the validator, and tampered with."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pydicom
import pytest
from pydicom import Dataset
from pydicom.pixels import apply_windowing

from pipeline.errors import ExportError
from pipeline.export import Job, Source, export
from pipeline.export.capture import Window, outlines_of, to_grey, write_capture
from pipeline.export.capture_colours import outline_colours
from pipeline.export.verify_capture import verify_capture
from pipeline.segmentation import Segmentation
from transforms.labels import Label, LabelSchema, schema_from_names

BIN = Path(sys.executable).parent
ORIENTATIONS = ["axial", "coronal", "sagittal", "upside down", "oblique"]


def captured(segmentation: Segmentation, source: Source, folder: Path) -> tuple[list[Dataset], Job]:
    folder.mkdir(parents=True, exist_ok=True)
    job = Job(segmentation, source)
    write_capture(folder, job)
    return [pydicom.dcmread(path) for path in sorted(folder.iterdir())], job


def validate(path: Path) -> list[str]:
    run = subprocess.run([BIN / "dciodvfy", path], capture_output=True, text=True, check=False)
    return [line for line in (run.stdout + run.stderr).splitlines() if line.startswith("Error")]


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_every_orientation_is_verified(phantoms: SimpleNamespace, tmp_path: Path, orientation: str) -> None:
    source = phantoms.source_of(phantoms.write_series(tmp_path / "in", orientation))
    [file] = export(
        phantoms.segmentation_of(source), formats=["capture"], out=tmp_path / "out", name="x", source=source
    )
    assert file.path.is_dir()
    assert file.verification is not None
    assert [label.dice for label in file.verification.labels] == [1.0, 1.0, None]


@pytest.mark.parametrize(
    ("orientation", "letters"),
    [("axial", ["L", "P"]), ("coronal", ["L", "F"]), ("sagittal", ["P", "F"]), ("upside down", ["R", "P"])],
)
def test_patient_orientation(phantoms: SimpleNamespace, tmp_path: Path, orientation: str, letters: list[str]) -> None:
    source = phantoms.source_of(phantoms.write_series(tmp_path / "in", orientation))
    images, _ = captured(phantoms.segmentation_of(source), source, tmp_path / "out")
    assert list(images[0].PatientOrientation) == letters


def test_pixels_by_hand(phantom: Segmentation, source: Source, tmp_path: Path) -> None:
    images, _ = captured(phantom, source, tmp_path / "out")
    pixels = images[2].pixel_array  # rows, columns
    # Label 3 is columns 6..9 and rows 2..5 of slice 2: a ring of 12 pixels around 4.
    blue = (pixels == (86, 180, 233)).all(axis=2)
    expected = np.zeros((7, 11), dtype=bool)
    expected[2:6, 6:10] = True
    expected[3:5, 7:9] = False
    assert np.array_equal(blue, expected)
    # Label 200 is columns 1..4 and rows 1..2 there, all outline.
    orange = (pixels == (230, 159, 0)).all(axis=2)
    assert np.argwhere(orange).tolist() == [[r, c] for r in (1, 2) for c in (1, 2, 3, 4)]
    grey = pixels[~(blue | orange)]
    assert (np.ptp(grey, axis=1) == 0).all()


def test_the_smallest_label_and_the_edge_show() -> None:
    classes = np.zeros((5, 5), dtype=np.uint8)
    classes[2, 2] = 1
    assert np.array_equal(outlines_of(classes), classes)
    filled = np.full((5, 5), 2, dtype=np.uint8)
    assert (outlines_of(filled) == 0).sum() == 9


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
def test_windows_are_those_of_pydicom(function: str) -> None:
    values = np.linspace(-500, 900, 97)
    dataset = Dataset()
    dataset.PhotometricInterpretation, dataset.BitsStored, dataset.PixelRepresentation = "MONOCHROME2", 8, 0
    dataset.WindowCenter, dataset.WindowWidth, dataset.VOILUTFunction = "40", "350", function
    expected = apply_windowing(values, dataset)
    found = to_grey(values, Window(40.0, 350.0, function))
    assert np.abs(found - expected).max() <= 0.5 + 1e-9


@pytest.mark.parametrize(
    ("tags", "black_and_white"),
    [
        ({"WindowCenter": "250", "WindowWidth": "101"}, (199, 301)),
        ({"WindowCenter": ["250", "9"], "WindowWidth": ["101", "2"]}, (199, 301)),
        ({"WindowCenter": "250", "WindowWidth": "100", "VOILUTFunction": "LINEAR_EXACT"}, (199, 301)),
        ({"WindowCenter": "250", "WindowWidth": "0"}, None),
        ({"WindowCenter": "250"}, None),
        ({}, None),
    ],
)
def test_the_window_is_the_source_s(
    phantoms: SimpleNamespace, tmp_path: Path, tags: dict[str, str], black_and_white: tuple[int, int] | None
) -> None:
    source = phantoms.source_of(phantoms.write_series(tmp_path / "in", **tags))
    empty = phantoms.segmentation_of(source, np.zeros(source.image.geometry.shape, dtype=np.uint8))
    images, job = captured(empty, source, tmp_path / "out")
    verify_capture(tmp_path / "out", job)
    grey = np.stack([image.pixel_array[..., 0] for image in images], axis=2).transpose(1, 0, 2)
    low, high = black_and_white or np.percentile(source.image.voxels, (1, 99))
    assert (grey[source.image.voxels <= low] == 0).all()
    assert (grey[source.image.voxels >= high] == 255).all()
    assert 0 < grey[(source.image.voxels > low + 5) & (source.image.voxels < high - 5)].mean() < 255


@pytest.mark.parametrize(("modality", "sop_class"), [("CT", "1.2.840.10008.5.1.4.1.1.2"), ("OT", None)])
def test_monochrome1_is_shown_as_its_maker_meant(
    phantoms: SimpleNamespace, tmp_path: Path, modality: str, sop_class: str | None
) -> None:
    """The lowest stored value is white, wherever the volume keeps it."""
    tags = {"PhotometricInterpretation": "MONOCHROME1", "Modality": modality}
    tags |= {"SOPClassUID": sop_class} if sop_class else {}
    folder = phantoms.write_series(tmp_path / "in", **tags)
    source = phantoms.source_of(folder)
    empty = phantoms.segmentation_of(source, np.zeros(source.image.geometry.shape, dtype=np.uint8))
    images, job = captured(empty, source, tmp_path / "out")
    verify_capture(tmp_path / "out", job)
    assert job.series.slices[0].photometric == "MONOCHROME1"
    stored = pydicom.dcmread(job.series.slices[3].path).pixel_array
    shown = images[3].pixel_array[..., 0].astype(int)
    assert (np.diff(shown.ravel()[np.argsort(stored.ravel())]) <= 0).all()
    assert shown.max() > shown.min()


def test_what_the_files_say(phantom: Segmentation, source: Source, tmp_path: Path) -> None:
    images, job = captured(phantom, source, tmp_path / "out")
    originals = [pydicom.dcmread(found.path) for found in job.series.slices]
    assert len({image.SOPInstanceUID for image in images}) == len(images) == 6
    for number, (image, original) in enumerate(zip(images, originals, strict=True), start=1):
        assert image.InstanceNumber == number
        for keyword in ("StudyInstanceUID", "FrameOfReferenceUID", "PatientID", "PatientName", "AccessionNumber"):
            assert image[keyword].value == original[keyword].value, keyword
        assert np.allclose(image.ImagePositionPatient, original.ImagePositionPatient)
        assert image.SeriesInstanceUID == images[0].SeriesInstanceUID != original.SeriesInstanceUID
        assert image.SourceImageSequence[0].ReferencedSOPInstanceUID == original.SOPInstanceUID
        assert "not for diagnosis" in image.DerivationDescription
        assert image.BurnedInAnnotation == "NO"
        assert image.ImageComments == "Höcker: #e69f00\r\nRight half: #56b4e9"


@pytest.mark.parametrize("tags", [{}, {"BodyPartExamined": "HEAD"}, {"PatientName": None, "FrameOfReferenceUID": None}])
def test_the_validator_finds_no_error(phantoms: SimpleNamespace, tmp_path: Path, tags: dict[str, str | None]) -> None:
    source = phantoms.source_of(phantoms.write_series(tmp_path / "in", "oblique", **tags))
    captured(phantoms.segmentation_of(source), source, tmp_path / "out")
    assert validate(tmp_path / "out" / "00003.dcm") == []


def test_a_real_series(hippocrop: Source, phantoms: SimpleNamespace, tmp_path: Path) -> None:
    i, j, k = np.indices(hippocrop.image.geometry.shape)
    ellipsoid = ((i - 16) / 6) ** 2 + ((j - 25) / 17) ** 2 + ((k - 20) / 5) ** 2 < 1
    labels = np.where(ellipsoid, np.where(j > 25, 3, 200), 0).astype(np.uint8)
    _, job = captured(phantoms.segmentation_of(hippocrop, labels), hippocrop, tmp_path / "out")
    verify_capture(tmp_path / "out", job)
    assert validate(tmp_path / "out" / "00020.dcm") == []


def test_colours_are_told_apart() -> None:
    schema = schema_from_names({n: f"label {n}" for n in range(1, 300)})
    colours = outline_colours(schema)
    assert len(set(colours)) == 299
    assert all(len(set(colour)) > 1 for colour in colours)
    for label, colour in zip(schema.labels, colours, strict=True):
        if max(label.colour) - min(label.colour) >= 40:
            assert np.abs(np.subtract(label.colour, colour)).sum() <= 12


def test_grey_and_black_labels_are_coloured() -> None:
    labels = (Label(id=1, name="a", colour=(0, 0, 0)), Label(id=2, name="b", colour=(200, 190, 200)))
    colours = outline_colours(LabelSchema(labels=labels))
    assert all(max(colour) - min(colour) >= 40 for colour in colours)


Tamper = Callable[[list[Dataset]], None]


def put(image: Dataset, pixels: np.ndarray) -> None:
    content = np.ascontiguousarray(pixels).tobytes()
    image.PixelData = content + b"\0" * (len(content) % 2)


def on_all(change: Callable[[np.ndarray], np.ndarray]) -> Tamper:
    def tamper(images: list[Dataset]) -> None:
        for image in images:
            put(image, change(image.pixel_array))

    return tamper


def one_pixel(images: list[Dataset]) -> None:
    pixels = images[2].pixel_array.copy()
    pixels[0, 0] = (86, 180, 233)
    put(images[2], pixels)


def another_colour(pixels: np.ndarray) -> np.ndarray:
    return np.where((pixels == (86, 180, 233)).all(axis=2)[..., None], (86, 180, 234), pixels).astype(np.uint8)


def outlines_alone_mirrored(pixels: np.ndarray) -> np.ndarray:
    grey = np.repeat(pixels.min(axis=2)[..., None], 3, axis=2)
    is_coloured = (np.ptp(pixels, axis=2) > 0)[..., None]
    return np.where(is_coloured[:, ::-1], pixels[:, ::-1], grey)


def greys_alone_mirrored(pixels: np.ndarray) -> np.ndarray:
    is_coloured = (np.ptp(pixels, axis=2) > 0)[..., None]
    return np.where(is_coloured, pixels, np.where(is_coloured[:, ::-1], 0, pixels[:, ::-1]))


def exchange_slices(images: list[Dataset]) -> None:
    put(images[1], images[2].pixel_array.copy())


def exchange_references(images: list[Dataset]) -> None:
    first, second = images[0].SourceImageSequence, images[1].SourceImageSequence
    images[0].SourceImageSequence, images[1].SourceImageSequence = second, first


def move(images: list[Dataset]) -> None:
    for image in images:
        image.ImagePositionPatient = [float(x) + 3 for x in image.ImagePositionPatient]


def exchange_spacings(images: list[Dataset]) -> None:
    for image in images:
        image.PixelSpacing = image.PixelSpacing[::-1]


def same_identifier(images: list[Dataset]) -> None:
    images[1].SOPInstanceUID = images[0].SOPInstanceUID


def another_patient(images: list[Dataset]) -> None:
    images[4].PatientID = "ID-4712"


def source_series(images: list[Dataset]) -> None:
    for image in images:
        image.StudyInstanceUID = "1.2.3"


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (on_all(lambda pixels: pixels[:, ::-1]), "greys of an image|Dice"),
        (on_all(lambda pixels: pixels[::-1]), "greys of an image|Dice"),
        (on_all(outlines_alone_mirrored), "Dice|greys"),
        (on_all(greys_alone_mirrored), "greys of an image"),
        (on_all(lambda pixels: np.where(np.ptp(pixels, axis=2)[..., None] > 0, pixels, 0)), "blank"),
        (on_all(another_colour), "a colour that is no label's"),
        (one_pixel, "label 'Right half' reads back with Dice"),
        (exchange_slices, "greys of an image|Dice"),
        (exchange_references, "does not refer to the source slice"),
        (move, "Dice|beyond the source grid|greys"),
        (exchange_spacings, "Dice|beyond the source grid|greys"),
        (same_identifier, "the same SOPInstanceUID"),
        (another_patient, "its PatientID is not the source's"),
        (source_series, "its StudyInstanceUID is not the source's"),
    ],
)
def test_tampering_is_seen(phantom: Segmentation, source: Source, tmp_path: Path, tamper: Tamper, message: str) -> None:
    images, job = captured(phantom, source, tmp_path / "out")
    verify_capture(tmp_path / "out", job)
    tamper(images)
    for number, image in enumerate(images, start=1):
        image.save_as(tmp_path / "out" / f"{number:05d}.dcm")
    with pytest.raises(ExportError, match=message):
        verify_capture(tmp_path / "out", job)


def test_a_missing_image_is_seen(phantom: Segmentation, source: Source, tmp_path: Path) -> None:
    _, job = captured(phantom, source, tmp_path / "out")
    (tmp_path / "out" / "00003.dcm").unlink()
    with pytest.raises(ExportError, match="5 images of 6 slices"):
        verify_capture(tmp_path / "out", job)


def test_another_label_map_is_seen(phantom: Segmentation, source: Source, tmp_path: Path) -> None:
    _, job = captured(phantom, source, tmp_path / "out")
    mirrored = replace(phantom, label_map=phantom.label_map[::-1].copy())
    with pytest.raises(ExportError, match="reads back with Dice"):
        verify_capture(tmp_path / "out", replace(job, segmentation=mirrored))


def test_frames_of_one_file(phantoms: SimpleNamespace, data_dir: Path, tmp_path: Path) -> None:
    source = phantoms.source_of(data_dir / "dicom_odd" / "enhanced_hyperfine")
    labels = np.zeros(source.image.geometry.shape, dtype=np.uint8)
    labels[40:60, 50:75, 2:5] = 3
    images, job = captured(phantoms.segmentation_of(source, labels), source, tmp_path / "out")
    verify_capture(tmp_path / "out", job)
    frames = [image.SourceImageSequence[0].ReferencedFrameNumber for image in images]
    assert frames == [found.frame for found in job.series.slices]
    assert validate(tmp_path / "out" / "00003.dcm") == []
