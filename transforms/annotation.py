"""What the label file of one case tells of a schema: which labels were annotated in it, under which values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from transforms.labels import LabelSchema, classes_of_values


@dataclass(frozen=True)
class Annotation:
    """How a case's label file is read.

    `annotated` names the labels that were looked for in this case, None when all were: of the others nothing is known,
    wherever the file is 0. `values` are the voxel values of labels that have another one in this file than their id.

    Raises:
        ValueError: a name is no label, or one value stands for two labels or for a label and `ignore`.
    """

    schema: LabelSchema
    annotated: tuple[str, ...] | None = None
    values: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if unknown := sorted({*(self.annotated or ()), *self.values} - set(self.schema.names)):
            raise ValueError(f"{', '.join(unknown)} is no label of the schema: {', '.join(self.schema.names)}")
        if repeated := sorted({name for name in self.annotated or () if (self.annotated or ()).count(name) > 1}):
            raise ValueError(f"{', '.join(repeated)} stands twice among the annotated labels")
        seen: dict[int, str] = {} if self.schema.ignore is None else {self.schema.ignore: "what is to be ignored"}
        for name, value in self._values_of({*self.values, *self.annotated_names}).items():
            if seen.setdefault(value, name) != name:
                raise ValueError(f"the value {value} stands for both {seen[value]} and {name}")

    @property
    def annotated_names(self) -> tuple[str, ...]:
        """The annotated labels in the schema's order."""
        names = self.schema.names
        return names if self.annotated is None else tuple(name for name in names if name in self.annotated)

    @property
    def is_complete(self) -> bool:
        """True when every label was annotated."""
        return self.annotated_names == self.schema.names

    @property
    def mask(self) -> tuple[bool, ...]:
        """Per class, whether it was annotated; the background always was."""
        return self.schema.are_annotated(self.annotated)

    @cached_property
    def name_of_value(self) -> dict[int, str]:
        """Per voxel value that the file can hold, its label; unannotated ones too, where no other takes their value."""
        given = set(self.values)
        rest = self._values_of(set(self.schema.names) - given)
        return {value: name for name, value in {**rest, **self._values_of(given)}.items()}

    @cached_property
    def class_of_value(self) -> dict[int, int]:
        """Per voxel value that the file can hold, its class; the value to ignore too, background not."""
        classes = {name: c for c, name in enumerate(self.schema.names, start=1)}
        ignored = {} if self.schema.ignore is None else {self.schema.ignore: self.schema.class_count}
        return {value: classes[name] for value, name in self.name_of_value.items()} | ignored

    def unannotated_in(self, values: npt.NDArray[Any] | set[int]) -> list[str]:
        """The labels that occur among voxel values although they were not annotated, in the schema's order."""
        found = {self.name_of_value.get(int(value)) for value in values}
        return [name for name in self.schema.names if name in found and name not in self.annotated_names]

    def classes(self, voxels: npt.NDArray[Any]) -> npt.NDArray[np.uint8 | np.uint16]:
        """Voxels of the file to classes 0..n, those to ignore to `schema.ignored_class`.

        Raises:
            ValueError: a value that means nothing, or a label that was not annotated.
        """
        found = classes_of_values(voxels, self.class_of_value)
        if not self.is_complete and (strangers := self.unannotated_in(np.unique(voxels))):
            raise ValueError(f"{', '.join(strangers)} occurs, which the manifest says was not annotated in this case")
        return found

    def ids(self, voxels: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Voxels of the file as the schema's ids; the value to ignore stays as it is.

        Raises:
            ValueError: see `classes`.
        """
        if not self.values:
            return voxels
        ids = (0, *self.schema.ids, self.schema.ignore or 0)
        return np.asarray(ids, dtype=np.uint8 if max(ids) <= 255 else np.int32)[self.classes(voxels)]

    def _values_of(self, names: set[str]) -> dict[str, int]:
        return {x.name: self.values.get(x.name, x.id) for x in self.schema.labels if x.name in names}
