"""`volseg view` without a browser: what is served, to whom, and what the page is told."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
import pydicom
import pytest

from pipeline.errors import GeometryMismatch, RunError, VolsegError, VolumeError
from pipeline.export import Source, export
from pipeline.export.seg_reader import read_seg
from pipeline.files import write_json, write_text
from pipeline.results import RECORD, SOURCES, find_results, record_sources, result_of
from pipeline.segmentation import Algorithm, Segmentation
from pipeline.view import site as site_module
from pipeline.view.scene import read_scene
from pipeline.view.server import HOST, Reply, ViewServer
from pipeline.view.site import open_site
from pipeline.view.surfaces import surface_mz3
from transforms.dicom import read_series
from transforms.geometry import Geometry
from transforms.labels import Label, LabelSchema
from transforms.volume import Volume

ROOT = Path(__file__).parents[2]
SCHEMA = LabelSchema(
    labels=(
        Label(id=4, name="Ring", colour=(1, 2, 3)),
        Label(id=2, name="Absent", colour=(4, 5, 6)),
        Label(id=300, name="Box", colour=(7, 8, 9)),
    )
)
OBLIQUE_RAS = np.array([[0, -2.0, 0, 10], [1.2, 0, 0.9, 20], [-0.9, 0, 1.2, 30], [0, 0, 0, 1]]) * [[1.0], [1], [1], [1]]
GEOMETRY = Geometry((12, 10, 8), OBLIQUE_RAS)


def save(path: Path, voxels: npt.NDArray[Any], geometry: Geometry = GEOMETRY) -> Path:
    nib.save(nib.Nifti1Image(voxels, geometry.affine_ras), path)  # type: ignore[attr-defined]
    return path


def ring_and_box() -> npt.NDArray[np.uint16]:
    """Label 4 is a square ring in the plane k = 3 around (4, 4); label 300 is a box of 2 x 3 x 2 voxels."""
    label_map = np.zeros(GEOMETRY.shape, np.uint16)
    label_map[2:7, 2:7, 3] = 4
    label_map[3:6, 3:6, 3] = 0
    label_map[8:10, 1:4, 5:7] = 300
    return label_map


@pytest.fixture
def case(tmp_path: Path) -> Path:
    """A folder of predict with one case; the image lies elsewhere."""
    image = save(tmp_path / "image.nii.gz", np.arange(960, dtype=np.float32).reshape(GEOMETRY.shape))
    out = tmp_path / "out"
    out.mkdir()
    save(out / "case.nii.gz", ring_and_box())
    write_text(out / "labels.json", SCHEMA.model_dump_json())
    write_json(out / RECORD, {"model": [], "mirror": False, "studies": {"case": ["nifti"]}})
    record_sources(out, "case", [image])
    return out


@contextmanager
def served(*args: Any, **options: Any) -> Iterator[ViewServer]:
    faults: list[str] = []
    with ViewServer(open_site(*args, on_fault=faults.append, **options).find) as server:
        thread = Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(
    server: ViewServer, path: str, *, method: str = "GET", host: str | None = None
) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection(HOST, server.server_port, timeout=20)
    connection.request(method, path, headers={} if host is None else {"Host": host})
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, dict(answer.headers), body


def test_everything_that_the_page_needs(case: Path) -> None:
    with served(case) as server:
        for name, kind in {
            "": "text/html",
            "style.css": "text/css",
            "app.js": "text/javascript",
            "panes.js": "text/javascript",
            "labels.js": "text/javascript",
            "niivue.js": "text/javascript",
            "cases.json": "application/json",
            "cases/0/facts.json": "application/json",
            "cases/0/image.nii": "application/octet-stream",
            "cases/0/labels.nii": "application/octet-stream",
            "cases/0/surface-1.mz3": "application/octet-stream",
        }.items():
            status, headers, body = ask(server, server.root + name)
            assert (status, headers["Content-Type"].split(";")[0]) == (200, kind), name
            assert body
            policy = headers["Content-Security-Policy"]
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
            assert "http" not in policy
            assert headers["Cache-Control"] == "no-store"
        assert ask(server, server.root, method="HEAD")[2] == b""


def test_nothing_else(case: Path) -> None:
    (case / "secret.txt").write_text("secret")
    with served(case) as server:
        names = [
            *("secret.txt", "../out/secret.txt", "%2e%2e/secret.txt", "page/../app.js", "//app.js", "app.js?x"),
            *("scene.py", "__init__.py", "NIIVUE-LICENCES.txt", "cases", "cases/", "cases/0/", "cases/1/facts.json"),
            *("cases/-1/facts.json", "cases/0/surface-0.mz3", "cases/0/surface-3.mz3", "cases/0/../0/facts.json"),
        ]
        for path in [*(server.root + name for name in names), "/", "/app.js", "/etc/passwd", "//", server.root[:-1]]:
            status, _, body = ask(server, path)
            assert (status, body) == (404, b"not found"), path
        other_token = "/" + "x" * (len(server.root) - 2) + "/"
        assert ask(server, other_token)[0] == 404
        assert ask(server, server.root, method="POST")[0] == 501


def test_only_this_machine_by_its_own_name(case: Path) -> None:
    with served(case) as server, served(case) as other:
        assert server.server_address[0] == "127.0.0.1"
        assert len(server.root) > 30
        assert server.root != other.root
        port = server.server_port
        for host in (f"127.0.0.1:{port}", f"localhost:{port}"):
            assert ask(server, server.root, host=host)[0] == 200
        for host in ("evil.example", f"evil.example:{port}", f"127.0.0.1.evil.example:{port}", "127.0.0.1", ""):
            status, _, body = ask(server, server.root + "cases.json", host=host)
            assert (status, body) == (403, b"forbidden"), host


def test_a_fault_in_an_answer_says_nothing() -> None:
    def find(path: str) -> Reply:
        raise ValueError("Doe^John")

    with ViewServer(find) as server:
        thread = Thread(target=server.serve_forever, daemon=True)
        thread.start()
        assert ask(server, server.root)[::2] == (500, b"failed")
        server.shutdown()
        thread.join()


def test_facts(case: Path) -> None:
    scene = read_scene(find_results(case)[0])
    facts = scene.facts()
    assert facts["grid"] == {
        "shape": [12, 10, 8], "spacing_mm": [1.5, 2.0, 1.5], "axis_codes": "ALS", "tilt_degrees": pytest.approx(36.9),
    }  # fmt: skip
    ring, absent, box = facts["labels"]
    assert (ring["name"], ring["id"], ring["colour"], ring["value"]) == ("Ring", 4, [1, 2, 3], 1)
    assert (absent["value"], absent["volume_ml"], absent["centre_ras_mm"]) == (None, 0.0, None)
    assert (box["value"], box["volume_ml"]) == (2, pytest.approx(12 * 4.5 / 1000))
    # The centre of a ring lies beside it, so a voxel of the ring stands for it.
    index = np.rint(GEOMETRY.ijk_from_ras([ring["centre_ras_mm"]])[0]).astype(int)
    assert ring_and_box()[tuple(index)] == 4
    assert np.abs(GEOMETRY.ijk_from_ras([box["centre_ras_mm"]])[0] - (8.5, 2, 5.5)).max() <= 0.5 + 1e-6
    assert facts["range"] == {"low": 0.0, "high": 959.0}
    json.dumps(facts, allow_nan=False)


def test_volumes_are_voxels_and_grid_only(case: Path) -> None:
    with served(case) as server:
        image, labels = (
            nib.Nifti1Image.from_bytes(ask(server, f"{server.root}cases/0/{name}.nii")[2])
            for name in ("image", "labels")
        )
    for found in (image, labels):
        assert np.allclose(found.affine, GEOMETRY.affine_ras, atol=1e-5)
        assert bytes(found.header["descrip"]).strip(b"\0") == b""
    assert image.get_data_dtype() == np.int16
    assert np.array_equal(image.get_fdata().ravel(), np.arange(960))
    assert labels.header.get_intent()[0] == "label"
    expected = np.select([ring_and_box() == 4, ring_and_box() == 300], [1, 2])
    assert np.array_equal(labels.get_fdata(), expected)


def test_fractions_stay_fractions(tmp_path: Path) -> None:
    voxels = np.linspace(0, 1, 960, dtype=np.float32).reshape(GEOMETRY.shape)
    image = save(tmp_path / "image.nii.gz", voxels)
    labels = save(tmp_path / "map.nii.gz", np.ones(GEOMETRY.shape, np.uint8))
    with served(labels, image=image) as server:
        found = nib.Nifti1Image.from_bytes(ask(server, f"{server.root}cases/0/image.nii")[2])
        facts = json.loads(ask(server, f"{server.root}cases/0/facts.json")[2])
    assert np.array_equal(np.asarray(found.dataobj), voxels)
    assert [label["name"] for label in facts["labels"]] == ["label 1"]


def test_no_identity(tmp_path: Path, data_dir: Path) -> None:
    """The patient's name, id and birth date in every slice reach no answer, nor the terminal."""
    series = tmp_path / "series"
    series.mkdir()
    for file in (data_dir / "dicom_hippocrop").glob("*.dcm"):
        dataset = pydicom.dcmread(file)
        dataset.PatientName, dataset.PatientID, dataset.PatientBirthDate = "Zzyzx^Quux", "ID-8472", "19031207"
        dataset.save_as(series / file.name)
    voxels, geometry, found = read_series(series)
    label_map = np.zeros(geometry.shape, np.uint16)
    label_map[5:15, 5:15, 5:15] = 4
    segmentation = Segmentation(label_map, geometry, SCHEMA, Algorithm("test", "1"))
    source = Source(Volume(voxels, geometry, "MR", 0.0), found)
    (file,) = export(segmentation, formats=("seg",), out=tmp_path, name="map", source=source)
    names = [
        "",
        "app.js",
        "cases.json",
        *(f"cases/0/{n}" for n in ("facts.json", "image.nii", "labels.nii", "surface-1.mz3")),
    ]
    with served(file.path, image=series) as server:
        for name in names:
            body = ask(server, server.root + name)[2]
            assert not any(word in body for word in (b"Zzyzx", b"Quux", b"8472", b"19031207")), name


def test_dicom_seg_lies_where_it_was(tmp_path: Path, data_dir: Path) -> None:
    """Frames that were left out are there again, and names and colours are the schema's."""
    folder = data_dir / "dicom_hippocrop"
    voxels, geometry, found = read_series(folder)
    label_map = np.zeros(geometry.shape, np.uint16)
    label_map[3:9, 10:30, 7:11] = 4
    label_map[20:25, 4:9, 20:33] = 300
    source = Source(Volume(voxels, geometry, "MR", 0.0), found)
    segmentation = Segmentation(label_map, geometry, SCHEMA, Algorithm("test", "1"))
    for file in export(segmentation, formats=("seg", "labelmap"), out=tmp_path, name="map", source=source):
        assert read_seg(file.path).series_uid == found.series_uid
        scene = read_scene(result_of(file.path), image=folder)
        assert [(x.label.name, x.value) for x in scene.labels] == [("Ring", 1), ("Absent", None), ("Box", 2)]
        assert np.abs(np.subtract([x.label.colour for x in scene.labels], [x.colour for x in SCHEMA.labels])).max() <= 2
        assert np.array_equal(scene.values, np.select([label_map == 4, label_map == 300], [1, 2]))
    with pytest.raises(GeometryMismatch, match="does not lie on"):
        read_scene(
            result_of(tmp_path / "map.seg.dcm"), image=save(tmp_path / "other.nii.gz", np.zeros((4, 4, 4), np.int16))
        )


def test_the_series_that_fits(tmp_path: Path, data_dir: Path) -> None:
    """Of two series in a folder, the one on whose grid the label map lies; of two that fit, none."""
    for n, (series, part) in enumerate((("1.2.3", slice(0, 40)), ("1.2.4", slice(0, 20)))):
        for file in sorted((data_dir / "dicom_hippocrop").glob("*.dcm"), key=lambda path: int(path.stem))[part]:
            dataset = pydicom.dcmread(file)
            dataset.SeriesInstanceUID = series
            dataset.SOPInstanceUID = f"{series}.{file.stem}"
            dataset.save_as(tmp_path / f"{n}_{file.name}")
    _, geometry, _ = read_series(tmp_path, series="1.2.4")
    labels = save(tmp_path / "map.nii.gz", np.ones(geometry.shape, np.uint8), geometry)
    assert read_scene(result_of(labels), image=tmp_path).image.geometry.shape == geometry.shape
    for file in tmp_path.glob("1_*.dcm"):
        dataset = pydicom.dcmread(file)
        dataset.SeriesInstanceUID, dataset.SOPInstanceUID = "1.2.5", dataset.SOPInstanceUID.replace("1.2.4", "1.2.5")
        dataset.save_as(tmp_path / f"2_{file.name}")
    with pytest.raises(VolumeError, match="series"):
        read_scene(result_of(labels), image=tmp_path)


def test_refusals(case: Path, tmp_path: Path) -> None:
    labels = case / "case.nii.gz"
    elsewhere = save(
        tmp_path / "shifted.nii.gz", np.zeros((12, 10, 8), np.int16), GEOMETRY.window((1, 0, 0), (12, 10, 8))
    )
    silent = {"on_fault": lambda fault: None}
    with pytest.raises(GeometryMismatch, match="not lie on the grid of its image"):
        open_site(labels, image=elsewhere, **silent)
    with pytest.raises(VolumeError, match="no such file"):
        open_site(tmp_path / "nothing.nii.gz", **silent)
    with pytest.raises(VolumeError, match="--image"):
        open_site(save(tmp_path / "alone.nii.gz", ring_and_box()), **silent)
    with pytest.raises(RunError, match=RECORD):
        open_site(tmp_path, **silent)
    write_text(case / "labels.json", LabelSchema(labels=SCHEMA.labels[1:2]).model_dump_json())
    with pytest.raises(VolumeError, match=r"\[4, 300\] are not in the schema"):
        open_site(labels, **silent)
    (tmp_path / "image.nii.gz").unlink()
    with pytest.raises(VolumeError, match="has moved"):
        open_site(labels, **silent)
    (case / SOURCES).write_text("[")
    with pytest.raises(RunError, match=SOURCES):
        open_site(labels, **silent)


def test_one_bad_case_among_others(case: Path) -> None:
    write_json(case / RECORD, {"studies": {"case": ["nifti"], "bad": ["nifti"], "gone": ["seg"], "../x": ["nifti"]}})
    (case / "bad.nii.gz").write_bytes(b"no volume")
    record_sources(case, "bad", [case / "case.nii.gz"])
    faults: list[str] = []
    site = open_site(case, on_fault=faults.append)
    cases = site.find("cases.json")
    assert cases is not None
    assert json.loads(cases.body) == ["case", "bad"]
    reply = site.find("cases/1/facts.json")
    assert reply is not None
    assert (reply.status, reply.body) == (422, b"{}")
    assert len(faults) == 1
    assert "bad.nii.gz" in faults[0]
    good = site.find("cases/0/facts.json")
    assert good is not None
    assert good.status == 200


def test_sources_are_relative(case: Path) -> None:
    """The folder and the images can move together, and no absolute path is written."""
    assert json.loads((case / SOURCES).read_text()) == {"case": ["../image.nii.gz"]}
    moved = case.parent / "elsewhere"
    moved.mkdir()
    shutil.move(case, moved / "out")
    shutil.move(case.parent / "image.nii.gz", moved / "image.nii.gz")
    assert read_scene(find_results(moved / "out")[0]).name == "case"


@pytest.mark.parametrize("flip", [1, -1])
def test_surface(flip: int) -> None:
    """A ball's surface closes around its volume, seen from outside, in either handedness of the grid."""
    geometry = Geometry((30, 30, 30), np.diag([flip * 1.0, 2.0, 0.5, 1.0]))
    centre, radius = 14.0, 10.0
    mask = np.square(np.indices((30, 30, 30)) - centre).sum(axis=0) < radius**2
    vertices, faces = parse_mz3(surface_mz3(mask, geometry))
    a, b, c = (vertices[faces[:, corner]] for corner in range(3))
    volume_mm3 = np.einsum("ij,ij->i", a, np.cross(b, c)).sum() / 6
    assert volume_mm3 == pytest.approx(np.count_nonzero(mask) * geometry.voxel_volume_mm3, rel=0.03)
    middle = (vertices.min(axis=0) + vertices.max(axis=0)) / 2
    assert np.allclose(middle, (flip * centre, 2 * centre, centre / 2), atol=0.2)


def test_surfaces_of_thin_and_of_large_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    geometry = Geometry((40, 40, 40), np.eye(4))
    single = np.zeros((40, 40, 40), dtype=bool)
    single[7, 8, 9] = True
    vertices, _ = parse_mz3(surface_mz3(single, geometry))
    assert np.allclose(vertices.mean(axis=0), (7, 8, 9), atol=0.01)
    box = np.zeros((40, 40, 40), dtype=bool)
    box[10:30, 4:36, 6:26] = True
    fine, _ = parse_mz3(surface_mz3(box, geometry))
    monkeypatch.setattr("pipeline.view.surfaces.MOST_VOXELS", 10_000)
    coarse, _ = parse_mz3(surface_mz3(box, geometry))
    assert len(coarse) < len(fine) / 2
    for vertices in (fine, coarse):
        assert np.allclose(vertices.min(axis=0), (9.5, 3.5, 5.5), atol=0.6)
        assert np.allclose(vertices.max(axis=0), (29.5, 35.5, 25.5), atol=0.6)


def parse_mz3(content: bytes) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]]:
    magic, attributes, face_count, vertex_count, skipped = struct.unpack_from("<HHIII", content)
    assert (magic, attributes, skipped) == (0x5A4D, 3, 0)
    assert len(content) == 16 + 12 * (face_count + vertex_count)
    faces = np.frombuffer(content, "<i4", 3 * face_count, 16).reshape(-1, 3)
    return np.frombuffer(content, "<f4", offset=16 + 12 * face_count).reshape(-1, 3), faces


def test_without_the_script(case: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(site_module.PAGE, "niivue.js", ("not_there.js", "text/javascript"))
    with pytest.raises(RunError, match="make viewer-assets"):
        open_site(case, on_fault=print)


def test_the_script_is_the_pinned_one() -> None:
    from build_backend.npm import is_vendored

    assert is_vendored()


def test_a_port_that_is_taken(case: Path) -> None:
    with served(case) as server, pytest.raises(RunError, match=f"port {server.server_port} .* in use; choose another"):
        ViewServer(lambda path: None, port=server.server_port)


def test_command_until_interrupt(case: Path) -> None:
    command = [sys.executable, "-m", "pipeline.cli", "view", str(case), "--no-open"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        assert address.startswith("http://127.0.0.1:")
        port, path = int(address.split(":")[2].split("/")[0]), "/" + address.split("/", 3)[3]
        connection = http.client.HTTPConnection(HOST, port, timeout=20)
        connection.request("GET", path + "cases/0/facts.json")
        assert connection.getresponse().status == 200
        connection.close()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (0, "")
    assert out.endswith("closed\n")
    assert issubclass(RunError, VolsegError)
