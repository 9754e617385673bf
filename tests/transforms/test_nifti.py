"""NIfTI files: equal to nibabel where they are right, refused by name where they are not."""

from __future__ import annotations

import gzip
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from transforms.errors import VolumeError
from transforms.geometry import Geometry
from transforms.nifti import SLAB_VOXELS
from transforms.volume import read_label, read_volume

SHAPE = (5, 4, 3)
VALUES = np.arange(60, dtype=np.int16).reshape(SHAPE) - 7
Change = Callable[[nib.Nifti1Header], None]


def oblique(*, mirrored: bool = False) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", (10, 20, -30), degrees=True).as_matrix() * (0.7, 1.1, 3.0)
    affine[:3, 3] = (-30, 40, 12)
    if mirrored:
        affine[:, 0] *= -1
    return affine


def write(
    path: Path, voxels: np.ndarray = VALUES, *, affine: np.ndarray | None = None, change: Change | None = None
) -> Path:
    """A file with sform and qform set, then its header changed byte by byte as no library would write it."""
    image = nib.Nifti1Image(voxels, oblique() if affine is None else affine)
    image.set_qform(image.affine, 1)
    image.set_sform(image.affine, 1)
    nib.save(image, path)
    if change is not None:
        packed = path.name.endswith(".gz")
        content = gzip.decompress(path.read_bytes()) if packed else path.read_bytes()
        header = nib.Nifti1Header(content[:348], check=False)
        change(header)
        content = header.binaryblock + content[348:]
        path.write_bytes(gzip.compress(content) if packed else content)
    return path


def field(name: str, value: object) -> Change:
    def change(header: nib.Nifti1Header) -> None:
        header[name] = value

    return change


def dims(*sizes: int, count: int | None = None) -> Change:
    def change(header: nib.Nifti1Header) -> None:
        header["dim"] = [len(sizes) if count is None else count, *sizes, *[1] * (7 - len(sizes))]

    return change


def codes(sform: int, qform: int) -> Change:
    def change(header: nib.Nifti1Header) -> None:
        header["sform_code"], header["qform_code"] = sform, qform

    return change


def assert_as_nibabel(path: Path, original: Path | None = None) -> None:
    volume = read_volume(path)
    image = nib.load(original or path)
    assert volume.voxels.dtype == np.float32
    np.testing.assert_allclose(volume.voxels, image.get_fdata().reshape(volume.geometry.shape), rtol=1e-6)
    assert np.array_equal(volume.geometry.affine_ras, image.affine)
    assert volume.modality is None
    assert volume.background == volume.voxels.min()


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("mirrored", [False, True])
def test_read_as_nibabel_reads(tmp_path: Path, name: str, mirrored: bool) -> None:
    path = write(tmp_path / name, affine=oblique(mirrored=mirrored))
    assert_as_nibabel(path)
    assert np.array_equal(read_volume(path).voxels, VALUES)


@pytest.mark.parametrize(
    "dtype", [np.uint8, np.int8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.float32, np.float64]
)
def test_any_plain_type(tmp_path: Path, dtype: type[np.generic]) -> None:
    image = nib.Nifti1Image(np.abs(VALUES).astype(dtype), oblique(), dtype=dtype)
    nib.save(image, tmp_path / "a.nii.gz")
    assert_as_nibabel(tmp_path / "a.nii.gz")


def test_nifti_2(tmp_path: Path) -> None:
    nib.save(nib.Nifti2Image(VALUES, oblique()), tmp_path / "a.nii.gz")
    assert_as_nibabel(tmp_path / "a.nii.gz")


def test_big_endian(tmp_path: Path) -> None:
    image = nib.Nifti1Image(VALUES.astype(">i2"), oblique(), header=nib.Nifti1Header(endianness=">"))
    nib.save(image, tmp_path / "a.nii")
    assert (tmp_path / "a.nii").read_bytes()[:4] == b"\0\0\x01\x5c"
    assert_as_nibabel(tmp_path / "a.nii")
    assert read_label(write(tmp_path / "b.nii", np.abs(VALUES).astype(">i2"))).voxels.dtype == np.uint8


@pytest.mark.parametrize("name", ["packed but called.nii", "no name at all", "wrong.nrrd"])
def test_content_counts_not_the_name(tmp_path: Path, name: str) -> None:
    original = write(tmp_path / "a.nii.gz")
    assert_as_nibabel(original.rename(tmp_path / name), write(tmp_path / "a.nii.gz"))


def test_a_plain_file_that_is_called_packed(tmp_path: Path) -> None:
    plain = write(tmp_path / "a.nii")
    assert_as_nibabel(plain.rename(tmp_path / "b.nii.gz"), write(tmp_path / "a.nii"))
    assert read_label(write(tmp_path / "c.nii", np.abs(VALUES)).rename(tmp_path / "c.nii.gz")).voxels.max() == 52


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_reading_holds_the_image_in_float32_and_a_few_planes(tmp_path: Path, name: str) -> None:
    voxels = np.random.default_rng(0).normal(size=(256, 256, 65))  # 16 planes at a time, and one that is left
    path = write(tmp_path / name, voxels, change=field("scl_slope", 2.0))
    tracemalloc.start()
    found = read_volume(path).voxels
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # Of one piece: as it is stored, in float64, and a byte for being finite.
    assert peak < 4 * voxels.size + 24 * SLAB_VOXELS
    assert np.array_equal(found, (voxels * 2).astype(np.float32))


@pytest.mark.parametrize(("slope", "intercept"), [(2.5, -3.0), (0.0, 5.0), (np.nan, np.nan), (1.0, 0.0), (-1.0, 0.0)])
def test_scaling(tmp_path: Path, slope: float, intercept: float) -> None:
    def scale(header: nib.Nifti1Header) -> None:
        header["scl_slope"], header["scl_inter"] = slope, intercept

    path = write(tmp_path / "a.nii.gz", change=scale)
    assert_as_nibabel(path)
    expected = VALUES * slope + intercept if slope and np.isfinite(slope) else VALUES
    np.testing.assert_allclose(read_volume(path).voxels, expected)


def test_trailing_axes_of_one(tmp_path: Path) -> None:
    assert_as_nibabel(write(tmp_path / "a.nii.gz", VALUES[..., None, None]))


@pytest.mark.parametrize(("sform", "qform"), [(1, 0), (2, 0), (0, 1), (2, 4)])
def test_either_form_will_do(tmp_path: Path, sform: int, qform: int) -> None:
    assert_as_nibabel(write(tmp_path / "a.nii", change=codes(sform, qform)))


@pytest.mark.parametrize("axes", [(-1, -1, 1), (1, -1, -1), (-1, 1, -1)])
def test_half_turns_agree_in_both_forms(tmp_path: Path, axes: tuple[int, int, int]) -> None:
    """Where float32 quaternions are at their worst: a nearly half turn over a large field of view."""
    affine = np.eye(4)
    turn = Rotation.from_euler("xyz", (2e-4, -1e-4, 3e-4)).as_matrix()
    affine[:3, :3] = turn @ np.diag(axes) * (0.7, 0.7, 0.7)
    read_volume(write(tmp_path / "a.nii.gz", np.zeros((500, 400, 2), np.uint8), affine=affine))


def sheared() -> np.ndarray:
    """Slices that lean by 20 degrees, as of a CT with a tilted gantry."""
    affine = oblique()
    affine[:3, 2] += 3.0 * np.tan(np.deg2rad(20)) * affine[:3, 1] / 1.1
    return affine


def test_the_sform_alone_can_say_that_slices_lean(tmp_path: Path) -> None:
    """nibabel, like SPM, then stores the rotation nearest to it as the qform."""
    path = write(tmp_path / "a.nii.gz", affine=sheared())
    header = nib.load(path).header
    assert (header["sform_code"], header["qform_code"]) == (1, 1)
    assert np.abs(header.get_qform() - header.get_sform()).max() > 0.4
    assert_as_nibabel(path)
    geometry = read_volume(path).geometry
    assert (geometry.shear_degrees, geometry.stack_axis) == (pytest.approx(20, abs=1e-3), 2)
    assert_as_nibabel(write(tmp_path / "b.nii.gz", affine=sheared(), change=codes(1, 0)))


@pytest.mark.parametrize("fault", ["mirrored", "moved", "turned", "other spacing"])
def test_a_qform_that_is_not_the_sform_without_its_shear(tmp_path: Path, fault: str) -> None:
    def other_qform(header: nib.Nifti1Header) -> None:
        qform = header.get_qform()
        if fault == "mirrored":
            qform[:3, 0] *= -1
        elif fault == "moved":
            qform[:3, 3] += 0.5
        elif fault == "turned":
            qform[:3, :3] = Rotation.from_euler("z", 15, degrees=True).as_matrix() @ qform[:3, :3]
        else:
            qform[:3, 2] *= 1.01
        header.set_qform(qform, 1)

    with pytest.raises(VolumeError, match=r"sform and qform disagree: 5x4x3 .* sheared by 20\.0 degrees"):
        read_volume(write(tmp_path / "a.nii", affine=sheared(), change=other_qform))


def crooked_sform(header: nib.Nifti1Header) -> None:
    header["srow_x"], header["srow_y"], header["srow_z"] = (1, 0.3, 0.2, 0), (0, 1, 0.25, 0), (0, 0, 1, 0)


def far_apart_sform(header: nib.Nifti1Header) -> None:
    header["dim"] = [3, 5000, 4000, 70, 1, 1, 1, 1]
    header["srow_x"], header["srow_y"], header["srow_z"] = (0.1, 0, 0, 0), (0, 0.1, 8, 0), (0, 0, 9, 0)


def mirrored_qform(header: nib.Nifti1Header) -> None:
    header.set_qform(oblique(mirrored=True), 1)


def shifted_sform(header: nib.Nifti1Header) -> None:
    header["srow_y"][3] += 0.8


def singular_sform(header: nib.Nifti1Header) -> None:
    header["srow_z"] = header["srow_y"]


def zero_sform(header: nib.Nifti1Header) -> None:
    for row in ("srow_x", "srow_y", "srow_z"):
        header[row] = 0


def impossible_quaternion(header: nib.Nifti1Header) -> None:
    header["sform_code"], header["quatern_b"], header["quatern_c"] = 0, 1.0, 1.0


REFUSED: list[tuple[str, Change, str]] = [
    ("mirrored qform", mirrored_qform, "sform and qform disagree: 5x4x3 .* against 5x4x3 .* keep the right one"),
    ("shifted sform", shifted_sform, "sform and qform disagree"),
    ("no form", codes(0, 0), "neither sform nor qform is set, .* which side is left"),
    ("singular", singular_sform, "sform: the affine is singular"),
    ("zero", zero_sform, "sform: the affine is singular"),
    ("no right angle", crooked_sform, "sform: no two axes are at right angles: 5x4x3 .* convert the file again"),
    ("much too large without its shear", far_apart_sform, "sform: sheared too much for its size: 5000x4000x70"),
    ("NaN affine", field("srow_x", np.nan), "sform: an affine is a 4x4 matrix of finite numbers"),
    ("quaternion", impossible_quaternion, "qform: w2 should be positive"),
    ("metres", field("xyzt_units", 1), "counts in metres; expected mm"),
    ("micrometres", field("xyzt_units", 3 | 8), "counts in micrometres; expected mm"),
    ("two axes", dims(5, 12), r"2 axes \(5x12\); expected three: a volume has three"),
    ("four axes", dims(5, 4, 1, 3), r"4 axes \(5x4x1x3\); expected three: write one file a channel"),
    ("vectors", dims(5, 4, 1, 1, 3), r"5 axes \(5x4x1x1x3\)"),
    ("no axes", dims(5, 4, 3, count=0), "names 0 axes"),
    ("nine axes", dims(5, 4, 3, count=9), "the header names 9 axes; it is damaged"),
    ("empty axis", dims(5, 0, 3), "a grid of 5x0x3 voxels; every size must be at least 1"),
    ("negative axis", dims(5, -4, 3), "5x-4x3"),
    ("absurd sizes", dims(32767, 32767, 32767), "32767x32767x32767 voxels, more than 2147483648"),
    ("more than the file", dims(5, 4, 4), r"promises 512 bytes of voxels, the file has 472 bytes; it is cut short"),
    ("colours", field("datatype", 128), "data type 128 is not one plain number"),
    ("complex", field("datatype", 32), "data type 32 is not one plain number"),
    ("unknown type", field("datatype", 77), "data type 77 is not one plain number"),
    ("no offset", field("vox_offset", 0), "voxels begin at byte 0; it is damaged"),
    ("NaN offset", field("vox_offset", np.nan), "voxels begin at byte nan"),
    ("far offset", field("vox_offset", 1e30), "voxels begin at byte 1e"),
    ("infinite slope", field("scl_slope", np.inf), "scl_slope inf and scl_inter .* cannot be applied"),
    ("pair", field("magic", b"ni1"), "its voxels in another file; convert it to one .nii.gz"),
]


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize(("change", "message"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_refused_by_name(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str, change: Change, message: str
) -> None:
    # A packed file may hold far more than its length, so only what cannot be packed so well is too much for it.
    if name == "a.nii.gz":
        message = message.replace("promises 512 bytes of voxels, the file has 472 bytes", "120 of 160 bytes of voxels")
    path = write(tmp_path / name, change=change)
    with pytest.raises(VolumeError, match=message) as refused:
        read_volume(path)
    assert str(refused.value).startswith(f"{path}: ")
    assert "\n" not in str(refused.value)
    assert capfd.readouterr() == ("", "")


def test_the_file_itself_is_right(tmp_path: Path) -> None:
    """Without a change every case above would be read."""
    assert_as_nibabel(write(tmp_path / "a.nii", change=lambda header: None))
    read_volume(write(tmp_path / "b.nii", change=field("srow_x", nib.Nifti1Image(VALUES, oblique()).affine[0])))


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_a_small_file_cannot_hold_a_gigabyte(tmp_path: Path, name: str) -> None:
    """And no memory is taken for what it promises."""
    path = write(tmp_path / name, change=dims(1000, 1000, 1000))
    tracemalloc.start()
    for read in (read_volume, read_label):
        with pytest.raises(VolumeError, match=r"promises 2000000352 bytes of voxels, the file has \d+ \w+"):
            read(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10_000_000


@pytest.mark.parametrize("keep", [0.05, 0.5, 0.9, -8, -1])
def test_packed_files_cut_short(tmp_path: Path, keep: float) -> None:
    path = write(tmp_path / "a.nii.gz", np.random.default_rng(1).integers(0, 999, (20, 20, 20)).astype(np.int16))
    content = path.read_bytes()
    path.write_bytes(content[: int(keep)] if keep < 0 else content[: int(len(content) * keep)])
    for read in (read_volume, read_label):
        with pytest.raises(VolumeError, match="the gzip data is cut short or damaged; fetch the file again") as refused:
            read(path)
        assert "\n" not in str(refused.value)


def test_packed_bytes_that_flipped(tmp_path: Path) -> None:
    """The sum at the end of a gzip stream is checked."""
    path = write(tmp_path / "a.nii.gz")
    content = bytearray(path.read_bytes())
    content[-8] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(VolumeError, match="damaged"):
        read_volume(path)


@pytest.mark.parametrize("keep", [10, 347, 351, 471])
def test_plain_files_cut_short(tmp_path: Path, keep: int) -> None:
    path = write(tmp_path / "a.nii")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(VolumeError, match=r"cut short|neither NIfTI|begin at byte"):
        read_volume(path)


def test_packed_files_of_something_else(tmp_path: Path) -> None:
    path = tmp_path / "a.nii.gz"
    path.write_bytes(gzip.compress(b"a table, no image" * 100))
    with pytest.raises(VolumeError, match="holds no whole NIfTI header"):
        read_volume(path)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_voxels_that_are_no_numbers(tmp_path: Path, bad: float) -> None:
    voxels = VALUES.astype(np.float32)
    voxels[1, 2, :] = bad
    path = write(tmp_path / "a.nii.gz", voxels)
    with pytest.raises(VolumeError, match="3 of 60 voxels are NaN or infinite; replace them"):
        read_volume(path)
    with pytest.raises(VolumeError, match=r"3 of 60 label voxels are not whole numbers, (nan|inf|-inf) for one"):
        read_label(path)


def test_too_large_for_single_precision(tmp_path: Path) -> None:
    with pytest.raises(VolumeError, match="60 of 60 voxels are NaN or infinite"):
        read_volume(write(tmp_path / "a.nii.gz", np.full(SHAPE, 1e300)))


@pytest.mark.parametrize(
    ("values", "dtype"),
    [((0, 255), np.uint8), ((-1, 2), np.int16), ((0, 256), np.int16), ((0, 65535), np.int32), ((0, 2**40), np.int64)],
)
@pytest.mark.parametrize("stored", [np.int64, np.float64])
def test_labels_take_the_narrowest_type(
    tmp_path: Path, values: tuple[int, int], dtype: type[np.generic], stored: type[np.generic]
) -> None:
    voxels = np.resize(values, SHAPE).astype(stored)
    nib.save(nib.Nifti1Image(voxels, oblique(), dtype=stored), tmp_path / "a.nii.gz")
    label = read_label(tmp_path / "a.nii.gz")
    assert label.voxels.dtype == dtype
    assert np.array_equal(label.voxels, voxels)
    assert label.background == 0.0


def test_labels_with_fractions(tmp_path: Path) -> None:
    voxels = np.abs(VALUES).astype(np.float32)
    voxels[0, 0, :2] = 1.5
    with pytest.raises(
        VolumeError, match=r"2 of 60 label voxels are not whole numbers, 1\.5 for one; .*nearest neighbour"
    ):
        read_label(write(tmp_path / "a.nii.gz", voxels))


def test_labels_that_are_scaled(tmp_path: Path) -> None:
    def half(header: nib.Nifti1Header) -> None:
        header["scl_slope"], header["scl_inter"] = 0.5, 0.0

    even = write(tmp_path / "a.nii.gz", (VALUES + 7) * 2, change=half)
    assert np.array_equal(read_label(even).voxels, VALUES + 7)
    with pytest.raises(VolumeError, match="30 of 60 label voxels"):
        read_label(write(tmp_path / "b.nii.gz", VALUES, change=half))


def test_labels_beyond_all_numbers(tmp_path: Path) -> None:
    with pytest.raises(VolumeError, match="are no label numbers"):
        read_label(write(tmp_path / "a.nii.gz", np.full(SHAPE, 1e30)))


def test_damage_anywhere_is_a_volume_error(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Seeded damage to a header: a refusal, or a volume without NaN; nothing else, and not a word."""
    content = write(tmp_path / "a.nii").read_bytes()
    draw = np.random.default_rng(7)
    outcomes = {"read": 0, "refused": 0}
    for _ in range(400):
        damaged = bytearray(content)
        for place in draw.integers(0, 352, size=draw.integers(1, 5)):
            damaged[place] = draw.integers(256)
        (tmp_path / "b.nii").write_bytes(bytes(damaged))
        try:
            volume = read_volume(tmp_path / "b.nii")
        except VolumeError:
            outcomes["refused"] += 1
        else:
            outcomes["read"] += 1
            assert isinstance(volume.geometry, Geometry)
            assert bool(np.isfinite(volume.voxels).all())
    assert min(outcomes.values()) > 20
    assert capfd.readouterr() == ("", "")
