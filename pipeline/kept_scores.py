"""The few most likely outputs of each voxel, on the network's grid: enough to decide again without the network.

What is not kept of a voxel's probability, 1 minus the sum of what is, counts as spread evenly over the other classes.
Of equals the class that won is still the first, so that one study's scores decide the same again wherever nothing is
interpolated. Where something is, a voxel can differ if two classes are closer than the levels are. Of models whose
logits are interpolated, as those of nnU-Net, probabilities are here: borders then lie elsewhere by part of a voxel.
"""

from __future__ import annotations

import json
import math
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.errors import VolumeError
from pipeline.files import atomic_path
from transforms.geometry import Geometry
from transforms.labels import LabelSchema
from transforms.sanity import MAX_VOXELS

SUFFIX = ".scores.npz"

LEVELS = 255
"""Probabilities are multiples of one part in this: an odd number, so that none is exactly a half."""

_FORMAT = "volseg-scores-1"
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
        """The inverse of `to_json`."""
        return cls(*(Geometry.from_json(value[name]) for name in ("grid", "field", "box", "source")))

    def difference(self, other: Grids) -> str | None:
        """How they differ, None if they do not."""
        return self.source.difference(other.source) or self.grid.difference(other.grid)


@dataclass(frozen=True, eq=False)
class KeptScores:
    """`outputs` (K, I, J, K) are the numbers of the most likely outputs, the likeliest first, and `levels` of the same
    shape their probabilities times `LEVELS`; an output with a level of 0 says nothing. `made_by` is the name and the
    version of what a `Segmentation` calls its algorithm; `models` are digests."""

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
            left = (LEVELS - levels.sum(dim=0, dtype=torch.float32)).clamp_min_(0).div_(LEVELS * (count - kept))
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


class Keeper:
    """Takes probabilities plane by plane and holds the most likely of each voxel."""

    def __init__(self, shape: Sequence[int], schema: LabelSchema, count: int) -> None:
        self._schema = schema
        kept = min(count, schema.output_count)
        self.outputs: Places = np.zeros((kept, *shape), dtype=np.uint8 if schema.output_count <= 256 else np.uint16)
        self.levels = np.zeros((kept, *shape), dtype=np.uint8)

    def add(self, axis: int, number: int, probabilities: Tensor) -> None:
        """Those (O, A, B) of plane `number` along an axis of the volume; they are not kept."""
        place: list[slice | int] = [number if a == axis else slice(None) for a in range(3)]
        rest = probabilities.clone()
        for outputs, levels in zip(self.outputs, self.levels, strict=True):
            # The first of equals, as where labels are decided.
            best, winner = rest.max(dim=0)
            level = best.mul(LEVELS).round_().clamp_(0, LEVELS).to(torch.uint8)
            outputs[tuple(place)] = winner.masked_fill_(level == 0, 0).numpy(force=True)
            levels[tuple(place)] = level.numpy(force=True)
            rest.scatter_(0, winner[None], -1.0)

    def kept(self, grids: Grids, made_by: tuple[str, str], models: Sequence[str]) -> KeptScores:
        """What was held, with what it takes to make a label map of it."""
        return KeptScores(self.outputs, self.levels, grids, self._schema, made_by, tuple(models))


def kept_bytes(voxel_count: int, output_count: int, count: int) -> int:
    """What a `Keeper` holds of so many voxels."""
    return voxel_count * min(count, output_count) * (2 if output_count <= 256 else 3)


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


def read_scores(path: Path) -> KeptScores:
    """The inverse of `write_scores`.

    Raises:
        VolumeError: not such a file, damaged, or it contradicts itself.
    """
    wrong = f"{path}: no kept scores of `volseg predict --keep-scores`"
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
            header = json.loads(bytes(arrays["header"]))
            if header["format"] != _FORMAT or header["levels"] != LEVELS:
                raise VolumeError(f"{wrong} as this version writes them; predict again")
            grids = Grids.from_json(header["grids"])
            schema = LabelSchema.model_validate(header["schema"])
            if math.prod(grids.grid.shape) > MAX_VOXELS:
                raise VolumeError(f"{wrong}: a grid of {grids.grid.shape}")
            name, version = map(str, header["made_by"])
            models = tuple(map(str, header["models"]))
            found = KeptScores(arrays["outputs"], arrays["levels"], grids, schema, (name, version), models)
    except OSError as error:
        raise VolumeError(f"{path}: cannot be read ({error.strerror or 'cut short'})") from error
    except (ValueError, LookupError, TypeError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise VolumeError(f"{wrong}; it is damaged or something else ({type(error).__name__})") from error
    _check(found, wrong)
    return found


def _check(scores: KeptScores, wrong: str) -> None:
    shape = (len(scores.levels), *scores.grids.grid.shape)
    if scores.levels.shape != shape or scores.outputs.shape != shape or not len(scores.levels):
        raise VolumeError(f"{wrong}: arrays of {scores.outputs.shape} and {scores.levels.shape} for {shape}")
    if scores.levels.dtype != np.uint8 or scores.outputs.dtype not in (np.uint8, np.uint16):
        raise VolumeError(f"{wrong}: arrays of {scores.outputs.dtype} and {scores.levels.dtype}")
    if int(scores.outputs.max()) >= scores.schema.output_count:
        raise VolumeError(f"{wrong}: an output {int(scores.outputs.max())} of {scores.schema.output_count}")
