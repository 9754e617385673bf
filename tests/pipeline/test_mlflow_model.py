"""A tracked bundle, loaded by MLflow, gives what `pipeline.predict` gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch

from pipeline.bundle import BundleFacts, find_bundles, load_bundle, save_bundle
from pipeline.errors import VolumeError
from pipeline.mlflow_model import _affine_ras, _refuse_to_replace
from pipeline.models.registry import build_network
from pipeline.models.spec import UNetSpec
from pipeline.plan import ChannelPlan, Plan
from pipeline.predict import Model, PredictSettings, predict
from pipeline.results import record_sources
from pipeline.studies import Study
from pipeline.tracking import ModelCard, embedded_store, open_tracker
from transforms.geometry import Geometry
from transforms.intensity_spec import Normalisation
from transforms.labels import Label, LabelSchema
from transforms.volume import Volume, read_volume

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


def write_bundle(folder: Path, axis_codes: str, *, seed: int = 0) -> None:
    plan = plan_of(axis_codes)
    network = build_network("unet", SPEC, plan.patch_shape, generator=torch.Generator().manual_seed(seed))
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


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with two bundles and a study of two channels, and the address of the model that averages them."""
    folder = tmp_path_factory.mktemp("served")
    warned: list[str] = []
    run, uri = folder / "run", embedded_store(folder)
    with open_tracker(run, uri=uri, experiment="e", run_name="r", tags={}, on_warning=warned.append) as tracker:
        bundles = [run / f"fold_{fold}" / "bundle" for fold in (0, 1)]
        for seed, bundle in enumerate(bundles):
            write_bundle(bundle, "LPS", seed=seed)
        tracker.model(bundles, ModelCard((8, 8, 8), SPACING_MM, ("t1", "t2"), ("front", "back"), register_as="tiny"))
    assert warned == []
    write_study(folder / "study", seed=0)
    write_study(folder / "inside" / "other", seed=1)
    return folder, client_of(uri).get_model_version_download_uri("tiny", "1")


def client_of(uri: str) -> Any:
    import mlflow

    return mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)


def write_study(folder: Path, *, seed: int) -> None:
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    for channel in (0, 1):
        voxels = random.normal(size=(9, 8, 7 + seed)).astype(np.float32)
        image = nib.Nifti1Image(voxels, np.diag([1.2, 1.0, 1.5, 1.0]))
        nib.save(image, folder / f"case_{channel:04d}.nii.gz")


def directly(folder: Path, study: Path) -> np.ndarray:
    """What the pipeline itself makes of a study."""
    model = Model(tuple(load_bundle(bundle) for bundle in find_bundles(folder / "run")))
    assert len(model.bundles) == 2
    volumes = [read_volume(study / f"case_{channel:04d}.nii.gz") for channel in (0, 1)]
    return predict(model, volumes, settings=PredictSettings(False), device=torch.device("cpu")).label_map


def loaded(tracked: tuple[Path, str], **options: Any) -> Any:
    import mlflow

    return mlflow.pyfunc.load_model(tracked[1], **options)


pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:mlflow.*"),  # of its own types, by the import of mlflow.pyfunc
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning"),
]


class TestPaths:
    """A path in, a label map on the study's own grid out, averaged over the folds."""

    def test_a_bare_path_a_list_and_a_table_are_the_same(self, tracked: tuple[Path, str]) -> None:
        import pandas as pd

        folder, _ = tracked
        study, model = folder / "study", loaded(tracked)
        expected = directly(folder, study)
        assert set(np.unique(expected)) == {0, 1, 2}
        given = str(study), [str(study)], pd.DataFrame({"path": [str(study)]}), {"path": str(study)}
        for paths in given:
            (label_map,) = model.predict(paths)
            np.testing.assert_array_equal(label_map, expected)
            assert label_map.dtype == np.int32  # as the signature says

    def test_studies_of_different_shapes_come_back_in_order(self, tracked: tuple[Path, str]) -> None:
        folder, _ = tracked
        studies = [folder / "inside" / "other", folder / "study"]
        found = loaded(tracked).predict([str(study) for study in studies])
        assert [label_map.shape for label_map in found] == [(9, 8, 8), (9, 8, 7)]
        for label_map, study in zip(found, studies, strict=True):
            np.testing.assert_array_equal(label_map, directly(folder, study))

    def test_out_writes_files_on_the_grid_of_the_study(self, tracked: tuple[Path, str], tmp_path: Path) -> None:
        folder, _ = tracked
        (file,) = loaded(tracked).predict(str(folder / "study"), params={"out": str(tmp_path / "out")})
        assert file == str(tmp_path / "out" / "case.nii.gz")
        image = nib.load(file)
        np.testing.assert_array_equal(np.asarray(image.dataobj), directly(folder, folder / "study"))
        np.testing.assert_allclose(image.affine, np.diag([1.2, 1.0, 1.5, 1.0]))

    def test_what_is_no_study_is_told(self, tracked: tuple[Path, str], tmp_path: Path) -> None:
        import pandas as pd

        folder, _ = tracked
        model = loaded(tracked)
        with pytest.raises(VolumeError, match=r"nothing\.nii\.gz: no such file"):
            model.predict(str(tmp_path / "nothing.nii.gz"))
        with pytest.raises(VolumeError, match="expected 'path'"):
            model.predict(pd.DataFrame({"out": ["x"], "path": [str(folder / "study")]}))

    def test_a_root_keeps_reading_and_writing_inside(self, tracked: tuple[Path, str], tmp_path: Path) -> None:
        folder, _ = tracked
        model = loaded(tracked, model_config={"root": str(folder / "inside")})
        assert len(model.predict(str(folder / "inside" / "other"))) == 1
        (folder / "inside" / "link").symlink_to(folder / "study")
        for path in (folder / "study", folder / "inside" / ".." / "study", folder / "inside" / "link"):
            with pytest.raises(VolumeError, match="not inside the folder"):
                model.predict(str(path))
        with pytest.raises(VolumeError, match="not inside the folder"):
            model.predict(str(folder / "inside" / "other"), params={"out": str(tmp_path)})
        assert list(tmp_path.iterdir()) == []

    def test_a_root_keeps_what_lies_below_a_study_inside(self, tracked: tuple[Path, str], tmp_path: Path) -> None:
        """A file in a study's folder that is a link, and voxels beside their header that are one."""
        folder, _ = tracked
        root = tmp_path / "root"
        write_study(root / "study", seed=0)
        model = loaded(tracked, model_config={"root": str(root)})
        assert len(model.predict(str(root / "study"))) == 1
        (root / "study" / "slices").mkdir()
        (root / "study" / "slices" / "0001.dcm").symlink_to(folder / "study" / "case_0000.nii.gz")
        with pytest.raises(VolumeError, match=r"0001\.dcm: not inside the folder"):
            model.predict(str(root / "study"))
        image = sitk.ReadImage(str(folder / "study" / "case_0000.nii.gz"))
        sitk.WriteImage(image, str(root / "one.mhd"))
        (root / "one.raw").rename(tmp_path / "one.raw")
        (root / "one.raw").symlink_to(tmp_path / "one.raw")
        with pytest.raises(VolumeError, match=r"one\.raw: not inside the folder"):
            model.predict(str(root / "one.mhd"))

    def test_the_scoring_server_answers(self, tracked: tuple[Path, str], tmp_path: Path) -> None:
        """MLflow's own application, as `mlflow models serve` starts it, and its own input example's form."""
        from mlflow.pyfunc.scoring_server import invocations

        folder, _ = tracked
        model, study = loaded(tracked), str(folder / "study")
        schema = model.metadata.get_input_schema()
        request = {"dataframe_records": [{"path": study}]}
        answer = invocations(json.dumps(request), "application/json", model, schema)
        assert answer.status == 200
        np.testing.assert_array_equal(json.loads(answer.response)["predictions"][0], directly(folder, Path(study)))
        request["params"] = {"out": str(tmp_path)}
        answer = invocations(json.dumps(request), "application/json", model, schema)
        assert json.loads(answer.response) == {"predictions": [str(tmp_path / "case.nii.gz")]}


class TestWhatIsWritten:
    """No label map takes the place of an image, or of another patient's label map."""

    @pytest.fixture
    def studies(self, tmp_path: Path) -> tuple[Path, Path]:
        """Two patients' studies, both called case."""
        for number, name in enumerate(("p1", "p2")):
            write_study(tmp_path / name, seed=number)
        return tmp_path / "p1", tmp_path / "p2"

    def test_studies_of_one_name_are_refused_before_anything_is_written(
        self, tracked: tuple[Path, str], studies: tuple[Path, Path], tmp_path: Path
    ) -> None:
        model, out = loaded(tracked), tmp_path / "out"
        with pytest.raises(VolumeError, match=r"p1/case_0000\S+ and \S+p2/case_0000\S+ would both be written as case;"):
            model.predict([str(study) for study in studies], params={"out": str(out)})
        assert not out.exists()
        assert len(model.predict([str(study) for study in studies])) == 2
        once = str(studies[0])
        assert model.predict([once, once], params={"out": str(out)}) == [str(out / "case.nii.gz")] * 2

    def test_another_studys_label_map_stays(
        self, tracked: tuple[Path, str], studies: tuple[Path, Path], tmp_path: Path
    ) -> None:
        model, out = loaded(tracked), {"out": str(tmp_path / "out")}
        (file,) = model.predict(str(studies[0]), params=out)
        first = Path(file).read_bytes()
        with pytest.raises(VolumeError, match=r"out/case\.nii\.gz: stands there, and not as what was made from \S+p2/"):
            model.predict(str(studies[1]), params=out)
        assert Path(file).read_bytes() == first
        Path(file).write_bytes(b"")
        assert model.predict(str(studies[0]), params=out) == [file]
        assert Path(file).read_bytes() == first

    def test_one_that_came_meanwhile_stays(
        self, tracked: tuple[Path, str], studies: tuple[Path, Path], tmp_path: Path
    ) -> None:
        """Another request writes the file while this one's study passes through the network."""
        raw, out = loaded(tracked).get_raw_model(), tmp_path / "out"
        segment = raw._segment

        def meanwhile(channels: Any) -> Any:
            out.mkdir(exist_ok=True)
            (out / "case.nii.gz").write_bytes(b"theirs")
            return segment(channels)

        raw._segment = meanwhile
        with pytest.raises(VolumeError, match="stands there"):
            raw.predict([str(studies[0])], {"out": str(out)})
        assert (out / "case.nii.gz").read_bytes() == b"theirs"

    def test_the_image_itself_stays(self, tmp_path: Path) -> None:
        image = tmp_path / "scan.nii.gz"
        nib.save(nib.Nifti1Image(np.ones((8, 8, 8), np.float32), np.eye(4)), image)
        before, study = image.read_bytes(), Study("scan", (image,))
        with pytest.raises(VolumeError, match=r"scan\.nii\.gz: stands there"):
            _refuse_to_replace(study, tmp_path)
        record_sources(tmp_path, "scan", [image])
        with pytest.raises(VolumeError, match=r"scan\.nii\.gz: stands there"):
            _refuse_to_replace(study, tmp_path)
        assert image.read_bytes() == before


def test_arrays_on_the_plans_grid_go_past_the_signature(tracked: tuple[Path, str]) -> None:
    folder, _ = tracked
    raw = loaded(tracked).get_raw_model()
    voxels = np.random.default_rng(0).normal(size=(2, 2, 9, 8, 10)).astype(np.float32)
    label_maps = raw.predict(voxels)
    assert label_maps.shape == (2, 9, 8, 10)
    assert label_maps.dtype == np.int32
    model = Model(tuple(load_bundle(bundle) for bundle in find_bundles(folder / "run")))
    geometry = Geometry((9, 8, 10), np.diag([-1.0, -2.0, 1.5, 1.0]))
    for channels, label_map in zip(voxels, label_maps, strict=True):
        volumes = [Volume(channel, geometry, "MR", float(channel.min())) for channel in channels]
        direct = predict(model, volumes, settings=PredictSettings(False), device=torch.device("cpu"))
        np.testing.assert_array_equal(label_map, direct.label_map)
    with pytest.raises(VolumeError, match=r"1 channel\(s\) given"):
        raw.predict(voxels[:, :1])
