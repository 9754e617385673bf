"""How long a folder of single-slice DICOM files takes to index, beside pydicom reading the same headers alone.

Files of 512x512 pixels are made from one real slice, each with its own identifier and place. pydicom's share is
`dcmread(path, stop_before_pixels=True)` of every file, nothing done with it; ours is `index_folder`, with patients
hashed, stacks sorted and placed. Both run in turn, in one process, after the files have been read once.

    python benchmarks/dicom_index_time.py [--files 5000] [--rounds 5] [--slice FILE]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom

from transforms.dicom_header import quiet_pydicom
from transforms.dicom_index import index_folder

SLICE = Path(__file__).parents[1] / "tests" / "data" / "dicom_hippocrop" / "14.dcm"
SIDE, SLICES_A_SERIES, FILES_A_FOLDER = 512, 250, 1000


def main() -> None:
    """Make the files, measure, print one line a measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--slice", type=Path, default=SLICE, help="whose header the files get")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        paths = make_files(Path(folder), args.slice, args.files)
        elements = sum(1 for _ in pydicom.dcmread(paths[0], stop_before_pixels=True).iterall())
        print(f"{len(paths)} files of {paths[0].stat().st_size} bytes, {elements} elements in each header")
        measure(Path(folder), paths, args.rounds)


def make_files(folder: Path, source: Path, count: int) -> list[Path]:
    """Slices with the header of `source`, in series of `SLICES_A_SERIES`, over nested folders."""
    dataset = pydicom.dcmread(source)
    dataset.Rows = dataset.Columns = SIDE
    dataset.PixelData = np.zeros((SIDE, SIDE), dtype=np.uint16).tobytes()
    series, study = dataset.SeriesInstanceUID, dataset.StudyInstanceUID
    paths = []
    for n in range(count):
        number, k = divmod(n, SLICES_A_SERIES)
        dataset.SeriesInstanceUID, dataset.StudyInstanceUID = f"{series[:50]}.{number}", f"{study[:50]}.{number // 4}"
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = f"{series[:50]}.{number}.{k}"
        dataset.InstanceNumber, dataset.ImagePositionPatient = k + 1, [0.0, 0.0, 1.5 * k]
        home = folder / f"study {n // FILES_A_FOLDER}" / f"series {number}"
        home.mkdir(parents=True, exist_ok=True)
        paths.append(home / f"IM{k:04d}")
        dataset.save_as(paths[-1])
    return paths


def measure(folder: Path, paths: list[Path], rounds: int) -> None:
    """Both in turn, so that what else the machine does strikes both alike."""

    def read_alone() -> None:
        with quiet_pydicom():
            for path in paths:
                pydicom.dcmread(path, stop_before_pixels=True)

    def index() -> None:
        found = index_folder(folder)
        assert len(found.series) == -(-len(paths) // SLICES_A_SERIES)
        assert not any(series.problems for series in found.series)

    read_alone()
    theirs, ours = [], []
    for _ in range(rounds):
        theirs.append(seconds(read_alone))
        ours.append(seconds(index))
    ratios = [mine / alone for mine, alone in zip(ours, theirs, strict=True)]
    print(f"pydicom alone  {statistics.median(theirs):.2f} s  ({spread(theirs)})")
    print(f"index_folder   {statistics.median(ours):.2f} s  ({spread(ours)})")
    print(f"ratio          {statistics.median(ratios):.2f}  ({spread(ratios)}), wanted: at most 1.5")


def seconds(work: Callable[[], None]) -> float:
    """How long `work` takes."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def spread(values: list[float]) -> str:
    """Lowest and highest."""
    return f"{min(values):.2f} to {max(values):.2f}"


if __name__ == "__main__":
    main()
