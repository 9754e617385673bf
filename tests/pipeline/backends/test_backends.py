"""Backends: the same logits as PyTorch's, whatever the network, or a refusal in one line; and nobody is told."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline.backends import BACKENDS, with_backend
from pipeline.backends.openvino import compiled
from pipeline.bundle import load_bundle
from pipeline.device import cpu_has_bf16
from pipeline.errors import ConfigError, ExportError
from pipeline.interop.network_graph import difference, example_of
from pipeline.interop.onnx_export import onnx_model
from pipeline.onednn import OneDnnConvolutions
from pipeline.plan import Plan
from tests.pipeline.interop.network_choices import CHOICES, bundle_of

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
IN_BF16 = [name for name in BACKENDS if name.endswith("bf16")]


@pytest.mark.parametrize("choice", CHOICES)
def test_openvino_gives_the_logits_of_every_choice_of_the_unet(small_plan: Plan, choice: str) -> None:
    """`difference` runs it on patches, on several at once and on volumes of other sides."""
    bundle = bundle_of(small_plan, **CHOICES[choice])
    found = difference(bundle, compiled(onnx_model(bundle), "f32", threads=None))
    assert found.passes, found
    assert 0 < found.largest < found.peak


@pytest.mark.parametrize(("network", "dimensions"), [("unet", 2), ("dynunet", 2)])
def test_openvino_runs_slices_and_networks_of_monai(small_plan: Plan, network: str, dimensions: int) -> None:
    bundle = bundle_of(small_plan, network=network, dimensions=dimensions)
    assert difference(bundle, compiled(onnx_model(bundle), "f32", threads=1)).passes


@pytest.mark.parametrize("name", IN_BF16)
def test_bfloat16_is_close_and_no_more(small_plan: Plan, name: str) -> None:
    bundle = bundle_of(small_plan)
    if not cpu_has_bf16():
        with pytest.raises(ConfigError, match="no bfloat16 instructions"):
            with_backend(bundle, name)
        return
    found = difference(bundle, with_backend(bundle, name).network)
    assert 1e-3 * found.peak < found.largest < 0.05 * found.peak


def test_torch_is_the_bundle_as_it_is(small_plan: Plan) -> None:
    bundle = bundle_of(small_plan)
    assert with_backend(bundle, "torch", device=CPU) is bundle


@pytest.mark.parametrize("name", ["openvino", *IN_BF16])
def test_results_are_not_overwritten_by_later_ones(small_plan: Plan, name: str) -> None:
    if name in IN_BF16 and not cpu_has_bf16():
        return
    bundle = bundle_of(small_plan)
    in_float32 = compiled(onnx_model(bundle), "f32", threads=1)
    network = in_float32 if name == "openvino" else with_backend(bundle, name).network
    image = example_of((2, 1, 16, 8, 16))
    with torch.inference_mode():
        first = network(image[:1])
        kept = first.clone()
        network(image[1:])
    assert torch.equal(first, kept)
    assert first.dtype == torch.float32
    assert next(network.parameters()).device == CPU


INTERRUPTED = """
import faulthandler, signal, sys
from pathlib import Path
from pipeline.backends.openvino import compiled

faulthandler.enable()
content = Path(sys.argv[1]).read_bytes()
first, second = (compiled(content, "f32", threads=1) for _ in range(2))
del first
del second
try:
    signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    print("interrupted")
"""


def test_ctrl_c_after_several_networks_is_no_segmentation_fault(small_plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "network.onnx").write_bytes(onnx_model(bundle_of(small_plan)))
    command = [sys.executable, "-c", INTERRUPTED, str(tmp_path / "network.onnx")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[3])
    assert (done.returncode, done.stdout) == (0, "interrupted\n"), done.stderr


def test_a_network_that_gives_other_logits_is_refused(small_plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenVINO compiles what is recorded; the bundle's own network is then another one."""
    from pipeline.backends import openvino as backend

    bundle = bundle_of(small_plan)
    other = onnx_model(bundle_of(small_plan, normalisation="group"))
    monkeypatch.setattr(backend, "onnx_model", lambda _: other)
    monkeypatch.setattr(backend, "require_bf16", lambda _: None)
    with pytest.raises(ExportError, match=r"--backend openvino-bf16: logits differ by .* use --backend torch"):
        with_backend(bundle, "openvino-bf16")


class TestRefusals:
    def test_an_unknown_name(self, small_plan: Plan) -> None:
        says = r"--backend openvivo-int8: no such backend; did you mean 'openvino-int8'\? known"
        with pytest.raises(ConfigError, match=says):
            with_backend(bundle_of(small_plan), "openvivo-int8")

    @pytest.mark.parametrize("name", [name for name in BACKENDS if name.startswith("openvino")])
    def test_a_gpu(self, small_plan: Plan, name: str) -> None:
        with pytest.raises(ConfigError, match=f"--backend {name}: runs on the CPU, found device cuda"):
            with_backend(bundle_of(small_plan), name, device=torch.device("cuda"))

    def test_a_network_of_one_size(self, small_plan: Plan) -> None:
        bundle = bundle_of(small_plan)
        fixed = replace(bundle, plan=bundle.plan.model_copy(update={"network": "swin_unetr"}))
        with pytest.raises(ConfigError, match="'swin_unetr' can be recorded for tiles of one size alone"):
            with_backend(fixed, "openvino-int8")

    def test_missing_packages_are_told_in_one_line_each(self, small_bundle: Path) -> None:
        source = (
            "import sys; from pathlib import Path\n"
            "from pipeline.backends import with_backend; from pipeline.backends.int8 import int8_model\n"
            "from pipeline.bundle import load_bundle; from pipeline.errors import VolsegError\n"
            "bundle = load_bundle(Path(sys.argv[1]))\n"
            "ways = {'openvino': lambda: with_backend(bundle, 'openvino-int8')}\n"
            "ways |= dict.fromkeys(['onnx', 'onnxruntime'], lambda: int8_model(bundle, []))\n"
            "for package, way in ways.items():\n"
            "    sys.modules[package] = None\n"
            "    try: way()\n"
            "    except VolsegError as error: print(error)\n"
            "    del sys.modules[package]\n"
        )
        assert output_of(source, small_bundle).splitlines() == [
            'OpenVINO is not installed; pip install "volseg[openvino]"',
            'the package onnx is not installed; pip install "volseg[onnx]"',
            'ONNX Runtime is not installed; pip install "volseg[openvino]"',
        ]


def output_of(source: str, bundle: Path) -> str:
    """What a process of its own prints."""
    run = subprocess.run([sys.executable, "-c", source, str(bundle)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_openvino_tells_nobody(small_bundle: Path) -> None:
    """Its import would send an event, through a package that must not have been loaded then."""
    source = (
        "import sys; from pathlib import Path\n"
        "from pipeline.backends.openvino import compiled; from pipeline.bundle import load_bundle\n"
        "from pipeline.interop.onnx_export import onnx_model\n"
        "compiled(onnx_model(load_bundle(Path(sys.argv[1]))), 'f32', threads=1)\n"
        "import openvino.tools.ovc as tools\n"
        "print(type(tools.telemetry).__module__, 'openvino_telemetry.main' in sys.modules)\n"
    )
    assert output_of(source, small_bundle).split() == ["openvino.tools.ovc.telemetry_stub", "False"]


class TestOneDnn:
    def test_a_tile_alone_is_what_it_is_in_a_batch(self, small_bundle: Path) -> None:
        network = load_bundle(small_bundle).network
        images = example_of((2, 1, 24, 36, 28))
        with torch.inference_mode():
            plain = network(images[:1])
            with OneDnnConvolutions():
                alone, both = network(images[:1]), network(images)
        torch.testing.assert_close(alone, plain, atol=1e-4, rtol=1e-4)
        assert torch.equal(alone, both[:1])

    @pytest.mark.parametrize(
        "layer",
        [
            nn.Conv3d(2, 3, 3, padding=1),
            nn.Conv3d(2, 4, (1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1), bias=False),
            nn.Conv3d(4, 4, 3, dilation=2, groups=2),
            nn.Conv3d(2, 3, 3, padding="same"),
            nn.Conv3d(2, 3, 3, padding=1, padding_mode="replicate"),
            nn.Conv3d(2, 3, 3).bfloat16(),
        ],
    )
    def test_every_kind_of_convolution(self, layer: nn.Conv3d) -> None:
        image = example_of((1, layer.in_channels, 9, 8, 7)).to(layer.weight.dtype)
        with torch.inference_mode(), OneDnnConvolutions():
            found = layer(image)
        torch.testing.assert_close(found, layer(image).detach(), atol=1e-5, rtol=1e-5)

    def test_a_slice(self) -> None:
        layer, image = nn.Conv2d(3, 5, 3, stride=2), example_of((1, 3, 17, 12))
        with torch.inference_mode(), OneDnnConvolutions():
            found = layer(image)
        torch.testing.assert_close(found, layer(image).detach(), atol=1e-5, rtol=1e-5)

    def test_training_goes_on_as_it_was(self) -> None:
        layer, image = nn.Conv3d(2, 3, 3), example_of((1, 2, 6, 6, 6))
        with OneDnnConvolutions():
            layer(image).sum().backward()
        assert layer.weight.grad is not None
