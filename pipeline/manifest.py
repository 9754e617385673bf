"""A dataset as a value: its channels, labels and cases. Paths, never voxels; pseudonyms, never identities."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from transforms.labels import LabelSchema

Modality = Literal["CT", "MR", "PT", "NM", "US"]
"""DICOM's codes (PS3.3 C.7.3.1.1.1) of the volumes that can be planned for; a closed list on purpose."""


class Frozen(BaseModel):
    """An immutable value; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Channel(Frozen):
    """One input channel of the network."""

    name: str = Field(min_length=1)
    modality: Modality


class Case(Frozen):
    """One study to segment. `images` maps each channel's name to a path relative to the manifest's root."""

    case_id: str = Field(min_length=1, pattern=r"^[A-Za-z0-9._-]+$")
    patient_id: str = Field(min_length=1)
    images: dict[str, str]
    label: str | None = None
    fold: int | None = Field(None, ge=0)


class Manifest(Frozen):
    """A dataset. `root` is relative to the manifest's own folder unless another root is given on loading."""

    format: Literal["volseg-manifest-1"] = "volseg-manifest-1"
    name: str = Field(min_length=1)
    description: str = ""
    source: str = ""
    licence: str = ""
    channels: tuple[Channel, ...] = Field(min_length=1)
    labels: LabelSchema
    root: str = "."
    cases: tuple[Case, ...]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        ids = [case.case_id for case in self.cases]
        repeated = sorted({i for i in ids if ids.count(i) > 1}) if len(set(ids)) < len(ids) else []
        if repeated:
            raise ValueError(f"case_id {', '.join(repeated)} stands more than once")
        names = {channel.name for channel in self.channels}
        for case in self.cases:
            if set(case.images) != names:
                raise ValueError(
                    f"case '{case.case_id}' has images {sorted(case.images)}, expected {sorted(names)}"
                )
        return self


class Dataset(Frozen):
    """A manifest and the folder on this machine that its paths start from."""

    manifest: Manifest
    root: Path

    def image_paths(self, case: Case) -> list[Path]:
        """In the order of the manifest's channels."""
        return [self.root / case.images[channel.name] for channel in self.manifest.channels]

    def label_path(self, case: Case) -> Path | None:
        """None when the case is not annotated."""
        return None if case.label is None else self.root / case.label
