"""What a MONAI bundle's metadata tells of its channels, and what it leaves open."""

from __future__ import annotations

from pipeline.interop.monai_config import MonaiConfig
from pipeline.interop.monai_meaning import channels_of


def test_what_training_saw_is_told_by_no_metadata() -> None:
    image = {"modality": "MR", "channel_def": {"0": "T1", "1": "T2"}}
    metadata = MonaiConfig({"network_data_format": {"inputs": {"image": image}}}, "metadata.json")
    found = [(c.name, c.modality, c.lowest, c.highest) for c in channels_of(metadata)]
    assert found == [("T1", "MR", None, None), ("T2", "MR", None, None)]
