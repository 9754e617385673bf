"""What the numbers in a label map mean: names, colours, codes, twins, regions, and what is not to be counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, model_validator

from transforms.colours import PALETTE, distinct_colours
from transforms.concepts import TISSUE, CodedConcept, concepts_of
from transforms.errors import VolumeError

__all__ = [
    "MAX_LABEL_ID",
    "PALETTE",
    "TISSUE",
    "CodedConcept",
    "Label",
    "LabelSchema",
    "Region",
    "require_ids",
    "schema_from_names",
]

MAX_LABEL_ID = 65535
"""What unsigned 16-bit voxels hold (DICOM SEG, PS3.3 C.8.20)."""

_SHOWN = 20


Byte = Annotated[int, Field(ge=0, le=255)]


class Label(BaseModel):
    """One structure: `id` is the voxel value in files, `twin` the name of its left/right counterpart."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: int = Field(ge=1, le=MAX_LABEL_ID)
    name: str = Field(min_length=1)
    colour: tuple[Byte, Byte, Byte]
    code: CodedConcept = TISSUE
    category: CodedConcept = TISSUE
    twin: str | None = None


class Region(BaseModel):
    """A union of labels that a network predicts as one structure; regions may overlap, as nested tumour parts do.

    `paints` is the one of its `labels` that its voxels get in a label map, as far as no later region paints over them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1)
    labels: tuple[str, ...] = Field(min_length=1)
    paints: str


class LabelSchema(BaseModel):
    """The structures of a dataset in order. Class 0 is background; class c is `labels[c - 1]`.

    Voxels of the value `ignore` were not annotated: they count nowhere. With `regions` a network has one output a
    region, each a yes or no of its own; a label map is painted from them in order, later ones over earlier ones
    (`regions_class_order` of nnU-Net v2, documentation/region_based_training.md of its repository).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    labels: tuple[Label, ...] = Field(min_length=1, max_length=MAX_LABEL_ID)
    ignore: int | None = Field(None, ge=1, le=MAX_LABEL_ID)
    regions: tuple[Region, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for what, values in (("id", [str(x.id) for x in self.labels]), ("name", [x.name for x in self.labels])):
            repeated = sorted(value for value, count in Counter(values).items() if count > 1)
            if repeated:
                raise ValueError(f"label {what} {', '.join(repeated[:_SHOWN])} stands more than once")
        by_name = {label.name: label for label in self.labels}
        for label in self.labels:
            if label.id == self.ignore:
                raise ValueError(f"label '{label.name}' has the id {label.id}, which is the value to ignore")
            if label.twin is None:
                continue
            if label.twin == label.name or label.twin not in by_name:
                raise ValueError(f"label '{label.name}': its twin '{label.twin}' is not another label of the schema")
            if by_name[label.twin].twin != label.name:
                raise ValueError(f"label '{label.twin}' does not name '{label.name}' as its twin in return")
        self._check_regions(by_name)
        return self

    def _check_regions(self, by_name: dict[str, Label]) -> None:
        owners: dict[frozenset[str], str] = {}
        for region in self.regions:
            members = frozenset(region.labels)
            if region.name in by_name or region.name in owners.values():
                raise ValueError(f"the name '{region.name}' of a region is taken; give each label and region its own")
            if unknown := sorted(members - by_name.keys()):
                raise ValueError(f"region '{region.name}': {', '.join(unknown[:_SHOWN])} is no label of the schema")
            if region.paints not in members:
                raise ValueError(f"region '{region.name}' paints '{region.paints}', which is none of its labels")
            if members in owners:
                raise ValueError(f"regions '{owners[members]}' and '{region.name}' are of the same labels")
            owners[members] = region.name
        for members, name in owners.items():
            mirrored = frozenset(by_name[label].twin or label for label in members)
            if mirrored not in owners:
                others = ", ".join(sorted(mirrored))
                raise ValueError(f"region '{name}' mirrored left to right is {others}, which is no region; add it")

    @property
    def ids(self) -> tuple[int, ...]:
        """Voxel values in files, background left out."""
        return tuple(label.id for label in self.labels)

    @property
    def names(self) -> tuple[str, ...]:
        """Names in class order, background left out."""
        return tuple(label.name for label in self.labels)

    @property
    def class_count(self) -> int:
        """Background included."""
        return len(self.labels) + 1

    @property
    def ignored_class(self) -> int | None:
        """The class of voxels that count nowhere, the one after the last; None without an `ignore` value."""
        return None if self.ignore is None else self.class_count

    @property
    def twin_classes(self) -> tuple[int, ...]:
        """Per class, the class that it becomes when left and right are exchanged; the ignored class stays itself."""
        classes = {label.name: c for c, label in enumerate(self.labels, start=1)}
        ignored = () if self.ignored_class is None else (self.ignored_class,)
        return (0, *(classes[label.twin or label.name] for label in self.labels), *ignored)

    @property
    def region_classes(self) -> tuple[tuple[int, ...], ...]:
        """Per region, the classes that it is the union of, sorted."""
        classes = {label.name: c for c, label in enumerate(self.labels, start=1)}
        return tuple(tuple(sorted({classes[name] for name in region.labels})) for region in self.regions)

    @property
    def painted_classes(self) -> tuple[int, ...]:
        """Per region, the class that it paints."""
        return tuple(self.names.index(region.paints) + 1 for region in self.regions)

    @property
    def output_count(self) -> int:
        """Channels of a network's output: one a region, or one a class if there are no regions."""
        return len(self.regions) or self.class_count

    @property
    def output_names(self) -> tuple[str, ...]:
        """Per output, the name of its region or label; that of the background is empty."""
        return tuple(region.name for region in self.regions) or ("", *self.names)

    @property
    def twin_outputs(self) -> tuple[int, ...]:
        """Per output, the one that it becomes when left and right are exchanged."""
        twins = self.twin_classes
        if not self.regions:
            return twins[: self.class_count]
        unions = [frozenset(classes) for classes in self.region_classes]
        return tuple(unions.index(frozenset(twins[c] for c in union)) for union in unions)

    def are_annotated(self, names: Collection[str] | None) -> tuple[bool, ...]:
        """Per class, whether it is among the annotated labels `names` (None: all are); the background always is."""
        return (True, *(names is None or name in names for name in self.names))

    def unknown_ids(self, ids: npt.NDArray[Any]) -> list[int]:
        """The values among `ids` that are neither 0 nor in the schema, sorted."""
        return sorted({int(i) for i in ids} - {0, *self.ids})

    def classes_from_ids(self, label_map: npt.NDArray[Any]) -> npt.NDArray[np.uint8 | np.uint16]:
        """Voxel values of a file (any integer type) to classes 0..n.

        Raises:
            ValueError: a value is not in the schema; the value to ignore is none either, see `transforms.annotation`.
        """
        return classes_of_values(label_map, dict(zip(self.ids, range(1, self.class_count), strict=True)))

    def ids_from_classes(self, classes: npt.NDArray[Any]) -> npt.NDArray[np.uint8 | np.uint16]:
        """Classes 0..n to the voxel values of files."""
        dtype = np.uint8 if max(self.ids) <= 255 else np.uint16
        found: npt.NDArray[np.uint8 | np.uint16] = np.asarray((0, *self.ids), dtype=dtype)[classes]
        return found

    def matches(self, other: LabelSchema) -> bool:
        """True when both give the same ids to the same names."""
        return [(x.id, x.name) for x in self.labels] == [(x.id, x.name) for x in other.labels]


def classes_of_values(label_map: npt.NDArray[Any], class_of: dict[int, int]) -> npt.NDArray[np.uint8 | np.uint16]:
    """Voxel values to classes by a table; 0 is class 0.

    Raises:
        ValueError: a value that is not in the table.
    """
    highest = max(class_of)
    in_range = not label_map.size or (int(label_map.min()) >= 0 and int(label_map.max()) <= highest)
    known = np.zeros(highest + 1, dtype=bool)
    known[[0, *class_of]] = True
    if not (in_range and bool(known[label_map].all())):
        outside = sorted({int(i) for i in np.unique(label_map)} - {0, *class_of})
        raise ValueError(f"label values {_shown(outside)} are not in the schema, which knows {_shown(list(class_of))}")
    table = np.zeros(highest + 1, dtype=np.uint8 if max(class_of.values()) <= 255 else np.uint16)
    table[list(class_of)] = list(class_of.values())
    return np.asarray(table[label_map])


def require_ids(label_map: npt.NDArray[Any], file: Path) -> None:
    """Refuse values that are no label ids, whatever they are called.

    Raises:
        VolumeError: a value of `file` is below 0 or above `MAX_LABEL_ID`.
    """
    low, high = int(label_map.min(initial=0)), int(label_map.max(initial=0))
    if low < 0 or high > MAX_LABEL_ID:
        raise VolumeError(
            f"{file}: holds the value {low if low < 0 else high}; labels are 1 to {MAX_LABEL_ID}, the background is 0"
        )


def _shown(ids: list[int]) -> str:
    more = f" and {len(ids) - _SHOWN} more" if len(ids) > _SHOWN else ""
    return f"{ids[:_SHOWN]}{more}"


def schema_from_names(ids_and_names: dict[int, str]) -> LabelSchema:
    """A schema with colours that differ and, where a name is an anatomical one, its code.

    For datasets that only name their labels.
    """
    rows = sorted((i, n) for i, n in ids_and_names.items() if i != 0)
    colours = distinct_colours(len(rows))
    concepts = concepts_of([name for _, name in rows])
    return LabelSchema(
        labels=tuple(
            Label(id=i, name=n, colour=colour, code=concept.code, category=concept.category)
            for (i, n), colour, concept in zip(rows, colours, concepts, strict=True)
        )
    )
