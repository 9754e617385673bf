"""nnU-Net's plans followed step by step, against what its own code made of the same volumes (make_steps.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.errors import PlanError
from pipeline.interop.nnunet_plan import (
    CONVENTIONS,
    axes_of_nnunet,
    configuration_of,
    plan_of_nnunet,
    schema_of_nnunet,
)
from pipeline.plan import ChannelPlan
from transforms.geometry import Geometry
from transforms.placing import Placed, place, put_back
from transforms.resample import move_argmax, move_regions

FOLDER = Path(__file__).parents[2] / "data" / "nnunet"
STEPS = np.load(FOLDER / "steps.npz")
TOLD: dict[str, Any] = json.loads(str(STEPS["told"]))


def documents(name: str = "slices_double") -> tuple[dict[str, Any], dict[str, Any], str]:
    _, plans, dataset, configuration = json.loads(json.dumps(TOLD[name]))
    return plans, dataset, configuration


def stored(name: str, part: str) -> np.ndarray:
    """An array of the study itself, k, j, i, as i, j, k."""
    return STEPS[f"{name}.{part}"].swapaxes(-1, -3).copy()


def of_the_network(name: str, part: str) -> np.ndarray:
    """An array on nnU-Net's grid, its axes as the file's."""
    axes = axes_of_nnunet(TOLD[name][1])
    return STEPS[f"{name}.{part}"].transpose(0, *(1 + axes.index(axis) for axis in range(3))).copy()


def placed_study(name: str) -> tuple[Placed, Geometry]:
    plans, dataset, configuration = documents(name)
    fields = plan_of_nnunet(plans, dataset, configuration)
    channels = torch.from_numpy(stored(name, "channels").astype(np.float32))
    k, j, i = TOLD[name][0]
    source = Geometry((channels.shape[1], channels.shape[2], channels.shape[3]), np.diag([-i, -j, k, 1.0]))
    placed = place(
        channels,
        source,
        fields["placing"],
        axis_codes=fields["axis_codes"],
        spacing_mm=fields["spacing_mm"],
        normalisations=[channel.normalisation for channel in fields["channels"]],
    )
    return placed, source


@pytest.mark.parametrize("name", TOLD)
def test_preprocessing_is_nnunets_own(name: str) -> None:
    placed, _ = placed_study(name)
    expected = of_the_network(name, "image")
    assert placed.image.shape == expected.shape
    assert np.abs(placed.image.numpy() - expected).max() < 2e-6 * max(10.0, np.abs(expected).max())


@pytest.mark.parametrize("name", TOLD)
def test_labels_from_its_logits_are_nnunets_own(name: str) -> None:
    placed, source = placed_study(name)
    schema = schema_of_nnunet(TOLD[name][2])
    logits = torch.from_numpy(of_the_network(name, "logits").astype(np.float32))
    if schema.regions:
        # A region is there where its logit is above 0.
        found = move_regions(logits + 0.5, schema.painted_classes, placed.grid, placed.field)
    else:
        found = move_argmax(logits, placed.grid, placed.field)
    label_map = schema.ids_from_classes(put_back(found, placed.field, placed.box, source)[0].numpy())
    assert (label_map == stored(name, "labels")).all()


def test_a_plan_by_hand() -> None:
    """Its network's axes are those of the file in the order k, i, j; slices follow each other along k."""
    plans, dataset, configuration = documents("last_axis_slices")
    assert plans["transpose_forward"] == [2, 0, 1]
    assert axes_of_nnunet(plans) == (0, 2, 1)
    found = plan_of_nnunet(plans, dataset, configuration)
    assert found["spacing_mm"] == (4.0, 1.0, 1.0)
    assert found["patch_shape"] == (4, 8, 12)
    assert found["slice_axis"] is None
    assert found["inference"] == CONVENTIONS
    assert [channel.modality for channel in found["channels"]] == ["CT", "MR"]
    assert [channel.normalisation.kind for channel in found["channels"]] == ["inside", "zscore"]


def test_a_flat_plan_by_hand() -> None:
    """The network's axes in the plane are k and i; the slices stay as they are along j."""
    plans, dataset, configuration = documents("flat_turned")
    found = plan_of_nnunet(plans, dataset, configuration)
    assert (found["slice_axis"], found["placing"].kept_axis) == (1, 1)
    assert found["patch_shape"] == (8, 1, 12)
    assert (found["spacing_mm"][0], found["spacing_mm"][2]) == (1.2, 1.1)


def test_what_a_configuration_inherits() -> None:
    plans, _, configuration = documents()
    plans["configurations"]["mine"] = {"inherits_from": configuration, "batch_size": 9}
    assert configuration_of(plans, "mine")["batch_size"] == 9
    assert configuration_of(plans, "mine")["patch_size"] == plans["configurations"][configuration]["patch_size"]


def test_readers_that_reorient() -> None:
    plans, dataset, configuration = documents()
    assert not plan_of_nnunet(plans, dataset, configuration)["placing"].reorients
    plans["image_reader_writer"] = "NibabelIOWithReorient"
    assert plan_of_nnunet(plans, dataset, configuration)["placing"].reorients


@pytest.mark.parametrize(
    ("name", "modality"),
    [
        ("CBCT", "CT"),
        ("CTA", "CT"),
        ("spect", "NM"),
        ("FDG-PET", "PT"),
        ("PET_SUV", "PT"),
        ("T1 MRI", "MR"),
        ("portal CT", "CT"),
        ("noNorm", None),
        ("zscore", None),
        ("rescale_to_0_1", None),
        ("SUV", None),
        ("channel 1", None),
    ],
)
def test_modalities_are_those_that_the_manifest_knows_by_name_or_word(name: str, modality: str | None) -> None:
    plans, dataset, configuration = documents("last_axis_slices")
    dataset["channel_names"] = {"0": "MR", "1": name}
    assert plans["configurations"][configuration]["normalization_schemes"][1] == "ZScoreNormalization"
    assert plan_of_nnunet(plans, dataset, configuration)["channels"][1].modality == modality


def test_a_channel_of_any_name_is_a_ct_if_it_is_normalised_as_one() -> None:
    plans, dataset, configuration = documents("slices_double")
    assert plans["configurations"][configuration]["normalization_schemes"][0] == "CTNormalization"
    dataset["channel_names"] |= {"0": "channel 1"}
    assert plan_of_nnunet(plans, dataset, configuration)["channels"][0].modality == "CT"


def test_what_training_saw_is_unknown_where_the_plans_do_not_tell() -> None:
    plans, dataset, configuration = documents("last_axis_slices")
    plans[MEASURED] = {"0": {"min": 3, "max": 90}, "1": {"mean": 5}}
    found = plan_of_nnunet(plans, dataset, configuration)["channels"]
    assert [(channel.lowest, channel.highest) for channel in found] == [(3.0, 90.0), (None, None)]
    dataset["channel_names"] = {"0": "zscore", "1": "noNorm"}
    for channel in plan_of_nnunet(plans, dataset, configuration)["channels"]:
        assert ChannelPlan.model_validate_json(channel.model_dump_json()) == channel


@pytest.mark.parametrize(
    ("scheme", "smallest"),
    [
        ("ZScoreNormalization", 1e-8),
        ("RescaleTo01Normalization", 1e-8),
        ("NoNormalization", None),
        ("RGBTo01Normalization", None),
    ],
)
@pytest.mark.parametrize("masked", [False, True])
def test_by_what_nnunet_divides_at_least(scheme: str, masked: bool, smallest: float | None) -> None:
    """Of nnunetv2/preprocessing/normalization/default_normalization_schemes.py."""
    plans, dataset, configuration = documents("last_axis_slices")
    chosen = plans["configurations"][configuration]
    chosen |= {"normalization_schemes": [scheme] * 2, "use_mask_for_norm": [masked] * 2}
    found = plan_of_nnunet(plans, dataset, configuration)["channels"]
    assert [channel.normalisation.smallest_divisor for channel in found] == [smallest] * 2


@pytest.mark.parametrize(
    "name", [name for name, (_, _, dataset, _) in TOLD.items() if len(dataset["channel_names"]) > 1]
)
def test_a_sequence_that_was_filled_with_zeros_is_placed(name: str) -> None:
    plans, dataset, configuration = documents(name)
    fields = plan_of_nnunet(plans, dataset, configuration)
    channels = torch.from_numpy(stored(name, "channels").astype(np.float32))
    channels[1] = 0
    k, j, i = TOLD[name][0]
    source = Geometry((channels.shape[1], channels.shape[2], channels.shape[3]), np.diag([-i, -j, k, 1.0]))
    hows = [channel.normalisation for channel in fields["channels"]]
    grid = {"axis_codes": fields["axis_codes"], "spacing_mm": fields["spacing_mm"]}
    placed = place(channels, source, fields["placing"], normalisations=hows, **grid)
    assert placed.image.isfinite().all()
    if hows[1].kind in ("inside", "zscore", "unit"):
        assert not placed.image[1].any()


def test_channels_of_one_name_are_numbered_as_the_manifest_does() -> None:
    plans, dataset, configuration = documents("last_axis_slices")
    dataset["channel_names"] = {"0": "MRI", "1": "MRI"}
    found = plan_of_nnunet(plans, dataset, configuration)["channels"]
    assert [channel.name for channel in found] == ["MRI_0", "MRI_1"]


MEASURED = "foreground_intensity_properties_per_channel"
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"plans.image_reader_writer": "Tiff3DIO"}, "Tiff3DIO"),
    ({"plans.label_manager": "MyManager"}, "MyManager"),
    ({"plans.my_key": 1}, "my_key"),
    ({"plans.transpose_forward": [0, 1, 1]}, "transpose_forward"),
    ({"chosen.previous_stage": "3d_lowres"}, "3d_lowres.*cascade"),
    ({"chosen.preprocessor_name": "MyPreprocessor"}, "MyPreprocessor"),
    ({"chosen.resampling_fn_data": "my_resampling"}, "my_resampling"),
    ({"chosen.resampling_fn_data_kwargs": {"order": 2}}, "order is 2"),
    ({"chosen.resampling_fn_data_kwargs": {"sigma": 2}}, "sigma"),
    ({"chosen.resampling_fn_probabilities_kwargs": {"order": 3}}, "expected order 1"),
    ({"chosen.normalization_schemes": ["MyNormalization", "ZScoreNormalization"]}, "MyNormalization"),
    ({"chosen.normalization_schemes": ["ZScoreNormalization"]}, "1 normalization_schemes for 2 channels"),
    ({"chosen.patch_size": [8]}, "patch_size"),
    ({"chosen.patch_size": ["a", 1, 2]}, "patch_size is 'a', expected a finite number"),
    ({"chosen.patch_size": [None, 1, 2]}, "patch_size is None"),
    ({"chosen.patch_size": [8.5, 8, 8]}, "patch_size is 8.5, expected a whole number"),
    ({"chosen.batch_size": None}, "batch_size is None"),
    ({"chosen.spacing": [float("nan"), 1, 1]}, "spacing is nan"),
    ({"chosen.spacing": [10**400, 1, 1]}, "plans.json: configuration .* not as nnU-Net writes it .OverflowError"),
    ({"chosen.inherits_from": [1]}, r"inherits_from is \[1\], expected a name"),
    ({"chosen.resampling_fn_data_kwargs": [1]}, r"resampling_fn_data_kwargs is \[1\], expected a table"),
    ({"chosen.resampling_fn_data_kwargs": {"is_seg": True}}, "resampling_fn_data_kwargs: is_seg is True"),
    ({"chosen.resampling_fn_probabilities_kwargs": {"is_seg": 1, "order": 1}}, "probabilities_kwargs: is_seg is 1"),
    ({"chosen.resampling_fn_data_kwargs": {"force_separate_z": "x"}}, "force_separate_z is 'x', expected true"),
    (
        {"chosen.resampling_fn_data_kwargs": {"separate_z_anisotropy_threshold": None}},
        "resampling_fn_data_kwargs: separate_z_anisotropy_threshold is None",
    ),
    ({"plans.transpose_forward": ["a", 1, 2]}, "transpose_forward is 'a'"),
    ({f"plans.{MEASURED}": [1]}, rf"{MEASURED} is \[1\], expected a table"),
    ({f"plans.{MEASURED}": {"0": None}}, f"{MEASURED}.0 is None, expected a table"),
    ({f"plans.{MEASURED}": {"0": {"min": None}}}, f"{MEASURED}.0.min is None"),
    ({f"plans.{MEASURED}": {"1": {"mean": float("nan")}}}, f"{MEASURED}.1.mean is nan"),
    ({"dataset.channel_names": {"0": "PET/CT", "1": "MR"}}, "channel_names.0: found 'PET/CT', which is CT as well"),
    ({"dataset.labels": {"background": 0, "a": [[1], 2]}}, "dataset.json: label"),
    ({"chosen.spacing": "fine"}, "spacing"),
    ({"chosen.augmentation": "strong"}, "augmentation"),
    ({"chosen.inherits_from": "nothing"}, "'nothing'"),
    ({"dataset.channel_names": {"1": "CT", "2": "MR"}}, "channel_names"),
    ({"dataset.labels": {"background": 0, "one": 1, "three": 3}}, "without gaps"),
    ({"dataset.labels": [1, 2]}, "labels"),
]


@pytest.mark.parametrize(("changes", "named"), REFUSED)
def test_what_is_not_known_is_refused_by_name(changes: dict[str, Any], named: str) -> None:
    plans, dataset, configuration = documents()
    places = {"plans": plans, "chosen": plans["configurations"][configuration], "dataset": dataset}
    for key, value in changes.items():
        place_of, _, name = key.partition(".")
        places[place_of][name] = value
    with pytest.raises(PlanError, match=named) as caught:
        plan_of_nnunet(plans, dataset, configuration)
    assert "\n" not in str(caught.value)


def test_no_window_for_a_ct() -> None:
    plans, dataset, configuration = documents("slices_double")
    plans["foreground_intensity_properties_per_channel"] = {}
    with pytest.raises(PlanError, match="CTNormalization"):
        plan_of_nnunet(plans, dataset, configuration)
