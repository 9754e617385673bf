"""Which transforms of a MONAI bundle are taken, for which key, and which of their arguments are refused."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser

from pipeline.bundle import load_bundle
from pipeline.interop.monai_import import ImportChoices, import_monai
from tests.pipeline.interop.test_monai_import import AFTER, BEFORE, Change, make, put, refusal
from transforms.recipe import follow
from transforms.recipe_spec import MapRange, Reorient, Respace
from transforms.volume import read_volume

pytestmark = pytest.mark.usefixtures("one_thread")


RECIPE = (
    Reorient(axis_codes="RAS"),
    Respace(spacing_mm=(1.2, 1.2, 1.5)),
    MapRange(source=(0, 300), target=(0, 1), clip=True),
)
"""What `BEFORE` amounts to."""


def renamed(old: str, new: str, *changes: Change) -> list[Change]:
    """The config with `old` under another name, and further changes."""
    return [lambda config, _: config.update({new: config.pop(old)}), *changes]


def added(chain: str, *entries: dict[str, Any]) -> Change:
    """Further transforms at the end of a list."""
    return lambda config, _: config[chain]["transforms"].extend(entries)


SIGMOID: tuple[Change, ...] = (
    put("postprocessing#transforms#0", {"_target_": "Activationsd", "keys": "pred", "sigmoid": True}),
    put("postprocessing#transforms#2", {"_target_": "AsDiscreted", "keys": "pred", "threshold": 0.5}),
)


@pytest.mark.parametrize(
    "changes",
    [
        renamed("preprocessing", "mine", put("dataset", {"transform": "@mine"})),
        renamed("preprocessing", "mine", put("dataset", {"transform": "$@mine"}), put("preprocessing", "$not.this()")),
        renamed("preprocessing", "mine", put("dataloader", {"dataset": {"transform": "@mine"}})),
        renamed("preprocessing", "mine", put("data", {"transform": "@mine"}), put("loader", {"dataset": "@data"}),
                put("evaluator#val_data_loader", "@loader"), put("dataset", {"transform": []})),
        renamed("preprocessing", "pre_transforms"),
        [put("dataset", {"transform": {"_target_": "monai.transforms.Compose", "transforms": "@steps"}}),
         put("steps", ["@first", *BEFORE[1:]]), put("first", BEFORE[0])],
    ],
)  # fmt: skip
def test_preprocessing_is_what_the_dataset_names(tmp_path: Path, changes: list[Change]) -> None:
    bundle = load_bundle(import_monai(make(tmp_path / "m", *changes), tmp_path / "b"))
    assert bundle.plan.recipe == RECIPE


def test_postprocessing_is_what_the_evaluator_names(tmp_path: Path) -> None:
    other = {"_target_": "Compose", "transforms": AFTER}
    changes = [*SIGMOID, *renamed("postprocessing", "mine", put("evaluator#postprocessing", "@mine"))]
    assert "overlap (sigmoid)" in refusal(tmp_path / "a", *changes, put("postprocessing", other))
    inline = [*changes, put("evaluator#postprocessing", other)]
    assert import_monai(make(tmp_path / "m", *inline), tmp_path / "b").is_dir()


@pytest.mark.parametrize(("chain", "last"), [("preprocessing", "pre_transforms"), ("postprocessing", "post_transfor")])
def test_a_list_of_transforms_that_is_not_found_is_not_taken_as_empty(tmp_path: Path, chain: str, last: str) -> None:
    told = refusal(tmp_path / "a", *renamed(chain, "elsewhere"))
    assert f"inference.json: no {chain} (looked for " in told
    assert last in told
    assert f"--set '{chain}=\"@KEY\"'" in told
    assert f"--set '{chain}=[]'" in told
    folder = tmp_path / "a/bad"
    named = ImportChoices(overrides=(f'{chain}="@elsewhere"',))
    assert load_bundle(import_monai(folder, tmp_path / "b", choices=named)).plan.recipe == RECIPE
    none = ImportChoices(overrides=(f"{chain}=[]",))
    found = load_bundle(import_monai(folder, tmp_path / "c", choices=none)) if chain == "postprocessing" else None
    assert found is None or found.schema.names == ("Anterior", "Posterior")


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("preprocessing", None, "preprocessing is no list of transforms in a Compose (found 'None'); name the key"),
        ("preprocessing", "$my.steps()", "preprocessing is no list of transforms in a Compose (found '$my.steps()')"),
        ("preprocessing#_target_", "monai.transforms.RandomOrder", "preprocessing is no list of transforms"),
        ("preprocessing#_disabled_", True, "preprocessing is no list of transforms in a Compose (found 'a Compose wit"),
        ("dataset", {"transform": "$@a or @b"}, "dataset#transform is no list of transforms in a Compose (found '$@a"),
        ("dataset", {"transform": "@nowhere"}, "dataset#transform is '@nowhere', but there is no nowhere"),
        ("dataset", "@dataset", "dataset refers to itself"),
        ("preprocessing#transforms#2", "@nowhere", "preprocessing#transforms#2 is '@nowhere', but there is no nowh"),
        ("preprocessing#transforms#2", 3, "expected a transform with its _target_, found '3'"),
        ("preprocessing#transforms#2#keys", [1], "transforms#2#keys is [1], expected the names of one or more entries"),
    ],
)
def test_lists_of_transforms_that_are_none(tmp_path: Path, key: str, value: Any, told: str) -> None:
    assert told in refusal(tmp_path, put(key, value))


def test_transforms_of_other_keys_are_left_out(tmp_path: Path) -> None:
    label = {"keys": ["label"], "allow_missing_keys": True}
    changes = [
        put("preprocessing#transforms#0", {"_target_": "LoadImaged", "keys": ["image", "label"]}),
        added("preprocessing",
              {"_target_": "ScaleIntensityRanged", "a_min": 0, "a_max": 10, "b_min": 0, "b_max": 5, **label},
              {"_target_": "Spacingd", "pixdim": [5, 5, 5], "mode": "nearest", **label},
              {"_target_": "CastToTyped", "dtype": "$torch.uint8", **label},
              {"_target_": "CropForegroundd", "source_key": "image", **label},
              {"_target_": "Lambdad", "func": "$lambda x: x > 0", **label},
              {"_target_": "scripts.Mine", "keys": "label", "classes": "$len(@names)"}),
        added("postprocessing",
              {"_target_": "AsDiscreted", "keys": "label", "to_onehot": 3},
              {"_target_": "Activationsd", "keys": ["label"], "sigmoid": True}),
    ]  # fmt: skip
    bundle = load_bundle(import_monai(make(tmp_path / "m", *changes), tmp_path / "b"))
    assert bundle.plan.recipe == RECIPE
    assert bundle.schema.names == ("Anterior", "Posterior")


def test_of_one_argument_a_key_the_image_s_and_the_prediction_s_are_taken(tmp_path: Path) -> None:
    both = ["label", "image"]
    changes = [
        put("preprocessing#transforms#3#keys", "@both"), put("both", both),
        put("preprocessing#transforms#3#mode", ["nearest", "bilinear"]),
        put("preprocessing#transforms#3#align_corners", "$(None, True)"),
        put("preprocessing#transforms#5", {"_target_": "EnsureTyped", "keys": both,
                                           "dtype": ["$torch.uint8", "$torch.float32"]}),
        put("postprocessing#transforms#0", {"_target_": "Activationsd", "keys": ["label", "pred"],
                                            "sigmoid": [True, False], "softmax": [False, True]}),
        put("postprocessing#transforms#2", {"_target_": "AsDiscreted", "keys": ["pred", "label"],
                                            "argmax": [True, False], "to_onehot": [None, 3]}),
    ]  # fmt: skip
    bundle = load_bundle(import_monai(make(tmp_path / "m", *changes), tmp_path / "b"))
    assert bundle.plan.recipe == RECIPE
    assert bundle.schema.names == ("Anterior", "Posterior")
    swapped = put("both", both[::-1])
    nearest = load_bundle(
        import_monai(make(tmp_path / "n", *changes, swapped, put("preprocessing#transforms#5#keys", both)),
                     tmp_path / "c")
    )  # fmt: skip
    assert nearest.plan.recipe is not None
    assert nearest.plan.recipe[1] == Respace(spacing_mm=(1.2, 1.2, 1.5), interpolation="nearest")
    told = refusal(tmp_path, *changes, put("preprocessing#transforms#3#mode", ["bilinear"]))
    assert "preprocessing#transforms#3#mode has 1 values, expected one for each of 2 keys" in told


def test_an_image_under_another_key_or_made_of_others_is_not_left_out(tmp_path: Path) -> None:
    def under(keys: Any) -> Change:
        return lambda config, _: [entry.update(keys=keys) for entry in config["preprocessing"]["transforms"]]

    told = refusal(tmp_path / "a", under("img"))
    assert (
        "preprocessing#transforms is for img, expected transforms for 'image', as the preprocessing of what the" in told
    )
    joined = added("preprocessing", {"_target_": "ConcatItemsd", "keys": ["t1", "t2"], "name": "image"})
    loaded = added("preprocessing", {"_target_": "NormalizeIntensityd", "keys": "image"})
    assert "preprocessing#transforms is for t1, t2, expected" in refusal(
        tmp_path / "b", under(["t1", "t2"]), joined, loaded
    )
    assert "the transform ConcatItems before the network is not understood" in refusal(tmp_path / "c", joined)
    copied = added("postprocessing", {"_target_": "CopyItemsd", "keys": "label", "names": ["pred"]})
    assert "the transform CopyItems after the network is not understood" in refusal(tmp_path / "d", copied)


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ({"_target_": "CastToTyped", "dtype": "uint8"}, "CastToType: dtype 'uint8' rounds values"),
        ({"_target_": "CastToTyped", "dtype": "$np.int16"}, "CastToType: dtype 'int16' rounds values"),
        ({"_target_": "EnsureTyped", "dtype": "int32"}, "EnsureType: dtype 'int32' rounds values"),
        ({"_target_": "ToTensord", "dtype": "$torch.long"}, "ToTensor: dtype 'long' rounds values"),
        ({"_target_": "LoadImaged", "dtype": "$int"}, "LoadImage: dtype 'int' rounds values"),
        ({"_target_": "ScaleIntensityd", "dtype": "bool"}, "ScaleIntensity: dtype 'bool' rounds values"),
        ({"_target_": "LoadImaged", "affine_lps_to_ras": False}, "LoadImage: affine_lps_to_ras False is not understoo"),
        ({"_target_": "LoadImaged", "channel_dim": 2}, "LoadImage: channel_dim 2 is not understood, expected None"),
        ({"_target_": "LoadImaged", "swap_ij": False}, "LoadImage: its argument swap_ij is not understood"),
        ({"_target_": "LoadImaged", "reader": "scripts.Mine"}, "LoadImage: reader 'scripts.Mine' is not understood"),
        ({"_target_": "LoadImaged", "reader": {"_target_": "ITKReader", "affine_lps_to_ras": False}}, "LoadImage: re"),
        ({"_target_": "Orientationd", "axcodes": "RRS"}, "Orientation: axcodes 'RRS' is not understood, expected one"),
        ({"_target_": "Orientationd", "axcodes": "RLS"}, "Orientation: axcodes 'RLS' is not understood"),
        ({"_target_": "Orientationd", "axcodes": "RASX"}, "Orientation: axcodes 'RASX' is not understood"),
        ({"_target_": "Orientationd"}, "Orientation: axcodes None is not understood"),
        ({"_target_": "Orientationd", "axcodes": "RAS", "labels": [["R", "L"], ["A", "P"], ["S", "I"]]},
         "Orientation: labels [['R', 'L'], ['A', 'P'], ['S', 'I']] are not understood, expected null or"),
        ({"_target_": "CropForegroundd", "source_key": "label"}, "CropForeground: source_key 'label' is not underst"),
        ({"_target_": "ScaleIntensityRanged", "a_min": 0, "a_max": 9, "b_min": 0, "clip": True},
         "ScaleIntensityRange: b_min 0 with b_max None is not understood, expected both or neither"),
        ({"_target_": "ScaleIntensityRanged", "a_min": 0, "a_max": 9, "b_max": 1},
         "ScaleIntensityRange: b_min None with b_max 1 is not understood"),
        ({"_target_": "ScaleIntensityRanged", "a_min": 0, "a_max": 9, "clip": True},
         "ScaleIntensityRange: clip True without b_min and b_max is not understood"),
        ({"_target_": "ScaleIntensityRangePercentilesd", "lower": 1, "upper": 99, "b_min": None, "b_max": 1,
          "clip": True}, "ScaleIntensityRangePercentiles: b_min None with b_max 1 is not understood"),
        ({"_target_": "ScaleIntensityRangePercentilesd", "lower": 1, "upper": 99, "b_min": None, "b_max": None,
          "clip": True}, "ScaleIntensityRangePercentiles: clip True without b_min and b_max is not understood"),
    ],
)  # fmt: skip
def test_arguments_that_change_voxels_or_axes(tmp_path: Path, entry: dict[str, Any], told: str) -> None:
    assert told in refusal(tmp_path, added("preprocessing", {"keys": "image", **entry}))


@pytest.mark.parametrize(
    "entry",
    [
        {"_target_": "CastToTyped", "dtype": "float32"},
        {"_target_": "CastToTyped", "dtype": "$torch.float32"},
        {"_target_": "CastToTyped", "dtype": "$numpy.float64"},
        {"_target_": "EnsureTyped", "dtype": None, "track_meta": False, "data_type": "tensor"},
        {"_target_": "LoadImaged", "reader": "monai.data.ITKReader", "image_only": True, "ensure_channel_first": True,
         "affine_lps_to_ras": True},
        {"_target_": "LoadImaged", "reader": "nibabelreader", "dtype": "np.float32", "simple_keys": True},
    ],
)  # fmt: skip
def test_arguments_that_change_no_voxel(tmp_path: Path, entry: dict[str, Any]) -> None:
    folder = make(tmp_path / "m", added("preprocessing", {"keys": "image", **entry}))
    assert load_bundle(import_monai(folder, tmp_path / "b")).plan.recipe == RECIPE


def test_axes_in_any_order_with_the_default_labels(tmp_path: Path) -> None:
    labels = [["L", "R"], ["P", "A"], ["I", "S"]]
    entry = {"_target_": "Orientationd", "keys": "image", "axcodes": ["S", "P", "L"], "labels": labels}
    bundle = load_bundle(import_monai(make(tmp_path / "m", put("preprocessing#transforms#2", entry)), tmp_path / "b"))
    assert bundle.plan.recipe is not None
    assert bundle.plan.recipe[0] == Reorient(axis_codes="SPL")


def test_outputs_are_rounded_only_once_they_are_labels(tmp_path: Path) -> None:
    cast = {"_target_": "CastToTyped", "keys": "pred", "dtype": "$torch.uint8"}
    told = refusal(tmp_path, put("postprocessing#transforms#1", cast))
    assert "CastToType after the network: dtype 'uint8' rounds values" in told
    assert import_monai(make(tmp_path / "m", added("postprocessing", cast)), tmp_path / "b").is_dir()
    both = put("postprocessing#transforms#2", {"_target_": "AsDiscreted", "argmax": True, "threshold": 0.5})
    assert "AsDiscrete after a softmax is understood with argmax alone" in refusal(tmp_path / "x", both)
    assert "AsDiscrete after a sigmoid is understood with threshold 0.5 alone" in refusal(
        tmp_path / "y", SIGMOID[0], both
    )


@pytest.mark.parametrize("chain", ["preprocessing", "postprocessing"])
def test_transforms_of_the_bundle_s_own_code_are_not_taken_for_monai_s(tmp_path: Path, chain: str) -> None:
    mine = added(chain, {"_target_": "scripts.CastToTyped", "keys": ["image", "pred"]})
    assert "the transform scripts.CastToTyped " in refusal(tmp_path / "a", mine)
    composed = put(f"{chain}#_target_", "scripts.Compose")
    assert f"{chain} is no list of transforms in a Compose" in refusal(tmp_path / "b", composed)


def test_the_image_is_what_monai_makes_of_it(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """MONAI itself prepares an image and its label; the label's transforms must not be seen in the image's recipe."""
    files = Path(request.config.rootpath) / "tests/data/hippocampus"
    both, label = ["label", "image"], {"keys": "label"}
    steps: list[dict[str, Any]] = [
        {"_target_": "LoadImaged", "keys": both, "dtype": "$np.float32"},
        {"_target_": "EnsureChannelFirstd", "keys": both},
        {"_target_": "Spacingd", **label, "pixdim": [3, 3, 3], "mode": "nearest"},
        {"_target_": "Orientationd", "keys": "image", "axcodes": "SPL", "labels": None},
        {"_target_": "Spacingd", "keys": both, "pixdim": [1.3, 0.9, 1.1], "mode": ["nearest", "bilinear"]},
        {"_target_": "ScaleIntensityRanged", **label, "a_min": 0, "a_max": 2, "b_min": 5, "b_max": 9},
        {"_target_": "ScaleIntensityRanged", "keys": "image", "a_min": 0, "a_max": 300, "b_min": 0, "b_max": 1},
        {"_target_": "EnsureTyped", "keys": both, "dtype": ["$torch.uint8", "$torch.float32"]},
    ]
    compose = {"_target_": "Compose", "transforms": steps}
    recipe = load_bundle(
        import_monai(make(tmp_path / "m", put("dataset", {"transform": compose})), tmp_path / "b")
    ).plan.recipe
    assert recipe is not None
    study = read_volume(files / "images/hippocampus_001.nii.gz")
    found, _ = follow(recipe, torch.from_numpy(study.voxels[None].astype(np.float32)), study.geometry)
    parser = ConfigParser({"imports": ["$import torch", "$import numpy as np"], "t": compose})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = {key: str(files / f"{key}s/hippocampus_001.nii.gz") for key in both}
        expected = parser.get_parsed_content("t")(data)["image"].as_tensor()
    assert torch.allclose(found, expected, atol=1e-4)
