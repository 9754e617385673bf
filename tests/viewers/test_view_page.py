"""`volseg view` in a real browser: what it shows lies where our own geometry says, and a mirrored map is found out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from threading import Thread
from typing import Any

import matplotlib.image
import nibabel as nib
import numpy as np
import numpy.typing as npt
import pytest
from playwright.sync_api import Page

from pipeline.export import Source, export
from pipeline.files import write_json, write_text
from pipeline.results import RECORD, record_sources
from pipeline.segmentation import Algorithm, Segmentation
from pipeline.view.server import ViewServer
from pipeline.view.site import open_site
from tests.viewers.browser import Watch, keep, page
from transforms.dicom import read_series
from transforms.geometry import Geometry
from transforms.labels import Label, LabelSchema
from transforms.volume import Volume, read_label, read_volume

pytestmark = [pytest.mark.viewers, pytest.mark.timeout(180)]

SHOWN_S = 60
SCHEMA = LabelSchema(
    labels=(
        Label(id=3, name="Anterior", colour=(230, 40, 20)),
        Label(id=7, name="Posterior", colour=(30, 200, 60)),
        Label(id=9, name="Absent", colour=(0, 0, 255)),
    )
)


@dataclass(frozen=True)
class World:
    """A label map on disk, its image, and the truth about both."""

    labels: Path
    image: Path
    label_map: npt.NDArray[Any]
    geometry: Geometry


def save(path: Path, voxels: npt.NDArray[Any], geometry: Geometry) -> Path:
    nib.save(nib.Nifti1Image(voxels, geometry.affine_ras), path)  # type: ignore[attr-defined]
    return path


def blobs(geometry: Geometry) -> npt.NDArray[np.uint8]:
    """Two ellipsoids of different sizes off the middle of every axis."""
    parts = np.stack(np.indices(geometry.shape), axis=-1) / (np.array(geometry.shape) - 1)
    label_map = np.zeros(geometry.shape, dtype=np.uint8)
    label_map[(((parts - (0.35, 0.6, 0.4)) / (0.22, 0.15, 0.25)) ** 2).sum(axis=-1) < 1] = 3
    label_map[(((parts - (0.75, 0.3, 0.65)) / (0.15, 0.12, 0.2)) ** 2).sum(axis=-1) < 1] = 7
    return label_map


def dicom_world(folder: Path, data_dir: Path) -> World:
    image = data_dir / "dicom_hippocrop"
    _, geometry, _ = read_series(image)
    label_map = blobs(geometry)
    return World(save(folder / "map.nii.gz", label_map, geometry), image, label_map, geometry)


def seg_world(folder: Path, data_dir: Path) -> World:
    image = data_dir / "dicom_hippocrop"
    voxels, geometry, series = read_series(image)
    label_map = blobs(geometry)
    segmentation = Segmentation(label_map, geometry, SCHEMA, Algorithm("test", "1"))
    source = Source(Volume(voxels, geometry, "MR", 0.0), series)
    (file,) = export(segmentation, formats=("seg",), out=folder, name="map", source=source)
    return World(file.path, image, label_map, geometry)


def nifti_world(folder: Path, data_dir: Path) -> World:
    image = sorted((data_dir / "hippocampus" / "images").glob("*.nii.gz"))[0]
    found = read_label(data_dir / "hippocampus" / "labels" / image.name)
    label_map = np.array([0, 3, 7], dtype=np.uint8)[found.voxels]
    return World(save(folder / "map.nii.gz", label_map, found.geometry), image, label_map, found.geometry)


def oblique_world(folder: Path, data_dir: Path) -> World:
    """The same voxels, turned by 25 and 15 degrees, stretched, and counted in another order."""
    plain = read_volume(sorted((data_dir / "hippocampus" / "images").glob("*.nii.gz"))[0])
    a, b = np.radians([25, 15])
    about_x = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    about_z = np.array([[np.cos(b), -np.sin(b), 0], [np.sin(b), np.cos(b), 0], [0, 0, 1]])
    affine_ras = np.eye(4)
    affine_ras[:3, :3] = about_x @ about_z @ np.array([[0, -1.0, 0], [0, 0, 1.5], [2.0, 0, 0]])
    affine_ras[:3, 3] = (31.0, -12.0, 55.0)
    geometry = Geometry(plain.geometry.shape, affine_ras)
    label_map = blobs(geometry)
    image = save(folder / "image.nii.gz", plain.voxels, geometry)
    return World(save(folder / "map.nii.gz", label_map, geometry), image, label_map, geometry)


def predicted(folder: Path, cases: dict[str, tuple[Path, npt.NDArray[Any], Geometry]]) -> list[World]:
    """An output folder as `volseg predict` leaves it, of cases that are (image, label map, geometry)."""
    write_text(folder / "labels.json", SCHEMA.model_dump_json())
    write_json(folder / RECORD, {"model": [], "mirror": False, "studies": {name: ["nifti"] for name in cases}})
    worlds = []
    for name, (image, label_map, geometry) in cases.items():
        worlds.append(World(save(folder / f"{name}.nii.gz", label_map, geometry), image, label_map, geometry))
        record_sources(folder, name, [image])
    return worlds


WORLDS: dict[str, Callable[[Path, Path], World]] = {
    "dicom": dicom_world,
    "dicom_seg": seg_world,
    "nifti": nifti_world,
    "oblique": oblique_world,
}


@contextmanager
def shown(result: Path, image: Path | None = None, **options: Any) -> Iterator[tuple[Page, Watch]]:
    """The page of a result, once everything is drawn."""
    faults: list[str] = []
    site = open_site(result, image=image, on_fault=faults.append)
    with ViewServer(site.find) as server, page(**options) as (opened, watch):
        thread = Thread(target=server.serve_forever, daemon=True)
        thread.start()
        opened.goto(server.address)
        wait_for_case(opened, 0)
        yield opened, watch
        server.shutdown()
        thread.join()
    assert faults == []


def wait_for_case(opened: Page, number: int) -> None:
    opened.wait_for_selector(f"body[data-shown='{number}']", timeout=1000 * SHOWN_S)


def ids_at(opened: Page, points_ras_mm: npt.NDArray[np.float64]) -> list[int]:
    """The label ids that NiiVue reads at world points, by its own transform and through the page's colour table."""
    values = opened.evaluate(
        """points => { const map = volseg.panes.planes.volumes[1];
        return points.map(mm => map.getValue(...map.mm2vox(mm))); }""",
        points_ras_mm.tolist(),
    )
    names = opened.evaluate("() => Object.fromEntries(volseg.state.facts.labels.map(x => [x.value, x.name]))")
    # By name: a DICOM SEG counts its segments anew.
    ids = {label.name: label.id for label in SCHEMA.labels}
    return [ids.get(names.get(str(value)), 0) for value in values]


def misplaced(opened: Page, world: World) -> int:
    """How many of some voxels the page has another label for than the truth."""
    random = np.random.default_rng(0)
    inside = np.argwhere(world.label_map)
    chosen = [inside[random.choice(len(inside), 300)], random.integers(0, world.geometry.shape, (300, 3))]
    points_ijk = np.concatenate(chosen)
    expected = world.label_map[tuple(points_ijk.T)]
    return int(np.count_nonzero(expected != ids_at(opened, world.geometry.ras_from_ijk(points_ijk))))


def painted(opened: Page, world: World) -> tuple[int, int]:
    """(pixels checked, pixels of another colour than their label's), over the three planes at full opacity.

    NiiVue says which world point a pixel shows; which label lies there is looked up in the truth. Pixels whose
    neighbourhood is not all one label are left out, since their voxel is a matter of rounding.
    """
    opened.evaluate("() => { document.getElementById('opacity').value = 100; opacity.oninput(); }")
    opened.wait_for_timeout(300)
    picture = matplotlib.image.imread(BytesIO(opened.locator("#planes").screenshot()), format="png")[..., :3] * 255
    rows, columns, _ = picture.shape
    places = [[x, y] for x in range(6, columns - 6, 9) for y in range(6, rows - 6, 9)]
    points = opened.evaluate(
        """places => places.map(([x, y]) => { const nv = volseg.panes.planes; const dpr = nv.uiData.dpr;
        const frac = nv.canvasPos2frac([x * dpr, y * dpr]);
        return frac[0] < 0 ? null : Array.from(nv.frac2mm(frac, 0, true)).slice(0, 3); })""",
        places,
    )
    colours = {0: None, **{label.id: label.colour for label in SCHEMA.labels}}
    checked = wrong = 0
    for (x, y), point in zip(places, points, strict=True):
        label = None if point is None else uniform_label(world, np.array(point))
        if label is None or is_covered(opened_colour := picture[y, x]):
            continue
        saturation = float(np.ptp(opened_colour))
        colour = colours[label]
        off = saturation > 40 if colour is None else np.abs(opened_colour - colour).max() > 12
        checked, wrong = checked + (label != 0), wrong + int(off)
    return checked, wrong


def uniform_label(world: World, point_ras_mm: npt.NDArray[np.float64]) -> int | None:
    index = world.geometry.ijk_from_ras(point_ras_mm[None])[0]
    if (index < 1.5).any() or (index > np.array(world.geometry.shape) - 2.5).any():
        return None
    i, j, k = np.rint(index).astype(int)
    around = world.label_map[i - 1 : i + 2, j - 1 : j + 2, k - 1 : k + 2]
    return int(around[1, 1, 1]) if (around == around[1, 1, 1]).all() else None


def is_covered(colour: npt.NDArray[np.float64]) -> bool:
    """The crosshair's blue, the letters' yellow and white, on their dark rims."""
    r, g, b = colour
    return bool((b > r + 25 and b > 100) or (r > 150 and g > 120 and r > b + 40 and g > b + 20))


@pytest.mark.parametrize("kind", WORLDS)
def test_labels_are_where_they_belong(kind: str, tmp_path: Path, data_dir: Path) -> None:
    write_text(tmp_path / "labels.json", SCHEMA.model_dump_json())
    world = WORLDS[kind](tmp_path, data_dir)
    with shown(world.labels, world.image) as (opened, watch):
        keep(opened, f"view_{kind}")
        assert misplaced(opened, world) == 0
        checked, wrong = painted(opened, world)
        assert checked > 100
        assert wrong <= checked // 100
        assert watch.strangers() == []
        assert watch.complaints == []


def test_a_mirrored_map_is_found_out(tmp_path: Path, data_dir: Path) -> None:
    """What the test above compares can fail, whichever axis is mirrored."""
    world = dicom_world(tmp_path, data_dir)
    maps = {f"axis_{axis}": np.flip(world.label_map, axis) for axis in range(3)}
    predicted(tmp_path, {name: (world.image, label_map, world.geometry) for name, label_map in maps.items()})
    with shown(tmp_path) as (opened, _):
        for axis in range(3):
            wait_for_case(opened, axis)
            assert misplaced(opened, world) > 100
            checked, wrong = painted(opened, world)
            assert wrong > checked // 10
            opened.keyboard.press(".")


def test_list_of_labels(tmp_path: Path, data_dir: Path) -> None:
    write_text(tmp_path / "labels.json", SCHEMA.model_dump_json())
    world = dicom_world(tmp_path, data_dir)
    with shown(world.labels, world.image) as (opened, watch):
        rows = opened.locator("#list li").all_inner_texts()
        volumes = [np.count_nonzero(world.label_map == i) * world.geometry.voxel_volume_mm3 / 1000 for i in (3, 7)]
        assert [row.split("\n")[0] for row in rows] == ["Anterior", "Posterior", "Absent"]
        assert [row.split("\n")[-1] for row in rows] == [*(f"{v:.2f} mL" for v in volumes), "not found"]
        colours = opened.locator("#list .swatch").evaluate_all("xs => xs.map(x => x.style.background)")
        assert colours == ["rgb(230, 40, 20)", "rgb(30, 200, 60)", "rgb(0, 0, 255)"]
        opened.locator("#list .name", has_text="Posterior").click()
        point = opened.evaluate("() => volseg.panes.point()")
        assert ids_at(opened, np.array([point])) == [7]
        centre = world.geometry.ras_from_ijk([np.argwhere(world.label_map == 7).mean(axis=0)])[0]
        assert np.linalg.norm(centre - point) < 1.5
        x_mm, y_mm, z_mm = np.round(point, 1)
        shown_mm = [opened.inner_text(f"#{axis}-side") + " " + opened.inner_text(f"#{axis}") for axis in "xyz"]
        words = (("Left", "Right"), ("Posterior", "Anterior"), ("Inferior", "Superior"))
        assert shown_mm == [
            f"{word[int(mm >= 0)]} {abs(mm):.1f} mm" for word, mm in zip(words, (x_mm, y_mm, z_mm), strict=True)
        ]
        assert opened.inner_text("#here") == "Posterior"
        opened.uncheck("#list li:nth-child(2) input")
        meshes = opened.evaluate("() => volseg.panes.solid.meshes.map(m => [m.name, Boolean(m.visible)])")
        assert meshes == [["1.mz3", True], ["2.mz3", False]]
        assert opened.evaluate("() => Array.from(volseg.panes.planes.volumes[1].colormapLabel.lut)")[3::4] == [
            0,
            255,
            0,
        ]
        assert watch.complaints == []


def test_sides_and_keys(tmp_path: Path, data_dir: Path) -> None:
    """The letters at the edges are the sides of the patient that NiiVue draws there, in both conventions."""
    write_text(tmp_path / "labels.json", SCHEMA.model_dump_json())
    world = dicom_world(tmp_path, data_dir)
    with shown(world.labels, world.image) as (opened, watch):
        for convention, left in (("Radiological", "R"), ("Neurological", "L")):
            assert opened.inner_text("#convention").startswith(convention)
            assert opened.inner_text("[data-pane=axial] .side.left") == left
            for pane in ("axial", "coronal", "sagittal"):
                assert_letters(opened, pane)
            opened.keyboard.press("r")
        opened.keyboard.press("n")
        before = opened.evaluate("() => volseg.panes.point()")
        for key, step in (("ArrowLeft", (1, 0, 0)), ("ArrowUp", (0, 1, 0)), ("PageUp", (0, 0, 1))):
            opened.keyboard.press(key)
            after = opened.evaluate("() => volseg.panes.point()")
            assert np.allclose(np.subtract(after, before), step, atol=1e-3), key
            before = after
        opened.keyboard.press("3")
        assert opened.locator(".pane:visible").count() == 1
        assert_letters(opened, "sagittal")
        opened.keyboard.press("0")
        assert opened.locator(".pane:visible").count() == 4
        window = [opened.input_value("#level-number"), opened.input_value("#width-number")]
        opened.fill("#width-number", "50")
        opened.press("#width-number", "Enter")
        image = "volseg.panes.planes.volumes[0]"
        assert opened.evaluate(f"() => {image}.cal_max - {image}.cal_min") == pytest.approx(50)
        opened.locator("#planes").focus()
        opened.keyboard.press("w")
        assert [opened.input_value("#level-number"), opened.input_value("#width-number")] == window
        assert watch.complaints == []


def test_mouse(tmp_path: Path, data_dir: Path) -> None:
    """A click goes to the voxel under it, the wheel to the next slice, a right drag changes the window."""
    write_text(tmp_path / "labels.json", SCHEMA.model_dump_json())
    world = dicom_world(tmp_path, data_dir)
    with shown(world.labels, world.image) as (opened, watch):
        origin = opened.locator("#planes").bounding_box()
        assert origin is not None
        x, y = round(origin["width"] * 0.27), round(origin["height"] * 0.31)
        opened.mouse.click(origin["x"] + x, origin["y"] + y)
        expected = opened.evaluate(
            """([x, y]) => { const nv = volseg.panes.planes, dpr = nv.uiData.dpr;
            return Array.from(nv.frac2mm(nv.canvasPos2frac([x * dpr, y * dpr]), 0, true)).slice(0, 3); }""",
            [x, y],
        )
        clicked = opened.evaluate("() => volseg.panes.point()")
        # Half a voxel, and half a pixel of the screen.
        assert np.abs(np.subtract(clicked, expected)).max() <= 0.5 + 0.07
        opened.mouse.wheel(0, 100)
        opened.wait_for_timeout(500)
        scrolled = opened.evaluate("() => volseg.panes.point()")
        assert np.allclose(np.abs(np.subtract(scrolled, clicked)), (0, 0, 1), atol=1e-3)
        level, width = (float(opened.input_value(f"#{name}-number")) for name in ("level", "width"))
        opened.mouse.down(button="right")
        opened.mouse.move(origin["x"] + x + 50, origin["y"] + y - 25)
        opened.wait_for_timeout(500)
        opened.mouse.up(button="right")
        per_pixel = (194 - 2) / 500
        assert float(opened.input_value("#width-number")) == pytest.approx(width + 50 * per_pixel, abs=0.6)
        assert float(opened.input_value("#level-number")) == pytest.approx(level + 25 * per_pixel, abs=0.6)
        image = "volseg.panes.planes.volumes[0]"
        assert opened.evaluate(f"() => {image}.cal_max - {image}.cal_min") == pytest.approx(
            width + 50 * per_pixel, abs=0.6
        )
        assert watch.complaints == []


def assert_letters(opened: Page, pane: str) -> None:
    """Going from one edge of a pane to the other, the world point moves towards the letter at that edge."""
    box = opened.locator(f".pane[data-pane={pane}]").bounding_box()
    origin = opened.locator("#planes").bounding_box()
    assert box is not None
    assert origin is not None
    middle = [box["x"] - origin["x"] + box["width"] / 2, box["y"] - origin["y"] + box["height"] / 2]
    letters = {
        edge: opened.inner_text(f"[data-pane={pane}] .side.{edge}") for edge in ("left", "right", "top", "bottom")
    }
    for (first, second), (dx, dy) in {("left", "right"): (40, 0), ("top", "bottom"): (0, 40)}.items():
        ends = [[middle[0] - dx, middle[1] - dy], [middle[0] + dx, middle[1] + dy]]
        points = opened.evaluate(
            """places => places.map(([x, y]) => { const nv = volseg.panes.planes, dpr = nv.uiData.dpr;
            return Array.from(nv.frac2mm(nv.canvasPos2frac([x * dpr, y * dpr]), 0, true)).slice(0, 3); })""",
            ends,
        )
        way = np.subtract(points[0], points[1])
        axis = int(np.abs(way).argmax())
        towards, away = ("RAS"[axis], "LPI"[axis]) if way[axis] > 0 else ("LPI"[axis], "RAS"[axis])
        assert (letters[first], letters[second]) == (towards, away), pane


def test_a_folder_of_cases(tmp_path: Path, data_dir: Path) -> None:
    """A folder of predict: its images are found again, the second case replaces the first, and pictures of the page."""
    images = sorted((data_dir / "hippocampus" / "images").glob("*.nii.gz"))[:2]
    labels = [read_label(data_dir / "hippocampus" / "labels" / image.name) for image in images]
    maps = [np.array([0, 3, 7], dtype=np.uint8)[found.voxels] for found in labels]
    cases = zip(images, maps, (found.geometry for found in labels), strict=True)
    worlds = predicted(tmp_path, {case[0].name.removesuffix(".nii.gz"): case for case in cases})
    with shown(tmp_path) as (opened, watch):
        keep(opened, "view_1280_dark")
        opened.set_viewport_size({"width": 1920, "height": 1080})
        opened.keyboard.press(".")
        wait_for_case(opened, 1)
        assert misplaced(opened, worlds[1]) == 0
        assert opened.evaluate("() => volseg.panes.planes.volumes.length") == 2
        opened.keyboard.press("t")
        opened.wait_for_timeout(500)
        keep(opened, "view_1920_light")
        assert opened.locator("#cases option").all_inner_texts() == [x.labels.name[:-7] for x in worlds]
        assert watch.strangers() == []
        assert watch.complaints == []
