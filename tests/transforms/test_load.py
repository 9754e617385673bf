"""Reading inside MONAI: LoadVolumed beside MONAI's own transforms, and the DICOM gate as a MONAI reader."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor, list_data_collate
from monai.transforms import Compose, EnsureChannelFirstd, LoadImage, LoadImaged, Orientationd, Spacingd

from transforms.dicom import read_series
from transforms.errors import DicomError, GeometryMismatch, VolumeError
from transforms.geometry import Geometry
from transforms.load import DicomSeriesReader, LoadVolumed, Volume, as_metatensor, geometry_of, read_label, read_volume
from transforms.resample import move

# MONAI's own LoadImage warns that one of its optional readers has no decoder.
MONAI_READERS = pytest.mark.filterwarnings("ignore:NvImgCodecPydicomReader:UserWarning")
WriteSeries = Callable[..., Path]
GRID = Geometry.from_lps((6, 5, 4), np.diag([0.8, 1.25, 2.5, 1.0]))


@pytest.fixture(scope="session")
def case(data_dir: Path) -> dict[str, Path]:
    image = sorted((data_dir / "hippocampus" / "images").glob("*.nii.gz"))[0]
    return {"image": image, "label": data_dir / "hippocampus" / "labels" / image.name}


def write(path: Path, voxels: np.ndarray, geometry: Geometry) -> Path:
    nib.save(nib.Nifti1Image(voxels, geometry.affine_ras), path)
    return path


@MONAI_READERS
def test_same_as_monais_loader(case: dict[str, Path]) -> None:
    rest = [
        Orientationd(["image", "label"], axcodes="PSL", labels=None),
        Spacingd(["image", "label"], pixdim=(0.8, 1.3, 2.0), mode=("bilinear", "nearest")),
    ]
    ours = Compose([LoadVolumed(["image"], label_keys=["label"]), *rest])(case)
    loader = LoadImaged(["image", "label"], reader="NibabelReader")
    theirs = Compose([loader, EnsureChannelFirstd(["image", "label"]), *rest])(case)
    for key in ("image", "label"):
        assert isinstance(ours[key], MetaTensor)
        assert torch.equal(ours[key].affine, theirs[key].affine)
        assert torch.equal(ours[key].as_tensor().float(), theirs[key].as_tensor().float())


def test_what_is_loaded(case: dict[str, Path]) -> None:
    loaded = LoadVolumed(["image", "label"], label_keys=["label"])({**case, "age": 61})
    assert loaded["age"] == 61
    assert loaded["image"].dtype == torch.float32
    assert loaded["label"].dtype == torch.uint8
    assert loaded["label"].unique().tolist() == [0, 1, 2]
    for key in ("image", "label"):
        volume = read_volume(case[key])
        assert loaded[key].affine.dtype == torch.float64
        assert geometry_of(loaded[key]).difference(volume.geometry) is None
        assert np.array_equal(loaded[key][0].numpy(), volume.voxels)


def test_metadata_is_the_grid_and_nothing_else(write_series: WriteSeries) -> None:
    folder = write_series(GRID, np.zeros(GRID.shape, np.int16))
    loaded = LoadVolumed("image")({"image": folder})["image"]
    assert set(loaded.meta) == {"affine", "space"}
    assert "Nightingale" not in repr(loaded.meta)
    assert str(folder) not in repr(loaded.meta)


def test_batches_can_be_made(case: dict[str, Path]) -> None:
    loaded = LoadVolumed("image")(case)
    batch = list_data_collate([{"image": loaded["image"]}, {"image": loaded["image"]}])
    assert batch["image"].shape == (2, *loaded["image"].shape)


def test_channels_are_stacked(tmp_path: Path) -> None:
    first = write(tmp_path / "t1.nii.gz", np.full(GRID.shape, 1, np.int16), GRID)
    second = write(tmp_path / "t2.nii.gz", np.full(GRID.shape, 2, np.int16), GRID)
    loaded = LoadVolumed("image")({"image": [first, second]})["image"]
    assert loaded.shape == (2, *GRID.shape)
    assert [float(channel.mean()) for channel in loaded] == [1.0, 2.0]
    turned = GRID.oriented("RAS")
    third = write(tmp_path / "turned.nii.gz", np.zeros(turned.shape, np.int16), turned)
    with pytest.raises(
        GeometryMismatch, match=r"channel .*t1\.nii\.gz and channel .*turned\.nii\.gz do not share"
    ) as refused:
        LoadVolumed("image")({"image": [first, third]})
    assert GRID.describe() in str(refused.value)
    assert turned.describe() in str(refused.value)


@pytest.mark.parametrize("order", [["image", "label"], ["label", "image"]])
def test_a_label_of_another_grid(tmp_path: Path, order: list[str]) -> None:
    image = write(tmp_path / "image.nii.gz", np.zeros(GRID.shape, np.int16), GRID)
    smaller = GRID.window((0, 0, 1), (6, 5, 3))
    label = write(tmp_path / "label.nii.gz", np.zeros(smaller.shape, np.uint8), smaller)
    with pytest.raises(GeometryMismatch) as refused:
        LoadVolumed(order, label_keys="label")({"image": image, "label": label})
    assert str(refused.value) == (
        f"image {image} and label {label} do not share a voxel grid: {GRID.describe()} against {smaller.describe()}; "
        "resample one to the other"
    )


def test_missing_keys(case: dict[str, Path]) -> None:
    with pytest.raises(KeyError, match="flair"):
        LoadVolumed(["image", "flair"])(case)
    loaded = LoadVolumed(["image", "flair"], allow_missing_keys=True)(case)
    assert set(loaded) == {"image", "label"}
    # A label alone has no image to be compared with.
    assert LoadVolumed([], label_keys="label")({"label": case["label"]})["label"].dtype == torch.uint8


def test_a_label_is_one_file(case: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="a label is one file and an image at least one, found 2 paths"):
        LoadVolumed("image", label_keys="label")({"image": case["image"], "label": [case["label"]] * 2})


def test_a_dicom_series_among_several(write_series: WriteSeries) -> None:
    for n in range(2):
        folder = write_series(
            GRID,
            np.full(GRID.shape, n, np.int16),
            folder=f"study/{n}",
            edit=lambda dataset, k, n=n: setattr(dataset, "SeriesInstanceUID", f"1.2.{n}"),
        ).parent
    with pytest.raises(DicomError, match="2 image series, name one by number or SeriesInstanceUID"):
        LoadVolumed("image")({"image": folder})
    assert LoadVolumed("image", series="1.2.1")({"image": folder})["image"].unique().tolist() == [1.0]


@MONAI_READERS
def test_the_gate_as_a_monai_reader(data_dir: Path, write_series: WriteSeries) -> None:
    folder = data_dir / "dicom_hippocrop"
    voxels, geometry, _ = read_series(folder)
    loader = LoadImage(ensure_channel_first=True)
    loaded = loader(folder, reader=DicomSeriesReader())
    assert torch.equal(loaded.as_tensor(), torch.from_numpy(voxels.copy())[None])
    assert np.array_equal(loaded.affine.numpy(), geometry.affine_ras)
    loader.register(DicomSeriesReader())
    assert torch.equal(loader(folder).as_tensor(), loaded.as_tensor())
    gap = write_series(GRID, np.zeros(GRID.shape, np.int16), slices=[0, 1, 3])
    with pytest.raises(DicomError, match="missing-slices"):
        loader(gap)
    with pytest.raises(ValueError, match="a series is one folder or file, found 2 paths"):
        loader([folder, folder], reader=DicomSeriesReader())


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PIL"])
def test_metatensors_there_and_back(codes: str) -> None:
    geometry = GRID.oriented(codes)
    tensor = as_metatensor(torch.zeros(2, *geometry.shape), geometry)
    assert np.array_equal(geometry_of(tensor).affine_ras, geometry.affine_ras)
    assert geometry_of(tensor).shape == geometry.shape
    with pytest.raises(ValueError, match="on a grid of"):
        as_metatensor(torch.zeros(2, 9, 9, 9), geometry)


def test_volumes(data_dir: Path) -> None:
    volume = read_volume(data_dir / "dicom_hippocrop")
    assert (volume.modality, volume.background) == ("MR", 0.0)
    with pytest.raises(ValueError, match="on a grid of"):
        Volume(volume.voxels[1:], volume.geometry, None, 0.0)


def test_the_crop_lies_in_the_patient_as_its_training_data_do(data_dir: Path) -> None:
    """In RAS it looks like the mean of other people's crops, and no mirror image of it does."""

    def middle(path: Path) -> torch.Tensor:
        volume = read_volume(path)
        ras = volume.geometry.oriented("RAS")
        start = [(n - m) // 2 for n, m in zip(ras.shape, (30, 40, 24), strict=True)]
        voxels = torch.from_numpy(volume.voxels.copy())[None]
        crop = move(voxels, volume.geometry, ras.window(start, (30, 40, 24)))[0]
        return (crop - crop.mean()) / crop.std()

    images = sorted((data_dir / "hippocampus" / "images").glob("*.nii.gz"))[:12]
    mean = torch.stack([middle(path) for path in images]).mean(dim=0)
    crop = middle(data_dir / "dicom_hippocrop")
    mirrored = [crop.flip(axes) for axes in ((0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2))]
    assert float((crop * mean).mean()) > 2 * max(float((other * mean).mean()) for other in mirrored)


@pytest.mark.parametrize("read", [read_volume, read_label])
def test_paths_without_a_volume(tmp_path: Path, read: Callable[[Path], Volume]) -> None:
    with pytest.raises(VolumeError, match="nowhere: no such file or folder"):
        read(tmp_path / "nowhere")
    (tmp_path / "empty.nii.gz").touch()
    with pytest.raises(VolumeError, match="the file is empty"):
        read(tmp_path / "empty.nii.gz")
    (tmp_path / "table.csv").write_text("case,age\n1,61\n")
    with pytest.raises(VolumeError, match="neither NIfTI, NRRD, MetaImage nor DICOM by its content"):
        read(tmp_path / "table.csv")


def test_labels_are_not_read_from_dicom(data_dir: Path) -> None:
    for path in (data_dir / "dicom_hippocrop", data_dir / "dicom_hippocrop" / "1.dcm"):
        with pytest.raises(DicomError, match="labels are not read from DICOM; convert them to NIfTI or NRRD"):
            read_label(path)


def test_paths_may_be_strings(case: dict[str, Path]) -> None:
    assert LoadVolumed("image")({"image": str(case["image"])})["image"].ndim == 4
