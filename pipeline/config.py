"""The schema of configs/*.yaml. Every key has its meaning here; `reference()` prints them all.

A config says what the plan cannot derive. Sections are handed to the stages one by one, never the whole.
"""

from __future__ import annotations

import copy
import difflib
import os
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo

from pipeline.config_training import AugmentConfig as AugmentConfig
from pipeline.config_training import LossConfig as LossConfig
from pipeline.config_training import LossTerms as LossTerms
from pipeline.config_training import Section as Section
from pipeline.config_training import TrainConfig as TrainConfig
from pipeline.errors import ConfigError

ERRORS_SHOWN = 5
"""Faults of one config that are told at a time; the rest are counted."""

KNOWN_HERE = "; known here: "
"""Before the keys of a section, where an unknown one is near to none of them."""


Channels = Annotated[int, Field(ge=1)]
Distance = Annotated[float, Field(ge=0)]


class DataConfig(Section):
    """Where the cases are."""

    manifest: Path = Field(description="manifest, MSD dataset.json or nnU-Net raw folder; relative to this file")
    root: Path | None = Field(None, description="folder that the manifest's paths start from; default: its own root")
    cache: Path | None = Field(None, description="preprocessed cases; default: `cache` in the folder of the runs")


class FoldsConfig(Section):
    """How cases are split; a manifest that fixes folds itself wins over `count`."""

    count: int = Field(5, ge=2, description="number of folds")
    seed: int = Field(0, ge=0, description="seed of the split")


class PlanConfig(Section):
    """What the planner may spend, and what is fixed by hand (the rest is derived from the data)."""

    memory_gb: float | None = Field(None, gt=0, description="memory for a training step; default: by the device")
    patch_shape: tuple[int, int, int] | None = Field(None, description="patch in voxels (I, J, K)")
    spacing_mm: tuple[float, float, float] | None = Field(None, description="target spacing in mm (I, J, K)")
    batch_size: int | None = Field(None, ge=1, description="patches in a step")
    features: tuple[Channels, ...] | None = Field(
        None, min_length=1, description="channels of each resolution, finest first"
    )


class NetworkConfig(Section):
    """The network's choices; its sizes come from the plan."""

    name: str = Field("unet", description="builder in pipeline.models.registry")
    dimensions: Literal[2, 3] = Field(3, description="3, or 2 to train on slices along the coarsest axis")
    preset: Literal["resenc_m", "resenc_l", "resenc_xl"] | None = Field(
        None, description="residual encoder for about 8, 24 or 40 GB; null: as the keys below say"
    )
    block: Literal["plain", "residual"] = Field(
        "plain", description="block of every stage; a preset has residual ones down and plain ones up"
    )
    normalisation: Literal["instance", "batch", "group", "none"] = Field("instance", description="in every block")
    skip: Literal["concatenate", "attention"] = Field("concatenate", description="how skips join the decoder")
    upsampling: Literal["transposed", "interpolated"] = Field("transposed", description="how the decoder gets finer")
    bottleneck: Literal["convolution", "transformer"] = Field(
        "convolution", description="transformer: attention over the coarsest voxels, after their convolutions"
    )
    transformer_layers: int = Field(4, ge=1, description="of a transformer bottleneck")
    transformer_heads: int | None = Field(None, ge=1, description="of each layer; null: one for every 32 channels")
    positions: Literal["rotary", "learned"] = Field("rotary", description="how a transformer bottleneck tells places")
    drop_path: float = Field(
        0.0, ge=0, lt=1, description="of the deepest residual block or transformer layer; rises from 0 (0.1 is common)"
    )
    weight_standardisation: bool = Field(False, description="weights of the blocks' convolutions are standardised")
    deep_supervision: bool = Field(False, description="losses at coarser resolutions as well")
    checkpointing: Literal["auto", "on", "off"] = Field(
        "auto",
        description="gradient checkpointing: less memory, more time, the same result; auto: when memory asks",
    )

    @model_validator(mode="before")
    @classmethod
    def _preset_decides(cls, value: Any) -> Any:
        """Under a preset only what a file itself says can be plain: `make_plan` refuses that."""
        has_preset = isinstance(value, dict) and value.get("preset") is not None
        return {"block": "residual", **value} if has_preset else value

    @model_validator(mode="after")
    def _keys_say_something(self) -> NetworkConfig:
        residual = self.block == "residual" or self.preset is not None
        if self.drop_path and not residual and self.bottleneck == "convolution":
            raise ValueError(
                "drop_path needs block residual, a preset or bottleneck transformer: nothing can be dropped"
            )
        for key in ("transformer_layers", "transformer_heads", "positions"):
            default = type(self).model_fields[key].default
            if self.bottleneck == "convolution" and getattr(self, key) != default:
                raise ValueError(f"{key} needs bottleneck transformer")
        return self

    @field_validator("checkpointing", mode="before")
    @classmethod
    def _yaml_switch(cls, value: Any) -> Any:
        """YAML 1.1 reads a bare `on` and `off` as true and false."""
        return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


class PredictConfig(Section):
    """Sliding-window inference."""

    mirror: Literal["auto"] | bool = Field(
        "auto",
        description="average over mirrored passes along the axes used in training; auto: where held-out cases show "
        "that it is worth its time",
    )
    tile_step: float = Field(0.5, gt=0, le=1, description="distance of tiles, as part of the patch")


class EvaluateConfig(Section):
    """How results are summed up."""

    bootstrap_samples: int = Field(2000, ge=100, description="resamples of patients for the 95 % intervals")
    seed: int = Field(0, ge=0, description="seed of the resampling")
    tolerance_mm: float = Field(2.0, ge=0, description="tolerance of the surface Dice")
    tolerances_mm: dict[str, Distance] | None = Field(None, description="the same of single labels, by name")
    lesions: tuple[str, ...] = Field((), description="labels to count lesion by lesion even if most cases have one")


class TrackingConfig(Section):
    """MLflow."""

    enabled: bool = Field(True, description="track runs at all")
    uri: str | None = Field(None, description="MLflow server or store; default: mlflow.db in the folder of the runs")
    experiment: str | None = Field(None, description="experiment's name; default: the config's name")


class Config(Section):
    """One recipe."""

    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9._-]+$", description="names the runs")
    runs: Path = Field(Path("runs"), description="folder of the runs; relative to where volseg is started")
    data: DataConfig
    folds: FoldsConfig = FoldsConfig()
    plan: PlanConfig = PlanConfig()
    network: NetworkConfig = NetworkConfig()
    train: TrainConfig = TrainConfig()
    loss: LossConfig = LossConfig()
    augment: AugmentConfig = AugmentConfig()
    predict: PredictConfig = PredictConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="before")
    @classmethod
    def _null_sections(cls, value: Any) -> Any:
        """`train:` with nothing below it means all defaults."""
        return {k: ({} if v is None else v) for k, v in value.items()} if isinstance(value, dict) else value

    @property
    def experiment(self) -> str:
        """MLflow experiment."""
        return self.tracking.experiment or self.name

    @property
    def cache_folder(self) -> Path:
        """Folder of preprocessed cases."""
        return self.data.cache or self.runs / "cache"


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML config and apply `section.key=value` overrides (values are YAML).

    `loss.terms.NAME=...` adds to the terms that the file says, or else the default ones; `loss.terms={...}` replaces.

    `data.manifest`, `data.root` and `data.cache` in the file are relative to the file, those in overrides to the
    working directory.

    Raises:
        ConfigError: unreadable, not YAML, an unknown key (the nearest is named) or a value that does not fit.
    """
    try:
        text = path.read_text(encoding="utf-8")
        document = yaml.safe_load(text)
        _refuse_repeated_keys(yaml.compose(text, Loader=yaml.SafeLoader))
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such config file; see configs/ for examples") from error
    except IsADirectoryError as error:
        raise ConfigError(f"{path}: a folder; a config is a YAML file as in configs/") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({type(error).__name__})") from error
    except (UnicodeDecodeError, yaml.reader.ReaderError) as error:
        raise ConfigError(f"{path}: is not a config (YAML) but a binary file; see configs/ for examples") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {_one_line(error)}") from error
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error
    if not isinstance(document, dict):
        found = "nothing" if document is None else type(document).__name__
        raise ConfigError(f"{path}: a config is a mapping of sections, found {found}")
    if MANIFEST_KEYS & document.keys() and "data" not in document:
        raise ConfigError(f"{path}: this is a manifest, expected a config; a config names it: data.manifest: {path}")
    _anchor_paths(document, path.parent)
    alone = copy.deepcopy(document)
    for override in overrides:
        _apply(document, override)
    _anchor_paths(document, Path())
    return parse_config(document, source="--set" if overrides and _is_config(alone) else str(path))


def _is_config(document: dict[str, Any]) -> bool:
    """True when nothing is wrong with it, so that what is wrong with the whole came from the command line."""
    try:
        Config.model_validate(document)
    except ValidationError:
        return False
    return True


def parse_config(document: dict[str, Any], *, source: str) -> Config:
    """Check a mapping against the schema; `source` names it in errors.

    Raises:
        ConfigError: an unknown key (the nearest is named) or a value that does not fit.
    """
    try:
        return Config.model_validate(document)
    except ValidationError as error:
        raise ConfigError(f"{source}: {_explain(error)}") from error


def config_to_yaml(config: Config, folder: Path) -> str:
    """The resolved config, every key written out, for a file in `folder`; `load_config` there reads it back the same.

    Paths of `data` are written relative to `folder`, so that a file says nothing of whose machine it was made on.
    """
    document = config.model_dump(mode="json")
    for key in DATA_PATHS:
        if document["data"][key] is not None:
            document["data"][key] = Path(os.path.relpath(document["data"][key], folder)).as_posix()
    return yaml.safe_dump(document, sort_keys=False, allow_unicode=True)


def flatten(config: Config) -> dict[str, str]:
    """`section.key` to value as text, for trackers."""
    return {key: str(value) for key, _, value in _leaves(config)}


def reference() -> str:
    """Every key with its type, default and meaning, as a Markdown table."""
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for key, field in _fields(Config):
        default = "required" if field.is_required() else f"`{_plain(field.default)}`"
        kind = _type_name(field.annotation).replace("|", "\\|")
        lines.append(f"| `{key}` | {kind} | {default} | {field.description} |")
    return "\n".join(lines) + "\n"


DATA_PATHS = ("manifest", "root", "cache")

MANIFEST_KEYS = {"cases", "channels", "channel_names", "modality", "training"}
"""What a manifest, or the dataset.json of MSD or nnU-Net, says at its top, and a config never does."""

MOVED = {"train.loss": "loss.terms"}
"""Keys that something else does now."""


def _fields(model: type[Section], prefix: str = "", default: Any = None) -> Iterator[tuple[str, FieldInfo]]:
    """The keys with their fields; `default` is the section's value where the one above gives it another."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from _fields(field.annotation, f"{prefix}{name}.", field.default)
        elif isinstance(default, Section):
            yield prefix + name, FieldInfo.merge_field_infos(field, default=getattr(default, name))
        else:
            yield prefix + name, field


def _leaves(section: Section, prefix: str = "") -> Iterator[tuple[str, FieldInfo, Any]]:
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, Section):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, field, value


def _type_name(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " | ".join(str(a) for a in arguments)
    if origin in (Union, types.UnionType):
        return " | ".join(_type_name(a) for a in arguments if a is not type(None))
    if origin is Annotated:
        return _type_name(arguments[0])
    if origin is tuple:
        count = "any number of" if Ellipsis in arguments else str(len(arguments))
        return f"{count} {_type_name(arguments[0])}"
    return {"str": "text", "Path": "path", "dict": "values by name"}.get(annotation.__name__, str(annotation.__name__))


def _plain(value: Any) -> str:
    if isinstance(value, tuple):
        return str(list(value))
    return {None: "null", True: "true", False: "false"}[value] if isinstance(value, bool | None) else str(value)


def _anchor_paths(document: dict[str, Any], folder: Path) -> None:
    data = document.get("data")
    if isinstance(data, dict):
        for key in DATA_PATHS:
            if isinstance(data.get(key), str):
                data[key] = str(folder / Path(data[key]).expanduser())


def _apply(document: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"--set {override}: expected section.key=value")
    *sections, last = key.strip().split(".")
    target, section = document, Config.model_fields
    for name in sections:
        default = section[name].default if name in section else None
        section = type(default).model_fields if isinstance(default, Section) else {}
        if target.get(name) is None:
            # What a section says of one below it, such as the terms of a loss, is there to be added to.
            target[name] = default.model_dump(exclude_defaults=True) if isinstance(default, Section) else {}
        below = target[name]
        if not isinstance(below, dict):
            raise ConfigError(f"--set {override}: '{name}' is not a section")
        target = below
    try:
        target[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: the value is not valid YAML: {_one_line(error)}") from error


def _explain(error: ValidationError) -> str:
    told = dict.fromkeys(_explain_one(e["loc"], e["type"], e["msg"], e.get("input")) for e in error.errors())
    more = len(told) - ERRORS_SHOWN
    return "; ".join(_with_each_list_once(list(told)[:ERRORS_SHOWN])) + (f"; and {more} more" if more > 0 else "")


def _with_each_list_once(lines: Sequence[str]) -> Iterator[str]:
    """Several unknown keys of one section have the same known ones beside them."""
    said = set()
    for line in lines:
        fault, _, known = line.partition(KNOWN_HERE)
        yield fault if known in said else line
        said.add(known)


def _explain_one(location: tuple[int | str, ...], kind: str, message: str, found: Any) -> str:
    key = ".".join(str(part) for part in location)
    if kind == "extra_forbidden":
        return f"unknown key '{key}'{_nearest(key)}"
    if kind == "missing" and isinstance(location[-1], int):
        kinds = {name: _type_name(field.annotation) for name, field in _fields(Config)}
        key = key.rpartition(".")[0]
        return f"{key}: expected {kinds.get(key, 'more values')}, found {found!r}"
    if kind == "missing":
        return f"the key '{key}' is missing"
    if kind == "model_type":
        return f"{key}: a section holds keys with values, found {found!r}"
    either = _either(".".join(str(part) for part in location[:2]))
    if either is not None:
        return f"{'.'.join(map(str, location[:2]))}: expected {either}"
    text = message.removeprefix("Value error, ").removeprefix("Input ")
    return f"{key}: {text[0].lower()}{text[1:]}, found {found!r}"


def _either(key: str) -> str | None:
    """The type of a key that may be one of several kinds, for which pydantic has one complaint each."""
    kinds = {name: _type_name(field.annotation) for name, field in _fields(Config) if _is_mixed(field.annotation)}
    return kinds.get(key)


def _is_mixed(annotation: Any) -> bool:
    is_union = get_origin(annotation) in (Union, types.UnionType)
    return is_union and len([a for a in get_args(annotation) if a is not type(None)]) > 1


def _nearest(key: str) -> str:
    if key in MOVED:
        return f"; did you mean {MOVED[key]!r}?"
    known = [name for name, _ in _fields(Config)]
    known += sorted({name.rpartition(".")[0] for name in known if "." in name})
    elsewhere = [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]]
    near = elsewhere or difflib.get_close_matches(key, known, n=2, cutoff=0.8)
    if near:
        return f"; did you mean {' or '.join(repr(name) for name in near)}?"
    section = key.rpartition(".")[0]
    return f"{KNOWN_HERE}{', '.join(name for name in known if name.rpartition('.')[0] == section)}"


def _refuse_repeated_keys(node: yaml.Node | None) -> None:
    """YAML lets the last of two equal keys win, silently."""
    if not isinstance(node, yaml.MappingNode):
        return
    keys = [key.value for key, _ in node.value]
    repeated = next((key for key in keys if keys.count(key) > 1), None)
    if repeated is not None:
        raise ValueError(f"the key '{repeated}' stands twice in one section; keep one")
    for _, value in node.value:
        _refuse_repeated_keys(value)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
