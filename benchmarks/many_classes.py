"""A study with as many organs as wanted and a network that finds them at once: for costs of everything else.

Organs are cells around random points inside a body, a cylinder or that of a given CT. The image shows each in a grey
of its own, so that one pointwise layer knows them all.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

if TYPE_CHECKING:
    from pipeline.predict import Model
    from transforms.volume import Volume

GREY = 10.0
"""Distance of organs' greys; noise has a deviation of a twentieth of it."""

SHARPNESS = 0.05
SEED = 7
BODY_HU = -300.0


def organ_greys(shape: tuple[int, int, int], classes: int, body: npt.NDArray[np.bool_] | None = None) -> Any:
    """Greys (I, J, K) float32: 0 outside the body, `GREY` times the class inside."""
    from scipy.spatial import cKDTree

    random = np.random.default_rng(SEED)
    coarse = tuple(max(1, -(-n // 4)) for n in shape)
    places = np.stack(np.meshgrid(*((np.arange(n) + 0.5) / n for n in coarse), indexing="ij"), axis=-1)
    if body is None:
        inside = np.hypot(places[..., 0] - 0.5, (places[..., 1] - 0.5) * 1.2) < 0.45
    else:
        picks = np.ix_(*(((np.arange(n) + 0.5) * m / n).astype(int) for n, m in zip(coarse, body.shape, strict=True)))
        inside = body[picks]
    seeds = places[inside][random.permutation(int(inside.sum()))[: classes - 1]]
    cells = np.zeros(coarse, dtype=np.float32)
    cells[inside] = cKDTree(seeds).query(places[inside])[1] + 1
    fine = np.ix_(*(np.arange(n) // 4 for n in shape))
    greys = np.multiply(cells[fine], GREY, dtype=np.float32)
    for plane in greys:
        plane += random.normal(scale=GREY / 20, size=plane.shape).astype(np.float32)
    return greys


def organ_study(
    shape: tuple[int, int, int], spacing_mm: tuple[float, float, float], classes: int, ct: Path | None = None
) -> Volume:
    """The image on a grid of that spacing; with `ct`, the body is that file's, stretched over the grid."""
    from transforms.geometry import Geometry
    from transforms.volume import Volume, read_volume

    body = None if ct is None else read_volume(ct).voxels > BODY_HU
    greys = organ_greys(shape, classes, body)
    return Volume(greys, Geometry(shape, np.diag([*spacing_mm, 1.0])), None, 0.0)


class Greys(torch.nn.Module):
    """Logits that are highest for the organ whose grey is nearest; notes the seconds that it took."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        centres = GREY * torch.arange(classes, dtype=torch.float32)
        self.layer = torch.nn.Conv3d(1, classes, 1).requires_grad_(False)
        self.layer.weight.copy_((2 * SHARPNESS * centres).reshape(-1, 1, 1, 1, 1))
        self.layer.bias.copy_(-SHARPNESS * centres**2)
        self.seconds = 0.0

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """(B, 1, I, J, K) to (B, classes, I, J, K)."""
        import time

        start = time.perf_counter()
        logits: torch.Tensor = self.layer(image)
        self.seconds += time.perf_counter() - start
        return logits


def organ_model(classes: int, side: int, spacing_mm: tuple[float, float, float]) -> Model:
    """A bundle around `Greys`, with cubic windows of `side` voxels of that spacing."""
    from pipeline.bundle import BundleIndex, ModelBundle
    from pipeline.models.spec import UNetSpec
    from pipeline.plan import ChannelPlan, Plan
    from pipeline.predict import Model
    from transforms.intensity_spec import Normalisation
    from transforms.labels import schema_from_names

    unet = UNetSpec(
        out_channels=classes,
        features=(1,),
        strides=((1, 1, 1),),
        kernel_shapes=((1, 1, 1),),
        encoder_blocks=(1,),
        decoder_blocks=(),
    )
    channel = ChannelPlan(
        name="greys", modality="MR", normalisation=Normalisation(kind="none"), lowest=0, highest=GREY * classes
    )
    plan = Plan(
        channels=(channel,),
        class_count=classes,
        spacing_mm=spacing_mm,
        patch_shape=(side, side, side),
        batch_size=1,
        network="unet",
        unet=unet,
        slice_axis=None,
        mirror_axes=(),
        receptive_field_mm=spacing_mm,
        largest_label_extent_mm=spacing_mm,
        memory_gb=1,
        patch_gflop=1,
        reasons={},
        warnings=(),
    )
    schema = schema_from_names({n: f"organ {n}" for n in range(1, classes)})
    index = BundleIndex(name="greys", fold=None, mirror=False, tile_step=0.5, provenance={}, sha256={})
    return Model((ModelBundle(index, plan, schema, Greys(classes).eval(), ""),))
