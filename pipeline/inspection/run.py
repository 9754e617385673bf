"""A bundle and cases in, figures, words and files out: what `volseg inspect` does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from pipeline.bundle import find_bundles, load_bundle
from pipeline.config import TrainConfig
from pipeline.console import Console
from pipeline.device import choose_hardware
from pipeline.errors import BundleError, ConfigError, RunError
from pipeline.files import write_json
from pipeline.inspection.case import Look, Passes, Untouched, look_at
from pipeline.inspection.contributions import Against, changes_of
from pipeline.inspection.levels import levels_of
from pipeline.inspection.reading import Asked, Subject, find_subjects, read_case
from pipeline.inspection.result import Inspection, inspection_of
from pipeline.inspection.words import words_of
from pipeline.predict import Model
from pipeline.segment import device_of

INSPECTION, PAGE = "inspection.json", "inspection.html"


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
    model: Model, asked: Asked, *, console: Console, out: Path | None = None, quick: bool = False, force: bool = False
) -> tuple[Inspection, list[Path]]:
    """Look at each case in turn; what was found together, and the files and the folder of pictures written to `out`.

    `quick` leaves out what parts contribute; `force` replaces an inspection that is there. Where any case has no
    reference, all are compared with themselves.

    Raises:
        PlanError: the levels of the network are not known, or memory does not suffice.
        RunError: `out` holds an inspection and not `force`, or other files where the pictures are to be.
        VolsegError: see `find_subjects`, `read_case` and `look_at`.
    """
    changes = () if quick else changes_of(levels_of(model.bundles[0].network))
    subjects = find_subjects(model, asked, console=console)
    if out is not None:
        _require_room(out, out / subjects[0].study.name, force=force)
    with_reference = all(subject.labels is not None for subject in subjects)
    _tell_without(subjects, console)
    looks: list[Look] = []
    pictures: list[Path] = []
    for subject in subjects:
        case = read_case(model, subject, asked)
        if not with_reference:
            case = replace(case, reference=None, annotated=())
        passes = Passes(model, case, device=device_of(model), told=console.progress)
        untouched = passes.untouched()
        looks.append(look_at(passes, untouched, changes))
        if out is not None and not pictures:
            console.progress("drawing", 0, 1)
            pictures = _draw(passes, untouched, out / case.name)
            console.progress("drawing", 1, 1)
    against: Against = "reference" if with_reference else "untouched"
    found = inspection_of(_name(model), model.plan, model.schema, looks, against=against)
    return found, [] if out is None else _write(found, model, pictures, out)


def _require_room(out: Path, pictures: Path, *, force: bool) -> None:
    """Pictures take the place of a folder, which might be anything's: a case's own, where `out` is the one above it."""
    if pictures.exists() and not (pictures.is_dir() and all(file.suffix == ".png" for file in pictures.iterdir())):
        raise RunError(f"{pictures}: pictures are to be here, and other files are; choose another --out")
    if not force and ((out / INSPECTION).exists() or pictures.exists()):
        raise RunError(f"{out}: holds an inspection; choose another --out, or give --force to replace it")


def _name(model: Model) -> str:
    index = model.bundles[0].index
    return index.name if index.fold is None else f"{index.name}, fold {index.fold}"


def _draw(passes: Passes, untouched: Untouched, folder: Path) -> list[Path]:
    from pipeline.inspection.pictures import window_of_case, write_pictures

    bundle, reference = passes.model.bundles[0], passes.case.reference
    window = window_of_case(bundle, passes.prepared, passes.source, result=untouched.classes, reference=reference)
    return write_pictures(folder, bundle, window)


def _write(found: Inspection, model: Model, pictures: Sequence[Path], out: Path) -> list[Path]:
    from pipeline.inspection.page import write_page

    words, bundle = words_of(found), model.bundles[0]
    write_json(out / INSPECTION, found.to_json() | {"words": [asdict(sentence) for sentence in words]})
    facts = {
        "model": found.model,
        "weights": bundle.digest[:12],
        "network": f"{model.plan.network} of {found.depth} levels",
        "trained with": f"volseg {bundle.index.provenance.get('volseg', 'of unknown version')}",
        "cases": ", ".join(found.cases),
        "windows": "as in prediction, without mirroring and post-processing",
        "pictures": f"of {found.cases[0]}",
    }
    if found.contributions is not None:
        with_reference = found.contributions.against == "reference"
        facts["Dice is"] = "against the reference" if with_reference else "agreement with the untouched result"
    write_page(out / PAGE, found, words, pictures, facts=facts)
    return [out / INSPECTION, out / PAGE, pictures[0].parent]


def _tell_without(subjects: Sequence[Subject], console: Console) -> None:
    """Some references are not used where others are missing."""
    without = [subject.study.name for subject in subjects if subject.labels is None]
    if without and len(without) < len(subjects):
        console.note(
            f"without a reference: {', '.join(without)}; so all cases are compared with their untouched results"
        )
