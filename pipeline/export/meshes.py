"""Meshes of the labels that occur: a folder of STL files, or one coloured glTF file. No triangle is merged away.

STL knows neither unit nor frame. Points are mm, LPS+ as in DICOM: that is what 3D Slicer takes STL for, and the
header says SPACE=LPS, which it reads. The folder's `meshes.json` tells which label each file is, and which labels do
not occur; so an empty result is a folder too.

glTF (2.0, Khronos; ISO/IEC 12113) is in metres, right-handed, with +Y up and the front towards +Z. Radiologists
expect mm, but viewers know metres only. So points stay in LPS+ mm, and one node around all meshes turns and scales
them: +X is the patient's left, +Y superior, +Z anterior. An empty result is a scene with that node alone.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.export.mesh_surface import Surface, surfaces
from pipeline.files import safe_name, write_json
from pipeline.segmentation import Segmentation
from transforms.labels import Label

Floats = npt.NDArray[np.float64]

INDEX = "meshes.json"
"""The file that names the meshes of a folder."""

STL_HEADER = b"volseg SPACE=LPS UNIT=mm"
"""80 bytes, filled up with spaces; must not begin with 'solid', which announces text."""

METRES_FROM_LPS_MM = (
    (0.001, 0.0, 0.0, 0.0),
    (0.0, 0.0, 0.001, 0.0),
    (0.0, -0.001, 0.0, 0.0),
    (0.0, 0.0, 0.0, 1.0),
)
"""Rows of the matrix that takes LPS+ mm to glTF's metres: (left, superior, anterior)."""

_STL_TRIANGLE = np.dtype([("normal", "<f4", 3), ("points", "<f4", (3, 3)), ("attribute", "<u2")])
_LONGEST_NAME = 100
_FLOAT, _UNSIGNED_INT = 5126, 5125
_VERTICES, _INDICES = 34962, 34963


def write_stl(folder: Path, segmentation: Segmentation, *, smoothing: int = 0) -> None:
    """Write a binary STL file a label that occurs, and the index, into a folder that is there."""
    names = file_names(segmentation.schema.labels)
    rows = []
    for label, surface in surfaces(segmentation, smoothing=smoothing):
        (folder / names[label.id]).write_bytes(stl_bytes(surface))
        about = {"file": names[label.id], "id": label.id, "name": label.name, "colour": list(label.colour)}
        rows.append({**about, "triangles": len(surface.triangles)})
    present = {row["id"] for row in rows}
    absent = [label.name for label in segmentation.schema.labels if label.id not in present]
    write_json(
        folder / INDEX,
        {"frame": "LPS", "unit": "mm", "smoothing_rounds": smoothing, "meshes": rows, "absent": absent},
    )


def file_names(labels: Iterable[Label]) -> dict[int, str]:
    """A file name a label id, from its name; unique where case does not count. The id is added where it must be."""
    names: dict[int, str] = {}
    taken: set[str] = set()
    for label in labels:
        stem = safe_name(label.name)[:_LONGEST_NAME]
        while stem.casefold() in taken:
            stem = f"{stem}_{label.id}"
        taken.add(stem.casefold())
        names[label.id] = f"{stem}.stl"
    return names


def stl_bytes(surface: Surface) -> bytes:
    """Binary STL: header, count, and per triangle its normal, its three points and two bytes that mean nothing."""
    corners = surface.points_lps_mm[surface.triangles]
    table = np.zeros(len(corners), dtype=_STL_TRIANGLE)
    table["normal"] = _unit(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]))
    table["points"] = corners
    return STL_HEADER.ljust(80) + struct.pack("<I", len(table)) + table.tobytes()


def _unit(vectors: Floats) -> Floats:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))


def write_gltf(target: Path, segmentation: Segmentation, *, smoothing: int = 0) -> None:
    """Write one binary glTF file: a node, a mesh and a material a label that occurs, with its name and colour."""
    scene = _Scene()
    for label, surface in surfaces(segmentation, smoothing=smoothing):
        scene.add(label, surface)
    absent = [x.name for x in segmentation.schema.labels if x.id not in scene.label_ids]
    target.write_bytes(scene.to_bytes({"frame": "LPS", "unit": "mm", "smoothing_rounds": smoothing, "absent": absent}))


class _Scene:
    """A glTF document that grows label by label; its arrays lie one after the other in one buffer."""

    def __init__(self) -> None:
        self.label_ids: set[int] = set()
        self._lists: dict[str, list[dict[str, Any]]] = {}
        self._content: list[bytes] = []
        self._length = 0

    def add(self, label: Label, surface: Surface) -> None:
        self.label_ids.add(label.id)
        points = surface.points_lps_mm.astype("<f4")
        bounds = {"min": points.min(axis=0).tolist(), "max": points.max(axis=0).tolist()}
        normals = _normals(surface).astype("<f4")
        indices = surface.triangles.astype("<u4").ravel()
        primitive = {
            "attributes": {
                "POSITION": self._array(points, _VERTICES, {"componentType": _FLOAT, "type": "VEC3", **bounds}),
                "NORMAL": self._array(normals, _VERTICES, {"componentType": _FLOAT, "type": "VEC3"}),
            },
            "indices": self._array(indices, _INDICES, {"componentType": _UNSIGNED_INT, "type": "SCALAR"}),
            "material": self._append("materials", _material(label)),
        }
        mesh = self._append("meshes", {"name": label.name, "primitives": [primitive]})
        self._append("nodes", {"name": label.name, "mesh": mesh, "extras": {"label_id": label.id}})

    def to_bytes(self, extras: dict[str, Any]) -> bytes:
        nodes = self._lists.get("nodes", [])
        patient: dict[str, Any] = {"name": "patient", "matrix": np.ravel(METRES_FROM_LPS_MM, "F").tolist()}
        if nodes:
            patient["children"] = list(range(len(nodes)))
        document: dict[str, Any] = {
            "asset": {"version": "2.0", "generator": "volseg"},
            "scene": 0,
            "scenes": [{"nodes": [len(nodes)]}],
            **self._lists,
            "nodes": [*nodes, {**patient, "extras": extras}],
        }
        binary = b""
        # glTF allows neither empty lists nor empty buffers.
        if self._length:
            document["buffers"] = [{"byteLength": self._length}]
            binary = _chunk(b"BIN\0", b"".join(self._content))
        chunks = _chunk(b"JSON", json.dumps(document, ensure_ascii=False).encode(), b" ") + binary
        return b"glTF" + struct.pack("<II", 2, 12 + len(chunks)) + chunks

    def _append(self, kind: str, item: dict[str, Any]) -> int:
        self._lists.setdefault(kind, []).append(item)
        return len(self._lists[kind]) - 1

    def _array(self, values: npt.NDArray[Any], target: int, about: dict[str, Any]) -> int:
        content = values.tobytes()
        place = {"buffer": 0, "byteOffset": self._length, "byteLength": len(content), "target": target}
        self._content.append(content)
        self._length += len(content)
        return self._append(
            "accessors", {"bufferView": self._append("bufferViews", place), "count": len(values), **about}
        )


def _chunk(kind: bytes, content: bytes, filler: bytes = b"\0") -> bytes:
    content += filler * (-len(content) % 4)
    return struct.pack("<I", len(content)) + kind + content


def _normals(surface: Surface) -> Floats:
    """(V, 3) unit vectors: the mean of the triangles around each point, weighted by area."""
    a, b, c = (surface.points_lps_mm[surface.triangles[:, n]] for n in range(3))
    areas = np.repeat(np.cross(b - a, c - a), 3, axis=0)
    corner = surface.triangles.ravel()
    sums = [np.bincount(corner, weights=areas[:, n], minlength=len(surface.points_lps_mm)) for n in range(3)]
    return _unit(np.stack(sums, axis=1))


def _material(label: Label) -> dict[str, Any]:
    return {
        "name": label.name,
        "pbrMetallicRoughness": {
            "baseColorFactor": [*(_linear(step) for step in label.colour), 1.0],
            "metallicFactor": 0.0,
            "roughnessFactor": 0.7,
        },
    }


def _linear(step: int) -> float:
    """A step of 255 of an sRGB colour to the linear light that glTF wants (IEC 61966-2-1)."""
    value = step / 255
    return value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4
