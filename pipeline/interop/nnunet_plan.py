"""The plans.json and dataset.json of nnU-Net v2 as our plan and label schema; the network is elsewhere. All is data.

What is not known here is refused by name: a plan that were followed only in part would give other labels, in silence.

Facts from MIC-DKFZ/nnUNet: nnunetv2/utilities/plans_handling/plans_handler.py, imageio/, preprocessing/.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, cast, get_args

from pydantic import ValidationError

from pipeline.errors import ManifestError, PlanError, describe_fault
from pipeline.label_tables import read_labels
from pipeline.manifest import Modality
from pipeline.manifest_formats import known_modality, numbered_names
from pipeline.plan import ChannelPlan, InferenceConventions
from transforms.intensity_spec import Normalisation
from transforms.labels import LabelSchema
from transforms.placing_spec import Placing, Resizing, SplineOrder

CONVENTIONS = InferenceConventions(blend="logits", weights="nnunet", padding="zero", longest_window=1.0)
"""Of nnunetv2/inference/predict_from_raw_data.py and sliding_window_prediction.py."""

READERS = {"SimpleITKIO": False, "NibabelIO": False, "SimpleITKIOWithReorient": True, "NibabelIOWithReorient": True}
"""Its readers of volumes, and whether they reorient to RAS."""

SMALLEST_DEVIATION = 1e-8
"""By what it divides at least: so a channel of one value, as of a sequence that is missing, becomes 0."""

_PLANS_KEYS = {
    "dataset_name",
    "plans_name",
    "original_median_spacing_after_transp",
    "original_median_shape_after_transp",
    "image_reader_writer",
    "transpose_forward",
    "transpose_backward",
    "configurations",
    "experiment_planner_used",
    "label_manager",
    "foreground_intensity_properties_per_channel",
    "foreground_intensity_properties_by_modality",
}

_CONFIGURATION_KEYS = {
    "data_identifier",
    "preprocessor_name",
    "batch_size",
    "patch_size",
    "median_image_size_in_voxels",
    "spacing",
    "normalization_schemes",
    "use_mask_for_norm",
    "resampling_fn_data",
    "resampling_fn_data_kwargs",
    "resampling_fn_seg",
    "resampling_fn_seg_kwargs",
    "resampling_fn_probabilities",
    "resampling_fn_probabilities_kwargs",
    "architecture",
    "batch_dice",
    "inherits_from",
    "next_stage",
    "previous_stage",
    "UNet_class_name",
    "UNet_base_num_features",
    "unet_max_num_features",
    "n_conv_per_stage_encoder",
    "n_conv_per_stage_decoder",
    "num_pool_per_axis",
    "pool_op_kernel_sizes",
    "conv_kernel_sizes",
}

_SPLINES = "resample_data_or_seg_to_shape"
_TORCH = "resample_torch_fornnunet"
_THRESHOLD = "separate_z_anisotropy_threshold"
_RESAMPLING_KEYS = {
    _SPLINES: {"is_seg", "order", "order_z", "force_separate_z", _THRESHOLD},
    _TORCH: {
        "is_seg",
        "num_threads",
        "device",
        "memefficient_seg_resampling",
        "force_separate_z",
        _THRESHOLD,
        "mode",
        "aniso_axis_mode",
    },
}
_MEASURES = {"min", "max", "mean", "std", "percentile_00_5", "percentile_99_5"}
_TORCH_MODES = {"mode": "linear", "aniso_axis_mode": "nearest-exact"}

_MALFORMED = (AttributeError, TypeError, ValueError, LookupError, ArithmeticError)
"""What comes of values of another type than expected where no check of its own says so."""


def plan_of_nnunet(plans: dict[str, Any], dataset: dict[str, Any], configuration: str) -> dict[str, Any]:
    """The fields of `Plan` that plans.json and dataset.json decide: all but `network` and `unet`.

    Axes are the study's own as stored (i, j, k), unless nnU-Net's reader reorients them. What depends on the network
    (mirrored axes, receptive field, memory, cost) is filled with values that say nothing.

    Raises:
        PlanError: what is missing, of another type than expected, or not known here.
    """
    try:
        return _fields(plans, dataset, configuration)
    except _MALFORMED as error:
        raise PlanError(
            f"plans.json: configuration {configuration} is not as nnU-Net writes it ({describe_fault(error)}); copy "
            "the file again from where the model was trained"
        ) from error


def _fields(plans: dict[str, Any], dataset: dict[str, Any], configuration: str) -> dict[str, Any]:
    chosen = configuration_of(plans, configuration)
    axes = axes_of_nnunet(plans)
    sides, spacing = _whole_numbers(chosen, "patch_size"), _numbers(chosen, "spacing")
    flat = len(sides) == 2
    if flat:
        sides, spacing = [1, *sides], [*_numbers(plans, "original_median_spacing_after_transp")[:1], *spacing]
    if len(sides) != 3 or len(spacing) != 3 or min(sides) < 1 or min(spacing) <= 0:
        raise PlanError(f"plans.json: patch_size {sides} and spacing {spacing}, expected two or three sizes each")
    slice_axis = axes[0] if flat else None
    reorients = _known(READERS, str(plans.get("image_reader_writer")), "image_reader_writer")
    return {
        "channels": _channels(plans, dataset, chosen),
        "class_count": schema_of_nnunet(dataset).class_count,
        "axis_codes": "RAS",
        "spacing_mm": _as_stored(spacing, axes),
        "patch_shape": _as_stored(sides, axes),
        "batch_size": _whole(chosen.get("batch_size", 1), "batch_size"),
        "slice_axis": slice_axis,
        "mirror_axes": tuple(a for a in range(3) if a != slice_axis),
        "inference": CONVENTIONS,
        "placing": Placing(
            reorients=reorients,
            kept_axis=cast(Any, slice_axis),
            image=_resizing(chosen, "data"),
            scores=_score_resizing(chosen),
        ),
        "receptive_field_mm": (0.0, 0.0, 0.0),
        "largest_label_extent_mm": (0.0, 0.0, 0.0),
        "memory_gb": 0.0,
        "patch_gflop": 0.0,
        "reasons": {"placing": f"as nnU-Net's {plans.get('plans_name', 'plans')}, configuration {configuration}"},
        "warnings": (),
    }


def schema_of_nnunet(dataset: dict[str, Any]) -> LabelSchema:
    """The labels of dataset.json in the order of the network's outputs; nnU-Net knows no left/right twins.

    Raises:
        PlanError: the table is none, or its values have gaps, so that outputs would not be labels.
    """
    try:
        table = read_labels(dataset.get("labels"), dataset.get("regions_class_order"), "dataset.json")
        schema = LabelSchema.model_validate(table)
    except ManifestError as error:
        raise PlanError(str(error)) from error
    except _MALFORMED as error:
        raise PlanError(f"dataset.json: labels are not as nnU-Net writes them ({describe_fault(error)})") from error
    if not schema.regions and schema.ids != tuple(range(1, schema.class_count)):
        raise PlanError(f"dataset.json: label values {list(schema.ids)}, expected 1 to {len(schema.ids)} without gaps")
    return schema


def axes_of_nnunet(plans: dict[str, Any]) -> tuple[int, int, int]:
    """For each axis of nnU-Net's network the axis (i, j, k) of the file: it reads k, j, i and then transposes.

    Raises:
        PlanError: `transpose_forward` is no order of three axes.
    """
    order = _whole_numbers(plans, "transpose_forward")
    if sorted(order) != [0, 1, 2]:
        raise PlanError(f"plans.json: transpose_forward {order}, expected an order of 0, 1, 2")
    return 2 - order[0], 2 - order[1], 2 - order[2]


def configuration_of(plans: dict[str, Any], name: str) -> dict[str, Any]:
    """One configuration of plans.json with all that it inherits.

    Raises:
        PlanError: there is none of that name, it needs another's predictions (a cascade), or it has unknown keys.
    """
    _refuse_unknown(plans, _PLANS_KEYS, "plans.json")
    configurations = plans.get("configurations")
    if not isinstance(configurations, dict):
        raise PlanError("plans.json: no table of configurations in it")
    chain: list[str] = []
    wanted: str | None = name
    while wanted is not None:
        if not isinstance(wanted, str):
            raise PlanError(f"plans.json: configuration {chain[-1]}: inherits_from is {wanted!r}, expected a name")
        if wanted in chain or not isinstance(configurations.get(wanted), dict):
            known = ", ".join(configurations)
            raise PlanError(f"plans.json: no configuration '{wanted}' that can be followed; there are {known}")
        chain.append(wanted)
        wanted = configurations[wanted].get("inherits_from")
    found: dict[str, Any] = {}
    for one in reversed(chain):
        found |= configurations[one]
    _refuse_unknown(found, _CONFIGURATION_KEYS, f"plans.json: configuration {name}")
    if found.get("previous_stage") is not None:
        raise PlanError(
            f"plans.json: configuration {name} needs the predictions of {found['previous_stage']} (a cascade), which "
            "is not supported; import another configuration"
        )
    _known(
        {"DefaultPreprocessor": True}, str(found.get("preprocessor_name", "DefaultPreprocessor")), "preprocessor_name"
    )
    _known({"LabelManager": True}, str(plans.get("label_manager", "LabelManager")), "label_manager")
    return found


def _channels(plans: dict[str, Any], dataset: dict[str, Any], chosen: dict[str, Any]) -> tuple[ChannelPlan, ...]:
    key = "channel_names" if "channel_names" in dataset else "modality"
    named = dataset.get(key)
    if not isinstance(named, dict) or sorted(named) != sorted(str(n) for n in range(len(named))):
        raise PlanError(f"dataset.json: channel_names {named!r}, expected names of channels 0, 1, ...")
    schemes, masks = _list(chosen, "normalization_schemes"), _list(chosen, "use_mask_for_norm")
    if not len(schemes) == len(masks) == len(named):
        raise PlanError(f"plans.json: {len(schemes)} normalization_schemes for {len(named)} channels")
    given = [str(named[str(n)]) for n in range(len(named))]
    return tuple(
        ChannelPlan(
            name=name,
            modality=_modality(plain, str(scheme), f"dataset.json: {key}.{n}"),
            normalisation=_normalisation(str(scheme), bool(mask), measured),
            lowest=measured.get("min"),
            highest=measured.get("max"),
        )
        for n, (name, plain, scheme, mask, measured) in enumerate(
            zip(numbered_names(given), given, schemes, masks, _measured(plans, len(given)), strict=True)
        )
    )


def _measured(plans: dict[str, Any], count: int) -> list[dict[str, float]]:
    """Of each channel the intensities that training saw, where the plans tell; all are finite."""
    key = "foreground_intensity_properties_per_channel"
    key = key if plans.get(key) else "foreground_intensity_properties_by_modality"
    table = plans.get(key) or {}
    if not isinstance(table, dict):
        raise PlanError(f"plans.json: {key} is {table!r}, expected a table of channels")
    found = []
    for n in range(count):
        said = table.get(str(n), {})
        if not isinstance(said, dict):
            raise PlanError(f"plans.json: {key}.{n} is {said!r}, expected a table of intensities")
        found.append({name: _number(value, f"{key}.{n}.{name}") for name, value in said.items() if name in _MEASURES})
    return found


def _modality(name: str, scheme: str, source: str) -> Modality | None:
    """As the manifest's reader knows the channel's name or its words, else CT for what is normalised as one, or None.

    nnU-Net's names are free: some say a normalisation (zscore, noNorm), which the plans say too, and no modality.
    """
    said = known_modality(name)
    found = {said} if said else {known for word in re.split(r"[^\w*]|_", name) if (known := known_modality(word))}
    if len(found) > 1:
        raise PlanError(
            f"{source}: found '{name}', which is {' as well as '.join(sorted(found))}; expected one of "
            f"{', '.join(get_args(Modality))}; write there which one it is, as '{min(found)}'"
        )
    return cast(Modality | None, found.pop() if found else "CT" if scheme == "CTNormalization" else None)


def _normalisation(scheme: str, masked: bool, measured: dict[str, Any]) -> Normalisation:
    if scheme == "CTNormalization":
        try:
            return Normalisation(
                kind="window",
                lower=measured["percentile_00_5"],
                upper=measured["percentile_99_5"],
                mean=measured["mean"],
                deviation=max(measured["std"], SMALLEST_DEVIATION),
            )
        except (KeyError, ValidationError) as error:
            raise PlanError("plans.json: foreground_intensity_properties lack a window for CTNormalization") from error
    kinds = {
        "ZScoreNormalization": "inside" if masked else "zscore",
        "NoNormalization": "none",
        "RescaleTo01Normalization": "unit",
        "RGBTo01Normalization": "byte",
    }
    kind = _known(kinds, scheme, "normalization_schemes")
    return Normalisation(
        kind=kind, smallest_divisor=SMALLEST_DEVIATION if kind in ("inside", "zscore", "unit") else None
    )


def _resizing(chosen: dict[str, Any], what: str) -> Resizing:
    key = f"resampling_fn_{what}"
    name = str(chosen.get(key))
    known = _known(_RESAMPLING_KEYS, name, key)
    how = chosen.get(f"{key}_kwargs") or {}
    if not isinstance(how, dict):
        raise PlanError(f"plans.json: {key}_kwargs is {how!r}, expected a table")
    _refuse_unknown(how, known, f"plans.json: {key}_kwargs")
    if how.get("is_seg"):
        raise PlanError(
            f"plans.json: {key}_kwargs: is_seg is {how['is_seg']!r}, expected false; {what} are not resampled as labels"
            " here; train with plans that do not ask for it"
        )
    separate = how.get("force_separate_z", None if name == _TORCH else False)
    if not isinstance(separate, bool | None):
        raise PlanError(f"plans.json: {key}_kwargs: force_separate_z is {separate!r}, expected true, false or null")
    for mode, expected in _TORCH_MODES.items():
        _known({expected: True}, str(how.get(mode, expected)), f"{key}_kwargs: {mode}")
    orders = (
        {"order": 1, "order_z": 0}
        if name == _TORCH
        else {"order": how.get("order", 3), "order_z": how.get("order_z", 0)}
    )
    for order in orders.values():
        _known(dict.fromkeys(map(str, get_args(SplineOrder))), str(order), f"{key}_kwargs: order")
    return Resizing(
        order=orders["order"],
        order_across=orders["order_z"],
        separate=separate,
        anisotropy=_number(how.get(_THRESHOLD, 3.0), f"{key}_kwargs: {_THRESHOLD}"),
    )


def _score_resizing(chosen: dict[str, Any]) -> Resizing:
    """Scores go back linearly here, whose winner is found slab by slab; across slices the nearest may be taken."""
    how = _resizing(chosen, "probabilities")
    if how.order != 1 or how.order_across not in (0, 1):
        raise PlanError(
            f"plans.json: resampling_fn_probabilities of order {how.order}, across slices {how.order_across}; "
            "expected order 1, across slices 0 or 1"
        )
    return how


def _as_stored(values: Sequence[Any], axes: Sequence[int]) -> tuple[Any, ...]:
    """Values along the axes of nnU-Net's network, along those of the file."""
    return tuple(value for _, value in sorted(zip(axes, values, strict=True)))


def _list(table: dict[str, Any], key: str) -> list[Any]:
    found = table.get(key)
    if not isinstance(found, list | tuple):
        raise PlanError(f"plans.json: {key} is {found!r}, expected a list")
    return list(found)


def _number(value: Any, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise PlanError(f"plans.json: {key} is {value!r}, expected a finite number")
    return float(value)


def _whole(value: Any, key: str) -> int:
    if not _number(value, key).is_integer():
        raise PlanError(f"plans.json: {key} is {value!r}, expected a whole number")
    return int(value)


def _numbers(table: dict[str, Any], key: str) -> list[float]:
    return [_number(value, key) for value in _list(table, key)]


def _whole_numbers(table: dict[str, Any], key: str) -> list[int]:
    return [_whole(value, key) for value in _list(table, key)]


def _known(table: dict[str, Any], name: str, key: str) -> Any:
    if name not in table:
        raise PlanError(f"plans.json: {key} is {name}, which is not known here; known are {', '.join(table)}")
    return table[name]


def _refuse_unknown(table: dict[str, Any], known: set[str], where: str) -> None:
    if unknown := sorted(set(table) - known):
        raise PlanError(f"{where}: {', '.join(unknown)} is not known here, and may change the result")
