"""What the page asks for, by name: its own files, the list of cases, and each case's facts, volumes and surfaces."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from http import HTTPStatus
from importlib.resources import files
from pathlib import Path
from threading import Lock

from pipeline.errors import RunError, VolsegError
from pipeline.results import Result, find_results, result_of
from pipeline.view.scene import Scene, image_voxels, nifti_bytes, read_scene, to_json
from pipeline.view.server import Reply
from pipeline.view.surfaces import surface_mz3

_HTML, _STYLE, _SCRIPT = (f"text/{kind}; charset=utf-8" for kind in ("html", "css", "javascript"))
_JSON, _VOLUME = "application/json", "application/octet-stream"

PAGE = {
    "": ("index.html", _HTML),
    "style.css": ("style.css", _STYLE),
    "app.js": ("app.js", _SCRIPT),
    "labels.js": ("labels.js", _SCRIPT),
    "panes.js": ("panes.js", _SCRIPT),
    "niivue.js": ("niivue.js", _SCRIPT),
}
"""Name in the address: file of the page, and its type."""

KEPT_SCENES = 2
"""Cases in memory at a time."""

_CASE = re.compile(r"cases/(\d{1,9})/(?:(facts\.json|image\.nii|labels\.nii)|surface-(\d{1,9})\.mz3)")

Load = Callable[[Result], Scene]


class Site:
    """The files of the page and the cases behind it. `find` answers from any thread."""

    def __init__(self, results: Sequence[Result], load: Load, on_fault: Callable[[str], None]) -> None:
        """`load` reads a case when it is first asked for; `on_fault` hears why one cannot be shown."""
        self._results = results
        self._files = {name: Reply(kind, _packaged(file)) for name, (file, kind) in PAGE.items()}
        self._scene = lru_cache(KEPT_SCENES)(lambda number: load(results[number]))
        self._loading = Lock()
        self._on_fault = on_fault

    def find(self, path: str) -> Reply | None:
        """What a name below the page's address stands for; None if it is none."""
        if path in self._files:
            return self._files[path]
        if path == "cases.json":
            return Reply(_JSON, to_json([result.name for result in self._results]))
        found = _CASE.fullmatch(path)
        if found is None or int(found[1]) >= len(self._results):
            return None
        try:
            scene = self.scene(int(found[1]))
        except VolsegError as error:
            # The message may name a path, which belongs to the terminal.
            self._on_fault(str(error))
            return Reply(_JSON, to_json({}), HTTPStatus.UNPROCESSABLE_ENTITY)
        return _surface(scene, int(found[3])) if found[3] else _part(scene, found[2])

    def scene(self, number: int) -> Scene:
        """A case, read once for all that ask at the same time.

        Raises:
            VolsegError: see `read_scene`.
        """
        with self._loading:
            return self._scene(number)


def open_site(
    path: Path,
    *,
    image: Path | None = None,
    schema: Path | None = None,
    series: str | None = None,
    on_fault: Callable[[str], None],
) -> Site:
    """The site of a label map, a DICOM SEG, or an output folder of `volseg predict`.

    Raises:
        RunError: NiiVue's script is missing, or the folder is no such output folder.
        VolsegError: the one case that there is cannot be shown.
    """
    results = find_results(path) if path.is_dir() else [result_of(path)]
    if image is not None and len(results) > 1:
        raise RunError(f"{path}: holds {len(results)} cases, so --image cannot be the image of all; name one label map")

    def load(result: Result) -> Scene:
        return read_scene(result, image=image, schema=schema, series=series)

    site = Site(results, load, on_fault)
    if len(results) == 1:
        site.scene(0)
    return site


def _part(scene: Scene, name: str) -> Reply:
    geometry = scene.image.geometry
    if name == "facts.json":
        return Reply(_JSON, to_json(scene.facts()))
    if name == "image.nii":
        return Reply(_VOLUME, nifti_bytes(image_voxels(scene.image), geometry))
    return Reply(_VOLUME, nifti_bytes(scene.values, geometry, is_label_map=True))


def _surface(scene: Scene, value: int) -> Reply | None:
    if value not in {label.value for label in scene.labels}:
        return None
    return Reply(_VOLUME, surface_mz3(*scene.mask_of(value)))


def _packaged(file: str) -> bytes:
    try:
        return files("pipeline.view.page").joinpath(file).read_bytes()
    except FileNotFoundError:
        raise RunError(
            f"{file} is missing, because volseg was installed without npm; "
            "run `make viewer-assets` in the checkout, which fetches it"
        ) from None
