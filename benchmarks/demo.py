"""The whole way on bundled data, as `make demo` runs it: the same commands that a user would type, timed.

Checks 32 real hippocampus MR cases, trains two folds, scores them out of fold, then segments a real DICOM series
that the models never saw. Finished folds are kept, so a second run only repeats what follows them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
MANIFEST = REPOSITORY / "data_manifests" / "hippocampus_demo.json"
CONFIG = REPOSITORY / "configs" / "demo.yaml"
SERIES = REPOSITORY / "tests" / "data" / "dicom_hippocrop"


def main() -> None:
    """Run the stages; stop at the first that fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=REPOSITORY / "demo_out", help="folder of all results")
    parser.add_argument("--set", action="append", default=[], dest="sets", help="config override, as in volseg")
    arguments = parser.parse_args()
    out: Path = arguments.out.resolve()
    runs, segmentation = out / "runs", out / "segmentation"
    sets = [part for value in (f"runs={runs}", *arguments.sets) for part in ("--set", value)]
    stages = {
        "check": ["check", str(MANIFEST)],
        "plan": ["plan", str(CONFIG), *sets, "--out", str(out / "plan.json")],
        "cross-validate": ["crossval", str(CONFIG), *sets],
        "segment": [
            *("predict", str(runs / "demo"), str(SERIES), "--out", str(segmentation)),
            *("--as", "seg,nifti,overlay", "--force"),
        ],
    }
    seconds = {name: run_stage(name, command) for name, command in stages.items()}
    summarise(runs, segmentation, seconds)


def run_stage(name: str, command: list[str]) -> float:
    """Run one volseg command as its own process; gives its wall time."""
    print(f"\n=== {name}: volseg {' '.join(_short(word) for word in command)}", flush=True)
    begin = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "pipeline.cli", *command], check=False)
    if done.returncode:
        sys.exit(f"the demo stopped: {name} failed")
    return time.monotonic() - begin


def summarise(runs: Path, segmentation: Path, seconds: dict[str, float]) -> None:
    """Print where everything lies, and the figures."""
    report = json.loads((runs / "demo" / "report.json").read_text())
    print("\n=== done")
    for label in report["labels"]:
        folds = ", ".join(f"fold {f['fold']} {f['mean']:.3f}" for f in label["folds"])
        print(f"Dice {label['label']}: {label['mean']:.3f} out of fold ({folds})")
    folds = ", ".join(f"fold {f['fold']} {f['mean']:.3f}" for f in report["overall"]["folds"])
    print(f"Dice, mean of labels: {report['overall']['mean']:.3f} out of fold ({folds})")
    times = {**seconds, "all": sum(seconds.values())}
    print("Time: " + ", ".join(f"{name} {s:.0f} s" for name, s in times.items()))
    places = {
        "models and out-of-fold report": runs / "demo",
        "DICOM SEG": segmentation / f"{SERIES.name}.seg.dcm",
        "NIfTI label map": segmentation / f"{SERIES.name}.nii.gz",
        "overlay picture": segmentation / f"{SERIES.name}.png",
    }
    for what, path in places.items():
        print(f"{what}: {_short(str(path))}")
    from pipeline.tracking import embedded_store, page_address, page_command

    print(f"runs in MLflow: {page_command(embedded_store(runs))}")
    print(f"and then open: {page_address(embedded_store(runs))}")


def _short(word: str) -> str:
    """A path relative to where the command was started, if it lies below."""
    path = Path(word)
    return str(path.relative_to(Path.cwd())) if path.is_absolute() and path.is_relative_to(Path.cwd()) else word


if __name__ == "__main__":
    main()
