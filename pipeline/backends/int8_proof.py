"""May a model's network be rounded to eight bits? Only if cases that it was not calibrated on are segmented as well."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any, TypeVar

import numpy.typing as npt
import torch

from pipeline.backends.int8 import evenly, full_windows, int8_model
from pipeline.backends.openvino import compiled, require_fit
from pipeline.bundle import ModelBundle, find_bundles, load_bundle, set_int8
from pipeline.config import load_config
from pipeline.console import Console
from pipeline.errors import BundleError, ExportError, GeometryMismatch, ManifestError, VolsegError, VolumeError
from pipeline.folds import read_folds
from pipeline.manifest import Dataset, load_dataset, manifest_hash
from pipeline.plan import Plan
from pipeline.predict import Model, PredictSettings, check_input, predict
from pipeline.preparing import prepare
from pipeline.references import Reference, references_of_dataset
from pipeline.runs import BUNDLE, CONFIG, DATASET, FOLDS
from pipeline.scores import dice_of_classes
from pipeline.sources import open_study
from pipeline.studies import Study, Wanted, find_studies
from transforms.annotation import Annotation
from transforms.labels import LabelSchema
from transforms.volume import Volume, read_label

DICE_LOSS = 0.002
"""What the mean Dice over cases may fall by at most."""

OTHER_LABELS = 0.03
"""Where there are no references: the part of the voxels labelled by either network that may have another label. Of a
small structure most voxels lie at its border: 1.5 % of a hippocampus changes where its Dice moves by 0.0001."""

MOST_WINDOWS, MOST_CALIBRATION_CASES, MOST_CASES = 32, 16, 32

T = TypeVar("T")

CPU = torch.device("cpu")
LabelMap = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Cases:
    """Studies to calibrate on and to prove on, the latter with a reference by name where there is one."""

    calibration: tuple[Study, ...]
    proof: tuple[Study, ...]
    references: Mapping[str, Reference]

    @property
    def are_apart(self) -> bool:
        """Whether none is both."""
        return not set(self.calibration) & set(self.proof)


@dataclass(frozen=True)
class Evidence:
    """What cases say of a network in eight bits beside that in float32.

    `dice` and `dice_int8` are means over cases of the mean over labels, None where no case has a reference.
    `other_labels` is the part of the voxels labelled by either that have another label. `apart`: no case was calibrated
    on.
    """

    calibration_cases: int
    windows: int
    cases: int
    apart: bool
    dice: float | None
    dice_int8: float | None
    other_labels: float

    @property
    def sentence(self) -> str:
        """The figures in a line."""
        of = f"{self.cases} case{'s' if self.cases > 1 else ''}" + ("" if self.apart else ", calibrated on as well")
        others = f"{100 * self.other_labels:.2f} % of labelled voxels have another label"
        if self.dice is None or self.dice_int8 is None:
            return f"{others} ({of}, without references)"
        change = self.dice_int8 - self.dice
        return f"Dice {self.dice_int8:.4f} in eight bits, {self.dice:.4f} in float32 ({change:+.5f}; {of}); {others}"

    def require(self, folder: Path) -> None:
        """Raise ExportError where it is not good enough."""
        if self.dice is None or self.dice_int8 is None:
            is_good, allowed = self.other_labels <= OTHER_LABELS, f"at most {100 * OTHER_LABELS:g} % of them"
        else:
            is_good, allowed = self.dice - self.dice_int8 <= DICE_LOSS, f"Dice may fall by {DICE_LOSS:g}"
        if not is_good:
            raise ExportError(
                f"{folder}: not as good in eight bits: {self.sentence}; expected: {allowed}; nothing was written, "
                "use --backend openvino-bf16 or torch"
            )


def quantise(
    model: Path, inputs: Sequence[Path], *, root: Path | None = None, console: Console
) -> list[tuple[Path, Evidence]]:
    """Put a network in eight bits into each bundle of `model`, once cases have proven it; what they said.

    Without `inputs` it is calibrated on training cases of the bundle's own run and proven on its held-out cases; else
    these are what `volseg predict` takes. `root` is where the paths of a manifest start from. Nothing is written
    unless all bundles pass.

    Raises:
        ExportError: the Dice falls by more than `DICE_LOSS`, without references more than `OTHER_LABELS` changes, or a
            package is not installed.
        ConfigError: OpenVINO is not installed, or cannot run the network.
        BundleError: there is no bundle, no case to calibrate on, or the labels of a manifest are not the model's.
        VolumeError: an input cannot be read.
    """
    made = []
    for folder in find_bundles(model):
        bundle = load_bundle(folder)
        require_fit(bundle.plan, CPU, "openvino-int8")
        cases = _given(bundle, inputs, root, console) if inputs else _of_run(folder, bundle, root, console)
        content, evidence = _quantised(bundle, cases, console)
        evidence.require(folder)
        made.append((folder, bundle, content, evidence))
    for folder, bundle, content, evidence in made:
        set_int8(folder, content, asdict(evidence), of=bundle)
    return [(folder, evidence) for folder, _, _, evidence in made]


def _of_run(folder: Path, bundle: ModelBundle, root: Path | None, console: Console) -> Cases:
    """Training cases of the bundle's own fold, and those that it never saw."""
    place, fold = folder.resolve(), bundle.index.fold
    run = place.parent.parent
    if place.name != BUNDLE or not (run / DATASET).is_file() or fold is None:
        raise BundleError(f"{folder}: lies in no run, whose cases are known; give images, at best a manifest of labels")
    try:
        manifest, dataset = _dataset_of(run, root)
        folds = read_folds(run / FOLDS)
        found = find_studies([manifest], Wanted(bundle.plan.channels, dataset.root), console=console)
    except VolsegError as error:
        raise BundleError(f"{folder}: the cases of its run are not here ({error}); give images, or --root") from error
    studies = {study.name: study for study in found}
    training = [studies[case_id] for case_id in folds.training_cases(fold)]
    held_out = [studies[case_id] for case_id in folds.validation_cases(fold)]
    return _chosen(training, held_out, {reference.case_id: reference for reference in references_of_dataset(dataset)})


def _dataset_of(run: Path, root: Path | None) -> tuple[Path, Dataset]:
    """A run's manifest and dataset, as they were in training; what it was trained on need not be here."""
    config = load_config(run / CONFIG, [] if root is None else [f"data.root={root.resolve()}"])
    dataset = load_dataset(config.data.manifest, config.data.root)
    if json.loads((run / DATASET).read_text(encoding="utf-8"))["sha256"] != manifest_hash(dataset.manifest):
        raise ManifestError(f"{config.data.manifest}: another version than in training")
    return config.data.manifest, dataset


def _given(bundle: ModelBundle, inputs: Sequence[Path], root: Path | None, console: Console) -> Cases:
    """What was given, half to calibrate on and half to prove on; what has a reference is to prove on first."""
    studies = find_studies(inputs, Wanted(bundle.plan.channels, root), console=console)
    references = _references(bundle.schema, inputs, root)
    judged = [study for study in studies if study.name in references] or studies
    others = [study for study in studies if study not in judged]
    if not others and len(judged) > 1:
        others, judged = judged[::2], judged[1::2]
    return _chosen(others or judged, judged, references)


def _chosen(calibration: Sequence[Study], proof: Sequence[Study], references: Mapping[str, Reference]) -> Cases:
    cases = evenly(calibration, MOST_CALIBRATION_CASES), evenly(proof, MOST_CASES)
    return Cases(tuple(cases[0]), tuple(cases[1]), references)


def _references(schema: LabelSchema, inputs: Sequence[Path], root: Path | None) -> dict[str, Reference]:
    """Those of the manifests among the inputs, by case."""
    found: dict[str, Reference] = {}
    for path in inputs:
        if path.suffix == ".json" or (path / "dataset.json").is_file():
            dataset = load_dataset(path, root)
            references = references_of_dataset(dataset)
            if references and not dataset.manifest.labels.matches(schema):
                raise BundleError(f"{path}: its labels are not the model's; give a manifest with the same, or images")
            found |= {reference.case_id: reference for reference in references}
    return found


def _quantised(bundle: ModelBundle, cases: Cases, console: Console) -> tuple[bytes, Evidence]:
    each = max(1, MOST_WINDOWS // len(cases.calibration))

    def cut(study: Study) -> list[torch.Tensor]:
        return full_windows(bundle, prepare(bundle.plan, _channels(bundle.plan, study)).image, each)

    cut_of = _of_each(cases.calibration, cut, "reading cases to calibrate on", console)
    windows, count = [window for some in cut_of for window in some], len(cut_of)
    console.note(f"calibrating on {len(windows)} windows of {count} case{'s' if count > 1 else ''}")
    content = int8_model(bundle, windows)
    small = replace(bundle, network=compiled(content, "f32", threads=None))

    def compared(study: Study) -> _Compared:
        return _compare(bundle, small, study, cases.references.get(study.name))

    return content, _evidence(cases, count, len(windows), _of_each(cases.proof, compared, "comparing labels", console))


def _of_each(studies: Sequence[Study], work: Callable[[Study], T], what: str, console: Console) -> list[T]:
    """What `work` gives of those studies that can be read; the others are set aside and named."""
    found = []
    for done, study in enumerate(studies, start=1):
        try:
            found.append(work(study))
        except (VolumeError, GeometryMismatch) as error:
            reason = (
                str(error) if any(str(path) in str(error) for path in study.paths) else f"{study.paths[0]}: {error}"
            )
            console.note(f"set aside {study.name}: {reason}")
        console.progress(what, done, len(studies))
    if not found:
        raise BundleError(
            f"{what}: none of {len(studies)} can be read; give images, or --root where they lie elsewhere"
        )
    return found


@dataclass(frozen=True)
class _Compared:
    """Of a case: voxels labelled by either network and those of them with another label, the Dice of both."""

    labelled: int
    changed: int
    dices: tuple[float, float] | None


def _compare(bundle: ModelBundle, small: ModelBundle, study: Study, reference: Reference | None) -> _Compared:
    channels = _channels(bundle.plan, study)
    settings = PredictSettings(bundle.index.mirror, postprocess=False, skip_air=False)
    found = [predict(Model((b,)), channels, settings=settings, device=CPU) for b in (bundle, small)]
    before, after = (segmentation.label_map for segmentation in found)
    dices = None
    if reference is not None:
        truth = read_label(reference.path)
        if difference := found[0].geometry.difference(truth.geometry):
            raise GeometryMismatch(f"{reference.path}: lies on another grid than its image: {difference}")
        first, second = (_mean_dice(label_map, truth.voxels, reference, bundle.schema) for label_map in (before, after))
        dices = None if first is None or second is None else (first, second)
    return _Compared(int(((before != 0) | (after != 0)).sum()), int((before != after).sum()), dices)


def _mean_dice(found: LabelMap, truth: LabelMap, reference: Reference, schema: LabelSchema) -> float | None:
    """Over the labels, and regions, that are annotated and in either of the two; None where there are none."""
    annotation = reference.annotation or Annotation(schema)
    try:
        wanted = annotation.classes(truth)
    except ValueError as error:
        raise VolumeError(f"{reference.path}: {error}") from error
    every = dice_of_classes(schema.classes_from_ids(found), wanted, schema, annotated=annotation.mask)
    defined = [value for value in every.values() if not math.isnan(value)]
    return mean(defined) if defined else None


def _evidence(cases: Cases, calibration_cases: int, windows: int, compared: Sequence[_Compared]) -> Evidence:
    pairs = [case.dices for case in compared if case.dices is not None]
    labelled = sum(case.labelled for case in compared)
    if not labelled:
        raise ExportError("neither in eight bits nor in float32 a voxel gets a label; give images that hold some")
    return Evidence(
        calibration_cases=calibration_cases,
        windows=windows,
        cases=len(pairs) or len(compared),
        apart=cases.are_apart,
        dice=mean(pair[0] for pair in pairs) if pairs else None,
        dice_int8=mean(pair[1] for pair in pairs) if pairs else None,
        other_labels=sum(case.changed for case in compared) / labelled,
    )


def _channels(plan: Plan, study: Study) -> list[Volume | None]:
    """One image a channel of the model, None where the study lacks it.

    Raises:
        VolumeError: one cannot be read, or is not what the model wants.
    """
    images = iter(open_study(study, plan, series=None, resample_uneven=False))
    channels = [None if c.name in study.missing else next(images).read().image for c in plan.channels]
    check_input(plan, channels)
    return channels
