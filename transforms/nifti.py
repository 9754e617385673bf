"""NIfTI-1 and NIfTI-2 files -> voxels and their grid, or a refusal by name.

nibabel knows the header's fields; whether they make sense is judged here, because its own remarks go to the
terminal and its fallbacks are guesses. Which affine counts: sform when its code is set, else qform when its code is
set, else none: a file with both codes 0 does not say where its voxels lie, not even which side is left, and is
refused. When both are set they must agree; a quaternion has no shear, so beside a sheared sform (a tilted CT) the
qform must be what is left without it.
"""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

import nibabel as nib
import numpy as np
import numpy.typing as npt
from nibabel.spatialimages import HeaderDataError

from transforms.errors import VolumeError
from transforms.geometry import Geometry
from transforms.sanity import (
    MAX_VOXELS,
    integral_labels,
    refuse_not_finite,
    refuse_oversize,
    refuse_short_file,
    usable_grid,
)

FORMS_AGREE_VOXELS = 0.5
"""sform and qform agree when no corner is farther apart than this part of a voxel: a quaternion of half a turn is
stored no better than the square root of float32's precision, about 0.2 mm over a whole body."""

SLAB_VOXELS = 1 << 20
"""Voxels of an image that are brought to float32 at a time, in whole planes."""

SAME_SPACING = 1e-3
"""Spacings of both forms within this part of each other are one."""

_GZIP = b"\x1f\x8b"
_HEADERS: dict[int, Any] = {348: nib.Nifti1Header, 540: nib.Nifti2Header}
_SINGLE_FILE = (b"n+1\0", b"n+2\0")
_PAIR = (b"ni1\0", b"ni2\0")
_UNITS = {1: "metres", 3: "micrometres"}
_DAMAGED = (EOFError, gzip.BadGzipFile, zlib.error)


def is_nifti(path: Path) -> bool:
    """Whether the content, gunzipped if it is packed, begins with a NIfTI header."""
    try:
        with _stream(path) as file:
            head = file.read(540)
    except _DAMAGED:
        return False
    return _magic(head) in (*_SINGLE_FILE, *_PAIR)


def is_gzip(path: Path) -> bool:
    """Whether the content is packed by gzip."""
    with path.open("rb") as file:
        return file.read(2) == _GZIP


def read_nifti(path: Path, *, labels: bool = False) -> tuple[npt.NDArray[Any], Geometry]:
    """Voxels (I, J, K) and their grid: float32 for images, the narrowest integer type for labels.

    Trailing axes of size 1 are dropped. `scl_slope` 0 or NaN means that values are stored as they are (NIfTI-1
    standard, "Data scaling").

    Raises:
        VolumeError: cut short or damaged, not three axes, not one number a voxel, no grid or two that disagree,
            NaN or infinite voxels, labels that are not whole.
    """
    try:
        with _stream(path) as file:
            header = _header(file, path)
            shape = _shape(header, path)
            geometry = _geometry(header, shape, path)
            dtype = _stored_as(header, shape, path)
            file.seek(int(header["vox_offset"]))
            if not labels:
                return _image(file, header, dtype, shape, path), geometry
            ((_, stored),) = _slabs(file, dtype, shape, path, planes=shape[2])
    except _DAMAGED:
        raise VolumeError(f"{path}: the gzip data is cut short or damaged; fetch the file again") from None
    return integral_labels(_scaled(stored, header, path, exact=True), path), geometry


def read_nifti_grid(path: Path) -> Geometry:
    """The grid of the voxels, by the header alone.

    Raises:
        VolumeError: see `read_nifti`; what only the voxels tell is not seen.
    """
    try:
        with _stream(path) as file:
            header = _header(file, path)
    except _DAMAGED:
        raise VolumeError(f"{path}: the gzip data is cut short or damaged; fetch the file again") from None
    return _geometry(header, _shape(header, path), path)


def _stream(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path, "rb")) if is_gzip(path) else path.open("rb")


def _magic(head: bytes) -> bytes:
    sizes = {int.from_bytes(head[:4], "little"), int.from_bytes(head[:4], "big")}
    if 348 in sizes:
        return head[344:348]
    return head[4:8] if 540 in sizes else b""


def _header(file: IO[bytes], path: Path) -> Any:
    head = file.read(540)
    magic = _magic(head)
    if magic in _PAIR:
        raise VolumeError(f"{path}: a header with its voxels in another file; convert it to one .nii.gz")
    size = 540 if magic == b"n+2\0" else 348
    if magic not in _SINGLE_FILE or len(head) < size:
        raise VolumeError(f"{path}: holds no whole NIfTI header; it is cut short, damaged or something else")
    endianness = "<" if int.from_bytes(head[:4], "little") == size else ">"
    return _HEADERS[size](head[:size], endianness=endianness, check=False)


def _shape(header: Any, path: Path) -> tuple[int, int, int]:
    dim = [int(n) for n in header["dim"]]
    if not 1 <= dim[0] <= 7:
        raise VolumeError(f"{path}: the header names {dim[0]} axes; it is damaged")
    sizes = dim[1 : dim[0] + 1]
    while len(sizes) > 3 and sizes[-1] == 1:
        sizes.pop()
    if len(sizes) != 3:
        shown = "x".join(str(n) for n in sizes)
        advice = "write one file a channel or time point" if len(sizes) > 3 else "a volume has three"
        raise VolumeError(f"{path}: {len(sizes)} axes ({shown}); expected three: {advice}")
    shape = sizes[0], sizes[1], sizes[2]
    refuse_oversize(shape, path)
    return shape


def _geometry(header: Any, shape: tuple[int, int, int], path: Path) -> Geometry:
    unit = _UNITS.get(int(header["xyzt_units"]) & 7)
    if unit:
        raise VolumeError(f"{path}: the header counts in {unit}; expected mm: rescale its affine")
    forms = [("sform", header.get_sform), ("qform", header.get_qform)]
    grids = [_grid(name, form, shape, path) for name, form in forms if int(header[f"{name}_code"]) > 0]
    if not grids:
        raise VolumeError(
            f"{path}: neither sform nor qform is set, so nothing says where the voxels lie or which side is left; "
            "convert it again from its source, or set the sform if you know it"
        )
    unlike = grids[0].difference(grids[-1], tolerance_voxels=FORMS_AGREE_VOXELS)
    if unlike and not _is_without_shear(grids[-1], grids[0]):
        raise VolumeError(f"{path}: sform and qform disagree: {unlike}; keep the right one, set the other's code to 0")
    return grids[0]


def _is_without_shear(orthogonal: Geometry, sheared: Geometry) -> bool:
    """Whether the first voxel and the spacings are the same, and no axis is turned by more than the shear."""
    moved_mm = np.linalg.norm(orthogonal.origin_ras_mm - sheared.origin_ras_mm)
    cosines = np.sum(orthogonal.direction_ras * sheared.direction_ras, axis=0)
    return bool(
        sheared.is_sheared
        and moved_mm <= FORMS_AGREE_VOXELS * min(sheared.spacing_mm)
        and np.allclose(orthogonal.spacing_mm, sheared.spacing_mm, rtol=SAME_SPACING)
        and cosines.min() >= np.cos(np.deg2rad(sheared.shear_degrees))
    )


def _grid(name: str, form: Any, shape: tuple[int, int, int], path: Path) -> Geometry:
    try:
        return usable_grid(Geometry(shape, form()))
    except (HeaderDataError, ValueError) as fault:
        raise VolumeError(f"{path}: {name}: {fault}; convert the file again from its source") from None


def _stored_as(header: Any, shape: tuple[int, int, int], path: Path) -> np.dtype[Any]:
    """The type of the stored voxels, when the file can hold as many as the header promises: nothing is allocated for
    a promise before that."""
    try:
        dtype: np.dtype[Any] = header.get_data_dtype()
        plain = dtype.kind in "iuf"
    except (HeaderDataError, KeyError):
        plain = False
    if not plain:
        raise VolumeError(f"{path}: data type {int(header['datatype'])} is not one plain number a voxel")
    start = float(header["vox_offset"])
    if not header["sizeof_hdr"] <= start < MAX_VOXELS:
        raise VolumeError(f"{path}: the header says that voxels begin at byte {start:g}; it is damaged")
    needed = int(start) + math.prod(shape) * dtype.itemsize
    refuse_short_file(needed, path.stat().st_size, path, packed=is_gzip(path))
    return dtype


def _image(
    file: IO[bytes], header: Any, dtype: np.dtype[Any], shape: tuple[int, int, int], path: Path
) -> npt.NDArray[np.float32]:
    """The voxels in float32; as they are stored, and scaled in float64, only a few planes exist at a time."""
    image = np.empty(shape, np.float32, order="F")
    bad = 0
    with np.errstate(over="ignore"):
        for first, stored in _slabs(file, dtype, shape, path, planes=max(1, SLAB_VOXELS // (shape[0] * shape[1]))):
            slab = image[:, :, first : first + stored.shape[2]]
            slab[...] = _scaled(stored, header, path, exact=False)
            bad += slab.size - int(np.count_nonzero(np.isfinite(slab)))
    refuse_not_finite(bad, image.size, path)
    return image


def _slabs(
    file: IO[bytes], dtype: np.dtype[Any], shape: tuple[int, int, int], path: Path, *, planes: int
) -> Iterator[tuple[int, npt.NDArray[Any]]]:
    """The voxels as they are stored from here on, so many planes at a time, each time with the number of the first."""
    plane = shape[0] * shape[1] * dtype.itemsize
    for first in range(0, shape[2], planes):
        count = min(planes, shape[2] - first)
        content = file.read(count * plane)
        if len(content) < count * plane:
            found, needed = first * plane + len(content), shape[2] * plane
            raise VolumeError(f"{path}: {found} of {needed} bytes of voxels; it is cut short: fetch it again")
        yield first, np.frombuffer(content, dtype=dtype).reshape((*shape[:2], count), order="F")
    # At the end of a gzip stream one more read checks its sum over all that came before.
    file.read(1)


def _scaled(stored: npt.NDArray[Any], header: Any, path: Path, *, exact: bool) -> npt.NDArray[Any]:
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0.0 or np.isnan(slope) or (slope == 1.0 and intercept == 0.0):
        return stored.astype(stored.dtype.newbyteorder("="), copy=False)
    if not (np.isfinite(slope) and np.isfinite(intercept)):
        raise VolumeError(f"{path}: scl_slope {slope} and scl_inter {intercept} cannot be applied")
    narrow = stored.dtype.itemsize <= (4 if stored.dtype.kind == "f" else 2)
    measured: npt.NDArray[Any] = stored.astype(np.float32 if narrow and not exact else np.float64)
    np.multiply(measured, slope, out=measured)
    np.add(measured, intercept, out=measured)
    return measured
