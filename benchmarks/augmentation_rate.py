"""Augmented patches per second on one core: volseg, batchgeneratorsv2 and stock MONAI, in turns in one run.

    pip install torch batchgeneratorsv2   # in any environment; its python is PYTHON below
    python benchmarks/augmentation_rate.py --peers-python PYTHON

Every contestant is a process of one thread that cuts patches out of the same volumes in memory and is timed by its own
CPU clock, so that other work on the machine counts for nobody. Each is measured with volseg's default probabilities
and with nnU-Net's (those of its trainer's `get_training_transforms`; there is no elastic deformation among them).
"batchgeneratorsv2" takes the nearest label as the others do; "nnU-Net's default" interpolates each label and takes the
largest, which is more work.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).parents[1]
SHAPES = ((32, 48, 40), (96, 96, 96))
CONTESTANTS = ("volseg", "MONAI", "batchgeneratorsv2", "nnU-Net's default")
FOREGROUND = 0.5
SECONDS = 1.5
"""CPU time of one measurement, about."""

NNUNET = {
    "rotation_probability": 0.2,
    "rotation_degrees": 30.0,
    "scaling_probability": 0.2,
    "scaling_range": (0.7, 1.4),
    "elastic_probability": 0.0,
    "noise_probability": 0.1,
    "noise_deviation": 0.316,
    "blur_probability": 0.1,
    "blur_voxels": (0.5, 1.0),
    "brightness_probability": 0.15,
    "contrast_probability": 0.15,
    "gamma_probability": 0.37,
    "gamma_range": (0.7, 1.5),
    "low_resolution_probability": 0.125,
    "low_resolution_range": (0.5, 1.0),
}
"""nnU-Net's numbers as keys of `augment`; its two gamma curves, upright and inverted, count as one that happens when
either does. Blur and low resolution have a probability per patch and one of a half per channel: here their product."""

Case = dict[str, Any]
Make = Callable[[int], Any]


def settings() -> dict[str, dict[str, Any]]:
    """The two sets of probabilities."""
    from pipeline.config import AugmentConfig

    ours = AugmentConfig(mirror_axes=(0, 1, 2))
    theirs = ours.model_copy(update=NNUNET)
    return {"volseg's": ours.model_dump(mode="json"), "nnU-Net's": theirs.model_dump(mode="json")}


def volumes(folder: Path) -> None:
    """The bundled hippocampus cases, normalised, for every contestant to read."""
    import nibabel as nib

    data = ROOT / "tests" / "data" / "hippocampus"
    for path in sorted((data / "images").glob("*.nii.gz")):
        image = np.asarray(nib.load(path).dataobj, dtype=np.float32)
        label = np.asarray(nib.load(data / "labels" / path.name).dataobj).astype(np.uint8)
        image = (image - image.mean()) / image.std()
        np.savez(folder / path.name.removesuffix(".nii.gz"), image=image[None], label=label[None])


def read(folder: Path) -> list[Case]:
    """What `volumes` wrote, as contiguous tensors."""
    cases = []
    for path in sorted(folder.glob("*.npz")):
        with np.load(path) as arrays:
            cases.append({key: torch.from_numpy(np.ascontiguousarray(arrays[key])) for key in ("image", "label")})
    return cases


def volseg_chain(cases: list[Case], shape: tuple[int, ...], s: dict[str, Any]) -> Make:
    """The chain that `volseg train` runs, seeded for every patch as there."""
    from transforms.augment import IntensitySettings, SpatialSettings
    from transforms.chains import reseed, training_chain
    from transforms.patches import class_positions

    spatial, intensity = (
        kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in s.items() if k in kind.__dataclass_fields__})
        for kind in (SpatialSettings, IntensitySettings)
    )
    chain = training_chain(
        shape, (1, 1, 1), spatial=spatial, intensity=intensity, twin_classes=(0, 1, 2), foreground_share=FOREGROUND
    )
    data = [
        {**c, "positions": class_positions(c["label"][0].numpy(), class_count=3), "fill": float(c["image"].min())}
        for c in cases
    ]

    def make(number: int) -> Any:
        reseed(chain, [0, 1, number])
        return chain(data[number % len(data)])

    return make


def monai_chain(cases: list[Case], shape: tuple[int, ...], s: dict[str, Any]) -> Make:
    """Stock dictionary transforms; metadata off and class indices made beforehand, which is MONAI at its fastest."""
    import monai.transforms as m
    from monai.data import set_track_meta

    set_track_meta(False)
    keys, radians = ("image", "label"), float(np.deg2rad(s["rotation_degrees"]))
    # Rotation and scaling share one probability in MONAI: that of either.
    moves = 1 - (1 - s["rotation_probability"]) * (1 - s["scaling_probability"])
    bend = s["elastic_probability"]
    low, high = s["scaling_range"]
    common = {"spatial_size": shape, "mode": ("bilinear", "nearest"), "padding_mode": "zeros"}
    change = {"rotate_range": (radians,) * 3, "scale_range": ((low - 1, high - 1),) * 3}
    spatial: list[Any] = [m.RandAffined(keys, prob=moves, **change, **common)]
    if bend:
        elastic = m.Rand3DElasticd(keys, prob=1.0, sigma_range=(4, 4), magnitude_range=(50, 100), **change, **common)
        spatial = [m.OneOf([spatial[0], elastic], weights=(1 - bend, bend))]
    reach = initial_shape(shape, radians, low)
    chain = m.Compose(
        [
            m.SpatialPadd(keys, reach),
            m.RandCropByPosNegLabeld(
                keys, "label", reach, FOREGROUND, 1 - FOREGROUND, 1, fg_indices_key="fg", bg_indices_key="bg"
            ),
            *spatial,
            *[m.RandFlipd(keys, prob=0.5, spatial_axis=axis) for axis in s["mirror_axes"]],
            m.RandGaussianNoised("image", prob=s["noise_probability"], std=s["noise_deviation"]),
            m.RandGaussianSmoothd("image", *(s["blur_voxels"],) * 3, prob=s["blur_probability"]),
            m.RandScaleIntensityd(
                "image", factors=[x - 1 for x in s["brightness_range"]], prob=s["brightness_probability"]
            ),
            m.RandScaleIntensityFixedMeand(
                "image",
                factors=[x - 1 for x in s["contrast_range"]],
                preserve_range=True,
                prob=s["contrast_probability"],
            ),
            m.RandSimulateLowResolutiond(
                "image", prob=s["low_resolution_probability"], zoom_range=s["low_resolution_range"]
            ),
            m.RandAdjustContrastd("image", prob=s["gamma_probability"], gamma=s["gamma_range"], retain_stats=True),
        ]
    ).set_random_state(seed=0)
    padded = [m.Compose([m.SpatialPadd(keys, reach), m.FgBgToIndicesd("label")])(dict(c)) for c in cases]
    data = [{**c, "fg": p["label_fg_indices"], "bg": p["label_bg_indices"]} for c, p in zip(cases, padded, strict=True)]
    return lambda number: chain(data[number % len(data)])


def batchgenerators_chain(cases: list[Case], shape: tuple[int, ...], s: dict[str, Any], *, labels: str) -> Make:
    """nnU-Net's chain with the larger box that it cuts first; `labels` is how they are interpolated."""
    from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
    from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
    from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
    from batchgeneratorsv2.transforms.utils.remove_label import RemoveLabelTansform

    radians = float(np.deg2rad(s["rotation_degrees"]))
    spatial = SpatialTransform(
        shape,
        patch_center_dist_from_border=0,
        random_crop=False,
        p_elastic_deform=s["elastic_probability"],
        p_rotation=s["rotation_probability"],
        rotation=(-radians, radians),
        p_scaling=s["scaling_probability"],
        scaling=tuple(s["scaling_range"]),
        p_synchronize_scaling_across_axes=1,
        mode_seg=labels,
    )
    mirror, relabel = MirrorTransform(allowed_axes=tuple(s["mirror_axes"])), RemoveLabelTansform(-1, 0)
    chain = ComposeTransforms([spatial, *batchgenerators_intensity(s), mirror, relabel])
    reach = initial_shape(shape, radians, 0.85)  # nnU-Net counts on 0.85 here, whatever the scaling is
    random = np.random.default_rng(0)
    places = [np.argwhere(c["label"][0].numpy()) for c in cases]

    def make(number: int) -> Any:
        case, voxels = cases[number % len(cases)], places[number % len(cases)]
        size = case["image"].shape[1:]
        centre = voxels[random.integers(len(voxels))] if random.random() < FOREGROUND else random.integers(size)
        image, label = (_box(case[key], centre, reach) for key in ("image", "label"))
        return chain(image=image, segmentation=label.to(torch.int16))

    return make


def batchgenerators_intensity(s: dict[str, Any]) -> list[Any]:
    """nnU-Net's changes of intensity, in its order."""
    from batchgeneratorsv2.transforms.intensity.brightness import MultiplicativeBrightnessTransform
    from batchgeneratorsv2.transforms.intensity.contrast import BGContrast, ContrastTransform
    from batchgeneratorsv2.transforms.intensity.gamma import GammaTransform
    from batchgeneratorsv2.transforms.intensity.gaussian_noise import GaussianNoiseTransform
    from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
    from batchgeneratorsv2.transforms.spatial.low_resolution import SimulateLowResolutionTransform
    from batchgeneratorsv2.transforms.utils.random import RandomTransform

    def drawn(name: str) -> Any:
        return BGContrast(tuple(s[f"{name}_range"]))

    each: dict[str, Any] = {"synchronize_channels": False, "p_per_channel": 1}
    both = GaussianNoiseTransform((0, s["noise_deviation"] ** 2), p_per_channel=1, synchronize_channels=True)
    blur = GaussianBlurTransform(tuple(s["blur_voxels"]), synchronize_axes=False, benchmark=True, **each)
    scale = tuple(s["low_resolution_range"])
    low = SimulateLowResolutionTransform(scale, synchronize_axes=True, ignore_axes=None, **each)
    curve = {"gamma": drawn("gamma"), "p_retain_stats": 1, **each}
    inverted = s["gamma_probability"] * 0.27  # nnU-Net: 0.1 of the one and 0.3 of the other, 0.37 of either
    return [
        RandomTransform(both, s["noise_probability"]),
        RandomTransform(blur, s["blur_probability"]),
        RandomTransform(MultiplicativeBrightnessTransform(drawn("brightness"), **each), s["brightness_probability"]),
        RandomTransform(ContrastTransform(drawn("contrast"), preserve_range=True, **each), s["contrast_probability"]),
        RandomTransform(low, s["low_resolution_probability"]),
        RandomTransform(GammaTransform(p_invert_image=1, **curve), inverted),
        RandomTransform(GammaTransform(p_invert_image=0, **curve), s["gamma_probability"] - 0.73 * inverted),
    ]


def _box(volume: torch.Tensor, centre: np.ndarray, shape: tuple[int, ...]) -> torch.Tensor:
    """A box about `centre`, kept inside where the volume is large enough, with zeros beside it."""
    size = np.asarray(volume.shape[1:])
    start = np.asarray(centre) - np.asarray(shape) // 2
    room = size - shape
    start = np.where(room > 0, np.clip(start, 0, np.maximum(room, 0)), room // 2)
    low, high = np.maximum(start, 0), np.minimum(start + shape, size)
    inside = volume[:, low[0] : high[0], low[1] : high[1], low[2] : high[2]]
    before, after = low - start, start + shape - high
    pads = list(itertools.chain.from_iterable((int(b), int(a)) for b, a in zip(before[::-1], after[::-1], strict=True)))
    return torch.nn.functional.pad(inside, pads) if any(pads) else inside.clone()


def initial_shape(shape: tuple[int, ...], radians: float, smallest: float) -> tuple[int, ...]:
    """The box that holds a patch turned about any one axis, and enlarged: what nnU-Net's loader cuts."""
    corner = np.asarray(shape, dtype=float)
    reach = corner.copy()
    angle = min(radians, np.pi / 2)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        for p, q in ((a, b), (b, a)):
            reach[p] = max(reach[p], abs(corner[p] * np.cos(angle) + corner[q] * np.sin(angle)))
            reach[p] = max(reach[p], abs(corner[p] * np.cos(angle) - corner[q] * np.sin(angle)))
    return tuple(int(n) for n in reach / smallest)


def build(contestant: str, cases: list[Case], shape: tuple[int, ...], s: dict[str, Any]) -> Make:
    """A function that makes the patch of a number."""
    if contestant == "volseg":
        return volseg_chain(cases, shape, s)
    if contestant == "MONAI":
        return monai_chain(cases, shape, s)
    return batchgenerators_chain(cases, shape, s, labels="nearest" if contestant == "batchgeneratorsv2" else "bilinear")


def compete(contestant: str, folder: Path) -> None:
    """Wait for a task a line on the standard input; answer each with patches a CPU second."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    np.random.seed(0)  # batchgeneratorsv2 draws from the global generators
    cases = read(folder)
    made: dict[str, Make] = {}
    print("ready", flush=True)
    for line in sys.stdin:
        if line not in made:
            task = json.loads(line)
            made[line] = build(contestant, cases, tuple(task["shape"]), task["settings"])
            rate(made[line], SECONDS / 3)
        print(rate(made[line], SECONDS), flush=True)


def rate(make: Make, seconds: float) -> float:
    """Patches a CPU second, from as many as fit."""
    start = time.process_time()
    for number in itertools.count():
        make(number)
        spent = time.process_time() - start
        if spent > seconds:
            return (number + 1) / spent
    raise AssertionError


def start(contestant: str, python: str, folder: Path) -> subprocess.Popen[str]:
    """A contestant's process, or None with one line that says what is missing."""
    command = [python, __file__, "--contestant", contestant, "--data", str(folder)]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
    )
    assert process.stdout is not None
    if process.stdout.readline().strip() != "ready":
        raise SystemExit(f"{contestant} did not start")
    return process


def ask(process: subprocess.Popen[str], shape: tuple[int, ...], s: dict[str, Any]) -> float:
    """One measurement."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps({"shape": shape, "settings": s}) + "\n")
    process.stdin.flush()
    return float(process.stdout.readline())


def missing(python: str, module: str) -> bool:
    """True when that python cannot import a module."""
    return subprocess.run([python, "-c", f"import {module}"], capture_output=True, check=False).returncode != 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers-python", default=sys.executable, help="a python that has batchgeneratorsv2")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--contestant", choices=CONTESTANTS, help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contestant:
        compete(arguments.contestant, arguments.data)
        return
    pythons = dict.fromkeys(CONTESTANTS[:2], sys.executable)
    if missing(arguments.peers_python, "batchgeneratorsv2"):
        print(f"left out: {arguments.peers_python} has no batchgeneratorsv2; give --peers-python one that has")
    else:
        pythons |= dict.fromkeys(CONTESTANTS[2:], arguments.peers_python)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        volumes(folder)
        processes = {contestant: start(contestant, python, folder) for contestant, python in pythons.items()}
        try:
            for (title, s), shape in itertools.product(settings().items(), SHAPES):
                rates: dict[str, list[float]] = {contestant: [] for contestant in processes}
                for _ in range(arguments.rounds):
                    for contestant, process in processes.items():
                        rates[contestant].append(ask(process, shape, s))
                report(title, shape, rates)
        finally:
            for process in processes.values():
                process.kill()
                process.wait()


def report(title: str, shape: tuple[int, ...], rates: dict[str, list[float]]) -> None:
    """Medians, ranges and how many times each peer volseg is, round by round, since a busy machine slows all down."""
    print(f"patch {'x'.join(map(str, shape))}, {title} probabilities: patches a CPU second, median (range)")
    for contestant, values in rates.items():
        times = [ours / theirs for ours, theirs in zip(rates["volseg"], values, strict=True)]
        print(
            f"  {contestant:20} {statistics.median(values):8.1f} ({min(values):.1f} to {max(values):.1f})"
            f"   volseg makes {statistics.median(times):.2f} times as many ({min(times):.2f} to {max(times):.2f})",
            flush=True,
        )


if __name__ == "__main__":
    main()
