"""All pictures of one patch of one case: the U, the attention, a sheet for each level."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.bundle import ModelBundle
from pipeline.errors import PlanError
from pipeline.files import atomic_folder
from pipeline.gradients import is_out_of_memory
from pipeline.inspection.attention import attention_maps, write_attention
from pipeline.inspection.figures import figures_of, record_levels
from pipeline.inspection.overview import write_overview
from pipeline.inspection.scene import Scene
from pipeline.inspection.sheets import write_sheets
from pipeline.inspection.window import Window, window_of
from pipeline.outputs import Goal, segment_image
from pipeline.preparing import Prepared
from pipeline.windows import Member, window_settings
from transforms.geometry import Geometry
from transforms.resample import move_classes

Array = npt.NDArray[Any]

OVERVIEW = "overview.png"


def write_pictures(folder: Path, bundle: ModelBundle, window: Window) -> list[Path]:
    """Draw what flows through the bundle's network in a window, on the network's device; the files, overview first.

    They take the place of all that is in `folder`.

    Raises:
        PlanError: the levels of the network are not known, or memory does not suffice.
        RunError: a file cannot be written.
    """
    try:
        with atomic_folder(folder, force=True) as temporary:
            written = _draw(temporary, bundle, window)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        patch = "x".join(map(str, bundle.plan.patch_shape))
        raise PlanError(f"memory does not suffice to draw the levels of the network in a patch of {patch}") from None
    return [folder / path.name for path in written]


def _draw(folder: Path, bundle: ModelBundle, window: Window) -> list[Path]:
    image = window.image.to(next(bundle.network.parameters()).device)
    with record_levels(bundle.network) as activations:
        prediction = _classes(bundle, image, window.geometry)
    scene, figures = Scene(window, prediction, bundle.schema), figures_of(activations)
    write_overview(folder / OVERVIEW, scene, activations, figures)
    maps = attention_maps(bundle.network, image[None], window.centre_ijk)
    sheets = write_sheets(folder, scene, activations, figures)
    return [folder / OVERVIEW, *write_attention(folder, scene, maps), *sheets]


def window_of_case(
    bundle: ModelBundle, prepared: Prepared, source: Geometry, *, result: Array, reference: Array | None
) -> Window:
    """The window around the object of a prepared case, by its reference, or else by its result.

    Both are classes (I, J, K) on the grid `source`.
    """
    classes = torch.from_numpy((result if reference is None else reference).astype(np.int32))
    on_grid = move_classes(classes[None], source, prepared.grid)[0]
    count, shape = bundle.schema.class_count, bundle.plan.patch_shape
    window = window_of(prepared.image, on_grid, prepared.grid, shape, class_count=count)
    return window if reference is not None else replace(window, classes=None)


def _classes(bundle: ModelBundle, image: Tensor, geometry: Geometry) -> Tensor:
    """Of an image (C, I, J, K) of one patch, in one pass."""
    settings = window_settings(bundle.plan, bundle.schema, step=1.0, mirror=False)
    with torch.inference_mode():
        return segment_image([Member(bundle.network, settings)], image, Goal(geometry, geometry, bundle.schema))
