"""What the channels of a MONAI bundle's network mean, by its metadata: input channels, and labels or regions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from pipeline.errors import BundleError, ManifestError
from pipeline.interop.monai_config import MonaiConfig
from pipeline.interop.monai_steps import Outputs
from pipeline.manifest_formats import modality_of_channel
from pipeline.plan import ChannelPlan
from transforms.intensity_spec import Normalisation
from transforms.labels import LabelSchema, Region, schema_from_names

FORMAT = "network_data_format"


def channels_of(metadata: MonaiConfig) -> tuple[ChannelPlan, ...]:
    """The input channels, by network_data_format#inputs#image.

    Raises:
        BundleError: not said, or a modality that is not known.
    """
    key = f"{FORMAT}#inputs#image"
    said = metadata.value(key)
    names = _names(said, key, metadata)
    try:
        modalities = [modality_of_channel(str(said.get("modality", "")), f"{metadata.source}: {key}#modality")] * len(
            names
        )
    except ManifestError:
        modalities = [_modality(name, str(said.get("modality", "")), key, metadata) for name in names]
    return tuple(
        ChannelPlan.model_validate(
            {
                "name": name,
                "modality": modality,
                "normalisation": Normalisation(kind="none"),
                # What training saw is not told.
                "lowest": None,
                "highest": None,
            }
        )
        for name, modality in zip(_unique(names), modalities, strict=True)
    )


def schema_of_outputs(
    metadata: MonaiConfig, outputs: Outputs, nested: Sequence[str]
) -> tuple[LabelSchema, tuple[int, ...]]:
    """Labels by network_data_format#outputs#pred, and the order in which the network's outputs are to be taken.

    Exclusive outputs are a background and a label each. Outputs that overlap are regions; several of them must be
    `nested`, named from the outermost to the innermost, because nothing in a bundle says how they lie.

    Raises:
        BundleError: not said, no background, or several that overlap and are not nested.
    """
    key = f"{FORMAT}#outputs#pred"
    names = _names(metadata.value(key), key, metadata)
    try:
        if outputs.activation == "softmax":
            return _labels(names, key, metadata), ()
        return _regions(names, nested, key, metadata)
    except ValidationError as error:
        raise BundleError(f"{metadata.source}: {key}: {error.errors()[0]['msg']}") from error


def _labels(names: list[str], key: str, metadata: MonaiConfig) -> LabelSchema:
    if names[0].casefold() not in ("background", "bg", "other", "unlabeled", "unlabelled"):
        raise BundleError(f"{metadata.source}: {key}#channel_def#0 is '{names[0]}', expected background (softmax)")
    if len(names) < 2:
        raise BundleError(f"{metadata.source}: {key}#channel_def names no label beside the background")
    return schema_from_names(dict(enumerate(_unique(names[1:]), start=1)))


def _regions(
    names: list[str], nested: Sequence[str], key: str, metadata: MonaiConfig
) -> tuple[LabelSchema, tuple[int, ...]]:
    if len(names) > 1 and not nested:
        raise BundleError(
            f"{metadata.source}: {key}: the outputs {', '.join(names)} overlap (sigmoid), and nothing says how; where "
            f'each lies inside the one before, name them from the outermost on, as --nested "{",".join(names)}"'
        )
    order = list(nested) or names
    if sorted(order) != sorted(names):
        raise BundleError(f"--nested: expected each of {', '.join(names)} once, found {', '.join(order)}")
    alone = [f"{name} only" for name in order[:-1]] + order[-1:]
    labels = schema_from_names(dict(enumerate(alone, start=1)))
    regions = tuple(
        Region(name=f"{name} region", labels=tuple(alone[n:]), paints=alone[n]) for n, name in enumerate(order)
    )
    taken = tuple(names.index(name) for name in order)
    return LabelSchema(labels=labels.labels, regions=regions), () if taken == tuple(range(len(names))) else taken


def _names(said: Any, key: str, metadata: MonaiConfig) -> list[str]:
    table = said.get("channel_def") if isinstance(said, dict) else None
    numbers = [str(n) for n in range(len(table))] if isinstance(table, dict) else []
    if not isinstance(table, dict) or not table or set(table) != set(numbers):
        raise BundleError(f'{metadata.source}: {key}#channel_def is needed, as {{"0": "background", "1": "spleen"}}')
    return [str(table[number]) for number in numbers]


def _unique(names: list[str]) -> list[str]:
    return [name if names.count(name) == 1 else f"{name}_{n}" for n, name in enumerate(names)]


def _modality(name: str, said: str, key: str, metadata: MonaiConfig) -> str:
    try:
        return modality_of_channel(name, key)
    except ManifestError as error:
        raise BundleError(
            f"{metadata.source}: {key}#modality is '{said}' and its channel '{name}': neither is a modality that is "
            "known; write CT, MR, PT, NM or US there"
        ) from error
