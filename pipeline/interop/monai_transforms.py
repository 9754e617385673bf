"""The transforms of a MONAI bundle as they are for one key of its data: found, chosen, and their arguments read.

MONAI's transforms work on a table of data, each on those entries that its `keys` name. Of the image only those that
name the image are read here, of the prediction those that name the prediction; the others are for labels, say, and
are left out as MONAI leaves the image alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.errors import BundleError
from pipeline.interop.monai_config import MonaiConfig
from pipeline.interop.monai_layout import IMAGE, PREDICTION
from pipeline.interop.monai_steps import Arguments, is_disabled, transform_name


@dataclass(frozen=True)
class Chain:
    """One of the bundle's two lists of transforms.

    key: the entry of the data that is followed through them. places: where the list is looked for, first what is
    really used, then what it is called by custom. nothing: what it means if a user says that there are none.
    """

    name: str
    key: str
    places: tuple[str, ...]
    nothing: str


BEFORE = Chain(
    name="preprocessing",
    key=IMAGE,
    places=(
        "evaluator#val_data_loader#dataset#transform",
        "dataloader#dataset#transform",
        "dataset#transform",
        "preprocessing",
        "pre_transforms",
    ),
    nothing="where the network takes a study as it is",
)
AFTER = Chain(
    name="postprocessing",
    key=PREDICTION,
    places=("evaluator#postprocessing", "postprocessing", "post_transforms"),
    nothing="where the outputs are classes that exclude each other (softmax)",
)

_NAME_ALONE = ("ToDevice", "SaveImage", "Lambda")
"""Transforms whose arguments say nothing here: devices, folders, or code."""

_ONE_A_KEY = (
    "mode", "padding_mode", "align_corners", "scale_extent", "recompute_affine", "dtype", "sigmoid", "softmax", "other",
    "argmax", "to_onehot", "threshold", "rounding", "nearest_interp",
)  # fmt: skip
"""Arguments that may be a list of one value for each of the transform's keys."""

_LOOKED_AT = ("keys", "source_key", "key_dst", "orig_keys")
"""Arguments that name entries of the data which are read; any other may name one that is written."""


@dataclass(frozen=True)
class _Entry:
    """A transform as it stands at the key `at`; `keys` is None where it names none, as those that take one array."""

    at: str
    said: Mapping[str, Any]
    name: str
    keys: tuple[str, ...] | None

    def is_for(self, key: str) -> bool:
        return self.keys is None or key in self.keys

    def may_write(self, key: str) -> bool:
        """Whether another argument than its keys names `key`, as one that joins other entries under it."""
        values = [value for name, value in self.said.items() if name not in _LOOKED_AT]
        return any(value == key or (isinstance(value, list) and key in value) for value in values)


def transforms_of(config: MonaiConfig, chain: Chain, left_out: frozenset[str] = frozenset()) -> list[Arguments]:
    """The transforms of the chain that are for its key, arguments of one value a key being those of that key.

    Of those in `left_out` and of disabled ones nothing but name and keys is read. How Invert interpolates stays as it
    is written where that is code.

    Raises:
        BundleError: the chain is not found or none of its transforms is for its key, or an argument needs code.
    """
    place, listed = _listed(config, chain)
    entries = [_entry(config, f"{place}#{number}") for number in range(len(listed))]
    _check_key(config, chain, place, entries)
    return [
        _arguments(config, entry, chain.key, by_name_alone=entry.name in left_out or entry.name in _NAME_ALONE)
        for entry in entries
        if entry.is_for(chain.key) or entry.may_write(chain.key)
    ]


def _listed(config: MonaiConfig, chain: Chain) -> tuple[str, Sequence[Any]]:
    """The chain's list of transforms, and the key at which it stands."""
    place, found = next((led for key in chain.places if (led := config.lead(key)) is not None), ("", None))
    if not place:
        raise BundleError(
            f"{config.source}: no {chain.name} (looked for {', '.join(chain.places)}); name the key where it is, as "
            f"--set '{chain.name}=\"@KEY\"', or --set '{chain.name}=[]' {chain.nothing}"
        )
    at, listed = place, found
    if isinstance(found, Mapping) and transform_name(found, config.source) == "Compose":
        disabled = is_disabled({"_disabled_": config.resolve(found.get("_disabled_"), f"{place}#_disabled_")})
        at, listed = (None if disabled else config.lead(f"{place}#transforms")) or (place, "a Compose without any")
    if not isinstance(listed, list):
        raise BundleError(
            f"{config.source}: {at} is no list of transforms in a Compose (found {str(listed)[:60]!r}); name the key "
            f"that holds one, as --set '{at}=\"@KEY\"', or --set '{at}=[]' {chain.nothing}"
        )
    return at, listed


def _entry(config: MonaiConfig, key: str) -> _Entry:
    led: tuple[str, Any] = config.lead(key) or (key, None)
    at, said = led
    name = transform_name(said, config.source)
    named = config.resolve(said.get("keys"), f"{at}#keys")
    keys = tuple(named) if isinstance(named, list | tuple) else (named,)
    if named is not None and not all(isinstance(one, str) for one in keys):
        raise BundleError(f"{config.source}: {at}#keys is {named!r}, expected the names of one or more entries")
    return _Entry(at, said, name, None if named is None else keys)


def _check_key(config: MonaiConfig, chain: Chain, place: str, entries: Sequence[_Entry]) -> None:
    """Nothing can be left out as being for others in a chain whose key is another one, or is made of others."""
    asked = [entry for entry in entries if entry.name == "LoadImage"] or entries
    if asked and not any(entry.is_for(chain.key) for entry in asked):
        found = ", ".join(sorted({key for entry in asked for key in entry.keys or ()}))
        raise BundleError(
            f"{config.source}: {place} is for {found}, expected transforms for '{chain.key}', as the {chain.name} of "
            f"what the network {'takes' if chain.key == IMAGE else 'gives'}; write that key in their keys"
        )


def _arguments(config: MonaiConfig, entry: _Entry, key: str, *, by_name_alone: bool) -> Arguments:
    """A transform's arguments, references in them followed; a device, which changes no result, is not looked at."""
    at = entry.at
    about = {k: config.resolve(v, f"{at}#{k}") for k, v in entry.said.items() if k in ("_target_", "_disabled_")}
    if by_name_alone or is_disabled(about):
        return about
    if entry.name == "Invert":
        asked = {k: v for k, v in entry.said.items() if k == "nearest_interp"}
        said = about | {k: _as_readable(config, v, f"{at}#{k}") for k, v in asked.items()}
    else:
        said = {k: config.resolve(v, f"{at}#{k}") for k, v in entry.said.items() if k not in ("keys", "device")}
    return _of_key(config, entry, said, key)


def _as_readable(config: MonaiConfig, value: Any, key: str) -> Any:
    """A value with references followed, or as it is written where that cannot be read."""
    if isinstance(value, list):
        return [_as_readable(config, item, f"{key}#{number}") for number, item in enumerate(value)]
    try:
        return config.resolve(value, key)
    except BundleError:
        return value


def _of_key(config: MonaiConfig, entry: _Entry, said: dict[str, Any], key: str) -> Arguments:
    """Arguments, those of one value a key being those of `key`."""
    keys = entry.keys if entry.keys is not None and key in entry.keys else (key,)
    for name in said.keys() & set(_ONE_A_KEY):
        value = said[name]
        if isinstance(value, list | tuple):
            if len(value) != len(keys):
                place = f"{config.source}: {entry.at}#{name}"
                raise BundleError(f"{place} has {len(value)} values, expected one for each of {len(keys)} keys")
            said[name] = value[keys.index(key)]
    return said
