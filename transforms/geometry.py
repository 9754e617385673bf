"""Geometry: where a voxel grid lies in the patient. The only code that knows RAS from LPS.

Reorienting, cropping and respacing are each a new `Geometry`; moving voxels from one to another is
`transforms.resample`. Nothing here touches voxels.

Frames: RAS+ millimetres (x to the patient's Right, y Anterior, z Superior, as NIfTI has it) everywhere inside.
LPS+ (DICOM PS3.3 C.7.6.2, ITK) exists only in `Geometry.from_lps` and `Geometry.affine_lps`.
Index (i, j, k) names a voxel's centre.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Triple = tuple[int, int, int]

SAME_GRID_VOXELS = 0.02
"""Two grids are the same when no corner is farther apart than this part of the smallest voxel side."""

EXACT_MOVE_VOXELS = 1e-3
"""A grid lies on another's voxel centres when no index is farther from an integer than this."""

AXIS_ALIGNED = 1e-3
"""Direction cosines within this of a signed permutation count as one (between two grids), as long as what is
ignored moves no corner by more than `SAME_GRID_VOXELS`."""

RIGHT_ANGLE = 1e-3
"""Axes are at right angles when the cosine between them is at most this; a grid with others is sheared."""

MAX_SHEAR_DEG = 45.0
"""A stack that leans more is no scan, and would be mostly empty as an orthogonal grid; gantries tilt by 30 degrees."""

MAX_SIDE = 2**16
"""Voxels by which slices are widened at most."""

_LPS_FROM_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
_NEGATIVE_CODES, _POSITIVE_CODES = "LPI", "RAS"


@dataclass(frozen=True)
class AxisMap:
    """How the axes of one grid lie in another: per target axis, index_source = scale * index_target + offset.

    Where one of the two grids is sheared, `stack_axis` is the target axis along which slices follow each other, and
    slice n of the target has `shears * n` added: each slice is shifted within its own plane.
    """

    source_axes: Triple
    scales: tuple[float, float, float]
    offsets: tuple[float, float, float]
    target_shape: Triple
    shears: tuple[float, float, float] = (0.0, 0.0, 0.0)
    stack_axis: int | None = None

    @property
    def is_exact(self) -> bool:
        """True when every target voxel centre is a source voxel centre (flips, permutations, crops, pads)."""
        if self.stack_axis is not None:
            return False
        first = np.asarray(self.offsets)
        ideal = np.rint(first)
        steps = np.asarray(self.target_shape) - 1
        # The last index is judged as well as the first: a small error of scale grows along the axis.
        last = first + np.asarray(self.scales) * steps
        ideal_last = ideal + np.sign(self.scales) * steps
        return bool(max(np.abs(first - ideal).max(), np.abs(last - ideal_last).max()) < EXACT_MOVE_VOXELS)


@dataclass(frozen=True, eq=False)
class Geometry:
    """A voxel grid in the patient: `shape` (I, J, K) and `affine_ras`, 4x4 float64, index to RAS+ mm.

    Raises:
        ValueError: the shape is not three positive integers, or the affine is not finite, invertible and affine.
    """

    shape: Triple
    affine_ras: Floats

    def __post_init__(self) -> None:
        shape = tuple(int(n) for n in self.shape)
        if len(shape) != 3 or min(shape) < 1 or shape != tuple(self.shape):
            raise ValueError(f"a grid has three positive sizes, found {tuple(self.shape)}")
        affine = np.array(self.affine_ras, dtype=np.float64)
        if affine.shape != (4, 4) or not np.isfinite(affine).all():
            raise ValueError("an affine is a 4x4 matrix of finite numbers")
        if not np.array_equal(affine[3], (0.0, 0.0, 0.0, 1.0)):
            raise ValueError(f"the last row of an affine is 0 0 0 1, found {affine[3].tolist()}")
        sides_mm = np.linalg.norm(affine[:3, :3], axis=0)
        # Relative to the voxel's own sides, so that micrometre and metre grids are judged alike.
        if sides_mm.min() <= 0 or abs(np.linalg.det(affine[:3, :3] / sides_mm)) < 1e-6:
            raise ValueError("the affine is singular: its axes do not span space")
        affine.setflags(write=False)
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "affine_ras", affine)

    @classmethod
    def from_lps(cls, shape: Sequence[int], affine_lps: npt.ArrayLike) -> Self:
        """From an affine that maps indices to LPS+ mm (DICOM, ITK)."""
        return cls(_triple(shape), _LPS_FROM_RAS @ np.asarray(affine_lps, dtype=np.float64))

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """The inverse of `to_json`."""
        return cls(_triple(value["shape"]), np.asarray(value["affine_ras"], dtype=np.float64))

    def to_json(self) -> dict[str, Any]:
        """A JSON value that `from_json` restores to the last bit."""
        return {"shape": list(self.shape), "affine_ras": self.affine_ras.tolist()}

    @cached_property
    def affine_lps(self) -> Floats:
        """Index to LPS+ mm (DICOM, ITK)."""
        return np.asarray(_LPS_FROM_RAS @ self.affine_ras)

    @cached_property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance between neighbouring voxel centres along i, j and k; `orthogonal` has a sheared stack's height."""
        i, j, k = np.linalg.norm(self.affine_ras[:3, :3], axis=0)
        return float(i), float(j), float(k)

    @property
    def direction_ras(self) -> Floats:
        """3x3, columns are the unit vectors of i, j and k."""
        return np.asarray(self.affine_ras[:3, :3] / np.asarray(self.spacing_mm))

    @property
    def origin_ras_mm(self) -> Floats:
        """Centre of voxel (0, 0, 0)."""
        return self.affine_ras[:3, 3]

    @property
    def extent_mm(self) -> tuple[float, float, float]:
        """Edges of the box that the voxels fill, outer face to outer face; one edge of a sheared box leans."""
        i, j, k = (n * s for n, s in zip(self.shape, self.spacing_mm, strict=True))
        return i, j, k

    @property
    def voxel_volume_mm3(self) -> float:
        """Volume of one voxel (right for sheared grids too)."""
        return float(abs(np.linalg.det(self.affine_ras[:3, :3])))

    @cached_property
    def is_sheared(self) -> bool:
        """Whether two axes are off the right angle, as in a CT with a tilted gantry."""
        return bool(self._cosines.max() > RIGHT_ANGLE)

    @cached_property
    def stack_axis(self) -> int | None:
        """Of a sheared grid, the axis along which its slices follow each other: the other two are at right angles.

        A shear about one image axis leaves two choices. Slices have like sides in their plane, so that decides, and
        then which axis runs more along the body. None when no two axes are at right angles.
        """
        i, j, k = self.spacing_mm
        unlike = (round(abs(np.log(a / b)), 2) for a, b in ((j, k), (i, k), (i, j)))
        ranks = zip(unlike, -np.abs(self.direction_ras[2]), range(3), strict=True)
        return min((rank for rank in ranks if self._cosines[rank[2]] <= RIGHT_ANGLE), default=(0, 0, None))[2]

    @property
    def shear_degrees(self) -> float:
        """By how much the stack leans from the normal of its slices; 0 for right angles."""
        axis = self.stack_axis
        lean = self._cosines.max() if axis is None else np.linalg.norm(np.delete(self._cosines, axis))
        return float(np.degrees(np.arcsin(min(1.0, float(lean))))) if self.is_sheared else 0.0

    @cached_property
    def _cosines(self) -> Floats:
        """Of the angle between the two other axes, for i, j and k."""
        i, j, k = self.direction_ras.T
        return np.abs([j @ k, i @ k, i @ j])

    @cached_property
    def axis_codes(self) -> str:
        """Where i, j and k point, to the nearest patient axis, as in 'RAS' or 'LPS'."""
        axes, signs = _closest_axes(self.direction_ras)
        return "".join((_POSITIVE_CODES if s > 0 else _NEGATIVE_CODES)[a] for a, s in zip(axes, signs, strict=True))

    def ras_from_ijk(self, points_ijk: npt.ArrayLike) -> Floats:
        """(N, 3) voxel indices, fractions allowed, to (N, 3) RAS+ mm."""
        points = np.asarray(points_ijk, dtype=np.float64)
        return np.asarray(points @ self.affine_ras[:3, :3].T + self.affine_ras[:3, 3])

    def ijk_from_ras(self, points_ras_mm: npt.ArrayLike) -> Floats:
        """(N, 3) RAS+ mm to (N, 3) voxel indices with fractions."""
        points = np.asarray(points_ras_mm, dtype=np.float64) - self.affine_ras[:3, 3]
        return np.asarray(np.linalg.solve(self.affine_ras[:3, :3], points.T).T)

    def permuted(self, order: Sequence[int]) -> Geometry:
        """The same voxels with axes in another order: new axis a is old axis `order[a]`."""
        if sorted(order) != [0, 1, 2]:
            raise ValueError(f"an axis order is a permutation of 0, 1, 2, found {tuple(order)}")
        affine = self.affine_ras.copy()
        affine[:, :3] = affine[:, list(order)]
        return Geometry(_triple([self.shape[a] for a in order]), affine)

    def flipped(self, axis: int) -> Geometry:
        """The same voxels with one axis (0, 1 or 2) counted from its other end."""
        if axis not in (0, 1, 2):
            raise ValueError(f"an axis is 0, 1 or 2, found {axis}")
        affine = self.affine_ras.copy()
        affine[:3, 3] += (self.shape[axis] - 1) * affine[:3, axis]
        affine[:3, axis] *= -1
        return Geometry(self.shape, affine)

    def oriented(self, axis_codes: str = "RAS") -> Geometry:
        """The same voxels, axes permuted and flipped so that they point along `axis_codes`.

        Raises:
            ValueError: `axis_codes` does not name each patient axis once.
        """
        wanted_axes, wanted_signs = _parse_codes(axis_codes)
        axes, signs = _closest_axes(self.direction_ras)
        order = [axes.index(a) for a in wanted_axes]
        geometry = self.permuted(order)
        for axis, old_axis in enumerate(order):
            if signs[old_axis] != wanted_signs[axis]:
                geometry = geometry.flipped(axis)
        return geometry

    def window(self, start_ijk: Sequence[int], shape: Sequence[int]) -> Geometry:
        """A box of the same lattice that begins at `start_ijk`; it may reach outside (padding)."""
        affine = self.affine_ras.copy()
        affine[:3, 3] = self.ras_from_ijk([list(start_ijk)])[0]
        return Geometry(_triple(shape), affine)

    def respaced(self, spacing_mm: Sequence[float]) -> Geometry:
        """The same box with other spacings: same centre, each side rounded to whole voxels (at least one).

        Axes whose spacing stays the same keep their voxel centres exactly.
        """
        wanted = np.asarray(spacing_mm, dtype=np.float64)
        if wanted.shape != (3,) or not (np.isfinite(wanted) & (wanted > 0)).all():
            raise ValueError(f"a spacing is three positive numbers of mm, found {tuple(spacing_mm)}")
        ratios = wanted / np.asarray(self.spacing_mm)
        ratios[np.abs(ratios - 1.0) < 1e-5] = 1.0
        shape = [max(1, round(n / r)) for n, r in zip(self.shape, ratios, strict=True)]
        first_ijk = (np.asarray(self.shape) - 1) / 2 - (np.asarray(shape) - 1) / 2 * ratios
        affine = self.affine_ras.copy()
        affine[:3, :3] *= ratios
        affine[:3, 3] = self.ras_from_ijk([first_ijk])[0]
        return Geometry(_triple(shape), affine)

    def reshaped(self, shape: Sequence[int]) -> Geometry:
        """The same box, outer face to outer face, in another number of voxels along each side."""
        ratios = np.asarray(self.shape) / np.asarray(_triple(shape))
        affine = self.affine_ras.copy()
        affine[:3, :3] *= ratios
        affine[:3, 3] = self.ras_from_ijk([ratios / 2 - 0.5])[0]
        return Geometry(_triple(shape), affine)

    def orthogonal(self) -> Geometry:
        """This grid when its axes are at right angles, else the smallest orthogonal one around it.

        The slices keep their planes, their sides and their distance along the normal; they follow each other along
        it, and are widened by whole voxels so that nothing is cut off. The centre stays where it is, so that every
        permutation and flip of this grid gives the same voxels.

        Raises:
            ValueError: no two axes are at right angles, so that no slice could be kept, or the stack leans by more
                than `MAX_SHEAR_DEG`.
        """
        if not self.is_sheared:
            return self
        if (stack := self.stack_axis) is None:
            raise ValueError(f"no two axes are at right angles: {self.describe()}")
        if self.shear_degrees > MAX_SHEAR_DEG:
            raise ValueError(f"slices lean by more than {MAX_SHEAR_DEG:g} degrees: {self.describe()}")
        matrix = self.affine_ras[:3, :3].copy()
        normal = np.cross(matrix[:, stack - 2], matrix[:, stack - 1])
        normal /= np.linalg.norm(normal)
        matrix[:, stack] = normal * (normal @ matrix[:, stack])
        drifts = np.abs(np.linalg.solve(matrix, self.affine_ras[:3, stack])) * (self.shape[stack] - 1)
        drifts[stack] = 0.0
        if drifts.max() > MAX_SIDE:
            raise ValueError(f"slices lean by {drifts.max():.2g} voxels: {self.describe()}")
        shape = np.asarray(self.shape) + np.ceil(drifts - EXACT_MOVE_VOXELS).astype(int)
        affine = np.eye(4)
        affine[:3, :3] = matrix
        affine[:3, 3] = self.ras_from_ijk([(np.asarray(self.shape) - 1) / 2])[0] - matrix @ ((shape - 1) / 2)
        return Geometry(_triple(shape.tolist()), affine)

    def difference(self, other: Geometry, *, tolerance_voxels: float = SAME_GRID_VOXELS) -> str | None:
        """None when both are the same grid; otherwise one line that shows how they differ."""
        allowed_mm = tolerance_voxels * min(self.spacing_mm)
        if self.shape == other.shape and self._corner_gap_mm(other) <= allowed_mm:
            return None
        return f"{self.describe()} against {other.describe()}"

    def describe(self) -> str:
        """One line: shape, spacing, orientation, shear, origin."""
        shape = "x".join(str(n) for n in self.shape)
        spacing = "x".join(f"{s:.4g}" for s in self.spacing_mm)
        origin = ", ".join(f"{x:.2f}" for x in self.origin_ras_mm)
        tilt = _tilt_degrees(self.direction_ras)
        oblique = "" if tilt < 0.05 else f" oblique by {tilt:.1f} degrees"
        shear = f" sheared by {self.shear_degrees:.1f} degrees" if self.is_sheared else ""
        return f"{shape} voxels of {spacing} mm, {self.axis_codes}{oblique}{shear}, first voxel at RAS ({origin}) mm"

    def axis_map(self, target: Geometry) -> AxisMap:
        """How `target`'s axes lie in this grid, when they are parallel to its axes.

        One of the two grids may be sheared and the other not, as long as they have the same slice planes.

        Raises:
            ValueError: the two grids are rotated, or sheared in another way, against each other.
        """
        matrix = np.asarray(np.linalg.solve(self.affine_ras, target.affine_ras), dtype=np.float64)
        steps = matrix[:3, :3] * np.asarray(self.spacing_mm)[:, None] / np.asarray(target.spacing_mm)
        axes, signs = _closest_axes(steps)
        ideal = np.zeros((3, 3))
        ideal[list(axes), range(3)] = signs
        stack = None
        if not _is_like(steps, ideal, matrix, target.shape):
            stack = self._sheared_along(target, axes)
            free = [] if stack is None else [stack]
            ideal[:, free] = steps[:, free]
            if stack is None or not _is_like(steps, ideal, matrix, target.shape):
                raise ValueError(f"the grids are not parallel: {self.describe()} against {target.describe()}")
        scales = [float(matrix[a, t]) for t, a in enumerate(axes)]
        offsets = [float(matrix[a, 3]) for a in axes]
        shears = [0.0 if stack in (None, t) else float(matrix[a, stack]) for t, a in enumerate(axes)]
        return AxisMap(axes, _floats(scales), _floats(offsets), target.shape, _floats(shears), stack)

    def _sheared_along(self, target: Geometry, source_axes: Triple) -> int | None:
        """The axis of `target` that is the stack axis of the one grid of the two that is sheared."""
        if self.is_sheared == target.is_sheared:
            return None
        if target.is_sheared:
            return target.stack_axis
        return None if self.stack_axis is None else source_axes.index(self.stack_axis)

    def _corner_gap_mm(self, other: Geometry) -> float:
        corners = np.stack(np.meshgrid(*[(0, n - 1) for n in self.shape], indexing="ij"), axis=-1).reshape(-1, 3)
        gaps = self.ras_from_ijk(corners) - other.ras_from_ijk(corners)
        # A single-voxel axis has no second corner, so its direction is compared as well.
        columns = self.affine_ras[:3, :3] - other.affine_ras[:3, :3]
        return float(max(np.linalg.norm(gaps, axis=1).max(), np.linalg.norm(columns, axis=0).max()))


def _closest_axes(matrix: Floats) -> tuple[Triple, Triple]:
    """The signed permutation nearest to a 3x3 matrix: per column, its row and its sign."""
    best = max(_PERMUTATIONS, key=lambda rows: sum(abs(matrix[r, c]) for c, r in enumerate(rows)))
    signs = [1 if matrix[r, c] > 0 else -1 for c, r in enumerate(best)]
    return best, _triple(signs)


_PERMUTATIONS: tuple[Triple, ...] = ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))


def _is_like(steps: Floats, ideal: Floats, matrix: Floats, target_shape: Triple) -> bool:
    """Whether unit steps are as they should be, and what is ignored moves no corner, in voxels of the source."""
    sideways = np.abs(matrix[:3, :3] * (ideal == 0)) @ (np.asarray(target_shape) - 1)
    return bool(np.abs(steps - ideal).max() <= AXIS_ALIGNED and sideways.max() <= SAME_GRID_VOXELS)


def _parse_codes(axis_codes: str) -> tuple[Triple, Triple]:
    axes, signs = [], []
    for code in axis_codes.upper():
        for letters, sign in ((_POSITIVE_CODES, 1), (_NEGATIVE_CODES, -1)):
            if code in letters:
                axes.append(letters.index(code))
                signs.append(sign)
    if sorted(axes) != [0, 1, 2] or len(axis_codes) != 3:
        raise ValueError(f"axis codes name each patient axis once, as RAS or LPS do, found '{axis_codes}'")
    return _triple(axes), _triple(signs)


def _tilt_degrees(direction: Floats) -> float:
    return float(np.degrees(np.arccos(np.clip(np.abs(direction).max(axis=0).min(), -1.0, 1.0))))


def _triple(values: Sequence[int]) -> Triple:
    if len(values) != 3:
        raise ValueError(f"three numbers are needed, found {len(values)}")
    return int(values[0]), int(values[1]), int(values[2])


def _floats(values: Sequence[float]) -> tuple[float, float, float]:
    return values[0], values[1], values[2]
