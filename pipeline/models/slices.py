"""A 2D network as one that takes patches of one slice."""

from __future__ import annotations

from torch import Tensor, nn


class SliceNetwork(nn.Module):
    """Takes (B, C, I, J, K) with one voxel along `slice_axis`, gives logits of the same spatial shape."""

    def __init__(self, network: nn.Module, slice_axis: int) -> None:
        super().__init__()
        self.network = network
        self.dim = slice_axis + 2

    def forward(self, image: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Logits (B, classes, I, J, K), or a tuple of them, finest first, under deep supervision."""
        logits = self.network(image.squeeze(self.dim))
        if isinstance(logits, Tensor):
            return logits.unsqueeze(self.dim)
        return tuple(level.unsqueeze(self.dim) for level in logits)


def as_volume_network(network: nn.Module, slice_axis: int | None) -> nn.Module:
    """The network itself in 3D; wrapped so that it takes one-slice patches in 2D."""
    return network if slice_axis is None else SliceNetwork(network, slice_axis)
