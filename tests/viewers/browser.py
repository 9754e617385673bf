"""Debian's Chromium without a display, with WebGL in software, that may talk to this machine only."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from playwright.sync_api import Page, sync_playwright

ARTIFACTS = Path(__file__).parents[2] / "test-artifacts"
"""Where pictures are kept for people to look at; git ignores it."""

FLAGS = (
    "--use-gl=angle",
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
    "--ignore-gpu-blocklist",
    "--no-sandbox",
    "--disable-dev-shm-usage",
    "--no-proxy-server",
)
LOOPBACK = {"127.0.0.1", "localhost"}


@dataclass
class Watch:
    """What a page did while it was open."""

    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    """Errors in its console, uncaught exceptions and requests that failed."""

    def strangers(self) -> list[str]:
        """Addresses that it asked for and that are not on this machine."""
        inside = ("data:", "blob:")
        return [url for url in self.requests if not url.startswith(inside) and urlsplit(url).hostname not in LOOPBACK]


@contextmanager
def page(*, width: int = 1280, height: int = 800, theme: str = "dark") -> Iterator[tuple[Page, Watch]]:
    """An empty page, and the watch on it."""
    executable = shutil.which("chromium")
    assert executable, "chromium is missing: apt-get install chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=list(FLAGS))
        view: Any = {"width": width, "height": height}
        opened = browser.new_page(viewport=view, color_scheme="light" if theme == "light" else "dark")
        watch = Watch()
        opened.on("request", lambda request: watch.requests.append(request.url))
        opened.on("console", lambda line: watch.complaints.append(line.text) if line.type == "error" else None)
        opened.on("pageerror", lambda error: watch.complaints.append(str(error)))
        opened.on("requestfailed", lambda request: watch.complaints.append(f"failed: {request.url}"))
        yield opened, watch
        browser.close()


def keep(opened: Page, name: str) -> Path:
    """Take a picture of the page."""
    ARTIFACTS.mkdir(exist_ok=True)
    path = ARTIFACTS / f"{name}.png"
    opened.screenshot(path=path)
    return path
