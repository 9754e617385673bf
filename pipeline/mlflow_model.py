"""How MLflow loads a bundle that a run tracked: `mlflow.pyfunc.load_model("models:/...")` comes here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from pipeline.predict import Model


class GridModel:
    """A model for arrays that lie on its plan's axes and spacing already; files go through `volseg predict`."""

    def __init__(self, model: Model) -> None:
        self._model = model

    def predict(self, model_input: npt.NDArray[np.float32], params: dict[str, Any] | None = None) -> Any:
        """Voxels (B, C, I, J, K), in HU for CT, to label ids (B, I, J, K) int32.

        A channel that is NaN everywhere is missing, which an optional one may be.

        Raises:
            VolumeError: another number of channels, one missing that is needed, or intensities that cannot be of the
                model's modality.
        """
        return np.stack([self._predict_one(channels) for channels in model_input])

    def _predict_one(self, channels: npt.NDArray[np.float32]) -> npt.NDArray[np.int32]:
        from pipeline.predict import PredictSettings, predict
        from transforms.geometry import Geometry
        from transforms.volume import Volume

        plan = self._model.plan
        geometry = Geometry(channels.shape[1:], _affine_ras(plan.axis_codes, plan.spacing_mm))
        volumes = [
            None if np.isnan(voxels).all() else Volume(voxels, geometry, None, float(voxels.min()))
            for voxels in channels
        ]
        device = next(self._model.bundles[0].network.parameters()).device
        result = predict(self._model, volumes, settings=PredictSettings(self._model.mirror), device=device)
        return result.label_map.astype(np.int32)


def _load_pyfunc(path: str) -> GridModel:
    """MLflow's entry; the name is its choice.

    Raises:
        BundleError: the bundle is damaged.
    """
    from pipeline.bundle import load_bundle
    from pipeline.predict import Model

    return GridModel(Model((load_bundle(Path(path)),)))


def _affine_ras(axis_codes: str, spacing_mm: tuple[float, float, float]) -> npt.NDArray[np.float64]:
    """Index to RAS+ mm, from an origin at 0, for axes that run towards `axis_codes`."""
    affine_ras = np.eye(4)
    affine_ras[:3, :3] = 0
    for axis, (code, step_mm) in enumerate(zip(axis_codes, spacing_mm, strict=True)):
        row, sign = {"R": (0, 1), "L": (0, -1), "A": (1, 1), "P": (1, -1), "S": (2, 1), "I": (2, -1)}[code]
        affine_ras[row, axis] = sign * step_mm
    return affine_ras
