"""Our DICOM exports in OHIF, from a real archive: the label map that the viewer holds is ours, voxel by voxel.

A mirrored segmentation has coloured pixels too, so what is compared are positions in the patient.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import numpy.typing as npt
import pydicom
import pytest
from matplotlib.path import Path as Outline
from playwright.sync_api import Page

from pipeline.export import Source, export
from pipeline.segmentation import Algorithm, Segmentation
from tests.viewers.browser import Watch, keep, page
from tests.viewers.conftest import running_orthanc
from tests.viewers.ohif import serving
from transforms.dicom import read_series
from transforms.geometry import Geometry
from transforms.labels import Label, LabelSchema
from transforms.volume import Volume

pytestmark = [pytest.mark.viewers, pytest.mark.timeout(240)]

LOADED_S = 90
FORMATS = ("seg", "labelmap", "rtstruct", "sr")
SCHEMA = LabelSchema(
    labels=(
        Label(id=3, name="Anterior", colour=(230, 40, 20)),
        Label(id=7, name="Posterior", colour=(30, 200, 60)),
        Label(id=9, name="Nowhere", colour=(40, 60, 220)),
    )
)
OCCURRING = SCHEMA.labels[:2]

LABEL_MAP = """() => {
  const [found] = services.segmentationService.getSegmentations();
  const viewport = services.viewportGridService.getState().activeViewportId;
  const segments = Object.values(found.segments).map(({segmentIndex, label}) => [segmentIndex, label,
    services.segmentationService.getSegmentColor(viewport, found.segmentationId, segmentIndex).slice(0, 3)]);
  const slices = found.representationData.Labelmap.imageIds.map(id => {
    const plane = cornerstone.metaData.get('imagePlaneModule', id);
    return {...Object.fromEntries(['imagePositionPatient', 'rowCosines', 'columnCosines', 'rowPixelSpacing',
      'columnPixelSpacing', 'rows', 'columns'].map(key => [key, plane[key]])),
      values: Array.from(cornerstone.cache.getImage(id).voxelManager.getScalarData())};
  });
  return {segments, slices};
}"""

CONTOURS = """() => cornerstoneTools.annotation.state.getAllAnnotations().map(({data}) => ({
  points: data.contour.polyline.map(point => Array.from(point)), label: data.segmentation.segmentIndex}))"""

REPORT = """() => {
  const viewport = services.viewportGridService.getState().activeViewportId;
  const shown = services.cornerstoneViewportService.getCornerstoneViewport(viewport).getCurrentImageId();
  const report = services.displaySetService.getActiveDisplaySets().find(set => set.Modality === 'SR');
  return {shown: cornerstone.metaData.get('sopCommonModule', shown)?.sopInstanceUID ?? shown,
    groups: report.measurements.map(({TrackingIdentifier, labels, loaded, coords}) => ({TrackingIdentifier, labels,
      loaded, image: coords[0]?.ReferencedSOPSequence?.ReferencedSOPInstanceUID}))};
}"""


@dataclass(frozen=True)
class World:
    """An archive that holds a study and our exports, a viewer before it, and the truth."""

    root: str
    study: str
    files: dict[str, Path]
    label_map: npt.NDArray[Any]
    geometry: Geometry
    slice_uids: list[str]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> Generator[World]:
    folder = tmp_path_factory.mktemp("ohif")
    voxels, geometry, series = read_series(narrowed(data_dir / "dicom_hippocrop", folder / "series"))
    label_map = lopsided(geometry)
    segmentation = Segmentation(label_map, geometry, SCHEMA, Algorithm("test", "1"))
    source = Source(Volume(voxels, geometry, "MR", 0.0), series)
    files = export(segmentation, formats=FORMATS, out=folder, name="map", source=source)
    with running_orthanc(folder / "orthanc") as archive:
        archive.upload(*series.paths, *(file.path for file in files))
        study = archive.get("/studies?expand")[0]["MainDicomTags"]["StudyInstanceUID"]
        with serving(archive.http_port) as root:
            uids = [header.sop_uid for header in series.slices]
            yield World(root, study, {file.format: file.path for file in files}, label_map, geometry, uids)


def narrowed(source: Path, target: Path) -> Path:
    """A copy of the series without its last two columns, so that a frame of bits fills whole bytes (32 x 50 / 8).

    This OHIF misreads BINARY segmentations whose frames do not (34 x 50 / 8 = 212.5); pydicom, highdicom and dcmqi
    read them, as PS3.5 section 8.1.1 has it.
    """
    target.mkdir()
    for file in source.glob("*.dcm"):
        dataset = pydicom.dcmread(file)
        dataset.PixelData = np.ascontiguousarray(dataset.pixel_array[:, :32]).tobytes()
        dataset.Columns = 32
        dataset.save_as(target / file.name)
    return target


def lopsided(geometry: Geometry) -> npt.NDArray[np.uint8]:
    """Two ellipsoids with a corner taken out, so that no mirroring and no turn leaves them as they are."""
    parts = np.stack(np.indices(geometry.shape), axis=-1) / (np.array(geometry.shape) - 1)
    label_map = np.zeros(geometry.shape, dtype=np.uint8)
    label_map[(((parts - (0.35, 0.6, 0.4)) / (0.22, 0.15, 0.25)) ** 2).sum(axis=-1) < 1] = 3
    label_map[(((parts - (0.7, 0.35, 0.55)) / (0.18, 0.12, 0.25)) ** 2).sum(axis=-1) < 1] = 7
    label_map[(parts > (0.4, 0.62, 0.45)).all(axis=-1)] = 0
    return label_map


@contextmanager
def opened(world: World, format_name: str, *, mode: str) -> Iterator[tuple[Page, Watch]]:
    """The study in OHIF, with one of our exports opened by a double click, as a reader would."""
    uid = str(pydicom.dcmread(world.files[format_name], stop_before_pixels=True).SeriesInstanceUID)
    with page() as (view, watch):
        view.goto(f"{world.root}/{mode}?StudyInstanceUIDs={world.study}")
        listed = f"window.services?.displaySetService.getActiveDisplaySets().find(s => s.SeriesInstanceUID === '{uid}')"
        view.wait_for_function(f"() => {listed} && document.querySelector('canvas')", timeout=1000 * LOADED_S)
        # A tour of the viewer lies over it at the first visit, sooner or later.
        view.add_style_tag(content="[class*=shepherd] { display: none !important; }")
        view.wait_for_timeout(2000)
        view.locator(f"#thumbnail-{view.evaluate(f'() => {listed}.displaySetInstanceUID')}").dblclick()
        yield view, watch
        assert watch.strangers() == []


def wait_for_segments(view: Page, kind: str) -> None:
    ready = f"window.services.segmentationService.getSegmentations()[0]?.representationData.{kind}"
    view.wait_for_function(f"() => {ready}", timeout=1000 * LOADED_S)
    view.wait_for_timeout(2000)


def indices(points_lps_mm: npt.ArrayLike, geometry: Geometry) -> npt.NDArray[np.int64]:
    """Voxels whose centres the points are; further off than a twentieth of a voxel is an error."""
    exact = geometry.ijk_from_ras(np.asarray(points_lps_mm) * (-1.0, -1.0, 1.0))
    nearest = np.rint(exact)
    assert np.abs(exact - nearest).max() < 0.05
    return nearest.astype(np.int64)


def rebuilt(found: dict[str, Any], geometry: Geometry) -> npt.NDArray[np.uint8]:
    """The viewer's slices, each put where the viewer says that it lies in the patient."""
    ids = {number: label.id for number, name, _ in found["segments"] for label in SCHEMA.labels if label.name == name}
    label_map = np.zeros(geometry.shape, dtype=np.uint8)
    for plane in found["slices"]:
        values = np.reshape(plane["values"], (plane["rows"], plane["columns"]))
        rows, columns = np.nonzero(values)
        if not rows.size:
            continue
        across = np.outer(columns * plane["columnPixelSpacing"], as_vector(plane["rowCosines"]))
        down = np.outer(rows * plane["rowPixelSpacing"], as_vector(plane["columnCosines"]))
        i, j, k = indices(as_vector(plane["imagePositionPatient"]) + across + down, geometry).T
        label_map[i, j, k] = [ids[int(value)] for value in values[rows, columns]]
    return label_map


def as_vector(value: Any) -> npt.NDArray[np.float64]:
    """Three numbers, from an array or from a typed array that came as an object."""
    return np.array(list(value.values()) if isinstance(value, dict) else value, dtype=np.float64)


def assert_ours_only(label_map: npt.NDArray[Any], world: World) -> None:
    assert np.array_equal(label_map, world.label_map)
    # The comparison sees a mirrored map.
    assert not any(np.array_equal(label_map, np.flip(world.label_map, axis)) for axis in range(3))


def brighten(view: Page, k: int, world: World) -> None:
    """Go to slice k of our grid, with a window that suits it."""
    uid = world.slice_uids[k]
    view.evaluate(
        """uid => { const id = services.viewportGridService.getState().activeViewportId;
        const viewport = services.cornerstoneViewportService.getCornerstoneViewport(id);
        viewport.setProperties({voiRange: {lower: 0, upper: 120}});
        return viewport.setImageIdIndex(viewport.getImageIds().findIndex(id => id.includes(uid))); }""",
        uid,
    )
    view.wait_for_timeout(1500)


def assert_painted(view: Page, k: int, world: World) -> None:
    """On slice k, pixels at the places of voxels have their labels' hue, and the others are grey."""
    centre = world.label_map[:, :, k]
    ids = np.argwhere(uniform(centre))
    chosen = ids[np.random.default_rng(0).choice(len(ids), 120)]
    lps_mm = world.geometry.ras_from_ijk(np.column_stack([chosen, np.full(len(chosen), k)])) * (-1.0, -1.0, 1.0)
    places = view.evaluate(
        """points => { const id = services.viewportGridService.getState().activeViewportId;
        const viewport = services.cornerstoneViewportService.getCornerstoneViewport(id);
        const box = viewport.canvas.getBoundingClientRect();
        return points.map(point => viewport.worldToCanvas(point)).map(([x, y]) => [x + box.x, y + box.y]); }""",
        lps_mm.tolist(),
    )
    picture = matplotlib.image.imread(BytesIO(view.screenshot()), format="png")[..., :3] * 255
    colours = {label.id: label.colour for label in SCHEMA.labels}
    seen = set()
    for (i, j), (x, y) in zip(chosen, places, strict=True):
        pixel, label = picture[round(y), round(x)], int(centre[i, j])
        if not (90 < y < 700 and 400 < x < 880):
            continue  # The viewer writes there.
        assert (np.ptp(pixel) > 30) == (label != 0), (label, pixel)
        assert label == 0 or pixel.argmax() == np.argmax(colours[label]), (label, pixel)
        seen.add(label)
    assert seen == {0, 3, 7}


def uniform(plane: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Pixels whose eight neighbours have their value."""
    same = np.zeros(plane.shape, dtype=bool)
    middle = plane[1:-1, 1:-1]
    shifts = [
        plane[1 + a : plane.shape[0] - 1 + a, 1 + b : plane.shape[1] - 1 + b] for a in (-1, 0, 1) for b in (-1, 0, 1)
    ]
    same[1:-1, 1:-1] = np.all([shifted == middle for shifted in shifts], axis=0)
    return same


@pytest.mark.parametrize("format_name", ["seg", "labelmap"])
def test_segmentation(world: World, format_name: str) -> None:
    with opened(world, format_name, mode="segmentation") as (view, _):
        wait_for_segments(view, "Labelmap")
        found = view.evaluate(LABEL_MAP)
        assert [(name, tuple(colour)) for _, name, colour in found["segments"]] == [
            (x.name, x.colour) for x in SCHEMA.labels
        ]
        assert_ours_only(rebuilt(found, world.geometry), world)
        both = [
            k for k, plane in enumerate(np.moveaxis(world.label_map, 2, 0)) if {3, 7} <= set(plane.ravel().tolist())
        ]
        k = both[len(both) // 2]
        brighten(view, k, world)
        keep(view, f"ohif_{format_name}")
        assert_painted(view, k, world)


def test_structures(world: World) -> None:
    """Voxels whose centres lie inside the viewer's contours are those of the label."""
    with opened(world, "rtstruct", mode="segmentation") as (view, _):
        wait_for_segments(view, "Contour")
        contours = view.evaluate(CONTOURS)
        keep(view, "ohif_rtstruct")
    columns, rows = np.meshgrid(np.arange(world.geometry.shape[0]), np.arange(world.geometry.shape[1]), indexing="ij")
    centres_ij = np.column_stack([columns.ravel(), rows.ravel()])
    label_map = np.zeros(world.geometry.shape, dtype=np.uint8)
    for contour in contours:
        corners = world.geometry.ijk_from_ras(np.array(contour["points"]) * (-1.0, -1.0, 1.0))
        k = round(float(corners[:, 2].mean()))
        assert np.abs(corners[:, 2] - k).max() < 0.05
        inside = Outline(corners[:, :2]).contains_points(centres_ij).reshape(columns.shape)
        # Contours of one label within each other are holes.
        number = SCHEMA.labels[contour["label"] - 1].id
        label_map[:, :, k] = np.where(inside, np.where(label_map[:, :, k] == number, 0, number), label_map[:, :, k])
    assert_ours_only(label_map, world)


def test_measurements(world: World) -> None:
    """The report opens on the slice that its first outline lies on, and says our volumes."""
    with opened(world, "sr", mode="viewer") as (view, _):
        loaded = "services.displaySetService.getActiveDisplaySets().find(s => s.Modality === 'SR').measurements"
        view.wait_for_function(f"() => {loaded}?.length && {loaded}.every(m => m.loaded)", timeout=1000 * LOADED_S)
        view.wait_for_timeout(3000)
        report = view.evaluate(REPORT)
        keep(view, "ohif_sr")
    assert [group["TrackingIdentifier"] for group in report["groups"]] == [label.name for label in OCCURRING]
    for group, label in zip(report["groups"], OCCURRING, strict=True):
        volume_mm3 = np.count_nonzero(world.label_map == label.id) * world.geometry.voxel_volume_mm3
        assert {"label": "Volume", "value": f"{volume_mm3:.2f} mm3"} in group["labels"]
        k = world.slice_uids.index(group["image"])
        assert (world.label_map[:, :, k] == label.id).any()
    assert report["groups"][0]["image"] in report["shown"]
