"""The overlay: which side is which, what is to scale, and that storage order changes nothing."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure

from pipeline.export.overlay import draw_overlay, write_overlay
from pipeline.segmentation import Algorithm, Segmentation
from transforms.geometry import Geometry
from transforms.labels import Label, LabelSchema, schema_from_names
from transforms.volume import Volume

DATA = Path(__file__).parents[2] / "data"
ORANGE, BLUE = (230, 120, 0), (40, 120, 255)
SHAPE_RAS = (24, 30, 16)
SPACING_MM = (1.5, 1.0, 3.0)


def world() -> tuple[Segmentation, Volume]:
    """A grey box (RAS axes) with an orange cube right, anterior, superior and a blue one left, posterior, inferior."""
    affine = np.diag([*SPACING_MM, 1.0])
    geometry = Geometry(SHAPE_RAS, affine)
    labels = np.zeros(SHAPE_RAS, dtype=np.uint8)
    labels[16:22, 20:28, 10:14] = 1
    labels[2:8, 3:11, 2:6] = 2
    labels[4:20, 14:16, 7:9] = 3
    image = np.linspace(0, 100, labels.size, dtype=np.float32).reshape(SHAPE_RAS)
    schema = LabelSchema(
        labels=(
            Label(id=1, name="Right", colour=ORANGE),
            Label(id=2, name="Left", colour=BLUE),
            Label(id=3, name="Middle", colour=(128, 128, 128)),
        )
    )
    return Segmentation(labels, geometry, schema, Algorithm("test", "1")), Volume(image, geometry, None, 0.0)


def reordered(segmentation: Segmentation, image: Volume, codes: str) -> tuple[Segmentation, Volume]:
    target = image.geometry.oriented(codes)
    axes = image.geometry.axis_map(target)

    def turn(voxels: np.ndarray) -> np.ndarray:
        flips = tuple(t for t, s in enumerate(axes.scales) if s < 0)
        return np.ascontiguousarray(np.flip(voxels.transpose(axes.source_axes), flips))

    return (
        replace(segmentation, label_map=turn(segmentation.label_map), geometry=target),
        replace(image, voxels=turn(image.voxels), geometry=target),
    )


def rendered(figure: Figure) -> np.ndarray:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=80)
    buffer.seek(0)
    return np.round(matplotlib.image.imread(buffer)[..., :3] * 255).astype(int)


def panel(figure: Figure, picture: np.ndarray, number: int) -> np.ndarray:
    """The pixels of a plane: 0 axial, 1 coronal, 2 sagittal."""
    left, bottom, width, height = figure.axes[number].get_position().bounds
    rows, columns = picture.shape[:2]
    top = rows - round((bottom + height) * rows)
    return picture[top : top + round(height * rows), round(left * columns) : round((left + width) * columns)]


def centre(pixels: np.ndarray, colour: tuple[int, int, int]) -> tuple[float, float]:
    """Of what has the colour's outline: parts of the panel's width from the left and height from the top."""
    near = np.abs(pixels - colour).max(axis=2) < 40
    assert near.any(), "the colour is not in the panel"
    rows, columns = np.nonzero(near)
    return float(columns.mean() / pixels.shape[1]), float(rows.mean() / pixels.shape[0])


def only(segmentation: Segmentation, label_id: int) -> Segmentation:
    return replace(segmentation, label_map=np.where(segmentation.label_map == label_id, label_id, 0).astype(np.uint8))


def test_sides() -> None:
    """Radiological: the patient's right on the left; anterior up, or left in the sagittal plane; superior up."""
    segmentation, image = world()
    for label_id, colour, is_right_anterior_superior in ((1, ORANGE, True), (2, BLUE, False)):
        figure = draw_overlay(only(segmentation, label_id), image)
        picture = rendered(figure)
        for number in range(3):
            x, y = centre(panel(figure, picture, number), colour)
            assert (x < 0.5) == is_right_anterior_superior, number
            assert (y < 0.5) == is_right_anterior_superior, number


def test_letters_stand_at_their_edges() -> None:
    figure = draw_overlay(*world())
    for axes, (left, right, top, bottom) in zip(figure.axes, ("RLAP", "RLSI", "APSI"), strict=False):
        places = {text.get_text(): text.xy for text in axes.texts}
        assert places[left] == (0, 0.5)
        assert places[right] == (1, 0.5)
        assert places[top] == (0.5, 1)
        assert places[bottom] == (0.5, 0)


@pytest.mark.parametrize("codes", ["LPS", "ASR", "PIR", "SLA", "IRP"])
def test_storage_order_changes_nothing(codes: str) -> None:
    expected = rendered(draw_overlay(*world()))
    assert np.array_equal(rendered(draw_overlay(*reordered(*world(), codes))), expected)


def test_millimetres_are_square() -> None:
    figure = draw_overlay(*world())
    width_in, height_in = figure.get_size_inches()
    for axes in figure.axes[:3]:
        box = axes.get_position()
        (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
        assert (right - left) / (bottom - top) == pytest.approx(box.width * width_in / (box.height * height_in))
    axial, coronal, sagittal = ((axes.get_xlim()[1], axes.get_ylim()[0]) for axes in figure.axes[:3])
    assert axial == (24 * 1.5, 30 * 1.0)
    assert coronal == (24 * 1.5, 16 * 3.0)
    assert sagittal == (30 * 1.0, 16 * 3.0)


def test_outlines_run_along_the_voxels_edges() -> None:
    segmentation, image = world()
    figure = draw_overlay(only(segmentation, 1), replace(image, voxels=np.zeros_like(image.voxels)))
    picture = panel(figure, rendered(figure), 0)
    rows, columns = np.nonzero(np.abs(picture - ORANGE).max(axis=2) < 40)
    size_mm = figure.axes[0].get_xlim()[1] / picture.shape[1]
    # Six voxels of 1.5 mm from the third on the right, eight of 1 mm from the third in front.
    assert (columns.min() + columns.max() + 1) / 2 * size_mm == pytest.approx(5 * 1.5, abs=0.2)
    assert (rows.min() + rows.max() + 1) / 2 * size_mm == pytest.approx(6 * 1.0, abs=0.2)
    # The line is drawn half inside and half outside.
    assert (columns.max() - columns.min()) * size_mm == pytest.approx(6 * 1.5, abs=1.0)
    assert (rows.max() - rows.min()) * size_mm == pytest.approx(8 * 1.0, abs=1.0)


def test_planes_go_through_the_largest_area() -> None:
    segmentation, image = world()
    labels = np.zeros_like(segmentation.label_map)
    labels[5, 5, 5] = 1
    labels[5:9, 5:9, 11] = 1
    voxels = np.zeros_like(image.voxels)
    voxels[..., 11] = 100
    figure = draw_overlay(replace(segmentation, label_map=labels), replace(image, voxels=voxels))
    assert np.asarray(figure.axes[0].images[0].get_array()).min() == 100


def test_far_away_tissue_is_not_shown() -> None:
    labels = np.zeros((200, 200, 50), dtype=np.uint8)
    labels[90:110, 90:110, 20:30] = 1
    geometry = Geometry(labels.shape, np.eye(4))
    image = Volume(np.zeros(labels.shape, dtype=np.float32), geometry, "CT", -1024.0)
    segmentation = Segmentation(labels, geometry, schema_from_names({1: "a"}), Algorithm("x", "1"))
    axial = draw_overlay(segmentation, image).axes[0]
    assert 20 + 2 * 15 <= axial.get_xlim()[1] <= 20 + 2 * 15 + 2


def test_legend() -> None:
    segmentation, image = world()
    figure = draw_overlay(only(segmentation, 1), image, reference=segmentation)
    texts = [text.get_text() for text in figure.axes[3].texts]
    assert texts == ["Right", "0.86 ml", "Left", "not found", "Middle", "not found", "Reference"]
    notes = " ".join(text.get_text() for text in figure.texts)
    assert "the patient's right is on the left" in notes
    assert "test 1 · for research, not for diagnosis" in notes


def test_more_labels_than_room() -> None:
    segmentation, image = world()
    schema = schema_from_names({n: f"label number {n} with a long name" for n in range(1, 105)})
    figure = draw_overlay(replace(segmentation, schema=schema), image)
    texts = [text.get_text() for text in figure.axes[3].texts]
    shown = len(texts) // 2
    assert texts[-1] == f"and {104 - shown} more"
    assert all(len(text) <= 21 for text in texts)


def test_the_reference_is_dashed_and_decides_when_nothing_was_found() -> None:
    segmentation, image = world()
    empty = replace(segmentation, label_map=np.zeros_like(segmentation.label_map))
    figure = draw_overlay(empty, image, reference=segmentation)
    assert figure.axes[0].collections
    assert all(c.get_linestyles()[0][1] is not None for c in figure.axes[0].collections)


def test_nothing_found(tmp_path: Path) -> None:
    segmentation, image = world()
    write_overlay(tmp_path / "x.png", replace(segmentation, label_map=np.zeros_like(segmentation.label_map)), image)
    assert matplotlib.image.imread(tmp_path / "x.png").size


def test_names_that_matplotlib_would_read_as_mathematics(tmp_path: Path) -> None:
    segmentation, image = world()
    schema = schema_from_names({1: r"a$\frac{$", 2: "$x$", 3: "海馬"})
    write_overlay(tmp_path / "x.png", replace(segmentation, schema=schema), image)


def test_constant_images(tmp_path: Path) -> None:
    segmentation, image = world()
    write_overlay(tmp_path / "x.png", segmentation, replace(image, voxels=np.full_like(image.voxels, 7)))


def test_equal_results_give_equal_bytes(tmp_path: Path) -> None:
    for name in "ab":
        write_overlay(tmp_path / name, *world())
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_another_grid_is_refused() -> None:
    segmentation, image = world()
    moved = replace(image, geometry=image.geometry.flipped(0))
    with pytest.raises(ValueError, match="one grid"):
        draw_overlay(segmentation, moved)


def test_a_real_case(tmp_path: Path) -> None:
    from transforms.volume import read_label, read_volume

    path = sorted((DATA / "hippocampus" / "images").glob("*.nii.gz"))[0]
    image, label = read_volume(path), read_label(DATA / "hippocampus" / "labels" / path.name)
    schema = schema_from_names({1: "Anterior", 2: "Posterior"})
    segmentation = Segmentation(label.voxels.astype(np.uint8), label.geometry, schema, Algorithm("reference", ""))
    write_overlay(tmp_path / "x.png", segmentation, image)
    height, width = matplotlib.image.imread(tmp_path / "x.png").shape[:2]
    assert 1800 <= width <= 2100
    assert 450 <= height <= 700


def test_a_sheared_grid_is_shown_straight() -> None:
    """A rod along the body, through slices of a tilted gantry: upright in the sagittal plane, and to scale."""
    affine = np.diag([*SPACING_MM, 1.0])
    affine[1, 2] = 1.5
    leaning = Geometry(SHAPE_RAS, affine)
    labels = np.zeros(SHAPE_RAS, dtype=np.uint8)
    for k in range(16):
        row = round(24 - 1.5 * k)
        labels[10:13, max(0, row) : row + 3, k] = 1
    schema = LabelSchema(labels=(Label(id=1, name="Rod", colour=ORANGE),))
    segmentation = Segmentation(labels, leaning, schema, Algorithm("test", "1"))
    image = Volume(labels.astype(np.float32) * 100 - 50, leaning, None, 0.0)
    figure = draw_overlay(segmentation, image)
    pixels = panel(figure, rendered(figure), 2)
    near = np.abs(pixels - ORANGE).max(axis=2) < 40
    rows = np.flatnonzero(near.any(axis=1))
    upper, lower = (np.flatnonzero(near[part].any(axis=0)).mean() for part in np.array_split(rows, 2))
    assert upper == pytest.approx(lower, abs=0.03 * pixels.shape[1])
    across = np.ptp(np.flatnonzero(near.any(axis=0))) + 1
    # 16 slices 3 mm apart, 3 rows of 1 mm that lie up to half a row off.
    assert len(rows) / across == pytest.approx(48 / 4, rel=0.25)
