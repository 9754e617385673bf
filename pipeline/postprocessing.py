"""Post-processing as a value: what is done to which labels beside the network, and what a choice of it found.

It is chosen by `cleaning_choice` and kept in the bundle. Label maps are cleaned by `cleaning`; thresholds are heeded
where scores become labels (`thresholds`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline.errors import BundleError
from pipeline.files import sha256_of_json
from transforms.labels import LabelSchema

Kind = Literal["threshold", "largest", "islands", "holes"]

VOXEL_BYTES = 10
"""For each voxel of a label map, what it takes beside it: a copy, a mask, numbers of components (measured: 9)."""

LIBRARY_BYTES = 45_000_000
"""What the process grows by in its first post-processing."""

_VALUE = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Action(BaseModel):
    """One thing that is done to the voxels of `labels`, taken together as one structure; `name` is what people call it.

    "threshold": the label, or the region of that name, is taken from `threshold` on, and no longer from a half on (see
    `thresholds.decision_of`). "largest": all but the largest component is removed; "islands": every component below
    `below_mm3`, the last one included; "holes": background that the structure alone borders on, over faces, becomes
    `becomes`, or the label where there is only one. Components hang together over faces, edges or corners (26
    neighbours), holes over faces (6).
    What is removed becomes `becomes`; without it the label that alone borders on the removed part over faces, or else
    background.
    """

    model_config = _VALUE

    kind: Kind
    name: str = Field(min_length=1)
    labels: tuple[str, ...] = Field(min_length=1)
    below_mm3: float | None = Field(None, gt=0)
    becomes: str | None = None
    threshold: float | None = Field(None, gt=0, lt=1)

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if (self.kind == "islands") != (self.below_mm3 is not None):
            raise ValueError(f"{self.name}: `below_mm3` belongs to islands, and only there")
        if (self.kind == "threshold") != (self.threshold is not None):
            raise ValueError(f"{self.name}: `threshold` belongs to a threshold, and only there")
        if self.kind == "threshold" and self.becomes is not None:
            raise ValueError(f"{self.name}: what a threshold leaves out becomes the likeliest other label")
        if len(set(self.labels)) < len(self.labels):
            raise ValueError(f"{self.name}: a label stands twice")
        if self.kind == "holes" and (self.becomes or (self.labels[0] if len(self.labels) == 1 else None)) not in (
            self.labels
        ):
            raise ValueError(f"{self.name}: holes are filled with one of its labels; name it in `becomes`")
        if self.removes and self.becomes in self.labels:
            raise ValueError(f"{self.name}: what is removed cannot become '{self.becomes}', of which it is a part")
        return self

    @property
    def removes(self) -> bool:
        """Whether it takes components away."""
        return self.kind in ("largest", "islands")

    @property
    def words(self) -> str:
        """What it does, for people."""
        then = f", they become {self.becomes}" if self.becomes and self.removes else ""
        what = {
            "largest": "keep the largest component",
            "islands": f"remove islands under {self.below_mm3 or 0:g} mm3{then}",
            "holes": "fill holes",
            "threshold": f"taken from a probability of {self.threshold or 0:g} on",
        }
        return f"{self.name}: {what[self.kind]}"


class PostProcessing(BaseModel):
    """Actions whose order says nothing: larger structures are cleaned before their parts, and holes filled last, all
    in labels that thresholds have decided already.

    Of any two structures one holds the other, or they share no label. Doing it twice is doing it once, unless islands
    are removed both of a structure and of a part of it.
    """

    model_config = _VALUE

    format: Literal["volseg-postprocessing-1"] = "volseg-postprocessing-1"
    actions: tuple[Action, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        done: set[tuple[str, frozenset[str]]] = set()
        for action in self.actions:
            kind = "removal" if action.removes else "filling" if action.kind == "holes" else "threshold"
            if (what := (kind, frozenset(action.labels))) in done:
                raise ValueError(f"'{action.words}' stands beside another {kind} of the same labels")
            done.add(what)
        groups = {frozenset(action.labels): action.name for action in self.cleaning}
        many = {group: name for group, name in groups.items() if len(group) > 1}
        for group, name in many.items():
            for other, other_name in groups.items():
                if group & other and not (group <= other or other <= group):
                    raise ValueError(f"{name} and {other_name} share labels, and neither holds the other")
        cleaned = [action for action in self.actions if action.removes]
        for one in cleaned:
            for another in cleaned:
                if one.becomes in another.labels and not set(one.labels) <= set(another.labels):
                    raise ValueError(f"{one.name} becomes {one.becomes}, which is cleaned itself")
        return self

    @property
    def cleaning(self) -> tuple[Action, ...]:
        """What is done to a finished label map."""
        return tuple(action for action in self.actions if action.threshold is None)

    @property
    def thresholds(self) -> dict[str, float]:
        """By the name of a label or region, those that are not a half."""
        return {action.name: action.threshold for action in self.actions if action.threshold is not None}

    @property
    def digest(self) -> str:
        """The same for the same actions, in whatever order they stand."""
        rows = [action.model_dump(mode="json", exclude={"name"}) for action in self.actions]
        return sha256_of_json(sorted(rows, key=str))

    @property
    def words(self) -> tuple[str, ...]:
        """What is done, a line each."""
        return tuple(action.words for action in self.actions)

    def check_labels(self, schema: LabelSchema) -> None:
        """Refuse labels that the schema does not know, and thresholds of what is no output of a network.

        Raises:
            ValueError: as said.
        """
        named = [name for action in self.actions for name in (*action.labels, action.becomes) if name is not None]
        if unknown := sorted(set(named) - set(schema.names)):
            raise ValueError(f"post-processing of {', '.join(unknown)}, which is no label of the model")
        outputs = {name: set(labels) for name, labels in outputs_of(schema)}
        for action in self.actions:
            if action.kind == "threshold" and outputs.get(action.name) != set(action.labels):
                raise ValueError(f"a threshold of {action.name}; the model's outputs are {', '.join(outputs)}")


def outputs_of(schema: LabelSchema) -> list[tuple[str, tuple[str, ...]]]:
    """What the outputs of a network are of, background left out: regions where there are any, else labels; with the
    labels that each holds."""
    if schema.regions:
        return [(region.name, region.labels) for region in schema.regions]
    return [(name, (name,)) for name in schema.names]


def read_postprocessing(text: bytes, place: str, schema: LabelSchema) -> PostProcessing:
    """What the file at `place` says.

    Raises:
        BundleError: it is not a post-processing of these labels.
    """
    try:
        found = PostProcessing.model_validate_json(text)
        found.check_labels(schema)
    except ValidationError as error:
        raise BundleError(f"{place}: not a post-processing of volseg: {first_fault(error)}") from error
    except ValueError as error:
        raise BundleError(f"{place}: {error}") from error
    return found


def first_fault(error: ValidationError) -> str:
    """The first thing that is wrong with the content of a file, by its key."""
    first = error.errors()[0]
    key = ".".join(map(str, first["loc"]))
    if first["type"] == "missing":
        return f"the key '{key}' is missing"
    return f"{key}: {first['msg']}" if key else first["msg"]


class Tried(BaseModel):
    """An action that was tried on out-of-fold predictions, and what came of it.

    `before` and `after` are means over the cases of the mean Dice of what the action is of, 1 where neither side has
    it. `worst_change` is of a single label in a single case. `parts_lost` counts components of references that a
    prediction had found, and that nothing of it touches any more. `p_value` is of Wilcoxon's signed-rank test on the
    patients' mean differences, `p_corrected` after Holm's correction over all that was tried and changes anything.
    """

    model_config = _VALUE

    action: Action
    cases: int
    patients_changed: int
    before: float | None
    after: float | None
    worst_change: float
    parts_lost: int
    p_value: float | None
    p_corrected: float | None
    is_chosen: bool
    why: str

    @property
    def gain(self) -> float:
        """Of the mean Dice."""
        return (self.after or 0.0) - (self.before or 0.0)


class FoldChoice(BaseModel):
    """What the cases of all other folds choose, which is what the nested figures of this fold's cases rest on."""

    model_config = _VALUE

    fold: int
    actions: tuple[Action, ...]


class Effect(BaseModel):
    """A figure of a label or region, over the cases where it is defined: as predicted, and after post-processing.

    `nested` is with what the other folds chose: none of a fold's cases had a say in what is done to them. `chosen` is
    with what all chose, so it is measured on the cases that it was chosen on, and promises too much.
    """

    model_config = _VALUE

    label: str
    figure: str
    before: float | None
    nested: float | None
    chosen: float | None


class Found(BaseModel):
    """Everything that the choice of a post-processing found. `note` says it in a sentence."""

    model_config = _VALUE

    cases: int
    patients: int
    note: str
    chosen: PostProcessing | None = None
    tried: tuple[Tried, ...] = ()
    folds: tuple[FoldChoice, ...] = ()
    effects: tuple[Effect, ...] = ()


def described(actions: Sequence[Action]) -> str:
    """Actions in one line, in an order that does not hang on how they are listed."""
    return "; ".join(sorted(action.words for action in actions)) or "nothing"


def cleaning_bytes(voxel_count: int) -> int:
    """What post-processing of a label map takes at most, beside the map, where a few per cent of it are removed."""
    return LIBRARY_BYTES + VOXEL_BYTES * voxel_count
