"""Meshes: read by trimesh, which shares nothing with the writer or its verifier, worked out by hand, tampered with."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import trimesh
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.errors import ExportError
from pipeline.export import Options, Source, export
from pipeline.export.mesh_surface import surface_of, surfaces
from pipeline.export.meshes import file_names, write_gltf, write_stl
from pipeline.export.verify_meshes import CELL_VOLUME, verify_gltf, verify_stl
from pipeline.segmentation import Algorithm, Segmentation
from transforms.geometry import Geometry
from transforms.labels import Label, LabelSchema, schema_from_names

ORIENTATIONS = ["axial", "coronal", "sagittal", "upside down", "oblique"]
SHEARED = np.array([[0.7, 0.2, 0, -30], [0.1, 1.1, -0.5, 12], [0, 0.4, 3.5, 40], [0, 0, 0, 1.0]])


def grid(shape: tuple[int, ...], affine_lps: Any = None) -> Geometry:
    return Geometry.from_lps(shape, np.eye(4) if affine_lps is None else affine_lps)


def segmentation_on(labels: np.ndarray, affine_lps: Any = None) -> Segmentation:
    ids = {int(i): f"label {i}" for i in np.unique(labels) if i} or {1: "label 1"}
    return Segmentation(labels, grid(labels.shape, affine_lps), schema_from_names(ids), Algorithm("phantom", "1"))


def as_trimesh(surface: Any) -> trimesh.Trimesh:
    return trimesh.Trimesh(surface.points_lps_mm, surface.triangles, process=False)


def check_surface(mesh: trimesh.Trimesh) -> None:
    assert mesh.is_watertight
    assert mesh.is_winding_consistent
    assert mesh.volume > 0


def noise(shape: tuple[int, ...] = (9, 8, 7), part: float = 0.4) -> np.ndarray:
    rng = np.random.default_rng(5)
    return (rng.random(shape) < part) * rng.integers(1, 3, shape).astype(np.uint8)


def ball() -> tuple[np.ndarray, np.ndarray]:
    """A ball of 17 mm around (20, 20, 20) mm on voxels of 1 x 1 x 2.5 mm."""
    i, j, k = np.indices((40, 40, 16))
    return (i - 20) ** 2 + (j - 20) ** 2 + (2.5 * (k - 8)) ** 2 < 17**2, np.diag([1, 1, 2.5, 1.0])


def test_one_voxel_is_an_octahedron_of_a_sixth() -> None:
    surface = surface_of(np.ones((1, 1, 1), dtype=bool), (3, 4, 5), grid((9, 9, 9)))
    expected = np.array([3, 4, 5]) + np.concatenate([np.eye(3), -np.eye(3)]) / 2
    assert sorted(surface.points_lps_mm.tolist()) == sorted(expected.tolist())
    assert len(surface.triangles) == 8
    assert as_trimesh(surface).volume == pytest.approx(1 / 6)


@pytest.mark.parametrize("flip", [1, -1], ids=["right-handed", "left-handed"])
def test_the_outside_is_outside_on_any_grid(flip: int) -> None:
    affine = SHEARED @ np.diag([flip, 1, 1, 1])
    for _, surface in surfaces(segmentation_on(noise(), affine)):
        check_surface(as_trimesh(surface))


def test_voxels_that_touch_at_an_edge_or_corner_are_not_joined() -> None:
    mask = np.zeros((2, 2, 4), dtype=bool)
    mask[0, 0, 0] = mask[1, 1, 0] = mask[0, 0, 3] = mask[1, 1, 2] = True
    mesh = as_trimesh(surface_of(mask, (0, 0, 0), grid(mask.shape)))
    check_surface(mesh)
    assert mesh.body_count == 4


def mixed_cells(mask: np.ndarray) -> int:
    cells = np.lib.stride_tricks.sliding_window_view(np.pad(mask, 1), (2, 2, 2)).sum(axis=(3, 4, 5))
    return int(((cells > 0) & (cells < 8)).sum())


def test_the_bound_on_volume_holds_for_all_kinds_of_cells() -> None:
    for code in range(1, 256):
        mask = np.array([code >> bit & 1 for bit in range(8)], dtype=bool).reshape(2, 2, 2)
        for kind in (mask, np.pad(mask, 2, constant_values=True)):
            volume = as_trimesh(surface_of(kind, (0, 0, 0), grid(kind.shape))).volume
            assert abs(volume - kind.sum()) <= CELL_VOLUME * mixed_cells(kind)


def test_the_bound_on_volume_is_met_where_no_two_voxels_are_neighbours() -> None:
    """Each voxel of a checkerboard is an octahedron of 1/6; a cell has four of them, and a voxel is in eight cells."""
    mask = np.indices((20, 20, 20)).sum(axis=0) % 2 == 0
    missing = mask.sum() - as_trimesh(surface_of(mask, (0, 0, 0), grid(mask.shape))).volume
    assert missing == pytest.approx(mask.sum() * 5 / 6)
    inner_cells = 19**3
    assert 0.9 * CELL_VOLUME * inner_cells < missing * (19 / 20) ** 3 <= CELL_VOLUME * mixed_cells(mask)


@pytest.mark.parametrize("rounds", [1, 30])
def test_smoothing_keeps_volume_and_separates_the_same_centres(rounds: int, tmp_path: Path) -> None:
    segmentation = segmentation_on(noise(), SHEARED)
    rough = [as_trimesh(surface) for _, surface in surfaces(segmentation)]
    smooth = [as_trimesh(surface) for _, surface in surfaces(segmentation, smoothing=rounds)]
    for before, after in zip(rough, smooth, strict=True):
        check_surface(after)
        assert after.volume == pytest.approx(before.volume, rel=1e-5)
        assert not np.allclose(before.vertices, after.vertices)
    write_gltf(tmp_path / "x.glb", segmentation, smoothing=rounds)
    assert {label.dice for label in verify_gltf(tmp_path / "x.glb", segmentation).labels} == {1.0}


def test_smoothing_makes_a_ball_rounder() -> None:
    mask, affine = ball()
    spread, area = [], []
    for rounds in (0, 10, 40):
        surface = surface_of(mask, (0, 0, 0), grid(mask.shape, affine), smoothing=rounds)
        spread.append(np.linalg.norm(surface.points_lps_mm - 20.0, axis=1).std())
        area.append(as_trimesh(surface).area / (4 * np.pi * 17**2))
    assert spread[0] > 0.35 > 0.29 > spread[1] > 0.23 > spread[2]
    assert area[0] > 1.12 > 1.05 > area[1] > 1.03 > area[2] > 0.99


@pytest.mark.parametrize("rounds", [0, 12])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_trimesh_reads_the_same_surfaces(
    phantoms: SimpleNamespace, tmp_path: Path, orientation: str, rounds: int
) -> None:
    source = phantoms.source_of(phantoms.write_series(tmp_path / "in", orientation))
    segmentation, options = phantoms.segmentation_of(source), Options(smoothing=rounds)
    stl, gltf = export(segmentation, formats=["stl", "gltf"], out=tmp_path, name="x", source=source, options=options)
    scene = trimesh.load_scene(gltf.path)
    assert list(scene.geometry) == ["Höcker", "Right half"]
    centre = np.linalg.inv(segmentation.geometry.affine_lps)
    for label, file in zip(segmentation.schema.labels[:2], ["H_cker.stl", "Right_half.stl"], strict=True):
        mesh = trimesh.load_mesh(stl.path / file)
        check_surface(mesh)
        indices = trimesh.transform_points(mesh.vertices, centre)
        occupied = np.argwhere(segmentation.mask(label.id))
        assert (indices.min(axis=0) > occupied.min(axis=0) - 1).all()
        assert (indices.max(axis=0) < occupied.max(axis=0) + 1).all()
        assert np.abs(indices.mean(axis=0) - occupied.mean(axis=0)).max() < 0.5
        [node] = [name for name in scene.graph.nodes_geometry if scene.graph[name][1] == label.name]
        placed = scene.geometry[label.name].copy().apply_transform(scene.graph[node][0])
        left, superior, anterior = placed.vertices.T * 1000.0
        assert np.allclose(np.sort(np.stack([left, -anterior, superior], axis=1), axis=0), sorted_points(mesh))
        assert placed.volume * 1e9 == pytest.approx(mesh.volume, rel=1e-4)


def sorted_points(mesh: trimesh.Trimesh) -> np.ndarray:
    return np.sort(mesh.vertices, axis=0)


def test_trimesh_reads_the_colours(phantom: Segmentation, source: Source, tmp_path: Path) -> None:
    [file] = export(phantom, formats=["gltf"], out=tmp_path, name="x", source=source)
    for label in phantom.schema.labels[:2]:
        material = trimesh.load_scene(file.path).geometry[label.name].visual.material
        assert material.metallicFactor == 0
        linear = np.array(material.baseColorFactor[:3], dtype=float) / 255
        # trimesh keeps linear light in steps of 255.
        assert np.abs(255 * linear ** (1 / 2.2) - label.colour).max() < 4


def test_a_real_series(hippocrop: Source, tmp_path: Path) -> None:
    i, j, k = np.indices(hippocrop.image.geometry.shape)
    distance = ((i - 16) / 9) ** 2 + ((j - 25) / 17) ** 2 + ((k - 20) / 7) ** 2
    labels = np.where(distance < 1, np.where(distance < 0.2, 0, 1), 0).astype(np.uint8)
    segmentation = Segmentation(labels, hippocrop.image.geometry, schema_from_names({1: "shell"}), Algorithm("a", "1"))
    [stl] = export(segmentation, formats=["stl"], out=tmp_path, name="x", source=hippocrop)
    mesh = trimesh.load_mesh(stl.path / "shell.stl")
    check_surface(mesh)
    assert mesh.body_count == 2  # the shell's outside and its inside
    assert mesh.volume == pytest.approx(labels.sum(), rel=0.01)  # voxels of 1 mm3


def test_surfaces_are_closed_at_the_volume_s_border() -> None:
    mesh = as_trimesh(surface_of(np.ones((3, 4, 5), dtype=bool), (0, 0, 0), grid((3, 4, 5))))
    check_surface(mesh)
    assert np.array_equal(mesh.bounds, [[-0.5] * 3, [2.5, 3.5, 4.5]])


def test_an_empty_result(phantoms: SimpleNamespace, source: Source, tmp_path: Path) -> None:
    empty = phantoms.segmentation_of(source, np.zeros_like(phantoms.label_map()))
    stl, gltf = export(empty, formats=["stl", "gltf"], out=tmp_path, name="x", source=source)
    assert [path.name for path in stl.path.iterdir()] == ["meshes.json"]
    index = json.loads((stl.path / "meshes.json").read_text(encoding="utf-8"))
    assert (index["meshes"], index["absent"]) == ([], ["Höcker", "Right half", "Nowhere"])
    assert len(trimesh.load_scene(gltf.path).geometry) == 0


def test_names_of_files_are_unique_where_case_does_not_count() -> None:
    names = ["a b", "a_b", "A_B", "a_b_2", "../x", "n" * 300]
    labels = [Label(id=n, name=name, colour=(0, 0, 0)) for n, name in enumerate(names, start=1)]
    found = list(file_names(labels).values())
    assert found == ["a_b.stl", "a_b_2.stl", "A_B_3.stl", "a_b_2_4.stl", "_x.stl", "n" * 100 + ".stl"]


def test_equal_segmentations_give_equal_bytes(phantom: Segmentation, source: Source, tmp_path: Path) -> None:
    first, second = (export(phantom, formats=["gltf"], out=tmp_path / n, name="x", source=source)[0] for n in "ab")
    assert first.path.read_bytes() == second.path.read_bytes()


def test_many_labels(tmp_path: Path) -> None:
    labels = np.zeros((41, 41, 3), dtype=np.uint16)
    labels[::2, ::2, 1] = 100 * np.arange(1, 442).reshape(21, 21)
    segmentation = segmentation_on(labels, SHEARED)
    write_gltf(tmp_path / "x.glb", segmentation)
    assert {label.dice for label in verify_gltf(tmp_path / "x.glb", segmentation).labels} == {1.0}


STL_ROW = np.dtype([("normal", "<f4", 3), ("points", "<f4", (3, 3)), ("attribute", "<u2")])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty folder for STL files."""
    (tmp_path / "meshes").mkdir()
    return tmp_path / "meshes"


Tamper = Callable[[np.ndarray], np.ndarray]
"""A change of the triangles (T, 3, 3) of an STL file, in LPS+ mm."""


def mirrored(triangles: np.ndarray) -> np.ndarray:
    middle = (triangles.min(axis=(0, 1)) + triangles.max(axis=(0, 1))) / 2
    return np.asarray(((triangles - middle) * (-1, 1, 1) + middle)[:, ::-1])


def in_ras(triangles: np.ndarray) -> np.ndarray:
    return np.asarray(triangles * (-1, -1, 1))


def transposed(triangles: np.ndarray) -> np.ndarray:
    return np.asarray(triangles[:, ::-1, [1, 0, 2]])


def inside_out(triangles: np.ndarray) -> np.ndarray:
    return np.asarray(triangles[:, ::-1])


def shifted(triangles: np.ndarray) -> np.ndarray:
    return np.asarray(triangles + np.array([1.1, 0, 0]))


def in_metres(triangles: np.ndarray) -> np.ndarray:
    return np.asarray(triangles / 1000)


def with_a_hole(triangles: np.ndarray) -> np.ndarray:
    return triangles[1:]


def twice(triangles: np.ndarray) -> np.ndarray:
    return np.concatenate([triangles, triangles])


def shrunk(triangles: np.ndarray) -> np.ndarray:
    middle = triangles.mean(axis=(0, 1))
    return np.asarray((triangles - middle) * 0.5 + middle)


def write_triangles(path: Path, triangles: np.ndarray) -> None:
    a, b, c = (triangles[:, n] for n in range(3))
    normals = np.cross(b - a, c - a)
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    rows = np.concatenate([normals[:, None], triangles], axis=1).astype("<f4").reshape(-1, 12)
    body = b"".join(row.tobytes() + b"\0\0" for row in rows)
    path.write_bytes(path.read_bytes()[:80] + struct.pack("<I", len(rows)) + body)


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (mirrored, "reads back with Dice|encloses"),
        (in_ras, "reads back with Dice|encloses"),
        (transposed, "reads back with Dice|encloses"),
        (inside_out, "inside out"),
        (shifted, "reads back with Dice|encloses"),
        (in_metres, "reads back with Dice|encloses"),
        (with_a_hole, "not closed"),
        (twice, "not closed"),
        (shrunk, "reads back with Dice|encloses"),
    ],
)
def test_tampered_triangles_are_seen(phantom: Segmentation, folder: Path, tamper: Tamper, message: str) -> None:
    write_stl(folder, phantom)
    verify_stl(folder, phantom)
    path = folder / "Right_half.stl"
    rows = np.frombuffer(path.read_bytes()[84:], STL_ROW)
    write_triangles(path, tamper(rows["points"].astype(float)))
    with pytest.raises(ExportError, match=message):
        verify_stl(folder, phantom)


def test_exchanged_files_are_seen(phantom: Segmentation, folder: Path) -> None:
    write_stl(folder, phantom)
    first, second = folder / "H_cker.stl", folder / "Right_half.stl"
    contents = first.read_bytes(), second.read_bytes()
    second.write_bytes(contents[0])
    first.write_bytes(contents[1])
    with pytest.raises(ExportError, match=r"reads back with Dice|encloses"):
        verify_stl(folder, phantom)


def test_a_missing_or_strange_file_is_seen(phantom: Segmentation, folder: Path) -> None:
    write_stl(folder, phantom)
    (folder / "more.stl").write_bytes(b"")
    with pytest.raises(ExportError, match="not those of its index"):
        verify_stl(folder, phantom)


def test_wrong_normals_are_seen(phantom: Segmentation, folder: Path) -> None:
    write_stl(folder, phantom)
    path = folder / "H_cker.stl"
    content = bytearray(path.read_bytes())
    content[84:96] = struct.pack("<3f", 0, 0, 0)
    path.write_bytes(bytes(content))
    with pytest.raises(ExportError, match="normals"):
        verify_stl(folder, phantom)


def change_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = path.read_bytes()
    length = struct.unpack_from("<I", content, 12)[0]
    document = json.loads(content[20 : 20 + length])
    change(document)
    text = json.dumps(document).encode()
    text += b" " * (-len(text) % 4)
    body = struct.pack("<I", len(text)) + b"JSON" + text + content[20 + length :]
    path.write_bytes(content[:8] + struct.pack("<I", 12 + len(body)) + body)


def rename(document: dict[str, Any]) -> None:
    document["nodes"][0]["name"] = "Other"


def recolour(document: dict[str, Any]) -> None:
    document["materials"][0]["pbrMetallicRoughness"]["baseColorFactor"][0] = 0.0


def exchange_meshes(document: dict[str, Any]) -> None:
    first, second = document["meshes"]
    first["primitives"][0]["attributes"], second["primitives"][0]["attributes"] = (
        second["primitives"][0]["attributes"],
        first["primitives"][0]["attributes"],
    )
    first["primitives"][0]["indices"], second["primitives"][0]["indices"] = (
        second["primitives"][0]["indices"],
        first["primitives"][0]["indices"],
    )


def without_the_matrix(document: dict[str, Any]) -> None:
    document["nodes"][2]["matrix"] = np.eye(4).ravel().tolist()


def in_centimetres(document: dict[str, Any]) -> None:
    document["nodes"][2]["matrix"] = [10 * x for x in document["nodes"][2]["matrix"][:15]] + [1.0]


def from_ras(document: dict[str, Any]) -> None:
    turn = np.reshape(document["nodes"][2]["matrix"], (4, 4)) * np.array([[-1], [-1], [1], [1]])
    document["nodes"][2]["matrix"] = turn.ravel().tolist()


def lose_a_node(document: dict[str, Any]) -> None:
    document["nodes"][2]["children"] = [0]


def say_all_are_there(document: dict[str, Any]) -> None:
    document["nodes"][2]["extras"]["absent"] = []


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (rename, "another id, name or colour"),
        (recolour, "another id, name or colour"),
        (exchange_meshes, "reads back with Dice|encloses"),
        (without_the_matrix, "normals|reads back with Dice|encloses|inside out"),
        (in_centimetres, "normals|reads back with Dice|encloses"),
        (from_ras, "reads back with Dice|encloses"),
        (lose_a_node, "not the schema's labels in order"),
        (say_all_are_there, "not the schema's labels in order"),
    ],
)
def test_tampered_scenes_are_seen(
    phantom: Segmentation, tmp_path: Path, tamper: Callable[[dict[str, Any]], None], message: str
) -> None:
    path = tmp_path / "x.glb"
    write_gltf(path, phantom)
    verify_gltf(path, phantom)
    change_json(path, tamper)
    with pytest.raises(ExportError, match=message):
        verify_gltf(path, phantom)


def test_a_mesh_of_another_label_map_is_seen(phantom: Segmentation, tmp_path: Path) -> None:
    write_gltf(tmp_path / "x.glb", phantom)
    labels = phantom.label_map.copy()
    labels[9, 5, 5] = 0
    with pytest.raises(ExportError, match="reads back with Dice"):
        verify_gltf(tmp_path / "x.glb", replace(phantom, label_map=labels))


def test_a_schema_of_one_label(tmp_path: Path) -> None:
    only = LabelSchema(labels=(Label(id=65535, name="only", colour=(1, 2, 3)),))
    labels = np.zeros((3, 3, 3), dtype=np.uint16)
    labels[1, 1, 1] = 65535
    segmentation = Segmentation(labels, grid((3, 3, 3)), only, Algorithm("a", "1"))
    write_stl(tmp_path, segmentation)
    [label] = verify_stl(tmp_path, segmentation).labels
    assert (label.voxels, label.dice) == (1, 1.0)
    assert label.volume_mm3 == pytest.approx(1 / 6)


def test_smoothing_is_asked_for_on_the_command_line(tmp_path: Path) -> None:
    labels = tmp_path / "labels.nii.gz"
    nib.save(nib.Nifti1Image(noise(), np.eye(4)), labels)
    command = ["export", labels, "--source", labels, "--out", tmp_path / "out", "--as", "stl,gltf"]
    for options, rounds in (([], 0), (["--smooth", "3"], 3)):
        run = CliRunner().invoke(app, [str(x) for x in (*command, *options)])
        assert run.exit_code == 0, run.output
        index = json.loads((tmp_path / "out" / "labels.meshes" / "meshes.json").read_text(encoding="utf-8"))
        assert index["smoothing_rounds"] == rounds
