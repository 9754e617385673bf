"""Wall time and peak memory of everything but the network, many classes on a large study: a Markdown table.

Ours is `predict`: preprocessing, windows, blending, restoring, label map. MONAI's is `sliding_window_inference` and
`Invertd` with its own preprocessing. nnU-Net's is its export function alone, which begins with all scores there; it
runs in the Python of `--nnunet-python`. Each runs in a process of its own, and the seconds of the network, one
pointwise layer, are taken off. A process that asks for more than `--most-gb` fails, and the table says so.

    python benchmarks/export_cost.py --ct CT.nii.gz --nnunet-python nnunet/bin/python
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))

SPACING_MM = (0.8, 0.8, 1.5)


def main() -> None:
    """Print a row for each implementation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ct", type=Path, help="whose body the organs fill (default: a cylinder)")
    parser.add_argument("--shape", type=int, nargs=3, default=(512, 512, 300))
    parser.add_argument("--classes", type=int, default=117)
    parser.add_argument("--side", type=int, default=96, help="of the windows, in voxels")
    parser.add_argument("--spacing", type=float, default=1.5, help="of the network's grid, in mm")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--max-memory-gb", type=float, default=4.0, help="ours is held to this")
    parser.add_argument("--most-gb", type=float, default=20.0, help="address space of the others")
    parser.add_argument("--nnunet-python", type=Path)
    parser.add_argument("--only", nargs="*", default=["ours", "monai", "nnunet"])
    parser.add_argument("--worker", choices=list(WORKERS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        torch.set_num_threads(args.threads)
        print(json.dumps(WORKERS[args.worker](args)))
        return
    print("| | seconds | of which the network | peak memory | result |\n|---|---|---|---|---|")
    for name in args.only:
        if name != "nnunet" or args.nnunet_python:
            print(_row(name, [_measure(name, args) for _ in range(args.repeats)]), flush=True)


def _measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    python = str(args.nnunet_python) if name == "nnunet" else sys.executable
    most = round(args.most_gb * 1e9)

    def bounded() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (most, most))

    limit = None if name == "ours" else bounded
    command = [python, __file__, *sys.argv[1:], "--worker", name]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=limit)
    if ran.returncode:
        return {"error": (ran.stderr.strip().splitlines() or ["killed"])[-1][:80]}
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return found


def _row(name: str, runs: list[dict[str, Any]]) -> str:
    failed = [run["error"] for run in runs if "error" in run]
    if failed:
        return f"| {name} | - | - | - | {failed[0]} |"
    seconds, network, peak = (statistics.median(run[key] for run in runs) for key in ("seconds", "network", "peak"))
    return f"| {name} | {seconds:.1f} | {network:.1f} | {peak / 1e9:.2f} GB | {runs[0]['found']} classes |"


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _study(args: argparse.Namespace) -> Any:
    from many_classes import organ_study

    return organ_study(tuple(args.shape), SPACING_MM, args.classes, args.ct)


def _ours(args: argparse.Namespace) -> dict[str, Any]:
    from many_classes import organ_model

    from pipeline.predict import PredictSettings, predict

    study = _study(args)
    model = organ_model(args.classes, args.side, (args.spacing,) * 3)
    settings = PredictSettings(False, round(args.max_memory_gb * 1e9))
    network: Any = model.bundles[0].network
    start = time.perf_counter()
    label_map = predict(model, [study], settings=settings, device=torch.device("cpu")).label_map
    return _told(time.perf_counter() - start, network.seconds, label_map)


def _monai(args: argparse.Namespace) -> dict[str, Any]:
    from many_classes import Greys
    from monai.data import MetaTensor, decollate_batch
    from monai.inferers import sliding_window_inference
    from monai.transforms import AsDiscreted, Compose, Invertd, Orientationd, Spacingd

    study, network = _study(args), Greys(args.classes)
    image = MetaTensor(torch.from_numpy(study.voxels[None]), affine=torch.from_numpy(study.geometry.affine_ras.copy()))
    before = Compose([Orientationd("image", "RAS"), Spacingd("image", (args.spacing,) * 3, mode="bilinear")])
    after = Compose(
        [Invertd("pred", before, orig_keys="image", nearest_interp=False), AsDiscreted("pred", argmax=True)]
    )
    start = time.perf_counter()
    with torch.inference_mode():
        data = before({"image": image})
        side = (args.side,) * 3
        scores = sliding_window_inference(data["image"][None], side, 1, network, overlap=0.5, mode="gaussian")
        case = {"image": data["image"], "pred": decollate_batch(scores)[0]}
        label_map = after(case)["pred"][0].numpy()
    return _told(time.perf_counter() - start, network.seconds, label_map)


def _nnunet(args: argparse.Namespace) -> dict[str, Any]:
    """Its arrays are (z, y, x)."""
    from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    grid = [max(1, round(n * s / args.spacing)) for n, s in zip(args.shape, SPACING_MM, strict=True)][::-1]
    cells = _organ_cells(grid, args.classes)
    logits = np.empty((args.classes, *grid), dtype=np.float32)
    for number in range(args.classes):
        logits[number] = -((cells - number) ** 2)
    plans = PlansManager(_nnunet_plans(args.spacing))
    labels = {"background": 0, **{f"organ {n}": n for n in range(1, args.classes)}}
    manager = plans.get_label_manager({"labels": labels, "channel_names": {"0": "greys"}, "file_ending": ".nii.gz"})
    shape = tuple(args.shape)[::-1]
    facts = {
        "spacing": list(SPACING_MM[::-1]),
        "shape_after_cropping_and_before_resampling": shape,
        "shape_before_cropping": shape,
        "bbox_used_for_cropping": [[0, n] for n in shape],
    }
    start = time.perf_counter()
    configuration = plans.get_configuration("3d_fullres")
    label_map = convert_predicted_logits_to_segmentation_with_correct_shape(
        logits, plans, configuration, manager, facts, num_threads_torch=args.threads
    )
    return _told(time.perf_counter() - start, 0.0, label_map)


def _organ_cells(grid: list[int], classes: int) -> Any:
    """The classes' numbers on the network's grid, without noise."""
    from many_classes import GREY, organ_greys

    return np.rint(organ_greys((grid[0], grid[1], grid[2]), classes) / GREY).astype(np.float32)


def _nnunet_plans(spacing: float) -> dict[str, Any]:
    resampling = {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None}
    return {
        "dataset_name": "organs",
        "plans_name": "plans",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "label_manager": "LabelManager",
        "configurations": {
            "3d_fullres": {
                "spacing": [spacing] * 3,
                "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
                "resampling_fn_probabilities_kwargs": resampling,
                "architecture": {"network_class_name": "", "arch_kwargs": {}, "_kw_requires_import": []},
            }
        },
    }


def _told(seconds: float, network: float, label_map: Any) -> dict[str, Any]:
    found = int(np.count_nonzero(np.bincount(np.asarray(label_map).astype(np.uint8).ravel(), minlength=256)))
    return {"seconds": seconds - network, "network": network, "peak": _peak(), "found": found}


WORKERS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {"ours": _ours, "monai": _monai, "nnunet": _nnunet}


if __name__ == "__main__":
    main()
