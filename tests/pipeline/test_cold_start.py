"""What a prediction imports in a fresh process: nothing that it does not use."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

NEVER = ("highdicom", "lightning_fabric", "matplotlib", "mlflow", "monai", "pandas", "skimage", "sklearn")
"""Packages that our own network, a NIfTI in and a NIfTI out do not need."""

PREDICTING = """
import sys
import torch
torch.set_num_threads(1)
from pipeline.cli import app
app(sys.argv[2:], standalone_mode=False)
print("imported:", *sorted(set(sys.argv[1].split(",")) & set(sys.modules)), file=sys.stderr)
"""


@pytest.mark.parametrize("options", [[], pytest.param(["--explain"], marks=pytest.mark.slow)])
def test_a_nifti_and_our_network_import_no_more_than_they_need(
    small_bundle: Path, data_dir: Path, tmp_path: Path, options: list[str]
) -> None:
    image = data_dir / "hippocampus" / "images" / "hippocampus_001.nii.gz"
    command = ["predict", str(small_bundle), str(image), "--out", str(tmp_path), "--no-mirror", *options]
    run = subprocess.run(
        [sys.executable, "-c", PREDICTING, ",".join(NEVER), *command], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stderr.splitlines()[-1] == "imported:"
    assert (tmp_path / "hippocampus_001.nii.gz").exists() is not bool(options)
