"""An imported nnU-Net model, from files to files: volseg's command against nnU-Net's own, in turns.

    python benchmarks/against_nnunet.py TRAINED_MODEL IMAGES --nnunet-python PYTHON [--cases 20] [--rounds 5]
        [--mirroring on off] [--backends torch torch-bf16] [--calibrate INPUT ...] [--in-plane 512] [--alter-plans]
        [--device cpu] [--work FOLDER]

TRAINED_MODEL is nnU-Net's folder (plans.json, dataset.json, fold_*), of one channel; PYTHON is that of an environment
with nnunetv2. IMAGES holds volumes (NIfTI), of which the first `--cases` are taken. volseg imports the model once,
which is not counted. Each command is run with mirroring and without; what is told are medians of wall times and of the
processors' time (which other work on the machine hardly stretches), the peak of the memory that all processes of a
command hold together, and in how many voxels the labels agree.

The backend openvino-int8 needs `--calibrate`, what `volseg bundle quantise` is given beside the model; that is not
counted either.

`--in-plane 512` first brings each volume to 512 x 512 voxels within its slices (linearly, the same field of view).
`--alter-plans` is for a model that was not trained on such images: in a copy of its plans, which both commands then
get, the spacing becomes the median one of the volumes, the intensities are normalised by each volume's own mean, and
the channel is called CT, which volseg would refuse in the place of an MR.
The labels mean nothing then; time and memory are those of such a model.

The memory is what the kernel says is resident (Pss of /proc, so that what processes share counts once), asked for four
times a second.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
ASKED_EVERY_S = 0.25
PREDICT = "from nnunetv2.inference.predict_from_raw_data import predict_entry_point_modelfolder as main; main()"


@dataclass(frozen=True)
class Run:
    """What one command took."""

    seconds: float
    processor_s: float
    peak_mib: float


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("images", type=Path)
    parser.add_argument("--nnunet-python", type=Path, required=True)
    parser.add_argument("--cases", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mirroring", nargs="+", choices=("on", "off"), default=["on", "off"])
    parser.add_argument("--backends", nargs="+", default=["torch"], help="of volseg: what `volseg predict` knows")
    parser.add_argument("--calibrate", nargs="+", help="inputs for the network in eight bits")
    parser.add_argument("--in-plane", type=int)
    parser.add_argument("--alter-plans", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--work", type=Path, help="where to work; by default a temporary folder")
    return parser.parse_args()


def main() -> None:
    """Print a line a command, then the ratios."""
    asked = parse()
    with tempfile.TemporaryDirectory() as temporary:
        work = asked.work or Path(temporary)
        inputs = work / "inputs"
        names = copy_images(asked, inputs)
        model = prepare_model(asked, work, [inputs / f"{name}_0000.nii.gz" for name in names])
        bundle = import_model(model, work / "bundle")
        if asked.calibrate:
            run([*volseg(), "bundle", "quantise", str(bundle), *asked.calibrate])
        for mirroring in asked.mirroring:
            compare(asked, work, (model, bundle), mirror=mirroring == "on")


def copy_images(asked: argparse.Namespace, inputs: Path) -> list[str]:
    """The volumes under the names that nnU-Net wants; the names of the cases."""
    import SimpleITK as sitk

    inputs.mkdir(parents=True, exist_ok=True)
    files = sorted(p for p in asked.images.iterdir() if p.name.endswith((".nii", ".nii.gz")))[: asked.cases]
    names = [path.name.partition(".")[0] for path in files]
    for name, path in zip(names, files, strict=True):
        image = sitk.ReadImage(str(path))
        if asked.in_plane:
            image = in_plane(image, asked.in_plane)
        sitk.WriteImage(image, str(inputs / f"{name}_0000.nii.gz"))
    return names


def in_plane(image: Any, side: int) -> Any:
    """`side` x `side` voxels within slices, over the same field of view."""
    import SimpleITK as sitk

    size, spacing = image.GetSize(), image.GetSpacing()
    wanted = (side, side, size[2])
    finer = [s * n / m for s, n, m in zip(spacing, size, wanted, strict=True)]
    first = image.TransformContinuousIndexToPhysicalPoint([n / m / 2 - 0.5 for n, m in zip(size, wanted, strict=True)])
    # Beyond the outermost centres ITK has no values; half a voxel of the old ones is their value.
    padded = sitk.ZeroFluxNeumannPad(image, (1, 1, 1), (1, 1, 1))
    return sitk.Resample(
        padded, wanted, sitk.Transform(), sitk.sitkLinear, first, finer, image.GetDirection(), 0, image.GetPixelID()
    )


def prepare_model(asked: argparse.Namespace, work: Path, images: Sequence[Path]) -> Path:
    """The model's folder, or a copy with altered plans."""
    import SimpleITK as sitk

    if not asked.alter_plans:
        return Path(asked.model)
    model = work / "model"
    shutil.copytree(asked.model, model, dirs_exist_ok=True)
    plans = json.loads((model / "plans.json").read_text())
    spacings = [sitk.ReadImage(str(path)).GetSpacing()[::-1] for path in images]
    middle = [float(s) for s in np.median(np.asarray(spacings), axis=0)]
    for configuration in plans["configurations"].values():
        if "spacing" in configuration:
            turned = [middle[axis] for axis in plans["transpose_forward"]]
            configuration["spacing"] = turned[3 - len(configuration["spacing"]) :]
            configuration["normalization_schemes"] = ["ZScoreNormalization"]
            configuration["use_mask_for_norm"] = [False]
    (model / "plans.json").write_text(json.dumps(plans, indent=1))
    dataset = json.loads((model / "dataset.json").read_text())
    dataset["channel_names"] = dict.fromkeys(dataset["channel_names"], "CT")
    (model / "dataset.json").write_text(json.dumps(dataset, indent=1))
    return model


def import_model(model: Path, bundle: Path) -> Path:
    run([*volseg(), "import", "nnunet", str(model), "--out", str(bundle), "--force"])
    return bundle


def compare(asked: argparse.Namespace, work: Path, models: tuple[Path, Path], *, mirror: bool) -> None:
    """Both commands in turns, and how they differ."""
    how = "mirrored" if mirror else "plain"
    outs = {None: work / f"nnunet_{how}", **{name: work / f"volseg_{name}_{how}" for name in asked.backends}}
    runs: dict[str | None, list[Run]] = {name: [] for name in outs}
    for _ in range(asked.rounds):
        for backend, out in outs.items():
            shutil.rmtree(out, ignore_errors=True)
            folders = work / "inputs", out
            if backend is None:
                command = nnunet_command(asked, models, folders, mirror=mirror)
            else:
                command = [*volseg_command(asked, models, folders, mirror=mirror), "--backend", backend]
            runs[backend].append(run(command))
    for backend, found in runs.items():
        name = "nnU-Net" if backend is None else f"volseg, {backend}"
        seconds, mib = [r.seconds for r in found], [r.peak_mib for r in found]
        print(f"{how}: {name}: {median(seconds):.1f} s (from {min(seconds):.1f} to {max(seconds):.1f}), "
              f"{median(r.processor_s for r in found):.1f} s of the processors, {median(mib):.0f} MiB")  # fmt: skip
    for backend in asked.backends:
        theirs, ours = runs[None], runs[backend]
        faster = median(r.seconds for r in theirs) / median(r.seconds for r in ours)
        less = median(r.processor_s for r in theirs) / median(r.processor_s for r in ours)
        part = median(r.peak_mib for r in ours) / median(r.peak_mib for r in theirs)
        equal, voxels = agreement(outs[None], outs[backend])
        print(f"{how}: volseg, {backend}: {faster:.2f} times as fast, {less:.2f} times by the processors, {part:.2f} "
              f"of the memory, {100 * equal / voxels:.4f} % of {voxels} voxels the same", flush=True)  # fmt: skip


def nnunet_command(
    asked: argparse.Namespace, models: tuple[Path, Path], folders: tuple[Path, Path], *, mirror: bool
) -> list[str]:
    folds = [p.name.removeprefix("fold_") for p in sorted(models[0].glob("fold_*"))]
    inputs, out = map(str, folders)
    options = ["-device", asked.device, "--disable_progress_bar", *([] if mirror else ["--disable_tta"])]
    python = [str(asked.nnunet_python), "-c", PREDICT]
    return [*python, "-i", inputs, "-o", out, "-m", str(models[0]), "-f", *folds, *options]


def volseg_command(
    asked: argparse.Namespace, models: tuple[Path, Path], folders: tuple[Path, Path], *, mirror: bool
) -> list[str]:
    inputs, out = map(str, folders)
    options = ["--device", asked.device, "--mirror" if mirror else "--no-mirror", "--as", "nifti"]
    return [*volseg(), "predict", str(models[1]), inputs, "--out", out, *options]


def volseg() -> list[str]:
    return [sys.executable, "-c", "from pipeline.cli_start import main; main()"]


def run(command: Sequence[str]) -> Run:
    """Run a command to its end.

    Raises:
        SystemExit: it failed; with the end of what it said.
    """
    environment = {"PYTHONPATH": str(ROOT)} if command[0] == sys.executable else {"nnUNet_compile": "f"}
    start, processor_s = time.perf_counter(), processor_of_children_s()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**inherited(), **environment}
    )
    peak_kib = [0]
    watcher = threading.Thread(target=watch, args=(process, peak_kib), daemon=True)
    watcher.start()
    said, _ = process.communicate()
    seconds = time.perf_counter() - start
    watcher.join()
    processor_s = processor_of_children_s() - processor_s
    if process.returncode:
        sys.exit(f"{' '.join(command)}\n{said[-2000:]}")
    return Run(seconds, processor_s, peak_kib[0] / 1024)


def processor_of_children_s() -> float:
    """What all commands that have ended took, with all that they started and waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def inherited() -> dict[str, str]:
    """The environment, without nnU-Net's folders, which it does not need here."""
    import os

    return {key: value for key, value in os.environ.items() if not key.startswith("nnUNet")}


def watch(process: subprocess.Popen[str], peak_kib: list[int]) -> None:
    while process.poll() is None:
        peak_kib[0] = max(peak_kib[0], sum(pss_kib(number) for number in family(process.pid)))
        time.sleep(ASKED_EVERY_S)


def family(root: int) -> set[int]:
    """A process and all that come from it."""
    parents = dict(filter(None, (parent_of(path) for path in Path("/proc").glob("[0-9]*/stat"))))
    found, new = {root}, {root}
    while new:
        new = {number for number, parent in parents.items() if parent in new} - found
        found |= new
    return found


def parent_of(stat: Path) -> tuple[int, int] | None:
    """A process's number and its parent's; None once it is gone."""
    try:
        return int(stat.parent.name), int(stat.read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None


def pss_kib(number: int) -> int:
    """The memory of a process, of which what it shares with others counts in parts."""
    try:
        lines = Path(f"/proc/{number}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)


def agreement(theirs: Path, ours: Path) -> tuple[int, int]:
    """Voxels of the same label, and all."""
    import SimpleITK as sitk

    equal = voxels = 0
    for path in sorted(theirs.glob("*.nii.gz")):
        first = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
        (other,) = (p for p in ours.glob("*.nii.gz") if p.name.startswith(path.name.partition(".")[0]))
        second = sitk.GetArrayFromImage(sitk.ReadImage(str(other)))
        equal += int((first == second).sum())
        voxels += first.size
    return equal, voxels


if __name__ == "__main__":
    main()
