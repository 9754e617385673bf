"""What each of two gloo processes does for test_live.py: `python -m tests.pipeline.inspection.two_looking FOLDER`.

Fabric starts the second one, which runs this module from its beginning too.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from pipeline.history import HISTORY, read_history
from pipeline.train import train
from tests.pipeline.tiny_training import Listener, same, with_settings
from tests.pipeline.two_processes import TWO, task_of_four


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    blind = train(with_settings(task_of_four(folder, "blind"), steps=6), TWO, Listener(), resume=False)
    seen, listener = with_settings(task_of_four(folder, "seen"), steps=6, inspect_every=2), Listener()
    assert same(train(seen, TWO, listener, resume=False).weights, blind.weights)
    told = [step for step, row in listener.rows if "inspect/encoder_1/energy" in row]
    assert told in ([2, 4, 6], []), told  # of the first process, and of the other
    if told:
        rows = [row for row in read_history(seen.folder / HISTORY) if "gradient_norm/encoder_1" in row]
        assert [row["step"] for row in rows] == [2, 4, 6]
        (folder / "told").touch()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
