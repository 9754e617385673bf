"""`volseg pacs`, and the loop of `volseg predict`, against a real archive: Debian's Orthanc."""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest

from pipeline.console import Silence
from pipeline.errors import PacsError
from pipeline.export import FORMATS
from pipeline.pacs import Access, open_archive
from pipeline.pacs.journal import Journal
from pipeline.pacs.node import parse_node
from pipeline.pacs.patience import Effort, Patience
from pipeline.pacs.sending import Sent, find_instances, send

from .conftest import Orthanc

pytestmark = pytest.mark.viewers

Call = Callable[..., tuple[int, str, str]]
BOTH = pytest.mark.parametrize("protocol", ["dicomweb", "dimse"])


@pytest.fixture
def call(one_thread: None) -> Call:
    """Run `volseg` in this process: exit code, standard output, standard error."""

    def run(*arguments: Any) -> tuple[int, str, str]:
        from pipeline.cli import main

        out, err = io.StringIO(), io.StringIO()
        before, code = sys.argv, 0
        sys.argv = ["volseg", *map(str, arguments)]
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        finally:
            sys.argv = before
        return code, out.getvalue(), err.getvalue()

    return run


@pytest.fixture
def series(data_dir: Path) -> Path:
    return data_dir / "dicom_hippocrop"


@pytest.fixture
def study(series: Path) -> str:
    return str(pydicom.dcmread(series / "1.dcm").StudyInstanceUID)


def node_of(orthanc: Orthanc, protocol: str) -> str:
    return orthanc.dicomweb if protocol == "dicomweb" else orthanc.dimse


def received(orthanc: Orthanc) -> Counter[str]:
    """How often each instance was received; with OverwriteInstances a second time is counted too."""
    changes = orthanc.get("/changes?limit=1000")["Changes"]
    return Counter(change["ID"] for change in changes if change["ChangeType"] == "NewInstance")


class TestThereAndBack:
    @BOTH
    def test_what_is_sent_is_found_and_fetched_the_same(
        self, call: Call, orthanc: Orthanc, series: Path, study: str, protocol: str, tmp_path: Path
    ) -> None:
        node = node_of(orthanc, protocol)
        assert call("pacs", "echo", node) == (0, f"{node} answers\n", "")
        assert call("pacs", "send", node, series, "--journal", tmp_path / "j")[0] == 0
        code, out, _ = call("pacs", "find", node, "--json")
        assert (code, [row["instances"] for row in json.loads(out)]) == (0, [40])
        code, out, _ = call("pacs", "find", node, "--study", study, "--modality", "MR", "--json")
        assert [(row["modality"], row["instances"]) for row in json.loads(out)] == [("MR", 40)]
        assert json.loads(call("pacs", "find", node, "--modality", "CT", "--json")[1]) == []

        code, out, err = call("pacs", "fetch", node, "--study", study, "--out", tmp_path / "back")
        assert code == 0, err
        back = {file.stem: pydicom.dcmread(file) for file in (tmp_path / "back").rglob("*.dcm")}
        sent = {str(d.SOPInstanceUID): d for d in map(pydicom.dcmread, series.glob("*.dcm"))}
        assert back.keys() == sent.keys()
        for uid, dataset in sent.items():
            assert back[uid] == dataset
            assert back[uid].PixelData == dataset.PixelData
            np.testing.assert_array_equal(back[uid].pixel_array, dataset.pixel_array)

    @BOTH
    def test_what_is_there_is_not_asked_for_again(
        self, call: Call, orthanc: Orthanc, series: Path, study: str, protocol: str, tmp_path: Path
    ) -> None:
        orthanc.upload(*series.glob("*.dcm"))
        node = node_of(orthanc, protocol)
        fetch = ("pacs", "fetch", node, "--study", study, "--out", tmp_path)
        assert "40 of them fetched now" in call(*fetch)[1]
        files = sorted(tmp_path.rglob("*.dcm"))
        files[3].unlink()
        files[7].write_bytes(files[7].read_bytes()[:-50])
        kept = files[0].stat().st_mtime_ns
        assert "2 of them fetched now" in call(*fetch)[1]
        assert files[0].stat().st_mtime_ns == kept
        assert pydicom.dcmread(files[7]).pixel_array.shape == (50, 34)
        assert "0 of them fetched now" in call(*fetch)[1]

    def test_by_c_move_where_c_get_is_not_allowed(
        self, call: Call, start_orthanc: Callable[..., Orthanc], series: Path, study: str, tmp_path: Path
    ) -> None:
        orthanc = start_orthanc()
        modality = {"AET": "VOLSEG", "Host": "127.0.0.1", "Port": orthanc.store_port, "AllowGet": False}
        orthanc.stop()
        orthanc.options["DicomModalities"] = {"volseg": modality}
        orthanc.start()
        orthanc.upload(*series.glob("*.dcm"))
        fetch = ("pacs", "fetch", orthanc.dimse, "--study", study, "--out", tmp_path, "--attempts", 1)
        code, _, err = call(*fetch)
        assert code == 1
        assert "--receive-port" in err
        code, _, err = call(*fetch, "--receive-port", orthanc.store_port)
        assert code == 0, err
        assert len(list(tmp_path.rglob("*.dcm"))) == 40

    @BOTH
    def test_a_compressed_file_arrives_as_it_is(
        self, call: Call, orthanc: Orthanc, protocol: str, series: Path, tmp_path: Path
    ) -> None:
        dataset = pydicom.dcmread(series / "5.dcm")
        before = dataset.pixel_array.copy()
        dataset.compress(pydicom.uid.RLELossless, generate_instance_uid=False)
        dataset.save_as(tmp_path / "rle.dcm")
        assert call("pacs", "send", node_of(orthanc, protocol), tmp_path / "rle.dcm")[0] == 0
        stored = pydicom.dcmread(io.BytesIO(orthanc.file(str(dataset.SOPInstanceUID))))
        assert stored.file_meta.TransferSyntaxUID == pydicom.uid.RLELossless
        np.testing.assert_array_equal(stored.pixel_array, before)


class TestRefusals:
    def test_a_password_is_asked_for_and_taken_from_a_file(
        self, call: Call, start_orthanc: Callable[..., Orthanc], tmp_path: Path
    ) -> None:
        orthanc = Orthanc(tmp_path)
        options = {"AuthenticationEnabled": True, "RegisteredUsers": {"anna": "kingfisher"}}
        # Its own start-up check asks without a password, so this archive is started by hand.
        orthanc.options.update(options)
        orthanc._answers = lambda: _listens(orthanc)  # type: ignore[method-assign]
        orthanc.start()
        try:
            code, out, err = call("pacs", "echo", orthanc.dicomweb)
            assert (code, out) == (1, "")
            assert "wants credentials (HTTP 401)" in err
            file = tmp_path / "pacs.toml"
            for password, expected in (("heron", 1), ("kingfisher", 0)):
                file.write_text(f'username = "anna"\npassword = "{password}"\n')
                file.chmod(0o600)
                code, out, err = call("pacs", "echo", orthanc.dicomweb, "--credentials", file)
                assert code == expected
                assert password not in out + err
        finally:
            orthanc.kill()

    def test_another_title_is_rejected_in_words(self, call: Call, orthanc: Orthanc) -> None:
        """Orthanc hangs up at once, so on a busy machine its rejection now and then does not arrive."""
        wrong, said = orthanc.dimse.replace("ORTHANC", "ELSEWHERE"), []
        for _ in range(5):
            code, _, err = call("pacs", "echo", wrong)
            assert code == 1
            assert len(err.splitlines()) == 1
            said.append(err)
            if "called AE title not recognised" in err:
                break
            assert "or another AE title?" in err
        assert "called AE title not recognised" in said[-1]

    def test_no_such_study(self, call: Call, orthanc: Orthanc, tmp_path: Path) -> None:
        for node in (orthanc.dicomweb, orthanc.dimse):
            code, _, err = call("pacs", "fetch", node, "--study", "1.2.3", "--out", tmp_path)
            assert code == 1
            assert "holds no study 1.2.3" in err

    def test_another_path_is_said_to_be_wrong(self, call: Call, orthanc: Orthanc) -> None:
        code, _, err = call("pacs", "echo", orthanc.dicomweb + "-not")
        assert code == 1
        assert "HTTP 404" in err


def _listens(orthanc: Orthanc) -> bool:
    import socket

    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", orthanc.http_port)) == 0


class _Killing(Silence):
    """Kills the archive once so many instances are settled."""

    def __init__(self, orthanc: Orthanc, after: int, then: Callable[[], None]) -> None:
        self.orthanc, self.after, self.then = orthanc, after, then

    def progress(self, what: str, done: int, total: int, detail: str = "") -> None:
        if what == "sending" and done >= self.after and self.orthanc is not None:
            self.after = total + 1
            self.orthanc.kill()
            self.then()


def attempt_to_send(node: str, series: Path, journal: Path, console: Silence, attempts: int) -> Sent:
    access = Access(parse_node(node), patience=Patience(2, 5, 60, attempts, 0.3))
    instances = find_instances([series], console=Silence())
    with open_archive(access) as archive:
        return send(
            archive,
            instances,
            journal=Journal(journal, access.node),
            effort=Effort(access.patience, np.random.default_rng(0)),
            console=console,
            batch_bytes=20_000,
        )


class TestAnArchiveThatDies:
    @BOTH
    def test_the_next_send_sends_the_rest(
        self, start_orthanc: Callable[..., Orthanc], series: Path, protocol: str, tmp_path: Path
    ) -> None:
        orthanc = start_orthanc(OverwriteInstances=True)
        node = node_of(orthanc, protocol)
        console = _Killing(orthanc, 15, lambda: None)
        with pytest.raises(PacsError, match=r"of 40 instances arrived; .*run the same command again") as told:
            attempt_to_send(node, series, tmp_path / "j", console, attempts=1)
        arrived = int(re.match(r"(\d+) of 40", str(told.value))[1])  # type: ignore[index]
        assert 15 <= arrived < 40
        orthanc.start()
        already = len(orthanc.instances())
        assert already >= arrived
        sent = attempt_to_send(node, series, tmp_path / "j", Silence(), attempts=1)
        assert (sent.total, sent.before, sent.now) == (40, already, 40 - already)
        assert set(received(orthanc).values()) == {1}
        assert len(received(orthanc)) == 40

    @BOTH
    def test_one_that_comes_back_in_time_is_waited_for(
        self, start_orthanc: Callable[..., Orthanc], series: Path, protocol: str, tmp_path: Path
    ) -> None:
        orthanc = start_orthanc(OverwriteInstances=True)
        restart = threading.Timer(0.5, orthanc.start)
        console = _Killing(orthanc, 15, restart.start)
        sent = attempt_to_send(node_of(orthanc, protocol), series, tmp_path / "j", console, attempts=8)
        restart.join()
        assert sent.total == len(orthanc.instances()) == 40
        assert set(received(orthanc).values()) == {1}


class TestLoop:
    @BOTH
    def test_fetched_segmented_verified_and_sent_back(
        self, call: Call, orthanc: Orthanc, series: Path, study: str, protocol: str, small_bundle: Path, tmp_path: Path
    ) -> None:
        orthanc.upload(*series.glob("*.dcm"))
        formats = [name for name in ("seg", "sr") if name in FORMATS]
        out = tmp_path / "out"
        loop = ("predict", small_bundle, node_of(orthanc, protocol), "--study", study, "--as", ",".join(formats),
                "--send", "--no-mirror", "--out", out)  # fmt: skip
        code, said, err = call(*loop)
        assert code == 0, err
        assert f"{len(formats)} of {len(formats)} instances are in" in said

        # Found again by QIDO, in the study that it was made of.
        found = orthanc.get(f"/dicom-web/studies/{study}/series?includefield=Modality")
        assert sorted(row["00080060"]["Value"][0] for row in found) == sorted(["MR", *map(str.upper, formats)])
        results = sorted(out.glob("*.dcm"))
        assert len(results) == len(formats)
        for file in results:
            dataset = pydicom.dcmread(file)
            assert pydicom.dcmread(io.BytesIO(orthanc.file(str(dataset.SOPInstanceUID)))) == dataset

        # Once more: nothing is fetched, segmented or sent again.
        code, said, err = call(*loop)
        assert code == 0, err
        assert "0 sent now" in said
        assert len(orthanc.instances()) == 40 + len(formats)

    def test_nothing_is_fetched_for_a_send_of_nothing(
        self, call: Call, orthanc: Orthanc, study: str, small_bundle: Path, tmp_path: Path
    ) -> None:
        code, _, err = call(
            "predict", small_bundle, orthanc.dicomweb, "--study", study, "--send", "--out", tmp_path / "x"
        )
        assert code == 1
        assert "--send wants results in DICOM" in err
        assert not (tmp_path / "x").exists()

    def test_several_series_are_asked_about(
        self, call: Call, orthanc: Orthanc, series: Path, study: str, small_bundle: Path, tmp_path: Path
    ) -> None:
        other = pydicom.uid.generate_uid()
        for file in series.glob("*.dcm"):
            dataset = pydicom.dcmread(file)
            dataset.SeriesInstanceUID, dataset.SeriesDescription = other, "again"
            dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
            dataset.save_as(tmp_path / file.name)
        orthanc.upload(*series.glob("*.dcm"), *tmp_path.glob("*.dcm"))
        loop = ("predict", small_bundle, orthanc.dicomweb, "--study", study, "--as", "seg", "--send", "--no-mirror")
        code, _, err = call(*loop, "--out", tmp_path / "ask")
        assert code == 1
        assert "2 image series of the study fit" in err
        assert other in err
        assert not (tmp_path / "ask").exists()
        code, said, err = call(*loop, "--series", other[:-3], "--out", tmp_path / "one")
        assert code == 0, err
        code, said, err = call(*loop, "--series", "all", "--out", tmp_path / "all")
        assert code == 0, err
        assert "2 of 2 instances are in" in said
        assert len(orthanc.instances()) == 83
