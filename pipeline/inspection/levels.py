"""Where the levels of a network lie in it, so that what flows there can be read and replaced.

Levels are counted from 1, the full resolution, down to the bottleneck, the highest number. A network that is not ours
has the levels that its modules show; of one that adds its skips, these are no value on their own and have no point.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pipeline.errors import PlanError

Kind = Literal["encoder", "bottleneck", "skip", "decoder"]
KINDS: tuple[Kind, ...] = get_args(Kind)

Visit = Callable[[Tensor], Tensor | None]
"""Sees features (B,C,...); what it gives, if anything, flows on in their place."""


@dataclass(frozen=True, eq=False)
class Point:
    """A place that features flow through: the output of a module, or its positional argument of that number.

    `first_channel`: the features are the channels from there on; those before are something else.
    """

    module: nn.Module
    argument: int | None = None
    first_channel: int = 0

    def hook(self, visit: Visit) -> RemovableHandle:
        """From now on `visit` is called with what flows here."""
        if self.argument is None:
            return self.module.register_forward_hook(lambda _module, _inputs, output: self._seen(visit, output))
        return self.module.register_forward_pre_hook(lambda _module, inputs: self._seen_among(visit, inputs))

    def _seen(self, visit: Visit, features: Tensor) -> Tensor | None:
        replaced = visit(features[:, self.first_channel :])
        if replaced is None or not self.first_channel:
            return replaced
        whole = features.clone()
        whole[:, self.first_channel :] = replaced
        return whole

    def _seen_among(self, visit: Visit, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        assert self.argument is not None
        replaced = self._seen(visit, inputs[self.argument])
        return None if replaced is None else (*inputs[: self.argument], replaced, *inputs[self.argument + 1 :])


@dataclass(frozen=True, eq=False)
class Levels:
    """The points of a network by level.

    `skips[n]` is what enters the decoder from the side, cropped and gated; `coarse[n]` is what enters the decoder of
    level n from the levels below, its gate included.
    """

    count: int
    encoder: Mapping[int, Point]
    bottleneck: Point
    skips: Mapping[int, Point]
    decoder: Mapping[int, Point]
    coarse: Mapping[int, Point]

    def named(self) -> dict[str, Point]:
        """The points whose features have figures: 'encoder 1', 'bottleneck 5', 'skip 1', 'decoder 1' and so on."""
        by_kind: dict[Kind, Mapping[int, Point]] = {
            "encoder": self.encoder,
            "bottleneck": {self.count: self.bottleneck},
            "skip": self.skips,
            "decoder": self.decoder,
        }
        return {name_of(kind, n): by_kind[kind][n] for kind in KINDS for n in sorted(by_kind[kind])}


def name_of(kind: Kind, level: int) -> str:
    """What a part of a network is called."""
    return f"{kind} {level}"


def kind_and_level(name: str) -> tuple[Kind, int]:
    """The parts of a name such as 'skip 2'.

    Raises:
        ValueError: it is no such name.
    """
    kind, _, level = name.partition(" ")
    found = next((known for known in KINDS if known == kind), None)
    if found is None or not level.isdecimal():
        raise ValueError(f"found '{name}', expected one of {', '.join(KINDS)} and a level, as in 'skip 2'")
    return found, int(level)


def levels_of(network: nn.Module) -> Levels:
    """Where the levels of a network are, wherever in its wrappers (slices, reordering, Fabric) it lies.

    Raises:
        PlanError: it is none whose levels are known; the message names it and those that are.
    """
    for module in network.modules():
        find = LEVELS.get(f"{type(module).__module__}.{type(module).__name__}")
        if find is not None:
            return find(module)
    raise PlanError(
        f"network {type(network).__name__}: its levels are not known, so that it cannot be inspected; "
        f"known are {', '.join(name.rpartition('.')[2] for name in LEVELS)}"
    )


@contextlib.contextmanager
def visited(points: Mapping[str, Point], visit: Callable[[str, Tensor], Tensor | None]) -> Iterator[None]:
    """While entered, `visit(name, features)` sees what flows through the points, and may replace it."""

    def of(name: str) -> Visit:
        return lambda features: visit(name, features)

    with contextlib.ExitStack() as stack:
        for name, point in points.items():
            stack.callback(point.hook(of(name)).remove)
        yield


def _numbered(modules: Any, argument: int | None = None) -> dict[int, Point]:
    return {n: Point(module, argument) for n, module in enumerate(modules, start=1)}


def _unet(network: Any) -> Levels:
    stages: list[Any] = list(network.decoder)
    encoder = list(network.encoder)
    if network.transformer is None:
        encoder, bottleneck = encoder[:-1], encoder[-1]
    else:
        bottleneck = network.transformer
    joined = zip(stages, network.spec.features, strict=False)
    return Levels(
        count=network.spec.stages,
        encoder=_numbered(encoder),
        bottleneck=Point(bottleneck),
        # The blocks get the upsampled features and then as many of the skip.
        skips={n: Point(stage.blocks, 0, channels) for n, (stage, channels) in enumerate(joined, start=1)},
        decoder=_numbered(stages),
        coarse=_numbered(stages, 0),
    )


def _dynunet(network: Any) -> Levels:
    ups = list(network.upsamples)[::-1]
    return Levels(
        count=len(ups) + 1,
        encoder=_numbered([network.input_block, *network.downsamples]),
        bottleneck=Point(network.bottleneck),
        skips=_numbered(ups, 1),
        decoder=_numbered(ups),
        coarse=_numbered(ups, 0),
    )


def _attention_unet(network: Any) -> Levels:
    head, layer = network.model[0], network.model[1]
    encoder, layers = [head], [layer]
    while isinstance(layer.submodule, nn.Sequential) and len(layer.submodule) == 2:
        block, inner = layer.submodule
        if not hasattr(inner, "submodule"):
            break
        encoder.append(block)
        layers.append(inner)
        layer = inner
    return Levels(
        count=len(layers) + 1,
        encoder=_numbered(encoder),
        bottleneck=Point(layer.submodule),
        skips=_numbered(each.attention for each in layers),
        decoder=_numbered(layers),
        coarse=_numbered((each.upconv for each in layers), 0),
    )


def _swin_unetr(network: Any) -> Levels:
    ups = [getattr(network, f"decoder{n}") for n in range(1, 6)]
    return Levels(
        count=6,
        encoder=_numbered(getattr(network, f"encoder{n}") for n in range(1, 5)),
        bottleneck=Point(network.encoder10),
        skips=_numbered(ups, 1),
        decoder=_numbered(ups),
        coarse=_numbered(ups, 0),
    )


def _segresnet(network: Any) -> Levels:
    downs = list(network.down_layers)
    return Levels(
        count=len(downs),
        encoder=_numbered(downs[:-1]),
        bottleneck=Point(downs[-1]),
        skips={},
        decoder=_numbered(list(network.up_layers)[::-1]),
        coarse=_numbered((list(network.up_samples)[::-1]), 0),
    )


def _mednext(network: Any) -> Levels:
    return Levels(
        count=len(network.enc_stages) + 1,
        encoder=_numbered(network.enc_stages),
        bottleneck=Point(network.bottleneck),
        skips={},
        decoder=_numbered(list(network.dec_stages)[::-1]),
        coarse=_numbered(list(network.up_blocks)[::-1], 0),
    )


LEVELS: dict[str, Callable[[Any], Levels]] = {
    "pipeline.models.unet.UNet": _unet,
    "monai.networks.nets.dynunet.DynUNet": _dynunet,
    "monai.networks.nets.attentionunet.AttentionUnet": _attention_unet,
    "monai.networks.nets.swin_unetr.SwinUNETR": _swin_unetr,
    "monai.networks.nets.segresnet.SegResNet": _segresnet,
    "monai.networks.nets.mednext.MedNeXt": _mednext,
}
"""By the name of the class, so that MONAI need not be imported to look."""
