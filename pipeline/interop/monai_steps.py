"""MONAI's transforms before the network, as a recipe; and those after it, as what its outputs mean.

Each entry says which arguments it understands; others, and other transforms, are refused by name, since leaving one
out would change the result. What is given is what is for one key of the data, as `monai_transforms` chooses it.
Defaults are MONAI's (version 1.6).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ValidationError

from pipeline.errors import BundleError
from pipeline.interop.monai_layout import IMAGE
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
"""Arguments that every transform may have, and that change no result; of `dtype` only floating ones are such."""


Stage = Literal["logits", "probabilities", "labels"]
"""How far the transforms after the network have come."""


@dataclass(frozen=True)
class Inversion:
    """Invert: what it brings back to the study's grid, and whether by the nearest voxel (None where code says it)."""

    of: Stage
    nearest: bool | None


@dataclass(frozen=True)
class Outputs:
    """What becomes of the network's outputs: exclusive classes, or a yes or no each; and how they are brought back."""

    activation: Literal["softmax", "sigmoid"]
    inversion: Inversion | None = None


def recipe_of(transforms: Sequence[Arguments], source: str, left_out: frozenset[str] = frozenset()) -> tuple[Step, ...]:
    """The steps that the transforms before the network amount to; those named in `left_out` are passed over.

    Raises:
        BundleError: a transform or one of its arguments is not understood.
    """
    steps = []
    for transform in transforms:
        name = transform_name(transform, source)
        if name in left_out or is_disabled(transform):
            continue
        if name not in _READERS and name not in WITHOUT_EFFECT:
            raise BundleError(
                f"{source}: the transform {name} before the network is not understood; known are "
                f"{', '.join([*_READERS, *WITHOUT_EFFECT])}; --leave-out {name} takes it out, which changes the result"
            )
        try:
            _check_floating(transform)
            if name in _READERS:
                steps.append(_READERS[name](transform))
            elif name == "LoadImage":
                _check_loading(transform)
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
    stage: Stage = "logits"
    inversion = None
    for transform in transforms:
        name = transform_name(transform, source)
        if name == "SaveImage" or name in left_out or is_disabled(transform):
            continue
        if name in WITHOUT_EFFECT:
            _check_outputs_type(transform, name, source, discrete=stage == "labels")
        elif name == "Invert":
            inversion = inversion or _inversion(transform, stage)
        elif name == "Activations" and not transform.get("other"):
            activation = "sigmoid" if transform.get("sigmoid") else activation
            activates = bool(transform.get("sigmoid") or transform.get("softmax"))
            stage = "probabilities" if activates and stage == "logits" else stage
        elif name == "AsDiscrete":
            _check_discrete(transform, activation, source)
            stage = "labels"
        else:
            raise BundleError(
                f"{source}: the transform {name} after the network is not understood; known are Activations, "
                f"AsDiscrete, Invert and SaveImage; --leave-out {name} takes it out, which changes the result"
            )
    return Outputs(activation, inversion)


def transform_name(transform: Any, source: str) -> str:
    """MONAI's name of a transform without the d of those on dictionaries; one that is not MONAI's keeps its module."""
    target = transform.get("_target_") if isinstance(transform, Mapping) else None
    if not isinstance(target, str):
        raise BundleError(f"{source}: expected a transform with its _target_, found {str(transform)[:60]!r}")
    module, _, plain = target.rpartition(".")
    if module and module.partition(".")[0] != "monai":
        return target
    if plain in _READERS:
        return plain
    return next((plain.removesuffix(ending) for ending in ("Dict", "D", "d") if plain.endswith(ending)), plain)


def is_disabled(transform: Arguments) -> bool:
    """Whether MONAI leaves the transform out."""
    return transform.get("_disabled_") in (True, "true", "True")


class _NotSaidError(Exception):
    """A transform's argument that no step can say."""


def _inversion(transform: Arguments, stage: Stage) -> Inversion:
    nearest = transform.get("nearest_interp", True)
    return Inversion(stage, None if isinstance(nearest, str) else bool(nearest))


def _check_discrete(transform: Arguments, activation: str, source: str) -> None:
    threshold = transform.get("threshold")
    argmax = bool(transform.get("argmax"))
    expected = argmax and threshold is None if activation == "softmax" else threshold == 0.5 and not argmax
    if not expected or transform.get("to_onehot") or transform.get("rounding"):
        wanted = "argmax" if activation == "softmax" else "threshold 0.5"
        raise BundleError(f"{source}: AsDiscrete after a {activation} is understood with {wanted} alone")


def _check_outputs_type(transform: Arguments, name: str, source: str, *, discrete: bool) -> None:
    """A cast rounds probabilities; once they are made into labels it changes nothing."""
    try:
        if not discrete:
            _check_floating(transform)
    except _NotSaidError as error:
        raise BundleError(f"{source}: {name} after the network: {error}") from error


def _check_floating(transform: Arguments) -> None:
    said = transform.get("dtype")
    if said is not None and not _FLOATING.fullmatch(str(said)):
        raise _NotSaidError(
            f"dtype {str(said)!r} rounds values, which is not understood, expected a floating one, as float32"
        )


_FLOATING = re.compile(r"(?:(?:torch|np|numpy)\.)?(?:b?float\d*|half|double)")

_LOADING: Mapping[str, Any] = {
    "reader": None,
    "image_only": None,
    "ensure_channel_first": None,
    "meta_keys": None,
    "meta_key_postfix": None,
    "overwriting": None,
    "simple_keys": None,
    "prune_meta_pattern": None,
    "prune_meta_sep": None,
    "expanduser": None,
    "affine_lps_to_ras": (True,),
    "as_closest_canonical": (False,),
    "reverse_indexing": (False,),
    "channel_dim": (None,),
}
"""What LoadImage and its readers may be told: what changes no voxel, and the defaults of what does."""

_READER_NAMES = ("NibabelReader", "ITKReader", "NrrdReader", "PydicomReader", "NumpyReader", "PILReader")


def _check_loading(transform: Arguments) -> None:
    reader = _only(transform, _LOADING)["reader"]
    named = reader.rpartition(".")[2].casefold() if isinstance(reader, str) else reader
    if named is not None and named not in [name.casefold() for name in _READER_NAMES]:
        raise _NotSaidError(f"reader {str(reader)[:60]!r} is not understood, expected {' or '.join(_READER_NAMES)}")


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
    labels = said["labels"]
    if labels is not None and [tuple(pair) for pair in labels] != _AXIS_LABELS:
        raise _NotSaidError(f"labels {labels!r} are not understood, expected null or {_AXIS_LABELS}")
    if said["as_closest_canonical"]:
        return Reorient(axis_codes="RAS")
    codes = "".join(said["axcodes"]) if isinstance(said["axcodes"], list | tuple) else said["axcodes"]
    fits = [sum(code in pair for code in str(codes)) == 1 for pair in _AXIS_LABELS]
    if not all(fits) or len(str(codes)) != 3:
        raise _NotSaidError(f"axcodes {codes!r} is not understood, expected one letter each of L or R, P or A, I or S")
    return Reorient(axis_codes=codes)


_AXIS_LABELS = [("L", "R"), ("P", "A"), ("I", "S")]
"""The ends of the axes by MONAI's default, which are those of RAS."""


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
    mode = said["mode"]
    if mode not in ("bilinear", "nearest", 0, 1):
        raise _NotSaidError(f"mode {mode!r} is not understood, expected 'bilinear' or 'nearest'")
    sides = [float(v) for v in said["pixdim"]] if isinstance(said["pixdim"], list) else [float(said["pixdim"])]
    sides = (sides + sides[-1:] * 3)[:3]
    i, j, k = (side if side > 0 else None for side in sides)
    return Respace(spacing_mm=(i, j, k), interpolation="linear" if mode in ("bilinear", 1) else "nearest")


def _pair(low: Any, high: Any) -> tuple[float, float] | None:
    return None if low is None or high is None else (float(low), float(high))


def _target(said: Mapping[str, Any]) -> tuple[float, float] | None:
    """`b_min` and `b_max`; MONAI clips at the one that is given alone, which no step says."""
    low, high = said["b_min"], said["b_max"]
    if (low is None) != (high is None):
        raise _NotSaidError(f"b_min {low!r} with b_max {high!r} is not understood, expected both or neither")
    if low is None and said["clip"]:
        raise _NotSaidError(f"clip {said['clip']!r} without b_min and b_max is not understood, expected both of them")
    return _pair(low, high)


def _map_range(transform: Arguments) -> Step:
    said = _only(transform, {"a_min": None, "a_max": None, "b_min": None, "b_max": None, "clip": False})
    source = _pair(said["a_min"], said["a_max"])
    if source is None:
        raise _NotSaidError("a_min and a_max are needed")
    return MapRange(source=source, target=_target(said), clip=bool(said["clip"]))


def _map_percentiles(transform: Arguments) -> Step:
    known = {"lower": None, "upper": None, "b_min": None, "b_max": None, "clip": False}
    said = _only(transform, {**known, "relative": (False,), "channel_wise": (False, True)})
    percentiles = _pair(said["lower"], said["upper"])
    if percentiles is None:
        raise _NotSaidError("lower and upper are needed")
    target, clip = _target(said), bool(said["clip"])
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
        "source_key": (IMAGE,),
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
