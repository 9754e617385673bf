"""OHIF, a radiology viewer, from its npm package: unpacked once, served on loopback before a real archive."""

from __future__ import annotations

import http.client
import mimetypes
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

from build_backend.npm import OHIF, fetched

CACHE = Path(__file__).parents[2] / ".viewers" / f"ohif-{OHIF.version}"
"""Where it is unpacked; git ignores it."""

CONFIG = """
window.config = {
  name: 'volseg tests', routerBasename: null, extensions: [], modes: [], customizationService: {},
  showStudyList: true, maxNumberOfWebWorkers: 2, disableConfirmationPrompts: true, showErrorDetails: 'always',
  showWarningMessageForCrossOrigin: false, showCPUFallbackMessage: false, strictZSpacingForVolumeViewport: true,
  investigationalUseDialog: {option: 'never'},
  defaultDataSourceName: 'archive',
  dataSources: [{
    namespace: '@ohif/extension-default.dataSourcesModule.dicomweb', sourceName: 'archive',
    configuration: {
      friendlyName: 'archive', name: 'archive', wadoUriRoot: '/dicom-web', qidoRoot: '/dicom-web',
      wadoRoot: '/dicom-web', qidoSupportsIncludeField: false, supportsReject: false, imageRendering: 'wadors',
      thumbnailRendering: 'wadors', enableStudyLazyLoad: true, supportsFuzzyMatching: false, supportsWildcard: true,
      singlepart: 'bulkdata,video', bulkDataURI: {enabled: true}, omitQuotationForMultipartRequest: true,
    },
  }],
};
"""


def unpacked() -> Path:
    """The folder of the viewer's built files; fetched when it is not there yet."""
    if not CACHE.is_dir():
        CACHE.parent.mkdir(exist_ok=True)
        with fetched(OHIF) as archive, tempfile.TemporaryDirectory(dir=CACHE.parent) as folder:
            archive.extractall(folder, filter="data")
            (Path(folder) / "package" / "dist").rename(CACHE)
    return CACHE


class _Handler(BaseHTTPRequestHandler):
    """Files of the viewer, its index for any other address, and /dicom-web passed on to the archive."""

    archive_port: int
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path.startswith("/dicom-web"):
            self._pass_on()
        elif path == "/app-config.js":
            self._send(CONFIG.encode(), "text/javascript")
        else:
            self._send_file(path)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""

    def _pass_on(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.archive_port, timeout=60)
        # The archive builds addresses from the Host header, so it is told the one that the browser knows.
        headers = {"Host": self.headers["Host"], "Accept": self.headers.get("Accept", "*/*")}
        connection.request("GET", self.path, headers=headers)
        answer = connection.getresponse()
        self._send(answer.read(), answer.getheader("Content-Type", "application/octet-stream"), answer.status)
        connection.close()

    def _send_file(self, path: str) -> None:
        file = (unpacked() / path.lstrip("/")).resolve()
        if not (file.is_file() and file.is_relative_to(unpacked())):
            file = unpacked() / "index.html"
        kind = "application/wasm" if file.suffix == ".wasm" else mimetypes.guess_type(file.name)[0]
        self._send(file.read_bytes(), kind or "application/octet-stream")

    def _send(self, body: bytes, kind: str, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        # What decoders in several threads need to share memory.
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def serving(archive_port: int) -> Iterator[str]:
    """The viewer's address, in front of the archive whose web server has this port."""
    unpacked()
    handler = type("Handler", (_Handler,), {"archive_port": archive_port})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        thread = Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()
