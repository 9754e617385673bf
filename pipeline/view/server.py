"""The page, its script and the volumes of one result, on 127.0.0.1, under a path that cannot be guessed.

Below that path names are looked up, never opened as files, so none leads out of the result. A page elsewhere that
makes its own name point to 127.0.0.1 (DNS rebinding) comes with that name in its Host header, and is refused.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from secrets import compare_digest

from pipeline.errors import RunError

HOST = "127.0.0.1"

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

HEADERS = {
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


@dataclass(frozen=True)
class Reply:
    """What a path gives."""

    content_type: str
    body: bytes
    status: HTTPStatus = HTTPStatus.OK


FORBIDDEN = Reply("text/plain", b"forbidden", HTTPStatus.FORBIDDEN)
NOT_FOUND = Reply("text/plain", b"not found", HTTPStatus.NOT_FOUND)
FAILED = Reply("text/plain", b"failed", HTTPStatus.INTERNAL_SERVER_ERROR)

Find = Callable[[str], Reply | None]


class ViewServer(ThreadingHTTPServer):
    """Serves what `find` knows, by path below the token, until it is shut down."""

    daemon_threads = True

    def __init__(self, find: Find, *, port: int = 0) -> None:
        self.find = find
        self.root = f"/{secrets.token_urlsafe(24)}/"
        try:
            super().__init__((HOST, port), _Handler)
        except (OSError, OverflowError) as error:
            reason = (getattr(error, "strerror", None) or str(error)).lower()
            raise RunError(f"port {port} of {HOST} cannot be used: {reason}; choose another --port") from None

    @property
    def hosts(self) -> tuple[str, ...]:
        """The Host headers that a browser on this machine sends."""
        return f"{HOST}:{self.server_port}", f"localhost:{self.server_port}"

    @property
    def address(self) -> str:
        """Where the page is."""
        return f"http://{HOST}:{self.server_port}{self.root}"

    def handle_error(self, request: object, client_address: object) -> None:
        """A browser that hangs up in the middle of a volume is no event, and a trace might quote a path."""


class _Handler(BaseHTTPRequestHandler):
    server: ViewServer
    server_version, sys_version = "volseg", ""
    protocol_version = "HTTP/1.1"
    timeout = 60

    def do_GET(self) -> None:
        self._send(self._reply())

    def do_HEAD(self) -> None:
        self._send(self._reply(), with_body=False)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing is logged."""

    def _reply(self) -> Reply:
        if self.headers.get("Host", "") not in self.server.hosts:
            return FORBIDDEN
        if not compare_digest(self.path[: len(self.server.root)].encode(), self.server.root.encode()):
            return NOT_FOUND
        try:
            return self.server.find(self.path.removeprefix(self.server.root)) or NOT_FOUND
        except Exception:  # Whatever was overlooked: the page hears of it, no trace quotes a header.
            return FAILED

    def _send(self, reply: Reply, *, with_body: bool = True) -> None:
        self.send_response(reply.status)
        self.send_header("Content-Type", reply.content_type)
        self.send_header("Content-Length", str(len(reply.body)))
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(reply.body)
