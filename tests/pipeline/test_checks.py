"""The check of a dataset: bundled cases, sound and spoiled on purpose, one fault at a time and all at once."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
import pytest

from pipeline.checks import CaseFacts, CheckReport, Fault, check_dataset, voxel_sha256
from pipeline.manifest import Case, Dataset, load_dataset, parse_manifest

ROOT = Path(__file__).parents[2]
IDS = ("hippocampus_001", "hippocampus_015", "hippocampus_035", "hippocampus_041")
Change = Callable[[npt.NDArray[Any]], npt.NDArray[Any]]


class World:
    """A dataset below a temporary folder that starts as links to bundled cases."""

    def __init__(self, folder: Path, bundled: Path, cases: Sequence[str] = IDS, channels: int = 1) -> None:
        self.root = folder
        self.channels = [f"T{n}" for n in range(1, channels + 1)]
        self.cases = {case: case for case in cases}
        self.label_ids = {1: "Anterior", 2: "Posterior"}
        self.label_of = {case: f"label/{case}.nii.gz" for case in cases}
        for case in cases:
            for kind in (*self.channels, "label"):
                source = bundled / ("labels" if kind == "label" else "images") / f"{case}.nii.gz"
                self.path(kind, case).parent.mkdir(exist_ok=True)
                self.path(kind, case).symlink_to(source)

    def path(self, kind: str, case: str) -> Path:
        return self.root / kind / f"{case}.nii.gz"

    def change(self, kind: str, case: str, change: Change, affine: Change | None = None) -> None:
        """Replace a link by a changed copy."""
        path = self.path(kind, case)
        image = nib.load(path.resolve())  # type: ignore[attr-defined]
        voxels = change(np.asarray(image.dataobj))
        moved = image.affine if affine is None else affine(image.affine)
        path.unlink()
        nib.save(nib.Nifti1Image(voxels, moved), path)  # type: ignore[attr-defined]

    def dataset(self) -> Dataset:
        labels = [{"id": i, "name": n, "colour": [i, 0, 0]} for i, n in self.label_ids.items()]
        document = {
            "name": "world",
            "channels": [{"name": name, "modality": "MR"} for name in self.channels],
            "labels": {"labels": labels},
            "cases": [
                {
                    "case_id": case,
                    "patient_id": patient,
                    "images": {kind: f"{kind}/{case}.nii.gz" for kind in self.channels},
                    "label": self.label_of[case],
                }
                for case, patient in self.cases.items()
            ],
        }
        return Dataset(manifest=parse_manifest(document, source="world"), root=self.root)

    def faults(self) -> list[Fault]:
        return list(check_dataset(self.dataset()).faults)


@pytest.fixture
def world(tmp_path: Path, data_dir: Path) -> World:
    return World(tmp_path, data_dir / "hippocampus")


@pytest.fixture(scope="module")
def demo() -> CheckReport:
    return check_dataset(load_dataset(ROOT / "data_manifests/hippocampus_demo.json"))


def same(voxels: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return voxels


def with_value(value: float) -> Change:
    """The first voxel set."""

    def change(voxels: npt.NDArray[Any]) -> npt.NDArray[Any]:
        spoiled = voxels.astype(np.float32)
        spoiled[0, 0, 0] = value
        return spoiled

    return change


def kinds(faults: Sequence[Fault]) -> list[tuple[str, str | None]]:
    return [(fault.kind, fault.case_id) for fault in faults]


def test_the_bundled_cases_are_sound(demo: CheckReport) -> None:
    assert demo.faults == ()
    assert demo.ok
    assert (demo.dataset, demo.case_count, len(demo.facts)) == ("hippocampus_demo", 32, 32)


def test_facts_are_what_nibabel_sees(demo: CheckReport, data_dir: Path) -> None:
    for fact in demo.facts[::8]:
        image = nib.load(data_dir / f"hippocampus/images/{fact.case_id}.nii.gz")  # type: ignore[attr-defined]
        assert fact.image_sha256 == (voxel_sha256(np.asarray(image.dataobj)),)
        label = nib.load(data_dir / f"hippocampus/labels/{fact.case_id}.nii.gz")  # type: ignore[attr-defined]
        voxels, voxel_mm3 = np.asarray(label.dataobj), abs(np.linalg.det(label.affine[:3, :3]))
        assert fact.shape == voxels.shape
        assert fact.spacing_mm == pytest.approx(label.header.get_zooms())
        assert fact.label_volumes_mm3 == pytest.approx(
            {"Anterior": (voxels == 1).sum() * voxel_mm3, "Posterior": (voxels == 2).sum() * voxel_mm3}
        )


def test_workers_change_nothing(demo: CheckReport) -> None:
    assert check_dataset(load_dataset(ROOT / "data_manifests/hippocampus_demo.json"), workers=1) == demo


def test_the_report_is_json(demo: CheckReport) -> None:
    value = json.loads(json.dumps(demo.to_json()))
    assert value["ok"] is True
    assert tuple(CaseFacts.from_json(fact) for fact in value["facts"]) == demo.facts


def test_a_missing_file(world: World) -> None:
    world.path("T1", IDS[1]).unlink()
    (fault,) = world.faults()
    assert asdict(fault) == {
        "case_id": IDS[1],
        "file": f"T1/{IDS[1]}.nii.gz",
        "kind": "missing-file",
        "message": "no such file below the dataset's root",
        "severity": "error",
    }


@pytest.mark.parametrize("kind", ["T1", "label"])
def test_a_truncated_file(world: World, kind: str) -> None:
    path = world.path(kind, IDS[0])
    whole = path.read_bytes()
    path.unlink()
    path.write_bytes(whole[: len(whole) // 2])
    (fault,) = world.faults()
    assert (fault.kind, fault.case_id, fault.file) == ("unreadable", IDS[0], f"{kind}/{IDS[0]}.nii.gz")
    assert "\n" not in fault.message
    assert str(world.root) not in fault.message


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_infinity(world: World, value: float) -> None:
    world.change("T1", IDS[0], with_value(value))
    (fault,) = world.faults()
    assert (fault.kind, fault.case_id) == ("unreadable", IDS[0])
    assert "1 of" in fault.message
    assert "NaN or infinite" in fault.message


def test_a_label_with_fractions(world: World) -> None:
    world.change("label", IDS[0], with_value(0.5))
    (fault,) = world.faults()
    assert (fault.kind, fault.case_id) == ("unreadable", IDS[0])
    assert "0.5" in fault.message


def test_a_constant_image(world: World) -> None:
    world.change("T1", IDS[0], lambda voxels: np.full_like(voxels, 7))
    assert [(f.kind, f.message) for f in world.faults()] == [("constant", "every voxel has the value 7")]


def test_a_label_on_another_grid_shows_both(world: World) -> None:
    world.change("label", IDS[2], same, lambda affine: affine + np.diag([0, 0, 0.1, 0]))
    (fault,) = world.faults()
    assert (fault.kind, fault.case_id, fault.file) == ("label-grid", IDS[2], f"label/{IDS[2]}.nii.gz")
    assert "1x1x1 mm" in fault.message
    assert "1x1x1.1 mm" in fault.message


def test_a_label_of_another_shape_shows_both(world: World) -> None:
    world.change("label", IDS[2], lambda voxels: voxels[:-1])
    (fault,) = world.faults()
    assert fault.kind == "label-grid"
    i, j, k = nib.load(world.path("T1", IDS[2])).shape  # type: ignore[attr-defined]
    assert f"{i}x{j}x{k} voxels" in fault.message
    assert f"{i - 1}x{j}x{k} voxels" in fault.message


def test_channels_on_different_grids(tmp_path: Path, data_dir: Path) -> None:
    world = World(tmp_path, data_dir / "hippocampus", IDS[:2], channels=2)
    for case in IDS[:2]:
        world.change("T2", case, lambda voxels: voxels + 1)
    world.change("T2", IDS[1], same, lambda affine: affine @ np.diag([-1, 1, 1, 1]))
    (fault,) = world.faults()
    assert (fault.kind, fault.case_id, fault.file) == ("channel-grid", IDS[1], f"T2/{IDS[1]}.nii.gz")
    assert "channels 'T1' and 'T2' differ" in fault.message
    assert "RAS" in fault.message
    assert "LAS" in fault.message


def test_unknown_label_values(world: World) -> None:
    world.change("label", IDS[0], lambda voxels: np.where(voxels == 2, 7, voxels).astype(np.uint8))
    world.change("label", IDS[1], lambda voxels: np.where(voxels == 2, -3, voxels.astype(np.int16)))
    first, second = world.faults()
    assert (first.kind, first.case_id) == ("unknown-label", IDS[0])
    assert "values [7] in" in first.message
    assert "the schema knows 1 Anterior, 2 Posterior" in first.message
    assert "values [-3] in" in second.message


def test_an_empty_label(world: World) -> None:
    world.change("label", IDS[0], np.zeros_like)
    assert kinds(world.faults()) == [("empty-label", IDS[0])]


def test_a_label_that_never_occurs(world: World) -> None:
    world.label_ids[3] = "Middle"
    (fault,) = world.faults()
    assert (fault.kind, fault.case_id, fault.severity) == ("absent-label", None, "error")
    assert "label 3 'Middle' occurs in none of the 4 labels" in fault.message


def test_one_label_file_for_two_cases(world: World) -> None:
    world.label_of[IDS[1]] = world.label_of[IDS[0]]
    faults = [fault for fault in world.faults() if fault.kind == "shared-label"]
    assert [(f.case_id, f.message) for f in faults] == [(IDS[1], f"also the label of case {IDS[0]}")]


def test_the_same_voxels_under_two_patients(world: World) -> None:
    """Stored as another type and placed elsewhere in space, they are still the same."""
    shifted = nib.load(world.path("T1", IDS[0]))  # type: ignore[attr-defined]
    for kind, dtype in (("T1", np.float64), ("label", np.int32)):
        world.path(kind, IDS[3]).unlink()
        world.path(kind, IDS[3]).symlink_to(world.path(kind, IDS[0]).resolve())
        world.change(kind, IDS[3], lambda v, dtype=dtype: v.astype(dtype), lambda affine: affine + shifted.affine * 0.5)
    (fault,) = world.faults()
    assert (fault.kind, fault.case_id, fault.severity) == ("duplicate", IDS[3], "error")
    assert fault.message == f"the same voxels as T1/{IDS[0]}.nii.gz of case {IDS[0]}, another patient"


def test_the_same_voxels_twice_in_one_patient_are_a_note(world: World) -> None:
    world.path("T1", IDS[3]).unlink()
    world.path("T1", IDS[3]).symlink_to(world.path("T1", IDS[0]).resolve())
    world.path("label", IDS[3]).unlink()
    world.path("label", IDS[3]).symlink_to(world.path("label", IDS[0]).resolve())
    world.cases[IDS[3]] = world.cases[IDS[0]]
    report = check_dataset(world.dataset())
    assert [(f.kind, f.case_id, f.severity) for f in report.faults] == [("repeated", IDS[3], "note")]
    assert report.ok


def test_a_volume_far_from_the_others_is_a_note(tmp_path: Path, data_dir: Path) -> None:
    cases = sorted(p.name.removesuffix(".nii.gz") for p in (data_dir / "hippocampus/images").iterdir())[:12]
    world = World(tmp_path, data_dir / "hippocampus", cases)
    world.change("label", cases[4], lambda voxels: np.where(voxels == 0, 1, voxels).astype(np.uint8))
    report = check_dataset(world.dataset())
    (fault,) = report.faults
    assert (fault.kind, fault.case_id, fault.severity) == ("outlying-volume", cases[4], "note")
    assert "'Anterior' has" in fault.message
    assert report.ok


def test_all_faults_of_all_cases_at_once(world: World) -> None:
    world.path("T1", IDS[0]).unlink()
    world.change("label", IDS[0], np.zeros_like)
    world.path("label", IDS[1]).unlink()
    world.change("T1", IDS[1], np.ones_like)
    world.change("label", IDS[2], lambda voxels: (voxels * 4)[1:].astype(np.uint8))
    report = check_dataset(world.dataset())
    assert not report.ok
    assert kinds(report.faults) == [
        ("missing-file", IDS[0]),
        ("empty-label", IDS[0]),
        ("constant", IDS[1]),
        ("missing-file", IDS[1]),
        ("label-grid", IDS[2]),
        ("unknown-label", IDS[2]),
    ]
    assert [fact.case_id for fact in report.facts] == [IDS[3]]


def test_a_duplicate_shows_even_when_its_case_has_other_faults(world: World) -> None:
    world.path("T1", IDS[3]).unlink()
    world.path("T1", IDS[3]).symlink_to(world.path("T1", IDS[0]).resolve())
    world.path("label", IDS[3]).unlink()
    assert kinds(world.faults()) == [("missing-file", IDS[3]), ("duplicate", IDS[3])]


def test_a_case_without_label_has_facts(world: World) -> None:
    dataset = world.dataset()
    cases = tuple(c.model_copy(update={"label": None}) if c.case_id == IDS[0] else c for c in dataset.manifest.cases)
    manifest = dataset.manifest.model_copy(update={"cases": cases})
    report = check_dataset(dataset.model_copy(update={"manifest": manifest}))
    assert report.ok
    assert report.facts[0].label_volumes_mm3 is None
    assert report.facts[1].label_volumes_mm3 is not None


@pytest.mark.parametrize(
    ("modality", "found"), [("MR", []), ("CT", [("modality", "MR by its header, CT by the manifest")])]
)
def test_a_dicom_series_tells_its_modality(data_dir: Path, modality: str, found: list[tuple[str, str]]) -> None:
    document = {
        "name": "dicom",
        "channels": [{"name": "T1", "modality": modality}],
        "labels": {"labels": [{"id": 1, "name": "a", "colour": [1, 0, 0]}]},
        "cases": [{"case_id": "a", "patient_id": "a", "images": {"T1": "dicom_hippocrop"}}],
    }
    report = check_dataset(Dataset(manifest=parse_manifest(document, source="dicom"), root=data_dir))
    assert [(f.kind, f.message) for f in report.faults if f.severity == "error"] == found


def test_progress_and_visits(world: World) -> None:
    world.change("label", IDS[1], np.zeros_like)
    calls: list[tuple[int, int]] = []
    visited: list[tuple[str, int, bool]] = []
    lock = threading.Lock()

    def visit(case: Case, images: Sequence[Any], label: Any) -> None:
        with lock:
            visited.append((case.case_id, len(images), bool((label.voxels > 0).any())))

    check_dataset(world.dataset(), workers=3, on_progress=lambda d, t: calls.append((d, t)), visit=visit)
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert sorted(visited) == [(case, 1, True) for case in IDS if case != IDS[1]]


def test_an_interrupt_ends_the_check_at_once(world: World) -> None:
    started: list[str] = []

    def visit(case: Case, *_: Any) -> None:
        started.append(case.case_id)
        time.sleep(0.2)

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        check_dataset(world.dataset(), workers=1, on_progress=interrupt, visit=visit)
    assert len(started) < len(IDS)


def test_a_reader_that_breaks_does_not_hide_the_rest(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """No file is known that does this, which is why the reader is made to."""
    from transforms import volume

    whole = volume.read_volume

    def broken(path: Path) -> volume.Volume:
        if path.name.startswith(IDS[0]):
            raise RuntimeError("patient's name")
        return whole(path)

    monkeypatch.setattr(volume, "read_volume", broken)
    world.change("label", IDS[1], np.zeros_like)
    first, second = world.faults()
    assert (first.kind, first.message) == ("unreadable", "the reader failed with RuntimeError")
    assert (second.kind, second.case_id) == ("empty-label", IDS[1])


def test_the_digest_is_of_values_and_shape() -> None:
    voxels = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    assert voxel_sha256(voxels) == voxel_sha256(np.asfortranarray(voxels.astype(np.float64)))
    assert voxel_sha256(np.zeros(3)) == voxel_sha256(-np.zeros(3))
    others = [voxels.reshape(3, 2, 4), voxels[::-1], voxels + 1, voxels.transpose(2, 1, 0)]
    assert len({voxel_sha256(v) for v in [voxels, *others]}) == 5


def test_cases_without_any_label_are_noted(world: World) -> None:
    dataset = world.dataset()
    cases = tuple(case.model_copy(update={"label": None}) for case in dataset.manifest.cases)
    bare = dataset.model_copy(update={"manifest": dataset.manifest.model_copy(update={"cases": cases})})
    report = check_dataset(bare)
    assert [(f.kind, f.severity, f.message) for f in report.faults] == [
        ("nothing-labelled", "note", "no case has a label: nothing to train on")
    ]
    one = dataset.manifest.model_copy(update={"cases": (dataset.manifest.cases[0], *cases[1:])})
    assert check_dataset(dataset.model_copy(update={"manifest": one})).faults == ()
