"""A network of MONAI with all its arguments, as a value: torch-free, so that plans can hold it."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue

MONAI_NETWORKS: dict[str, str] = {
    "AttentionUnet": "attentionunet",
    "BasicUNet": "basic_unet",
    "DynUNet": "dynunet",
    "HighResNet": "highresnet",
    "MedNeXt": "mednext",
    "SegResNet": "segresnet",
    "SegResNetDS": "segresnet_ds",
    "SwinUNETR": "swin_unetr",
    "UNETR": "unetr",
    "UNet": "unet",
    "VNet": "vnet",
}
"""Classes that can be built, and their modules below monai.networks.nets. Closed: nothing else is ever imported."""


def _known(name: str) -> str:
    if name not in MONAI_NETWORKS:
        raise ValueError(f"network '{name}' is not known: known are {', '.join(MONAI_NETWORKS)}")
    return name


class MonaiNetwork(BaseModel):
    """`name` in `MONAI_NETWORKS` and the arguments of its constructor, three-dimensional.

    `output_order`: which of the network's outputs comes first, second, ...; empty: as they are.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, AfterValidator(_known)]
    arguments: dict[str, JsonValue]
    output_order: tuple[Annotated[int, Field(ge=0)], ...] = ()

    def argument(self, name: str, default: Any = None) -> Any:
        """The value that is given, or else the default."""
        return self.arguments.get(name, default)
