"""`volseg view`: serve a result to the browser until Ctrl-C."""

from __future__ import annotations

import sys
import webbrowser
from pathlib import Path
from threading import Thread


def view_result(
    path: Path, *, image: Path | None, schema: Path | None, series: str | None, port: int, opens_browser: bool
) -> None:
    """Read the result, say where its page is, and serve it."""
    from pipeline.view.server import ViewServer
    from pipeline.view.site import open_site

    site = open_site(path, image=image, schema=schema, series=series, on_fault=_tell)
    with ViewServer(site.find, port=port) as server:
        print(f"{server.address}\nshown until Ctrl-C, on this machine only", flush=True)
        if opens_browser:
            # A browser in the terminal would keep this thread from serving it.
            Thread(target=webbrowser.open, args=(server.address,), daemon=True).start()
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("closed", flush=True)


def _tell(fault: str) -> None:
    print(f"error: {fault}", file=sys.stderr, flush=True)
