"""Cases -> Fingerprint: measured on the same pass over the files as the check."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pipeline.errors import PlanError
from pipeline.manifest import Case, Channel, Manifest
from pipeline.plan import CaseFingerprint, ChannelFingerprint, Fingerprint

if TYPE_CHECKING:
    from transforms.geometry import Geometry
    from transforms.labels import LabelSchema
    from transforms.volume import Volume

SAMPLES_PER_CASE = 10_000
"""Voxels inside labels that each case adds to the pooled intensities, evenly spaced through the volume."""


@dataclass(frozen=True, eq=False)
class ChannelMeasure:
    """One channel of one case, in the file's unit."""

    inside: npt.NDArray[np.float32]
    lowest: float
    highest: float
    zero_share: float


@dataclass(frozen=True, eq=False)
class CaseMeasure:
    """One annotated case; None stands for a channel that it lacks."""

    facts: CaseFingerprint
    channels: tuple[ChannelMeasure | None, ...]


class Measuring:
    """Collects a `CaseMeasure` for each annotated case; hand `visit` to `pipeline.checks.check_dataset`."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._measures: dict[str, CaseMeasure] = {}
        self._annotated: dict[str, tuple[str, ...]] = {}

    def visit(self, case: Case, images: Sequence[Volume | None], label: Volume | None) -> None:
        """Measure one case; cases without a label have nothing to say to the planner."""
        if label is not None:
            schema = self._manifest.labels
            self._measures[case.case_id] = measure_case(case, images, label, schema=schema)
            self._annotated[case.case_id] = schema.names if case.annotated is None else case.annotated

    def fingerprint(self, case_ids: Sequence[str]) -> Fingerprint:
        """What the planner needs of the named cases, in the order of their names.

        A channel is measured on the cases that have it.

        Raises:
            PlanError: none of them could be measured, a channel is in none of them, or a label annotated in none.
        """
        measures = [self._measures[i] for i in sorted(case_ids) if i in self._measures]
        if not measures:
            raise PlanError("there is no annotated case to plan from; run `volseg check` on the manifest")
        schema = self._manifest.labels
        known = {name for case_id in case_ids for name in self._annotated.get(case_id, ())}
        if unknown := [name for name in schema.names if name not in known]:
            raise PlanError(
                f"none of the {len(measures)} training cases has {', '.join(unknown)} annotated, so it cannot be "
                "learnt; add a case that has, or take the label out of the manifest"
            )
        return Fingerprint(
            channels=tuple(
                _pool(channel, [m.channels[c] for m in measures]) for c, channel in enumerate(self._manifest.channels)
            ),
            class_count=schema.class_count,
            regions=tuple(region.name for region in schema.regions),
            has_twins=any(label.twin is not None for label in schema.labels),
            cases=tuple(m.facts for m in measures),
        )


def measure_case(case: Case, images: Sequence[Volume | None], label: Volume, *, schema: LabelSchema) -> CaseMeasure:
    """Grid, labels and intensities of one case, on RAS axes; those of the orthogonal grid around a sheared one.

    `label` holds the schema's ids; voxels that are to be ignored are no part of any figure but the grid's.
    """
    geometry = label.geometry
    label_map = label.voxels if schema.ignore is None else np.where(label.voxels == schema.ignore, 0, label.voxels)
    straight = geometry.orthogonal()
    oriented = straight.oriented("RAS")
    names = {x.id: x.name for x in schema.labels}
    extents, volumes = {}, {}
    for label_id, (count, sides) in _boxes(label_map, geometry, straight).items():
        volumes[names[label_id]] = count * geometry.voxel_volume_mm3
        extents[names[label_id]] = _on_ras_axes(sides, straight)
    facts = CaseFingerprint(
        case_id=case.case_id,
        shape=oriented.shape,
        spacing_mm=_rounded(oriented.spacing_mm),
        label_volumes_mm3=volumes,
        label_extents_mm=extents,
    )
    inside = np.flatnonzero(label_map)
    thinned = inside[:: max(1, len(inside) // SAMPLES_PER_CASE)]
    channels = tuple(None if image is None else _measure_channel(image.voxels, thinned) for image in images)
    return CaseMeasure(facts, channels)


def _measure_channel(voxels: npt.NDArray[np.float32], places: npt.NDArray[np.intp]) -> ChannelMeasure:
    return ChannelMeasure(
        inside=voxels.reshape(-1)[places].astype(np.float32),
        lowest=float(voxels.min()),
        highest=float(voxels.max()),
        zero_share=float((voxels == 0).mean()),
    )


def _boxes(
    label_map: npt.NDArray[np.integer], geometry: Geometry, straight: Geometry
) -> dict[int, tuple[int, npt.NDArray[np.float64]]]:
    """Per label id: its number of voxels, and the sides of its box in voxels of `straight`."""
    places = np.flatnonzero(label_map)
    ids = label_map.reshape(-1)[places]
    steps = np.round(np.linalg.solve(straight.affine_ras[:3, :3], geometry.affine_ras[:3, :3]), 9)
    boxes = {}
    for label_id in np.unique(ids):
        i, j, k = np.unravel_index(places[ids == label_id], label_map.shape)
        # Off the diagonal there is only the shift of slices, if there is one.
        sides = [np.ptp(sum(n * step for n, step in zip((i, j, k), row, strict=True) if step)) + 1 for row in steps]
        boxes[int(label_id)] = (len(i), np.asarray(sides))
    return boxes


def _on_ras_axes(sides_ijk: npt.NDArray[np.float64], geometry: Geometry) -> tuple[float, float, float]:
    sides_mm = sides_ijk * geometry.spacing_mm
    x, y, z = (round(float(sides_mm[_axis_along(pair, geometry)]), 4) for pair in ("RL", "AP", "SI"))
    return x, y, z


def _axis_along(pair: str, geometry: Geometry) -> int:
    return next(axis for axis, code in enumerate(geometry.axis_codes) if code in pair)


def _pool(channel: Channel, of_cases: Sequence[ChannelMeasure | None]) -> ChannelFingerprint:
    measures = [measure for measure in of_cases if measure is not None]
    if not measures:
        raise PlanError(
            f"none of the {len(of_cases)} training cases has the channel '{channel.name}', so nothing can be learnt "
            "of it; add a case that has it, or take it out of the manifest's channels"
        )
    inside = np.concatenate([m.inside for m in measures]).astype(np.float64)
    low, high = np.percentile(inside, [0.5, 99.5]) if len(inside) else (0.0, 0.0)
    return ChannelFingerprint.model_validate(
        {
            "name": channel.name,
            "modality": channel.modality,
            "optional": channel.optional,
            "case_count": len(measures),
            "lowest": float(np.median([m.lowest for m in measures])),
            "highest": float(np.median([m.highest for m in measures])),
            "zero_share": round(float(np.mean([m.zero_share for m in measures])), 6),
            "inside_percentile_00_5": float(low),
            "inside_percentile_99_5": float(high),
            "inside_mean": float(inside.mean()) if len(inside) else 0.0,
            "inside_deviation": float(inside.std()) if len(inside) else 0.0,
        }
    )


def _rounded(spacing_mm: tuple[float, float, float]) -> tuple[float, float, float]:
    """Headers hold float32, so spacings that were meant alike differ in the seventh digit."""
    i, j, k = (round(s, 5) for s in spacing_mm)
    return i, j, k
