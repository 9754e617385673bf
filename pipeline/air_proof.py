"""May a model take dark windows for air? Only if the held-out cases that have some keep every label."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.bundle import AIR, load_bundle, set_air
from pipeline.console import Console
from pipeline.errors import RunError, VolsegError
from pipeline.predict import Model, PredictSettings, predict, taken_for_air
from pipeline.runs import BUNDLE, VALIDATION, Run
from transforms.volume import Volume, read_label, read_volume


def prove_air(run: Run, fold: int, case_ids: Sequence[str], console: Console) -> None:
    """Segment those held-out cases of a fold again, without their dark windows, and tell its bundle what came of it.

    The label maps of the whole prediction are there already. How dark is what the bundle's training cases say.
    """
    folder = run.fold_folder(fold)
    bundle = load_bundle(folder / BUNDLE, run.hardware.torch_device())
    levels: Sequence[float] | None = bundle.index.provenance.get(AIR, {}).get("levels")
    if levels is None:
        return
    skipping = Model((replace(bundle, index=bundle.index.model_copy(update={"air": tuple(levels)})),))
    cases = [case for case in run.dataset.manifest.cases if case.case_id in set(case_ids)]
    windows, changed = [], []
    for done, case in enumerate(cases, start=1):
        whole = folder / VALIDATION / f"{case.case_id}.nii.gz"
        if whole.is_file():  # else its prediction failed
            volumes = [None if path is None else read_volume(path) for path in run.dataset.channel_paths(case)]
            try:
                count, same = _compare(run, skipping, volumes, whole)
            except RunError:
                raise
            except VolsegError:
                count, same = 1, False
            windows += [count] if count else []
            changed += [] if same else [case.case_id]
        console.progress("asking held-out cases about air", done, len(cases))
    evidence: dict[str, Any] = {
        "levels": list(levels),
        "cases": len(windows),
        "windows": sum(windows),
        "changed": changed,
    }
    is_proven = bool(windows) and not changed
    set_air(folder / BUNDLE, tuple(levels) if is_proven else None, evidence)
    console.note(f"fold {fold}: {_sentence(len(windows), sum(windows), changed)}")


def _compare(run: Run, skipping: Model, volumes: Sequence[Volume | None], whole: Path) -> tuple[int, bool]:
    """Dark windows of a case, and whether its labels are those of the whole prediction."""
    settings = PredictSettings(skipping.mirror, postprocess=False)
    if not (count := taken_for_air(skipping, volumes, settings)):
        return 0, True
    found = predict(skipping, volumes, settings=settings, device=run.hardware.torch_device())
    return count, np.array_equal(found.label_map, read_label(whole).voxels)


def _sentence(cases: int, windows: int, changed: Sequence[str]) -> str:
    if not cases:
        return "air: no held-out case has windows as dark as those without labels in training; all are computed"
    where = f"{windows} dark windows of {cases} held-out cases"
    if changed:
        return f"air: without the {where}, labels of {len(changed)} cases change; all windows are computed"
    return f"air: without the {where} every label is the same; such windows are skipped from now on"
