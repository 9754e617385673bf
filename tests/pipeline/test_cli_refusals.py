"""Images that are given as label maps without names, and what the command line says instead of exporting them."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.errors import ConfigError, VolsegError, VolumeError
from pipeline.evaluate import evaluate_files
from transforms.labels import schema_from_names

NOTE = "no labels.json beside LABELS: labels are called by their numbers; give --schema"


def written(path: Path, voxels: np.ndarray) -> Path:
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), path)
    return path


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return written(tmp_path / "image.nii.gz", np.arange(300, dtype=np.int16).reshape(3, 10, 10))


def command(labels: Path, source: Path, *more: str) -> list[str]:
    out = str(labels.parent / "out")
    return ["export", str(labels), "--source", str(source), "--as", "nifti", "--out", out, *more]


def test_an_image_is_not_exported_as_its_own_labels(image: Path) -> None:
    done = CliRunner().invoke(app, command(image, image))
    assert isinstance(done.exception, VolumeError)
    assert str(done.exception).startswith(f"{image}: looks like an image: 299 different values above 0")
    assert not (image.parent / "out").exists()


def test_an_image_is_not_exported_as_the_labels_of_another(image: Path) -> None:
    other = written(image.with_name("other.nii.gz"), np.ones((3, 10, 10), np.int16))
    done = CliRunner().invoke(app, command(image, other))
    assert isinstance(done.exception, VolumeError)
    assert str(done.exception) == (
        f"{image}: looks like an image: 299 different values above 0, expected a label map; "
        "if they are labels, name them by --schema or labels.json beside LABELS"
    )
    assert not (image.parent / "out").exists()


@pytest.mark.parametrize(("value", "is_named"), [(257, True), (-1, True), (70000, False), (-1, False)])
def test_a_value_that_is_no_label_is_not_exported_as_one(image: Path, value: int, *, is_named: bool) -> None:
    voxels = np.eye(3, dtype=np.int32)[:, :, None].repeat(10, 2)
    voxels[0, 1] = value
    labels = written(image.with_name("labels.nii.gz"), voxels)
    source = written(image.with_name("source.nii.gz"), np.ones((3, 3, 10), np.int16))
    if is_named:
        (image.parent / "labels.json").write_text('{"labels": [{"id": 1, "name": "Liver", "colour": [1, 2, 3]}]}')
    done = CliRunner().invoke(app, command(labels, source))
    assert isinstance(done.exception, VolsegError)
    assert str(value) in str(done.exception)
    assert not (image.parent / "out").exists()


def test_names_that_are_invented_are_told_once(image: Path) -> None:
    labels = written(image.with_name("labels.nii.gz"), np.eye(3, dtype=np.uint8)[:, :, None].repeat(10, 2))
    source = written(image.with_name("source.nii.gz"), np.ones((3, 3, 10), np.int16))
    done = CliRunner().invoke(app, command(labels, source))
    assert done.exit_code == 0
    assert done.stderr.splitlines() == [NOTE]
    (image.parent / "labels.json").write_text(
        '{"labels": [{"id": 1, "name": "Liver", "colour": [1, 2, 3]}]}', encoding="utf-8"
    )
    done = CliRunner().invoke(app, command(labels, source))
    assert (done.exit_code, NOTE in done.stderr) == (0, False), done.exception


@pytest.mark.parametrize("values", [100, 300])
def test_an_image_is_not_scored_as_labels(tmp_path: Path, values: int) -> None:
    """On either side; one of fewer values than there may be labels is known by neighbours that differ."""
    image = np.random.default_rng(0).permutation(np.arange(1, values + 1)).astype(np.int16).reshape(-1, 5, 5)
    files = [written(tmp_path / f"{name}.nii", m) for name, m in (("image", image), ("map", image // image))]
    for pair in (files, files[::-1]):
        with pytest.raises(VolumeError) as error:
            evaluate_files(*pair)
        assert str(error.value) == (
            f"{files[0]}: looks like an image: {values} different values above 0, expected a label map; "
            "if they are labels, name them in labels.json beside the predictions"
        )


def test_many_labels_that_lie_together_are_scored(tmp_path: Path) -> None:
    """Also where each has but one voxel and no labelled neighbour; with names there may be more than 255."""
    together = np.repeat(np.arange(1, 101, dtype=np.int16), 8).reshape(-1, 2, 2, order="F")
    apart = np.zeros((200, 1, 1), np.int16)
    apart[::2, 0, 0] = np.arange(1, 101)
    for name, label_map in (("together", together), ("apart", apart)):
        file = written(tmp_path / f"{name}.nii", label_map)
        assert len(evaluate_files(file, file).labels) == 100
    many = written(tmp_path / "many.nii", np.repeat(np.arange(300, dtype=np.int16), 4).reshape(-1, 2, 2))
    named = schema_from_names({n: f"part {n}" for n in range(1, 300)})
    assert len(evaluate_files(many, many, named).labels) == 299


def test_what_scores_cannot_be_written_as_has_a_command(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    done = CliRunner().invoke(app, ["scores", "combine", str(tmp_path), "--out", out, "--as", "seg"])
    assert isinstance(done.exception, ConfigError)
    assert str(done.exception).endswith("volseg export LABELS --source IMAGE --as FORMAT --out FOLDER")
