"""`volseg pacs` as it is typed: exit codes, one line an error, hashes instead of patients, no secret in any output."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pydicom
import pytest

from pipeline.pacs.fetching import folder_name
from pipeline.pacs.node import Node

from .conftest import INSTANCE_COUNT, Store, free_port

N = INSTANCE_COUNT
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call() -> Call:
    def run(*arguments: Any) -> tuple[int, str, str]:
        from pipeline.cli import main

        out, err = io.StringIO(), io.StringIO()
        before, code = sys.argv, 0
        sys.argv = ["volseg", *map(str, arguments)]
        # What logging writes where nobody has set it up goes to standard error as well.
        last = logging.StreamHandler(err)
        logging.getLogger().addHandler(last)
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        finally:
            logging.getLogger().removeHandler(last)
            sys.argv = before
        return code, out.getvalue(), err.getvalue()

    return run


@pytest.fixture
def secretive(series: Path) -> Path:
    """The series of a patient whose name must never be seen."""
    for file in series.glob("*.dcm"):
        dataset = pydicom.dcmread(file)
        dataset.PatientName, dataset.PatientID, dataset.AccessionNumber = "Heron^Grey", "HERON-77", "ACC-HERON"
        dataset.save_as(file)
    return series


def test_send_find_fetch(call: Call, node: Node, store: Store, secretive: Path, tmp_path: Path) -> None:
    said = [call("pacs", "echo", node), call("pacs", "send", node, secretive), call("pacs", "send", node, secretive)]
    assert f"{N} of {N} instances are in {node}: {N} sent now" in said[1][1]
    assert f"0 sent now; {N} were there already" in said[2][1]
    study = str(store.datasets()[0].StudyInstanceUID)
    said += [call("pacs", "find", node), call("pacs", "find", node, "--study", study, "--json")]
    (found,) = json.loads(said[4][1])
    assert (found["modality"], len(found["patient"])) == ("MR", 12)
    said += [call("pacs", "fetch", node, "--study", study, "--out", tmp_path / "back")]
    assert f"MR, {N} instances, {N} of them fetched now" in said[5][1]
    assert len(list((tmp_path / "back").rglob("*.dcm"))) == N
    for code, out, err in said:
        assert code == 0
        assert err == "" or "looking at" in err or "left out" in err
        assert "heron" not in (out + err).lower()
    assert not [file for file in (tmp_path / "back").rglob("*") if "heron" in file.name.lower()]


def test_who_a_patient_is_comes_from_a_file(
    call: Call, node: Node, store: Store, secretive: Path, tmp_path: Path
) -> None:
    call("pacs", "send", node, secretive)
    match = tmp_path / "match.toml"
    for text, count in (('PatientID = "HERON-77"', 1), ('PatientID = "OTHER"', 0)):
        match.write_text(text)
        code, out, err = call("pacs", "find", node, "--match", match, "--json")
        assert (code, len(json.loads(out)), err) == (0, count, "")
        assert "HERON" not in out
    match.write_text('PatientMood = "HERON"')
    code, out, err = call("pacs", "find", node, "--match", match)
    assert code == 1
    assert "PatientMood: expected a text for one of PatientID" in err
    assert "HERON" not in err


def test_faults_are_one_line_and_1(call: Call, store: Store, node: Node, secretive: Path, tmp_path: Path) -> None:
    quick = ("--attempts", 1, "--timeout", 1)
    away = str(node).replace(str(node.port), str(free_port()))
    store.faults.die_after = 2
    outcomes = [
        call("pacs", "send", node, secretive, "--batch-mb", 0.001, *quick),
        call("pacs", "echo", away, *quick),
        call("pacs", "send", away, secretive, *quick),
        call("pacs", "fetch", away, "--study", "1.2", "--out", tmp_path / "x", *quick),
        call("pacs", "echo", "dicomweb://anna:heron@127.0.0.1/x"),
        call("pacs", "find", node, "--study", "not-a-uid"),
    ]
    store.faults.hang = threading.Event()
    outcomes.append(call("pacs", "echo", "--timeout", 1, "--attempts", 1, node) if node.protocol == "dimse" else
                    call("pacs", "find", node, *quick))  # fmt: skip
    for code, out, err in outcomes:
        assert (code, out) == (1, "")
        (line,) = [line for line in err.splitlines() if "left out" not in line]
        assert line.startswith("error: ")
        assert "heron" not in line.lower().replace(str(tmp_path).lower(), "")
    assert f"of {N} instances arrived; " in outcomes[0][2]
    assert "run the same command again to send the rest" in outcomes[0][2]
    assert "connection refused" in outcomes[1][2]
    assert "no answer within 1 s" in outcomes[-1][2]


def test_after_a_break_the_same_command_sends_the_rest(call: Call, store: Store, node: Node, series: Path) -> None:
    store.faults.die_after = 3
    send = ("pacs", "send", node, series, "--batch-mb", 0.001)
    assert call(*send, "--attempts", 1)[0] == 1
    code, out, _ = call(*send)
    assert code == 0
    assert "3 sent now; 3 were there already" in out
    assert set(store.received.values()) == {1}


@pytest.mark.usefixtures("one_thread")
def test_the_loop(call: Call, web: str, store: Store, data_dir: Path, small_bundle: Path, tmp_path: Path) -> None:
    for file in (data_dir / "dicom_hippocrop").glob("*.dcm"):
        store.take(file.read_bytes())
    study = str(store.datasets()[0].StudyInstanceUID)
    loop = ("predict", small_bundle, web, "--study", study, "--as", "seg", "--send", "--no-mirror",
            "--out", tmp_path / "out")  # fmt: skip
    code, out, err = call(*loop)
    assert code == 0, err
    assert "1 of 1 instances are in" in out
    (result,) = (tmp_path / "out").glob("*.seg.dcm")
    sent = pydicom.dcmread(result)
    assert {str(d.SOPInstanceUID): d for d in store.datasets()}[str(sent.SOPInstanceUID)] == sent
    code, out, err = call(*loop)
    assert (code, store.received[str(sent.SOPInstanceUID)]) == (0, 1)


@pytest.mark.usefixtures("one_thread")
class TestOnlyThisRunIsSent:
    """Into a folder that holds what another run made and did not send."""

    @pytest.fixture
    def loop(self, web: str, store: Store, series: Path, small_bundle: Path, tmp_path: Path) -> tuple[Any, ...]:
        """Predict both series of a study."""
        for number, uid in (("1", "1.2.826.0.1"), ("2", "1.2.826.0.2")):
            for file in sorted(series.glob("[1-5].dcm")):
                store.take(content_of(file, series_uid=uid, number=number))
        study = str(store.datasets()[0].StudyInstanceUID)
        return ("predict", small_bundle, web, "--study", study, "--as", "seg", "--series", "all",
                "--out", tmp_path / "out")  # fmt: skip

    def test_a_series_that_fails_now(
        self, call: Call, store: Store, loop: tuple[Any, ...], series: Path, tmp_path: Path
    ) -> None:
        assert call(*loop, "--no-mirror")[0] == 0
        before = uids_in(tmp_path / "out")
        spoil(tmp_path / "out" / "source" / folder_name("1.2.826.0.2"), series)
        code, out, err = call(*loop, "--mirror", "--force", "--send")
        assert code == 1
        assert "1 of 2 studies were set aside" in err
        assert "1 of 1 instances are in" in out
        (sent,) = sent_to(store)
        assert (sent in uids_in(tmp_path / "out"), sent in before, len(before)) == (True, False, 2)

    def test_none_of_them_is_done_now(
        self, call: Call, store: Store, loop: tuple[Any, ...], series: Path, tmp_path: Path
    ) -> None:
        assert call(*loop, "--no-mirror")[0] == 0
        for uid in ("1.2.826.0.1", "1.2.826.0.2"):
            spoil(tmp_path / "out" / "source" / folder_name(uid), series)
        code, out, err = call(*loop, "--mirror", "--force", "--send")
        assert (code, out, sent_to(store)) == (1, "", set())
        assert err.splitlines()[-1].endswith("out: nothing was sent, as this run has no verified DICOM result")

    def test_a_series_that_has_more_slices_now(
        self, call: Call, store: Store, loop: tuple[Any, ...], series: Path, tmp_path: Path
    ) -> None:
        assert call(*loop, "--no-mirror")[0] == 0
        before = uids_in(tmp_path / "out")
        store.take(content_of(series / "6.dcm", series_uid="1.2.826.0.2", number="2"))
        code, out, err = call(*loop, "--no-mirror", "--send")
        assert code == 0, err
        assert "2 of 2 instances are in" in out
        # The result of the other series is kept, and of this run as well.
        assert (len(uids_in(tmp_path / "out")), len(sent_to(store)), len(sent_to(store) & before)) == (3, 2, 1)


def content_of(file: Path, *, series_uid: str, number: str) -> bytes:
    """A slice as one of another series."""
    dataset, content = pydicom.dcmread(file), io.BytesIO()
    dataset.SeriesInstanceUID, dataset.SeriesNumber = series_uid, number
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = f"{series_uid}.{file.stem}"
    dataset.save_as(content)
    return content.getvalue()


def spoil(fetched: Path, series: Path) -> None:
    """Put half a slice beside what was fetched, so that the series is refused."""
    (fetched / "half.dcm").write_bytes((series / "6.dcm").read_bytes()[:500])


def uids_in(out: Path) -> set[str]:
    return {str(pydicom.dcmread(file).SOPInstanceUID) for file in out.glob("*.seg.dcm")}


def sent_to(store: Store) -> set[str]:
    return {str(dataset.SOPInstanceUID) for dataset in store.datasets() if dataset.Modality == "SEG"}


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["dicomweb://127.0.0.1:9/x"], 1, "which study"),
        (["dicomweb://127.0.0.1:9/x", "--study", "1.2", "--send"], 1, "--send wants results in DICOM"),
        (["dicomweb://127.0.0.1:9/x", "other"], 2, "one archive at a time"),
        (["folder", "--send"], 2, "only where INPUT is the address"),
        (["folder", "--study", "1.2"], 2, "only where INPUT is the address"),
    ],
)
def test_predict_says_what_is_missing_before_anything_is_asked(
    call: Call, tmp_path: Path, arguments: list[str], code: int, words: str
) -> None:
    found, _, err = call("predict", tmp_path / "model", *arguments, "--out", tmp_path / "out")
    assert found == code
    assert words in err
    assert not (tmp_path / "out").exists()
