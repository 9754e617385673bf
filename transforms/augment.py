"""Random changes of training patches: first drawn as a value, then applied, so that each can be replayed.

`RandPatchd` cuts a patch out of a volume through one resampling that holds rotation, scaling, elastic deformation
and mirroring at once, so that no border of a rotated patch is ever empty where the volume goes on.
`RandIntensityd` changes intensities. Both are MONAI transforms; their randomness comes from `set_random_state`.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from monai.transforms import Randomizable, Transform
from torch import Tensor

from transforms.patches import draw_centre
from transforms.sampling import Places, filled, linear, nearest, places_in

Range = tuple[float, float]

ELASTIC_CONTROL_VOXELS = 12
"""Distance of the control points of an elastic deformation."""


@dataclass(frozen=True)
class SpatialSettings:
    """Probabilities and strengths; the meanings are those of `augment.*` in a config."""

    rotation_probability: float = 0.0
    rotation_degrees: float = 0.0
    scaling_probability: float = 0.0
    scaling_range: Range = (1.0, 1.0)
    elastic_probability: float = 0.0
    elastic_mm: float = 0.0
    mirror_axes: tuple[int, ...] = ()


@dataclass(frozen=True)
class IntensitySettings:
    """Probabilities and strengths; the meanings are those of `augment.*` in a config."""

    noise_probability: float = 0.0
    noise_deviation: float = 0.0
    blur_probability: float = 0.0
    blur_voxels: Range = (0.5, 1.0)
    brightness_probability: float = 0.0
    brightness_range: Range = (1.0, 1.0)
    contrast_probability: float = 0.0
    contrast_range: Range = (1.0, 1.0)
    gamma_probability: float = 0.0
    gamma_range: Range = (1.0, 1.0)
    low_resolution_probability: float = 0.0
    low_resolution_range: Range = (1.0, 1.0)


@dataclass(frozen=True, eq=False)
class PatchDraw:
    """A patch: `centre_ijk` (3,), `matrix` (3, 3) from patch offsets to volume offsets in voxels, `elastic` the
    control points' displacements (3, a, b, c) in voxels or None, `mirrored` axes."""

    centre_ijk: npt.NDArray[np.float64]
    matrix: npt.NDArray[np.float64]
    elastic: npt.NDArray[np.float64] | None
    mirrored: tuple[int, ...]

    @property
    def is_plain(self) -> bool:
        """True when the patch is a box of voxels, mirrored at most."""
        return self.elastic is None and bool(np.array_equal(self.matrix, np.eye(3)))


@dataclass(frozen=True)
class IntensityDraw:
    """What happens to one channel; None or 1 means nothing does."""

    blur_voxels: float | None
    low_resolution: float | None
    brightness: float
    contrast: float
    gamma: float
    noise_deviation: float | None
    noise_seed: int


def draw_patch(
    random: np.random.RandomState,
    centre_ijk: npt.NDArray[np.float64],
    patch_shape: Sequence[int],
    *,
    spacing_mm: Sequence[float],
    settings: SpatialSettings,
) -> PatchDraw:
    """Draw rotation, scaling, elastic deformation and mirroring for a patch about `centre_ijk`."""
    matrix_mm = np.eye(3)
    if random.random_sample() < settings.rotation_probability:
        matrix_mm = _rotation(random.uniform(-1, 1, 3) * np.deg2rad(settings.rotation_degrees), patch_shape)
    if random.random_sample() < settings.scaling_probability:
        # A factor above 1 enlarges what is seen, so the patch reaches less far.
        matrix_mm = matrix_mm / _log_uniform(random, settings.scaling_range)
    spacing = np.asarray(spacing_mm, dtype=np.float64)
    matrix = matrix_mm * spacing[None, :] / spacing[:, None]
    elastic = None
    if random.random_sample() < settings.elastic_probability:
        points = [max(2, n // ELASTIC_CONTROL_VOXELS + 1) if n > 1 else 1 for n in patch_shape]
        elastic = random.standard_normal((3, *points)) * settings.elastic_mm / spacing[:, None, None, None]
        elastic[np.asarray(patch_shape) == 1] = 0.0  # a slice stays in its own plane
    mirrored = tuple(a for a in settings.mirror_axes if random.random_sample() < 0.5)
    return PatchDraw(centre_ijk, matrix, elastic, mirrored)


def cut_patch(
    image: Tensor, label: Tensor, draw: PatchDraw, patch_shape: Sequence[int], *, fill: float | Tensor = 0.0
) -> tuple[Tensor, Tensor]:
    """The drawn patches (C, *patch_shape) of an image and a label map (C, I, J, K) on one grid.

    Images are interpolated linearly, end in `fill` (one value, or one a channel) and become float32; labels keep their
    dtype, take the nearest voxel and end in 0. Mirroring exchanges no classes.
    """
    if draw.is_plain:
        start = np.rint(draw.centre_ijk - (np.asarray(patch_shape) - 1) / 2)
        pair = _cut_box(image, start, patch_shape, fill).to(torch.float32), _cut_box(label, start, patch_shape, 0)
    else:
        places = _locate(draw, patch_shape, image)
        pair = linear(image, places, fill=fill), nearest(label, places)
    return _mirrored(pair[0], draw), _mirrored(pair[1], draw)


def exchange_twins(classes: Tensor, twin_classes: Sequence[int]) -> Tensor:
    """Class map with each class replaced by its left/right twin, as mirroring along x demands."""
    table = torch.as_tensor(twin_classes, dtype=classes.dtype, device=classes.device)
    return table[classes.long()]


def draw_intensity(random: np.random.RandomState, settings: IntensitySettings) -> IntensityDraw:
    """Draw the changes of one channel; the number of draws is always the same, whatever happens."""
    s = settings
    # Strengths first: a change that does not happen has been drawn as well.
    blur, low = random.uniform(*s.blur_voxels), random.uniform(*s.low_resolution_range)
    brightness, contrast = random.uniform(*s.brightness_range), random.uniform(*s.contrast_range)
    gamma, noise = _log_uniform(random, s.gamma_range), random.uniform(0, s.noise_deviation)

    def happens(probability: float) -> bool:
        return bool(random.random_sample() < probability)

    return IntensityDraw(
        blur_voxels=blur if happens(s.blur_probability) else None,
        low_resolution=low if happens(s.low_resolution_probability) else None,
        brightness=brightness if happens(s.brightness_probability) else 1.0,
        contrast=contrast if happens(s.contrast_probability) else 1.0,
        gamma=gamma if happens(s.gamma_probability) else 1.0,
        noise_deviation=noise if happens(s.noise_probability) else None,
        noise_seed=int(random.randint(2**31)),
    )


def change_intensity(channel: Tensor, draw: IntensityDraw) -> Tensor:
    """One channel (I, J, K) float32 after the drawn changes: a new tensor, or the same one when nothing is drawn."""
    changed = channel
    if draw.blur_voxels is not None:
        changed = _blur(changed, draw.blur_voxels)
    if draw.low_resolution is not None:
        changed = _low_resolution(changed, draw.low_resolution)
    if draw.brightness != 1.0:
        changed = changed * draw.brightness
    if draw.contrast != 1.0:
        low, high = changed.aminmax()
        # About the mean: x * c + mean * (1 - c)
        changed = (changed * draw.contrast).add_(changed.mean() * (1 - draw.contrast)).clamp_(low, high)
    if draw.gamma != 1.0:
        changed = _gamma(changed, draw.gamma)
    if draw.noise_deviation is not None:
        generator = torch.Generator(device=changed.device).manual_seed(draw.noise_seed)
        noise = torch.randn(changed.shape, generator=generator, device=changed.device, dtype=changed.dtype)
        changed = changed + noise * draw.noise_deviation
    return changed


class RandPatchd(Randomizable, Transform):
    """Cut one augmented training patch: `image` and `label` (C, I, J, K) on one grid become (C, *patch_shape).

    `positions` in the data (see `transforms.patches.class_positions`) makes the sampling class-aware, `fill` is what
    the image ends in (default 0). When the first axis (x, left to right in RAS) is mirrored, left and right labels are
    exchanged, and with them which classes were `annotated` (class_count,), if that is there.
    """

    def __init__(
        self,
        patch_shape: Sequence[int],
        spacing_mm: Sequence[float],
        *,
        settings: SpatialSettings,
        twin_classes: Sequence[int],
        foreground_share: float,
    ) -> None:
        self.patch_shape = tuple(patch_shape)
        self.spacing_mm = tuple(spacing_mm)
        self.settings = settings
        self.twin_classes = tuple(twin_classes)
        self.foreground_share = foreground_share

    def draw(self, shape: Sequence[int], positions: npt.NDArray[np.int32]) -> PatchDraw:
        """The next patch of a volume of `shape`."""
        centre = draw_centre(
            self.R, shape, self.patch_shape, positions=positions, foreground_share=self.foreground_share
        )
        return draw_patch(self.R, centre, self.patch_shape, spacing_mm=self.spacing_mm, settings=self.settings)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Data with `image` and `label` replaced by the patch, plain tensors, and `positions` and `fill` taken out.

        Raises:
            ValueError: image and label are not of the same shape.
        """
        # The affine of a MetaTensor would not hold for its patch.
        image, label = data["image"].as_subclass(Tensor), data["label"].as_subclass(Tensor)
        if image.shape[1:] != label.shape[1:]:
            raise ValueError(f"an image of {tuple(image.shape[1:])} voxels and a label of {tuple(label.shape[1:])}")
        draw = self.draw(image.shape[1:], data.get("positions", np.empty((0, 4), np.int32)))
        patch, classes = cut_patch(image, label, draw, self.patch_shape, fill=data.get("fill", 0.0))
        rest = {k: v for k, v in data.items() if k not in ("image", "label", "positions", "fill")}
        if 0 in draw.mirrored and self.twin_classes != tuple(range(len(self.twin_classes))):
            classes = exchange_twins(classes, self.twin_classes)
            if "annotated" in rest:
                # The ignored class, which may stand last among the twins, is not one of those.
                rest["annotated"] = rest["annotated"][list(self.twin_classes[: len(rest["annotated"])])]
        return {**rest, "image": patch, "label": classes}


class RandIntensityd(Randomizable, Transform):
    """Change each channel of `image` (C, I, J, K) by its own draw."""

    def __init__(self, settings: IntensitySettings) -> None:
        self.settings = settings

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Data with `image` changed."""
        image = data["image"]
        channels = [change_intensity(channel, draw_intensity(self.R, self.settings)) for channel in image]
        return {**data, "image": torch.stack(channels)}


def _rotation(angles: npt.NDArray[np.float64], patch_shape: Sequence[int]) -> npt.NDArray[np.float64]:
    matrix = np.eye(3)
    for axis, angle in enumerate(angles):
        if sum(n > 1 for a, n in enumerate(patch_shape) if a != axis) < 2:
            continue  # a slice turns in its own plane only
        a, b = [x for x in range(3) if x != axis]
        turn = np.eye(3)
        turn[a, a] = turn[b, b] = np.cos(angle)
        turn[a, b], turn[b, a] = -np.sin(angle), np.sin(angle)
        matrix = matrix @ turn
    return matrix


def _log_uniform(random: np.random.RandomState, limits: Range) -> float:
    return float(np.exp(random.uniform(np.log(limits[0]), np.log(limits[1]))))


def _cut_box(
    volume: Tensor, start: npt.NDArray[np.float64], patch_shape: Sequence[int], fill: float | Tensor
) -> Tensor:
    first = start.astype(int)
    low = np.maximum(first, 0)
    high = np.maximum(np.minimum(first + np.asarray(patch_shape), volume.shape[1:]), low)
    inside = volume[:, low[0] : high[0], low[1] : high[1], low[2] : high[2]]
    if tuple(inside.shape[1:]) == tuple(patch_shape):
        return inside.clone()
    patch = filled((volume.shape[0], *patch_shape), fill, dtype=volume.dtype, device=volume.device)
    if (high > low).all():
        into, upto = low - first, high - first
        patch[:, into[0] : upto[0], into[1] : upto[1], into[2] : upto[2]] = inside
    return patch


def _locate(draw: PatchDraw, patch_shape: Sequence[int], volume: Tensor) -> Places:
    # Only the part that can be reached is touched, so that memory-mapped volumes are read no farther.
    reach = np.abs(draw.matrix) @ ((np.asarray(patch_shape) - 1) / 2)
    if draw.elastic is not None:
        reach = reach + np.abs(draw.elastic).max(axis=(1, 2, 3))
    last_ijk = np.asarray(volume.shape[1:]) - 1
    first = np.clip(np.floor(draw.centre_ijk - reach), 0, last_ijk).astype(int)
    last = np.clip(np.ceil(draw.centre_ijk + reach), 0, last_ijk).astype(int)
    i, j, k = (slice(int(a), int(b) + 1) for a, b in zip(first, last, strict=True))
    grid = _grid(draw.centre_ijk - first, draw.matrix, draw.elastic, patch_shape)
    return places_in((i, j, k), grid.to(volume.device))


def _grid(
    centre: npt.NDArray[np.float64],
    matrix: npt.NDArray[np.float64],
    elastic: npt.NDArray[np.float64] | None,
    patch_shape: Sequence[int],
) -> Tensor:
    """(3, I, J, K): `centre` + `matrix` times the offset of each voxel + `elastic` spread over the patch."""
    steps = [matrix[:, axis, None] * (np.arange(side) - (side - 1) / 2) for axis, side in enumerate(patch_shape)]
    plane = centre[:, None, None] + steps[0][:, :, None] + steps[1][:, None, :]
    grid = _float32(plane)[..., None] + _float32(steps[2])[:, None, None, :]
    if elastic is not None:
        ends = [np.linspace(0, n - 1, side) for n, side in zip(elastic.shape[1:], patch_shape, strict=True)]
        grid += _spread(_float32(elastic), ends)
    return grid


def _spread(coarse: Tensor, places: Sequence[npt.NDArray[np.float64]]) -> Tensor:
    """Points (C, a, b, c) read linearly at `places` along each axis, in points: (C, I, J, K); ends go on for ever.

    Three small matrix products: several times faster on a CPU than `F.interpolate`.
    """
    along_i, along_j, along_k = (
        _tents(n, at).to(coarse.device) for n, at in zip(coarse.shape[1:], places, strict=True)
    )
    channels, a, b, c = coarse.shape
    slabs = (along_i @ coarse.reshape(channels, a, b * c)).reshape(channels, -1, b, c)
    return (along_j @ slabs) @ along_k.T


def _tents(count: int, places: npt.NDArray[np.float64]) -> Tensor:
    """(places, count) weights of linear interpolation between `count` points."""
    inside = np.clip(places, 0, count - 1)
    return _float32(np.clip(1.0 - np.abs(inside[:, None] - np.arange(count)), 0.0, None))


def _float32(values: npt.NDArray[np.float64]) -> Tensor:
    return torch.from_numpy(values.astype(np.float32))


def _mirrored(patch: Tensor, draw: PatchDraw) -> Tensor:
    axes = [a + 1 for a in draw.mirrored]
    if not axes:
        return patch
    if patch.dtype == torch.uint16:  # torch cannot flip these, so their bits are flipped as signed integers
        return patch.view(torch.int16).flip(axes).view(torch.uint16)
    return patch.flip(axes)


def _blur(channel: Tensor, sigma_voxels: float) -> Tensor:
    reach = max(1, int(np.ceil(3 * sigma_voxels)))
    offsets = torch.arange(-reach, reach + 1, dtype=channel.dtype, device=channel.device)
    kernel = torch.exp(-0.5 * (offsets / sigma_voxels) ** 2)
    kernel = kernel / kernel.sum()
    blurred = channel
    for axis, side in enumerate(channel.shape):
        if side > 1:
            blurred = _convolve_axis(blurred, kernel, axis)
    return blurred


def _convolve_axis(channel: Tensor, kernel: Tensor, axis: int) -> Tensor:
    """Sum of shifted copies: for a handful of taps faster on a CPU than a one-channel convolution."""
    reach = len(kernel) // 2
    size = channel.shape[axis]
    places = torch.arange(-reach, size + reach, device=channel.device).clamp(0, size - 1)
    padded = channel.index_select(axis, places)
    result = padded.narrow(axis, 0, size) * kernel[0]
    for tap in range(1, len(kernel)):
        result.add_(padded.narrow(axis, tap, size), alpha=float(kernel[tap]))
    return result


def _low_resolution(channel: Tensor, zoom: float) -> Tensor:
    """Every so manieth voxel, and linearly between them: voxels of both grids fill the same box."""
    small = [max(1, round(n * zoom)) for n in channel.shape]
    coarse = F.interpolate(channel[None, None], size=small, mode="nearest-exact")[0]
    middles = [(np.arange(side) + 0.5) * n / side - 0.5 for n, side in zip(small, channel.shape, strict=True)]
    return _spread(coarse, middles)[0]


def _gamma(channel: Tensor, exponent: float) -> Tensor:
    """A power of the intensities between their extremes; mean and deviation are kept, as in nnU-Net."""
    low, high = channel.aminmax()
    mean = channel.mean()
    deviation = torch.linalg.vector_norm(channel - mean)
    curved = (channel - low).div_((high - low).clamp_min(1e-7)).pow_(exponent)
    curved.sub_(curved.mean())
    # The number of voxels is the same on both sides; the smallest deviation that counts is 1e-7.
    smallest = 1e-7 * channel.numel() ** 0.5
    return curved.mul_(deviation / torch.linalg.vector_norm(curved).clamp_min(smallest)).add_(mean)
