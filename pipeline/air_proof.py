"""May a model skip dark windows? Only if the held-out cases that have some keep every label."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from pipeline.bundle import FEWEST_CASES, Air, load_bundle, read_air, set_air
from pipeline.console import Console
from pipeline.errors import RunError, VolsegError
from pipeline.manifest import Case
from pipeline.predict import Model, PredictSettings, predict, taken_for_air
from pipeline.runs import BUNDLE, VALIDATION, Run
from transforms.volume import read_label, read_volume


def prove_air(run: Run, fold: int, case_ids: Sequence[str], console: Console) -> None:
    """Segment those held-out cases of a fold again without their dark windows, and tell its bundle what came of it.

    The label maps of the whole prediction are there already. Nothing is done where it was settled before, or training
    says of no window that it is dark.
    """
    folder = run.fold_folder(fold)
    known = read_air(folder / BUNDLE)
    if known is None or known.cases is not None:
        return
    bundle = load_bundle(folder / BUNDLE, run.hardware.torch_device())
    believed = known.model_copy(update={"cases": FEWEST_CASES})
    skipping = Model((replace(bundle, index=bundle.index.model_copy(update={"air": believed})),))
    cases = [case for case in run.dataset.manifest.cases if case.case_id in set(case_ids)]
    found = []
    for done, case in enumerate(cases, start=1):
        found.append(_compared(run, skipping, case, folder / VALIDATION / f"{case.case_id}.nii.gz"))
        console.progress("asking held-out cases about air", done, len(cases))
    having = [(windows, is_same) for windows, is_same in found if windows]
    changed = sum(not is_same for _, is_same in having)
    air = Air(levels=known.levels, cases=len(having), windows=sum(w for w, _ in having), changed=changed)
    set_air(folder / BUNDLE, air)
    console.note(f"fold {fold}: {_sentence(air)}")


def _compared(run: Run, skipping: Model, case: Case, whole: Path) -> tuple[int, bool]:
    """Dark windows of a case, and whether its labels are those of the whole prediction; none of one that fails."""
    settings = PredictSettings(skipping.mirror, postprocess=False)
    try:
        volumes = [None if path is None else read_volume(path) for path in run.dataset.channel_paths(case)]
        if not whole.is_file() or not (windows := taken_for_air(skipping, volumes, settings)):
            return 0, True
        found = predict(skipping, volumes, settings=settings, device=run.hardware.torch_device())
        return windows, np.array_equal(found.label_map, read_label(whole).voxels)
    except RunError:
        raise
    except VolsegError:
        return 0, True


def _sentence(air: Air) -> str:
    if not air.cases:
        return "air: no held-out case has windows as dark as those without labels in training; all are computed"
    where = f"{air.windows} dark windows of {air.cases} held-out cases"
    if air.changed:
        return f"air: without the {where}, labels of {air.changed} cases change; all windows are computed"
    if not air.is_proven:
        return f"air: without the {where} every label is the same; too few cases to skip such windows"
    return f"air: without the {where} every label is the same; such windows are skipped from now on"
