"""A MONAI bundle as a volseg bundle: its network with its weights, its preprocessing and tiles as values of a plan."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import Tensor

from pipeline.bundle import BundleFacts, refuse_to_replace, save_bundle
from pipeline.errors import BundleError, RunError
from pipeline.interop.monai_config import MonaiConfig, read_metadata, read_monai_config
from pipeline.interop.monai_meaning import channels_of, schema_of_outputs
from pipeline.interop.monai_steps import Outputs, outputs_of, recipe_of
from pipeline.interop.monai_transforms import AFTER, BEFORE, transforms_of
from pipeline.interop.monai_way_back import way_back
from pipeline.models.monai_networks import bound_arguments, filled_monai, fixed_sides, side_divisors
from pipeline.models.monai_spec import MONAI_NETWORKS, MonaiNetwork
from pipeline.models.spec import UNetSpec
from pipeline.plan import InferenceConventions, Plan, Triple
from pipeline.provenance import provenance_tags
from transforms.recipe_spec import Respace, Step

NETWORK_KEYS = ("network_def", "network", "net")
INFERER_KEYS = ("inferer", "evaluator#inferer")
WEIGHTS = "models/model.pt"
WRAPPED = "$torch.nn.Sequential(@network_def, torch.nn.Softmax(dim=1)).to(@device)"
"""What `bundle export --to monai` writes of a model that blends probabilities."""

STATE_KEYS = ("state_dict", "model", "model_state_dict", "network")
"""Under which a checkpoint holds the weights beside other things."""

DIFFERENCE = "a difference from MONAI"
"""In the provenance, of which `import` and `info` tell every line."""

_INFERER_DEFAULTS: dict[str, Any] = {"overlap": 0.25, "mode": "constant", "sigma_scale": 0.125}
_INFERER_KNOWN = {"padding_mode": "constant", "cval": 0.0}
_INFERER_SPEED = {
    "sw_batch_size", "sw_device", "device", "progress", "cache_roi_weight_map", "cpu_thresh", "buffer_steps",
    "buffer_dim",
}  # fmt: skip
"""Arguments of the inferer that change no result."""


@dataclass(frozen=True)
class ImportChoices:
    """What a user says where the bundle's files do not, or not without code.

    overrides: `KEY=JSON` in place of the configuration's values. left_out: names of transforms that are passed over.
    nested: outputs that overlap by name, each inside the one before it.
    """

    overrides: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    nested: tuple[str, ...] = ()


def import_monai(folder: Path, out: Path, *, choices: ImportChoices | None = None, force: bool = False) -> Path:
    """Write the MONAI bundle `folder` as a volseg bundle to `out`, which is given back.

    Raises:
        BundleError: not a MONAI bundle, or one that says something that needs code or is not understood here.
        PlanError: the network cannot be built, or the weights are not its own.
        RunError: `out` exists and `force` was not given, or cannot be written.
    """
    said = choices or ImportChoices()
    if out.exists() and not force:
        raise RunError(f"{out} exists already; give --force to replace it, or another name")
    refuse_to_replace(out)
    if not folder.is_dir():
        raise BundleError(f"{folder}: no such folder; a MONAI bundle is a folder with configs/ and models/")
    config, metadata = read_monai_config(folder, said.overrides), read_metadata(folder)
    network, blend = network_of(config), _blend(config)
    left_out = frozenset(said.left_out)
    outputs = outputs_of(transforms_of(config, AFTER, left_out), config.source, left_out)
    schema, order = schema_of_outputs(metadata, outputs, said.nested)
    network = network.model_copy(update={"output_order": order})
    plan = _plan(config, metadata, network, left_out, outputs)
    back = way_back(outputs, plan.recipe or ())
    ways = plan.inference.model_copy(update={"blend": blend, "restores": back.restores})
    plan = plan.model_copy(update={"inference": ways})
    _check_counts(network, plan, schema.output_count, metadata)
    module = filled_monai(network, read_weights(weights_file(folder, config)))
    facts = BundleFacts(
        name=str(metadata.document.get("name") or folder.resolve().name),
        fold=None,
        mirror=False,
        tile_step=1.0 - _overlap(_inferer(config), config),
        plan=plan,
        schema=schema,
        config_yaml="# imported from a MONAI bundle: there is no config\n",
        provenance=_provenance(metadata, said) | ({DIFFERENCE: back.difference} if back.difference else {}),
    )
    # Some of MONAI's networks have a layer under two names, which no file of safetensors holds as one.
    save_bundle(out, {name: tensor.clone() for name, tensor in module.state_dict().items()}, facts)
    return out


def network_of(config: MonaiConfig) -> MonaiNetwork:
    """The network that a configuration names, if it is one of `MONAI_NETWORKS`.

    Raises:
        BundleError: none, another one, or arguments that need code.
    """
    key = next((k for k in NETWORK_KEYS if config.has(k) and isinstance(config.shallow(k), Mapping)), None)
    if key is None:
        raise BundleError(f"{config.source}: no network (looked for {', '.join(NETWORK_KEYS)} with a _target_)")
    target = str(config.shallow(key).get("_target_", ""))
    name = target.rpartition(".")[2]
    if name not in MONAI_NETWORKS or not (target == name or target.startswith("monai.networks.nets.")):
        raise BundleError(
            f"{config.source}: the network {target or 'without a _target_'} is not known, and code of a bundle is not "
            f"run; known are {', '.join(MONAI_NETWORKS)}"
        )
    given = config.value(key)
    arguments = {name: value for name, value in given.items() if not name.startswith("_")}
    try:
        return MonaiNetwork(name=name, arguments=arguments)
    except ValidationError as error:
        raise BundleError(f"{config.source}: {key}: {error.errors()[0]['msg']}") from error


def _blend(config: MonaiConfig) -> Literal["logits", "probabilities"]:
    """What tiles are averaged of: the network's outputs as they are, or the probabilities that they are made into.

    Raises:
        BundleError: what is called with the tiles is code that is not known.
    """
    said = config.shallow("network") if config.has("network_def") and config.has("network") else "@network_def"
    plain = re.sub(r"\s", "", said) if isinstance(said, str) else ""
    if re.fullmatch(r"\$?@network_def(\.to\(@device\))?(\.eval\(\))?", plain):
        return "logits"
    if plain == re.sub(r"\s", "", WRAPPED):
        return "probabilities"
    raise BundleError(
        f"{config.source}: network is code, '{str(said)[:60]}', which is not run; if it is the network of network_def "
        "as it is, give --set 'network=\"@network_def\"'"
    )


def weights_file(folder: Path, config: MonaiConfig) -> Path:
    """Where the weights are: what a checkpoint loader names, or models/model.pt.

    Raises:
        BundleError: there is no such file, or it lies outside of the bundle.
    """
    named = _checkpoint_path(config)
    path = folder / WEIGHTS
    if named is not None:
        root = str(config.value("bundle_root")) if config.has("bundle_root") else "."
        path = folder / named.removeprefix(root).lstrip("/")
    if not path.resolve().is_relative_to(folder.resolve()):
        raise BundleError(f"{config.source}: the weights are at '{named}', outside of the bundle; copy them into it")
    if not path.is_file():
        scripted = folder / "models/model.ts"
        rest = f"; {scripted.name} holds code, which is not run" if scripted.is_file() else ""
        raise BundleError(f"{folder}: the weights {path.relative_to(folder)} are not here; fetch them{rest}")
    return path


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint, read without running anything.

    Raises:
        BundleError: not a checkpoint, TorchScript, or one that holds more than plain values.
    """
    if path.suffix == ".ts" or _is_torchscript(path):
        raise BundleError(f"{path}: TorchScript, which is code; give the state dict that it was made from as model.pt")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what torch raises of a file that only claims to be one is not to be listed
        raise BundleError(
            f"{path}: no weights that can be read without running code ({type(error).__name__}); a state dict alone, "
            "names and tensors, can be"
        ) from error
    inner = next(
        (found[k] for k in STATE_KEYS if isinstance(found, Mapping) and isinstance(found.get(k), Mapping)), found
    )
    if not isinstance(inner, Mapping) or not all(isinstance(value, Tensor) for value in inner.values()) or not inner:
        raise BundleError(f"{path}: expected a state dict, names and tensors, found {type(inner).__name__}")
    # Training over several devices puts this before every name.
    return {str(name).removeprefix("module."): value for name, value in inner.items()}


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.rpartition("/")[2] == "constants.pkl" for name in archive.namelist())


def _checkpoint_path(config: MonaiConfig) -> str | None:
    places = [key for key in ("checkpointloader", "handlers", "evaluator#val_handlers") if config.has(key)]
    for key in places:
        found = config.shallow(key)
        for entry in found if isinstance(found, list) else [found]:
            if isinstance(entry, Mapping) and str(entry.get("_target_", "")).endswith("CheckpointLoader"):
                return str(config.resolve(entry.get("load_path"), f"{key}#load_path"))
    return None


def _inferer(config: MonaiConfig) -> dict[str, Any]:
    key = next((k for k in INFERER_KEYS if config.has(k) and isinstance(config.shallow(k), Mapping)), None)
    if key is None:
        raise BundleError(f"{config.source}: no inferer, which says how large a tile is")
    target = str(config.shallow(key).get("_target_", ""))
    if not target.endswith("SlidingWindowInferer"):
        raise BundleError(f"{config.source}: {key} is {target}, expected SlidingWindowInferer")
    plain = {k: v for k, v in config.shallow(key).items() if k not in _INFERER_SPEED and not k.startswith("_")}
    said: dict[str, Any] = {**_INFERER_DEFAULTS, **_INFERER_KNOWN, **config.resolve(plain, key)}
    for name in sorted(said.keys() - _INFERER_DEFAULTS.keys() - {"roi_size"}):
        if name not in _INFERER_KNOWN or said[name] != _INFERER_KNOWN[name]:
            known = name in _INFERER_KNOWN
            way = f"; --set '{key}#{name}={json.dumps(_INFERER_KNOWN[name])}' takes another" if known else ""
            raise BundleError(
                f"{config.source}: {key}#{name} {said[name]!r} is not understood{way}"
                f"{', which changes results at the borders' if known else ''}"
            )
    if said["mode"] not in ("constant", "gaussian") or said["sigma_scale"] != 0.125:
        raise BundleError(f"{config.source}: {key}: expected mode constant, or gaussian with a sigma_scale of 0.125")
    return said


def _overlap(inferer: Mapping[str, Any], config: MonaiConfig) -> float:
    overlap = inferer["overlap"]
    listed = overlap if isinstance(overlap, list) else [overlap]
    fit = [v for v in listed if isinstance(v, int | float) and not isinstance(v, bool) and 0 <= v < 1]
    if len(fit) != len(listed) or len(set(fit)) != 1:
        raise BundleError(
            f"{config.source}: the inferer's overlap is {overlap!r}, expected one number from 0 to below 1; give it as "
            "--set inferer#overlap=0.5"
        )
    return float(fit[0])


def _patch_shape(inferer: Mapping[str, Any], network: MonaiNetwork, config: MonaiConfig) -> Triple:
    sides = inferer.get("roi_size")
    numbers = [sides] * 3 if isinstance(sides, int) else sides
    if not isinstance(numbers, list) or len(numbers) != 3 or not all(isinstance(n, int) and n > 0 for n in numbers):
        raise BundleError(
            f"{config.source}: the inferer's roi_size is {sides!r}, expected three sides in voxels; give them as "
            "--set inferer#roi_size=[96,96,96]"
        )
    patch: Triple = (numbers[0], numbers[1], numbers[2])
    fixed = fixed_sides(network)
    if fixed is not None and fixed != patch:
        raise BundleError(f"{config.source}: network {network.name} was made for {fixed}, but roi_size is {patch}")
    return patch


def _plan(
    config: MonaiConfig, metadata: MonaiConfig, network: MonaiNetwork, left_out: frozenset[str], outputs: Outputs
) -> Plan:
    recipe = recipe_of(transforms_of(config, BEFORE, left_out), config.source, left_out)
    inferer = _inferer(config)
    channels = channels_of(metadata)
    values = bound_arguments(network)
    spacing = _spacing(recipe)
    patch = _patch_shape(inferer, network, config)
    count = int(values["out_channels"])
    return Plan(
        channels=channels,
        class_count=count if outputs.activation == "softmax" else count + 1,
        spacing_mm=spacing,
        patch_shape=patch,
        batch_size=1,
        network=f"monai {network.name}",
        unet=_spec(side_divisors(network), int(values["in_channels"]), count),
        slice_axis=None,
        mirror_axes=(),
        receptive_field_mm=(patch[0] * spacing[0], patch[1] * spacing[1], patch[2] * spacing[2]),
        largest_label_extent_mm=(0.0, 0.0, 0.0),
        memory_gb=0.0,
        patch_gflop=0.0,
        inference=InferenceConventions(
            weights="centred" if inferer["mode"] == "gaussian" else "even",
            tiles="stepped",
            padding="zero",
            longest_window=1.0,
        ),
        recipe=recipe,
        monai=network,
        reasons={"recipe": "as in the MONAI bundle"},
        warnings=(),
    )


def _spacing(recipe: Sequence[Step]) -> tuple[float, float, float]:
    """Of the last step that says one; 1 mm stands for the study's own, which no one knows beforehand."""
    found = [step for step in recipe if isinstance(step, Respace)]
    i, j, k = found[-1].spacing_mm if found else (None, None, None)
    return i or 1.0, j or 1.0, k or 1.0


def _spec(divisors: Triple, in_channels: int, out_channels: int) -> UNetSpec:
    """Channels and divisors of the network, as a spec of two resolutions: nothing else of it is true."""
    return UNetSpec(
        in_channels=in_channels,
        out_channels=out_channels,
        features=(1, 1),
        strides=((1, 1, 1), divisors),
        kernel_shapes=((1, 1, 1), (1, 1, 1)),
        encoder_blocks=(1, 1),
        decoder_blocks=(1,),
    )


def _check_counts(network: MonaiNetwork, plan: Plan, outputs: int, metadata: MonaiConfig) -> None:
    values = bound_arguments(network)
    for what, said, found in (
        ("inputs", len(plan.channels), values["in_channels"]),
        ("outputs", outputs, values["out_channels"]),
    ):
        if said != found:
            raise BundleError(
                f"{metadata.source}: {what} of {said} channels, but the network {network.name} has {found}; "
                f"complete network_data_format#{what}"
            )


def _provenance(metadata: MonaiConfig, said: ImportChoices) -> dict[str, Any]:
    document = metadata.document
    kept = {k: str(document[k]) for k in ("version", "monai_version", "copyright", "data_source") if k in document}
    chosen = {"set": list(said.overrides), "left out": list(said.left_out), "nested": list(said.nested)}
    return {
        **provenance_tags(),
        "imported from": "MONAI bundle",
        **{f"MONAI bundle {k.replace('_', ' ')}": v for k, v in kept.items()},
        **{f"imported with {k}": v for k, v in chosen.items() if v},
    }
