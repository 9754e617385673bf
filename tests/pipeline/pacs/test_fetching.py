"""Fetching: whole files, only the missing ones, and nothing outside of the folder."""

from __future__ import annotations

from pathlib import Path

import pydicom
import pytest
from pydicom.uid import RLELossless

from pipeline.console import Silence
from pipeline.errors import PacsError, RunError
from pipeline.files import atomic_path
from pipeline.pacs.archive import is_whole_file
from pipeline.pacs.fetching import FetchedSeries, fetch, folder_name, series_of_study
from pipeline.pacs.node import Node, parse_node
from transforms.dicom_index import index_series

from .conftest import INSTANCE_COUNT, Store, dimse_archive, effort, free_port, opened, web_archive

N = INSTANCE_COUNT


@pytest.fixture
def study(store: Store, series: Path) -> str:
    """Held by the archive."""
    for file in series.glob("*.dcm"):
        store.take(file.read_bytes())
    return str(store.datasets()[0].StudyInstanceUID)


def fetch_study(node: Node, study: str, out: Path, **options: int) -> FetchedSeries:
    with opened(node, **options) as archive:
        found = series_of_study(archive, study, effort=effort())
        (fetched,) = fetch(archive, found, out, effort=effort(), console=Silence())
    return fetched


class TestWhole:
    def test_files_are_named_by_uids_and_hold_the_same(
        self, node: Node, store: Store, study: str, tmp_path: Path
    ) -> None:
        fetched = fetch_study(node, study, tmp_path / "out")
        assert (fetched.instance_count, fetched.new_count, fetched.modality) == (N, N, "MR")
        files = {file.stem: pydicom.dcmread(file) for file in fetched.folder.iterdir()}
        assert files == {str(dataset.SOPInstanceUID): dataset for dataset in store.datasets()}
        assert fetched.folder.name == folder_name(fetched.series_uid)

    def test_only_what_is_missing_or_cut_is_fetched(self, node: Node, study: str, tmp_path: Path) -> None:
        folder = fetch_study(node, study, tmp_path).folder
        files = sorted(folder.iterdir())
        files[0].unlink()
        files[1].write_bytes(files[1].read_bytes()[:-10])
        files[2].write_bytes(b"")
        files[3].write_bytes(files[4].read_bytes())
        assert fetch_study(node, study, tmp_path).new_count == 4
        assert fetch_study(node, study, tmp_path).new_count == 0
        assert all(is_whole_file(file, file.stem) for file in files)

    def test_what_comes_cut_is_never_kept(self, store: Store, study: str, tmp_path: Path) -> None:
        store.faults.cut = 20
        with (
            web_archive(store) as address,
            pytest.raises(PacsError, match=f"0 of {N} instances are here; .*incomplete"),
        ):
            fetch_study(parse_node(address), study, tmp_path / "out")
        assert not list((tmp_path / "out").rglob("*.dcm"))
        assert not list((tmp_path / "out").rglob(".writing*"))

    def test_compressed_pixels_that_lack_their_end(self, series: Path) -> None:
        """pydicom gives such a file as a data set without pixels, or without anything, and raises nothing."""
        dataset = pydicom.dcmread(series / "1.dcm")
        dataset.compress(RLELossless, generate_instance_uid=False)
        dataset.save_as(series / "1.dcm")
        uid, content = str(dataset.SOPInstanceUID), (series / "1.dcm").read_bytes()
        assert is_whole_file(series / "1.dcm", uid)
        for missing in (40, 200, len(content) - 400):
            (series / "1.dcm").write_bytes(content[:-missing])
            assert not is_whole_file(series / "1.dcm", uid)


class TestUnfinished:
    """A slice of which only the beginning is there, under the name that it has until it is whole."""

    def test_what_a_kill_left_is_taken_away(self, node: Node, study: str, tmp_path: Path) -> None:
        folder = fetch_study(node, study, tmp_path).folder
        file = min(folder.iterdir())
        with atomic_path(file) as temporary:
            temporary.write_bytes(file.read_bytes())
        temporary.write_bytes(file.read_bytes()[:500])
        file.unlink()
        assert fetch_study(node, study, tmp_path).new_count == 1
        assert (len(list(folder.iterdir())), temporary.exists()) == (N, False)

    def test_what_another_process_fetches_is_no_slice_yet(self, series: Path) -> None:
        with atomic_path(series / "7.dcm") as temporary:
            temporary.write_bytes((series / "6.dcm").read_bytes()[:500])
            (found,) = index_series(series)
            temporary.write_bytes((series / "6.dcm").read_bytes())
        assert (found.slice_count, found.problems) == (N, ())


class TestRefusals:
    def test_no_such_study(self, node: Node, tmp_path: Path) -> None:
        with pytest.raises(PacsError, match=r"the archive holds no study 1\.2\.3"):
            fetch_study(node, "1.2.3", tmp_path)

    def test_a_folder_that_is_a_file(self, node: Node, study: str, tmp_path: Path) -> None:
        (tmp_path / "out").write_text("")
        with pytest.raises(RunError, match="cannot write"):
            fetch_study(node, study, tmp_path / "out")

    def test_a_uid_that_would_leave_the_folder(self, store: Store, study: str, tmp_path: Path) -> None:
        class Hostile:
            def instances(self, study_uid: str, series_uid: str) -> dict[str, str]:
                return {"../../escaped": "1.2"}

        row = {"StudyInstanceUID": study, "SeriesInstanceUID": "1.2", "Modality": "MR", "SeriesNumber": ""}
        with pytest.raises(PacsError, match="digits and dots"):
            fetch(Hostile(), [row], tmp_path, effort=effort(), console=Silence())  # type: ignore[arg-type]


class TestMove:
    def test_where_c_get_is_missing(self, store: Store, study: str, tmp_path: Path) -> None:
        port = free_port()
        store.faults.no_get, store.faults.text = True, str(port)
        with dimse_archive(store) as address:
            with pytest.raises(PacsError, match=r"offers no C-GET; for C-MOVE.*--receive-port"):
                fetch_study(parse_node(address), study, tmp_path / "out")
            assert fetch_study(parse_node(address), study, tmp_path / "out", receive_port=port).new_count == N
        assert len(list((tmp_path / "out").rglob("*.dcm"))) == N

    def test_a_port_that_is_taken(self, store: Store, study: str, tmp_path: Path) -> None:
        store.faults.no_get = True
        with dimse_archive(store) as address, pytest.raises(PacsError, match="cannot listen at port"):
            fetch_study(parse_node(address), study, tmp_path / "out", receive_port=parse_node(address).port)
