"""A real archive for the tests: Debian's Orthanc with its DICOMweb plugin, on loopback, with a storage of its own."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

# A small model, as the tests of the stages have it.
from tests.pipeline.conftest import one_thread, small_bundle, small_dataset, small_plan  # noqa: F401

PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
START_S = 20.0
CALLING_AET = "VOLSEG"
CALLED_AET = "ORTHANC"

# The environment's proxies are not for loopback.
_open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Orthanc:
    """One archive; `kill` and `start` again keep its storage and its ports."""

    folder: Path
    options: dict[str, Any] = field(default_factory=dict)
    http_port: int = field(default_factory=free_port)
    dimse_port: int = field(default_factory=free_port)
    store_port: int = field(default_factory=free_port)
    """Where the archive's C-MOVE sends what is for the AET VOLSEG."""
    _process: subprocess.Popen[bytes] | None = None

    @property
    def root(self) -> str:
        """Address of the web server, for plain HTTP clients."""
        return f"http://127.0.0.1:{self.http_port}"

    @property
    def dicomweb(self) -> str:
        """The node as `volseg pacs` is given it."""
        return f"dicomweb://127.0.0.1:{self.http_port}/dicom-web"

    @property
    def dimse(self) -> str:
        """The node as `volseg pacs` is given it."""
        return f"dimse://{CALLED_AET}@127.0.0.1:{self.dimse_port}"

    def start(self) -> None:
        """Start it, and return when it answers."""
        config = self.folder / "orthanc.json"
        config.write_text(json.dumps(self._configuration()), encoding="utf-8")
        with (self.folder / "orthanc.log").open("ab") as log:
            self._process = subprocess.Popen(
                [executable(), str(config)], cwd=self.folder, stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )
        limit = time.monotonic() + START_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > limit:
                log_text = (self.folder / "orthanc.log").read_text(encoding="utf-8", errors="replace")
                self.kill()
                pytest.fail(f"Orthanc did not start:\n{log_text[-2000:]}")
            time.sleep(0.05)

    def kill(self) -> None:
        """End it at once, as a power cut would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def stop(self) -> None:
        """End it in order."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self.kill()
            self._process = None

    def get(self, path: str) -> Any:
        """The JSON that its own REST API, or its DICOMweb plugin, answers for `path`."""
        request = urllib.request.Request(self.root + path, headers={"Accept": "application/json"})
        with _open(request, timeout=30) as answer:
            return json.load(answer)

    def get_bytes(self, path: str) -> bytes:
        """The body that it answers for `path`."""
        with _open(self.root + path, timeout=30) as answer:
            return bytes(answer.read())

    def upload(self, *files: Path) -> None:
        """Store DICOM files by its own REST API, past everything that is being tested."""
        for file in files:
            request = urllib.request.Request(self.root + "/instances", data=file.read_bytes(), method="POST")
            _open(request, timeout=30).close()

    def instances(self) -> dict[str, str]:
        """What it holds: Orthanc's own identifier by SOP Instance UID."""
        return {row["MainDicomTags"]["SOPInstanceUID"]: row["ID"] for row in self.get("/instances?expand")}

    def file(self, sop_instance_uid: str) -> bytes:
        """The bytes of an instance as they are stored."""
        return self.get_bytes(f"/instances/{self.instances()[sop_instance_uid]}/file")

    def _answers(self) -> bool:
        try:
            self.get("/system")
        except (OSError, urllib.error.URLError):
            return False
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.dimse_port)) == 0

    def _configuration(self) -> dict[str, Any]:
        # Orthanc binds every address, so HTTP is kept to loopback and DICOM to the one modality on 127.0.0.1.
        return {
            "Name": "volseg test",
            "StorageDirectory": str(self.folder / "storage"),
            "IndexDirectory": str(self.folder / "storage"),
            "TemporaryDirectory": str(self.folder),
            "HttpPort": self.http_port,
            "RemoteAccessAllowed": False,
            "AuthenticationEnabled": False,
            "DicomAet": CALLED_AET,
            "DicomPort": self.dimse_port,
            "DicomCheckCalledAet": True,
            "DicomCheckModalityHost": True,
            "DicomAlwaysAllowEcho": False,
            "DicomAlwaysAllowStore": False,
            "DicomModalities": {"volseg": [CALLING_AET, "127.0.0.1", self.store_port]},
            "UnknownSopClassAccepted": True,
            "OverwriteInstances": False,
            "Plugins": [str(PLUGIN)],
            "DicomWeb": {"Enable": True, "Root": "/dicom-web/", "EnableWado": False},
            **self.options,
        }


def executable() -> str:
    """Where Orthanc is; a test that needs it fails where it is not installed."""
    found = shutil.which("Orthanc", path=f"{os.defpath}:/usr/sbin:/usr/local/sbin:/usr/local/bin")
    if found is None:
        pytest.fail("Orthanc is missing: apt-get install orthanc")
    if not PLUGIN.is_file():
        pytest.fail(f"{PLUGIN} is missing: apt-get install orthanc-dicomweb")
    return found


@contextmanager
def running_orthanc(folder: Path, **options: Any) -> Iterator[Orthanc]:
    """An archive that keeps its files in `folder`; `options` are keys of Orthanc's configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    archive = Orthanc(folder, options)
    archive.start()
    try:
        yield archive
    finally:
        archive.kill()


@pytest.fixture
def orthanc(tmp_path: Path) -> Generator[Orthanc]:
    """An empty archive of one's own; it starts in a fraction of a second."""
    with running_orthanc(tmp_path / "orthanc") as archive:
        yield archive


@pytest.fixture
def start_orthanc(tmp_path: Path) -> Generator[Callable[..., Orthanc]]:
    """Start an archive with keys of Orthanc's configuration: start_orthanc(AuthenticationEnabled=True, ...)."""
    started: list[Orthanc] = []

    def start(**options: Any) -> Orthanc:
        folder = tmp_path / f"orthanc-{len(started)}"
        folder.mkdir()
        started.append(Orthanc(folder, options))
        started[-1].start()
        return started[-1]

    yield start
    for archive in started:
        archive.kill()
