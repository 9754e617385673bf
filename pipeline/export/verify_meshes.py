"""Reads STL and glTF from their bytes, and fills each surface: a voxel is inside when a ray to its centre crosses the
surface an odd number of times.

Marching cubes put the surface between the centres of voxels, and smoothing leaves it there, so the voxels inside are
exactly the label's. Each surface must also be closed, with its triangles' outside outside, and enclose nearly the
volume of its voxels: it cuts their corners off.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from pipeline.errors import ExportError
from pipeline.export.spans import counted, voxels
from pipeline.export.verify import Piece, Verification, compare, indices_of
from pipeline.segmentation import Segmentation
from transforms.geometry import Geometry
from transforms.labels import Label

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

RAY_BESIDE_CENTRE = np.array([0.00137, 0.00291])
"""Rays run along i, this much of a voxel beside centres, because the surface's points lie on the lines through them.
It stays a tenth of a voxel away from centres; the numbers are such that no ray meets an edge."""

CELL_VOLUME = 0.42
"""Between eight voxel centres, the surface encloses at most this much of a voxel less (or half as much more) than an
eighth for each centre inside: 5/12 less where four centres lie inside of which no two are neighbours."""

COLOUR_STEPS = 0.5
VOLUME_PART = 1e9
"""Volumes are judged here by `CELL_VOLUME`, not as a part of the label's: a voxel on its own has a surface of 1/6."""

_STL_TRIANGLE = np.dtype([("normal", "<f4", 3), ("points", "<f4", (3, 3)), ("attribute", "<u2")])
_SPANS = 50_000


@dataclass(frozen=True, eq=False)
class _Mesh:
    """Points (V, 3) in LPS+ mm, no two alike, and triangles (T, 3) of points."""

    label: Label
    points_lps_mm: Floats
    triangles: Ints


def verify_stl(folder: Path, segmentation: Segmentation) -> Verification:
    """Compare a folder of STL files and its index with what was to be written.

    Raises:
        ExportError: anything differs.
    """
    index = json.loads((folder / "meshes.json").read_text(encoding="utf-8"))
    if (index["frame"], index["unit"]) != ("LPS", "mm"):
        raise ExportError("its index names another frame or unit than LPS and mm")
    by_id = {label.id: label for label in segmentation.schema.labels}
    for row in index["meshes"]:
        label = by_id.get(row["id"])
        if label is None or (row["name"], tuple(row["colour"])) != (label.name, label.colour):
            raise ExportError(f"its index gives '{row['file']}' another id, name or colour than the schema")
    _check_absent(index["absent"], [row["id"] for row in index["meshes"]], segmentation)
    if {path.name for path in folder.iterdir()} != {"meshes.json", *(row["file"] for row in index["meshes"])}:
        raise ExportError("its files are not those of its index")
    meshes = (_read_stl(folder / row["file"], by_id[row["id"]]) for row in index["meshes"])
    return _verify(meshes, segmentation)


def verify_gltf(path: Path, segmentation: Segmentation) -> Verification:
    """Compare a binary glTF file with what was to be written: nodes, names, colours, surfaces.

    Raises:
        ExportError: anything differs.
    """
    scene = _Gltf(path.read_bytes())
    by_id = {label.id: label for label in segmentation.schema.labels}
    ids = [node["extras"]["label_id"] for node in scene.nodes]
    for label_id, node in zip(ids, scene.nodes, strict=True):
        label = by_id.get(label_id)
        if label is None or not scene.shows(node, label):
            raise ExportError(f"node '{node['name']}' has another id, name or colour than the schema")
    extras = scene.patient["extras"]
    if (extras["frame"], extras["unit"]) != ("LPS", "mm"):
        raise ExportError("it names another frame or unit than LPS and mm")
    _check_absent(extras["absent"], ids, segmentation)
    return _verify((scene.mesh(node, by_id[node["extras"]["label_id"]]) for node in scene.nodes), segmentation)


def _check_absent(absent: list[str], ids: list[int], segmentation: Segmentation) -> None:
    """Each label has one surface, or is named as absent, in the schema's order."""
    expected = [label for label in segmentation.schema.labels if label.id in ids]
    rest = [label.name for label in segmentation.schema.labels if label.id not in ids]
    if [label.id for label in expected] != ids or rest != absent:
        raise ExportError("its meshes and the labels that it says are absent are not the schema's labels in order")


def _read_stl(path: Path, label: Label) -> _Mesh:
    content = path.read_bytes()
    count = struct.unpack_from("<I", content, 80)[0]
    if len(content) != 84 + 50 * count or b"SPACE=LPS" not in content[:80] or content.startswith(b"solid"):
        raise ExportError(f"'{path.name}' is no binary STL in LPS")
    table = np.frombuffer(content, _STL_TRIANGLE, count, 84)
    corners = np.ascontiguousarray(table["points"]).reshape(-1, 3)
    # Points that are the same have the same bytes.
    order = np.lexsort(corners.T)
    is_new = np.append(True, (np.diff(corners[order], axis=0) != 0).any(axis=1))
    triangles = np.empty(len(corners), dtype=np.int64)
    triangles[order] = np.cumsum(is_new) - 1
    mesh = _Mesh(label, corners[order][is_new].astype(np.float64), triangles.reshape(-1, 3))
    areas, normals = _areas(mesh), table["normal"].astype(np.float64)
    if (np.einsum("ti,ti->t", areas, normals) < 0.99 * np.linalg.norm(areas, axis=1)).any():
        raise ExportError(f"'{path.name}' has normals that are not its triangles'")
    return mesh


class _Gltf:
    """A binary glTF document: its patient node, and the nodes of labels below it."""

    def __init__(self, content: bytes) -> None:
        magic, version, length = struct.unpack_from("<4sII", content)
        json_length, kind = struct.unpack_from("<I4s", content, 12)
        if (magic, version, length, kind) != (b"glTF", 2, len(content), b"JSON"):
            raise ExportError("it is no binary glTF 2.0")
        self._document = json.loads(content[20 : 20 + json_length])
        self._binary = content[28 + json_length :]
        [root] = self._document["scenes"][self._document["scene"]]["nodes"]
        self.patient: dict[str, Any] = self._document["nodes"][root]
        self.nodes: list[dict[str, Any]] = [self._document["nodes"][n] for n in self.patient.get("children", [])]

    def shows(self, node: dict[str, Any], label: Label) -> bool:
        """Whether a node has a label's name and colour."""
        mesh = self._document["meshes"][node["mesh"]]
        [primitive] = mesh["primitives"]
        material = self._document["materials"][primitive["material"]]
        linear = np.array(material["pbrMetallicRoughness"]["baseColorFactor"])
        # IEC 61966-2-1
        colour = 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * np.abs(linear) ** (1 / 2.4) - 0.055)
        is_like = np.abs(colour - (*label.colour, 255)).max() <= COLOUR_STEPS
        return bool(is_like) and {node["name"], mesh["name"], material["name"]} == {label.name}

    def mesh(self, node: dict[str, Any], label: Label) -> _Mesh:
        """A node's surface, put back from glTF's metres (left, superior, anterior) to LPS+ mm."""
        [primitive] = self._document["meshes"][node["mesh"]]["primitives"]
        attributes = primitive["attributes"]
        points, triangles = self._array(attributes["POSITION"], 3), self._array(primitive["indices"], 1)
        accessor = self._document["accessors"][attributes["POSITION"]]
        if accessor["min"] != points.min(axis=0).tolist() or accessor["max"] != points.max(axis=0).tolist():
            raise ExportError(f"the mesh of '{label.name}' lies outside its bounds")
        matrix = np.reshape(self.patient["matrix"], (4, 4)).T
        left, superior, anterior = 1000.0 * (points.astype(np.float64) @ matrix[:3, :3].T + matrix[:3, 3]).T
        mesh = _Mesh(label, np.stack([left, -anterior, superior], axis=1), triangles.astype(np.int64).reshape(-1, 3))
        # Normals turn with the points: the node's matrix scales all axes alike.
        normals = self._array(attributes["NORMAL"], 3).astype(np.float64) @ matrix[:3, :3].T * 1000.0
        _check_normals(mesh, normals[:, [0, 2, 1]] * (1, -1, 1))
        return mesh

    def _array(self, number: int, width: int) -> npt.NDArray[Any]:
        accessor = self._document["accessors"][number]
        view = self._document["bufferViews"][accessor["bufferView"]]
        dtype = {5126: "<f4", 5125: "<u4"}[accessor["componentType"]]
        count = accessor["count"] * width
        if {"VEC3": 3, "SCALAR": 1}[accessor["type"]] != width or view["byteLength"] != 4 * count:
            raise ExportError("an array has another shape than its mesh needs")
        return np.frombuffer(self._binary, dtype, count, view["byteOffset"]).reshape(-1, width)


def _areas(mesh: _Mesh) -> Floats:
    """(T, 3): each triangle's area times twice its outward unit vector."""
    a, b, c = (mesh.points_lps_mm[mesh.triangles[:, n]] for n in range(3))
    return np.asarray(np.cross(b - a, c - a))


def _check_normals(mesh: _Mesh, normals: Floats) -> None:
    sums = np.zeros_like(mesh.points_lps_mm)
    areas = _areas(mesh)
    for corner in range(3):
        np.add.at(sums, mesh.triangles[:, corner], areas)
    along = np.einsum("vi,vi->v", sums, normals)
    is_unit = np.abs(np.linalg.norm(normals, axis=1) - 1.0).max() < 1e-3
    if not is_unit or (along < 0.99 * np.linalg.norm(sums, axis=1)).any():
        raise ExportError(f"the mesh of '{mesh.label.name}' has normals that are not its surface's")


def _verify(meshes: Iterator[_Mesh], segmentation: Segmentation) -> Verification:
    pieces = _pieces(meshes, segmentation)
    return compare(pieces, segmentation, reader="bytes", placing_voxels=0.02, volume_part=VOLUME_PART)


def _pieces(meshes: Iterator[_Mesh], segmentation: Segmentation) -> Iterator[Piece]:
    geometry, schema = segmentation.geometry, segmentation.schema
    boxes = ndimage.find_objects(schema.classes_from_ids(segmentation.label_map), max_label=len(schema.labels))
    for mesh in meshes:
        _check_closed(mesh)
        box = boxes[schema.ids.index(mesh.label.id)]
        cells = 0 if box is None else _mixed_cells(segmentation.label_map[box] == mesh.label.id)
        spans = _spans(indices_of(mesh.points_lps_mm, geometry), mesh, geometry)
        count = int((spans[:, 3] - spans[:, 2]).sum())
        volume_mm3 = _volume_mm3(mesh)
        slack_mm3 = CELL_VOLUME * cells * geometry.voxel_volume_mm3
        if volume_mm3 <= 0 or abs(volume_mm3 - count * geometry.voxel_volume_mm3) > slack_mm3:
            raise ExportError(
                f"the mesh of '{mesh.label.name}' encloses {volume_mm3:.1f} mm3 "
                f"({count * geometry.voxel_volume_mm3:.1f} within {slack_mm3:.1f} expected)"
            )
        for start in range(0, len(spans), _SPANS):
            points_ijk = voxels(spans[start : start + _SPANS])
            points_lps_mm = points_ijk @ geometry.affine_lps[:3, :3].T + geometry.affine_lps[:3, 3]
            yield Piece(mesh.label.id, points_lps_mm, volume_mm3 / max(count, 1))


def _check_closed(mesh: _Mesh) -> None:
    """Each edge belongs to two triangles, which run through it in opposite directions."""
    a, b, c = mesh.triangles.T
    starts, ends = np.concatenate([a, b, c]), np.concatenate([b, c, a])
    count = len(mesh.points_lps_mm)
    there, back = np.sort(starts * count + ends), np.sort(ends * count + starts)
    if not np.array_equal(there, back) or (np.diff(there) == 0).any() or (starts == ends).any():
        raise ExportError(f"the mesh of '{mesh.label.name}' is not closed")


def _volume_mm3(mesh: _Mesh) -> float:
    """Divergence theorem; positive when the triangles' outside is outside."""
    points = mesh.points_lps_mm - mesh.points_lps_mm.mean(axis=0)
    a, b, c = (points[mesh.triangles[:, n]] for n in range(3))
    return float(np.einsum("ti,ti->", a, np.cross(b, c))) / 6


def _mixed_cells(mask: npt.NDArray[np.bool_]) -> int:
    """How many cubes of eight neighbouring voxel centres lie partly inside."""
    some = every = np.pad(mask, 1)
    for _ in range(3):
        # Each axis in turn is the last one.
        some, every = np.moveaxis(some, 0, -1), np.moveaxis(every, 0, -1)
        some, every = some[..., :-1] | some[..., 1:], every[..., :-1] & every[..., 1:]
    return int((some & ~every).sum())


def _spans(points_ijk: Floats, mesh: _Mesh, geometry: Geometry) -> Ints:
    """(N, 4): k, j, and the first i inside and the first one after, along all rays that cross the surface."""
    triangle, j, k = _candidates(points_ijk[:, 1:] - RAY_BESIDE_CENTRE, mesh.triangles)
    corners = mesh.triangles[triangle]
    rays = np.stack([j, k], axis=1) + RAY_BESIDE_CENTRE
    sides = np.stack([_is_left(points_ijk, corners[:, n], corners[:, (n + 1) % 3], rays) for n in range(3)])
    is_hit = (sides[0] == sides[1]) & (sides[1] == sides[2])
    corners, rays, j, k = corners[is_hit], rays[is_hit], j[is_hit], k[is_hit]
    a, b, c = (points_ijk[corners[:, n]] for n in range(3))
    areas = np.cross(b - a, c - a)
    i = a[:, 0] - ((rays - a[:, 1:]) * areas[:, 1:]).sum(axis=1) / areas[:, 0]
    order = np.lexsort((i, j, k))
    enter, leave = order[0::2], order[1::2]
    # Where a ray enters, the surface's outside looks back along it.
    outwards = np.sign(areas[:, 0]) * np.sign(np.linalg.det(geometry.affine_lps[:3, :3]))
    is_paired = len(enter) == len(leave) and bool(((j[enter] == j[leave]) & (k[enter] == k[leave])).all())
    if not is_paired or (outwards[enter] >= 0).any() or (outwards[leave] <= 0).any():
        raise ExportError(f"the mesh of '{mesh.label.name}' is turned inside out, or crosses itself")
    columns = np.ceil(i).astype(np.int64)
    return np.stack([k[enter], j[enter], columns[enter], columns[leave]], axis=1)


def _candidates(points_jk: Floats, triangles: Ints) -> tuple[Ints, Ints, Ints]:
    """The rays in the rectangle around each triangle, as triangle, j and k."""
    corners = points_jk[triangles]
    low, high = np.ceil(corners.min(axis=1)).astype(np.int64), np.floor(corners.max(axis=1)).astype(np.int64) + 1
    triangle, j = counted(low[:, 0], high[:, 0])
    nth, k = counted(low[triangle, 1], high[triangle, 1])
    return triangle[nth], j[nth], k


def _is_left(points_ijk: Floats, start: Ints, end: Ints, rays: Floats) -> npt.NDArray[np.bool_]:
    """On which side of an edge a ray runs. Two triangles with this edge get opposite answers, to the last bit."""
    is_turned = start > end
    first, last = np.where(is_turned, end, start), np.where(is_turned, start, end)
    origin = points_ijk[first, 1:]
    along, aside = points_ijk[last, 1:] - origin, rays - origin
    return np.asarray((along[:, 0] * aside[:, 1] - along[:, 1] * aside[:, 0] > 0) != is_turned)
