"""NRRD and MetaImage (.mha, .mhd) files -> voxels and their grid, through SimpleITK.

Both formats have a text header. It is read here first: SimpleITK fills what is missing with guesses (no origin is 0,
no direction is the identity), reports damage on the terminal, and allocates memory before it knows how long the file
is. A file must say in which patient frame its grid lies (NRRD: `space`; MetaImage is LPS by definition) and where.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk

from transforms.errors import VolumeError
from transforms.geometry import Geometry
from transforms.process_wide import shared
from transforms.sanity import finite_float32, integral_labels, refuse_oversize, refuse_short_file, usable_grid

_HEADER_LIMIT = 1 << 20
_NRRD_MAGIC = b"NRRD000"
_META_KEYS = (b"ObjectType", b"NDims")
_NRRD_FRAMES = {
    "left-posterior-superior",
    "lps",
    "right-anterior-superior",
    "ras",
    "left-anterior-superior",
    "las",
}
_NRRD_PLACE = (("space directions",), ("space origin",))
_META_PLACE = (
    ("transformmatrix", "rotation", "orientation"),
    ("offset", "position", "origin"),
    ("elementspacing", "elementsize"),
)
_LOCAL = ("", "local")
_MOST_AXES = 10
_ENCODINGS = ("raw", "gzip", "gz")
_BYTES = {
    sitk.sitkInt8: 1,
    sitk.sitkUInt8: 1,
    sitk.sitkInt16: 2,
    sitk.sitkUInt16: 2,
    sitk.sitkInt32: 4,
    sitk.sitkUInt32: 4,
    sitk.sitkFloat32: 4,
    sitk.sitkInt64: 8,
    sitk.sitkUInt64: 8,
    sitk.sitkFloat64: 8,
}


@dataclass(frozen=True)
class _Header:
    """`fields` have lower-case keys; `end` is where local voxels begin."""

    image_io: str
    fields: dict[str, str]
    end: int

    @property
    def data_file(self) -> str:
        """The file that holds the voxels, empty or 'local' for this one."""
        keys = ("data file", "datafile") if self.image_io == "NrrdImageIO" else ("elementdatafile",)
        return next((name for key in keys if (name := self.fields.get(key, ""))), "")

    @property
    def packed(self) -> bool:
        """Whether the voxels are compressed."""
        packed = self.fields.get("compresseddata", "false").lower() == "true"
        return packed or self.fields.get("encoding", "raw").lower() in ("gzip", "gz")


def is_itk(path: Path) -> bool:
    """Whether the content begins as NRRD or MetaImage files do."""
    with path.open("rb") as file:
        head = file.read(512)
    return head.startswith(_NRRD_MAGIC) or _is_meta(head)


def read_itk(path: Path, *, labels: bool = False) -> tuple[npt.NDArray[Any], Geometry]:
    """Voxels (I, J, K) and their grid: float32 for images, the narrowest integer type for labels.

    Raises:
        VolumeError: cut short or damaged, not three axes, not one number a voxel, no place in the patient, NaN or
            infinite voxels, labels that are not whole.
    """
    header = _checked(path)
    # Before ITK opens the file, whose message about voxels that are missing is its own.
    present = _bytes_of_voxels(header, path)
    reader = _informed(header, path)
    shape = _shape(reader, path)
    needed = int(np.prod(shape, dtype=np.int64)) * _BYTES[reader.GetPixelID()]
    refuse_short_file(needed, present, path, packed=header.packed)
    with _quiet_itk(path):
        image = reader.Execute()
    voxels = sitk.GetArrayFromImage(image).transpose(2, 1, 0)
    return (integral_labels if labels else finite_float32)(voxels, path), _geometry(image, shape, path)


def read_itk_grid(path: Path) -> Geometry:
    """The grid of the voxels, by the header alone.

    Raises:
        VolumeError: see `read_itk`; what only the voxels tell is not seen.
    """
    reader = _informed(_checked(path), path)
    return _geometry(reader, _shape(reader, path), path)


def file_of_voxels(path: Path) -> Path:
    """The file that an NRRD or MetaImage header has its voxels in: `path` itself, or one beside it.

    Raises:
        VolumeError: the header does not say, or names anything else.
    """
    return _file_of_voxels(_header(path), path)


def _checked(path: Path) -> _Header:
    """The header, after all that can be refused by it alone; ITK has not opened a file yet."""
    header = _header(path)
    _refuse_odd_axes(header, path)
    _refuse_unplaced(header, path)
    _file_of_voxels(header, path)
    return header


def _informed(header: _Header, path: Path) -> sitk.ImageFileReader:
    """A reader that has read what stands before the voxels."""
    reader = sitk.ImageFileReader()
    reader.SetImageIO(header.image_io)
    reader.SetFileName(str(path))
    with _quiet_itk(path):
        reader.ReadImageInformation()
    return reader


def _is_meta(head: bytes) -> bool:
    return any(line.partition(b"=")[0].strip() in _META_KEYS and b"=" in line for line in head.splitlines()[:4])


def _header(path: Path) -> _Header:
    """Where voxels are must be read as ITK reads it, or a header could send ITK elsewhere than where was looked."""
    with path.open("rb") as file:
        content = file.read(_HEADER_LIMIT)
    if content.startswith(_NRRD_MAGIC):
        text, gap, _ = content.replace(b"\r\n", b"\n").partition(b"\n\n")
        if not gap and len(content) == _HEADER_LIMIT:
            raise VolumeError(f"{path}: its NRRD header does not end within {_HEADER_LIMIT} bytes; convert it again")
        crlf = content.count(b"\r\n", 0, len(text) + len(gap))
        return _Header("NrrdImageIO", _fields(re.split(rb"[\r\n]", text), b":"), len(text) + len(gap) + crlf)
    text, key, rest = content.partition(b"ElementDataFile")
    last = rest.split(b"\n", 1)[0]
    fields = _fields((text + key + last).split(b"\n"), b"=")
    if "elementdatafile" not in fields:
        raise VolumeError(f"{path}: no 'ElementDataFile =' where its header ends; convert it again from its source")
    return _Header("MetaImageIO", fields, len(text) + len(key) + len(last) + 1)


def _fields(lines: list[bytes], separator: bytes) -> dict[str, str]:
    pairs = (line.partition(separator) for line in lines if not line.startswith(b"#"))
    return {_text(key).lower(): _text(value) for key, found, value in pairs if found}


def _text(value: bytes) -> str:
    return value.decode("ascii", errors="replace").strip()


def _refuse_odd_axes(header: _Header, path: Path) -> None:
    """ITK believes any number of axes, and crashes on large ones."""
    axes = header.fields.get("dimension" if header.image_io == "NrrdImageIO" else "ndims", "")
    if not (axes.isascii() and axes.isdecimal() and 0 < int(axes) <= _MOST_AXES):
        raise VolumeError(f"{path}: the header names '{axes[:20]}' axes; expected 3: fetch or convert the file again")


def _refuse_unplaced(header: _Header, path: Path) -> None:
    is_nrrd = header.image_io == "NrrdImageIO"
    frame = header.fields.get("space", "none").lower()
    if is_nrrd and frame not in _NRRD_FRAMES:
        raise VolumeError(
            f"{path}: NRRD space is '{frame}', which does not say where left and front are; expected "
            "left-posterior-superior or right-anterior-superior: convert it again from its source"
        )
    for keys in _NRRD_PLACE if is_nrrd else _META_PLACE:
        if not any(header.fields.get(key) for key in keys):
            raise VolumeError(
                f"{path}: no '{keys[0]}' in the header, so its voxels have no place in the patient; convert it again"
            )
    units = header.fields.get("space units", "").replace('"', "").lower().split()
    if any(unit != "mm" for unit in units):
        raise VolumeError(f"{path}: NRRD space units are {' '.join(units)}; expected mm")


def _shape(reader: sitk.ImageFileReader, path: Path) -> tuple[int, int, int]:
    sizes = tuple(reader.GetSize())
    if len(sizes) != 3:
        shown = "x".join(str(n) for n in sizes)
        raise VolumeError(f"{path}: {len(sizes)} axes ({shown}); expected three: write one file a channel")
    if reader.GetNumberOfComponents() != 1 or reader.GetPixelID() not in _BYTES:
        kind = sitk.GetPixelIDValueAsString(reader.GetPixelID())
        raise VolumeError(f"{path}: voxels are {kind}; expected one plain number: write one file a channel")
    refuse_oversize(sizes, path)
    return sizes[0], sizes[1], sizes[2]


def _bytes_of_voxels(header: _Header, path: Path) -> int:
    """How many bytes, compressed or not, the file holds for voxels; at least what a MetaImage header promises."""
    encoding = header.fields.get("encoding", "raw").lower()
    if encoding not in _ENCODINGS:
        raise VolumeError(f"{path}: NRRD encoding is '{encoding}'; expected raw or gzip: convert it again")
    file = _file_of_voxels(header, path)
    present = file.stat().st_size - (header.end if file == path else 0)
    stored = header.fields.get("compresseddatasize", "")
    if header.packed and stored.isdecimal():
        refuse_short_file(int(stored), present, path)
    return present


def _file_of_voxels(header: _Header, path: Path) -> Path:
    name = header.data_file
    if name.lower() in _LOCAL:
        return path
    # ITK would follow a path of either system to wherever it leads, and take '%' and LIST for many files.
    several = name.upper().startswith("LIST") or "%" in name or len(PureWindowsPath(name).parts) != 1
    if several or not (path.parent / name).is_file():
        raise VolumeError(f"{path}: its voxels are in '{name}', which is not one file beside it; write one .nrrd")
    return path.parent / name


def _geometry(image: sitk.Image | sitk.ImageFileReader, shape: tuple[int, int, int], path: Path) -> Geometry:
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * np.asarray(image.GetSpacing())  # type: ignore[no-untyped-call]
    affine[:3, 3] = image.GetOrigin()  # type: ignore[no-untyped-call]
    try:
        return usable_grid(Geometry.from_lps(shape, affine))
    except ValueError as fault:
        raise VolumeError(f"{path}: {fault}; convert the file again from its source") from None


@contextmanager
def _quiet_itk(path: Path) -> Iterator[None]:
    """Keep ITK's warnings from the terminal, and its many-line errors to their last line."""
    with _warnings_off():
        try:
            yield
        except RuntimeError as fault:
            lines = [line.strip() for line in str(fault).splitlines() if line.strip()]
            raise VolumeError(f"{path}: cannot be read: {lines[-1]}; fetch or convert the file again") from None


@contextmanager
def _off() -> Iterator[None]:
    shown = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        yield
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(shown)


_warnings_off = shared(_off)
