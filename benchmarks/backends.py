"""What runs a network fastest on a CPU: backends that `volseg predict` has, and what was tried beside them.

    python benchmarks/backends.py BUNDLE IMAGES LABELS --threads 2
    python benchmarks/backends.py BUNDLE IMAGES LABELS --variants torch compile          # what takes minutes too

BUNDLE is a trained model of one channel, IMAGES and LABELS are folders with files of the same names. Two tables:

network   one tile of the plan's patch, and two at once: the median time of --repeats rounds in which all variants
          take turns, and how many times as fast as torch without oneDNN (torch-alone, the first)
cases     the first --cases images from file to label map on the source's grid (nothing is written): the median time of
          a case and its ratio; voxels whose label is another than the first variant's; mean Dice against LABELS, and
          its difference to the first variant's
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pipeline.backends import with_backend
from pipeline.backends.int8 import full_windows, int8_model
from pipeline.backends.openvino import compiled as compiled_by_openvino
from pipeline.bundle import ModelBundle, find_bundles, load_bundle
from pipeline.interop.network_graph import example_of
from pipeline.interop.onnx_export import onnx_model, onnx_run
from pipeline.onednn import OneDnnConvolutions
from pipeline.predict import Model, PredictSettings, predict
from pipeline.preparing import prepare
from transforms.volume import Volume, read_volume

CPU = torch.device("cpu")
CALIBRATION_CASES, WINDOWS = 16, 2  # as `volseg bundle quantise` takes them
Answer = Callable[[Tensor], Tensor]


class Answering(nn.Module):
    """A function as a network."""

    def __init__(self, answer: Answer) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, image: Tensor) -> Tensor:
        return self.answer(image)


@dataclass(frozen=True)
class World:
    bundle: ModelBundle
    images: list[Path]
    labels: list[Path]
    threads: int

    def tiles(self, cases: list[Path]) -> Iterator[Tensor]:
        """Windows of each case, as the network gets them."""
        for case in cases:
            yield from full_windows(self.bundle, prepare(self.bundle.plan, [read_volume(case)]).image, WINDOWS)


def torch_alone(world: World) -> Answer:
    """As PyTorch has it: convolutions over few voxels by code of its own."""
    return world.bundle.network


def with_onednn(world: World) -> Answer:
    network = world.bundle.network

    def answer(image: Tensor) -> Tensor:
        with OneDnnConvolutions():
            return network(image)

    return answer


def channels_last(world: World) -> Answer:
    network = copy.deepcopy(world.bundle.network).to(memory_format=torch.channels_last_3d)

    def answer(image: Tensor) -> Tensor:
        with OneDnnConvolutions():
            return network(image.contiguous(memory_format=torch.channels_last_3d)).contiguous()

    return answer


def compiled(world: World) -> Answer:
    """With weights folded in (freezing), which float32 needs to gain anything."""
    import torch._inductor.config as inductor

    run = torch.compile(copy.deepcopy(world.bundle.network).requires_grad_(False), dynamic=False)

    def answer(image: Tensor) -> Tensor:
        with inductor.patch(freezing=True), torch.no_grad():
            return run(image)

    return answer


def backend(name: str) -> Callable[[World], Answer]:
    return lambda world: with_backend(world.bundle, name, device=CPU, threads=world.threads).network


def openvino(world: World) -> Answer:
    return compiled_by_openvino(onnx_model(world.bundle), "f32", threads=world.threads)


def onnx_runtime(world: World) -> Answer:
    return onnx_run(onnx_model(world.bundle), threads=world.threads)


def int8(world: World) -> Answer:
    """As --backend openvino-int8, calibrated on the last cases."""
    windows = list(world.tiles(world.images[-CALIBRATION_CASES:]))
    return compiled_by_openvino(int8_model(world.bundle, windows), "f32", threads=world.threads)


VARIANTS: dict[str, Callable[[World], Answer]] = {
    "torch-alone": torch_alone,
    "torch": with_onednn,
    "channels-last": channels_last,
    "compile": compiled,
    "torch-bf16": backend("torch-bf16"),
    "onnxruntime": onnx_runtime,
    "openvino": openvino,
    "openvino-bf16": backend("openvino-bf16"),
    "int8": int8,
}


def main() -> None:
    args = parsed()
    torch.set_num_threads(args.threads)
    images = sorted(path for path in args.images.glob("*.nii*") if not path.name.startswith("."))
    bundle = load_bundle(find_bundles(args.bundle)[0])
    world = World(bundle, images, [args.labels / path.name for path in images], args.threads)
    answers = dict(made(world, ["torch-alone", *(name for name in args.variants if name != "torch-alone")]))
    with torch.inference_mode():
        network_table(world, answers, args.repeats)
        case_table(world, answers, args.cases)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("images", type=Path)
    parser.add_argument("labels", type=Path)
    parser.add_argument(
        "--variants", nargs="+", choices=list(VARIANTS), default=[n for n in VARIANTS if n != "compile"]
    )
    parser.add_argument("--cases", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


def made(world: World, names: list[str]) -> Iterator[tuple[str, Answer]]:
    """Each variant, with what it takes to make it and to answer first, said at once."""
    tile = next(world.tiles(world.images[:1]))
    for name in names:
        start_s = time.perf_counter()
        answer = VARIANTS[name](world)
        made_s = time.perf_counter() - start_s
        with torch.inference_mode():
            answer(tile)
        print(f"{name}: made in {made_s:.1f} s, first answer after {time.perf_counter() - start_s:.1f} s", flush=True)
        yield name, answer


def network_table(world: World, answers: dict[str, Answer], repeats: int) -> None:
    for count in (1, 2):
        tiles = example_of((count, len(world.bundle.plan.channels), *world.bundle.plan.patch_shape))
        times_s: dict[str, list[float]] = {name: [] for name in answers}
        for number in range(repeats + 1):
            for name, answer in answers.items():
                start_s = time.perf_counter()
                answer(tiles)
                if number:  # the first round finds memory and kernels
                    times_s[name].append(time.perf_counter() - start_s)
        print(
            f"\n{'x'.join(map(str, tiles.shape))}, {world.threads} thread(s)\n\n| network | ms | ratio |\n|---|---|---|"
        )
        for name, found in times_s.items():
            print(f"| {name} | {1000 * statistics.median(found):.1f} | {ratio(times_s['torch-alone'], found):.2f} |")


def case_table(world: World, answers: dict[str, Answer], count: int) -> None:
    models = {name: Model((replace(world.bundle, network=Answering(a).eval()),)) for name, a in answers.items()}
    times_s: dict[str, list[float]] = {name: [] for name in models}
    dices: dict[str, list[float]] = {name: [] for name in models}
    changed = dict.fromkeys(models, 0)
    voxels = 0
    for number, (image, label) in enumerate(zip(world.images[: count + 1], world.labels, strict=False)):
        reference = read_volume(label).voxels
        first: npt.NDArray[Any] | None = None
        for name, model in models.items():
            start_s = time.perf_counter()
            found = segmented(model, read_volume(image))
            if number:  # the first case finds memory and kernels
                times_s[name].append(time.perf_counter() - start_s)
            first = found if first is None else first
            changed[name] += int((found != first).sum())
            dices[name].append(mean_dice(found, reference))
        voxels += reference.size
    print(f"\n{count} cases, {world.threads} thread(s)\n\n| cases | ms | ratio | other labels | Dice | difference |")
    print(f"{'|---' * 6}|")
    for name, found in times_s.items():
        dice, plain = statistics.mean(dices[name]), statistics.mean(dices["torch-alone"])
        cells = [f"{1000 * statistics.median(found):.1f}", f"{ratio(times_s['torch-alone'], found):.2f}"]
        cells += [f"{1e6 * changed[name] / voxels:.1f} ppm", f"{dice:.4f}", f"{dice - plain:+.5f}"]
        print(f"| {name} | {' | '.join(cells)} |")


def segmented(model: Model, volume: Volume) -> npt.NDArray[Any]:
    settings = PredictSettings(mirror=False)
    return predict(model, [volume], settings=settings, device=CPU).label_map


def mean_dice(found: npt.NDArray[Any], reference: npt.NDArray[Any]) -> float:
    ids = [label for label in np.unique(reference) if label]
    return statistics.mean(
        2 * int(((found == i) & (reference == i)).sum()) / int((found == i).sum() + (reference == i).sum()) for i in ids
    )


def ratio(plain_s: list[float], found_s: list[float]) -> float:
    return statistics.median(plain_s) / statistics.median(found_s)


if __name__ == "__main__":
    main()
