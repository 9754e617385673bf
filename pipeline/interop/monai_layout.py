"""What a MONAI bundle's configuration says of a plan: network, preprocessing, tiles, and what its outputs become."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipeline.errors import ExportError
from pipeline.models.monai_spec import MonaiNetwork
from pipeline.plan import ChannelPlan, InferenceConventions, Plan
from transforms.labels import LabelSchema
from transforms.recipe_spec import (
    CropForeground,
    MapPercentiles,
    MapRange,
    Reorient,
    Respace,
    Standardise,
    Step,
    Stretch,
)

IMAGE, PREDICTION = "image", "pred"
Entry = dict[str, Any]

_MEDNEXT_S: Entry = {
    "init_filters": 32,
    "encoder_expansion_ratio": 2,
    "decoder_expansion_ratio": 2,
    "bottleneck_expansion_ratio": 2,
    "kernel_size": 3,
    "use_residual_connection": True,
    "blocks_down": [2, 2, 2, 2],
    "blocks_bottleneck": 2,
    "blocks_up": [2, 2, 2, 2],
}
"""Size S of Roy et al. 2023, which `create_mednext` of MONAI makes."""


def monai_network(plan: Plan) -> MonaiNetwork | None:
    """The plan's network as a class of MONAI with its arguments; None where it is none of these."""
    if plan.monai is not None:
        return None if plan.monai.output_order else plan.monai
    if plan.slice_axis is not None or plan.unet.dimensions != 3:
        return None
    unet = plan.unet
    rows = [list(row) for row in unet.strides]
    common = {"spatial_dims": 3, "in_channels": unet.in_channels, "out_channels": unet.out_channels}
    known: dict[str, tuple[str, Entry]] = {
        "segresnet": ("SegResNet", {"init_filters": 16, "blocks_down": [1, 2, 2, 4], "blocks_up": [1, 1, 1]}),
        "swin_unetr": ("SwinUNETR", {"feature_size": 24}),
        "dynunet": (
            "DynUNet",
            {
                "kernel_size": [list(row) for row in unet.kernel_shapes],
                "strides": rows,
                "upsample_kernel_size": rows[1:],
                "filters": list(unet.features),
                "res_block": unet.block == "residual",
            },
        ),
        "attention_unet": ("AttentionUnet", {"channels": list(unet.features), "strides": rows[1:]}),
        "mednext": ("MedNeXt", _MEDNEXT_S),
    }
    if plan.network not in known:
        return None
    name, arguments = known[plan.network]
    return MonaiNetwork(name=name, arguments={**common, **arguments})


def before_network(plan: Plan) -> list[Entry]:
    """The transforms from files to what the network sees, under `image`.

    Raises:
        ExportError: the plan prepares a study in a way that MONAI's transforms cannot say.
    """
    if plan.placing is not None:
        raise ExportError(
            "the model prepares a study as nnU-Net does, which MONAI's transforms cannot say; use --to nnunet, or "
            "--to torchscript for the network alone"
        )
    if plan.recipe is not None:
        return [*_loading([IMAGE]), *(_entry(step) for step in plan.recipe), _plain("EnsureTyped", IMAGE)]
    keys = [IMAGE] if len(plan.channels) == 1 else [f"{IMAGE}_{n}" for n in range(len(plan.channels))]
    joined = [{**_plain("ConcatItemsd", keys), "name": IMAGE}] if len(keys) > 1 else []
    return [
        *_loading(keys),
        *(_normalisation(channel, key) for channel, key in zip(plan.channels, keys, strict=True)),
        *joined,
        {**_plain("Orientationd", IMAGE), "axcodes": plan.axis_codes},
        # Cubic, as in training; MONAI's grid begins at the first voxel, ours shares its centre with the study's.
        {**_plain("Spacingd", IMAGE), "pixdim": list(plan.spacing_mm), "mode": 3, "padding_mode": "mirror"},
        _plain("EnsureTyped", IMAGE),
    ]


def inferer(plan: Plan, tile_step: float) -> Entry:
    """Tiles and how they are blended."""
    even = plan.inference.weights == "even"
    return {
        "_target_": "SlidingWindowInferer",
        "roi_size": list(plan.patch_shape),
        "sw_batch_size": 1,
        "overlap": round(1.0 - tile_step, 6),
        "mode": "constant" if even else "gaussian",
        **_padding(plan),
    }


def _padding(plan: Plan) -> Entry:
    """Beyond the volume: 0, or each channel's lowest value, for which a border that is mostly air is nearest."""
    if plan.inference.padding == "zero":
        return {"padding_mode": "constant"}
    hows = [channel.normalisation for channel in plan.channels]
    lowest = {(how.lower - how.mean) / how.deviation for how in hows if how.kind == "window"}
    if len(lowest) == 1 and all(how.kind == "window" for how in hows):
        return {"padding_mode": "constant", "cval": lowest.pop()}
    return {"padding_mode": "replicate"}


def wrapped(network: str, plan: Plan, schema: LabelSchema) -> str:
    """Code for the network of a reference or an expression: where probabilities are blended, it gives these."""
    if plan.inference.blend == "logits":
        return f"${network}.to(@device)"
    last = "Sigmoid()" if schema.regions else "Softmax(dim=1)"
    return f"$torch.nn.Sequential({network}, torch.nn.{last}).to(@device)"


def after_network(schema: LabelSchema, ways: InferenceConventions) -> list[Entry]:
    """The transforms from what is blended to a label map on the study's own grid, under `pred`."""
    made = {"sigmoid": True} if schema.regions else {"softmax": True}
    activated = [{**_plain("Activationsd", PREDICTION), **made}] if ways.blend == "logits" else []
    back: Entry = {
        **_plain("Invertd", PREDICTION),
        "transform": "@preprocessing",
        "orig_keys": IMAGE,
        "nearest_interp": False,
        "to_tensor": True,
    }
    # What was cut off comes back as 0: as a logit that is no region's, nor nothing's, but the background of labels.
    is_last = ways.restores == "blended" and not schema.regions
    scored = [back, *activated] if is_last else [*activated, back]
    if schema.regions:
        painted = _painting(schema)
        discrete: list[Entry] = [
            {**_plain("AsDiscreted", PREDICTION), "threshold": 0.5},
            {**_plain("Lambdad", PREDICTION), "func": f"$lambda x: {painted}"},
        ]
        return [*scored, *discrete]
    discrete = [{**_plain("AsDiscreted", PREDICTION), "argmax": True}]
    if schema.ids != tuple(range(1, schema.class_count)):
        discrete.append(
            {
                **_plain("MapLabelValued", PREDICTION),
                "orig_labels": list(range(schema.class_count)),
                "target_labels": [0, *schema.ids],
            }
        )
    return [*scored, *discrete]


def data_format(plan: Plan, schema: LabelSchema) -> Entry:
    """`network_data_format` of metadata.json."""
    outputs = [region.name for region in schema.regions] or ["background", *schema.names]
    modality = plan.channels[0].modality
    common = {"type": "image", "dtype": "float32", "spatial_shape": list(plan.patch_shape), "is_patch_data": True}
    return {
        "inputs": {
            IMAGE: {
                **common,
                "format": "hounsfield" if modality == "CT" else "magnitude",
                "modality": modality,
                "num_channels": len(plan.channels),
                "value_range": [],
                "channel_def": _numbered([channel.name for channel in plan.channels]),
            }
        },
        "outputs": {
            PREDICTION: {
                **common,
                "format": "segmentation",
                "num_channels": len(outputs),
                "value_range": [],
                "channel_def": _numbered(outputs),
            }
        },
    }


def _numbered(names: Sequence[str]) -> dict[str, str]:
    return {str(number): name for number, name in enumerate(names)}


def _plain(target: str, keys: str | Sequence[str]) -> Entry:
    return {"_target_": target, "keys": keys}


def _loading(keys: Sequence[str]) -> list[Entry]:
    given = keys[0] if len(keys) == 1 else list(keys)
    return [_plain("LoadImaged", given), _plain("EnsureChannelFirstd", given)]


def _normalisation(channel: ChannelPlan, key: str) -> Entry:
    how = channel.normalisation
    if how.kind == "window":
        low, high = ((bound - how.mean) / how.deviation for bound in (how.lower, how.upper))
        ranges = {"a_min": how.lower, "a_max": how.upper, "b_min": low, "b_max": high, "clip": True}
        return {**_plain("ScaleIntensityRanged", key), **ranges}
    if how.kind == "zscore" and not how.nonzero:
        return {**_plain("NormalizeIntensityd", key), "nonzero": False}
    if how.kind == "zscore":
        # No transform of MONAI puts the lowest value where a masked background was.
        code = (
            "$lambda x: torch.where(x != 0, (x - x[x != 0].mean()) / x[x != 0].std(correction=0), "
            "(x[x != 0].min() - x[x != 0].mean()) / x[x != 0].std(correction=0))"
        )
        return {**_plain("Lambdad", key), "func": code}
    raise ExportError(f"channel {channel.name} is normalised by '{how.kind}', which MONAI's transforms cannot say")


def _entry(step: Step) -> Entry:
    match step:
        case Reorient():
            return {**_plain("Orientationd", IMAGE), "axcodes": step.axis_codes}
        case Respace():
            mode = "bilinear" if step.interpolation == "linear" else "nearest"
            return {**_plain("Spacingd", IMAGE), "pixdim": [side or -1.0 for side in step.spacing_mm], "mode": mode}
        case MapRange():
            ranges = {"a_min": step.source[0], "a_max": step.source[1], **_target(step.target), "clip": step.clip}
            return {**_plain("ScaleIntensityRanged", IMAGE), **ranges}
        case MapPercentiles():
            low, high = step.percentiles
            said = {"lower": low, "upper": high, **_target(step.target), "clip": step.clip}
            return {**_plain("ScaleIntensityRangePercentilesd", IMAGE), **said, "channel_wise": step.channel_wise}
        case Stretch():
            said = {"minv": step.target[0], "maxv": step.target[1], "channel_wise": step.channel_wise}
            return {**_plain("ScaleIntensityd", IMAGE), **said}
        case Standardise():
            return _standardised(step)
        case CropForeground():
            said = {"source_key": IMAGE, "margin": step.margin, "allow_smaller": True}
            return {**_plain("CropForegroundd", IMAGE), **said}


def _target(target: tuple[float, float] | None) -> Entry:
    return {"b_min": None, "b_max": None} if target is None else {"b_min": target[0], "b_max": target[1]}


def _standardised(step: Standardise) -> Entry:
    said: Entry = {"nonzero": step.nonzero, "channel_wise": step.channel_wise}
    for name, values in (("subtrahend", step.mean), ("divisor", step.deviation)):
        if values is not None:
            said[name] = list(values) if step.channel_wise else values[0]
    return {**_plain("NormalizeIntensityd", IMAGE), **said}


def _painting(schema: LabelSchema) -> str:
    """Code for the label map of regions (R, I, J, K): later ones over earlier ones."""
    ids = (0, *schema.ids)
    painted = "torch.zeros_like(x[[0]])"
    for number, painting in enumerate(schema.painted_classes):
        painted = f"torch.where(x[[{number}]] > 0, {float(ids[painting])}, {painted})"
    return painted
