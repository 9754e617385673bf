"""How the label file of one case is read: which labels it can hold, and under which values."""

from __future__ import annotations

import numpy as np
import pytest

from transforms.annotation import Annotation
from transforms.labels import LabelSchema, schema_from_names

SCHEMA = schema_from_names({1: "stem", 5: "gullet", 7: "jaw"})
SPARSE = LabelSchema(labels=SCHEMA.labels, ignore=255)


def test_a_whole_file() -> None:
    annotation = Annotation(SCHEMA)
    assert annotation.is_complete
    assert annotation.mask == (True, True, True, True)
    assert annotation.classes(np.array([0, 7, 5, 1])).tolist() == [0, 3, 2, 1]


def test_what_is_to_be_ignored_is_the_class_after_the_last() -> None:
    found = Annotation(SPARSE).classes(np.array([0, 255, 7], np.uint8))
    assert found.tolist() == [0, 4, 3]
    assert found.dtype == np.uint8
    with pytest.raises(ValueError, match=r"label values \[255\] are not in the schema"):
        Annotation(SCHEMA).classes(np.array([0, 255]))


@pytest.mark.parametrize(("count", "dtype"), [(254, np.uint8), (255, np.uint16)])
def test_a_byte_holds_254_labels_and_the_ignored_class(count: int, dtype: type) -> None:
    schema = LabelSchema(labels=schema_from_names({n: f"n{n}" for n in range(1, count + 1)}).labels, ignore=999)
    found = Annotation(schema).classes(np.array([0, 1, count, 999], np.int32))
    assert found.tolist() == [0, 1, count, count + 1]
    assert found.dtype == dtype


def test_a_label_that_was_not_annotated_may_not_occur() -> None:
    annotation = Annotation(SCHEMA, ("jaw", "stem"))
    assert annotation.mask == (True, True, False, True)
    assert annotation.annotated_names == ("stem", "jaw")
    assert annotation.classes(np.array([0, 1, 7])).tolist() == [0, 1, 3]
    assert annotation.unannotated_in({0, 5, 7}) == ["gullet"]
    with pytest.raises(ValueError, match="gullet occurs, which the manifest says was not annotated in this case"):
        annotation.classes(np.array([0, 5]))


def test_another_value_in_this_file() -> None:
    """In one folder 5 is the jaw, in the other the gullet."""
    annotation = Annotation(SCHEMA, ("stem", "jaw"), {"jaw": 5})
    assert annotation.classes(np.array([0, 1, 5])).tolist() == [0, 1, 3]
    assert annotation.ids(np.array([0, 1, 5])).tolist() == [0, 1, 7]
    with pytest.raises(ValueError, match=r"label values \[7\] are not in the schema"):
        annotation.classes(np.array([7]))


def test_values_may_change_places() -> None:
    annotation = Annotation(SCHEMA, None, {"jaw": 5, "gullet": 7})
    assert annotation.ids(np.array([0, 1, 5, 7])).tolist() == [0, 1, 7, 5]


def test_ids_keep_what_is_to_be_ignored() -> None:
    assert Annotation(SPARSE, ("stem", "jaw"), {"jaw": 5}).ids(np.array([255, 5])).tolist() == [255, 7]


@pytest.mark.parametrize(
    ("schema", "annotated", "values", "message"),
    [
        (SCHEMA, ("jaws",), {}, "jaws is no label of the schema: stem, gullet, jaw"),
        (SCHEMA, None, {"jaws": 3}, "jaws is no label"),
        (SCHEMA, ("jaw", "jaw"), {}, "jaw stands twice"),
        (SCHEMA, None, {"jaw": 5}, "the value 5 stands for both gullet and jaw"),
        (SCHEMA, ("stem",), {"jaw": 9, "gullet": 9}, "the value 9 stands for both gullet and jaw"),
        (SPARSE, None, {"jaw": 255}, "the value 255 stands for both what is to be ignored and jaw"),
    ],
)
def test_what_contradicts_itself(
    schema: LabelSchema, annotated: tuple[str, ...] | None, values: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Annotation(schema, annotated, values)
