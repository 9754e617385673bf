"""What `export` promises whatever the format: it refuses what it cannot do, and leaves nothing half-done."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from pipeline.cli import FORMAT_HELP
from pipeline.errors import ExportError, RunError
from pipeline.export import (
    COPIES,
    FORMATS,
    Options,
    Source,
    check_formats,
    discard_exports,
    export,
    path_of,
    written_formats,
)
from pipeline.export.confidential import SOURCE_FORMAT, SOURCE_SUFFIX
from pipeline.export.nifti import write_nifti
from pipeline.segmentation import Segmentation

EXACT = ("seg", "labelmap", "nifti", "nrrd")
"""The formats that hold voxels."""


def mirrored(segmentation: Segmentation) -> Segmentation:
    return replace(segmentation, label_map=segmentation.label_map[::-1].copy())


def test_all_formats(phantom: Segmentation, source: Source, tmp_path: Path) -> None:
    files = export(phantom, formats=list(FORMATS), out=tmp_path / "out", name="case_1", source=source)
    assert [file.format for file in files] == list(FORMATS)
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {file.path.name for file in files} | {"case_1.verification.json"}
    report = json.loads((tmp_path / "out" / "case_1.verification.json").read_text(encoding="utf-8"))
    assert [row["format"] for row in report["files"]] == [key for key, form in FORMATS.items() if form.verify]
    assert [file.path.name for file in files] == ["case_1" + form.suffix for form in FORMATS.values()]
    exact = [row for row in report["files"] if row["format"] in EXACT]
    assert len(exact) == len(EXACT)
    for row in exact:
        figures = {label["id"]: label for label in row["verification"]["labels"]}
        assert [figures[i]["dice"] for i in (200, 3, 7)] == [1.0, 1.0, None]
        assert [figures[i]["voxels"] for i in (200, 3, 7)] == [17, 33, 0]
        assert figures[200]["volume_mm3"] == pytest.approx(17 * 2.0 * 0.7 * 3.5, rel=1e-6)
        assert figures[200]["centroid_distance_mm"] < 1e-3


def test_a_format_written_twice_is_written_once(phantom: Segmentation, source: Source, tmp_path: Path) -> None:
    files = export(phantom, formats=["nifti", "nifti"], out=tmp_path / "out", name="x", source=source)
    assert len(files) == 1


def test_figures_of_earlier_formats_stay(phantom: Segmentation, source: Source, tmp_path: Path) -> None:
    for formats in (["seg", "nifti"], ["nrrd"], ["nifti", "overlay"]):
        export(phantom, formats=formats, out=tmp_path, name="x", source=source)
    report = tmp_path / "x.verification.json"
    assert [row["format"] for row in json.loads(report.read_text())["files"]] == ["seg", "nrrd", "nifti"]
    (tmp_path / "x.seg.dcm").unlink()
    export(phantom, formats=["nifti"], out=tmp_path, name="x", source=source)
    assert [row["format"] for row in json.loads(report.read_text())["files"]] == ["nrrd", "nifti"]
    report.write_text('{"files": [3]}')
    export(phantom, formats=["nifti"], out=tmp_path, name="x", source=source)
    assert [row["format"] for row in json.loads(report.read_text())["files"]] == ["nifti"]


def test_what_is_taken_away_goes_with_its_figures(phantom: Segmentation, source: Source, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(phantom, formats=["nifti", "stl", "nrrd", "overlay"], out=out, name="x", source=source)
    (out / "xy.nii.gz").write_bytes(b"of another")
    report = out / "x.verification.json"
    discard_exports(out, "x", ["x.meshes", "x.nii.gz", "x.seg.dcm", "xy.nii.gz", "x.verification.json"])
    assert [row["format"] for row in json.loads(report.read_text())["files"]] == ["nrrd"]
    assert {path.name for path in out.iterdir()} == {"x.seg.nrrd", "x.png", "xy.nii.gz", report.name}
    discard_exports(out, "x", ["x.seg.nrrd"])
    assert {path.name for path in out.iterdir()} == {"x.png", "xy.nii.gz"}


def test_a_link_that_is_taken_away_leads_nowhere(tmp_path: Path) -> None:
    (tmp_path / "x.meshes").symlink_to(tmp_path.parent, target_is_directory=True)
    discard_exports(tmp_path, "x", ["x.meshes"])
    assert list(tmp_path.iterdir()) == []
    assert tmp_path.parent.is_dir()


def test_what_comes_of_formats_is_known_beforehand(tmp_path: Path) -> None:
    assert written_formats(["sr", "nifti", "seg"], Options()) == ("seg", "sr", "nifti")
    assert (COPIES, path_of(tmp_path, "x", COPIES).name) == (SOURCE_FORMAT, f"x{SOURCE_SUFFIX}")


def test_the_name_cannot_leave_the_folder(phantom: Segmentation, source: Source, tmp_path: Path) -> None:
    [file] = export(phantom, formats=["nifti"], out=tmp_path / "out", name="../a b", source=source)
    assert file.path.parent == tmp_path / "out"


def test_an_unknown_format_names_the_nearest_and_all() -> None:
    with pytest.raises(ExportError, match=r"no export format 'nifty': did you mean 'nifti'\? .* seg, .*nifti"):
        check_formats(["seg", "nifty"])
    with pytest.raises(ExportError, match="no export format 'qqqq': the formats are seg"):
        check_formats(["qqqq"])
    with pytest.raises(ExportError, match="no export format is named; the formats are seg"):
        check_formats([])


def test_help_names_each_format_once() -> None:
    """The command line spells them out, since it starts without this package."""
    assert sorted(re.findall(r"\b[a-z]+\b", FORMAT_HELP)) == sorted(FORMATS)


def test_an_unknown_format_is_refused_before_anything_is_written(
    phantom: Segmentation, source: Source, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match="no export format"):
        export(phantom, formats=["nifti", "no"], out=tmp_path / "out", name="x", source=source)
    assert not (tmp_path / "out").exists()


def test_seg_wants_a_dicom_source(phantom: Segmentation, source: Source, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="format 'seg' refers to a DICOM series") as caught:
        export(phantom, formats=["seg"], out=tmp_path / "out", name="x", source=Source(source.image))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("part", ["image", "series"])
def test_another_grid_is_refused(phantom: Segmentation, source: Source, tmp_path: Path, part: str) -> None:
    moved = phantom.geometry.flipped(0)
    other = replace(getattr(source, part), geometry=moved)
    with pytest.raises(ExportError, match=f"not on the grid of its source {part}"):
        export(phantom, formats=["nifti"], out=tmp_path / "out", name="x", source=replace(source, **{part: other}))


def test_unknown_labels_are_refused(phantom: Segmentation, source: Source, tmp_path: Path) -> None:
    labels = phantom.label_map.copy()
    labels[0, 0, 0] = 99
    with pytest.raises(ExportError, match=r"\[99\]"):
        export(replace(phantom, label_map=labels), formats=["nifti"], out=tmp_path, name="x", source=source)


def test_a_mirrored_file_is_not_kept(
    phantom: Segmentation, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [good] = export(phantom, formats=["nifti"], out=tmp_path / "out", name="case", source=source)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    careless = replace(FORMATS["nifti"], write=lambda target, job: write_nifti(target, mirrored(job.segmentation)))
    monkeypatch.setitem(FORMATS, "nifti", careless)
    with pytest.raises(ExportError, match=r"case\.nii\.gz was not written: label 'Höcker' reads back with Dice 0\."):
        export(phantom, formats=["nifti"], out=tmp_path / "out", name="case", source=source)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    with pytest.raises(ExportError):
        export(phantom, formats=["nifti"], out=tmp_path / "new", name="case", source=source)
    assert list((tmp_path / "new").iterdir()) == []
    assert good.path.exists()


@pytest.mark.parametrize("key", EXACT)
@pytest.mark.parametrize("content", [b"", b"no such file", gzip.compress(b"\1" * 4000)])
def test_a_file_that_cannot_be_read_back_is_not_kept(
    phantom: Segmentation, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, content: bytes
) -> None:
    careless = replace(FORMATS[key], write=lambda target, *_: target.write_bytes(content))
    monkeypatch.setitem(FORMATS, key, careless)
    with pytest.raises(ExportError, match=rf"x\{FORMATS[key].suffix} was not written: it"):
        export(phantom, formats=[key], out=tmp_path / "out", name="x", source=source)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_folder_that_cannot_be_made(phantom: Segmentation, source: Source, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunError, match="a file stands where a folder is needed"):
        export(phantom, formats=["nifti"], out=tmp_path / "file" / "out", name="x", source=source)


def test_an_empty_result_is_exported(phantoms: SimpleNamespace, source: Source, tmp_path: Path) -> None:
    empty = phantoms.segmentation_of(source, np.zeros(source.image.geometry.shape, dtype=np.uint8))
    files = export(empty, formats=list(FORMATS), out=tmp_path / "out", name="empty", source=source)
    for file in files:
        if file.verification is not None:
            assert [label.dice for label in file.verification.labels] == [None, None, None]


def test_import_is_light() -> None:
    heavy = ("highdicom", "matplotlib", "nibabel", "pydicom", "scipy", "SimpleITK", "torch")
    source = f"import sys, pipeline.export; print(*sorted(set({heavy}) & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == []
