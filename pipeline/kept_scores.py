"""The few most likely outputs of each voxel, on the network's grid: enough to decide again without the network.

What is not kept of a voxel's probability, 1 minus the sum of what is, counts as spread evenly over the other classes,
none of which gets as much as the least likely that is kept. Of equals the class that won is still the first, so that
one study's scores decide the same again wherever nothing is interpolated. Where something is, a voxel can differ if two
classes are closer than the levels are. Of models whose logits are interpolated, as those of nnU-Net, probabilities are
here: borders then lie elsewhere by part of a voxel. Of regions, each a yes or no of its own, all are kept.
"""

from __future__ import annotations

import json
import math
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.lib.format as npy
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.errors import VolumeError
from pipeline.files import atomic_path
from transforms.geometry import Geometry
from transforms.labels import LabelSchema
from transforms.restore import SlabRestorer, slab_axis
from transforms.sanity import MAX_VOXELS

SUFFIX = ".scores.npz"

LEVELS = 255
"""Probabilities are multiples of one part in this: an odd number, so that none is exactly a half."""

_FORMAT = "volseg-scores-1"

_MOST_HEADER_BYTES = 1 << 26
"""Of what is not voxels: more than as many labels take as there can be."""

Places = npt.NDArray[Any]


@dataclass(frozen=True)
class Grids:
    """Where scores lie, and how they come to the study: as `preparing.Prepared` has it, with the study's own grid."""

    grid: Geometry
    field: Geometry
    box: Geometry
    source: Geometry

    def to_json(self) -> dict[str, Any]:
        """A JSON value that `from_json` restores."""
        return {name: getattr(self, name).to_json() for name in ("grid", "field", "box", "source")}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Grids:
        """The inverse of `to_json`.

        Raises:
            ValueError, LookupError, TypeError: the value is something else, or scores cannot come this way.
        """
        grids = cls(*(Geometry.from_json(value[name]) for name in ("grid", "field", "box", "source")))
        for name in ("grid", "field", "box", "source"):
            if math.prod(getattr(grids, name).shape) > MAX_VOXELS:
                raise ValueError(f"{name}: more than {MAX_VOXELS} voxels")
        SlabRestorer(grids.grid, grids.field, slab_axis(grids.grid, grids.field))
        if not grids.box.axis_map(grids.source).is_exact:
            raise ValueError("box: its voxels are not some of the source's")
        return grids

    def difference(self, other: Grids) -> str | None:
        """How they differ, None if they do not."""
        return self.source.difference(other.source) or self.grid.difference(other.grid)


@dataclass(frozen=True, eq=False)
class KeptScores:
    """`outputs` (K, I, J, K) are the numbers of the most likely outputs, the likeliest first, and `levels` of the same
    shape their probabilities times `LEVELS`; an output with a level of 0 says nothing. For K see `kept_count`.
    `made_by` is the name and the version of what a `Segmentation` calls its algorithm; `models` are digests."""

    outputs: Places
    levels: npt.NDArray[np.uint8]
    grids: Grids
    schema: LabelSchema
    made_by: tuple[str, str]
    models: tuple[str, ...]

    def dense(self, axis: int, first: int, stop: int) -> Tensor:
        """Probabilities (O, I, J, K) float32 of the planes [first, stop) along an axis."""
        planes = tuple(slice(first, stop) if a == axis else slice(None) for a in range(3))
        levels = torch.from_numpy(np.ascontiguousarray(self.levels[(slice(None), *planes)]))
        numbers = torch.from_numpy(self.outputs[(slice(None), *planes)].astype(np.int64))
        kept, count = len(levels), self.schema.output_count
        left = torch.zeros(levels.shape[1:])
        if not self.schema.regions and count > kept:
            left = (LEVELS - levels.sum(dim=0, dtype=torch.float32)).div_(count - kept)
            # Where all are nearly as likely, rounding would put what is left above what won.
            left = torch.minimum(left, levels[-1] - 0.25).clamp_min_(0).div_(LEVELS)
        scores = left.expand(count, *left.shape).clone()
        # The likeliest is written last: what says nothing is written to its place, and gone then.
        for rank in reversed(range(kept)):
            number = torch.where(levels[rank] > 0, numbers[rank], numbers[0])
            scores.scatter_(0, number[None], (levels[rank].float() + self.above(rank)).div_(LEVELS)[None])
        return scores

    def above(self, rank: int) -> float:
        """What is added to the level of a rank, so that of equals the first wins; less than there is between two."""
        kept = len(self.levels)
        return 0.0 if self.schema.regions else 0.25 * (kept - 1 - rank) / kept


def kept_count(schema: LabelSchema, count: int) -> int:
    """How many outputs of a voxel are kept where `count` are asked for: of regions all, since each that is not kept
    would be taken for a no."""
    return schema.output_count if schema.regions and count else min(count, schema.output_count)


class Keeper:
    """Takes probabilities plane by plane and holds the most likely of each voxel."""

    def __init__(self, shape: Sequence[int], schema: LabelSchema, count: int) -> None:
        self._schema = schema
        kept = kept_count(schema, count)
        self.outputs: Places = np.zeros((kept, *shape), dtype=np.uint8 if schema.output_count <= 256 else np.uint16)
        self.levels = np.zeros((kept, *shape), dtype=np.uint8)

    def add(self, axis: int, number: int, probabilities: Tensor) -> None:
        """Those (O, A, B) of plane `number` along an axis of the volume; they are not kept."""
        place: list[slice | int] = [number if a == axis else slice(None) for a in range(3)]
        rest = probabilities.clone()
        for outputs, levels in zip(self.outputs, self.levels, strict=True):
            # The first of equals, as where labels are decided.
            best, winner = rest.max(dim=0)
            # Half a level is none: a region of exactly a half is not over it.
            level = best.mul(LEVELS).sub_(0.5).ceil_().clamp_(0, LEVELS).to(torch.uint8)
            outputs[tuple(place)] = winner.masked_fill_(level == 0, 0).numpy(force=True)
            levels[tuple(place)] = level.numpy(force=True)
            rest.scatter_(0, winner[None], -1.0)

    def kept(self, grids: Grids, made_by: tuple[str, str], models: Sequence[str]) -> KeptScores:
        """What was held, with what it takes to make a label map of it."""
        return KeptScores(self.outputs, self.levels, grids, self._schema, made_by, tuple(models))


def kept_scores_bytes(voxel_count: int, schema: LabelSchema, count: int) -> int:
    """What a `Keeper` holds of so many voxels."""
    return voxel_count * kept_count(schema, count) * (2 if schema.output_count <= 256 else 3)


def write_scores(path: Path, scores: KeptScores) -> None:
    """Write a .npz file without pickles: `outputs`, `levels`, and `header`, which is JSON in UTF-8.

    Raises:
        RunError: the file cannot be written.
    """
    header = {
        "format": _FORMAT,
        "levels": LEVELS,
        "grids": scores.grids.to_json(),
        "schema": scores.schema.model_dump(mode="json"),
        "made_by": list(scores.made_by),
        "models": list(scores.models),
    }
    text = np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        np.savez_compressed(stream, outputs=scores.outputs, levels=scores.levels, header=text)


@dataclass(frozen=True)
class ScoresHeader:
    """What a file of scores says before its arrays; the fields are those of `KeptScores`."""

    grids: Grids
    schema: LabelSchema
    made_by: tuple[str, str]
    models: tuple[str, ...]


def read_header(path: Path) -> ScoresHeader:
    """What `read_scores` gives but for the arrays, which are not read.

    Raises:
        VolumeError: as `read_scores`.
    """
    with _opened(path) as archive:
        return _header(archive)


def read_scores(path: Path) -> KeptScores:
    """The inverse of `write_scores`.

    Raises:
        VolumeError: not such a file, damaged, or it contradicts itself.
    """
    with _opened(path) as archive:
        header = _header(archive)
        _check(header, _array_header(archive, "outputs"), _array_header(archive, "levels"))
        outputs, levels = (_array(archive, name) for name in ("outputs", "levels"))
        if int(outputs.max()) >= header.schema.output_count:
            raise _Wrong(f"an output {int(outputs.max())} of {header.schema.output_count}")
    return KeptScores(outputs, levels, header.grids, header.schema, header.made_by, header.models)


_DAMAGE = (ValueError, LookupError, TypeError, ArithmeticError, RuntimeError, EOFError)
"""What parsers of damaged bytes and numbers raise."""


class _Wrong(ValueError):
    """What a file contradicts itself in."""


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    """The archive; what is wrong with it, or found wrong with what is in it, is told in one line."""
    wrong = f"{path}: no kept scores of `volseg predict --keep-scores`"
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except _Wrong as error:
        raise VolumeError(f"{wrong}: {error}") from error
    except OSError as error:
        raise VolumeError(f"{path}: cannot be read ({error.strerror or 'cut short'})") from error
    except (*_DAMAGE, zipfile.BadZipFile, zlib.error) as error:
        raise VolumeError(f"{wrong}; it is damaged or something else ({type(error).__name__})") from error


def _header(archive: zipfile.ZipFile) -> ScoresHeader:
    shape, dtype = _array_header(archive, "header")
    if dtype != np.uint8 or math.prod(shape) > _MOST_HEADER_BYTES:
        raise _Wrong(f"a header of {shape} {dtype}")
    found = json.loads(bytes(_array(archive, "header")))
    if found["format"] != _FORMAT or found["levels"] != LEVELS:
        raise _Wrong("not as this version writes them; predict again")
    name, version = map(str, found["made_by"])
    schema = LabelSchema.model_validate(found["schema"])
    return ScoresHeader(Grids.from_json(found["grids"]), schema, (name, version), tuple(map(str, found["models"])))


ArrayHeader = tuple[tuple[int, ...], np.dtype[Any]]


def _check(header: ScoresHeader, outputs: ArrayHeader, levels: ArrayHeader) -> None:
    kept = levels[0][0] if levels[0] else 0
    shape = (kept, *header.grids.grid.shape)
    if outputs[0] != shape or levels[0] != shape or not kept or kept_count(header.schema, kept) != kept:
        raise _Wrong(f"arrays of {outputs[0]} and {levels[0]} for {shape[1:]}")
    if levels[1] != np.uint8 or outputs[1] not in (np.uint8, np.uint16):
        raise _Wrong(f"arrays of {outputs[1]} and {levels[1]}")


def _array_header(archive: zipfile.ZipFile, name: str) -> ArrayHeader:
    """Shape and type by the first bytes of a member: nothing is unpacked that is not known to fit."""
    with archive.open(f"{name}.npy") as member:
        read = npy.read_array_header_1_0 if npy.read_magic(member) == (1, 0) else npy.read_array_header_2_0
        shape, _, dtype = read(member)
        return tuple(shape), dtype


def _array(archive: zipfile.ZipFile, name: str) -> npt.NDArray[Any]:
    with archive.open(f"{name}.npy") as member:
        return np.asarray(npy.read_array(member, allow_pickle=False))
