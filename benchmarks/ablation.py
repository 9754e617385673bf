"""What each choice is worth at equal time: one training a row, everything else as the defaults have it.

    python benchmarks/ablation.py --root FOLDER --out runs/ablation [--minutes 10] [--processor-time] [--rows plain ...]

FOLDER holds imagesTr and labelsTr of the Medical Segmentation Decathlon's Task04 (data_manifests/hippocampus.json).
Every row trains fold 0 for the same minutes, with the patch and the channels that the planner gives the first row.
A row that is finished is not run again. The table that it prints at the end is Markdown.

With `--processor-time` a minute is one that a processor worked for the training: pinned to one core (`taskset -c 0`) a
row then gets the same work done whatever else the machine does.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
START = "from pipeline.cli_start import main; main()"
"""The checkout beside this file, whatever is installed."""

PROCESSOR_CLOCK = "import time; time.monotonic = time.process_time; "
"""Before START: the clock that a training keeps its budget by."""

ROWS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "deep supervision": ("network.deep_supervision=true",),
    "residual": ("network.block=residual",),
    "no elastic deformation": ("augment.elastic_probability=0",),
    "Dice alone": ("loss.terms={dice: 1}",),
    "batch normalisation": ("network.normalisation=batch",),
    "Tversky alone": ("loss.terms={tversky: 1}",),
    "attention gates": ("network.skip=attention",),
    "cross entropy alone": ("loss.terms={cross_entropy: 1}",),
    "float32": ("train.precision=float32",),
    "SegResNet": ("network.name=segresnet",),
    "MedNeXt": ("network.name=mednext",),
    "transformer bottleneck": ("network.bottleneck=transformer",),
    "SwinUNETR": ("network.name=swin_unetr",),
    "plain, seed 1": ("train.seed=1",),
    "plain, seed 2": ("train.seed=2",),
}


def main() -> None:
    """Run what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--root", type=Path, required=True, help="folder of imagesTr and labelsTr")
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"), help="folder of the runs")
    parser.add_argument("--minutes", type=float, default=10.0, help="time of each training")
    parser.add_argument("--processor-time", action="store_true", help="minutes of work, not minutes by the wall")
    parser.add_argument("--rows", nargs="*", choices=ROWS, default=list(ROWS), help="rows to run, in this order")
    given = parser.parse_args()
    common = [
        f"data.root={given.root.resolve()}",
        f"data.cache={(given.out / 'cache').resolve()}",
        f"train.budget_minutes={given.minutes:g}",
        "train.validations=1",
        "tracking.enabled=false",
    ]
    for row in given.rows:
        folder = folder_of(given.out, row)
        if not (folder / "fold_0" / "done.json").exists():
            start = PROCESSOR_CLOCK + START if given.processor_time else START
            run_row(folder, start, [*common, *fixed_plan(given.out / "plain", row), *ROWS[row]])
    print(table(given.out), flush=True)


def folder_of(out: Path, row: str) -> Path:
    """Where a row's run lies."""
    return out / row.replace(",", "").replace(" ", "_")


def run_row(folder: Path, start: str, settings: list[str]) -> None:
    """One training; one that fails is told and leaves its row out."""
    command = [sys.executable, "-c", start, "train", "configs/hippocampus.yaml", "--fold", "0"]
    command += ["--out", str(folder.resolve())]
    for setting in settings:
        command += ["--set", setting]
    outcome = subprocess.run(command, cwd=REPOSITORY, check=False)
    if outcome.returncode:
        print(f"{folder.name}: failed with {outcome.returncode}", file=sys.stderr, flush=True)


def fixed_plan(first: Path, row: str) -> list[str]:
    """The first row's channels and patch, where the row is of the same network."""
    plan = first / "plan.json"
    if row == "plain" or not plan.exists() or any(s.startswith("network.name=") for s in ROWS[row]):
        return []
    document = json.loads(plan.read_text(encoding="utf-8"))
    return [f"plan.features={document['unet']['features']}", f"plan.patch_shape={document['patch_shape']}"]


def table(out: Path) -> str:
    """Rows by mean Dice, best first."""
    lines = []
    for row in ROWS:
        folder = folder_of(out, row) / "fold_0"
        if not (folder / "done.json").exists():
            continue
        done = json.loads((folder / "done.json").read_text(encoding="utf-8"))
        by_label = {name.partition("/")[2]: dice for name, dice in done["dice"].items()}
        mean = by_label.pop("mean")
        lines.append((mean, row, ", ".join(f"{name} {dice:.4f}" for name, dice in by_label.items()), done["steps"]))
    lines.sort(reverse=True)
    text = ["| row | mean Dice | by label | updates |", "|---|---|---|---|"]
    return "\n".join(text + [f"| {row} | {mean:.4f} | {labels} | {steps} |" for mean, row, labels, steps in lines])


if __name__ == "__main__":
    main()
