"""MONAI bundles made here by MONAI itself, as volseg bundles: the same network, the same preprocessing, no code run."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.networks import nets
from typer.testing import CliRunner

from pipeline.bundle import load_bundle
from pipeline.cli import app
from pipeline.errors import BundleError, PlanError, RunError
from pipeline.interop.monai_import import ImportChoices, import_monai
from pipeline.interop.network_graph import quiet_recording
from pipeline.predict import Model, PredictSettings, predict
from transforms.recipe_spec import MapRange, Reorient, Respace, Standardise
from transforms.volume import read_label, read_volume

UNET: dict[str, Any] = {
    "_target_": "UNet",
    "spatial_dims": 3,
    "in_channels": 1,
    "out_channels": 3,
    "channels": [4, 8, 16],
    "strides": [2, 2],
    "num_res_units": 1,
    "norm": "batch",
}
BEFORE: list[dict[str, Any]] = [
    {"_target_": "LoadImaged", "keys": "image"},
    {"_target_": "EnsureChannelFirstd", "keys": "image"},
    {"_target_": "Orientationd", "keys": "image", "axcodes": "RAS"},
    {"_target_": "Spacingd", "keys": "image", "pixdim": "@pixdim", "mode": "bilinear"},
    {"_target_": "ScaleIntensityRanged", "keys": "image", "a_min": 0, "a_max": 300, "b_min": 0, "b_max": 1,
     "clip": True},
    {"_target_": "EnsureTyped", "keys": "image", "device": "$torch.device('cpu')"},
]  # fmt: skip
AFTER: list[dict[str, Any]] = [
    {"_target_": "Activationsd", "keys": "pred", "softmax": True},
    {"_target_": "Invertd", "keys": "pred", "transform": "@preprocessing", "orig_keys": "image",
     "nearest_interp": False, "to_tensor": True},
    {"_target_": "AsDiscreted", "keys": "pred", "argmax": True},
    {"_target_": "SaveImaged", "keys": "pred", "output_dir": "$@bundle_root + '/eval'"},
]  # fmt: skip
CONFIG: dict[str, Any] = {
    "imports": ["$import os"],
    "bundle_root": ".",
    "pixdim": [1.2, 1.2, 1.5],
    "device": "$os.system('touch ran')",
    "datalist": "$open('ran', 'w').close()",
    "network_def": UNET,
    "network": "$@network_def.to(@device)",
    "preprocessing": {"_target_": "Compose", "transforms": BEFORE},
    "inferer": {
        "_target_": "SlidingWindowInferer",
        "roi_size": [24, 24, 24],
        "sw_batch_size": "$@batch * 2",
        "overlap": 0.5,
        "mode": "gaussian",
    },
    "postprocessing": {"_target_": "Compose", "transforms": AFTER},
    "handlers": [{"_target_": "CheckpointLoader", "load_path": "$@bundle_root + '/models/' + @weights"}],
    "weights": "model.pt",
    "evaluator": {"_target_": "SupervisedEvaluator", "network": "@network"},
}
METADATA: dict[str, Any] = {
    "name": "hippo",
    "version": "0.1.0",
    "network_data_format": {
        "inputs": {"image": {"modality": "MR", "num_channels": 1, "channel_def": {"0": "image"}}},
        "outputs": {"pred": {"channel_def": {"0": "background", "1": "Anterior", "2": "Posterior"}}},
    },
}
Change = Callable[[dict[str, Any], dict[str, Any]], object]


def make(folder: Path, *changes: Change, network: torch.nn.Module | None = None) -> Path:
    """A bundle as MONAI lays it out, with the config and metadata changed in place."""
    config, metadata = json.loads(json.dumps(CONFIG)), json.loads(json.dumps(METADATA))
    for change in changes:
        change(config, metadata)
    (folder / "configs").mkdir(parents=True)
    (folder / "models").mkdir()
    (folder / "configs/inference.json").write_text(json.dumps(config))
    (folder / "configs/metadata.json").write_text(json.dumps(metadata))
    torch.save((network or tiny()).state_dict(), folder / "models/model.pt")
    return folder


@cache
def tiny() -> torch.nn.Module:
    """The network of `UNET`, trained a little on the volume that is predicted, so that all classes are found."""
    torch.manual_seed(1)
    network = nets.UNet(**{k: v for k, v in UNET.items() if not k.startswith("_")})
    folder = Path(__file__).parents[2] / "data/hippocampus"
    image, label = (read(folder / kind / "hippocampus_001.nii.gz").voxels[2:26, 12:44, 4:28]
                    for kind, read in (("images", read_volume), ("labels", read_label)))  # fmt: skip
    batch, target = torch.tensor(image)[None, None] / 300, torch.tensor(label, dtype=torch.long)[None]
    optimiser = torch.optim.Adam(network.parameters(), lr=0.04)
    for _ in range(15):
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(network(batch), target, torch.tensor([0.2, 1.0, 1.0])).backward()
        optimiser.step()
    return network.eval()


def refusal(folder: Path, *changes: Change, choices: ImportChoices | None = None) -> str:
    make(folder / "bad", *changes)
    with pytest.raises((BundleError, PlanError)) as caught:
        import_monai(folder / "bad", folder / "out", choices=choices)
    assert "\n" not in str(caught.value)
    assert not (folder / "out").exists()
    return str(caught.value)


def put(key: str, value: Any, *, metadata: bool = False) -> Change:
    """Set `a#b` in the config, or in the metadata."""

    def change(config: dict[str, Any], about: dict[str, Any]) -> None:
        found: Any = about if metadata else config
        *parents, last = key.split("#")
        for part in parents:
            found = found[int(part)] if isinstance(found, list) else found[part]
        found[int(last) if isinstance(found, list) else last] = value

    return change


@pytest.fixture(scope="module")
def study(request: pytest.FixtureRequest) -> Path:
    return Path(request.config.rootpath) / "tests/data/hippocampus/images/hippocampus_001.nii.gz"


def test_the_network_is_the_same_and_nothing_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    bundle = load_bundle(import_monai(make(tmp_path / "m"), tmp_path / "b"))
    patch = torch.rand(2, 1, 24, 32, 24)
    with torch.inference_mode():
        assert torch.equal(bundle.network(patch), tiny()(patch))
    plan = bundle.plan
    assert plan.recipe == (
        Reorient(axis_codes="RAS"),
        Respace(spacing_mm=(1.2, 1.2, 1.5)),
        MapRange(source=(0, 300), target=(0, 1), clip=True),
    )
    assert (plan.patch_shape, plan.factor, plan.spacing_mm) == ((24, 24, 24), (4, 4, 4), (1.2, 1.2, 1.5))
    assert (bundle.index.tile_step, bundle.index.mirror, bundle.index.name) == (0.5, False, "hippo")
    assert (plan.inference.weights, plan.inference.tiles) == ("centred", "stepped")
    assert bundle.schema.names == ("Anterior", "Posterior")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("mode", ["gaussian", "constant"])
@pytest.mark.parametrize("roi", [[24, 24, 24], [48, 48, 48]])
def test_the_result_is_that_of_monai(tmp_path: Path, study: Path, mode: str, roi: list[int]) -> None:
    changes = [put("inferer#mode", mode), put("inferer#roi_size", roi), put("inferer#overlap", 0.3)]
    folder = make(tmp_path / "m", *changes)
    bundle = load_bundle(import_monai(folder, tmp_path / "b"))
    settings = PredictSettings(mirror=False)
    found = predict(Model((bundle,)), [read_volume(study)], settings=settings, device=torch.device("cpu"))
    expected = run_by_monai(folder, study)
    assert found.label_map.shape == expected.shape
    assert len(np.unique(expected)) == 3
    # What is left is where two probabilities are equal but for rounding.
    assert float(np.mean(found.label_map == expected)) > 0.9995


def run_by_monai(folder: Path, study: Path) -> np.ndarray:
    """What MONAI's own parser, transforms and inferer make of a volume with the bundle."""
    from monai.bundle import ConfigParser

    config = json.loads((folder / "configs/inference.json").read_text())
    config["inferer"]["sw_batch_size"] = 2
    config["preprocessing"]["transforms"][-1].pop("device")
    config["postprocessing"]["transforms"].pop()
    parser = ConfigParser(config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before, after = (parser.get_parsed_content(key) for key in ("preprocessing", "postprocessing"))
        network = tiny()
        data = before({"image": str(study)})
        with torch.inference_mode():
            data["pred"] = parser.get_parsed_content("inferer")(data["image"][None], network)[0]
        result: np.ndarray = after(data)["pred"][0].numpy()
    return result


def test_outputs_that_overlap(tmp_path: Path, study: Path) -> None:
    changes = [
        put("postprocessing#transforms#0", {"_target_": "Activationsd", "sigmoid": True}),
        put("postprocessing#transforms#2", {"_target_": "AsDiscreted", "threshold": 0.5}),
        put("network_data_format#outputs#pred#channel_def", {"0": "core", "1": "whole", "2": "enhancing"},
            metadata=True),
    ]  # fmt: skip
    told = refusal(tmp_path / "x", *changes)
    assert '--nested "core,whole,enhancing"' in told
    folder = make(tmp_path / "m", *changes)
    with pytest.raises(BundleError, match="--nested: expected each of core, whole, enhancing once"):
        import_monai(folder, tmp_path / "b", choices=ImportChoices(nested=("core", "whole")))
    choices = ImportChoices(nested=("whole", "core", "enhancing"))
    bundle = load_bundle(import_monai(folder, tmp_path / "b", choices=choices))
    assert [region.labels for region in bundle.schema.regions] == [
        ("whole only", "core only", "enhancing"), ("core only", "enhancing"), ("enhancing",),
    ]  # fmt: skip
    patch = torch.rand(1, 1, 24, 24, 24)
    with torch.inference_mode():
        assert torch.equal(bundle.network(patch), tiny()(patch)[:, [1, 0, 2]])
    settings = PredictSettings(mirror=False)
    found = predict(Model((bundle,)), [read_volume(study)], settings=settings, device=torch.device("cpu"))
    assert set(np.unique(found.label_map)) <= {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("SegResNet", {"in_channels": 1, "out_channels": 3, "init_filters": 8, "blocks_down": [1, 1],
                       "blocks_up": [1]}),
        ("DynUNet", {"spatial_dims": 3, "in_channels": 1, "out_channels": 3, "kernel_size": [3, 3, 3],
                     "strides": [1, 2, 2], "upsample_kernel_size": [2, 2], "filters": [4, 8, 8]}),
        ("UNETR", {"in_channels": 1, "out_channels": 3, "img_size": [32, 32, 32], "feature_size": 4, "hidden_size": 12,
                   "mlp_dim": 16, "num_heads": 2}),
        ("AttentionUnet", {"spatial_dims": 3, "in_channels": 1, "out_channels": 3, "channels": [4, 8],
                           "strides": [2]}),
    ],
)  # fmt: skip
def test_other_networks(tmp_path: Path, name: str, arguments: dict[str, Any]) -> None:
    torch.manual_seed(2)
    network = getattr(nets, name)(**arguments).eval()
    changes = [put("network_def", {"_target_": f"monai.networks.nets.{name}", **arguments}),
               put("inferer#roi_size", [32, 32, 32])]  # fmt: skip
    bundle = load_bundle(import_monai(make(tmp_path / "m", *changes, network=network), tmp_path / "b"))
    patch = torch.rand(1, 1, 32, 32, 32)
    with torch.inference_mode():
        assert torch.equal(bundle.network(patch), network(patch))


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("network_def#_target_", "scripts.net.Mine", "the network scripts.net.Mine is not known, and code of a bundle"),
        ("network_def#_target_", "os.UNet", "the network os.UNet is not known"),
        ("network_def", "$monai.networks.nets.UNet()", "no network (looked for network_def"),
        ("network", "$my.wrap(@network_def)", "network is code, '$my.wrap(@network_def)', which is not run; if it is"),
        ("network_def#channels", "$[4] + [8, 16]", "network_def#channels is code, '$[4] + [8, 16]', which is not run"),
        ("network_def#channels", "$(lambda: 1)()", "is code"),
        ("network_def#depth", 3, "network 'UNet' of this MONAI has no argument 'depth'"),
        ("network_def#channels", [4, 8, 8], "the weights are not those of network 'UNet' with its arguments"),
        ("network_def#num_res_units", 0, "the weights are not those of network 'UNet' with its arguments: they"),
        ("network_def#channels", [4], "network 'UNet' cannot be built with its arguments: "),
        ("network_def#spatial_dims", 2, "spatial_dims is 2, expected 3"),
        ("pixdim", "$[1.5] if @highres else [3.0]", "pixdim is code"),
        ("pixdim", "@pixdim", "pixdim refers to itself"),
        ("pixdim", "@nowhere", "there is no nowhere"),
        ("pixdim", "%other.json::x", "a macro"),
        ("preprocessing#transforms#3#mode", "bicubic", "Spacing: mode 'bicubic' is not understood"),
        ("preprocessing#transforms#3#diagonal", True, "Spacing: diagonal True is not understood, expected False"),
        ("preprocessing#transforms#3#spread", 1, "Spacing: its argument spread is not understood"),
        ("preprocessing#transforms#4#_target_", "Lambdad", "the transform Lambda before the network is not understood"),
        ("preprocessing#transforms#4#a_max", 0, "ScaleIntensityRange: source: the range from 0 to 0 is empty"),
        ("postprocessing#transforms#0#_target_", "KeepLargestConnectedComponentd", "KeepLargestConnectedComponent aft"),
        ("postprocessing#transforms#2", {"_target_": "AsDiscreted", "threshold": 0.5}, "with argmax alone"),
        ("inferer#_target_", "SliceInferer", "inferer is SliceInferer, expected SlidingWindowInferer"),
        ("inferer#roi_size", [24, -1, 24], "roi_size is [24, -1, 24], expected three sides"),
        ("inferer#padding_mode", "reflect", "inferer#padding_mode 'reflect' is not understood"),
        ("inferer#overlap", 1.0, "the inferer's overlap is 1.0"),
        ("weights", "other.pt", "the weights models/other.pt are not here"),
        ("weights", "../../../elsewhere.pt", "outside of the bundle"),
    ],
)
def test_what_would_need_code_or_is_not_understood(tmp_path: Path, key: str, value: Any, told: str) -> None:
    assert told in refusal(tmp_path, put(key, value))


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("inputs#image#modality", "photo", "modality is 'photo' and its channel 'image': neither is a modality"),
        ("outputs#pred#channel_def", {"0": "a", "1": "b", "2": "c"}, "channel_def#0 is 'a', expected background"),
        (
            "outputs#pred#channel_def",
            {"0": "background", "1": "b"},
            "outputs of 2 channels, but the network UNet has 3",
        ),
        ("outputs#pred#channel_def", {}, "channel_def is needed"),
        ("inputs#image#channel_def", {"0": "a", "1": "b"}, "inputs of 2 channels, but the network UNet has 1"),
    ],
)
def test_metadata_that_does_not_fit(tmp_path: Path, key: str, value: Any, told: str) -> None:
    assert told in refusal(tmp_path, put(f"network_data_format#{key}", value, metadata=True))


def test_values_that_a_user_gives_instead_of_code(tmp_path: Path) -> None:
    folder = make(tmp_path / "m", put("pixdim", "$[1.5] if @highres else [3.0]"))
    choices = ImportChoices(overrides=("pixdim=[2, 2, 2]",), left_out=("ScaleIntensityRange",))
    bundle = load_bundle(import_monai(folder, tmp_path / "b", choices=choices))
    assert bundle.plan.recipe == (Reorient(axis_codes="RAS"), Respace(spacing_mm=(2, 2, 2)))
    assert bundle.index.provenance["imported with set"] == ["pixdim=[2, 2, 2]"]
    for override, told in (("pixdim", "expected KEY=VALUE"), ("pixdim=[", "no JSON"), ("a#b=1", "has no a")):
        with pytest.raises(BundleError, match=told):
            import_monai(folder, tmp_path / "c", choices=ImportChoices(overrides=(override,)))


def test_literals_and_texts_are_understood(tmp_path: Path) -> None:
    changes = [put("sides", "$[1.5, 1.5, 2.0]"), put("pixdim", "$@sides"),
               put("preprocessing#transforms#4", {"_target_": "NormalizeIntensityd", "nonzero": "$True"})]  # fmt: skip
    bundle = load_bundle(import_monai(make(tmp_path / "m", *changes), tmp_path / "b"))
    assert bundle.plan.recipe == (
        Reorient(axis_codes="RAS"), Respace(spacing_mm=(1.5, 1.5, 2.0)), Standardise(nonzero=True),
    )  # fmt: skip


def test_yaml_is_read_too(tmp_path: Path) -> None:
    folder = make(tmp_path / "m")
    (folder / "configs/inference.json").rename(folder / "configs/inference.yaml")
    assert load_bundle(import_monai(folder, tmp_path / "b")).plan.patch_shape == (24, 24, 24)


@pytest.mark.parametrize("overlap", ["x", None, True, [], [0.5, 0.25, 0.5], ["x"], [[0.5]], -0.1, 1, 10**400, {}])
def test_overlaps_that_are_none(tmp_path: Path, overlap: Any) -> None:
    told = refusal(tmp_path, put("inferer#overlap", overlap))
    assert f"the inferer's overlap is {overlap!r}, expected one number from 0 to below 1; give it as --set" in told


def test_an_overlap_of_one_value_an_axis(tmp_path: Path) -> None:
    folder = make(tmp_path / "m", put("inferer#overlap", [0.25, 0.25, 0.25]))
    assert load_bundle(import_monai(folder, tmp_path / "b")).index.tile_step == 0.75


def test_weights_that_are_code_or_more_than_values(tmp_path: Path) -> None:
    folder = make(tmp_path / "m")
    with quiet_recording():
        torch.jit.save(torch.jit.script(torch.nn.Conv3d(1, 1, 1)), folder / "models/model.pt")
    with pytest.raises(BundleError, match="TorchScript, which is code"):
        import_monai(folder, tmp_path / "b")
    torch.save({"model": tiny()}, folder / "models/model.pt")
    with pytest.raises(BundleError, match="no weights that can be read without running code"):
        import_monai(folder, tmp_path / "b")
    torch.save({"epoch": 3}, folder / "models/model.pt")
    with pytest.raises(BundleError, match="expected a state dict"):
        import_monai(folder, tmp_path / "b")
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in tiny().state_dict().items()}},
               folder / "models/model.pt")  # fmt: skip
    assert import_monai(folder, tmp_path / "b").is_dir()
    with pytest.raises(RunError, match="exists already"):
        import_monai(folder, tmp_path / "b")


def test_the_command(tmp_path: Path) -> None:
    folder = make(tmp_path / "m")
    result = CliRunner().invoke(app, ["import", "monai", str(folder), "--out", str(tmp_path / "b")])
    assert result.exit_code == 0, result.output
    assert "UNet of MONAI" in result.output
    assert "labels: 1 Anterior, 2 Posterior" in result.output
