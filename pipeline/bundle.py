"""A trained model as a folder: weights (safetensors), plan, labels, config, provenance. Checked on loading."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn

from pipeline.errors import BundleError, RunError
from pipeline.files import atomic_folder, atomic_path, refuse_foreign, sha256_of_file, write_json, write_text
from pipeline.models.registry import build_network
from pipeline.models.slices import as_volume_network
from pipeline.plan import Plan
from pipeline.postprocessing import PostProcessing, first_fault, read_postprocessing
from transforms.labels import LabelSchema

INDEX = "bundle.json"
WEIGHTS, PLAN, LABELS, CONFIG = "weights.safetensors", "plan.json", "labels.json", "config.yaml"

FEWEST_CASES = 3
"""Held-out cases with dark windows that it takes to believe that such windows may be skipped."""

POSTPROCESSING = "postprocessing.json"
"""In a bundle whose cross-validation found one that helps; only where the index names it."""

INT8_NETWORK = "int8.onnx"
"""The network in eight bits, in a bundle of which `volseg bundle quantise` proved it; only where the index names it."""

INT8 = "int8"
"""In the provenance: what cases said of the network in eight bits."""


class Air(BaseModel):
    """How dark a window is that is skipped: all of it below `levels`, one a channel (`air.air_levels`).

    Of so many held-out `cases` that have such windows, `changed` had other labels without them; `cases` None: they have
    not been asked.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    levels: tuple[float, ...]
    cases: int | None = None
    windows: int = 0
    changed: int = 0

    @property
    def is_proven(self) -> bool:
        """Whether enough cases were asked, and no label changed."""
        return (self.cases or 0) >= FEWEST_CASES and not self.changed


class BundleIndex(BaseModel):
    """What `bundle.json` holds. `sha256` has one entry a file of the bundle."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["volseg-bundle-1"] = "volseg-bundle-1"
    name: str
    fold: int | None
    mirror: bool
    tile_step: float
    air: Air | None = None
    provenance: dict[str, Any]
    sha256: dict[str, str]


@dataclass(frozen=True)
class BundleFile:
    """A file of a bundle that is read when it is asked for."""

    path: Path
    sha256: str

    def read(self) -> bytes:
        """Its content.

        Raises:
            BundleError: it is missing, or not the one that was saved.
        """
        try:
            content = self.path.read_bytes()
        except FileNotFoundError as error:
            raise BundleError(_missing(self.path.parent, self.path.name)) from error
        except OSError as error:
            raise BundleError(f"{self.path}: cannot be read ({type(error).__name__})") from error
        if hashlib.sha256(content).hexdigest() != self.sha256:
            raise BundleError(_changed(self.path))
        return content


@dataclass(frozen=True, eq=False)
class ModelBundle:
    """A model that is ready to predict: `network` maps (B, C, I, J, K) to logits and is in evaluation mode.

    `digest` is that of the weights it has. `int8` is the same network in eight bits, where the bundle has it.
    """

    index: BundleIndex
    plan: Plan
    schema: LabelSchema
    network: nn.Module
    digest: str
    postprocessing: PostProcessing | None = None
    int8: BundleFile | None = None


@dataclass(frozen=True)
class BundleFacts:
    """What `save_bundle` writes beside the weights."""

    name: str
    fold: int | None
    mirror: bool
    tile_step: float
    plan: Plan
    schema: LabelSchema
    config_yaml: str
    provenance: dict[str, Any]


def save_bundle(folder: Path, weights: dict[str, Tensor], facts: BundleFacts) -> None:
    """Write a bundle as a whole, replacing an older one of the same place."""
    with atomic_folder(folder, force=True) as temporary:
        # In memory first: safetensors reports a full disk as an error of its own, a plain write as what it is.
        plain = {k: v.detach().cpu().contiguous() for k, v in weights.items()}
        (temporary / WEIGHTS).write_bytes(safetensors.torch.save(plain))
        write_text(temporary / PLAN, facts.plan.model_dump_json(indent=2) + "\n")
        write_text(temporary / LABELS, facts.schema.model_dump_json(indent=2) + "\n")
        write_text(temporary / CONFIG, facts.config_yaml)
        index = BundleIndex(
            name=facts.name,
            fold=facts.fold,
            mirror=facts.mirror,
            tile_step=facts.tile_step,
            provenance=facts.provenance,
            sha256={n: sha256_of_file(temporary / n) for n in (WEIGHTS, PLAN, LABELS, CONFIG)},
        )
        write_json(temporary / INDEX, index.model_dump(mode="json"))


def refuse_to_replace(out: Path) -> None:
    """Raise RunError where --force would take away what no import wrote: more than bundles, or one that was trained."""
    names = (INDEX, WEIGHTS, PLAN, LABELS, CONFIG, POSTPROCESSING, INT8_NETWORK)
    refuse_foreign(out, [*names, *(f"fold_*/bundle/{name}" for name in names)], "an imported model")
    for index in (out / INDEX, *sorted(out.glob(f"fold_*/bundle/{INDEX}"))):
        if index.is_file() and not any(key.startswith("imported") for key in _read_index(index.parent).provenance):
            raise RunError(f"{out}: holds a model that was trained, not to be replaced by an import; give another name")


def is_bundle(folder: Path) -> bool:
    """True when the folder says that it is one."""
    return (folder / INDEX).is_file()


def find_bundles(model: Path) -> list[Path]:
    """The bundles that a path stands for: itself, a run's, or those of all folds of a cross-validation.

    Raises:
        BundleError: there is none, with what was looked for.
    """
    if is_bundle(model):
        return [model]
    if is_bundle(model / "bundle"):
        return [model / "bundle"]
    folds = sorted(p.parent for p in model.glob(f"fold_*/bundle/{INDEX}"))
    if folds:
        return folds
    if not model.exists():
        raise BundleError(f"{model}: no such model; give a bundle or a run folder")
    raise BundleError(f"{model}: neither a model bundle nor a run folder with a finished training (no {INDEX} in it)")


def load_bundle(folder: Path, device: torch.device | None = None) -> ModelBundle:
    """Read and check a bundle; its network in eight bits is read and checked where it is asked for.

    Raises:
        BundleError: a file is missing, was changed, or does not fit the others.
    """
    index = _read_index(folder)
    optional = [POSTPROCESSING] if POSTPROCESSING in index.sha256 else []
    for name in (WEIGHTS, PLAN, LABELS, CONFIG, *optional):
        if not (folder / name).is_file():
            raise BundleError(_missing(folder, name))
        if sha256_of_file(folder / name) != index.sha256.get(name):
            raise BundleError(_changed(folder / name))
    try:
        plan = Plan.model_validate_json((folder / PLAN).read_bytes())
        schema = LabelSchema.model_validate_json((folder / LABELS).read_bytes())
    except ValidationError as error:
        raise BundleError(f"{folder}: {error.errors()[0]['msg']}; it was made by another version of volseg") from error
    cleaning = _read_postprocessing(folder, schema) if optional else None
    network = network_of(plan)
    _fill(network, folder)
    network = network.to(device or torch.device("cpu")).eval()
    int8 = BundleFile(folder / INT8_NETWORK, index.sha256[INT8_NETWORK]) if INT8_NETWORK in index.sha256 else None
    return ModelBundle(index, plan, schema, network, index.sha256[WEIGHTS], cleaning, int8)


def set_postprocessing(folder: Path, wanted: PostProcessing | None) -> None:
    """Have a bundle's results post-processed, or with None no more; the weights are left as they are.

    Whenever it is cut short the bundle can be read, with the post-processing or without.

    Raises:
        BundleError: it is no bundle, or its labels are others.
        RunError: it cannot be written.
    """
    index = _read_index(folder)
    if wanted is not None:
        try:
            wanted.check_labels(LabelSchema.model_validate_json((folder / LABELS).read_bytes()))
        except (OSError, ValueError) as error:
            raise BundleError(f"{folder}: {error}") from error
    without = _taken_out(folder, index, POSTPROCESSING)
    if wanted is None:
        (folder / POSTPROCESSING).unlink(missing_ok=True)
        return
    write_json(folder / POSTPROCESSING, wanted.model_dump(mode="json"))
    _put_in(folder, without, POSTPROCESSING)


def set_int8(folder: Path, content: bytes, reason: dict[str, Any], *, of: ModelBundle) -> None:
    """Have a network in eight bits (ONNX) in a bundle, and keep what was proven of it; the weights stay as they are.

    `of` is the bundle that it was made of. Whenever it is cut short the bundle can be read, with such a network or
    without.

    Raises:
        BundleError: it is no bundle, or no longer what it was made of.
        RunError: it cannot be written.
    """
    index = _read_index(folder)
    if (index.sha256.get(WEIGHTS), index.mirror, index.tile_step) != (of.digest, of.index.mirror, of.index.tile_step):
        raise BundleError(f"{folder}: was changed while its network was brought to eight bits; do it again")
    known = {key: value for key, value in index.provenance.items() if key != INT8}
    without = _taken_out(folder, index.model_copy(update={"provenance": known}), INT8_NETWORK)
    with atomic_path(folder / INT8_NETWORK) as temporary:
        temporary.write_bytes(content)
    _put_in(folder, without.model_copy(update={"provenance": {**known, INT8: reason}}), INT8_NETWORK)


def is_mirrored(folder: Path) -> bool:
    """Whether a bundle predicts with mirrored passes.

    Raises:
        BundleError: it is no bundle.
    """
    return _read_index(folder).mirror


def set_mirror(folder: Path, wanted: bool, reason: dict[str, Any]) -> None:
    """Have a bundle predict with mirrored passes or without, and keep what says why; the weights are left as they are.

    What was proven of the other way, of air and of eight bits, is proven no more.

    Raises:
        BundleError: it is no bundle.
        RunError: it cannot be written.
    """
    index = _read_index(folder)
    air, sha256, provenance = index.air, index.sha256, {**index.provenance, "mirroring": reason}
    if index.mirror != wanted:
        air = None if air is None else Air(levels=air.levels)
        sha256 = {name: digest for name, digest in sha256.items() if name != INT8_NETWORK}
        provenance.pop(INT8, None)
    changes = {"mirror": wanted, "air": air, "provenance": provenance}
    _write_index(folder, index.model_copy(update=changes), sha256)
    if INT8_NETWORK not in sha256:
        (folder / INT8_NETWORK).unlink(missing_ok=True)


def read_air(folder: Path) -> Air | None:
    """What a bundle knows of windows that may be skipped.

    Raises:
        BundleError: it is no bundle.
    """
    return _read_index(folder).air


def set_air(folder: Path, air: Air | None) -> None:
    """Tell a bundle which windows may be skipped, if that is proven.

    Raises:
        BundleError: it is no bundle.
        RunError: it cannot be written.
    """
    index = _read_index(folder)
    _write_index(folder, index.model_copy(update={"air": air}), index.sha256)


def network_of(plan: Plan) -> nn.Module:
    """The plan's network for volumes (B, C, I, J, K), with weights drawn from torch's global generator.

    Raises:
        PlanError: there is no such network, or it cannot be built.
    """
    if plan.monai is not None:
        from pipeline.models.monai_networks import build_monai

        return build_monai(plan.monai)
    return as_volume_network(build_network(plan.network, plan.unet, _network_shape(plan)), plan.slice_axis)


def _read_index(folder: Path) -> BundleIndex:
    try:
        return BundleIndex.model_validate(json.loads((folder / INDEX).read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise BundleError(f"{folder}: not a model bundle (no {INDEX} in it)") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BundleError(f"{folder / INDEX}: cannot be read ({type(error).__name__})") from error
    except ValidationError as error:
        raise BundleError(f"{folder / INDEX}: not a volseg model bundle: {first_fault(error)}") from error


def _missing(folder: Path, name: str) -> str:
    return f"{folder}: {name} is missing from the bundle; copy the whole folder again"


def _changed(path: Path) -> str:
    return f"{path}: not the file that was saved (its hash differs); copy it again"


def _taken_out(folder: Path, index: BundleIndex, name: str) -> BundleIndex:
    """The index without a file, also on the disk: before the file is touched, so that it never differs from it."""
    without = index.model_copy(update={"sha256": {n: digest for n, digest in index.sha256.items() if n != name}})
    if name in index.sha256:
        _write_index(folder, without, without.sha256)
    return without


def _put_in(folder: Path, index: BundleIndex, name: str) -> None:
    """Have the index name a file that is there now."""
    _write_index(folder, index, index.sha256 | {name: sha256_of_file(folder / name)})


def _write_index(folder: Path, index: BundleIndex, sha256: dict[str, str]) -> None:
    write_json(folder / INDEX, index.model_copy(update={"sha256": sha256}).model_dump(mode="json"))


def _read_postprocessing(folder: Path, schema: LabelSchema) -> PostProcessing:
    place = folder / POSTPROCESSING
    return read_postprocessing(place.read_bytes(), str(place), schema)


def _network_shape(plan: Plan) -> tuple[int, ...]:
    return tuple(n for axis, n in enumerate(plan.patch_shape) if axis != plan.slice_axis)


def _fill(network: nn.Module, folder: Path) -> None:
    try:
        weights = safetensors.torch.load_file(folder / WEIGHTS)
    except (OSError, safetensors.SafetensorError) as error:
        raise BundleError(f"{folder / WEIGHTS}: not a safetensors file; copy the bundle again") from error
    try:
        network.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise BundleError(f"{folder / WEIGHTS}: the weights are not those of the plan's network") from error
