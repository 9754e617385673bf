"""The scan of plain headers against pydicom's reading: the same header for every file, or none from the scan."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pydicom.data import get_testdata_file

from transforms import dicom_header
from transforms.dicom_header import Header, is_dicom, read_headers
from transforms.dicom_scan import scan
from transforms.errors import DicomError

HEADER_END = 3000


def both(path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[tuple[Header, ...] | str, ...]:
    """What the two ways make of a file."""
    with monkeypatch.context() as patch:
        scanned = outcome(path)
        patch.setattr(dicom_header, "scan", lambda *_: None)
        return scanned, outcome(path)


def outcome(path: Path) -> tuple[Header, ...] | str:
    try:
        return read_headers(path, salt=b"salt")
    except DicomError:
        return "refused"


def test_files_of_many_makers(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(get_testdata_file("CT_small.dcm", download=False) or "").parent
    paths = [path for path in (*folder.glob("*.dcm"), *data_dir.glob("dicom_odd/**/*")) if path.is_file()]
    paths = [path for path in paths if is_dicom(path)]
    assert len(paths) > 80
    for path in paths:
        scanned, parsed = both(path, monkeypatch)
        assert scanned == parsed, path.name


@pytest.mark.parametrize("name", ["dicom_hippocrop/14.dcm", "dicom_odd/stacks/magnitude_phase/001.dcm"])
def test_damaged_headers(data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Seeded damage: both ways see the same, since the scan leaves what is not plain to pydicom."""
    content = (data_dir / name).read_bytes()
    draw = np.random.default_rng(4)
    path = tmp_path / "damaged.dcm"
    plain = []
    monkeypatch.setattr(dicom_header, "scan", lambda *given: plain.append(scan(*given)) or plain[-1])
    for _ in range(150):
        damaged = bytearray(content)
        for place in draw.integers(132, min(HEADER_END, len(content)), size=draw.integers(1, 4)):
            damaged[place] = draw.integers(256)
        path.write_bytes(bytes(damaged[: draw.integers(200, len(damaged))] if draw.random() < 0.3 else damaged))
        scanned, parsed = both(path, monkeypatch)
        assert scanned == parsed
    assert 0 < sum(found is None for found in plain) < len(plain) / 2
