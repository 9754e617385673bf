"""What inputs stand for where a model has several channels: each image goes to the channel it was made for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from pipeline.console import Silence
from pipeline.errors import VolumeError
from pipeline.files import write_json
from pipeline.plan import ChannelPlan
from pipeline.studies import Wanted, find_studies

MODEL = [("FLAIR", "MR"), ("T1c", "MR")]


def planned(channels: Sequence[tuple[str, str]]) -> list[ChannelPlan]:
    return [
        ChannelPlan.model_validate(
            {"name": name, "modality": modality, "normalisation": {"kind": "zscore"}, "lowest": 0.0, "highest": 1.0}
        )
        for name, modality in channels
    ]


def manifest_of(folder: Path, channels: Sequence[tuple[str, str]]) -> Path:
    images = {name: f"a_{name}.nii.gz" for name, _ in channels}
    for image in images.values():
        (folder / image).touch()
    document = {
        "name": "two",
        "channels": [{"name": name, "modality": modality} for name, modality in channels],
        "labels": {"labels": [{"id": 1, "name": "tumour", "colour": [230, 159, 0]}]},
        "cases": [{"case_id": "a", "patient_id": "a", "images": images}],
    }
    write_json(folder / "two.json", document)
    return folder / "two.json"


@pytest.mark.parametrize("channels", [MODEL, MODEL[::-1], [("t1C", "MR"), ("flair", "MR")]])
def test_channels_of_a_manifest_are_put_in_the_models_order(
    tmp_path: Path, channels: Sequence[tuple[str, str]]
) -> None:
    (study,) = find_studies([manifest_of(tmp_path, channels)], Wanted(planned(MODEL)), console=Silence())
    assert [path.name.casefold() for path in study.paths] == ["a_flair.nii.gz", "a_t1c.nii.gz"]


@pytest.mark.parametrize(
    "channels", [[("FLAIR", "MR"), ("T2", "MR")], [("FLAIR", "MR"), ("T1c", "CT")], MODEL[:1]], ids=str
)
def test_a_manifest_of_other_channels_is_refused(tmp_path: Path, channels: Sequence[tuple[str, str]]) -> None:
    with pytest.raises(VolumeError, match=r"the model wants FLAIR \(MR\), T1c \(MR\)"):
        find_studies([manifest_of(tmp_path, channels)], Wanted(planned(MODEL)), console=Silence())


def test_a_single_channel_may_have_another_name_but_no_other_modality(tmp_path: Path) -> None:
    manifest = manifest_of(tmp_path, [("T1", "MR")])
    assert len(find_studies([manifest], Wanted(planned([("MRI", "MR")])), console=Silence())) == 1
    with pytest.raises(VolumeError, match=r"channels are T1 \(MR\), the model wants CT \(CT\)"):
        find_studies([manifest], Wanted(planned([("CT", "CT")])), console=Silence())
