"""Bundles as MONAI bundles: what MONAI's own parser makes of them has the bundle's output, and can come back."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from pipeline.bundle import BundleFacts, ModelBundle, load_bundle, save_bundle
from pipeline.cli import app
from pipeline.errors import ExportError, RunError
from pipeline.interop.exporting import export_model
from pipeline.interop.monai_import import ImportChoices, import_monai
from pipeline.interop.monai_layout import after_network, before_network, monai_network
from pipeline.plan import InferenceConventions, Plan
from pipeline.predict import Model, PredictSettings, predict
from tests.pipeline.interop.network_choices import bundle_of
from tests.pipeline.interop.test_monai_import import make, put
from transforms.intensity_spec import Normalisation
from transforms.labels import LabelSchema, Region, schema_from_names
from transforms.placing_spec import Placing
from transforms.preprocessing import preprocess
from transforms.volume import read_volume

pytestmark = pytest.mark.usefixtures("one_thread")


def saved(bundle: ModelBundle, folder: Path) -> Path:
    facts = BundleFacts(
        name=bundle.index.name, fold=None, mirror=False, tile_step=bundle.index.tile_step, plan=bundle.plan,
        schema=bundle.schema, config_yaml="", provenance={},
    )  # fmt: skip
    save_bundle(folder, {k: v.clone() for k, v in bundle.network.state_dict().items()}, facts)
    return folder


@pytest.fixture(scope="module")
def study(request: pytest.FixtureRequest) -> Path:
    return Path(request.config.rootpath) / "tests/data/hippocampus/images/hippocampus_001.nii.gz"


def parsed(folder: Path) -> Any:
    """MONAI's own parser on what was written."""
    from monai.bundle import ConfigParser

    config = json.loads((folder / "configs/inference.json").read_text())
    config["bundle_root"], config["device"] = str(folder), "$torch.device('cpu')"
    config["postprocessing"]["transforms"].pop()
    with warnings.catch_warnings():
        # Of readers that are not installed.
        warnings.simplefilter("ignore")
        parser = ConfigParser(config)
        parser.parse()
        for key in ("network", "preprocessing", "inferer", "postprocessing"):
            parser.get_parsed_content(key)
    return parser


def labels_by_monai(folder: Path, study: Path) -> np.ndarray:
    parser = parsed(folder)
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        network = parser.get_parsed_content("network")
        if (folder / "models/model.pt").is_file():
            network.load_state_dict(torch.load(folder / "models/model.pt", weights_only=True))
        data = parser.get_parsed_content("preprocessing")({"image": str(study)})
        data["pred"] = parser.get_parsed_content("inferer")(data["image"][None], network.eval())[0]
        found: np.ndarray = parser.get_parsed_content("postprocessing")(data)["pred"][0].numpy()
    return found


def test_there_and_back(tmp_path: Path) -> None:
    first = load_bundle(import_monai(make(tmp_path / "m", put("inferer#mode", "constant")), tmp_path / "b"))
    told = export_model(tmp_path / "b", tmp_path / "again", to="monai", force=False)
    assert "its network UNet of MONAI; largest difference of a logit 0" in told[0]
    second = load_bundle(import_monai(tmp_path / "again", tmp_path / "c"))
    assert second.plan == first.plan
    assert second.schema == first.schema
    assert second.digest == first.digest
    assert second.index.tile_step == first.index.tile_step


def test_the_unet_is_torchscript_that_monai_runs(tmp_path: Path, small_plan: Plan, study: Path) -> None:
    bundle = bundle_of(small_plan)
    told = export_model(saved(bundle, tmp_path / "b"), tmp_path / "m", to="monai", force=False)
    assert "its network TorchScript" in told[0]
    network = parsed(tmp_path / "m").get_parsed_content("network")
    patch = torch.rand(1, 1, 16, 8, 16)
    with torch.inference_mode():
        assert torch.allclose(network(patch), bundle.network(patch).softmax(dim=1), atol=1e-5)
    found = labels_by_monai(tmp_path / "m", study)
    assert found.shape == read_volume(study).geometry.shape
    assert set(np.unique(found)) <= {0, 1, 5}
    with pytest.raises(RunError, match="exists already"):
        export_model(tmp_path / "b", tmp_path / "m", to="monai", force=False)


@pytest.mark.parametrize("name", ["dynunet", "attention_unet"])
def test_networks_of_the_registry_are_named_and_come_back(tmp_path: Path, small_plan: Plan, name: str) -> None:
    bundle = bundle_of(small_plan, network=name)
    assert (
        f"{ {'dynunet': 'DynUNet', 'attention_unet': 'AttentionUnet'}[name] } of MONAI"
        in export_model(saved(bundle, tmp_path / "b"), tmp_path / "m", to="monai", force=False)[0]
    )
    assert not (tmp_path / "m/models/model.ts").exists()
    config = json.loads((tmp_path / "m/configs/inference.json").read_text())
    again = ImportChoices(
        overrides=("preprocessing#transforms#4#mode=1", 'preprocessing#transforms#4#padding_mode="border"',
                   'inferer#padding_mode="constant"'),
        left_out=("MapLabelValue",),
    )  # fmt: skip
    assert config["preprocessing"]["transforms"][4]["_target_"] == "Spacingd"
    back = load_bundle(import_monai(tmp_path / "m", tmp_path / "c", choices=again))
    assert back.plan.inference.blend == "probabilities"
    patch = torch.rand(1, 1, 16, 8, 16)
    with torch.inference_mode():
        assert torch.equal(back.network(patch), bundle.network(patch))


def test_our_preprocessing_on_its_own_grid_is_the_same(small_plan: Plan, study: Path) -> None:
    """Without other spacings only the normalisation and the axes are left, which MONAI's transforms say exactly."""
    from monai.bundle import ConfigParser

    volume = read_volume(study)
    for how in (
        Normalisation(kind="window", lower=10, upper=200, mean=90, deviation=40),
        Normalisation(kind="zscore"),
        Normalisation(kind="zscore", nonzero=True),
    ):
        channel = small_plan.channels[0].model_copy(update={"normalisation": how})
        spacing = volume.geometry.oriented("RAS").spacing_mm
        plan = small_plan.model_copy(update={"channels": (channel,), "spacing_mm": spacing})
        steps = [entry for entry in before_network(plan) if entry["_target_"] != "Spacingd"]
        parser = ConfigParser({"imports": ["$import torch"], "t": {"_target_": "Compose", "transforms": steps}})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            parser.parse()
            found = parser.get_parsed_content("t")({"image": str(study)})["image"]
        image = torch.from_numpy(volume.voxels[None].astype(np.float32))
        expected, _ = preprocess(
            image, volume.geometry, axis_codes="RAS", spacing_mm=spacing, normalisations=plan.normalisations
        )
        assert torch.allclose(found.as_tensor(), expected, atol=1e-4)


def test_regions_are_painted_in_order() -> None:
    schema = schema_from_names({1: "edema", 4: "core"})
    regions = (
        Region(name="whole", labels=("edema", "core"), paints="edema"),
        Region(name="inner", labels=("core",), paints="core"),
    )
    entries = after_network(LabelSchema(labels=schema.labels, regions=regions), InferenceConventions(blend="logits"))
    assert [entry["_target_"] for entry in entries] == ["Activationsd", "Invertd", "AsDiscreted", "Lambdad"]
    # The code is this module's own, written a moment ago.
    paint = entries[-1]["func"].removeprefix("$lambda x: ")
    assert paint == "torch.where(x[[1]] > 0, 4.0, torch.where(x[[0]] > 0, 1.0, torch.zeros_like(x[[0]])))"


@pytest.mark.parametrize(
    ("ways", "expected"),
    [
        (InferenceConventions(), ["Invertd", "AsDiscreted"]),
        (InferenceConventions(blend="logits"), ["Invertd", "Activationsd", "AsDiscreted"]),
        (InferenceConventions(blend="logits", restores="probabilities"), ["Activationsd", "Invertd", "AsDiscreted"]),
    ],
)
def test_what_is_brought_back(ways: InferenceConventions, expected: list[str]) -> None:
    assert [entry["_target_"] for entry in after_network(schema_from_names({1: "a"}), ways)] == expected


def test_what_monai_cannot_say(small_plan: Plan) -> None:
    with pytest.raises(ExportError, match="use --to nnunet"):
        before_network(small_plan.model_copy(update={"placing": Placing()}))
    odd = small_plan.channels[0].model_copy(update={"normalisation": Normalisation(kind="byte")})
    with pytest.raises(ExportError, match="is normalised by 'byte'"):
        before_network(small_plan.model_copy(update={"channels": (odd,)}))
    assert monai_network(small_plan) is None


def test_the_result_is_that_of_the_bundle(tmp_path: Path, study: Path) -> None:
    source = import_monai(make(tmp_path / "m"), tmp_path / "b")
    export_model(source, tmp_path / "again", to="monai", force=False)
    found = labels_by_monai(tmp_path / "again", study)
    settings = PredictSettings(mirror=False)
    expected = predict(
        Model((load_bundle(source),)), [read_volume(study)], settings=settings, device=torch.device("cpu")
    ).label_map
    assert len(np.unique(expected)) == 3
    assert float(np.mean(found == expected)) > 0.9995


def test_the_command_lists_it(tmp_path: Path) -> None:
    import_monai(make(tmp_path / "m"), tmp_path / "b")
    result = CliRunner().invoke(
        app, ["bundle", "export", str(tmp_path / "b"), "--to", "monai", "--out", str(tmp_path / "o")]
    )
    assert result.exit_code == 0, result.output
    assert "python -m monai.bundle run" in result.output


def test_nothing_but_an_export_is_replaced(tmp_path: Path, small_bundle: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").touch()
    with pytest.raises(RunError, match=r"holds thesis\.txt, so it is not a MONAI bundle that was exported"):
        export_model(small_bundle, tmp_path / "precious", to="monai", force=True)
    assert (tmp_path / "precious" / "thesis.txt").exists()
    for _ in range(2):
        export_model(small_bundle, tmp_path / "exported", to="monai", force=True)
