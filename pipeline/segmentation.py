"""The value that prediction gives, evaluation scores and export writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from transforms.geometry import Geometry
from transforms.labels import LabelSchema

if TYPE_CHECKING:
    from pipeline.confidence import Confidence
    from pipeline.postprocessing import PostProcessing


@dataclass(frozen=True)
class Algorithm:
    """What made a segmentation, as it is written into exports (DICOM PS3.3 section 10.16)."""

    name: str
    version: str


@dataclass(frozen=True, eq=False)
class Segmentation:
    """Label ids (I, J, K), 0 background, on the grid of the source volume; what else a prediction was asked for.

    `postprocessing` is what was done to the labels after the network decided them; `skipped_windows` were taken for
    air, by what the model's training cases say, although they held something.
    """

    label_map: npt.NDArray[np.uint8 | np.uint16]
    geometry: Geometry
    schema: LabelSchema
    algorithm: Algorithm
    confidence: Confidence | None = None
    postprocessing: PostProcessing | None = None
    skipped_windows: int = 0

    def __post_init__(self) -> None:
        if self.label_map.shape != self.geometry.shape:
            raise ValueError(f"a label map of {self.label_map.shape} on a grid of {self.geometry.shape}")

    def present(self) -> list[int]:
        """The label ids that occur, sorted."""
        return [int(i) for i in np.unique(self.label_map) if i != 0]

    def mask(self, label_id: int) -> npt.NDArray[Any]:
        """(I, J, K) bool, where the label is."""
        return np.asarray(self.label_map == label_id)
