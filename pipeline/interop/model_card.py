"""What someone needs who runs a bundle's network without volseg: a JSON value that goes with every exported file."""

from __future__ import annotations

from typing import Any

from pipeline.bundle import ModelBundle
from pipeline.interop.network_graph import Difference, has_free_sides
from pipeline.plan import Plan
from pipeline.postprocessing import described
from transforms.patches import GAUSSIAN_SIGMA, SMALLEST_WEIGHT
from transforms.recipe_spec import CropForeground

FORMAT = "volseg-network-1"
INPUT, OUTPUT = "image", "logits"
TRAINING_ONLY = {"batch_size", "memory_gb", "patch_gflop", "reasons", "warnings"}

WEIGHTS = {
    "centred": f"Gaussian weights (sigma {GAUSSIAN_SIGMA:g} of a side, never below {SMALLEST_WEIGHT:g})",
    "nnunet": "nnU-Net's Gaussian weights",
    "even": "even weights",
}
TILES = {
    "spread": "at most tile_step of a side apart and evenly spread",
    "stepped": "tile_step of a side apart (in whole voxels, rounded down), the last moved back to end with the volume",
}
NORMALISED = {
    "window": "'window' clips to [lower, upper], subtracts mean and divides by deviation",
    "zscore": "'zscore' subtracts the channel's own mean and divides by its own deviation",
    "inside": "'inside' subtracts the channel's mean of the body (the voxels that are not 0 in every channel, and the "
    "holes among them), divides by its deviation there, and leaves what lies outside as it is",
    "unit": "'unit' brings the channel's own lowest value to 0 and its highest to 1",
    "byte": "'byte' divides by 255",
    "none": "'none' changes nothing",
}
"""By `Normalisation.kind`."""

NONZERO = "; with nonzero, both are of the voxels that are not 0, and the others become the lowest normalised value"


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
    return {
        "name": INPUT,
        "axes": ["batch", "channel", "i", "j", "k"],
        "type": "float32",
        "channels": [channel.described for channel in plan.channels],
        "sides": list(plan.patch_shape),
        "other_sides_divisible_by": _divisors(plan) if has_free_sides(plan) else None,
    }


def _divisors(plan: Plan) -> list[int | None]:
    """Of each side, None for the one across slices, which is always 1."""
    return [None if axis == plan.slice_axis else side for axis, side in enumerate(plan.factor)]


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
    return [
        *_preparing(bundle),
        f"Each channel padded with {padding} to the sides of a tile; tiles of input.sides, {TILES[ways.tiles]}.",
        *_slices(bundle.plan),
        f"Where tiles overlap, {ways.blend} are averaged with {WEIGHTS[ways.weights]}.",
        "With mirror, they are averaged over every combination of plan.mirror_axes; an output mirrored along axis 0 "
        "is put in the place of its twin (twin_outputs).",
        *_restoring(bundle),
        *_cleaning(bundle),
    ]


def _slices(plan: Plan) -> list[str]:
    if plan.slice_axis is None:
        return []
    return [f"The network sees one slice at a time: along {'ijk'[plan.slice_axis]} the side of its input is always 1."]


def _restoring(bundle: ModelBundle) -> list[str]:
    """Back to the volume, as what tiles were averaged as or as what that amounts to, and to labels."""
    plan, regions = bundle.plan, bundle.schema.regions
    ways, steps = plan.inference, plan.recipe or ()
    turns = ways.blend == "logits" and ways.restores == "probabilities"
    brought = "probabilities" if turns else ways.blend
    made = ["The averaged logits become probabilities, by output.activation."] if turns else []
    how = "linearly" if plan.placing is None else "as plan.placing.scores says"
    crops = plan.placing is not None or any(isinstance(step, CropForeground) for step in steps)
    cut = "; what was cut off is background" if crops else ""
    half = "0.5" if brought == "probabilities" else "0 (a probability of 0.5)"
    last = f"every region above {half} is painted, in order" if regions else "the highest output wins"
    return [
        *made,
        f"Back on the volume's own grid, {how}, as {brought}; {last}{cut}; label_ids are the values of the label map.",
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
    resampled = f"resampled to {spacing_mm} mm"
    if plan.placing is not None:
        axes = f"axes towards {plan.axis_codes}" if plan.placing.reorients else "axes as they are stored"
        return [
            f"Volumes in the file's unit (CT: HU), {axes}; what is 0 in every channel all around is cut off.",
            _normalising(plan),
            f"Then {resampled}, as plan.placing says.",
        ]
    missing = " A missing optional channel is 0 everywhere." if any(c.optional for c in plan.channels) else ""
    return [
        f"Volumes in the file's unit (CT: HU). {_normalising(plan)}",
        f"Then axes towards {plan.axis_codes}, and {resampled} by cubic splines.{missing}",
    ]


def _normalising(plan: Plan) -> str:
    hows = plan.normalisations
    kinds = [kind for kind in NORMALISED if any(how.kind == kind for how in hows)]
    nonzero = {"zscore": NONZERO} if any(how.nonzero for how in hows) else {}
    said = "; ".join(NORMALISED[kind] + nonzero.get(kind, "") for kind in kinds)
    least = "; what divides is at least smallest_divisor" if any(how.smallest_divisor for how in hows) else ""
    return f"Each channel normalised as plan.channels says: {said}{least}."
