"""Where the `volseg` script starts: an interrupt while the command line itself is being loaded gets its line too."""

from __future__ import annotations

import sys


def main() -> None:
    """Load the command line and run it; what it does about errors and interrupts is in `pipeline.cli.main`."""
    try:
        from pipeline.cli import main as run

        run()
    except KeyboardInterrupt:
        print("interrupted before anything was begun", file=sys.stderr)
        sys.exit(130)
