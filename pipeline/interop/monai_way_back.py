"""How a MONAI bundle brings what its network says back to the study's grid, and what volseg does in its place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.interop.monai_steps import Inversion, Outputs
from transforms.recipe_spec import Respace, Step


@dataclass(frozen=True)
class WayBack:
    """What is interpolated linearly (`InferenceConventions.restores`), and how that differs from the bundle's way."""

    restores: Literal["blended", "probabilities"]
    difference: str | None


def way_back(outputs: Outputs, recipe: Sequence[Step]) -> WayBack:
    """The nearest that volseg has to what the bundle's post-processing does: the same only if that is linear, and of
    probabilities or logits."""
    inversion = outputs.inversion
    respaced = [step for step in recipe if isinstance(step, Respace) and any(step.spacing_mm)]
    theirs = _theirs(inversion, respaced) if respaced else None
    if theirs is not None:
        ours = "volseg brings probabilities back linearly, so borders may differ by a voxel"
        return WayBack("probabilities", f"its post-processing {theirs}; {ours}")
    return WayBack("blended" if inversion is not None and inversion.of == "logits" else "probabilities", None)


def _theirs(inversion: Inversion | None, respaced: Sequence[Respace]) -> str | None:
    """The bundle's way where volseg has none like it (monai/transforms/post/dictionary.py, Invertd)."""
    if inversion is None:
        return "has no Invertd, so labels stay on the network's grid, or SaveImaged brings them back (resample)"
    if inversion.nearest is None:
        return "brings results back as code says (Invertd nearest_interp), which is not run"
    if inversion.nearest:
        return "brings labels back by the nearest voxel (Invertd nearest_interp)"
    if any(step.interpolation == "nearest" for step in respaced):
        return "brings labels back by the nearest voxel (Invertd, as Spacingd's mode)"
    if inversion.of == "labels":
        return "brings labels back as numbers, linearly (Invertd after AsDiscreted)"
    return None
