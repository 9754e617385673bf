"""What the numbers in a label map mean: names, colours, codes, twins."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any, Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, model_validator

from transforms.colours import PALETTE, distinct_colours
from transforms.concepts import TISSUE, CodedConcept, concepts_of

__all__ = ["MAX_LABEL_ID", "PALETTE", "TISSUE", "CodedConcept", "Label", "LabelSchema", "schema_from_names"]

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


class LabelSchema(BaseModel):
    """The structures of a dataset in order. Class 0 is background; class c is `labels[c - 1]`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    labels: tuple[Label, ...] = Field(min_length=1, max_length=MAX_LABEL_ID)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for what, values in (("id", [str(x.id) for x in self.labels]), ("name", [x.name for x in self.labels])):
            repeated = sorted(value for value, count in Counter(values).items() if count > 1)
            if repeated:
                raise ValueError(f"label {what} {', '.join(repeated[:_SHOWN])} stands more than once")
        by_name = {label.name: label for label in self.labels}
        for label in self.labels:
            if label.twin is None:
                continue
            if label.twin == label.name or label.twin not in by_name:
                raise ValueError(f"label '{label.name}': its twin '{label.twin}' is not another label of the schema")
            if by_name[label.twin].twin != label.name:
                raise ValueError(f"label '{label.twin}' does not name '{label.name}' as its twin in return")
        return self

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
    def twin_classes(self) -> tuple[int, ...]:
        """Per class, the class that it becomes when left and right are exchanged."""
        classes = {label.name: c for c, label in enumerate(self.labels, start=1)}
        return (0, *(classes[label.twin or label.name] for label in self.labels))

    def unknown_ids(self, ids: npt.NDArray[Any]) -> list[int]:
        """The values among `ids` that are neither 0 nor in the schema, sorted."""
        return sorted({int(i) for i in ids} - {0, *self.ids})

    def classes_from_ids(self, label_map: npt.NDArray[Any]) -> npt.NDArray[np.uint8 | np.uint16]:
        """Voxel values of a file (any integer type) to classes 0..n.

        Raises:
            ValueError: a value is not in the schema.
        """
        highest = max(self.ids)
        in_range = not label_map.size or (int(label_map.min()) >= 0 and int(label_map.max()) <= highest)
        known = np.zeros(highest + 1, dtype=bool)
        known[[0, *self.ids]] = True
        if not (in_range and bool(known[label_map].all())):
            outside = self.unknown_ids(np.unique(label_map))
            raise ValueError(
                f"label values {_shown(outside)} are not in the schema, which knows {_shown(list(self.ids))}"
            )
        table = np.zeros(highest + 1, dtype=np.uint8 if self.class_count <= 256 else np.uint16)
        table[[0, *self.ids]] = range(self.class_count)
        return np.asarray(table[label_map])

    def ids_from_classes(self, classes: npt.NDArray[Any]) -> npt.NDArray[np.uint8 | np.uint16]:
        """Classes 0..n to the voxel values of files."""
        dtype = np.uint8 if max(self.ids) <= 255 else np.uint16
        found: npt.NDArray[np.uint8 | np.uint16] = np.asarray((0, *self.ids), dtype=dtype)[classes]
        return found

    def matches(self, other: LabelSchema) -> bool:
        """True when both give the same ids to the same names."""
        return [(x.id, x.name) for x in self.labels] == [(x.id, x.name) for x in other.labels]


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
