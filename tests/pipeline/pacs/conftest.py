"""Archives that fail as they are told to, on loopback: fault injectors. The real archive is in tests/viewers."""

from __future__ import annotations

import base64
import json
import re
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pynetdicom import AE, AllStoragePresentationContexts, build_context, evt
from pynetdicom.sop_class import (
    StudyRootQueryRetrieveInformationModelFind,
    StudyRootQueryRetrieveInformationModelGet,
    StudyRootQueryRetrieveInformationModelMove,
    Verification,
)

from pipeline.console import Silence
from pipeline.pacs import Access, Archive, open_archive
from pipeline.pacs.credentials import Credentials
from pipeline.pacs.node import Node, parse_node
from pipeline.pacs.patience import Effort, Patience

QUICK = Patience(connect_s=1.0, answer_s=1.0, total_s=20.0, attempts=2, first_delay_s=0.01)
INSTANCE_COUNT = 6


@dataclass
class Faults:
    """What an archive does wrong."""

    status: int = 0
    """Answer everything with this HTTP status, or DIMSE status for C-STORE."""
    hang: threading.Event | None = None
    """Take requests and say nothing until this is set."""
    refuse: dict[str, int] = field(default_factory=dict)
    """Failure reasons by SOP Instance UID."""
    die_after: int | None = None
    """Break off instead of acknowledging, once so many instances were stored."""
    password: str = ""
    forgets_offset: bool = False
    page: int = 1000
    """The most rows in an answer."""
    cut: int = 0
    """Bytes that are missing at the end of an instance that is fetched."""
    title: str = "ARCHIVE"
    no_find: bool = False
    no_get: bool = False
    text: str = ""
    """Answer everything with this instead of JSON."""


@dataclass
class Store:
    """What an archive holds, and how often each instance was received."""

    faults: Faults = field(default_factory=Faults)
    held: dict[str, bytes] = field(default_factory=dict)
    received: Counter[str] = field(default_factory=Counter)
    seen: list[str] = field(default_factory=list)

    def take(self, content: bytes) -> tuple[str, int]:
        """UID of an instance, and 0 or why it is refused."""
        uid = str(pydicom.dcmread(BytesIO(content), stop_before_pixels=True).SOPInstanceUID)
        self.received[uid] += 1
        reason = self.faults.refuse.get(uid, 0)
        if not reason:
            self.held[uid] = content
        return uid, reason

    def is_dying(self) -> bool:
        """Whether the next acknowledgement is never sent; one that died comes back healthy."""
        limit = self.faults.die_after
        if limit is None or len(self.held) < limit:
            return False
        self.faults.die_after = None
        return True

    def headers(self) -> list[Dataset]:
        return [pydicom.dcmread(BytesIO(content), stop_before_pixels=True) for content in self.held.values()]

    def datasets(self) -> list[Dataset]:
        return [pydicom.dcmread(BytesIO(content)) for content in self.held.values()]


def _stow_parts(body: bytes, content_type: str) -> list[bytes]:
    boundary = re.search(r'boundary="?([^";]+)', content_type)
    assert boundary is not None
    parts = body.split(b"--" + boundary[1].encode())[1:-1]
    return [part.split(b"\r\n\r\n", 1)[1].removesuffix(b"\r\n") for part in parts]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    store: Store

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self.store.seen.append(self.path)
        if self._fault():
            return
        parts = urlsplit(self.path)
        names = parts.path.strip("/").split("/")[1:]
        if names[-1] == "studies" or names[-1] in ("series", "instances"):
            self._search(names, parse_qs(parts.query))
        else:
            self._instance(names[-1])

    def do_POST(self) -> None:
        body = self._body()
        if self._fault():
            return
        stored, failed = Dataset(), Dataset()
        stored.ReferencedSOPSequence, failed.FailedSOPSequence = [], []
        for content in _stow_parts(body, self.headers["Content-Type"]):
            uid, reason = self.store.take(content)
            if self.store.is_dying():
                self.close_connection = True
                self.connection.close()
                return
            item = Dataset()
            item.ReferencedSOPInstanceUID = uid
            if reason:
                item.FailureReason = reason
            (failed.FailedSOPSequence if reason else stored.ReferencedSOPSequence).append(item)
        answer = {**stored.to_json_dict(), **failed.to_json_dict()}
        self._answer(409 if failed.FailedSOPSequence else 200, json.dumps(answer).encode())

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers["Content-Length"]))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _fault(self) -> bool:
        faults = self.store.faults
        if faults.hang is not None:
            faults.hang.wait(10)
            self.close_connection = True
            return True
        expected = "Basic " + base64.b64encode(faults.password.encode()).decode()
        if faults.password and self.headers.get("Authorization") != expected:
            self._answer(401, b"")
        elif faults.status in (301, 307):
            self.send_response(faults.status)
            self.send_header("Location", "http://127.0.0.1:9/elsewhere")
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif faults.status:
            self._answer(faults.status, b"patient Doe^Jane is unknown", "text/plain")
        elif faults.text:
            self._answer(200, faults.text.encode())
        else:
            return False
        return True

    def _search(self, names: list[str], query: dict[str, list[str]]) -> None:
        levels = {"studies": "StudyInstanceUID", "series": "SeriesInstanceUID", "instances": "SOPInstanceUID"}
        level = levels[names[-1]]
        above = {levels[name]: uid for name, uid in zip(names[:-1:2], names[1::2], strict=False)}
        offset = 0 if self.store.faults.forgets_offset else int(query.get("offset", ["0"])[0])
        limit = min(self.store.faults.page, int(query.get("limit", ["100"])[0]))
        found: dict[str, dict[str, Any]] = {}
        for dataset in self.store.headers():
            wanted = {key: values[0] for key, values in query.items() if key not in ("offset", "limit", "includefield")}
            if all(str(dataset.get(key, "")) == value for key, value in (wanted | above).items()):
                found.setdefault(str(dataset[level].value), dataset.to_json_dict())
        self._answer(200, json.dumps(list(found.values())[offset : offset + limit]).encode())

    def _instance(self, uid: str) -> None:
        if uid not in self.store.held:
            self._answer(404, b"")
            return
        content = self.store.held[uid]
        content = content[: len(content) - self.store.faults.cut]
        body = b"--b\r\nContent-Type: application/dicom\r\n\r\n" + content + b"\r\n--b--"
        self._answer(200, body, 'multipart/related; type="application/dicom"; boundary=b')

    def _answer(self, status: int, body: bytes, content_type: str = "application/dicom+json") -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is what the tests are about."""


@contextmanager
def web_archive(store: Store, tls: ssl.SSLContext | None = None) -> Iterator[str]:
    """The address of a DICOMweb service."""
    handler = type("Handler", (_Handler,), {"store": store})
    server = _Server(("127.0.0.1", 0), handler)
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=lambda: server.serve_forever(0.02), daemon=True)
    thread.start()
    try:
        yield f"dicomweb{'s' if tls else ''}://127.0.0.1:{server.server_address[1]}/dicom-web"
    finally:
        if store.faults.hang is not None:
            store.faults.hang.set()
        server.shutdown()
        server.server_close()
        thread.join()


def _on_echo(event: evt.Event, store: Store) -> int:
    store.seen.append("C-ECHO")
    if store.faults.hang is not None:
        store.faults.hang.wait(10)
    return store.faults.status


def _on_find(event: evt.Event, store: Store) -> Iterator[tuple[int, Dataset | None]]:
    level = {"STUDY": "StudyInstanceUID", "SERIES": "SeriesInstanceUID", "IMAGE": "SOPInstanceUID"}
    query = event.identifier
    shown: set[str] = set()
    for dataset in store.headers():
        uid = str(dataset[level[query.QueryRetrieveLevel]].value)
        asked = [e for e in query if e.value and e.keyword != "QueryRetrieveLevel"]
        if uid in shown or any(str(dataset.get(e.keyword, "")) != str(e.value) for e in asked):
            continue
        shown.add(uid)
        answer = Dataset()
        for element in query:
            if element.keyword in dataset:
                answer.add(dataset[element.tag])
        yield 0xFF00, answer


def _wanted(event: evt.Event, store: Store) -> list[Dataset]:
    uids = event.identifier.get("SOPInstanceUID") or []
    uids = [uids] if isinstance(uids, str) else list(uids)
    return [dataset for dataset in store.datasets() if not uids or dataset.SOPInstanceUID in uids]


def _on_get(event: evt.Event, store: Store) -> Iterator[Any]:
    found = _wanted(event, store)
    yield len(found)
    for dataset in found:
        yield 0xFF00, dataset


def _on_move(event: evt.Event, store: Store) -> Iterator[Any]:
    contexts = [build_context(dataset.SOPClassUID) for dataset in store.datasets()[:1]]
    yield "127.0.0.1", int(store.faults.text), {"contexts": contexts}
    yield from _on_get(event, store)


def _on_store(event: evt.Event, store: Store) -> int:
    _, reason = store.take(event.encoded_dataset())
    if store.is_dying():
        event.assoc.abort(block=False)
        return 0xA700
    return reason or store.faults.status


@contextmanager
def dimse_archive(store: Store, tls: ssl.SSLContext | None = None) -> Iterator[str]:
    """The address of a DIMSE service."""
    entity = AE(store.faults.title)
    entity.require_called_aet = True
    entity.add_supported_context(Verification)
    if not store.faults.no_find:
        entity.add_supported_context(StudyRootQueryRetrieveInformationModelFind)
    if not store.faults.no_get:
        entity.add_supported_context(StudyRootQueryRetrieveInformationModelGet)
    entity.add_supported_context(StudyRootQueryRetrieveInformationModelMove)
    for context in AllStoragePresentationContexts:
        entity.add_supported_context(context.abstract_syntax, scp_role=True, scu_role=True)
    handlers = [(evt.EVT_C_ECHO, _on_echo), (evt.EVT_C_FIND, _on_find), (evt.EVT_C_GET, _on_get),
                (evt.EVT_C_MOVE, _on_move), (evt.EVT_C_STORE, _on_store)]  # fmt: skip
    server = entity.start_server(
        ("127.0.0.1", 0), block=False, evt_handlers=[(e, h, [store]) for e, h in handlers], ssl_context=tls
    )
    try:
        yield f"dimse{'s' if tls else ''}://ARCHIVE@127.0.0.1:{server.server_address[1]}"
    finally:
        if store.faults.hang is not None:
            store.faults.hang.set()
        server.shutdown()


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def web(store: Store) -> Generator[str]:
    with web_archive(store) as address:
        yield address


@pytest.fixture
def dimse(store: Store) -> Generator[str]:
    with dimse_archive(store) as address:
        yield address


@pytest.fixture(params=["web", "dimse"])
def node(request: pytest.FixtureRequest, store: Store) -> Generator[Node]:
    """Either kind of archive."""
    with (web_archive if request.param == "web" else dimse_archive)(store) as address:
        yield parse_node(address)


@pytest.fixture
def series(data_dir: Path, tmp_path: Path) -> Path:
    """A folder with a few slices of the bundled series."""
    folder = tmp_path / "series"
    folder.mkdir()
    for number in range(1, INSTANCE_COUNT + 1):
        (folder / f"{number}.dcm").write_bytes((data_dir / "dicom_hippocrop" / f"{number}.dcm").read_bytes())
    return folder


@contextmanager
def opened(
    node: Node | str, credentials: Credentials | None = None, *, patience: Patience = QUICK, **options: Any
) -> Iterator[Archive]:
    parsed = parse_node(node) if isinstance(node, str) else node
    with open_archive(Access(parsed, credentials or Credentials(), patience=patience, **options)) as archive:
        yield archive


def effort(patience: Patience = QUICK) -> Effort:
    return Effort(patience, np.random.default_rng(0))


class Notes(Silence):
    """Keeps what is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def elapsed_s(action: Callable[[], Any]) -> float:
    started = time.monotonic()
    action()
    return time.monotonic() - started
