"""Manifests: what is read, what is refused and in which words, and that the shipped ones tell the truth."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from pydicom.sr import _concepts_dict

from pipeline.errors import ManifestError
from pipeline.manifest import Dataset, Manifest, load_dataset, manifest_hash, parse_manifest, save_manifest

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "data_manifests").glob("*.json"))

DOCUMENT: dict[str, Any] = {
    "format": "volseg-manifest-1",
    "name": "two",
    "channels": [{"name": "T1", "modality": "MR"}, {"name": "T2", "modality": "MR"}],
    "labels": {"labels": [{"id": 1, "name": "nucleus", "colour": [230, 159, 0]}]},
    "cases": [
        {"case_id": "a", "patient_id": "p", "images": {"T1": "a_t1.nii", "T2": "a_t2.nii"}, "label": "a.nii"},
        {"case_id": "b", "patient_id": "q", "images": {"T1": "b/t1.nii", "T2": "b/t2.nii"}},
    ],
}


def changed(*keys: str | int, to: Any) -> dict[str, Any]:
    """DOCUMENT with one value set."""
    document = deepcopy(DOCUMENT)
    place: Any = document
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = to
    return document


def write(folder: Path, document: Any, name: str = "two.json") -> Path:
    path = folder / name
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


def message(document: dict[str, Any]) -> str:
    with pytest.raises(ManifestError) as caught:
        parse_manifest(document, source="two.json")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_channels_keep_their_order(tmp_path: Path) -> None:
    (tmp_path / "a_t1.nii").touch()
    dataset = load_dataset(write(tmp_path, DOCUMENT))
    first, second = dataset.manifest.cases
    assert dataset.root == tmp_path.resolve()
    assert [p.relative_to(dataset.root).as_posix() for p in dataset.image_paths(second)] == ["b/t1.nii", "b/t2.nii"]
    assert dataset.label_path(first) == dataset.root / "a.nii"
    assert dataset.label_path(second) is None


def test_own_root_starts_at_the_manifest_and_a_given_root_wins(tmp_path: Path) -> None:
    for folder in ("manifests", "own", "given"):
        (tmp_path / folder).mkdir()
    (tmp_path / "own" / "a_t1.nii").touch()
    (tmp_path / "given" / "a_t1.nii").touch()
    path = write(tmp_path / "manifests", changed("root", to="../own"))
    assert load_dataset(path).root == (tmp_path / "own").resolve()
    assert load_dataset(path, tmp_path / "given").root == (tmp_path / "given").resolve()


@pytest.mark.parametrize(
    ("keys", "value", "told"),
    [
        (("chanels",), [], "unknown key 'chanels'; did you mean 'channels'?"),
        (("cases", 0, "lable"), "a.nii", "unknown key 'cases.0.lable'; did you mean 'label'?"),
        (("channels", 0, "modality"), "ct", "'ct' is none of CT, MR, PT, NM, US; did you mean 'CT'?"),
        (("channels", 0, "modality"), "MRI", "'MRI' is none of CT, MR, PT, NM, US; did you mean 'MR'?"),
        (("channels", 1, "name"), "T1", "channel T1 stands more than once"),
        (("cases", 1, "case_id"), "A", "case_id a stands more than once (capitals ignored)"),
        (("cases", 1, "case_id"), "..", "cases.1.case_id"),
        (("cases", 1, "case_id"), "x/y", "cases.1.case_id"),
        (("cases", 1, "images"), {"T1": "b.nii"}, "case 'b' has images ['T1'], expected ['T1', 'T2']"),
        (("cases", 0, "label"), "a_t1.nii", "case 'a' names the file a_t1.nii twice"),
        (("cases", 0, "label"), "../a.nii", "'../a.nii' leaves the root"),
        (("cases", 0, "label"), "x/../../a.nii", "'x/../../a.nii' leaves the root"),
        (("cases", 0, "label"), "/data/a.nii", "'/data/a.nii' is not a path relative to the root"),
        (("cases", 0, "label"), "C:/a.nii", "'C:/a.nii' is not a path relative to the root"),
        (("cases", 0, "label"), "x\\a.nii", "is not a path relative to the root, written with '/'"),
        (("cases", 0, "label"), "", "is not a path relative to the root"),
        (("cases", 0, "fold"), -1, "cases.0.fold"),
        (("cases",), [], "two.json: has no cases; at least one is needed"),
        (("channels",), [], "two.json: has no channels; at least one is needed"),
        (("cases",), {}, "cases: expected a list, found {}"),
        (("cases", 0), "a", "cases.0: expected an object, found 'a'"),
        (("name",), 3, "name: expected text, found 3"),
        (("labels", "labels"), [], "has no labels.labels; at least one is needed"),
        (("format",), "volseg-manifest-2", "found 'volseg-manifest-2'"),
        (("root",), "/data", "root is an absolute path"),
        (("labels", "labels", 0, "id"), 0, "labels.labels.0.id"),
        (("labels", "labels", 0, "twin"), "other", "its twin 'other' is not another label"),
    ],
)
def test_what_does_not_fit_is_named(keys: tuple[str | int, ...], value: Any, told: str) -> None:
    assert told in message(changed(*keys, to=value))


def test_one_fault_is_told_once() -> None:
    document = deepcopy(DOCUMENT)
    document["cases"] = [{**document["cases"][0], "lable": "a.nii"}]
    assert message(document) == "two.json: unknown key 'cases.0.lable'; did you mean 'label'?"


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        (["A", "B"], '["A", "B"]'),
        ({"1": "A", "2": "B"}, '{"1": "A", "2": "B"}'),
        ({"labels": {"1": "A"}}, '{"1": "A"}'),
        ({"labels": ["A"]}, "'A'"),
    ],
)
def test_labels_of_another_shape_are_told_once(labels: Any, found: str) -> None:
    shape = '{"id": 1, "name": "A", "colour": [230, 159, 0]}'
    assert message(changed("labels", to=labels)) == (
        f'two.json: labels is an object with "labels": [{shape}], found {found}'
    )
    parse_manifest(changed("labels", to={"labels": [json.loads(shape)]}), source="what the message shows")


def test_an_unknown_key_names_those_of_its_place() -> None:
    assert message(changed("channels", 0, "xyz", to=1)).endswith("'channels.0.xyz'; known: name, modality, optional")
    document = changed("labels", "labels", 0, "code", to={"value": "1", "scheme": "SCT", "meaning": "x", "qqq": 1})
    assert message(document).endswith("known: value, meaning, scheme")


def test_a_long_value_is_cut() -> None:
    told = message(changed("labels", to=[f"structure {number}" for number in range(300)]))
    assert told.endswith("...")
    assert len(told) < 300


def test_a_missing_key_is_named() -> None:
    document = deepcopy(DOCUMENT)
    del document["labels"]
    assert message(document) == "two.json: the key 'labels' is missing"


def test_many_faults_stay_one_readable_line() -> None:
    document = deepcopy(DOCUMENT)
    document["cases"] = [{"case_id": str(i), "patient_id": "p", "images": {}, "lable": ""} for i in range(300)]
    assert "and 295 more" in message(document)
    assert len(message(document)) < 1000


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "not valid JSON"),
        ("[]", "a manifest is a JSON object, found list"),
        ('{"name": "x", "name": "y"}', "the key 'name' stands more than once"),
        ("{}", "the key 'name' is missing"),
        ("\x00\x01", "not valid JSON"),
    ],
)
def test_files_that_are_no_manifest(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ManifestError, match=r"x\.json") as caught:
        load_dataset(path)
    assert told in str(caught.value)


def test_a_binary_file_is_no_manifest(data_dir: Path) -> None:
    with pytest.raises(ManifestError, match="cannot be read as text"):
        load_dataset(data_dir / "hippocampus/images/hippocampus_001.nii.gz")


def test_wrong_paths_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="no such manifest"):
        load_dataset(tmp_path / "none.json")
    with pytest.raises(ManifestError, match=r"has no dataset.json"):
        load_dataset(tmp_path)
    how = r"--set data\.root=FOLDER\), or give the right folder with --root$"
    with pytest.raises(ManifestError, match=rf"is not a folder; .*{how}"):
        load_dataset(write(tmp_path, DOCUMENT), tmp_path / "none")
    with pytest.raises(ManifestError, match=rf"none of its 2 cases is below .* \(looked for a_t1.nii first\); .*{how}"):
        load_dataset(write(tmp_path, DOCUMENT))


def test_an_editors_byte_order_mark_is_no_fault(tmp_path: Path) -> None:
    path = write(tmp_path, DOCUMENT)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    (tmp_path / "a_t1.nii").touch()
    assert load_dataset(path).manifest.name == "two"


def test_the_hash_is_of_everything_but_the_root() -> None:
    own = manifest_hash(Manifest.model_validate(DOCUMENT))
    assert manifest_hash(Manifest.model_validate(changed("root", to="elsewhere"))) == own
    others = [
        changed("name", to="three"),
        changed("licence", to="CC0"),
        changed("cases", 0, "patient_id", to="other"),
        changed("cases", 0, "fold", to=1),
        changed("channels", 0, "modality", to="CT"),
        changed("labels", "labels", 0, "colour", to=[0, 0, 0]),
    ]
    assert len({own, *(manifest_hash(Manifest.model_validate(other)) for other in others)}) == 7


def test_saved_and_read_back_from_another_folder(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a_t1.nii").touch()
    dataset = Dataset(manifest=Manifest.model_validate(DOCUMENT), root=(tmp_path / "data").resolve())
    path = tmp_path / "manifests" / "deep" / "two.json"
    save_manifest(dataset, path)
    assert json.loads(path.read_text(encoding="utf-8"))["root"] == "../../data"
    again = load_dataset(path)
    assert again.root == dataset.root
    assert manifest_hash(again.manifest) == manifest_hash(dataset.manifest)


def test_the_demo_is_every_bundled_case(data_dir: Path) -> None:
    dataset = load_dataset(ROOT / "data_manifests/hippocampus_demo.json")
    assert dataset.root == data_dir / "hippocampus"
    named = {p for case in dataset.manifest.cases for p in [*dataset.image_paths(case), dataset.label_path(case)]}
    assert named == set(dataset.root.glob("*/*.nii.gz"))
    assert len(dataset.manifest.cases) == 32


def test_the_demo_is_a_part_of_the_whole() -> None:
    demo, whole = (json.loads((ROOT / f"data_manifests/hippocampus{n}.json").read_text()) for n in ("_demo", ""))
    assert {c["case_id"] for c in demo["cases"]} < {c["case_id"] for c in whole["cases"]}
    assert demo["labels"] == whole["labels"]
    assert len(whole["cases"]) == 208


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_manifests_are_valid_and_say_where_they_come_from(path: Path) -> None:
    manifest = parse_manifest(json.loads(path.read_text(encoding="utf-8")), source=path.name)
    assert manifest.name == path.stem
    assert manifest.description
    assert manifest.source
    assert manifest.licence
    assert len({label.colour for label in manifest.labels.labels}) == len(manifest.labels.labels)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_codes_are_snomeds(path: Path) -> None:
    """Against pydicom's copy of the codes that DICOM PS3.16 uses, value and meaning."""
    meanings = {
        (value, meaning.casefold())
        for concept in _concepts_dict.concepts["SCT"].values()
        for value, (meaning, _) in concept.items()
    }
    manifest = parse_manifest(json.loads(path.read_text(encoding="utf-8")), source=path.name)
    for label in manifest.labels.labels:
        for code in (label.code, label.category):
            assert code.scheme == "SCT"
            assert (code.value, code.meaning.casefold()) in meanings


def test_the_parotids_are_twins() -> None:
    document = json.loads((ROOT / "data_manifests/hn_ct.json").read_text(encoding="utf-8"))
    labels = parse_manifest(document, source="hn_ct").labels
    assert labels.names == ("Brainstem", "SpinalCord", "RightParotid", "LeftParotid", "Mandible")
    assert labels.twin_classes == (0, 1, 2, 4, 3, 5)
