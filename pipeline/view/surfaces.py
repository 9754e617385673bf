"""Surfaces of labels for the page's 3D view, in RAS+ mm as MZ3 (Surf Ice's format, which NiiVue reads).

They are smoothed a little, and made coarser when they are large: for looking at, not for measuring. Meshes to work
with come from `volseg export`.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import numpy.typing as npt

from transforms.geometry import Geometry

MOST_VOXELS = 800_000
"""A label's box larger than this is taken in larger steps."""

SMOOTHING_VOXELS = 0.7

_MAGIC, _FACES_AND_VERTICES = 0x5A4D, 3


def surface_mz3(mask: npt.NDArray[np.bool_], geometry: Geometry) -> bytes:
    """The surface of a `mask` (I, J, K) on `geometry`; some of it must be set."""
    vertices_ijk, faces = _surface(mask)
    vertices_ras_mm = geometry.ras_from_ijk(vertices_ijk)
    # Seen from outside, corners run anticlockwise; a grid that is left-handed turns them round.
    if np.linalg.det(geometry.affine_ras[:3, :3]) < 0:
        faces = faces[:, ::-1]
    header = struct.pack("<HHIII", _MAGIC, _FACES_AND_VERTICES, len(faces), len(vertices_ras_mm), 0)
    return header + faces.astype("<i4").tobytes() + vertices_ras_mm.astype("<f4").tobytes()


def _surface(mask: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[np.float64], npt.NDArray[Any]]:
    """Vertices (N, 3) in voxel indices and triangles (M, 3)."""
    from scipy.ndimage import gaussian_filter
    from skimage.measure import marching_cubes

    step = max(1, int(np.ceil((mask.size / MOST_VOXELS) ** (1 / 3))))
    coarse = np.pad(_shares(mask.astype(np.float32), step), 2)
    smooth = gaussian_filter(coarse, SMOOTHING_VOXELS)
    # What is thinner than the filter would vanish.
    field = smooth if smooth.max() > 0.55 else coarse
    level = 0.5 if field.max() > 0.5 else float(field.max()) / 2
    vertices, faces, _, _ = marching_cubes(field, level, gradient_direction="ascent")
    return (vertices - 2) * step + (step - 1) / 2, faces


def _shares(mask: npt.NDArray[np.float32], step: int) -> npt.NDArray[np.float32]:
    """The part of each block of step x step x step voxels that is set."""
    if step == 1:
        return mask
    padded = np.pad(mask, [(0, -n % step) for n in mask.shape])
    i, j, k = (n // step for n in padded.shape)
    return np.asarray(padded.reshape(i, step, j, step, k, step).mean(axis=(1, 3, 5)))
