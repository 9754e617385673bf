"""MONAI's transforms before the network, as a recipe; and those after it, as what its outputs mean.

Each entry says which arguments it understands; others, and other transforms, are refused by name, since leaving one
out would change the result. Defaults are MONAI's (version 1.6).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ValidationError

from pipeline.errors import BundleError
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

Arguments = Mapping[str, Any]

WITHOUT_EFFECT = ("LoadImage", "EnsureChannelFirst", "EnsureType", "ToTensor", "CastToType", "ToDevice", "Identity")
"""What reading does anyway, or what moves nothing."""

PASSED_OVER = {"keys", "allow_missing_keys", "dtype", "lazy", "_target_", "_desc_", "_requires_", "_mode_"}
"""Arguments of every transform that say nothing of the result; arithmetic here is of float32 throughout."""


@dataclass(frozen=True)
class Outputs:
    """What becomes of the network's outputs: exclusive classes, or a yes or no each."""

    activation: Literal["softmax", "sigmoid"]


def recipe_of(transforms: Sequence[Arguments], source: str, left_out: frozenset[str] = frozenset()) -> tuple[Step, ...]:
    """The steps that the transforms before the network amount to; those named in `left_out` are passed over.

    Raises:
        BundleError: a transform or one of its arguments is not understood.
    """
    steps = []
    for transform in transforms:
        name = transform_name(transform, source)
        if name in WITHOUT_EFFECT or name in left_out or _is_disabled(transform):
            continue
        if name not in _READERS:
            raise BundleError(
                f"{source}: the transform {name} before the network is not understood; known are "
                f"{', '.join([*_READERS, *WITHOUT_EFFECT])}; --leave-out {name} takes it out, which changes the result"
            )
        try:
            steps.append(_READERS[name](transform))
        except (ValidationError, TypeError, ValueError, _NotSaidError) as error:
            told = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
            raise BundleError(f"{source}: {name}: {told.removeprefix('Value error, ')}") from error
    return tuple(steps)


def outputs_of(transforms: Sequence[Arguments], source: str, left_out: frozenset[str] = frozenset()) -> Outputs:
    """What the transforms after the network say of its outputs.

    Raises:
        BundleError: one that changes the result in a way that is not understood.
    """
    activation: Literal["softmax", "sigmoid"] = "softmax"
    for transform in transforms:
        name = transform_name(transform, source)
        if name in WITHOUT_EFFECT or name in ("Invert", "SaveImage") or name in left_out or _is_disabled(transform):
            continue
        if name == "Activations" and not transform.get("other"):
            activation = "sigmoid" if transform.get("sigmoid") else activation
        elif name == "AsDiscrete":
            _check_discrete(transform, activation, source)
        else:
            raise BundleError(
                f"{source}: the transform {name} after the network is not understood; known are Activations, "
                f"AsDiscrete, Invert and SaveImage; --leave-out {name} takes it out, which changes the result"
            )
    return Outputs(activation)


def transform_name(transform: Any, source: str) -> str:
    """MONAI's name of a transform without the d of those on dictionaries."""
    target = transform.get("_target_") if isinstance(transform, Mapping) else None
    if not isinstance(target, str):
        raise BundleError(f"{source}: expected a transform with its _target_, found {str(transform)[:60]!r}")
    plain = target.rpartition(".")[2]
    if plain in _READERS:
        return plain
    return next((plain.removesuffix(ending) for ending in ("Dict", "D", "d") if plain.endswith(ending)), plain)


class _NotSaidError(Exception):
    """A transform's argument that no step can say."""


def _is_disabled(transform: Arguments) -> bool:
    return transform.get("_disabled_") in (True, "true", "True")


def _check_discrete(transform: Arguments, activation: str, source: str) -> None:
    threshold = transform.get("threshold")
    expected = transform.get("argmax") if activation == "softmax" else threshold == 0.5
    if not expected or transform.get("to_onehot") or transform.get("rounding"):
        wanted = "argmax" if activation == "softmax" else "threshold 0.5"
        raise BundleError(f"{source}: AsDiscrete after a {activation} is understood with {wanted} alone")


def _only(transform: Arguments, known: Mapping[str, Any]) -> dict[str, Any]:
    """The transform's arguments with defaults; where a default is a set, the value must be one of it."""
    given = {k: v for k, v in transform.items() if k not in PASSED_OVER and k != "_disabled_"}
    if unknown := sorted(given.keys() - known.keys()):
        raise _NotSaidError(f"its argument {unknown[0]} is not understood; known are {', '.join(known)}")
    for name, value in given.items():
        if isinstance(known[name], tuple) and value not in known[name]:
            raise _NotSaidError(f"{name} {value!r} is not understood, expected {' or '.join(map(repr, known[name]))}")
    return {name: given.get(name, d[0] if isinstance(d, tuple) else d) for name, d in known.items()}


def _reorient(transform: Arguments) -> Step:
    said = _only(transform, {"axcodes": None, "as_closest_canonical": (False, True), "labels": None})
    if said["as_closest_canonical"] or said["axcodes"] is None:
        return Reorient(axis_codes="RAS")
    return Reorient(axis_codes=str(said["axcodes"]))


def _respace(transform: Arguments) -> Step:
    known = {
        "pixdim": None,
        "mode": "bilinear",
        "diagonal": (False,),
        "padding_mode": ("border",),
        "align_corners": (False, True, None),
        "scale_extent": (False,),
        "recompute_affine": (False,),
        "min_pixdim": (None,),
        "max_pixdim": (None,),
        "ensure_same_shape": (True, False),
    }
    said = _only(transform, known)
    mode = said["mode"][0] if isinstance(said["mode"], list) else said["mode"]
    if mode not in ("bilinear", "nearest", 0, 1):
        raise _NotSaidError(f"mode {mode!r} is not understood, expected 'bilinear' or 'nearest'")
    sides = [float(v) for v in said["pixdim"]] if isinstance(said["pixdim"], list) else [float(said["pixdim"])]
    sides = (sides + sides[-1:] * 3)[:3]
    i, j, k = (side if side > 0 else None for side in sides)
    return Respace(spacing_mm=(i, j, k), interpolation="linear" if mode in ("bilinear", 1) else "nearest")


def _pair(low: Any, high: Any) -> tuple[float, float] | None:
    return None if low is None or high is None else (float(low), float(high))


def _map_range(transform: Arguments) -> Step:
    said = _only(transform, {"a_min": None, "a_max": None, "b_min": None, "b_max": None, "clip": False})
    source = _pair(said["a_min"], said["a_max"])
    if source is None:
        raise _NotSaidError("a_min and a_max are needed")
    return MapRange(source=source, target=_pair(said["b_min"], said["b_max"]), clip=bool(said["clip"]))


def _map_percentiles(transform: Arguments) -> Step:
    known = {"lower": None, "upper": None, "b_min": None, "b_max": None, "clip": False}
    said = _only(transform, {**known, "relative": (False,), "channel_wise": (False, True)})
    percentiles = _pair(said["lower"], said["upper"])
    if percentiles is None:
        raise _NotSaidError("lower and upper are needed")
    target, clip = _pair(said["b_min"], said["b_max"]), bool(said["clip"])
    return MapPercentiles(percentiles=percentiles, target=target, clip=clip, channel_wise=said["channel_wise"])


def _stretch(transform: Arguments) -> Step:
    said = _only(transform, {"minv": 0.0, "maxv": 1.0, "factor": (None,), "channel_wise": (False, True)})
    target = _pair(said["minv"], said["maxv"])
    if target is None:
        raise _NotSaidError("minv and maxv are needed")
    return Stretch(target=target, channel_wise=said["channel_wise"])


def _standardise(transform: Arguments) -> Step:
    known = {"subtrahend": None, "divisor": None, "nonzero": (False, True), "channel_wise": (False, True)}
    said = _only(transform, known)
    mean, deviation = (
        None if v is None else tuple(float(x) for x in (v if isinstance(v, list) else [v]))
        for v in (said["subtrahend"], said["divisor"])
    )
    return Standardise(nonzero=said["nonzero"], channel_wise=said["channel_wise"], mean=mean, deviation=deviation)


def _crop_foreground(transform: Arguments) -> Step:
    known = {
        "source_key": "image",
        "margin": 0,
        "allow_smaller": None,
        "k_divisible": (1,),
        "mode": ("constant",),
        "start_coord_key": None,
        "end_coord_key": None,
    }
    said = _only(transform, known)
    if not isinstance(said["margin"], int) or (said["margin"] and said["allow_smaller"] is not True):
        raise _NotSaidError(f"margin {said['margin']!r} is understood as one number, with allow_smaller true")
    return CropForeground(margin=said["margin"])


_READERS: dict[str, Callable[[Arguments], Step]] = {
    "Orientation": _reorient,
    "Spacing": _respace,
    "ScaleIntensityRange": _map_range,
    "ScaleIntensityRangePercentiles": _map_percentiles,
    "ScaleIntensity": _stretch,
    "NormalizeIntensity": _standardise,
    "CropForeground": _crop_foreground,
}
"""By MONAI's name of the transform."""
