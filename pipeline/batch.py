"""What one update is made of: patches, what is in them, and how much of that is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Batch:
    """Augmented patches of `case_ids`, one row each.

    `images` (B, C, I, J, K) float32; `classes` (B, 1, I, J, K) unsigned, where the class after the last means
    "not to be counted"; `annotated` (B, class_count) bool, False where a class was not annotated in that case.
    """

    images: Tensor
    classes: Tensor
    annotated: Tensor
    case_ids: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device) -> Batch:
        """The same patches on another device, copied while the host goes on where memory is pinned."""
        images, classes, annotated = (
            tensor.to(device, non_blocking=True) for tensor in (self.images, self.classes, self.annotated)
        )
        return Batch(images, classes, annotated, self.case_ids)

    def rows(self, start: int, stop: int) -> Batch:
        """Patches `start` to `stop` (exclusive), as views."""
        part = slice(start, stop)
        return Batch(self.images[part], self.classes[part], self.annotated[part], self.case_ids[part])


def collate(patches: Sequence[dict[str, Any]]) -> Batch:
    """A batch from patches with `image`, `label`, `annotated` and `case_id` each."""
    images, classes, annotated = (
        torch.stack([patch[key] for patch in patches]) for key in ("image", "label", "annotated")
    )
    return Batch(images, classes, annotated, tuple(patch["case_id"] for patch in patches))
