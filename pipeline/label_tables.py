"""The label table of a dataset.json, MSD's or nnU-Net's, as a label schema document.

In nnU-Net v2 a label that is a list of values is a region, and then all labels are: the values themselves have no
names there and get label_1, .... Which value each region paints stands in `regions_class_order`; the label "ignore"
names the value of voxels that were not annotated.

Source: nnU-Net v2, documentation/region_based_training.md and ignore_label.md of its repository.
"""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from pipeline.errors import ManifestError
from transforms.labels import LabelSchema, Region, schema_from_names

IGNORE = "ignore"

Values = dict[str, tuple[int, ...]]


def read_labels(table: Any, paint_order: Any, source: str) -> dict[str, Any]:
    """Either {"liver": 1} (nnU-Net v2) or {"1": "liver"} (MSD, nnU-Net v1), with `regions_class_order` or None.

    Raises:
        ManifestError: neither, or a table that contradicts itself.
    """
    if not isinstance(table, dict) or not table:
        raise ManifestError(f"{source}: labels is needed, as a table of names and numbers, found {table!r}")
    try:
        if all(isinstance(name, str) and str(key).isdecimal() for key, name in table.items()):
            schema = _named_values({int(key): name for key, name in table.items()}, None, source)
        else:
            schema = _valued_names(table, paint_order, source)
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise ManifestError(f"{source}: labels: {reason}") from error
    return schema.model_dump(mode="json")


def _named_values(names: dict[int, str], ignore: int | None, source: str) -> LabelSchema:
    if names.get(0, "background") != "background":
        raise ManifestError(f"{source}: label 0 is '{names[0]}', but 0 can only be the background")
    return LabelSchema(labels=schema_from_names(names).labels, ignore=ignore)


def _valued_names(table: dict[str, Any], paint_order: Any, source: str) -> LabelSchema:
    values = {name: _values(name, value, source) for name, value in table.items()}
    ignore = _ignored(values.pop(IGNORE, None), source)
    if not any(len(found) > 1 for found in values.values()):
        return _named_values(_one_name_a_value(values, source), ignore, source)
    foreground = {name: found for name, found in values.items() if (name, found) != ("background", (0,))}
    if zeros := [name for name, found in foreground.items() if 0 in found]:
        raise ManifestError(f"{source}: '{zeros[0]}' holds 0, which can only be the background")
    return _region_schema(foreground, paint_order, ignore, source)


def _values(name: str, value: Any, source: str) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [value]
    if not values or any(isinstance(v, bool) or not isinstance(v, int) for v in values):
        raise ManifestError(f"{source}: label '{name}' needs a whole number, or several in a list, found {value!r}")
    return tuple(dict.fromkeys(values))


def _ignored(values: tuple[int, ...] | None, source: str) -> int | None:
    if values is not None and len(values) > 1:
        raise ManifestError(f"{source}: the label '{IGNORE}' is one value, found {list(values)}")
    return None if values is None else values[0]


def _one_name_a_value(values: Values, source: str) -> dict[int, str]:
    names: dict[int, str] = {}
    for name, (value,) in values.items():
        if value in names:
            raise ManifestError(f"{source}: labels '{names[value]}' and '{name}' have the same value {value}")
        names[value] = name
    return names


def _region_schema(foreground: Values, paint_order: Any, ignore: int | None, source: str) -> LabelSchema:
    if not isinstance(paint_order, list) or len(paint_order) != len(foreground):
        raise ManifestError(
            f"{source}: regions_class_order is needed: for each of the {len(foreground)} regions "
            f"({', '.join(foreground)}) the value that it paints, found {paint_order!r}"
        )
    values = sorted({value for found in foreground.values() for value in found})
    schema = schema_from_names({value: f"label_{value}" for value in values})
    regions = tuple(
        Region(name=name, labels=tuple(f"label_{value}" for value in found), paints=f"label_{painted}")
        for (name, found), painted in zip(foreground.items(), paint_order, strict=True)
    )
    return LabelSchema(labels=schema.labels, ignore=ignore, regions=regions)
