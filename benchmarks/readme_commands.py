"""Run every `volseg` command that stands in the README, in its order; the first that fails ends it.

They work on what `make demo` left in demo_out/, as the README says.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
FENCE = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[list[str]]:
    """The words of each line in a shell block that calls volseg."""
    lines = [line for block in FENCE.findall(text) for line in block.splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("volseg ")]


def main() -> None:
    """Run them from the root of the checkout."""
    found = commands((REPOSITORY / "README.md").read_text(encoding="utf-8"))
    if not found:
        sys.exit("the README holds no volseg command")
    for words in found:
        print(f"\n$ volseg {shlex.join(words)}", flush=True)
        done = subprocess.run([sys.executable, "-m", "pipeline.cli", *words], cwd=REPOSITORY, check=False)
        if done.returncode:
            sys.exit(f"a command of the README failed (exit code {done.returncode})")
    print(f"\n{len(found)} commands of the README ran")


if __name__ == "__main__":
    main()
