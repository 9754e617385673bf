"""Preprocessed cases on disk, and the batches that are cut out of them.

A cache entry is a folder named by what it is made from: the bytes of the case's files, the plan's preprocessing,
the label ids and the code of the chain. An entry is whole or not there; two processes may make the same at once.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

import transforms
from pipeline.batch import Batch, collate
from pipeline.config import AugmentConfig
from pipeline.errors import RunError, VolsegError, VolumeError
from pipeline.files import explain_os_error, sha256_of_file, sha256_of_json, share_as_new
from pipeline.manifest import Case, Dataset
from pipeline.plan import Plan
from transforms.augment import IntensitySettings, SpatialSettings
from transforms.chains import plain, preprocess_chain, reseed, training_chain
from transforms.geometry import Geometry
from transforms.labels import LabelSchema
from transforms.load import geometry_of
from transforms.patches import class_positions

PREPROCESSING_MODULES = (
    "geometry",
    "resample",
    "load",
    "volume",
    "nifti",
    "itk_files",
    "dicom",
    "intensity",
    "intensity_spec",
    "labels",
    "patches",
    "chains",
)
"""Modules of `transforms` whose code decides what a preprocessed case looks like."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class PreparedCase:
    """A case on the plan's grid. `image` (C, I, J, K) float32 and `classes` (1, I, J, K) are memory-mapped.

    `annotated` (class_count,) bool is False where a class was not annotated; None means that all were.
    """

    case_id: str
    geometry: Geometry
    image: Tensor
    classes: Tensor
    positions: npt.NDArray[np.int32]
    annotated: Tensor | None = None


@dataclass(frozen=True)
class Failure:
    """A case that was set aside, and why, in one line."""

    case_id: str
    reason: str


def prepare_cases(
    dataset: Dataset, cases: Sequence[Case], plan: Plan, cache: Path, *, workers: int, on_progress: Progress
) -> tuple[list[PreparedCase], list[Failure]]:
    """Every case from the cache, made first where it is missing; a case that fails is set aside and named."""
    prepared: list[PreparedCase] = []
    failures: list[Failure] = []
    with ThreadPoolExecutor(max_workers=max(1, workers)) as pool:
        futures = [pool.submit(prepare_case, dataset, case, plan, cache) for case in cases]
        try:
            for done, (case, future) in enumerate(zip(cases, futures, strict=True), start=1):
                try:
                    prepared.append(future.result())
                except RunError:
                    raise
                except VolsegError as error:
                    failures.append(Failure(case.case_id, str(error)))
                on_progress(done, len(cases))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    return prepared, failures


def prepare_case(dataset: Dataset, case: Case, plan: Plan, cache: Path) -> PreparedCase:
    """One annotated case from the cache, made first if it is missing.

    Raises:
        VolsegError: a file cannot be read or does not fit; RunError when the cache cannot be written.
    """
    label = dataset.label_path(case)
    if label is None:
        raise RunError(f"case {case.case_id} has no label, so it cannot be trained on")
    key = _key([*dataset.image_paths(case), label], plan, dataset.manifest.labels)
    entry = cache / key[:2] / key
    if not entry.is_dir():
        _make_entry(entry, dataset, case, plan)
    return _open_entry(entry, case.case_id)


def content_digest(path: Path) -> str:
    """Hex SHA-256 of a file, or of all files of a folder (a DICOM series) whatever their names."""
    if not path.exists():
        raise RunError(f"{path}: no such file or folder; run `volseg check` on the manifest")
    if path.is_dir():
        return sha256_of_json(sorted(sha256_of_file(p) for p in path.rglob("*") if p.is_file()))
    return sha256_of_file(path)


@lru_cache(maxsize=1)
def code_digest() -> str:
    """Hex SHA-256 of the source of every module that preprocessing runs through."""
    folder = Path(transforms.__file__).parent
    return sha256_of_json([sha256_of_file(p) for n in PREPROCESSING_MODULES for p in sorted(folder.glob(f"{n}*.py"))])


class Patches:
    """Batches of augmented patches, each a function of the seed and its number alone."""

    def __init__(
        self,
        cases: Sequence[PreparedCase],
        plan: Plan,
        *,
        augment: AugmentConfig,
        twin_classes: Sequence[int],
        foreground_share: float,
        seed: int,
    ) -> None:
        if not cases:
            raise RunError("there is no case to train on")
        self.cases = tuple(cases)
        self.batch_size = plan.batch_size
        self.seed = seed
        self._minima = [float(case.image.min()) for case in self.cases]
        every = torch.ones(plan.class_count, dtype=torch.bool)
        self._annotated = [every if case.annotated is None else case.annotated for case in self.cases]
        self._chain = training_chain(
            plan.patch_shape,
            plan.spacing_mm,
            spatial=spatial_settings(augment, plan),
            intensity=intensity_settings(augment),
            twin_classes=twin_classes,
            foreground_share=foreground_share,
        )

    def batch(self, step: int) -> Batch:
        """The patches of update number `step`."""
        numbers = range(step * self.batch_size, (step + 1) * self.batch_size)
        return collate([self._patch(number) for number in numbers])

    def _patch(self, number: int) -> dict[str, Any]:
        epoch, place = divmod(number, len(self.cases))
        index = int(_order(self.seed, epoch, len(self.cases))[place])
        case = self.cases[index]
        reseed(self._chain, [self.seed, 1, number])
        data = {"image": case.image, "label": case.classes, "positions": case.positions, "fill": self._minima[index]}
        patch: dict[str, Any] = self._chain(data)
        return {**patch, "annotated": self._annotated[index], "case_id": case.case_id}


def spatial_settings(augment: AugmentConfig, plan: Plan) -> SpatialSettings:
    """The spatial part of the config; mirror axes are the plan's unless the config names its own."""
    values = augment.model_dump(include={f for f in SpatialSettings.__dataclass_fields__ if f != "mirror_axes"})
    mirror = plan.mirror_axes if augment.mirror_axes == "auto" else augment.mirror_axes
    return SpatialSettings(**values, mirror_axes=mirror)


def intensity_settings(augment: AugmentConfig) -> IntensitySettings:
    """The intensity part of the config."""
    return IntensitySettings(**augment.model_dump(include=set(IntensitySettings.__dataclass_fields__)))


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, count: int) -> npt.NDArray[np.int64]:
    """Each epoch sees every case once."""
    return np.random.default_rng([seed, 2, epoch]).permutation(count)


def _key(files: Sequence[Path], plan: Plan, schema: LabelSchema) -> str:
    return sha256_of_json(
        {
            "files": [content_digest(path) for path in files],
            "preprocessing": plan.preprocessing(),
            "label_ids": list(schema.ids),
            "code": code_digest(),
        }
    )


def _make_entry(entry: Path, dataset: Dataset, case: Case, plan: Plan) -> None:
    schema = dataset.manifest.labels
    chain = preprocess_chain(
        axis_codes=plan.axis_codes, spacing_mm=plan.spacing_mm, normalisations=plan.normalisations, schema=schema
    )
    data = apply_chain(chain, {"image": dataset.image_paths(case), "label": dataset.label_path(case)})
    image, classes = plain(data["image"]).numpy(), plain(data["label"]).numpy()
    arrays = {
        "image": np.ascontiguousarray(image),
        "classes": np.ascontiguousarray(classes),
        "positions": class_positions(classes[0], class_count=schema.class_count),
    }
    _publish(entry, arrays, geometry_of(data["image"]))


def apply_chain(chain: Callable[[Any], Any], data: dict[str, Any]) -> dict[str, Any]:
    """Run a Compose; the one-line error of the step that failed comes through, not MONAI's wrapping of it.

    Raises:
        VolumeError: what a step refused.
    """
    try:
        result: dict[str, Any] = chain(data)
    except (RuntimeError, ValueError) as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, ValueError):
            cause = cause.__cause__
        if cause is None:
            raise
        if isinstance(cause, VolsegError):
            raise cause from error
        raise VolumeError(str(cause)) from error
    return result


def _publish(entry: Path, arrays: dict[str, npt.NDArray[Any]], geometry: Geometry) -> None:
    temporary: Path | None = None
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".making-", dir=entry.parent))
        for name, array in arrays.items():
            _save_array(temporary / f"{name}.npy", array)
        (temporary / "geometry.json").write_text(json.dumps(geometry.to_json()))
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


def _save_array(path: Path, array: npt.NDArray[Any]) -> None:
    """As `np.save`, which does not say why it could write only a part."""
    with path.open("wb") as stream:
        np.lib.format.write_array_header_1_0(stream, np.lib.format.header_data_from_array_1_0(array))
        stream.write(np.ascontiguousarray(array).data)


def _open_entry(entry: Path, case_id: str) -> PreparedCase:
    try:
        image = np.load(entry / "image.npy", mmap_mode="c", allow_pickle=False)
        classes = np.load(entry / "classes.npy", mmap_mode="c", allow_pickle=False)
        positions = np.load(entry / "positions.npy", allow_pickle=False)
        geometry = Geometry.from_json(json.loads((entry / "geometry.json").read_text()))
        if not geometry.shape == image.shape[1:] == classes.shape[1:]:
            raise ValueError(f"voxels of {image.shape} and {classes.shape} on a grid of {geometry.shape}")
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{entry}: a damaged cache entry ({type(error).__name__}); delete this folder") from error
    return PreparedCase(case_id, geometry, torch.from_numpy(image), torch.from_numpy(classes), positions)


def dataset_digest(prepared: Sequence[PreparedCase]) -> str:
    """Short hex digest of what a run is trained on, for trackers."""
    digest = hashlib.sha256()
    for case in sorted(prepared, key=lambda c: c.case_id):
        digest.update(np.ascontiguousarray(case.image.numpy()).tobytes())
        digest.update(np.ascontiguousarray(case.classes.numpy()).tobytes())
    return digest.hexdigest()[:16]


def describe_failures(failures: Sequence[Failure]) -> list[dict[str, str]]:
    """JSON rows of cases that were set aside."""
    return [asdict(failure) for failure in failures]
