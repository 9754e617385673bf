"""LabelSchema: file values to classes and back, twins, and what makes a schema contradict itself."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from pydicom.sr.codedict import codes
from skimage.color import rgb2lab

from transforms.colours import distinct_colours
from transforms.labels import MAX_LABEL_ID, PALETTE, TISSUE, Label, LabelSchema, Region, schema_from_names


def schema(*rows: tuple[int, str, str | None]) -> LabelSchema:
    return LabelSchema(
        labels=tuple(Label(id=i, name=name, colour=(i % 256, 0, 0), twin=twin) for i, name, twin in rows)
    )


PAROTIDS = schema((4, "LeftParotid", "RightParotid"), (9, "Mandible", None), (3, "RightParotid", "LeftParotid"))
WIDE = schema_from_names({n: f"label {n}" for n in range(1, 301)})


def test_order_is_the_order_of_classes() -> None:
    assert PAROTIDS.ids == (4, 9, 3)
    assert PAROTIDS.names == ("LeftParotid", "Mandible", "RightParotid")
    assert PAROTIDS.class_count == 4
    assert PAROTIDS.twin_classes == (0, 3, 2, 1)


def test_classes_by_hand() -> None:
    ids = np.array([[0, 3], [4, 9]], dtype=np.int64)
    classes = PAROTIDS.classes_from_ids(ids)
    assert classes.dtype == np.uint8
    assert classes.tolist() == [[0, 3], [1, 2]]
    back = PAROTIDS.ids_from_classes(classes)
    assert back.dtype == np.uint8
    assert back.tolist() == ids.tolist()


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64])
def test_any_integer_type(dtype: type[np.integer]) -> None:
    assert PAROTIDS.classes_from_ids(np.array([9, 0, 3], dtype=dtype)).tolist() == [2, 0, 3]


def test_more_classes_than_a_byte_holds() -> None:
    ids = np.arange(301)
    classes = WIDE.classes_from_ids(ids)
    assert classes.dtype == np.uint16
    assert WIDE.ids_from_classes(classes).tolist() == ids.tolist()
    # 255 labels and background still fit.
    narrow = schema_from_names({n: str(n) for n in range(1, 256)})
    assert narrow.classes_from_ids(ids[:256]).dtype == np.uint8


def test_few_labels_of_high_numbers() -> None:
    high = schema((MAX_LABEL_ID, "cortex", None))
    assert high.classes_from_ids(np.array([0, MAX_LABEL_ID])).tolist() == [0, 1]
    assert high.ids_from_classes(np.array([0, 1])).dtype == np.uint16


@pytest.mark.parametrize(
    ("values", "outside"), [([0, 3, 5], r"\[5\]"), ([-1, 0, 300], r"\[-1, 300\]"), ([2], r"\[2\]")]
)
def test_values_that_the_schema_does_not_know(values: list[int], outside: str) -> None:
    with pytest.raises(ValueError, match=rf"label values {outside} are not in the schema, which knows \[4, 9, 3\]"):
        PAROTIDS.classes_from_ids(np.array(values))


def test_an_empty_map() -> None:
    assert PAROTIDS.classes_from_ids(np.zeros((0, 2, 2), dtype=np.int16)).shape == (0, 2, 2)


@given(st.dictionaries(st.integers(1, MAX_LABEL_ID), st.none(), min_size=1, max_size=20), st.data())
def test_ids_there_and_back(numbers: dict[int, None], data: st.DataObject) -> None:
    any_schema = schema_from_names({n: f"label {n}" for n in numbers})
    ids = np.array(data.draw(st.lists(st.sampled_from([0, *numbers]), max_size=30)), dtype=np.int64)
    classes = any_schema.classes_from_ids(ids)
    assert classes.size == 0 or int(classes.max()) < any_schema.class_count
    assert any_schema.ids_from_classes(classes).tolist() == ids.tolist()


@given(st.lists(st.booleans(), min_size=1, max_size=6))
def test_exchanging_sides_twice_changes_nothing(paired: list[bool]) -> None:
    rows: list[tuple[int, str, str | None]] = []
    for n, is_pair in enumerate(paired):
        left, right = f"L{n}", f"R{n}"
        rows += [(2 * n + 1, left, right), (2 * n + 2, right, left)] if is_pair else [(2 * n + 1, left, None)]
    twins = np.array(schema(*rows).twin_classes)
    assert np.array_equal(twins[twins], np.arange(len(twins)))
    assert int((twins != np.arange(len(twins))).sum()) == 2 * sum(paired)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([(1, "a", None), (1, "b", None)], "label id 1 stands more than once"),
        ([(1, "a", None), (2, "a", None)], "label name a stands more than once"),
        ([(1, "a", "b")], "'b' is not another label"),
        ([(1, "a", "a")], "'a' is not another label"),
        ([(1, "a", "b"), (2, "b", None)], "'b' does not name 'a' as its twin in return"),
        ([(1, "a", "b"), (2, "b", "c"), (3, "c", "b")], "'b' does not name 'a'"),
        ([(0, "background", None)], "greater than or equal to 1"),
        ([(MAX_LABEL_ID + 1, "a", None)], "less than or equal to 65535"),
        ([(1, "", None)], "at least 1 character"),
        ([], "at least 1 item"),
    ],
)
def test_schemas_that_contradict_themselves(rows: list[tuple[int, str, str | None]], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        schema(*rows)


def test_json_there_and_back() -> None:
    assert LabelSchema.model_validate_json(PAROTIDS.model_dump_json()) == PAROTIDS
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        LabelSchema.model_validate({"labels": [{"id": 1, "name": "a", "colour": [1, 2, 3], "color": "red"}]})


def test_names_alone_make_a_schema() -> None:
    made = schema_from_names({2: "Posterior", 0: "background", 1: "Anterior"})
    assert made.ids == (1, 2)
    assert made.names == ("Anterior", "Posterior")
    assert [label.colour for label in made.labels] == list(PALETTE[:2])
    assert made.labels[0].code == TISSUE


@pytest.mark.parametrize("colour", [(256, 0, 0), (0, -1, 0), (0, 0, 1.5), (0, 0)])
def test_what_is_no_colour(colour: tuple[float, ...]) -> None:
    with pytest.raises(ValidationError, match="colour"):
        Label.model_validate({"id": 1, "name": "a", "colour": colour})


@pytest.fixture(scope="module")
def full() -> LabelSchema:
    return schema_from_names({n: f"label {n}" for n in range(1, MAX_LABEL_ID + 1)})


class TestAsManyAsVoxelsCanTell:
    """Unsigned 16-bit voxels: 65,535 labels and background. Each step was once quadratic, which took minutes."""

    def test_every_value_is_a_class(self, full: LabelSchema) -> None:
        ids = np.arange(MAX_LABEL_ID + 1, dtype=np.uint16)
        classes = full.classes_from_ids(ids)
        assert full.class_count == MAX_LABEL_ID + 1
        assert classes.dtype == np.uint16
        assert np.array_equal(classes, ids)
        assert np.array_equal(full.ids_from_classes(classes), ids)

    def test_each_has_its_own_colour(self, full: LabelSchema) -> None:
        assert len({label.colour for label in full.labels}) == MAX_LABEL_ID

    def test_it_is_read_again_from_json(self, full: LabelSchema) -> None:
        assert LabelSchema.model_validate_json(full.model_dump_json()) == full

    def test_one_that_is_missing_is_named_and_the_others_are_counted(self, full: LabelSchema) -> None:
        without = LabelSchema(labels=full.labels[1:])
        with pytest.raises(ValueError, match=r"values \[1\] are not .*, 21\] and 65514 more$"):
            without.classes_from_ids(np.array([0, 1, MAX_LABEL_ID]))

    def test_the_last_id_is_not_taken_for_an_unknown_one(self) -> None:
        high = schema((7, "seven", None), (MAX_LABEL_ID, "last", None))
        assert high.classes_from_ids(np.array([MAX_LABEL_ID, 7, 0])).tolist() == [2, 1, 0]
        with pytest.raises(ValueError, match=r"values \[65534\] are not"):
            high.classes_from_ids(np.array([MAX_LABEL_ID - 1]))


def test_colours_begin_alike_and_differ() -> None:
    assert distinct_colours(8) == PALETTE
    many = distinct_colours(500)
    assert many[:40] == distinct_colours(40)
    assert len(set(many)) == 500
    assert all(0 <= value <= 255 for colour in many for value in colour)


def test_neighbours_are_far_from_each_other_as_eyes_see_it() -> None:
    """Distances in CIE 1976 L*a*b*, by scikit-image; about 2.3 is just noticeable."""
    lab = rgb2lab(np.array(distinct_colours(120), dtype=float)[None] / 255)[0]
    apart = np.linalg.norm(lab[:, None] - lab[None], axis=-1) + 1000 * np.eye(120)
    assert np.diag(apart, k=1).min() > 12
    assert apart.min() > 2.3
    assert np.median(apart.min(axis=0)) > 7


@pytest.mark.parametrize(
    ("name", "value", "meaning", "category"),
    [
        ("liver", "10200004", "Liver", "Anatomical Structure"),
        ("LeftKidney", "64033007", "Kidney", "Anatomical Structure"),
        ("kidney_right", "64033007", "Kidney", "Anatomical Structure"),
        ("Brainstem", "119238007", "Brain Stem", "Anatomical Structure"),
        ("Optic chiasm", "244453006", "Optic chiasm", "Anatomical Structure"),
        ("LTLung", "39607008", "Lung", "Anatomical Structure"),
        ("lungs", "39607008", "Lung", "Anatomical Structure"),
        ("tumour", "108369006", "Neoplasm", "Morphologically Abnormal Structure"),
        ("Urine", "78014005", "Urine", "Body Substance"),
        # Parts of something, one of many, made up, or nothing at all: no code is better than a wrong one.
        *(
            (name, "85756007", "Tissue", "Tissue")
            for name in ("Head", "Anterior", "rib 7", "liver7", "left", "label 1")
        ),
        ("kidney tumour", "85756007", "Tissue", "Tissue"),
        ("肝臓", "85756007", "Tissue", "Tissue"),
    ],
)
def test_well_known_names_bring_their_code(name: str, value: str, meaning: str, category: str) -> None:
    (label,) = schema_from_names({1: name}).labels
    assert (label.code.scheme, label.code.value, label.code.meaning) == ("SCT", value, meaning)
    assert label.category.meaning == category


def test_codes_are_those_of_dicoms_lists() -> None:
    """Categories are of CID 7150, as highdicom's users find them in pydicom."""
    for name, keyword in (("liver", "AnatomicalStructure"), ("edema", "MorphologicallyAbnormalStructure")):
        (label,) = schema_from_names({1: name}).labels
        assert label.category.value == getattr(codes.cid7150, keyword).value
    assert schema_from_names({1: "bile"}).labels[0].category.value == codes.cid7150.BodySubstance.value


def test_schemas_match_by_number_and_name() -> None:
    one = schema_from_names({1: "a", 2: "b"})
    recoloured = LabelSchema(labels=tuple(label.model_copy(update={"colour": (9, 9, 9)}) for label in one.labels))
    assert one.matches(recoloured)
    assert not one.matches(schema_from_names({1: "b", 2: "a"}))
    assert not one.matches(schema_from_names({1: "a"}))


def nested(*regions: Region, ignore: int | None = None, twins: bool = False) -> LabelSchema:
    """Tumour parts 1 necrosis, 2 oedema, 4 enhancing; or a right, a left and a middle part."""
    names = {1: "necrosis", 2: "oedema", 4: "enhancing"}
    labels = schema_from_names(names).labels
    if twins:
        pairs = {"necrosis": "enhancing", "enhancing": "necrosis"}
        labels = tuple(x.model_copy(update={"twin": pairs.get(x.name)}) for x in labels)
    return LabelSchema(labels=labels, regions=regions, ignore=ignore)


WHOLE = Region(name="whole", labels=("necrosis", "oedema", "enhancing"), paints="oedema")
CORE = Region(name="core", labels=("enhancing", "necrosis"), paints="necrosis")
ACTIVE = Region(name="active", labels=("enhancing",), paints="enhancing")


def test_what_a_network_gives_for_regions() -> None:
    schema = nested(WHOLE, CORE, ACTIVE)
    assert schema.class_count == 4
    assert schema.output_count == 3
    assert schema.region_classes == ((1, 2, 3), (1, 3), (3,))
    assert schema.painted_classes == (2, 1, 3)
    assert schema.twin_outputs == (0, 1, 2)
    assert schema.ignored_class is None


def test_what_a_network_gives_without() -> None:
    schema = nested()
    assert (schema.output_count, schema.region_classes, schema.twin_outputs) == (4, (), (0, 1, 2, 3))


def test_regions_of_twins_change_places() -> None:
    right = Region(name="right", labels=("necrosis",), paints="necrosis")
    schema = nested(WHOLE, right, ACTIVE, CORE, twins=True)
    assert schema.twin_outputs == (0, 2, 1, 3)
    assert schema.twin_classes == (0, 3, 2, 1)


def test_the_ignored_class_is_the_one_after_the_last() -> None:
    schema = nested(ignore=255, twins=True)
    assert schema.ignored_class == schema.class_count == 4
    assert schema.twin_classes == (0, 3, 2, 1, 4)
    assert schema.twin_outputs == (0, 3, 2, 1)
    with pytest.raises(ValueError, match=r"\[255\] are not in the schema"):
        schema.classes_from_ids(np.array([0, 255]))


def test_the_background_is_always_annotated() -> None:
    assert nested().are_annotated(("oedema",)) == (True, False, True, False)
    assert nested().are_annotated(()) == (True, False, False, False)
    assert nested().are_annotated(None) == (True, True, True, True)


@pytest.mark.parametrize(
    ("regions", "message"),
    [
        ([WHOLE, WHOLE], "the name 'whole' of a region is taken"),
        ([WHOLE.model_copy(update={"name": "oedema"})], "the name 'oedema' of a region is taken"),
        ([WHOLE.model_copy(update={"labels": ("oedema", "fat")})], "region 'whole': fat is no label of the schema"),
        ([CORE.model_copy(update={"paints": "oedema"})], "region 'core' paints 'oedema', which is none of its labels"),
        ([WHOLE, WHOLE.model_copy(update={"name": "all"})], "regions 'whole' and 'all' are of the same labels"),
    ],
)
def test_regions_that_make_no_sense(regions: list[Region], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        nested(*regions)


def test_a_region_whose_twin_is_missing() -> None:
    with pytest.raises(ValueError, match="region 'active' mirrored left to right is necrosis, which is no region"):
        nested(WHOLE, ACTIVE, twins=True)


def test_the_value_to_ignore_is_no_label() -> None:
    with pytest.raises(ValueError, match="label 'enhancing' has the id 4, which is the value to ignore"):
        nested(ignore=4)
