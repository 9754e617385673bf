"""`volseg pacs` against a real archive: Debian's Orthanc."""

from __future__ import annotations

from pathlib import Path

import pytest

from .conftest import Orthanc

pytestmark = pytest.mark.viewers


def test_the_archive_starts_empty_and_keeps_what_it_is_given(orthanc: Orthanc, data_dir: Path) -> None:
    assert orthanc.get("/dicom-web/studies") == []
    file = data_dir / "dicom_hippocrop" / "1.dcm"
    orthanc.upload(file)
    (uid,) = orthanc.instances()
    assert orthanc.file(uid) == file.read_bytes()
    orthanc.kill()
    orthanc.start()
    assert list(orthanc.instances()) == [uid]
