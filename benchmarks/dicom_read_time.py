"""How long a DICOM series takes from its folder to voxels, and how much memory: volseg against SimpleITK, in turns.

    python benchmarks/dicom_read_time.py FOLDER_OF_ONE_SERIES

Each reading is a process of its own; imports are not counted. The time is that of finding the series in its folder
and reading it; the memory is what the process held at most beyond what it held before.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from statistics import median

ROUNDS = 9


def read_volseg(folder: Path) -> tuple[int, ...]:
    from transforms.dicom import read_series

    voxels, _, _ = read_series(folder)
    return voxels.shape


def read_simpleitk(folder: Path) -> tuple[int, ...]:
    """SimpleITK's series reader, as float32 like volseg's."""
    import SimpleITK as sitk

    reader = sitk.ImageSeriesReader()
    (series,) = reader.GetGDCMSeriesIDs(str(folder))
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder), series))
    reader.SetOutputPixelType(sitk.sitkFloat32)
    return tuple(reader.Execute().GetSize())


READERS = {"volseg": read_volseg, "SimpleITK": read_simpleitk}


def peak_mib() -> float:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure_here(reader: str, folder: Path) -> None:
    """Print the seconds and MiB of one reading in this process."""
    import SimpleITK  # noqa: F401  (both readers start from the same imports)

    import transforms.dicom  # noqa: F401

    before_mib, start_s = peak_mib(), time.perf_counter()
    shape = READERS[reader](folder)
    print(time.perf_counter() - start_s, peak_mib() - before_mib, *shape)


def measure(reader: str, folder: Path) -> tuple[float, float, str]:
    command = [sys.executable, __file__, str(folder), reader]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return float(out[0]), float(out[1]), "x".join(out[2:])


def main() -> None:
    """Print the median time and memory of each reader."""
    if len(sys.argv) < 2:
        sys.exit(f"usage: {sys.argv[0]} FOLDER_OF_ONE_SERIES")
    folder = Path(sys.argv[1])
    if len(sys.argv) > 2:
        measure_here(sys.argv[2], folder)
        return
    for reader in READERS:
        measure(reader, folder)  # the first run also reads the disk and writes the bytecode
    results: dict[str, list[tuple[float, float, str]]] = {reader: [] for reader in READERS}
    for _ in range(ROUNDS):
        for reader, measured in results.items():
            measured.append(measure(reader, folder))
    for reader, measured in results.items():
        times_ms = [1000 * seconds for seconds, _, _ in measured]
        print(
            f"{reader:10} {median(times_ms):7.1f} ms ({min(times_ms):.1f} to {max(times_ms):.1f}, {ROUNDS} rounds), "
            f"{median(mib for _, mib, _ in measured):6.1f} MiB, {measured[0][2]} voxels"
        )


if __name__ == "__main__":
    # Run from anywhere: the packages lie beside this folder.
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()
