"""MSD's and nnU-Net's dataset.json, in folders made of bundled cases under the names that these formats want."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest

from pipeline.errors import ManifestError
from pipeline.manifest import Modality, load_dataset
from pipeline.manifest_formats import MODALITY_OF_CHANNEL, VOLUME_SUFFIXES, modality_of_channel, volume_stem

IDS = ("hippocampus_001", "hippocampus_015", "hippocampus_035")

MSD: dict[str, Any] = {
    "name": "Hippocampus",
    "description": "Left and right hippocampus",
    "reference": " Vanderbilt",
    "licence": "CC-BY-SA 4.0",
    "tensorImageSize": "3D",
    "modality": {"0": "MRI"},
    "labels": {"0": "background", "1": "Anterior", "2": "Posterior"},
    "numTraining": 3,
    "numTest": 1,
    "training": [{"image": f"./imagesTr/{i}.nii.gz", "label": f"./labelsTr/{i}.nii.gz"} for i in IDS],
    "test": ["./imagesTs/hippocampus_002.nii.gz"],
}
NNUNET: dict[str, Any] = {
    "channel_names": {"0": "MRI"},
    "labels": {"background": 0, "Anterior": 1, "Posterior": 2},
    "numTraining": 3,
    "file_ending": ".nii.gz",
    "overwrite_image_reader_writer": "SimpleITKIO",
}
REGIONS: dict[str, Any] = {"background": 0, "whole": [1, 2], "tail": [2]}


@pytest.fixture
def bundled(data_dir: Path) -> Path:
    return data_dir / "hippocampus"


def layout(folder: Path, bundled: Path, document: dict[str, Any], suffixes: tuple[str, ...] = ("",)) -> Path:
    """imagesTr, labelsTr and dataset.json, the files linked; one image for each suffix."""
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    for case in IDS:
        for suffix in suffixes:
            (folder / f"imagesTr/{case}{suffix}.nii.gz").symlink_to(bundled / f"images/{case}.nii.gz")
        (folder / f"labelsTr/{case}.nii.gz").symlink_to(bundled / f"labels/{case}.nii.gz")
    (folder / "dataset.json").write_text(json.dumps(document), encoding="utf-8")
    return folder


def message(path: Path) -> str:
    with pytest.raises(ManifestError) as caught:
        load_dataset(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_msd_as_it_is(tmp_path: Path, bundled: Path) -> None:
    folder = layout(tmp_path, bundled, MSD)
    dataset = load_dataset(folder / "dataset.json")
    manifest = dataset.manifest
    assert (manifest.name, manifest.source, manifest.licence) == ("Hippocampus", "Vanderbilt", "CC-BY-SA 4.0")
    assert [(c.name, c.modality) for c in manifest.channels] == [("MRI", "MR")]
    assert [(x.id, x.name) for x in manifest.labels.labels] == [(1, "Anterior"), (2, "Posterior")]
    assert [c.case_id for c in manifest.cases] == list(IDS)
    assert manifest.cases[0].images == {"MRI": "imagesTr/hippocampus_001.nii.gz"}
    assert all(path.is_file() for case in manifest.cases for path in dataset.image_paths(case))
    assert load_dataset(folder) == dataset


def test_msd_below_another_root(tmp_path: Path, bundled: Path) -> None:
    folder = layout(tmp_path / "data", bundled, MSD)
    moved = tmp_path / "dataset.json"
    (folder / "dataset.json").rename(moved)
    assert load_dataset(moved, folder).root == folder.resolve()


def test_msd_channels_in_one_4d_file_are_refused(tmp_path: Path, bundled: Path) -> None:
    folder = layout(tmp_path, bundled, {**MSD, "modality": {"0": "FLAIR", "1": "T1w"}})
    assert "2 channels (FLAIR, T1w) are packed into one 4D file" in message(folder)


def test_nnunet_v1_lists_names_without_the_channels_number(tmp_path: Path, bundled: Path) -> None:
    document = {**MSD, "modality": {"0": "T1", "1": "T2"}}
    folder = layout(tmp_path, bundled, document, suffixes=("_0000", "_0001"))
    first = load_dataset(folder).manifest.cases[0]
    assert first.case_id == "hippocampus_001"
    assert first.images == {
        "T1": "imagesTr/hippocampus_001_0000.nii.gz",
        "T2": "imagesTr/hippocampus_001_0001.nii.gz",
    }


def test_nnunet_folder(tmp_path: Path, bundled: Path) -> None:
    document = {**NNUNET, "channel_names": {"0": "T1", "1": "CT"}}
    folder = layout(tmp_path / "Dataset004_Hippocampus", bundled, document, suffixes=("_0000", "_0001"))
    (folder / "imagesTr" / "._hippocampus_001_0000.nii.gz").touch()
    dataset = load_dataset(folder)
    assert dataset.manifest.name == "Dataset004_Hippocampus"
    assert [c.modality for c in dataset.manifest.channels] == ["MR", "CT"]
    assert [c.case_id for c in dataset.manifest.cases] == list(IDS)
    assert dataset.manifest.cases[2].images["CT"] == "imagesTr/hippocampus_035_0001.nii.gz"
    assert dataset.manifest.cases[2].label == "labelsTr/hippocampus_035.nii.gz"


def test_nnunet_with_listed_files(tmp_path: Path, bundled: Path) -> None:
    absolute = str(tmp_path / "imagesTr/hippocampus_015.nii.gz")
    files = {
        "one": {"images": ["labelsTr/../imagesTr/hippocampus_001.nii.gz"], "label": "labelsTr/hippocampus_001.nii.gz"},
        "two": {"images": [absolute], "label": "labelsTr/hippocampus_015.nii.gz"},
    }
    folder = layout(tmp_path, bundled, {**NNUNET, "dataset": files})
    cases = load_dataset(folder).manifest.cases
    assert [c.images["MRI"] for c in cases] == [
        "imagesTr/hippocampus_001.nii.gz",
        "imagesTr/hippocampus_015.nii.gz",
    ]
    assert [c.case_id for c in cases] == ["one", "two"]


@pytest.mark.parametrize("outside", ["../elsewhere/x.nii.gz", "/elsewhere/x.nii.gz", "imagesTr/../../x.nii.gz"])
def test_listed_files_outside_are_refused(tmp_path: Path, bundled: Path, outside: str) -> None:
    files = {"one": {"images": [outside], "label": "labelsTr/hippocampus_001.nii.gz"}}
    folder = layout(tmp_path, bundled, {**NNUNET, "dataset": files})
    assert f"'{outside}' lies outside the dataset's folder" in message(folder)


def test_everything_that_does_not_pair_is_told_at_once(tmp_path: Path, bundled: Path) -> None:
    document = {**NNUNET, "channel_names": {"0": "T1", "1": "T2"}}
    folder = layout(tmp_path, bundled, document, suffixes=("_0000", "_0001"))
    (folder / "imagesTr/hippocampus_001_0001.nii.gz").unlink()
    (folder / "labelsTr/hippocampus_015.nii.gz").unlink()
    (folder / "labelsTr/alone.nii.gz").symlink_to(bundled / "labels/hippocampus_041.nii.gz")
    (folder / "imagesTr/strange.nii.gz").symlink_to(bundled / "images/hippocampus_041.nii.gz")
    told = message(folder)
    assert "1 without the channel's number (below 2): strange.nii.gz" in told
    assert "1 without all of their channels: hippocampus_001" in told
    assert "1 without a label: hippocampus_015" in told
    assert "1 without an image: alone" in told


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"labels": {"background": 0, "whole": [1, 2]}}, "regions_class_order is needed: for each of the 1 regions"),
        ({"labels": REGIONS, "regions_class_order": [1]}, "(whole, tail) the value that it paints, found [1]"),
        ({"labels": REGIONS, "regions_class_order": [1, 1]}, "region 'tail' paints 'label_1', which is none of its"),
        ({"labels": {"rest": 0, "whole": [1, 2]}, "regions_class_order": [1, 1]}, "'rest' holds 0"),
        ({"labels": {"whole": [0, 2]}, "regions_class_order": [1]}, "'whole' holds 0, which can only be the backgr"),
        ({"labels": {"background": 0, "whole": []}}, "label 'whole' needs a whole number, or several in a list"),
        ({"labels": {"background": 0, "a": 1, "ignore": [2, 3]}}, "the label 'ignore' is one value, found [2, 3]"),
        ({"labels": {"background": 0, "a": 1, "ignore": 1}}, "label 'a' has the id 1, which is the value to ignore"),
        ({"labels": {"background": 0, "a": 1, "b": 1}}, "labels 'a' and 'b' have the same value 1"),
        ({"labels": {"background": 0, "a": True}}, "label 'a' needs a whole number, or several in a list, found True"),
        ({"labels": {"Anterior": 0, "Posterior": 1}}, "label 0 is 'Anterior'"),
        ({"labels": {"background": 0, "a": -1}}, "labels: "),
        ({"labels": {}}, "labels is needed"),
        ({"channel_names": {"0": "ctt"}}, "channel 'ctt' is unknown; did you mean 'CT'?"),
        ({"channel_names": {"0": "noNorm"}}, "channel 'noNorm' is unknown"),
        ({"channel_names": {"1": "CT"}}, "channel_names is needed as"),
        ({"channel_names": ["CT"]}, "channel_names is needed as"),
        ({"file_ending": None}, "file_ending is needed"),
        ({"numTraining": 4}, "numTraining is 4, but imagesTr holds 3 cases"),
        ({"dataset": {"a": {"images": [], "label": "x"}}}, "dataset.a needs a label and 1 images"),
    ],
)
def test_what_a_manifest_cannot_say_is_refused(
    tmp_path: Path, bundled: Path, change: dict[str, Any], told: str
) -> None:
    assert told in message(layout(tmp_path, bundled, {**NNUNET, **change}, suffixes=("_0000",)))


@pytest.mark.parametrize("training", [None, {}, ["a.nii.gz"], [{"label": "a.nii.gz"}]])
def test_an_msd_list_of_another_shape(tmp_path: Path, bundled: Path, training: Any) -> None:
    assert "training is not a list" in message(layout(tmp_path, bundled, {**MSD, "training": training}))


def test_every_alias_is_a_modality() -> None:
    assert set(MODALITY_OF_CHANNEL.values()) <= set(get_args(Modality))
    assert all(name == name.casefold() for name in MODALITY_OF_CHANNEL)


@pytest.mark.parametrize(
    ("name", "modality"), [("CT", "CT"), ("ct", "CT"), ("T1w", "MR"), ("FLAIR", "MR"), ("PET", "PT")]
)
def test_channel_names_mean_the_same_in_capitals(name: str, modality: str) -> None:
    assert modality_of_channel(name, "x") == modality


def test_repeated_channel_names_get_their_number(tmp_path: Path, bundled: Path) -> None:
    document = {**NNUNET, "channel_names": {"0": "CT", "1": "CT"}}
    manifest = load_dataset(layout(tmp_path, bundled, document, suffixes=("_0000", "_0001"))).manifest
    assert [c.name for c in manifest.channels] == ["CT_0", "CT_1"]


@pytest.mark.parametrize("suffix", VOLUME_SUFFIXES)
def test_stems(suffix: str) -> None:
    assert volume_stem(Path("a") / f"case.1{suffix}") == "case.1"
    assert volume_stem(Path("a") / f"CASE{suffix.upper()}") == "CASE"


def test_nnunet_regions_and_what_to_ignore(tmp_path: Path, bundled: Path) -> None:
    """BraTS-like: values have no names of their own, and each region says what it paints."""
    document = {**NNUNET, "labels": {**REGIONS, "ignore": 3}, "regions_class_order": [1, 2]}
    schema = load_dataset(layout(tmp_path, bundled, document, suffixes=("_0000",))).manifest.labels
    assert [(label.id, label.name) for label in schema.labels] == [(1, "label_1"), (2, "label_2")]
    assert [(region.name, region.labels, region.paints) for region in schema.regions] == [
        ("whole", ("label_1", "label_2"), "label_1"),
        ("tail", ("label_2",), "label_2"),
    ]
    assert (schema.ignore, schema.ignored_class, schema.output_count) == (3, 3, 2)


def test_nnunet_lists_of_one_value_are_no_regions(tmp_path: Path, bundled: Path) -> None:
    document = {**NNUNET, "labels": {"background": 0, "Anterior": [1], "Posterior": 2, "ignore": 7}}
    schema = load_dataset(layout(tmp_path, bundled, document, suffixes=("_0000",))).manifest.labels
    assert (schema.names, schema.ids, schema.ignore, schema.regions) == (("Anterior", "Posterior"), (1, 2), 7, ())


def test_msd_knows_neither(tmp_path: Path, bundled: Path) -> None:
    document = {**MSD, "labels": {"0": "background", "1": "Anterior", "2": "ignore"}}
    schema = load_dataset(layout(tmp_path, bundled, document)).manifest.labels
    assert (schema.names, schema.ignore) == (("Anterior", "ignore"), None)
