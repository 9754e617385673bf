"""Preprocessed cases on disk, and the batches that are cut out of them.

A cache entry is a folder named by what it is made from: the bytes of the case's files, the plan's preprocessing,
the label ids and the code of the chain. An entry is whole or not there; two processes may make the same at once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

import transforms
from pipeline.batch import Batch, collate
from pipeline.cache_entry import DamagedEntry, open_entry, publish, remove
from pipeline.cache_entry import PreparedCase as PreparedCase
from pipeline.config import AugmentConfig
from pipeline.console import Console, Silence
from pipeline.errors import ConfigError, RunError, VolsegError, VolumeError
from pipeline.failures import Failure
from pipeline.files import sha256_of_file, sha256_of_json
from pipeline.manifest import Case, Dataset
from pipeline.plan import Plan
from transforms.annotation import Annotation
from transforms.augment import IntensitySettings, SpatialSettings
from transforms.chains import plain, preprocess_chain, reseed, training_chain
from transforms.channels import channel_minima
from transforms.load import geometry_of
from transforms.patches import class_positions
from transforms.steps import RandDropChannelsd

PREPROCESSING_MODULES = (
    "geometry",
    "resample",
    "separable",
    "spline",
    "shear",
    "restore",
    "cells",
    "load",
    "volume",
    "nifti",
    "itk_files",
    "dicom",
    "intensity",
    "intensity_spec",
    "labels",
    "annotation",
    "patches",
    "placing",
    "channels",
    "preprocessing",
    "steps",
    "chains",
)
"""Modules of `transforms` whose code decides what a preprocessed case looks like."""

SILENCE = Silence()

CHANNEL_DROPOUT = 0.3
"""How often an optional channel is left out of a patch where the config says `auto`."""


def prepare_cases(
    dataset: Dataset, cases: Sequence[Case], plan: Plan, cache: Path, *, workers: int, console: Console
) -> tuple[list[PreparedCase], list[Failure]]:
    """Every case from the cache, made first where it is missing; a case that fails is set aside and named."""
    prepared: list[PreparedCase] = []
    failures: list[Failure] = []
    with ThreadPoolExecutor(max_workers=max(1, workers)) as pool:
        futures = [pool.submit(prepare_case, dataset, case, plan, cache, console=console) for case in cases]
        try:
            for done, (case, future) in enumerate(zip(cases, futures, strict=True), start=1):
                try:
                    prepared.append(future.result())
                except RunError:
                    raise
                except VolsegError as error:
                    failures.append(Failure(case.case_id, str(error)))
                console.progress("preprocessing", done, len(cases))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    return prepared, failures


def prepare_case(dataset: Dataset, case: Case, plan: Plan, cache: Path, *, console: Console = SILENCE) -> PreparedCase:
    """One annotated case from the cache, made first if it is missing, and again if it is damaged.

    Raises:
        VolsegError: a file cannot be read or does not fit; RunError when the cache cannot be written.
    """
    label = dataset.label_path(case)
    if label is None:
        raise RunError(f"case {case.case_id} has no label, so it cannot be trained on")
    annotation = dataset.annotation(case)
    key = _key([*dataset.channel_paths(case), label], plan, annotation)
    entry = cache / key[:2] / key
    if entry.is_dir():
        try:
            return _open_entry(entry, dataset, case)
        except DamagedEntry as damage:
            console.note(f"{entry}: a damaged cache entry, {damage}; it is made again")
            remove(entry)
    _make_entry(entry, dataset, case, plan)
    try:
        return _open_entry(entry, dataset, case)
    except DamagedEntry as damage:
        raise RunError(f"{entry}: {damage} just after it was written; use another disk (data.cache)") from damage


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
        _require_every_channel(cases, plan)
        self.cases = tuple(cases)
        self.batch_size = plan.batch_size
        self.rows = range(plan.batch_size)
        """Those of each batch that are made here; other processes may make the others."""
        self.seed = seed
        self._made_of = {
            "plan": plan.model_dump(mode="json"),
            "augment": augment.model_dump(mode="json"),
            "twin_classes": list(twin_classes),
            "foreground_share": foreground_share,
            "seed": seed,
        }
        every = torch.ones(plan.class_count, dtype=torch.bool)
        self._annotated = [every if case.annotated is None else case.annotated for case in self.cases]
        self._chain = training_chain(
            plan.patch_shape,
            plan.spacing_mm,
            spatial=spatial_settings(augment, plan),
            intensity=intensity_settings(augment),
            twin_classes=twin_classes,
            foreground_share=foreground_share,
            dropout=channel_dropout(augment, plan),
        )

    @cached_property
    def minima(self) -> list[torch.Tensor]:
        """What each case's channels (C,) end in beyond their border; every voxel is read where it is not known yet."""
        return [channel_minima(case.image) if case.minima is None else case.minima for case in self.cases]

    def batch(self, step: int) -> Batch:
        """The patches of update number `step` that are made here."""
        return collate([self._patch(step * self.batch_size + row) for row in self.rows])

    def case_ids(self, step: int) -> tuple[str, ...]:
        """Whose patches update number `step` is made of, without making them."""
        numbers = [step * self.batch_size + row for row in self.rows]
        return tuple(self.cases[self._case_of(number)].case_id for number in numbers)

    def recipe(self) -> tuple[str, dict[str, Any]]:
        """What another process makes the same patches from: a function's name, and plain values and tensors for it."""
        rows = [self.rows.start, self.rows.stop, self.rows.step]
        cases = [case.values() for case in self.cases]
        return "pipeline.dataset:patches_from_recipe", {
            "cases": cases,
            "rows": rows,
            "minima": self.minima,
            **self._made_of,
        }

    def _case_of(self, number: int) -> int:
        epoch, place = divmod(number, len(self.cases))
        return int(_order(self.seed, epoch, len(self.cases))[place])

    def _patch(self, number: int) -> dict[str, Any]:
        index = self._case_of(number)
        case = self.cases[index]
        reseed(self._chain, [self.seed, 1, number])
        data = {
            "image": case.image,
            "label": case.classes,
            "positions": case.positions,
            "fill": self.minima[index],
            "present": case.present,
            "annotated": self._annotated[index],
        }
        try:
            patch = apply_chain(self._chain, data)
        except VolsegError as error:
            raise VolumeError(f"case {case.case_id}: {error}") from error
        return {**patch, "case_id": case.case_id}


def patches_from_recipe(
    *,
    cases: Sequence[dict[str, Any]],
    rows: Sequence[int],
    minima: list[torch.Tensor],
    plan: Any,
    augment: Any,
    **rest: Any,
) -> Patches:
    """The inverse of `Patches.recipe`."""
    prepared = [PreparedCase.from_values(values) for values in cases]
    patches = Patches(prepared, Plan.model_validate(plan), augment=AugmentConfig.model_validate(augment), **rest)
    patches.rows = range(*rows)
    patches.minima = minima
    return patches


def spatial_settings(augment: AugmentConfig, plan: Plan) -> SpatialSettings:
    """The spatial part of the config; mirror axes are the plan's unless the config names its own."""
    values = augment.model_dump(include={f for f in SpatialSettings.__dataclass_fields__ if f != "mirror_axes"})
    mirror = plan.mirror_axes if augment.mirror_axes == "auto" else augment.mirror_axes
    return SpatialSettings(**values, mirror_axes=mirror)


def intensity_settings(augment: AugmentConfig) -> IntensitySettings:
    """The intensity part of the config."""
    return IntensitySettings(**augment.model_dump(include=set(IntensitySettings.__dataclass_fields__)))


def channel_dropout(augment: AugmentConfig, plan: Plan) -> RandDropChannelsd:
    """How often optional channels are left out of a patch.

    Raises:
        ConfigError: a probability is set, but no channel is optional.
    """
    optional = [channel.optional for channel in plan.channels]
    if augment.channel_dropout == "auto":
        return RandDropChannelsd(optional, CHANNEL_DROPOUT)
    if augment.channel_dropout and not any(optional):
        raise ConfigError(
            f"augment.channel_dropout: {augment.channel_dropout:g}, but no channel may be missing; "
            'say which by "optional": true in the manifest, or leave this key out'
        )
    return RandDropChannelsd(optional, augment.channel_dropout)


def _require_every_channel(cases: Sequence[PreparedCase], plan: Plan) -> None:
    """A fold's training cases may lack what the plan was made from."""
    for number, channel in enumerate(plan.channels):
        if not any(case.present is None or case.present[number] for case in cases):
            raise RunError(
                f"none of the {len(cases)} training cases has the channel '{channel.name}', so nothing can be learnt "
                "of it; choose other folds, or take it out of the manifest's channels"
            )


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, count: int) -> npt.NDArray[np.int64]:
    """Each epoch sees every case once."""
    return np.random.default_rng([seed, 2, epoch]).permutation(count)


def _key(files: Sequence[Path | None], plan: Plan, annotation: Annotation) -> str:
    return sha256_of_json(
        {
            "files": [None if path is None else content_digest(path) for path in files],
            "preprocessing": plan.preprocessing(),
            "label_ids": list(annotation.schema.ids),
            "classes": sorted(annotation.class_of_value.items()),
            "annotated": list(annotation.mask),
            "code": code_digest(),
        }
    )


def _present(dataset: Dataset, case: Case) -> tuple[bool, ...]:
    return tuple(path is not None for path in dataset.channel_paths(case))


def _open_entry(entry: Path, dataset: Dataset, case: Case) -> PreparedCase:
    annotation = dataset.annotation(case)
    annotated = None if annotation.is_complete else torch.tensor(annotation.mask)
    return replace(open_entry(entry, case.case_id), present=_present(dataset, case), annotated=annotated)


def _make_entry(entry: Path, dataset: Dataset, case: Case, plan: Plan) -> None:
    annotation = dataset.annotation(case)
    chain = preprocess_chain(
        axis_codes=plan.axis_codes,
        spacing_mm=plan.spacing_mm,
        normalisations=plan.normalisations,
        annotation=annotation,
        present=_present(dataset, case),
    )
    data = apply_chain(chain, {"image": dataset.image_paths(case), "label": dataset.label_path(case)})
    image, classes = plain(data["image"]).numpy(), plain(data["label"]).numpy()
    arrays = {
        "image": np.ascontiguousarray(image),
        "classes": np.ascontiguousarray(classes),
        "positions": class_positions(classes[0], class_count=annotation.schema.class_count),
    }
    publish(entry, arrays, geometry_of(data["image"]))


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


def dataset_digest(prepared: Sequence[PreparedCase]) -> str:
    """Short hex digest of what a run is trained on, for trackers."""
    digest = hashlib.sha256()
    for case in sorted(prepared, key=lambda c: c.case_id):
        for part in case.voxel_digests():
            digest.update(bytes.fromhex(part))
    return digest.hexdigest()[:16]
