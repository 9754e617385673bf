"""`volseg dicom ls`: what it prints, what it writes, how it ends; and that no identity is in any of it."""

from __future__ import annotations

import json
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pydicom
import pytest
from click.testing import Result
from typer.testing import CliRunner

from pipeline.cli_dicom import dicom_app, show_listing
from pipeline.describe import facts_of
from pipeline.dicom_listing import index_tree, listing_json, listing_rows, read_salt, summary
from pipeline.errors import ConfigError, DicomError, VolumeError

PATIENT = ("Nightingale", "1820-0512")
Listing = Callable[..., Result]


@pytest.fixture
def ls() -> Listing:
    def run(*arguments: object) -> Result:
        result = CliRunner().invoke(dicom_app, ["ls", *map(str, arguments)])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return run


@pytest.fixture
def tree(data_dir: Path, tmp_path: Path) -> Path:
    """Five series of three patients, seven volumes: read, tilted, with a gap, split twice; and a report and a text."""
    for name in ("tilt", "missing", "magnitude_phase", "fmri"):
        shutil.copytree(data_dir / "dicom_odd" / "stacks" / name, tmp_path / "tree" / name)
    shutil.copytree(data_dir / "dicom_hippocrop", tmp_path / "tree" / "deep" / "er")
    (tmp_path / "tree" / "notes.txt").write_text("text")
    report = pydicom.dcmread(data_dir / "dicom_hippocrop" / "14.dcm")
    for keyword in ("Rows", "Columns", "PixelData"):
        delattr(report, keyword)
    report.Modality, report.SeriesInstanceUID, report.SOPInstanceUID = "SR", "1.2.3", "1.2.4"
    report.PatientName, report.PatientID = PATIENT
    report.save_as(tmp_path / "tree" / "report")
    return tmp_path / "tree"


def test_the_table(ls: Listing, tree: Path) -> None:
    result = ls(tree)
    lines = result.output.splitlines()
    assert " ".join(lines[0].split()) == (
        "no. patient study series kind description size spacing mm plane usable findings"
    )
    rows = [line.split() for line in lines[1:9]]
    assert [row[0] for row in rows] == list("12345678")
    told = {" ".join(row[4:]) for row in rows}
    assert "CT - 16x16x4 0.418x0.418x5 axial 14° yes gantry-tilt" in told
    assert "CT - 16x16x4 0.43x0.43x? axial no missing-slices" in told
    assert "MR magnitude 16x16x4 0.299x0.299x1 axial 4° yes split-series" in told
    assert "MR HippoCrop 34x50x40 1x1x1 axial yes" in told
    assert "SR HippoCrop - 1x1x? axial - no-pixels" in told
    assert "missing-slices: 1 missing where slices are 5 mm apart: 10 mm after IM-0001-0009-0001.dcm" in lines[9]
    assert lines[-1] == "8 volumes in 6 series: 6 usable, 1 not, 1 not an image; 2 files set aside"
    assert result.exit_code == 1
    assert not any(part in result.output for part in PATIENT)


def test_exit_code_and_resampling(ls: Listing, tree: Path) -> None:
    """What is no image does not count, a gap does until it is filled."""
    assert ls(tree / "tilt").exit_code == 0
    assert ls(tree / "missing").exit_code == 1
    mended = ls(tree / "missing", "--resample-uneven")
    assert mended.exit_code == 0
    assert "16x16x4  0.43x0.43x5  axial  yes     resampled" in mended.output
    assert ls(tree / "report").exit_code == 0


def test_json_is_complete(ls: Listing, tree: Path, tmp_path: Path) -> None:
    printed = ls(tree, "--json", "-", "--salt", tmp_path / "salt")
    document = json.loads(printed.output)
    assert ls(tree, "--json", tmp_path / "all.json", "--salt", tmp_path / "salt").exit_code == 1
    assert json.loads((tmp_path / "all.json").read_text(encoding="utf-8")) == document
    assert document["summary"] == "8 volumes in 6 series: 6 usable, 1 not, 1 not an image; 2 files set aside"
    assert document["set_aside"] == [
        {"file": name, "reason": "not DICOM"} for name in ("notes.txt", "deep/er/LICENCE.md")
    ]
    by_kind = {
        (entry["modality"], entry["files"][0].split("/")[0], entry["stack"]): entry for entry in document["series"]
    }
    gap = by_kind["CT", "missing", ""]
    assert (gap["usable"], gap["geometry"], gap["matrix"], gap["slice_count"]) == (False, None, [16, 16], 4)
    assert [(f["name"], f["outcome"]) for f in gap["findings"]] == [("missing-slices", "refuse")]
    phase = by_kind["MR", "magnitude_phase", "phase"]
    assert phase["choice"] == phase["series_uid"] + "#2"
    assert phase["files"] == [f"magnitude_phase/00{n}.dcm" for n in (8, 7, 6, 5)]
    assert phase["geometry"]["axis_codes"] == "LPS"
    assert phase["geometry"]["spacing_mm"][2] == pytest.approx(1, abs=1e-4)
    report = by_kind["SR", "report", ""]
    assert (report["is_image"], report["usable"]) == (False, False)
    assert str(tmp_path) not in printed.output
    assert not any(part in printed.output for part in PATIENT)


def test_each_choice_of_the_json_is_taken(tree: Path) -> None:
    from transforms.dicom_index import choose_series

    index = index_tree(tree)
    for entry, volume in zip(listing_json(index, tree)["series"], index.series, strict=True):
        assert choose_series(index.series, series=entry["choice"], folder=tree) is volume
        assert choose_series(index.series, series=str(entry["number"]), folder=tree) is volume


def test_the_salt_keeps_patients_apart_and_together(tree: Path, tmp_path: Path) -> None:
    def keys(salt: Path | None) -> list[str]:
        return [volume.patient_key for volume in index_tree(tree, salt_file=salt).series]

    first = keys(tmp_path / "salt")
    assert keys(tmp_path / "salt") == first
    assert stat.S_IMODE((tmp_path / "salt").stat().st_mode) == 0o600
    assert not set(keys(tmp_path / "another")) & set(first)
    assert not set(keys(None)) & set(first)
    # Patients by the tree's own tags: three, one of them the report's.
    patients = {str(pydicom.dcmread(path).PatientID) for path in tree.rglob("*") if path.suffix == ".dcm"}
    assert len(set(first)) == len(patients) + 1


@pytest.mark.parametrize("content", ["", "short"])
def test_a_salt_that_is_none(tree: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "salt").write_text(content)
    with pytest.raises(ConfigError, match=r"holds \d bytes, expected 32 to 1024"):
        index_tree(tree, salt_file=tmp_path / "salt")
    with pytest.raises(ConfigError, match=r"--salt .*: cannot be written: No such file"):
        read_salt(tmp_path / "nowhere" / "salt")
    with pytest.raises(ConfigError, match=r"--salt .*: cannot be read: Is a directory"):
        read_salt(tmp_path)


def test_a_folder_without_dicom(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("text")
    with pytest.raises(VolumeError, match=r"no DICOM file among 1 file$"):
        index_tree(tmp_path)
    with pytest.raises(DicomError, match="no such file or folder"):
        index_tree(tmp_path / "nowhere")


def test_damaged_files_are_not_usable(ls: Listing, tree: Path) -> None:
    """Beside a series they condemn it; alone they are a line of their own."""
    alone = tree / "alone"
    alone.mkdir()
    (alone / "IM1").write_bytes((tree / "tilt" / "IM-0001-0001.dcm").read_bytes()[:250])
    result = ls(alone)
    assert result.exit_code == 1
    assert "damaged-file: IM1" in result.output
    assert result.output.splitlines()[-1] == "1 series: 0 usable, 1 not"


def test_many_phases_share_a_row(tree: Path, tmp_path: Path) -> None:
    for time in range(5):
        for path in sorted((tree / "tilt").iterdir()):
            dataset = pydicom.dcmread(path)
            dataset.TemporalPositionIdentifier = time + 1
            dataset.SOPInstanceUID += f".{time}"
            dataset.save_as(tmp_path / f"{path.stem}.{time}")
    shutil.rmtree(tree)
    (row,) = listing_rows(index_tree(tmp_path))
    assert (row.numbers, row.description, row.size) == ("1-5", "temporal position 1 to 5", "16x16x4")
    assert summary(index_tree(tmp_path)) == "5 volumes in 1 series: 5 usable"


def test_identifiers_are_cut_where_they_still_differ(tree: Path) -> None:
    rows, volumes = listing_rows(index_tree(tree)), index_tree(tree).series
    assert len({row.series for row in rows}) == len({volume.series_uid for volume in volumes})
    for row, volume in zip(rows, volumes, strict=True):
        assert volume.series_uid.endswith(row.series.removeprefix("…"))
        assert len(row.series) <= 6


@pytest.mark.parametrize(("width", "series"), [(80, False), (140, True)])
def test_terminals_of_two_widths(
    tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], width: int, series: bool
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    show_listing(listing_rows(index_tree(tree)))
    lines = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).splitlines()
    assert max(map(len, lines)) <= width
    assert ("series" in lines[0]) is series
    assert any(line.startswith("mended: ") for line in lines) is not series


def test_info_shows_the_same_rows(tree: Path) -> None:
    title, rows = facts_of(tree / "missing", resample_uneven=True)
    assert title == "DICOM in missing, 1 series: 1 usable"
    assert [(row["size"], row["usable"], row["findings"]) for row in rows] == [("16x16x4", "yes", "resampled")]


def test_nothing_heavy_is_imported(tree: Path) -> None:
    """Listing a folder needs neither torch nor SimpleITK."""
    script = (
        "import sys; from pathlib import Path; from pipeline.dicom_listing import index_tree, listing_rows;"
        f"listing_rows(index_tree(Path({str(tree)!r})));"
        "print(sorted({'torch', 'monai', 'SimpleITK', 'scipy', 'highdicom', 'nibabel'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
