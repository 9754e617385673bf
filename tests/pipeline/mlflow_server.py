"""MLflow's own server on this machine, and a gate before it that asks who comes."""

from __future__ import annotations

import base64
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from pipeline.tracking import embedded_store


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def serving(runs: Path, port: int) -> Iterator[None]:
    """Killed without warning in the end."""
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--port", str(port)]
    command += ["--backend-store-uri", embedded_store(runs), "--artifacts-destination", str(runs / "served")]
    environment = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (runs / "server.log").open("ab") as log:
        server = subprocess.Popen(command, cwd=runs, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        until(lambda: _answers(port), seconds=180)
        yield
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


@contextmanager
def gate(port: int, user: str, password: str) -> Iterator[int]:
    """A port that hands requests to another one for those who know the password, as MLflow's basic-auth does."""
    wanted = "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()

    class Gate(BaseHTTPRequestHandler):
        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.headers.get("Authorization") != wanted:
                self._send(401, b"You are not authenticated.", {"WWW-Authenticate": 'Basic realm="mlflow"'})
                return
            behind = HTTPConnection("127.0.0.1", port, timeout=60)
            passed = {k: v for k, v in self.headers.items() if k.lower() not in {"authorization", "host"}}
            behind.request(self.command, self.path, body, passed)
            found = behind.getresponse()
            content = found.read()
            self._send(found.status, content, {"Content-Type": found.headers.get("Content-Type", "text/plain")})
            behind.close()

        do_GET = do_POST = do_PATCH = do_DELETE = do_PUT = answer  # noqa: N815  (the names that are looked for)

        def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for key, value in (headers | {"Content-Length": str(len(content))}).items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Gate)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def until(happened: Callable[[], bool], seconds: float = 30) -> None:
    deadline_s = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline_s, "it did not happen in time"
        time.sleep(0.1)


def _answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False
