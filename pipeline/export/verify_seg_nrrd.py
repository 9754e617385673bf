"""Reads a .seg.nrrd from its bytes, and puts each voxel where the header says it lies.

ITK's reader knows no sheared grids (a tilted gantry makes them), so the text is parsed here.
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.errors import ExportError
from pipeline.export.verify import Sheet, Verification, compare
from pipeline.segmentation import Segmentation
from transforms.labels import Label

PLACING_VOXELS = 1e-3
"""How far a voxel may lie from its centre: the header holds numbers to the last bit."""

_DTYPES = {"unsigned char": "<u1", "unsigned short": "<u2"}
_FIELD = re.compile(r"([^:]+): (.*)")
_PAIR = re.compile(r"([^:]+):=(.*)")
_SEGMENT_ID = re.compile(r"Segment(\d+)_ID")


@dataclass(frozen=True, eq=False)
class _File:
    fields: Mapping[str, str]
    pairs: Mapping[str, str]
    voxels: npt.NDArray[Any]


def verify_seg_nrrd(path: Path, segmentation: Segmentation) -> Verification:
    """Compare a .seg.nrrd with what was to be written: segments and voxels.

    Raises:
        ExportError: anything differs.
    """
    found = _read(path)
    _check_segments(found.pairs, segmentation)
    return compare(_sheets(found), segmentation, reader="bytes", placing_voxels=PLACING_VOXELS)


def _read(path: Path) -> _File:
    head, _, packed = path.read_bytes().partition(b"\n\n")
    lines = [line for line in head.decode().split("\n")[1:] if not line.startswith("#")]
    pairs = {match[1]: match[2] for match in map(_PAIR.fullmatch, lines) if match}
    fields = {match[1]: match[2] for match in map(_FIELD.fullmatch, lines) if match}
    expected = {"space": "left-posterior-superior", "endian": "little", "encoding": "gzip", "dimension": "3"}
    for key, value in expected.items():
        if fields.get(key) != value:
            raise ExportError(f"its '{key}' is {fields.get(key)}, not {value}")
    shape = [int(n) for n in fields["sizes"].split()]
    voxels = np.frombuffer(gzip.decompress(packed), _DTYPES[fields["type"]])
    return _File(fields, pairs, voxels.reshape(shape, order="F"))


def _check_segments(pairs: Mapping[str, str], segmentation: Segmentation) -> None:
    """Label values, names, codes and colours are the schema's, in its order."""
    numbers = [int(match[1]) for match in map(_SEGMENT_ID.fullmatch, pairs) if match]
    if numbers != list(range(len(segmentation.schema.labels))):
        raise ExportError("its segments are not the schema's labels")
    if len({pairs[f"Segment{n}_ID"] for n in numbers}) != len(numbers):
        raise ExportError("two of its segments share an identifier")
    for n, label in enumerate(segmentation.schema.labels):
        if not _describes(n, pairs, label):
            raise ExportError(f"segment {n} has another label value, name, code or colour than the schema")


def _describes(n: int, pairs: Mapping[str, str], label: Label) -> bool:
    colour = [round(255 * float(part)) for part in pairs[f"Segment{n}_Color"].split()]
    tags = dict(tag.split(":", 1) for tag in _plain(pairs[f"Segment{n}_Tags"]).split("|") if tag)
    _, category, code, *_ = (tuple(part.split("^")) for part in tags["TerminologyEntry"].split("~"))
    return (
        (pairs[f"Segment{n}_LabelValue"], pairs[f"Segment{n}_Layer"]) == (str(label.id), "0")
        and (_plain(pairs[f"Segment{n}_Name"]), tuple(colour)) == (label.name, label.colour)
        and category == (label.category.scheme, label.category.value, label.category.meaning)
        and code == (label.code.scheme, label.code.value, label.code.meaning)
    )


def _plain(text: str) -> str:
    return re.sub(r"\\(.)", lambda match: "\n" if match[1] == "n" else match[1], text)


def _sheets(found: _File) -> Iterator[Sheet]:
    i_mm, j_mm, k_mm = (_vector(part) for part in found.fields["space directions"].split())
    first_mm = _vector(found.fields["space origin"])
    volume_mm3 = float(abs(np.dot(np.cross(i_mm, j_mm), k_mm)))
    for k in range(found.voxels.shape[2]):
        yield Sheet(found.voxels[:, :, k], first_mm + k * k_mm, i_mm, j_mm, volume_mm3)


def _vector(text: str) -> npt.NDArray[np.float64]:
    return np.array([float(part) for part in text.strip("()").split(",")])
