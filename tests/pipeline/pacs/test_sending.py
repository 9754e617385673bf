"""Sending: each instance once, whatever breaks, and every failure by its name."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pydicom
import pytest

from pipeline.console import Silence
from pipeline.errors import PacsError, RunError
from pipeline.pacs.journal import Journal, journal_path
from pipeline.pacs.node import Node, parse_node
from pipeline.pacs.sending import Sent, find_instances, send

from .conftest import INSTANCE_COUNT, QUICK, Notes, Store, dimse_archive, effort, opened

N = INSTANCE_COUNT


def uids(folder: Path) -> list[str]:
    return [str(pydicom.dcmread(file).SOPInstanceUID) for file in sorted(folder.glob("*.dcm"))]


def send_folder(node: Node, folder: Path, *, journal: Path | None = None, batch_bytes: int = 10_000) -> Sent:
    """In batches of two."""
    instances = find_instances([folder], console=Silence())
    kept = Journal(journal or journal_path(folder, node), node)
    with opened(node) as archive:
        return send(
            archive, instances, journal=kept, effort=effort(), console=Silence(), batch_bytes=batch_bytes
        )  # fmt: skip


class TestEachOnce:
    def test_all_arrive_and_then_nothing_is_sent(self, node: Node, store: Store, series: Path) -> None:
        assert send_folder(node, series) == Sent(N, 0, N)
        assert send_folder(node, series) == Sent(N, N, 0)
        assert store.received == dict.fromkeys(uids(series), 1)

    def test_the_same_data_set_arrives(self, node: Node, store: Store, series: Path) -> None:
        send_folder(node, series)
        for file in series.glob("*.dcm"):
            sent = pydicom.dcmread(file)
            assert {str(d.SOPInstanceUID): d for d in store.datasets()}[str(sent.SOPInstanceUID)] == sent

    def test_one_that_dies_and_comes_back_gets_the_rest(self, node: Node, store: Store, series: Path) -> None:
        store.faults.die_after = 3
        assert send_folder(node, series).total == N
        assert store.received == dict.fromkeys(uids(series), 1)

    def test_what_an_archive_lost_is_sent_again(self, node: Node, store: Store, series: Path) -> None:
        send_folder(node, series)
        lost = uids(series)[2]
        del store.held[lost]
        assert send_folder(node, series) == Sent(N, N - 1, 1)

    def test_one_that_stays_away_is_told_with_what_arrived(self, node: Node, store: Store, series: Path) -> None:
        class Away(Silence):
            """Once some have arrived the archive answers nothing any more."""

            def progress(self, what: str, done: int, total: int, detail: str = "") -> None:
                if what == "sending" and done == 2:
                    store.faults.hang = threading.Event()
                    store.faults.die_after = 3

        instances = find_instances([series], console=Silence())
        journal = Journal(journal_path(series, node), node)
        once = effort(replace(QUICK, attempts=1))
        with opened(node) as archive, pytest.raises(PacsError) as told:
            send(archive, instances, journal=journal, effort=once, console=Away(), batch_bytes=10_000)
        assert f"2 of {N} instances arrived; " in str(told.value)
        assert "run the same command again to send the rest" in str(told.value)
        assert len(journal.read()) == 2
        assert store.faults.hang is not None
        store.faults.hang.set()
        store.faults.hang = store.faults.die_after = None
        assert send_folder(node, series).total == N
        assert set(store.received.values()) == {1}


class TestRefused:
    def test_single_ones_are_named_with_their_status(self, node: Node, store: Store, series: Path) -> None:
        bad = uids(series)[1]
        store.faults.refuse[bad] = 0xA900
        console = Notes()
        instances = find_instances([series], console=Silence())
        with opened(node) as archive, pytest.raises(PacsError) as told:
            send(archive, instances, journal=Journal(series.parent / "j", node), effort=effort(), console=console)
        assert f"{N - 1} of {N} instances arrived; not accepted: {series / '2.dcm'}: status 0xA900" in str(told.value)
        assert "match" in str(told.value)
        assert len(console.notes) == 1
        assert store.received[bad] == 1
        assert bad not in store.held

    def test_all_refused(self, node: Node, store: Store, series: Path) -> None:
        store.faults.refuse = dict.fromkeys(uids(series), 0x0122)
        with pytest.raises(PacsError, match=f"0 of {N} instances arrived; not accepted: .*0x0122, .*not supported"):
            send_folder(node, series)

    def test_without_a_space_left_for_one_batch_the_others_arrive(self, node: Node, store: Store, series: Path) -> None:
        store.faults.refuse = dict.fromkeys(uids(series)[:2], 0xA700)
        with pytest.raises(PacsError, match=f"{N - 2} of {N} instances arrived.*out of resources .and 1 more"):
            send_folder(node, series)


class TestJournal:
    def test_it_tells_where_the_archive_cannot_be_asked(self, store: Store, series: Path) -> None:
        store.faults.no_find = True
        with dimse_archive(store) as address:
            assert send_folder(parse_node(address), series) == Sent(N, 0, N)
            assert send_folder(parse_node(address), series) == Sent(N, N, 0)
        assert set(store.received.values()) == {1}

    def test_it_lies_beside_the_data_and_is_not_sent(self, dimse: str, series: Path) -> None:
        node = parse_node(dimse)
        send_folder(node, series)
        (journal,) = series.parent.glob(".series.sent-*.jsonl")
        assert journal == journal_path(series, node)
        assert Journal(journal, node).read() == set(uids(series))

    def test_a_line_cut_short_is_not_believed(self, tmp_path: Path) -> None:
        journal = Journal(tmp_path / "j", parse_node("dimse://A@127.0.0.1:104"))
        journal.add(["1.2", "1.3"])
        journal.path.write_bytes(journal.path.read_bytes()[:-4])
        assert journal.read() == {"1.2"}
        journal.add(["1.4"])
        assert journal.read() == {"1.2", "1.4"}

    @pytest.mark.parametrize("text", ["", "no journal\n", '{"format": "another"}\n', "[1]\n"])
    def test_another_file_is_not_taken_for_one(self, tmp_path: Path, text: str) -> None:
        journal = Journal(tmp_path / "j", parse_node("dimse://A@127.0.0.1:104"))
        journal.path.write_text(text)
        if text:
            with pytest.raises(RunError, match="not the journal of sends to dimse://A"):
                journal.read()
        else:
            assert journal.read() == set()

    def test_nor_that_of_another_archive(self, tmp_path: Path) -> None:
        Journal(tmp_path / "j", parse_node("dimse://A@127.0.0.1:104")).add(["1.2"])
        with pytest.raises(RunError, match="--journal"):
            Journal(tmp_path / "j", parse_node("dimse://B@127.0.0.1:104")).read()


class TestFiles:
    def test_others_in_a_folder_are_left_out_and_counted(self, series: Path) -> None:
        (series / "notes.txt").write_text("x" * 300)
        (series / ".hidden.dcm").write_bytes((series / "1.dcm").read_bytes())
        console = Notes()
        assert len(find_instances([series], console=console)) == N
        assert console.notes == [f"left out, as they are no DICOM instances: 1 of {N + 1} files"]

    def test_a_named_file_must_be_one(self, series: Path) -> None:
        (series / "notes.txt").write_text("x" * 300)
        with pytest.raises(PacsError, match=r"notes\.txt: not a DICOM instance"):
            find_instances([series / "notes.txt"], console=Silence())

    def test_copies_are_sent_once_and_contradictions_not_at_all(self, series: Path) -> None:
        (series / "copy.dcm").write_bytes((series / "1.dcm").read_bytes())
        assert len(find_instances([series], console=Silence())) == N
        dataset = pydicom.dcmread(series / "1.dcm")
        dataset.PixelData = bytes(len(dataset.PixelData))
        dataset.save_as(series / "copy.dcm")
        with pytest.raises(PacsError, match="differ and have the same SOP Instance UID"):
            find_instances([series], console=Silence())

    @pytest.mark.parametrize(("name", "message"), [("nowhere", "no such file"), ("empty", "no DICOM instance in it")])
    def test_nothing_there(self, tmp_path: Path, name: str, message: str) -> None:
        (tmp_path / "empty").mkdir()
        with pytest.raises(PacsError, match=message):
            find_instances([tmp_path / name], console=Silence())
