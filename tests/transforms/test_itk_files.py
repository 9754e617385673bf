"""NRRD and MetaImage files: equal to pynrrd and SimpleITK where they are right, refused by name where they are not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nrrd
import numpy as np
import pytest
import SimpleITK as sitk
from scipy.spatial.transform import Rotation

from transforms.errors import VolumeError
from transforms.geometry import Geometry
from transforms.itk_files import file_of_voxels
from transforms.volume import read_grid, read_label, read_volume

VALUES = np.arange(60, dtype=np.int16).reshape(5, 4, 3) - 7
TO_RAS = {"RAS": (1, 1, 1), "LAS": (-1, 1, 1), "LPS": (-1, -1, 1)}
FRAMES = {"left-posterior-superior": "LPS", "right-anterior-superior": "RAS", "left-anterior-superior": "LAS"}
FRAMES |= {code: code for code in TO_RAS}


def directions(*, mirrored: bool = False) -> np.ndarray:
    """One row an axis, as NRRD has it."""
    rows = Rotation.from_euler("xyz", (10, 20, -30), degrees=True).as_matrix().T * [[0.7], [1.1], [3.0]]
    return rows * [[-1.0], [1.0], [1.0]] if mirrored else rows


def write_nrrd(path: Path, voxels: np.ndarray = VALUES, **fields: Any) -> Path:
    """A right file with some header fields changed, or left out by None."""
    header = {
        "space": "left-posterior-superior",
        "space directions": directions(),
        "space origin": np.array([30.0, -40.0, 12.0]),
        "encoding": "raw",
        **{key.replace("_", " "): value for key, value in fields.items()},
    }
    nrrd.write(str(path), voxels, {key: value for key, value in header.items() if value is not None})
    return path


def write_meta(path: Path, voxels: np.ndarray = VALUES, *, packed: bool = False) -> Path:
    image = sitk.GetImageFromArray(voxels.transpose(2, 1, 0))
    image.SetSpacing((0.7, 1.1, 3.0))
    image.SetOrigin((30.0, -40.0, 12.0))
    image.SetDirection(Rotation.from_euler("xyz", (10, 20, -30), degrees=True).as_matrix().ravel().tolist())
    sitk.WriteImage(image, str(path), packed)
    return path


def replaced(path: Path, old: bytes, new: bytes) -> Path:
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new, 1))
    return path


@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("encoding", ["raw", "gzip"])
def test_nrrd_as_pynrrd_reads_it(tmp_path: Path, frame: str, mirrored: bool, encoding: str) -> None:
    path = write_nrrd(
        tmp_path / "a.nrrd", space=frame, space_directions=directions(mirrored=mirrored), encoding=encoding
    )
    volume = read_volume(path)
    voxels, header = nrrd.read(str(path))
    assert np.array_equal(volume.voxels, voxels)
    affine = np.eye(4)
    affine[:3, :3] = header["space directions"].T
    affine[:3, 3] = header["space origin"]
    expected = np.diag([*TO_RAS[FRAMES[frame]], 1]) @ affine
    np.testing.assert_allclose(volume.geometry.affine_ras, expected, atol=1e-6)


def sheared_directions() -> np.ndarray:
    """Slices that lean by 20 degrees, as of a CT with a tilted gantry."""
    rows = directions()
    rows[2] += 3.0 * np.tan(np.deg2rad(20)) * rows[1] / 1.1
    return rows


@pytest.mark.parametrize("frame", FRAMES)
def test_sheared_nrrd_and_metaimage(tmp_path: Path, frame: str) -> None:
    """Both formats can say that slices lean; ITK hands it on, though it writes no such NIfTI file."""
    path = write_nrrd(tmp_path / "a.nrrd", space=frame, space_directions=sheared_directions())
    geometry = read_volume(path).geometry
    _, header = nrrd.read(str(path))
    expected = np.diag(TO_RAS[FRAMES[frame]]) @ header["space directions"].T
    np.testing.assert_allclose(geometry.affine_ras[:3, :3], expected, atol=1e-6)
    assert (geometry.shear_degrees, geometry.stack_axis) == (pytest.approx(20, abs=1e-4), 2)
    sitk.WriteImage(sitk.ReadImage(str(path)), str(tmp_path / "b.mha"))
    again = read_volume(tmp_path / "b.mha").geometry
    assert again.difference(geometry) is None
    assert again.is_sheared


def test_grids_without_a_right_angle(tmp_path: Path) -> None:
    rows = np.array([[1, 0, 0], [0.3, 1, 0], [0.2, 0.25, 1]])
    with pytest.raises(VolumeError, match=r"no two axes are at right angles: 5x4x3 .* convert the file again"):
        read_volume(write_nrrd(tmp_path / "a.nrrd", space_directions=rows))


def test_nrrd_with_its_voxels_beside_it(tmp_path: Path) -> None:
    assert np.array_equal(read_volume(write_nrrd(tmp_path / "a.nhdr")).voxels, VALUES)
    (tmp_path / "a.raw").unlink()
    with pytest.raises(VolumeError, match=r"its voxels are in 'a\.raw', which is not one file beside it"):
        read_volume(tmp_path / "a.nhdr")


def test_nrrd_header_with_windows_line_ends(tmp_path: Path) -> None:
    path = write_nrrd(tmp_path / "a.nrrd")
    text, voxels = path.read_bytes().split(b"\n\n", 1)
    path.write_bytes(text.replace(b"\n", b"\r\n") + b"\r\n\r\n" + voxels)
    assert np.array_equal(read_volume(path).voxels, VALUES)


@pytest.mark.parametrize("name", ["a.mha", "a.mhd"])
@pytest.mark.parametrize("packed", [False, True])
def test_metaimage_as_simpleitk_reads_it(tmp_path: Path, name: str, packed: bool) -> None:
    path = write_meta(tmp_path / name, packed=packed)
    volume = read_volume(path)
    image = sitk.ReadImage(str(path))
    assert volume.voxels.dtype == np.float32
    assert np.array_equal(volume.voxels, VALUES)
    for ijk in ((0, 0, 0), (4, 0, 0), (0, 3, 0), (4, 3, 2)):
        point_lps = image.TransformIndexToPhysicalPoint(ijk)
        (point_ras,) = volume.geometry.ras_from_ijk([ijk])
        assert point_ras.tolist() == pytest.approx([-point_lps[0], -point_lps[1], point_lps[2]])


def test_content_counts_not_the_name(tmp_path: Path) -> None:
    assert np.array_equal(read_volume(write_nrrd(tmp_path / "a.nrrd").rename(tmp_path / "a.nii.gz")).voxels, VALUES)
    assert np.array_equal(read_volume(write_meta(tmp_path / "a.mha").rename(tmp_path / "no name")).voxels, VALUES)


def test_labels(tmp_path: Path) -> None:
    whole = write_nrrd(tmp_path / "a.nrrd", np.abs(VALUES).astype(np.float32))
    assert read_label(whole).voxels.dtype == np.uint8
    with pytest.raises(VolumeError, match=r"60 of 60 label voxels are not whole numbers, 0\.5 for one"):
        read_label(write_meta(tmp_path / "a.mha", np.full((5, 4, 3), 0.5, np.float32)))


def test_voxels_that_are_no_numbers(tmp_path: Path) -> None:
    voxels = VALUES.astype(np.float64)
    voxels[0, 0, :] = np.nan
    for path in (write_nrrd(tmp_path / "a.nrrd", voxels), write_meta(tmp_path / "a.mha", voxels)):
        with pytest.raises(VolumeError, match="3 of 60 voxels are NaN or infinite"):
            read_volume(path)


UNPLACED: list[tuple[dict[str, Any], str]] = [
    ({"space": None, "space_dimension": 3}, "NRRD space is 'none', which does not say where left and front are"),
    ({"space": "scanner-xyz"}, "NRRD space is 'scanner-xyz'"),
    ({"space": "3D-right-handed"}, "NRRD space is '3d-right-handed'"),
    ({"space_origin": None}, "no 'space origin' in the header"),
    ({"space_directions": None}, "no 'space directions' in the header"),
    ({"space_units": ["um", "um", "um"]}, "NRRD space units are um um um; expected mm"),
]


@pytest.mark.parametrize(("fields", "message"), UNPLACED)
def test_nrrd_without_a_place(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(VolumeError, match=message) as refused:
        read_volume(write_nrrd(tmp_path / "a.nrrd", **fields))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("key", [b"TransformMatrix", b"Offset", b"ElementSpacing"])
def test_metaimage_without_a_place(tmp_path: Path, key: bytes) -> None:
    path = replaced(write_meta(tmp_path / "a.mha"), key + b" =", b"Comment =")
    with pytest.raises(VolumeError, match=f"no '{key.decode().lower()}' in the header, so its voxels have no place"):
        read_volume(path)


def channels(path: Path) -> Path:
    image = sitk.GetImageFromArray(np.zeros((3, 4, 5, 2), np.uint8), isVector=True)
    sitk.WriteImage(image, str(path))
    return path


def flat(path: Path) -> Path:
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((4, 5), np.uint8)), str(path))
    return path


def frames(path: Path) -> Path:
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((2, 3, 4, 5), np.uint8), isVector=False), str(path))
    return path


@pytest.mark.parametrize("name", ["a.nrrd", "a.mha"])
@pytest.mark.parametrize(
    ("write", "message"),
    [
        (channels, "voxels are vector of 8-bit unsigned integer; expected one plain number|NRRD space"),
        (flat, r"2 axes \(5x4\)|NRRD space is 'none'"),
        (frames, r"4 axes \(5x4x3x2\)|NRRD space is 'none'"),
    ],
)
def test_not_three_axes_of_numbers(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], write: Callable[[Path], Path], name: str, message: str
) -> None:
    with pytest.raises(VolumeError, match=message):
        read_volume(write(tmp_path / name))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("cut", [1, 20])
def test_cut_short(tmp_path: Path, capfd: pytest.CaptureFixture[str], packed: bool, cut: int) -> None:
    encoding = "gzip" if packed else "raw"
    for path in (write_nrrd(tmp_path / "a.nrrd", encoding=encoding), write_meta(tmp_path / "a.mha", packed=packed)):
        path.write_bytes(path.read_bytes()[:-cut])
        # The last bytes of a gzip stream are its sum and length; ITK does without them.
        if path.suffix == ".nrrd" and packed and cut == 1:
            continue
        with pytest.raises(VolumeError, match=r"cut short|cannot be read") as refused:
            read_volume(path)
        assert "\n" not in str(refused.value)
    assert capfd.readouterr() == ("", "")


def test_absurd_sizes(tmp_path: Path) -> None:
    """What a header promises is refused before memory is asked for."""
    huge = replaced(write_nrrd(tmp_path / "a.nrrd"), b"sizes: 5 4 3", b"sizes: 60000 60000 60000")
    with pytest.raises(VolumeError, match="60000x60000x60000 voxels, more than 2147483648"):
        read_volume(huge)
    for path, old in (
        (write_nrrd(tmp_path / "b.nrrd"), b"sizes: 5 4 3"),
        (write_meta(tmp_path / "b.mha"), b"DimSize = 5 4 3"),
    ):
        with pytest.raises(VolumeError, match=r"promises 1600000000 bytes of voxels, the file has \d+ bytes"):
            read_volume(replaced(path, old, old.replace(b"5 4 3", b"2000 2000 200")))
    packed = replaced(write_nrrd(tmp_path / "c.nrrd", encoding="gzip"), b"sizes: 5 4 3", b"sizes: 2000 2000 200")
    with pytest.raises(VolumeError, match=r"promises 1600000000 bytes of voxels, the file has \d+ compressed bytes"):
        read_volume(packed)


@pytest.mark.parametrize("axes", [b"1e308", b"4000000000", b"-3", b"0", b""])
def test_axes_that_would_crash_itk(tmp_path: Path, axes: bytes) -> None:
    path = replaced(write_meta(tmp_path / "a.mha"), b"NDims = 3", b"NDims = " + axes)
    with pytest.raises(VolumeError, match="axes; expected 3"):
        read_volume(path)


def test_metaimage_of_many_files(tmp_path: Path) -> None:
    path = replaced(write_meta(tmp_path / "a.mhd"), b"ElementDataFile = a.raw", b"ElementDataFile = LIST\na.raw")
    with pytest.raises(VolumeError, match="its voxels are in 'LIST'"):
        read_volume(path)


def test_nrrd_packed_by_bzip2(tmp_path: Path) -> None:
    with pytest.raises(VolumeError, match="NRRD encoding is 'bzip2'; expected raw or gzip"):
        read_volume(write_nrrd(tmp_path / "a.nrrd", encoding="bzip2"))


def test_singular_directions(tmp_path: Path) -> None:
    rows = directions()
    rows[2] = rows[1]
    with pytest.raises(VolumeError, match=r"cannot be read|singular"):
        read_volume(write_nrrd(tmp_path / "a.nrrd", space_directions=rows))


@pytest.mark.parametrize("kind", ["nrrd", "mha"])
def test_damage_anywhere_is_a_volume_error(tmp_path: Path, kind: str) -> None:
    """Seeded damage to a header: a refusal or a volume, nothing else."""
    content = (write_nrrd(tmp_path / "a.nrrd") if kind == "nrrd" else write_meta(tmp_path / "a.mha")).read_bytes()
    draw = np.random.default_rng(3)
    outcomes = {"read": 0, "refused": 0}
    for _ in range(80):
        damaged = bytearray(content)
        for place in draw.integers(0, len(content) - 120, size=draw.integers(1, 4)):
            damaged[place] = draw.integers(256)
        path = tmp_path / f"b.{kind}"
        path.write_bytes(bytes(damaged))
        try:
            volume = read_volume(path)
        except VolumeError:
            outcomes["refused"] += 1
        else:
            outcomes["read"] += 1
            assert isinstance(volume.geometry, Geometry)
    assert min(outcomes.values()) > 5


class TestVoxelsElsewhere:
    """A header from a stranger names no file but one beside it, however it puts the name."""

    @pytest.fixture
    def secret(self, tmp_path: Path) -> Path:
        (tmp_path / "secret").mkdir()
        write_meta(tmp_path / "secret" / "s.mhd", VALUES + 1)
        return tmp_path / "secret" / "s.raw"

    def refused(self, path: Path) -> None:
        for read in (read_volume, read_grid):
            with pytest.raises(VolumeError, match=r"not one file beside it|no 'ElementDataFile =' where") as caught:
                read(path)
            assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("named", ["{secret}", "../inside/../secret/s.raw", "..\\secret\\s.raw"])
    @pytest.mark.parametrize("name", ["a.mhd", "a.nhdr"])
    def test_a_path(self, tmp_path: Path, secret: Path, name: str, named: str) -> None:
        (tmp_path / "inside").mkdir()
        write = write_meta if name == "a.mhd" else write_nrrd
        path = write(tmp_path / "inside" / name)
        self.refused(replaced(path, b"a.raw", named.format(secret=secret).encode()))

    @pytest.mark.parametrize(
        "lines",
        [
            "Comment = ElementDataFile\nElementDataFile = ../secret/s.raw",
            "ElementDataFile : ../secret/s.raw",
            "Comment = x\rElementDataFile = a.raw\nElementDataFile = ../secret/s.raw",
            "data file = a.raw\nElementDataFile = ../secret/s.raw",
        ],
    )
    def test_a_header_that_itk_reads_otherwise_than_it_looks(self, tmp_path: Path, secret: Path, lines: str) -> None:
        """ITK itself follows each of these."""
        (tmp_path / "inside").mkdir()
        path = replaced(write_meta(tmp_path / "inside" / "a.mhd"), b"ElementDataFile = a.raw", lines.encode() + b"\n")
        assert np.array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(path))).transpose(2, 1, 0), VALUES + 1)
        self.refused(path)

    @pytest.mark.parametrize("mark", [b"\x0b", b"\x0c", b"\x1c"])
    def test_a_comment_that_could_pass_for_a_line(self, tmp_path: Path, secret: Path, mark: bytes) -> None:
        (tmp_path / "inside").mkdir()
        path = write_nrrd(tmp_path / "inside" / "a.nhdr")
        self.refused(
            replaced(path, b"data file: a.raw", b"data file: ../secret/s.raw\n# x" + mark + b"data file: a.raw")
        )

    def test_a_header_that_does_not_end(self, tmp_path: Path, secret: Path) -> None:
        (tmp_path / "inside").mkdir()
        path = write_nrrd(tmp_path / "inside" / "a.nhdr")
        replaced(path, b"data file: a.raw", b"# x\n" * (1 << 18) + b"data file: ../secret/s.raw")
        with pytest.raises(VolumeError, match="NRRD header does not end within 1048576 bytes"):
            read_volume(path)

    def test_a_file_beside_it_may_be_named_as_being_here(self, tmp_path: Path) -> None:
        for path in (write_nrrd(tmp_path / "a.nhdr"), write_meta(tmp_path / "b.mhd")):
            name = path.with_suffix(".raw").name.encode()
            assert np.array_equal(read_volume(replaced(path, name, b"./" + name)).voxels, VALUES)
            assert file_of_voxels(path) == path.with_suffix(".raw")
        assert file_of_voxels(write_nrrd(tmp_path / "c.nrrd")) == tmp_path / "c.nrrd"
