"""nnU-Net's networks said as our U-Net: the architecture as a spec, and the weights key by key, both ways.

Sources: PlainConvUNet, ResidualEncoderUNet and ResidualUNet of MIC-DKFZ/dynamic-network-architectures 0.4; how plans
name them: nnunetv2/utilities/plans_handling/plans_handler.py and get_network_from_plans.py of MIC-DKFZ/nnUNet.

nnU-Net's arrays are k, j, i and then transposed as its plans say; ours are i, j, k. It is the weights that are turned,
once, and no volume ever is: `axes[a]` is the axis of nnU-Net's network that our axis a is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import Tensor

from pipeline.errors import BundleError
from pipeline.models.spec import UNetSpec

Kind = Literal["plain", "residual"]
BLOCKS: dict[str, tuple[Kind, Kind]] = {
    "PlainConvUNet": ("plain", "plain"),
    "ResidualEncoderUNet": ("residual", "plain"),
    "ResidualUNet": ("residual", "residual"),
}
"""Of the encoder and of the decoder, by the name of the class."""

BATCH_STATISTICS = ".running_mean"
_COPIES = ("decoder.encoder.", ".all_modules.")
"""Parts of names under which nnU-Net's modules hold the same weights a second time."""
_INDIFFERENT = {"deep_supervision", "dropout_op", "dropout_op_kwargs", "n_stages", "conv_op", "nonlin", "norm_op"}
_ABSENT: dict[str, Any] = {
    "nonlin_first": (False, None),
    "block": (None, "dynamic_network_architectures.building_blocks.residual.BasicBlockD"),
    "bottleneck_channels": (None,),
}
"""Arguments that are only understood at these values."""


def architecture(configuration: Mapping[str, Any], source: str) -> tuple[str, dict[str, Any]]:
    """The class and the arguments of a configuration's network, also from plans of before nnU-Net 2.4.

    Raises:
        BundleError: it is none of ours, named with `source`, the file that it stands in.
    """
    if "architecture" in configuration:
        entry = configuration["architecture"]
        if not isinstance(entry, dict) or not isinstance(entry.get("arch_kwargs"), dict):
            raise BundleError(f"{source}: architecture: no table of network_class_name and arch_kwargs in it")
        name, arguments = str(entry.get("network_class_name")).rpartition(".")[2], dict(entry["arch_kwargs"])
    elif "UNet_class_name" in configuration:
        name = str(configuration["UNet_class_name"])
        try:
            arguments = _arguments_of_old_plans(configuration)
        except (KeyError, TypeError) as error:
            raise BundleError(f"{source}: the network of these older plans cannot be read ({error})") from error
    else:
        raise BundleError(f"{source}: the configuration says no architecture; expected one as nnU-Net v2 plans it")
    if name not in BLOCKS:
        raise BundleError(f"{source}: network '{name}' cannot be imported; expected one of {', '.join(BLOCKS)}")
    return name, arguments


def spec_of_nnunet(
    name: str, arguments: Mapping[str, Any], *, channels: tuple[int, int], source: str, batch_normalised: bool = False
) -> UNetSpec:
    """Our spec, on nnU-Net's own axes, of its network `name` with `arguments` and `channels` in and out.

    Deep supervision is on, since nnU-Net keeps the heads of all resolutions; a prediction uses the finest alone.
    `batch_normalised`: the trainer put batch normalisation in, whatever the plans say (nnUNetTrainerBN).

    Raises:
        BundleError: an argument is missing, or asks for what our U-Net has not; it is named with `source`.
    """
    try:
        _refuse_unknown(arguments, source)
        return _spec(name, arguments, channels, batch_normalised, source)
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
    except KeyError as error:
        reason = f"arch_kwargs.{error.args[0]} is missing"
    except (AttributeError, TypeError, ValueError, ArithmeticError) as error:
        reason = f"arch_kwargs are not as nnU-Net writes them ({error})"
    raise BundleError(f"{source}: network '{name}' cannot be imported: {reason}")


def _spec(
    name: str, arguments: Mapping[str, Any], channels: tuple[int, int], batch_normalised: bool, source: str
) -> UNetSpec:
    encoder, decoder = BLOCKS[name]
    stages, dimensions = int(arguments["n_stages"]), _dimensions(str(arguments["conv_op"]), source)
    features = _per_stage(arguments["features_per_stage"], stages)
    stem = (arguments.get("stem_channels") or features[0]) if encoder == "residual" else 0
    blocks = arguments["n_conv_per_stage" if encoder == "plain" else "n_blocks_per_stage"]
    coarse_first = _per_stage(arguments["n_conv_per_stage_decoder"], stages - 1)
    return UNetSpec(
        dimensions=dimensions,
        in_channels=channels[0],
        out_channels=channels[1],
        features=features,
        strides=_rows(arguments["strides"], stages, dimensions),
        kernel_shapes=_rows(arguments["kernel_sizes"], stages, dimensions),
        encoder_blocks=_per_stage(blocks, stages),
        decoder_blocks=coarse_first[::-1],
        block=encoder,
        decoder_block=decoder,
        stem_channels=stem,
        biased_convolutions=bool(arguments.get("conv_bias", False)),
        deep_supervision=True,
        **_normalisation(arguments, source, batch_normalised),
        **_activation(arguments, source),
    )


def turned(spec: UNetSpec, axes: tuple[int, ...]) -> UNetSpec:
    """`spec` whose axis a does what `axes[a]` did."""
    rows = {
        name: tuple(tuple(row[axis] for axis in axes) for row in getattr(spec, name))
        for name in ("strides", "kernel_shapes")
    }
    return spec.model_copy(update=rows)


def weights_from_nnunet(
    theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor], spec: UNetSpec, *, axes: tuple[int, ...], source: str
) -> dict[str, Tensor]:
    """Weights for our network, whose state is `ours`, from nnU-Net's.

    What nnU-Net can leave out without a change (biases, scales and shifts of normalisations) is filled in.

    Raises:
        BundleError: weights are missing, have another shape, or are left over; the first is named.
    """
    modules = dict(layer_names(spec))
    left = {name for name in theirs if not any(copy in name for copy in _COPIES)}
    weights = {}
    for name, expected in ours.items():
        module, _, value = name.rpartition(".")
        theirs_name = f"{modules[module]}.{value}"
        left.discard(theirs_name)
        found = theirs.get(theirs_name)
        if found is None:
            if not _may_lack(theirs_name, theirs, spec):
                raise BundleError(
                    f"{source}: {theirs_name} is missing; the checkpoint is of another network than planned"
                )
            found = torch.ones_like(expected) if value == "weight" else torch.zeros_like(expected)
        elif found.ndim > 2:
            found = found.permute(0, 1, *(2 + axis for axis in axes))
        if found.shape != expected.shape:
            raise BundleError(
                f"{source}: {theirs_name} has the shape {tuple(found.shape)}, expected {tuple(expected.shape)} of the "
                "network in the plans; they are of another training"
            )
        weights[name] = found.contiguous()
    if left:
        raise BundleError(
            f"{source}: {min(left)} has no place in the network of the plans; they are of another network"
        )
    return weights


def layer_names(spec: UNetSpec) -> Iterator[tuple[str, str]]:
    """Our name and nnU-Net's of every layer with weights."""
    if spec.stem_channels:
        yield from _plain_names("encoder.0.stem", "encoder.stem.convs.0")
    channels = spec.stem_channels or spec.in_channels
    for stage in range(spec.stages):
        theirs = f"encoder.stages.{stage}" + (".0.convs" if spec.block == "plain" else ".blocks")
        strided = math.prod(spec.strides[stage]) > 1
        for block in range(spec.encoder_blocks[stage]):
            names = f"encoder.{stage}.blocks.{block}", f"{theirs}.{block}"
            if spec.block == "plain":
                yield from _plain_names(*names)
            else:
                yield from _residual_names(*names, strided and not block, channels != spec.features[stage])
            channels = spec.features[stage]
    yield from _decoder_names(spec)


def _decoder_names(spec: UNetSpec) -> Iterator[tuple[str, str]]:
    for stage in range(spec.stages - 1):
        number = spec.stages - 2 - stage  # nnU-Net counts them from the coarsest
        yield f"decoder.{stage}.upsampling", f"decoder.transpconvs.{number}"
        yield f"heads.{stage}", f"decoder.seg_layers.{number}"
        kind = "convs" if spec.block_of_decoder == "plain" else "blocks"
        for block in range(spec.decoder_blocks[stage]):
            names = f"decoder.{stage}.blocks.{block}", f"decoder.stages.{number}.{kind}.{block}"
            if spec.block_of_decoder == "plain":
                yield from _plain_names(*names)
            else:
                yield from _residual_names(*names, False, block == 0)


def _plain_names(ours: str, theirs: str) -> Iterator[tuple[str, str]]:
    yield f"{ours}.convolution", f"{theirs}.conv"
    yield f"{ours}.normalisation", f"{theirs}.norm"


def _residual_names(ours: str, theirs: str, strided: bool, projected: bool) -> Iterator[tuple[str, str]]:
    yield from _plain_names(f"{ours}.first", f"{theirs}.conv1")
    yield from _plain_names(f"{ours}.second", f"{theirs}.conv2")
    if projected:  # behind the pooling of a stride
        yield f"{ours}.shortcut.{int(strided)}", f"{theirs}.skip.{int(strided)}.conv"
        yield f"{ours}.shortcut.{int(strided) + 1}", f"{theirs}.skip.{int(strided)}.norm"


def _may_lack(name: str, theirs: Mapping[str, Tensor], spec: UNetSpec) -> bool:
    """Normalisations may have no scale and shift, all of them; convolutions no bias where the plans say so."""
    layer, _, value = name.rpartition(".")
    if layer.endswith(".norm"):
        return value in {"weight", "bias"} and not any(other.endswith(".norm.weight") for other in theirs)
    unbiased = not spec.biased_convolutions or ".skip." in layer
    return value == "bias" and unbiased and not layer.startswith("decoder.seg_layers")


def _arguments_of_old_plans(configuration: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments from the keys that plans had before nnU-Net 2.4; what they did not say was fixed."""
    stages, dimensions = len(configuration["n_conv_per_stage_encoder"]), len(configuration["patch_size"])
    base, most = configuration["UNet_base_num_features"], configuration["unet_max_num_features"]
    is_plain = configuration["UNet_class_name"] == "PlainConvUNet"
    return {
        "n_stages": stages,
        "features_per_stage": [min(base * 2**stage, most) for stage in range(stages)],
        "conv_op": f"torch.nn.modules.conv.Conv{dimensions}d",
        "kernel_sizes": configuration["conv_kernel_sizes"],
        "strides": configuration["pool_op_kernel_sizes"],
        "n_conv_per_stage" if is_plain else "n_blocks_per_stage": configuration["n_conv_per_stage_encoder"],
        "n_conv_per_stage_decoder": configuration["n_conv_per_stage_decoder"],
        "conv_bias": True,
        "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dimensions}d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "nonlin": "torch.nn.LeakyReLU",
    }


def _refuse_unknown(arguments: Mapping[str, Any], source: str) -> None:
    """Dropout and deep supervision do nothing in a prediction; what else is not known would."""
    said = {
        "features_per_stage", "kernel_sizes", "strides", "n_conv_per_stage", "n_blocks_per_stage", "conv_bias",
        "n_conv_per_stage_decoder", "norm_op_kwargs", "nonlin_kwargs", "stem_channels",
    }  # fmt: skip
    for key, value in arguments.items():
        if key in said or key in _INDIFFERENT or value in _ABSENT.get(key, ()):
            continue
        raise BundleError(f"{source}: arch_kwargs.{key}: {value!r} cannot be imported; our U-Net has no such choice")


def _dimensions(operator: str, source: str) -> Literal[2, 3]:
    name = operator.rpartition(".")[2]
    if name == "Conv2d":
        return 2
    if name == "Conv3d":
        return 3
    raise BundleError(f"{source}: arch_kwargs.conv_op: found '{operator}', expected Conv2d or Conv3d")


def _normalisation(arguments: Mapping[str, Any], source: str, batch_normalised: bool) -> dict[str, Any]:
    name = str(arguments.get("norm_op")).rpartition(".")[2].rstrip("d").rstrip("23")
    names = {"InstanceNorm": "instance", "BatchNorm": "batch", "None": "none"}
    if name not in names:
        raise BundleError(f"{source}: arch_kwargs.norm_op: '{arguments['norm_op']}' cannot be imported")
    options = arguments.get("norm_op_kwargs") or {}
    if unknown := sorted(options.keys() - {"eps", "affine", "momentum"}):
        raise BundleError(f"{source}: arch_kwargs.norm_op_kwargs.{unknown[0]} cannot be imported")
    kind = "batch" if batch_normalised else names[name]
    return {"normalisation": kind, "normalisation_epsilon": _finite(options.get("eps", 1e-5))}


def _activation(arguments: Mapping[str, Any], source: str) -> dict[str, Any]:
    name = str(arguments.get("nonlin")).rpartition(".")[2]
    names = {"LeakyReLU": "leaky_relu", "ReLU": "relu"}
    if name not in names:
        raise BundleError(
            f"{source}: arch_kwargs.nonlin: found '{arguments.get('nonlin')}', expected LeakyReLU or ReLU"
        )
    options = arguments.get("nonlin_kwargs") or {}
    return {"activation": names[name], "leaky_slope": _finite(options.get("negative_slope", 0.01))}


def _finite(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"found {value}, expected a finite number")
    return number


def _per_stage(value: Any, stages: int) -> tuple[int, ...]:
    return (int(value),) * stages if isinstance(value, int) else tuple(int(v) for v in value)


def _rows(value: Any, stages: int, dimensions: int) -> tuple[tuple[int, ...], ...]:
    rows = [value] * stages if isinstance(value, int) else value
    return tuple(_per_stage(row, dimensions) for row in rows)
