"""The steps of preprocessing as MONAI transforms: thin, the functions of other modules do the work."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform, Randomizable, Transform

from transforms.annotation import Annotation
from transforms.channels import draw_kept, insert_missing
from transforms.intensity import normalise_channels
from transforms.intensity_spec import Normalisation
from transforms.load import as_metatensor, geometry_of
from transforms.preprocessing import plan_grid, respace_image
from transforms.resample import move_classes


class EncodeLabelsd(MapTransform):
    """Voxel values of a case's label file to the schema's classes 0..n, uint8 or uint16; what is to be ignored to the
    class after the last."""

    def __init__(self, keys: KeysCollection, annotation: Annotation) -> None:
        super().__init__(keys)
        self.annotation = annotation

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Raises ValueError when a value is not in the schema, or of a label that was not annotated."""
        result = dict(data)
        for key in self.key_iterator(result):
            classes = self.annotation.classes(np.asarray(result[key]))
            result[key] = as_metatensor(torch.from_numpy(classes), geometry_of(result[key]))
        return result


class NormaliseIntensityd(MapTransform):
    """Each channel of (C, I, J, K) by its own `Normalisation`."""

    def __init__(self, keys: KeysCollection, normalisations: Sequence[Normalisation]) -> None:
        super().__init__(keys)
        self.normalisations = tuple(normalisations)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Raises ValueError when the number of channels is another or a channel is constant."""
        result = dict(data)
        for key in self.key_iterator(result):
            result[key] = normalise_channels(result[key], self.normalisations)
        return result


class OrientAndRespaced(MapTransform):
    """Move `keys` to the grid that has the given axes and spacing: images cubically, class maps by share.

    A sheared grid is made orthogonal in the same move. What then lies beside its slices was never measured: it is
    class 0, and in an image the lowest value of its channel.
    """

    def __init__(
        self, keys: KeysCollection, *, class_keys: Sequence[str], axis_codes: str, spacing_mm: Sequence[float]
    ) -> None:
        super().__init__(keys)
        self.class_keys = tuple(class_keys)
        self.axis_codes = axis_codes
        self.spacing_mm = tuple(spacing_mm)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Tensors on the target grid, which each carries."""
        result = dict(data)
        for key in self.key_iterator(result):
            source = geometry_of(result[key])
            target = plan_grid(source, self.axis_codes, self.spacing_mm)
            voxels = result[key].as_tensor()
            moved = (move_classes if key in self.class_keys else respace_image)(voxels, source, target)
            result[key] = as_metatensor(moved, target)
        return result


class InsertMissingd(MapTransform):
    """Channels that are there, in their places among all; the others are 0 on the same grid."""

    def __init__(self, keys: KeysCollection, present: Sequence[bool]) -> None:
        super().__init__(keys)
        self.present = tuple(present)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Raises ValueError when the number of channels is another."""
        result = dict(data)
        for key in self.key_iterator(result):
            whole = insert_missing(result[key].as_tensor(), self.present)
            result[key] = as_metatensor(whole, geometry_of(result[key]))
        return result


class RandDropChannelsd(Randomizable, Transform):
    """Set channels of `image` (C, I, J, K) to 0: some optional ones by chance, and those that the case lacks.

    `present` (C,) in the data says which it has, by default all. It belongs after all changes of intensity, which
    would put noise into a channel that holds nothing.
    """

    def __init__(self, optional: Sequence[bool], probability: float) -> None:
        self.optional = tuple(optional)
        self.probability = probability

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Data with `image` changed and `present` taken out."""
        rest = dict(data)
        present = rest.pop("present", None) or (True,) * len(self.optional)
        kept = draw_kept(self.R, present, optional=self.optional, probability=self.probability)
        if not kept.all():
            image = rest["image"].clone()
            image[torch.from_numpy(~kept)] = 0
            rest["image"] = image
        return rest
