"""A tracked bundle, loaded by MLflow, gives what `pipeline.predict` gives."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from pipeline.bundle import BundleFacts, load_bundle, save_bundle
from pipeline.mlflow_model import _affine_ras
from pipeline.models.registry import build_network
from pipeline.models.spec import UNetSpec
from pipeline.plan import ChannelPlan, Plan
from pipeline.predict import Model, PredictSettings, predict
from pipeline.tracking import embedded_store, open_tracker
from transforms.geometry import Geometry
from transforms.intensity_spec import Normalisation
from transforms.labels import Label, LabelSchema
from transforms.volume import Volume

SPACING_MM = (1.0, 2.0, 1.5)
SPEC = UNetSpec(
    in_channels=2,
    out_channels=3,
    features=(4, 8),
    strides=((1, 1, 1), (2, 2, 2)),
    kernel_shapes=((3, 3, 3), (3, 3, 3)),
    encoder_blocks=(1, 1),
    decoder_blocks=(1,),
)


def plan_of(axis_codes: str) -> Plan:
    channels = tuple(
        ChannelPlan(name=name, modality="MR", normalisation=Normalisation(kind="zscore"), lowest=0, highest=1)
        for name in ("t1", "t2")
    )
    return Plan(
        channels=channels,
        class_count=3,
        axis_codes=axis_codes,
        spacing_mm=SPACING_MM,
        patch_shape=(8, 8, 8),
        batch_size=1,
        network="unet",
        unet=SPEC,
        slice_axis=None,
        mirror_axes=(),
        receptive_field_mm=(10, 10, 10),
        largest_label_extent_mm=(5, 5, 5),
        memory_gb=1,
        patch_gflop=1,
        reasons={},
        warnings=(),
    )


def write_bundle(folder: Path, axis_codes: str) -> None:
    plan = plan_of(axis_codes)
    network = build_network("unet", SPEC, plan.patch_shape, generator=torch.Generator().manual_seed(0))
    schema = LabelSchema(
        labels=(Label(id=1, name="front", colour=(9, 0, 0)), Label(id=2, name="back", colour=(0, 9, 0)))
    )
    facts = BundleFacts("tiny", 0, False, 0.5, plan, schema, "name: tiny\n", {})
    save_bundle(folder, network.state_dict(), facts)


@pytest.mark.parametrize("axis_codes", ["RAS", "LPI", "SRA", "PSL"])
def test_axes_run_where_the_plan_says(axis_codes: str) -> None:
    affine_ras = _affine_ras(axis_codes, SPACING_MM)
    assert "".join(nib.orientations.aff2axcodes(affine_ras)) == axis_codes
    np.testing.assert_allclose(nib.affines.voxel_sizes(affine_ras), SPACING_MM)


@pytest.mark.filterwarnings("ignore::UserWarning:mlflow.*")  # of its own types, by the import of mlflow.pyfunc
def test_mlflow_loads_and_predicts(tmp_path: Path) -> None:
    uri, folder, warned = embedded_store(tmp_path), tmp_path / "run", []
    with open_tracker(folder, uri=uri, experiment="e", run_name="r", tags={}, on_warning=warned.append) as tracker:
        write_bundle(folder / "bundle", "LPS")
        tracker.model(folder / "bundle", input_shape=(8, 8, 8), channel_count=2, class_count=3)
    assert warned == []
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("e")
    (logged,) = client.search_logged_models([experiment.experiment_id])
    loaded = mlflow.pyfunc.load_model(logged.artifact_location)

    voxels = np.random.default_rng(0).normal(size=(2, 2, 9, 8, 10)).astype(np.float32)
    label_maps = loaded.predict(voxels)
    assert label_maps.shape == (2, 9, 8, 10)
    assert set(np.unique(label_maps)) == {0, 1, 2}
    model = Model((load_bundle(folder / "bundle"),))
    geometry = Geometry((9, 8, 10), np.diag([-1.0, -2.0, 1.5, 1.0]))
    for channels, label_map in zip(voxels, label_maps, strict=True):
        volumes = [Volume(channel, geometry, "MR", float(channel.min())) for channel in channels]
        direct = predict(model, volumes, settings=PredictSettings(False), device=torch.device("cpu"))
        np.testing.assert_array_equal(label_map, direct.label_map)
    with pytest.raises(mlflow.MlflowException, match="shape"):
        loaded.predict(voxels[:, :1])
