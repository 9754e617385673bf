"""How MLflow loads what a run tracked: `mlflow.pyfunc.load_model("models:/NAME@champion")` comes here.

Served by `mlflow models serve`, a request names files of the server's: it can have any image segmented that the
server's account may read, and with `out` any folder written into that it may write to. `root` keeps both inside one
folder. What is answered is label maps, never the images; which files exist can be told from the errors. Nothing that
is there already is written over, but the label map that was made from the same study before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pipeline.errors import VolumeError

if TYPE_CHECKING:
    import torch

    from pipeline.export import Source
    from pipeline.predict import Model
    from pipeline.segmentation import Segmentation
    from pipeline.studies import Study
    from transforms.volume import Volume

LabelMap = npt.NDArray[np.int32]

PATH_COLUMN = "path"

WRITING_S = 60.0
"""The longest that another request may take to write a label map into the same folder."""


class ServedModel:
    """A model, of one bundle or several that are averaged, for studies on a disk and for arrays.

    `root`, if given, is the only folder that studies are read from and label maps are written to.
    """

    def __init__(self, model: Model, device: torch.device, root: Path | None = None) -> None:
        self._model, self._device, self._root = model, device, root

    def get_raw_model(self) -> ServedModel:
        """What `PyFuncModel.get_raw_model` gives: this, whose `predict` MLflow's signature does not stand before."""
        return self

    def predict(self, model_input: Any, params: Mapping[str, Any] | None = None) -> Any:
        """Segment studies, or arrays.

        A path, a list of paths or a table with the column `path` gives a list of label maps, each (I, J, K) int32
        of label ids on the study's own grid; with `params={"out": FOLDER}` they are written there as NIfTI files, and
        the list is of their paths; `sources.json` beside them says what each was made from. A path is all that one
        study is: an image file, a DICOM folder, or a folder of NAME_0000, NAME_0001 and so on for several channels.

        Voxels (B, C, I, J, K), in HU for CT, on the plan's axes and spacing already, give label ids (B, I, J, K)
        int32. A channel that is NaN everywhere is missing, which an optional one may be. MLflow lets them through to
        `get_raw_model().predict` alone.

        Raises:
            VolumeError: a path is not one study, lies outside `root`, cannot be read or is not what the model wants;
                two studies would have one file in `out`, or a file stands there that was not made from its study.
            RunError: `out` cannot be written.
        """
        if isinstance(model_input, np.ndarray) and model_input.ndim == 5:
            return np.stack([self._predict_voxels(channels) for channels in model_input])
        out = str((params or {}).get("out") or "")
        folder = self._allowed(Path(out)) if out else None
        studies = [self._study(Path(path)) for path in _paths(model_input)]
        if folder is None:
            return [self._segmented(study)[0].label_map.astype(np.int32) for study in studies]
        _refuse_one_name(studies)
        for study in studies:
            _refuse_to_replace(study, folder)
        try:
            return [str(self._write(study, folder)) for study in studies]
        finally:
            _write_sources(folder)

    def _segmented(self, study: Study) -> tuple[Segmentation, Source]:
        """The segmentation, and the image whose grid it is on."""
        from pipeline.sources import open_study

        sources = [image.read() for image in open_study(study, self._model.plan, series=None, resample_uneven=False)]
        return self._segment(list(self._channels(study, sources))), sources[0]

    def _write(self, study: Study, out: Path) -> Path:
        from pipeline.export import export
        from pipeline.folder_lock import held
        from pipeline.results import record_sources

        found, source = self._segmented(study)
        # A server answers several requests at a time, and meanwhile another may have written a file of this name.
        with held(out, wait_s=WRITING_S):
            _refuse_to_replace(study, out)
            (file,) = export(found, formats=["nifti"], out=out, name=study.name, source=source)
            record_sources(out, study.name, study.paths)
        return file.path

    def _study(self, path: Path) -> Study:
        from pipeline.console import Silence
        from pipeline.studies import Wanted, find_studies

        self._confine(path)
        found = find_studies([path], Wanted(self._model.plan.channels), console=Silence())
        if len(found) != 1:
            raise VolumeError(f"{path}: holds {len(found)} studies; give the path of one")
        for file in found[0].paths:
            self._confine(file)
        return found[0]

    def _confine(self, path: Path) -> None:
        """Refuse a path by which anything outside `root` would be read."""
        self._allowed(path)
        if self._root is not None:
            for file in _read_with(path):
                self._allowed(file)

    def _channels(self, study: Study, sources: Sequence[Source]) -> Iterator[Volume | None]:
        """One image a channel of the model, None where the study lacks it."""
        images = iter(sources)
        for channel in self._model.plan.channels:
            yield None if channel.name in study.missing else next(images).image

    def _allowed(self, path: Path) -> Path:
        if self._root is not None and not path.resolve().is_relative_to(self._root.resolve()):
            raise VolumeError(f"{path}: not inside the folder that this model reads from and writes to (root)")
        return path

    def _predict_voxels(self, channels: npt.NDArray[np.float32]) -> npt.NDArray[np.int32]:
        from transforms.geometry import Geometry
        from transforms.volume import Volume

        plan = self._model.plan
        geometry = Geometry(channels.shape[1:], _affine_ras(plan.axis_codes, plan.spacing_mm))
        volumes = [
            None if np.isnan(voxels).all() else Volume(voxels, geometry, None, float(voxels.min()))
            for voxels in channels
        ]
        return self._segment(volumes).label_map.astype(np.int32)

    def _segment(self, channels: Sequence[Volume | None]) -> Segmentation:
        from pipeline.predict import PredictSettings, predict

        return predict(self._model, channels, settings=PredictSettings(self._model.mirror), device=self._device)


def _load_pyfunc(path: str, model_config: Mapping[str, Any] | None = None) -> ServedModel:
    """MLflow's entry; the name is its choice.

    Raises:
        BundleError: a bundle is damaged.
    """
    from pipeline.bundle import find_bundles, load_bundle
    from pipeline.config import TrainConfig
    from pipeline.device import choose_hardware
    from pipeline.predict import Model

    device = choose_hardware(TrainConfig()).torch_device()
    root = str((model_config or {}).get("root") or "")
    bundles = tuple(load_bundle(bundle, device) for bundle in find_bundles(Path(path)))
    return ServedModel(Model(bundles), device, Path(root) if root else None)


def _paths(model_input: Any) -> list[str]:
    """The paths of an input: MLflow makes a table of one column of whatever it is given."""
    columns = getattr(model_input, "columns", None)
    if columns is not None:
        column = PATH_COLUMN if PATH_COLUMN in columns else columns[0]
        if column not in (PATH_COLUMN, 0):
            raise VolumeError(f"the first column is '{column}'; expected '{PATH_COLUMN}', with a study's path a row")
        given = list(model_input[column])
    else:
        given = [model_input] if isinstance(model_input, str | Path) else list(model_input)
    for path in given:
        if not isinstance(path, str | Path) or not str(path):
            raise VolumeError(f"expected the path of a study, found {type(path).__name__}")
    return [str(path) for path in given]


def _read_with(path: Path) -> list[Path]:
    """What reading a path may open beside it: all that lies in a folder, the voxels of a header that are elsewhere."""
    from transforms.itk_files import file_of_voxels, is_itk

    if path.is_dir():
        return list(path.rglob("*"))
    with suppress(OSError):  # what cannot be opened has its own refusal where it is read
        return [file_of_voxels(path)] if path.is_file() and is_itk(path) else []
    return []


def _refuse_one_name(studies: Sequence[Study]) -> None:
    first: dict[str, Study] = {}
    for study in studies:
        if first.setdefault(study.name, study).paths != study.paths:
            both = f"{first[study.name].paths[0]} and {study.paths[0]}"
            raise VolumeError(f"{both} would both be written as {study.name}; give each an 'out' of its own")


def _write_sources(out: Path) -> None:
    """Have what each result was made from in one file, which others than volseg read."""
    from pipeline.folder_lock import held
    from pipeline.growing_json import fold_object
    from pipeline.results import SOURCES

    if out.is_dir():
        with held(out, wait_s=WRITING_S):
            fold_object(out / SOURCES)


def _refuse_to_replace(study: Study, out: Path) -> None:
    """Refuse a file where the label map is to be, unless it was made from the same images."""
    from pipeline.files import safe_name
    from pipeline.results import LABEL_MAP, result_of

    target = out / f"{safe_name(study.name)}{LABEL_MAP}"
    if not target.exists():
        return
    made_from = [image.resolve() for image in result_of(target).images]
    given = [path.resolve() for path in study.paths]
    if made_from != given or target.resolve() in given:
        raise VolumeError(
            f"{target}: stands there, and not as what was made from {study.paths[0]}; choose another 'out'"
        )


def _affine_ras(axis_codes: str, spacing_mm: tuple[float, float, float]) -> npt.NDArray[np.float64]:
    """Index to RAS+ mm, from an origin at 0, for axes that run towards `axis_codes`."""
    affine_ras = np.eye(4)
    affine_ras[:3, :3] = 0
    for axis, (code, step_mm) in enumerate(zip(axis_codes, spacing_mm, strict=True)):
        row, sign = {"R": (0, 1), "L": (0, -1), "A": (1, 1), "P": (1, -1), "S": (2, 1), "I": (2, -1)}[code]
        affine_ras[row, axis] = sign * step_mm
    return affine_ras
