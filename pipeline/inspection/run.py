"""A bundle and cases in, figures, words and files out: what `volseg inspect` does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from pipeline.bundle import find_bundles, load_bundle
from pipeline.config import TrainConfig
from pipeline.console import Console
from pipeline.device import choose_hardware
from pipeline.errors import BundleError, ConfigError
from pipeline.files import write_json
from pipeline.inspection.case import Look, Passes, look_at
from pipeline.inspection.contributions import Against, changes_of
from pipeline.inspection.levels import levels_of
from pipeline.inspection.reading import Asked, Subject, find_subjects, read_case
from pipeline.inspection.result import Inspection, inspection_of
from pipeline.inspection.words import words_of
from pipeline.predict import Model
from pipeline.segment import device_of

INSPECTION = "inspection.json"


def open_model(path: Path, device: str) -> Model:
    """The one network at a path; `device` is auto, cpu or cuda.

    Raises:
        BundleError: there is none, or more than one.
        ConfigError: no such device.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"--device {device}: expected auto, cpu or cuda")
    found = find_bundles(path)
    if len(found) > 1:
        raise BundleError(f"{path}: {len(found)} folds, and one network is inspected at a time; give {found[0].parent}")
    hardware = choose_hardware(TrainConfig.model_validate({"device": device}))
    return Model((load_bundle(found[0], hardware.torch_device()),))


def inspect_cases(
    model: Model, asked: Asked, *, console: Console, out: Path | None = None, quick: bool = False
) -> tuple[Inspection, list[Path]]:
    """Look at each case in turn; what was found together, and the files that were written to `out`.

    `quick` leaves out what parts contribute. Where any case has no reference, all are compared with themselves.

    Raises:
        PlanError: the levels of the network are not known, or memory does not suffice.
        VolsegError: see `find_subjects`, `read_case` and `look_at`.
    """
    changes = () if quick else changes_of(levels_of(model.bundles[0].network))
    subjects = find_subjects(model, asked, console=console)
    with_reference = all(subject.labels is not None for subject in subjects)
    _tell_without(subjects, console)
    looks: list[Look] = []
    files: list[Path] = []
    for subject in subjects:
        case = read_case(model, subject, asked)
        if not with_reference:
            case = replace(case, reference=None, annotated=())
        passes = Passes(model, case, device=device_of(model), told=console.progress)
        looks.append(look_at(passes, changes))
    index = model.bundles[0].index
    name = index.name if index.fold is None else f"{index.name}, fold {index.fold}"
    against: Against = "reference" if with_reference else "untouched"
    found = inspection_of(name, model.plan, model.schema, looks, against=against)
    if out is not None:
        words = [asdict(sentence) for sentence in words_of(found)]
        write_json(out / INSPECTION, found.to_json() | {"words": words})
        files.append(out / INSPECTION)
    return found, files


def _tell_without(subjects: Sequence[Subject], console: Console) -> None:
    """Some references are not used where others are missing."""
    without = [subject.study.name for subject in subjects if subject.labels is None]
    if without and len(without) < len(subjects):
        console.note(
            f"without a reference: {', '.join(without)}; so all cases are compared with their untouched results"
        )
