"""Checkpoints are data: what would run is refused by its name and does not run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.errors import BundleError
from pipeline.interop.nnunet_checkpoint import read_checkpoint

ORACLE = Path(__file__).parents[2] / "data" / "nnunet" / "plain_3d" / "fold_0" / "checkpoint_final.pth"


class Calls:
    """Unpickled by anything that trusts it, this calls `function`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def checkpoint(**changes: Any) -> dict[str, Any]:
    return {
        "network_weights": {"module.a": torch.ones(2, dtype=torch.float16)},
        "init_args": {"configuration": "2d"},
        "trainer_name": "nnUNetTrainer",
        "inference_allowed_mirroring_axes": (1, 0),
        **changes,
    }


def saved(folder: Path, document: Any) -> Path:
    torch.save(document, folder / "checkpoint_final.pth")
    return folder / "checkpoint_final.pth"


@pytest.mark.parametrize(
    ("function", "argument", "named"),
    [
        (os.system, "touch {}", "posix.system"),
        (os.mkdir, "{}", "posix.mkdir"),
        (eval, "__import__('os').mkdir('{}')", "eval"),
        (np.memmap, "{}", "numpy.memmap"),
    ],
)
def test_what_would_run_is_refused_by_name_and_does_not(
    tmp_path: Path, function: Any, argument: str, named: str
) -> None:
    trace = tmp_path / "trace"
    call = Calls(function, argument.format(trace))
    path = saved(tmp_path, checkpoint(logging=call))
    with pytest.raises(BundleError) as caught:
        read_checkpoint(path)
    assert f"would call {named};" in str(caught.value).replace("builtins.", "")
    assert "\n" not in str(caught.value)
    assert not trace.exists()
    if function is os.mkdir:  # the world would tell if it had run
        torch.load(path, weights_only=False)
        assert trace.is_dir()


def test_numpys_objects_beyond_numbers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="not a readable checkpoint"):
        read_checkpoint(saved(tmp_path, checkpoint(logging=np.dtype([("a", "f4")]))))
    with pytest.raises(BundleError, match=r"would call numpy.*_reconstruct"):
        read_checkpoint(saved(tmp_path, checkpoint(logging=np.ones(2))))


def test_numbers_of_numpy_are_read_and_weights_are_float32_by_plain_names(tmp_path: Path) -> None:
    log = [np.float32(0.5), np.float64(-2.0), np.int64(3), np.bool_(True), np.float16(0.25)]
    found = read_checkpoint(saved(tmp_path, checkpoint(logging=log, current_epoch=4)))
    assert (found.configuration, found.trainer, found.mirror_axes, found.epochs) == ("2d", "nnUNetTrainer", (0, 1), 4)
    assert list(found.weights) == ["a"]
    assert found.weights["a"].dtype == torch.float32


def test_a_checkpoint_as_nnunet_writes_it() -> None:
    found = read_checkpoint(ORACLE)
    assert (found.configuration, found.mirror_axes, found.epochs) == ("3d_fullres", (0, 1, 2), 1)
    assert found.weights["encoder.stages.0.0.convs.0.conv.weight"].shape == (2, 2, 1, 3, 3)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([1, 2], "no network_weights"),
        (checkpoint(network_weights={"a": 1}), "no network_weights"),
        (checkpoint(init_args={}), "names no configuration"),
        (checkpoint(inference_allowed_mirroring_axes="all"), "found 'all', expected numbers of axes"),
    ],
)
def test_other_documents_are_refused(tmp_path: Path, document: Any, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        read_checkpoint(saved(tmp_path, document))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({("a", 1): torch.ones(2)}, r"a weight named \('a', 1\), expected text"),
        ({"a": torch.ones(2).to_sparse()}, "found a as a sparse_coo tensor on 'cpu'"),
        ({"a": torch.ones(2, device="meta")}, "found a as a strided tensor on 'meta'"),
        ({"a": torch.ones(2), "b": torch.ones(2, dtype=torch.complex64)}, "found b in complex numbers"),
        ({"a": torch.tensor([1.0, float("nan")])}, "found a with values that are not finite"),
        ({"a": torch.tensor([float("inf")], dtype=torch.float16)}, "found a with values that are not finite"),
        ({"a": torch.tensor([1e300], dtype=torch.float64)}, "found a with values that are not finite"),
    ],
)
def test_weights_that_no_trained_network_has_are_refused_by_name(
    tmp_path: Path, weights: dict[Any, torch.Tensor], message: str
) -> None:
    path = saved(tmp_path, checkpoint(network_weights=weights))
    with pytest.raises(BundleError, match=f"{path.name}: network_weights: found .*{message.removeprefix('found ')}"):
        read_checkpoint(path)


def test_a_damaged_file_is_told_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint_final.pth"
    with pytest.raises(BundleError, match="no such file"):
        read_checkpoint(path)
    path.write_bytes(ORACLE.read_bytes()[:5000])
    with pytest.raises(BundleError, match="not a readable checkpoint") as caught:
        read_checkpoint(path)
    assert "\n" not in str(caught.value)
