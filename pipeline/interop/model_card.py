"""What someone needs who runs a bundle's network without volseg: a JSON value that goes with every exported file."""

from __future__ import annotations

from typing import Any

from pipeline.bundle import ModelBundle
from pipeline.interop.network_graph import Difference, has_free_sides
from pipeline.postprocessing import described
from transforms.patches import GAUSSIAN_SIGMA, SMALLEST_WEIGHT

FORMAT = "volseg-network-1"
INPUT, OUTPUT = "image", "logits"
TRAINING_ONLY = {"batch_size", "memory_gb", "patch_gflop", "reasons", "warnings"}


def model_card(bundle: ModelBundle, found: Difference) -> dict[str, Any]:
    """Input and output, the whole of the plan that matters to prediction, the labels, and each step in words.

    `found` is how far the exported network was from the bundle's own.
    """
    plan, index, cleaning = bundle.plan, bundle.index, bundle.postprocessing
    return {
        "format": FORMAT,
        "name": index.name,
        "fold": index.fold,
        "volseg": str(index.provenance.get("volseg", "")),
        "weights_sha256": bundle.digest,
        "largest_difference": found.largest,
        "input": _input(bundle),
        "output": _output(bundle),
        "steps": _steps(bundle),
        "tile_step": index.tile_step,
        "mirror": index.mirror,
        "twin_outputs": list(bundle.schema.twin_outputs),
        "postprocessing": None if cleaning is None else cleaning.model_dump(mode="json"),
        "plan": plan.model_dump(mode="json", exclude=TRAINING_ONLY),
        "labels": bundle.schema.model_dump(mode="json"),
    }


def _input(bundle: ModelBundle) -> dict[str, Any]:
    plan = bundle.plan
    free = has_free_sides(plan)
    return {
        "name": INPUT,
        "axes": ["batch", "channel", "i", "j", "k"],
        "type": "float32",
        "channels": [channel.described for channel in plan.channels],
        "sides": list(plan.patch_shape),
        "other_sides_divisible_by": list(plan.factor) if free else None,
    }


def _output(bundle: ModelBundle) -> dict[str, Any]:
    schema = bundle.schema
    regions = [region.name for region in schema.regions]
    return {
        "name": OUTPUT,
        "axes": ["batch", "output", "i", "j", "k"],
        "type": "float32",
        "outputs": regions or ["background", *schema.names],
        "activation": "sigmoid" if regions else "softmax",
        "label_ids": [schema.ids[c - 1] for c in schema.painted_classes] if regions else [0, *schema.ids],
    }


def _steps(bundle: ModelBundle) -> list[str]:
    """From volumes to a label map, in order; the numbers are those of `plan`."""
    ways = bundle.plan.inference
    padding = "its lowest value" if ways.padding == "minimum" else "0"
    weights = {
        "centred": f"Gaussian weights (sigma {GAUSSIAN_SIGMA:g} of a side, never below {SMALLEST_WEIGHT:g})",
        "nnunet": "nnU-Net's Gaussian weights",
        "even": "even weights",
    }
    last = "every region above 0.5 is painted, in order" if bundle.schema.regions else "the highest output wins"
    return [
        *_preparing(bundle),
        f"Each channel padded with {padding} to the sides of a tile; tiles of input.sides, at most tile_step of a "
        "side apart.",
        f"Where tiles overlap, {ways.blend} are averaged with {weights[ways.weights]}.",
        "With mirror, they are averaged over every combination of plan.mirror_axes; an output mirrored along axis 0 "
        "is put in the place of its twin (twin_outputs).",
        f"Back on the volume's own grid, linearly; {last}; label_ids are the values of the label map.",
        *_cleaning(bundle),
    ]


def _cleaning(bundle: ModelBundle) -> list[str]:
    """Of components that hang together over faces, edges or corners, and holes that do over faces."""
    if bundle.postprocessing is None:
        return []
    return [f"Post-processing of the label map, as postprocessing says: {described(bundle.postprocessing.actions)}."]


def _preparing(bundle: ModelBundle) -> list[str]:
    plan = bundle.plan
    if plan.recipe is not None:
        return ["Volumes in the file's unit (CT: HU), prepared by the steps of plan.recipe, one after the other."]
    spacing_mm = " x ".join(f"{step:g}" for step in plan.spacing_mm)
    axes = f"axes towards {plan.axis_codes}" if plan.placing is None else "axes and cropping as plan.placing says"
    return [
        f"Volumes in the file's unit (CT: HU), {axes}, resampled to {spacing_mm} mm.",
        "Each channel normalised as plan.channels says: 'window' clips to [lower, upper], subtracts mean and divides "
        "by deviation; 'zscore' does so with the volume's own. A missing optional channel is 0 everywhere.",
    ]
