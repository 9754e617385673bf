"""nnU-Net's networks as our U-Net, against logits of nnU-Net's own (tests/data/nnunet/make.py)."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.errors import BundleError, ExportError
from pipeline.interop.nnunet_checkpoint import read_checkpoint
from pipeline.interop.nnunet_export import architecture_of, weights_to_nnunet
from pipeline.interop.nnunet_network import architecture, spec_of_nnunet, turned, weights_from_nnunet
from pipeline.models.spec import UNetSpec
from pipeline.models.unet import UNet

DATA = Path(__file__).parents[2] / "data" / "nnunet"
NAMES = ("plain_3d", "plain_2d", "resenc_3d")
CHECKPOINT = "fold_0/checkpoint_final.pth"


def configuration_of(name: str) -> dict[str, Any]:
    (found,) = json.loads((DATA / name / "plans.json").read_text())["configurations"].values()
    return dict(found)


def spec_of(name: str) -> UNetSpec:
    network, arguments = architecture(configuration_of(name), "plans.json")
    return spec_of_nnunet(network, arguments, channels=(2, 3), source="plans.json")


def changed(**changes: Any) -> tuple[str, dict[str, Any]]:
    name, arguments = architecture(configuration_of("resenc_3d"), "plans.json")
    return name, copy.deepcopy(arguments) | changes


@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 1, 0), (1, 2, 0), (2, 0, 1)])
@pytest.mark.parametrize("name", NAMES)
def test_logits_are_nnunets_own_whichever_way_the_axes_lie(name: str, axes: tuple[int, ...]) -> None:
    spec = spec_of(name)
    if spec.dimensions == 2:
        axes = tuple(axis for axis in axes if axis < 2)
    ours = turned(spec, axes)
    network = UNet(ours).eval()
    theirs = read_checkpoint(DATA / name / CHECKPOINT).weights
    network.load_state_dict(weights_from_nnunet(theirs, network.state_dict(), ours, axes=axes, source="x"))
    check = np.load(DATA / name / "network_check.npz")
    order = (0, 1, *(2 + axis for axis in axes))
    image, expected = (torch.from_numpy(check[key])[None].permute(order) for key in ("image", "logits"))
    with torch.no_grad():
        found = network(image.contiguous())
    assert torch.allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_weights_go_back_bit_for_bit_under_every_name(name: str) -> None:
    spec, theirs = spec_of(name), read_checkpoint(DATA / name / CHECKPOINT).weights
    axes = (1, 2, 0) if spec.dimensions == 3 else (1, 0)
    ours = weights_from_nnunet(theirs, UNet(turned(spec, axes)).state_dict(), turned(spec, axes), axes=axes, source="x")
    back = weights_to_nnunet(ours, turned(spec, axes), axes=axes)
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("name", NAMES)
def test_an_architecture_said_again_is_the_same(name: str) -> None:
    spec = spec_of(name)
    network, arguments = architecture({"architecture": architecture_of(spec)}, "plans.json")
    assert spec_of_nnunet(network, arguments, channels=(2, 3), source="plans.json") == spec


def test_batch_normalisation_that_only_the_trainer_knew() -> None:
    name, arguments = changed()
    spec = spec_of_nnunet(name, arguments, channels=(2, 3), source="x", batch_normalised=True)
    assert spec.normalisation == "batch"


def test_numbers_for_all_stages_and_what_a_network_may_lack() -> None:
    few = {
        "conv_bias": False,
        "kernel_sizes": 3,
        "n_blocks_per_stage": 2,
        "strides": [1, 2, 2],
        "nonlin": "torch.nn.ReLU",
    }
    name, arguments = changed(**few)
    spec = spec_of_nnunet(name, arguments, channels=(2, 3), source="x")
    assert (spec.kernel_shapes[1], spec.strides[1], spec.encoder_blocks) == ((3, 3, 3), (2, 2, 2), (2, 2, 2))
    network = UNet(spec)
    theirs = weights_to_nnunet(_without_upsampling_bias(network), spec, axes=(0, 1, 2))
    assert not any(key.endswith(".conv.bias") or ("transpconvs" in key and key.endswith("bias")) for key in theirs)
    weights = weights_from_nnunet(theirs, network.state_dict(), spec, axes=(0, 1, 2), source="x")
    assert not weights["decoder.0.upsampling.bias"].any()


def _without_upsampling_bias(network: UNet) -> dict[str, torch.Tensor]:
    return {k: v.zero_() if k.endswith("upsampling.bias") else v for k, v in network.state_dict().items()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nonlin_first": True}, "nonlin_first: True"),
        ({"squeeze_excitation": True}, "squeeze_excitation: True"),
        ({"block": "x.BottleneckD"}, "block: 'x.BottleneckD'"),
        ({"nonlin": "torch.nn.GELU"}, "expected LeakyReLU or ReLU"),
        ({"norm_op": "torch.nn.GroupNorm"}, "norm_op: 'torch.nn.GroupNorm'"),
        ({"norm_op_kwargs": {"track_running_stats": True}}, "norm_op_kwargs.track_running_stats"),
        ({"conv_op": "torch.nn.Conv1d"}, "expected Conv2d or Conv3d"),
        ({"kernel_sizes": 2}, "a kernel needs a middle voxel"),
        ({"strides": [2, 2, 2]}, "the first stage works at full resolution"),
        ({"features_per_stage": "wide"}, "not as nnU-Net writes them"),
        ({"norm_op_kwargs": [1]}, "not as nnU-Net writes them"),
        ({"norm_op_kwargs": {"eps": float("nan")}}, "found nan, expected a finite number"),
        ({"nonlin_kwargs": {"negative_slope": float("inf")}}, "found inf, expected a finite number"),
        ({"n_stages": float("inf")}, "not as nnU-Net writes them"),
    ],
)
def test_what_our_network_cannot_be_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    name, arguments = changed(**changes)
    with pytest.raises(BundleError, match=message):
        spec_of_nnunet(name, arguments, channels=(2, 3), source="plans.json")


def test_other_networks_and_missing_arguments_are_named() -> None:
    with pytest.raises(BundleError, match="network 'Primus' cannot be imported"):
        architecture({"architecture": {"network_class_name": "a.b.Primus", "arch_kwargs": {}}}, "plans.json")
    name, arguments = changed()
    del arguments["strides"]
    with pytest.raises(BundleError, match=r"arch_kwargs\.strides is missing"):
        spec_of_nnunet(name, arguments, channels=(2, 3), source="plans.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("encoder.stages.1.blocks.0.conv1.conv.bias"), "conv1.conv.bias is missing"),
        (lambda w: w.pop("decoder.seg_layers.0.bias"), "seg_layers.0.bias is missing"),
        (lambda w: w.update({"gate.weight": torch.ones(1)}), "gate.weight has no place"),
        (lambda w: w.update({"decoder.seg_layers.0.bias": torch.ones(4)}), r"shape \(4,\), expected \(3,\)"),
    ],
)
def test_weights_of_another_network_are_refused(change: Any, message: str) -> None:
    spec, theirs = spec_of("resenc_3d"), dict(read_checkpoint(DATA / "resenc_3d" / CHECKPOINT).weights)
    change(theirs)
    with pytest.raises(BundleError, match=message):
        weights_from_nnunet(theirs, UNet(spec).state_dict(), spec, axes=(0, 1, 2), source="x")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"skip": "attention"}, "no skip attention"),
        ({"upsampling": "interpolated"}, "no upsampling interpolated"),
        ({"normalisation": "group"}, "no normalisation group"),
        ({"stem_channels": 0}, "no residual blocks without a stem"),
    ],
)
def test_what_nnunet_cannot_say_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ExportError, match=message):
        architecture_of(spec_of("resenc_3d").model_copy(update=changes))
