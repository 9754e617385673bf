"""Files of small real volumes, and what chance does to their bytes. Everything follows from a seed."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import SimpleITK as sitk
from pydicom.data import get_testdata_file

DATA = Path(__file__).parents[1] / "data"
HEADER_BYTES = 2048
"""Most damage is aimed at the beginning, where the headers are."""

_PYDICOM_FILES = (
    "CT_small.dcm",
    "MR_small.dcm",
    "MR_small_RLE.dcm",
    "MR_small_bigendian.dcm",
    "MR_small_jpeg_ls_lossless.dcm",
    "MR_small_jp2klossless.dcm",
    "MR_truncated.dcm",
    "emri_small_RLE.dcm",
    "image_dfl.dcm",
    "JPEG-LL.dcm",
    "liver_1frame.dcm",
    "rtstruct.dcm",
    "nested_priv_SQ.dcm",
)
_EXTREMES = [b"\x00", b"\xff", b"\x7f", b"\x80", b"\xff\xff", b"\x00\x80", b"\xff\xff\xff\x7f", b"\xff\xff\xff\xff"]
_EXTREMES += [b"65535\\", b"-1", b"1e308", b"nan", b"\\\\\\\\", b"999999999999", b"0\\0\\0"]


@dataclass(frozen=True)
class Sample:
    """Files that belong together: name and bytes of each."""

    name: str
    files: tuple[tuple[str, bytes], ...]

    def write(self, folder: Path) -> Path:
        """Lay the files down; what to read is the folder, or the file if it is but one of another kind than DICOM."""
        for name, content in self.files:
            (folder / name).write_bytes(content)
        only = folder / self.files[0][0]
        return only if len(self.files) == 1 and only.suffix != ".dcm" else folder


def samples(folder: Path) -> list[Sample]:
    """Real series, odd DICOM files of pydicom's and ours, and a volume in every other format; `folder` is for use."""
    series = sorted((DATA / "dicom_hippocrop").glob("*.dcm"))[:4]
    found = [Sample("hippocrop", tuple((path.name, path.read_bytes()) for path in series))]
    for name in _PYDICOM_FILES:
        path = get_testdata_file(name, download=False)
        if path is not None:
            found.append(Sample(name, (("1.dcm", Path(path).read_bytes()),)))
    odd = sorted(path for path in (DATA / "dicom_odd").rglob("*") if path.is_file() and path.stat().st_size < 300_000)
    found += [Sample(path.name, (("1.dcm", path.read_bytes()),)) for path in odd if path.suffix == ".dcm"]
    return found + list(_other_formats(folder))


def _other_formats(folder: Path) -> Iterator[Sample]:
    voxels = np.arange(4 * 5 * 6, dtype=np.int16).reshape(4, 5, 6)
    affine = np.array([[0.0, -2.0, 0.1, 5.0], [1.5, 0.0, 0.0, -7.0], [0.0, 0.2, 3.0, 9.0], [0.0, 0.0, 0.0, 1.0]])
    affine[:3, :3] = np.linalg.qr(affine[:3, :3])[0] * (1.5, 2.0, 3.0)
    image = nib.Nifti1Image(voxels, affine)
    yield Sample("nifti", (("a.nii", image.to_bytes()),))
    yield Sample("packed nifti", (("a.nii.gz", gzip.compress(image.to_bytes(), mtime=0)),))
    volume = sitk.GetImageFromArray(voxels)
    volume.SetSpacing((1.5, 2.0, 3.0))
    for name in ("a.nrrd", "a.mha"):
        sitk.WriteImage(volume, str(folder / name))
        yield Sample(name, ((name, (folder / name).read_bytes()),))


def mutated(sample: Sample, rng: np.random.Generator) -> Sample:
    """One file of the sample, damaged once or a few times."""
    files = list(sample.files)
    n = int(rng.integers(len(files)))
    name, content = files[n]
    for _ in range(int(rng.integers(1, 5))):
        damage = _DAMAGES[int(rng.integers(len(_DAMAGES)))]
        content = damage(content, rng)
    files[n] = (name, content)
    return Sample(sample.name, tuple(files))


def _place(content: bytes, rng: np.random.Generator) -> int:
    end = len(content) if rng.random() < 0.3 else min(len(content), HEADER_BYTES)
    return int(rng.integers(max(end, 1)))


def _flip_bit(content: bytes, rng: np.random.Generator) -> bytes:
    changed, place = bytearray(content or b"\0"), _place(content, rng)
    changed[place] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def _extreme(content: bytes, rng: np.random.Generator) -> bytes:
    value, place = _EXTREMES[int(rng.integers(len(_EXTREMES)))], _place(content, rng)
    return content[:place] + value + content[place + len(value) :]


def _cut_short(content: bytes, rng: np.random.Generator) -> bytes:
    return content[: _place(content, rng)]


def _cut_out(content: bytes, rng: np.random.Generator) -> bytes:
    place = _place(content, rng)
    return content[:place] + content[place + int(rng.integers(1, 64)) :]


def _repeat(content: bytes, rng: np.random.Generator) -> bytes:
    place, length = _place(content, rng), int(rng.integers(1, 256))
    return content[:place] + content[place : place + length] * int(rng.integers(2, 5)) + content[place:]


def _noise(content: bytes, rng: np.random.Generator) -> bytes:
    place, length = _place(content, rng), int(rng.integers(1, 32))
    return content[:place] + rng.bytes(length) + content[place + length :]


def _blank(content: bytes, rng: np.random.Generator) -> bytes:
    place, length = _place(content, rng), int(rng.integers(1, 512))
    return content[:place] + bytes(length) + content[place + length :]


_DAMAGES: tuple[Callable[[bytes, np.random.Generator], bytes], ...] = (
    _flip_bit,
    _flip_bit,
    _extreme,
    _extreme,
    _cut_short,
    _cut_out,
    _repeat,
    _noise,
    _blank,
)
