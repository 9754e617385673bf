"""One preprocessed case on disk: written whole, checked when it is opened, its voxels mapped rather than read.

The SHA-256 of every file stands in `digests.json`. They are compared each time an entry is opened, once a run: bits
that rot leave size and date as they were, so nothing that is remembered could stand in for it. It costs 0.7 s a GB
(0.07 s for 208 hippocampus cases) once the bytes have been read. What else a training wants to know of whole volumes
at its start is found on this occasion, so that it reads an entry once.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import math
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.files import explain_os_error, sha256_of_file, share_as_new
from transforms.channels import channel_minima
from transforms.geometry import Geometry

ARRAYS = ("image", "classes", "positions")
GEOMETRY, DIGESTS = "geometry.json", "digests.json"


class DamagedEntry(Exception):
    """An entry that does not hold what was written; says which file, in a few words."""


@dataclass(frozen=True, eq=False)
class PreparedCase:
    """A case on the plan's grid. `image` (C, I, J, K) float32 and `classes` (1, I, J, K) are memory-mapped.

    `annotated` (class_count,) bool is False where a class was not annotated; None means that all were. `present` (C,)
    is False for a channel that the case lacks, which is 0 everywhere; None means that it has all. `entry` is the
    folder that it is mapped from, if any; another process that is handed the case maps the same files. What was found
    when it was opened: `minima` (C,), the lowest value of each channel, and `digests`, see `voxel_digests`.
    """

    case_id: str
    geometry: Geometry
    image: Tensor
    classes: Tensor
    positions: npt.NDArray[np.int32]
    annotated: Tensor | None = None
    entry: Path | None = None
    present: tuple[bool, ...] | None = None
    minima: Tensor | None = None
    digests: tuple[str, str] | None = None

    def voxel_digests(self) -> tuple[str, str]:
        """Hex SHA-256 of image and classes as an entry's files hold them."""
        return self.digests or (_digest(self.image.numpy()), _digest(self.classes.numpy()))

    def values(self) -> dict[str, Any]:
        """What `from_values` makes the case from in another process: where its voxels lie, or these if they lie
        nowhere."""
        arrays = {"image": self.image, "classes": self.classes, "positions": torch.from_numpy(self.positions)}
        return {
            "case_id": self.case_id,
            "geometry": self.geometry.to_json(),
            "annotated": self.annotated,
            "present": self.present,
            **(arrays if self.entry is None else {"entry": str(self.entry)}),
        }

    @classmethod
    def from_values(cls, values: dict[str, Any]) -> PreparedCase:
        """The inverse of `values`, with the same files mapped."""
        geometry = Geometry.from_json(values["geometry"])
        if "entry" not in values:
            return cls(**{**values, "geometry": geometry, "positions": values["positions"].numpy()})
        entry = Path(values["entry"])
        return cls(**{**values, "geometry": geometry, "entry": entry, **_arrays(entry)})


def publish(entry: Path, arrays: dict[str, npt.NDArray[Any]], geometry: Geometry) -> None:
    """Write an entry beside its place and move it there as a whole.

    Raises:
        RunError: the folder cannot be written or the disk is full.
    """
    temporary: Path | None = None
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".making-", dir=entry.parent))
        for name, array in arrays.items():
            _save_array(temporary / f"{name}.npy", array)
        (temporary / GEOMETRY).write_text(json.dumps(geometry.to_json()))
        digests = {path.name: sha256_of_file(path) for path in sorted(temporary.iterdir())}
        (temporary / DIGESTS).write_text(json.dumps(digests))
        share_as_new(temporary)
        try:
            temporary.rename(entry)
        except OSError as error:
            # Another process was first; its entry is the same.
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    except OSError as error:
        raise explain_os_error(error, entry) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def open_entry(entry: Path, case_id: str) -> PreparedCase:
    """The case in a folder that `publish` made.

    Raises:
        DamagedEntry: a file is missing, cut short or changed.
    """
    digests = _compare_digests(entry)
    try:
        geometry = Geometry.from_json(json.loads((entry / GEOMETRY).read_text()))
        arrays = _arrays(entry)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedEntry(f"cannot be read ({type(error).__name__})") from error
    # Its bytes have just been read, so that the disk is not asked for them again.
    minima = channel_minima(arrays["image"])
    return PreparedCase(case_id, geometry, **arrays, entry=entry, minima=minima, digests=digests)


def remove(entry: Path) -> None:
    """Take an entry away; who has it mapped keeps it.

    Raises:
        RunError: the folder cannot be written.
    """
    try:
        # Moved aside first, so that nobody finds a part of it under its name.
        aside = Path(tempfile.mkdtemp(prefix=".damaged-", dir=entry.parent))
        entry.rename(aside / entry.name)
        shutil.rmtree(aside, ignore_errors=True)
    except FileNotFoundError:
        return  # another process was first
    except OSError as error:
        raise explain_os_error(error, entry) from error


def _compare_digests(entry: Path) -> tuple[str, str]:
    """Those of image and classes."""
    try:
        digests = json.loads((entry / DIGESTS).read_text())
        expected = {GEOMETRY: digests[GEOMETRY], **{f"{name}.npy": digests[f"{name}.npy"] for name in ARRAYS}}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedEntry(f"{DIGESTS} cannot be read") from error
    for name, digest in expected.items():
        try:
            found = sha256_of_file(entry / name)
        except OSError as error:
            raise DamagedEntry(f"{name} cannot be read") from error
        if found != digest:
            raise DamagedEntry(f"{name} is not as it was written")
    return expected["image.npy"], expected["classes.npy"]


def _arrays(entry: Path) -> dict[str, Any]:
    image, classes, positions = (_map_array(entry / f"{name}.npy") for name in ARRAYS)
    return {"image": image, "classes": classes, "positions": positions.numpy()}


def _map_array(path: Path) -> Tensor:
    """A .npy file as a tensor whose pages are read when touched and copied when written.

    `np.memmap` would keep a file descriptor for each, and most systems allow a process 1,024.
    """
    with path.open("rb") as stream:
        np.lib.format.read_magic(stream)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
        start = stream.tell()
    if fortran or path.stat().st_size != start + dtype.itemsize * math.prod(shape):
        raise ValueError(f"{path.name} is not as it was written")
    voxels = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
    return voxels[start:].view(getattr(torch, dtype.name)).reshape(shape)


def _save_array(path: Path, array: npt.NDArray[Any]) -> None:
    """As `np.save`, which does not say why it could write only a part."""
    with path.open("wb") as stream:
        stream.write(_header(array))
        stream.write(np.ascontiguousarray(array).data)


def _digest(array: npt.NDArray[Any]) -> str:
    """Of the file that `_save_array` would write."""
    digest = hashlib.sha256(_header(array))
    digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _header(array: npt.NDArray[Any]) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, np.lib.format.header_data_from_array_1_0(array))
    return stream.getvalue()
