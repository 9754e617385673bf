"""Makes the oracles beside it with nnU-Net's own packages; run it in an environment that has nnunetv2 (2.8.1 then):
python tests/data/nnunet/make.py FOLDER. The weights are random, the widths tiny.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

IMPORTS = ["conv_op", "norm_op", "dropout_op", "nonlin"]
RESAMPLING = {"order": 3, "order_z": 0, "force_separate_z": None}


def arguments(dimensions: int, **further: Any) -> dict[str, Any]:
    return {
        "n_stages": 3,
        "features_per_stage": [2, 3, 4],
        "conv_op": f"torch.nn.modules.conv.Conv{dimensions}d",
        "kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 1, 3]],
        "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 1]],
        "n_conv_per_stage_decoder": [1, 2],
        "conv_bias": True,
        "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dimensions}d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
        **further,
    }


def new_architecture(name: str, **further: Any) -> dict[str, Any]:
    return {
        "architecture": {
            "network_class_name": f"dynamic_network_architectures.architectures.unet.{name}",
            "arch_kwargs": arguments(3, **further),
            "_kw_requires_import": IMPORTS,
        }
    }


def old_architecture() -> dict[str, Any]:
    """As plans said it before nnU-Net 2.4."""
    return {
        "UNet_class_name": "PlainConvUNet",
        "UNet_base_num_features": 2,
        "unet_max_num_features": 3,
        "n_conv_per_stage_encoder": [2, 1, 1],
        "n_conv_per_stage_decoder": [1, 2],
        "num_pool_per_axis": [2, 1],
        "pool_op_kernel_sizes": [[1, 1], [2, 2], [2, 1]],
        "conv_kernel_sizes": [[3, 1], [3, 3], [1, 3]],
    }


CASES: dict[str, tuple[str, list[int], list[int], dict[str, Any]]] = {
    "plain_3d": ("3d_fullres", [4, 12, 8], [0, 1, 2], new_architecture("PlainConvUNet", n_conv_per_stage=[1, 2, 1])),
    "plain_2d": ("2d", [12, 8], [1, 0, 2], old_architecture()),
    "resenc_3d": (
        "3d_fullres", [4, 12, 8], [2, 0, 1], new_architecture("ResidualEncoderUNet", n_blocks_per_stage=[1, 2, 1]),
    ),
}  # fmt: skip
"""Configuration, patch, transpose_forward and architecture."""

DATASET = {
    "channel_names": {"0": "CT", "1": "T2"},
    "labels": {"background": 0, "left": 1, "right": 2},
    "numTraining": 3,
    "file_ending": ".nii.gz",
}


def plans_of(name: str) -> dict[str, Any]:
    configuration, patch, transpose, architecture = CASES[name]
    return {
        "dataset_name": "Dataset999_Oracle",
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": [2.0, 1.0, 1.0],
        "original_median_shape_after_transp": [8, 24, 16],
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": transpose,
        "transpose_backward": [transpose.index(axis) for axis in range(3)],
        "configurations": {
            configuration: {
                "data_identifier": f"nnUNetPlans_{configuration}",
                "preprocessor_name": "DefaultPreprocessor",
                "batch_size": 2,
                "patch_size": patch,
                "median_image_size_in_voxels": [8.0, 24.0, 16.0][3 - len(patch) :],
                "spacing": [2.0, 1.0, 1.0][3 - len(patch) :],
                "normalization_schemes": ["CTNormalization", "ZScoreNormalization"],
                "use_mask_for_norm": [False, False],
                "resampling_fn_data": "resample_data_or_seg_to_shape",
                "resampling_fn_seg": "resample_data_or_seg_to_shape",
                "resampling_fn_data_kwargs": {"is_seg": False, **RESAMPLING},
                "resampling_fn_seg_kwargs": {"is_seg": True, **RESAMPLING, "order": 1},
                "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
                "resampling_fn_probabilities_kwargs": {"is_seg": False, **RESAMPLING, "order": 1},
                "batch_dice": False,
                **architecture,
            }
        },
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {
            str(channel): {
                "max": 900.0, "mean": 90.0, "median": 80.0, "min": -100.0, "percentile_00_5": -50.0,
                "percentile_99_5": 400.0, "std": 70.0,
            }
            for channel in range(2)
        },
    }  # fmt: skip


def network_of(plans: dict[str, Any], configuration: str) -> torch.nn.Module:
    manager = PlansManager(json.loads(json.dumps(plans))).get_configuration(configuration)
    name = manager.network_arch_class_name.rpartition(".")[2]
    return get_network_from_plans(
        f"dynamic_network_architectures.architectures.unet.{name}",
        manager.network_arch_init_kwargs,
        manager.network_arch_init_kwargs_req_import,
        input_channels=2,
        output_channels=3,
        deep_supervision=False,
    )


def make(name: str, folder: Path) -> None:
    configuration, patch, _, _ = CASES[name]
    plans, generator = plans_of(name), torch.Generator().manual_seed(7)
    network = network_of(plans, configuration).eval()
    with torch.no_grad():
        for weight in network.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.5)
        image = torch.randn(2, *patch, generator=generator)
        logits = network(image[None])[0]
    (folder / "fold_0").mkdir(parents=True, exist_ok=True)
    (folder / "plans.json").write_text(json.dumps(plans, indent=1) + "\n")
    (folder / "dataset.json").write_text(json.dumps(DATASET, indent=1) + "\n")
    np.savez_compressed(folder / "network_check.npz", image=image.numpy(), logits=logits.numpy())
    checkpoint = {
        "network_weights": network.state_dict(),
        "optimizer_state": None,
        "grad_scaler_state": None,
        "logging": {"mean_fg_dice": [np.float32(0.5)], "lrs": [0.01], "val_losses": [np.float64(-0.25)]},
        "_best_ema": np.float32(0.5),
        "current_epoch": 1,
        "init_args": {"configuration": configuration, "fold": 0, "device": torch.device("cpu")},
        "trainer_name": "nnUNetTrainer",
        "inference_allowed_mirroring_axes": tuple(range(len(patch))),
    }
    torch.save(checkpoint, folder / "fold_0" / "checkpoint_final.pth")


if __name__ == "__main__":
    for each in CASES:
        make(each, Path(sys.argv[1]) / each)
