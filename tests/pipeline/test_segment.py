"""Files in, files out: what is found, what is set aside, what is kept, and how results are named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
from pydicom.uid import CTImageStorage, RTStructureSetStorage

from pipeline.cli_console import TerminalConsole
from pipeline.console import Silence
from pipeline.errors import DicomError, ManifestError, RunError, VolumeError
from pipeline.folder_lock import LOCK_NAME, held
from pipeline.manifest import Dataset, save_manifest
from pipeline.plan import ChannelPlan
from pipeline.predict import Model
from pipeline.segment import SegmentSettings, schema_for, segment_studies
from pipeline.sources import read_source
from pipeline.studies import Study, Wanted, find_studies
from transforms.placing_spec import Placing
from transforms.volume import read_label

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = SegmentSettings(formats=("nifti",), mirror=False, series=None, force=False)


class Listener(Silence):
    """Remembers its notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


def planned(count: int) -> list[ChannelPlan]:
    facts = {"modality": "MR", "normalisation": {"kind": "zscore"}, "lowest": 0.0, "highest": 1.0}
    return [ChannelPlan.model_validate({"name": f"T{n + 1}", **facts}) for n in range(count)]


def found(*inputs: Path, channels: int = 1, root: Path | None = None) -> dict[str, list[str]]:
    studies = find_studies(inputs, Wanted(planned(channels), root), console=Silence())
    return {study.name: [path.name for path in study.paths] for study in studies}


def segment(model: Model, inputs: Sequence[Path], out: Path, **settings: Any) -> tuple[list[str], dict[str, str]]:
    """Names of the files written, and of the studies set aside with the reason."""
    studies = find_studies(inputs, Wanted(model.plan.channels), console=Silence())
    chosen = replace(SETTINGS, **settings)
    written, failures = segment_studies(model, studies, out, settings=chosen, console=Silence())
    return [file.path.name for file in written], {failure.case_id: failure.reason for failure in failures}


def touch(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text("x")
    return folder


class TestFinding:
    def test_files_are_named_without_their_suffix(self, tmp_path: Path) -> None:
        folder = touch(tmp_path, "a.nii.gz", "b.nrrd", "c d.mha", "note.txt")
        assert found(folder / "a.nii.gz") == {"a": ["a.nii.gz"]}
        assert found(folder) == {"a": ["a.nii.gz"], "b": ["b.nrrd"], "c_d": ["c d.mha"]}

    def test_channel_numbers_bring_files_together(self, tmp_path: Path) -> None:
        folder = touch(tmp_path, "a_0000.nii.gz", "a_0001.nii.gz", "b_0001.nii.gz", "b_0000.nii.gz")
        assert found(folder, channels=2) == {
            "a": ["a_0000.nii.gz", "a_0001.nii.gz"],
            "b": ["b_0000.nii.gz", "b_0001.nii.gz"],
        }
        (folder / "b_0000.nii.gz").unlink()
        with pytest.raises(VolumeError, match=r"b has the channels \['0001'\], the model wants \['0000', '0001'\]"):
            found(folder, channels=2)

    def test_one_channel_may_be_numbered_or_not(self, tmp_path: Path) -> None:
        assert found(touch(tmp_path / "numbered", "a_0000.nii", "b_0000.nii")) == {
            "a": ["a_0000.nii"],
            "b": ["b_0000.nii"],
        }
        assert set(found(touch(tmp_path / "mixed", "a_0000.nii", "b.nii"))) == {"a_0000", "b"}

    def test_files_without_numbers_are_no_channels(self, tmp_path: Path) -> None:
        with pytest.raises(VolumeError, match=r"b.nii: expected a channel number at the end of the name"):
            found(touch(tmp_path, "a_0000.nii", "b.nii"), channels=2)
        with pytest.raises(VolumeError, match=r"one file, the model wants 2 channels; give the folder of NAME_0000"):
            found(tmp_path / "b.nii", channels=2)

    def test_a_dicom_folder_is_one_study_of_its_name(self, data_dir: Path) -> None:
        assert found(data_dir / "dicom_hippocrop") == {"dicom_hippocrop": ["dicom_hippocrop"]}

    def test_a_manifest_gives_its_cases(self, small_dataset: Dataset, tmp_path: Path) -> None:
        save_manifest(small_dataset, tmp_path / "cases.json")
        names = [case.case_id for case in small_dataset.manifest.cases]
        assert found(tmp_path / "cases.json") == {name: [f"{name}.nii.gz"] for name in names}
        with pytest.raises(ManifestError, match="give the right folder with --root"):
            found(tmp_path / "cases.json", root=tmp_path)

    def test_so_does_a_dataset_of_another_program(self, tmp_path: Path) -> None:
        touch(tmp_path / "imagesTr", "a.nii.gz")
        document = {
            "name": "msd",
            "modality": {"0": "MRI"},
            "labels": {"0": "background", "1": "a"},
            "training": [{"image": "./imagesTr/a.nii.gz", "label": "./labelsTr/a.nii.gz"}],
        }
        (tmp_path / "dataset.json").write_text(json.dumps(document))
        assert found(tmp_path) == {"a": ["a.nii.gz"]}

    def test_two_of_one_name_would_overwrite_each_other(self, tmp_path: Path) -> None:
        one, two = touch(tmp_path / "one", "a.nii"), touch(tmp_path / "two", "a.nrrd")
        with pytest.raises(VolumeError, match="two inputs would be named a in the output"):
            found(one, two)

    def test_nothing_there(self, tmp_path: Path) -> None:
        with pytest.raises(VolumeError, match="missing: no such file or folder"):
            found(tmp_path / "missing")
        (tmp_path / "empty").mkdir()
        with pytest.raises(VolumeError, match=r"empty: no file in this folder; expected a DICOM series or .nii.gz"):
            found(tmp_path / "empty")


class TestSegmenting:
    def test_results_are_named_after_their_input_and_lie_on_its_grid(
        self, model: Model, images: Path, tmp_path: Path
    ) -> None:
        out = tmp_path / "out"
        written, failures = segment(model, [images], out)
        assert (written, failures) == (["hippocampus_001.nii.gz", "hippocampus_015.nii.gz"], {})
        for path in images.iterdir():
            source = nib.load(path)  # type: ignore[attr-defined]
            result = nib.load(out / path.name)  # type: ignore[attr-defined]
            assert result.shape == source.shape
            assert np.allclose(result.affine, source.affine, atol=1e-4)
        assert [path.name for path in out.glob(".*")] == [LOCK_NAME]

    def test_turned_files_give_turned_results(self, model: Model, images: Path, tmp_path: Path) -> None:
        image = nib.load(images / "hippocampus_001.nii.gz")  # type: ignore[attr-defined]
        turned = tmp_path / "turned"
        turned.mkdir()
        for codes in ("RAS", "LPS", "IRA"):
            start = nib.orientations.io_orientation(image.affine)
            turn = nib.orientations.ornt_transform(start, nib.orientations.axcodes2ornt(codes))
            nib.save(image.as_reoriented(turn), turned / f"{codes}.nii.gz")  # type: ignore[attr-defined]
        segment(model, [turned], tmp_path / "out", mirror=True)
        canonical = [
            np.asarray(nib.as_closest_canonical(nib.load(tmp_path / "out" / f"{codes}.nii.gz")).dataobj)  # type: ignore[attr-defined]
            for codes in ("RAS", "LPS", "IRA")
        ]
        assert canonical[0].any()
        assert all(np.array_equal(other, canonical[0]) for other in canonical[1:])

    def test_a_long_study_is_told_of_window_by_window(
        self, model: Model, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
    ) -> None:
        """In a pipe, with every line due at once; a window that two bundles see is one."""
        monkeypatch.setattr("pipeline.cli_console.QUIET_S", -1.0)
        monkeypatch.setattr("pipeline.cli_console.LINE_EVERY_S", -1.0)
        twice = Model(model.bundles * 2)
        studies = find_studies([images / "hippocampus_001.nii.gz"], Wanted(model.plan.channels), console=Silence())
        segment_studies(twice, studies, tmp_path / "out", settings=SETTINGS, console=TerminalConsole())
        lines = capsys.readouterr().err.splitlines()
        count = len(lines) - 1
        name = "hippocampus_001"
        assert lines[:-1] == [f"segmenting: 0 of 1, {name}, window {n + 1} of {count}" for n in range(count)]
        assert lines[-1] == f"segmenting: 1 of 1, {name}"
        assert count > 0

    def test_one_bad_file_is_set_aside_and_named(self, model: Model, images: Path, tmp_path: Path) -> None:
        content = (images / "hippocampus_001.nii.gz").read_bytes()
        (images / "cut.nii.gz").write_bytes(content[:2000])
        (images / "text.nii.gz").write_text("hello")
        hu = nib.Nifti1Image(np.linspace(-1000, 1000, 1000, dtype=np.float32).reshape(10, 10, 10), np.eye(4))  # type: ignore[attr-defined]
        nib.save(hu, images / "hu.nii.gz")  # type: ignore[attr-defined]
        written, failures = segment(model, [images], tmp_path / "out")
        assert written == ["hippocampus_001.nii.gz", "hippocampus_015.nii.gz"]
        assert set(failures) == {"cut", "hu", "text"}
        assert "cut short" in failures["cut"]
        assert "look like a CT in HU" in failures["hu"]
        assert all("\n" not in reason for reason in failures.values())
        assert not list((tmp_path / "out").glob("*cut*"))

    def test_a_ct_series_is_refused_by_an_mr_model(self, model: Model, data_dir: Path, tmp_path: Path) -> None:
        folder = tmp_path / "ct"
        folder.mkdir()
        for path in sorted((data_dir / "dicom_hippocrop").glob("*.dcm")):
            dataset = pydicom.dcmread(path)
            dataset.Modality, dataset.SOPClassUID = "CT", CTImageStorage
            dataset.file_meta.MediaStorageSOPClassUID = CTImageStorage
            dataset.RescaleSlope, dataset.RescaleIntercept, dataset.RescaleType = 1, -1024, "HU"
            dataset.save_as(folder / path.name)
        _, failures = segment(model, [folder], tmp_path / "out")
        assert failures["ct"].startswith(f"{folder}: the input is CT, the model's channel T1 is MR")

    def test_a_dicom_series_is_segmented_and_exported(self, model: Model, data_dir: Path, tmp_path: Path) -> None:
        written, failures = segment(model, [data_dir / "dicom_hippocrop"], tmp_path / "out", formats=("seg", "nifti"))
        assert (written, failures) == (["dicom_hippocrop.seg.dcm", "dicom_hippocrop.nii.gz"], {})
        report = json.loads((tmp_path / "out" / "dicom_hippocrop.verification.json").read_text())
        assert [row["format"] for row in report["files"]] == ["seg", "nifti"]

    def test_what_was_mended_is_said(self, model: Model, data_dir: Path, tmp_path: Path) -> None:
        folder = tmp_path / "tagged"
        folder.mkdir()
        for file in (data_dir / "dicom_hippocrop").glob("*.dcm"):
            dataset = pydicom.dcmread(file)
            dataset.SpacingBetweenSlices = 4
            dataset.save_as(folder / file.name)
        listener = Listener()
        studies = find_studies([folder], Wanted(model.plan.channels), console=Silence())
        segment_studies(model, studies, tmp_path / "out", settings=SETTINGS, console=listener)
        assert listener.notes == ["tagged: slice-spacing-tag: SpacingBetweenSlices is 4, positions are 1 mm apart"]

    def test_a_folder_of_something_else_is_set_aside(self, model: Model, tmp_path: Path) -> None:
        _, failures = segment(model, [touch(tmp_path / "notes", "a.txt")], tmp_path / "out")
        assert failures["notes"].startswith(f"{tmp_path / 'notes'}: no DICOM image series")

    def test_two_at_work_in_one_folder_are_kept_apart(self, model: Model, images: Path, tmp_path: Path) -> None:
        with held(tmp_path / "out"), pytest.raises(RunError, match="another process is at work here; wait for its end"):
            segment(model, [images], tmp_path / "out")
        written, _ = segment(model, [images], tmp_path / "out")
        assert written

    def test_an_unknown_format_is_refused_before_any_work(self, model: Model, images: Path, tmp_path: Path) -> None:
        with pytest.raises(Exception, match=r"no export format 'nifty': did you mean 'nifti'\?"):
            segment(model, [images], tmp_path / "out", formats=("nifty",))
        assert not (tmp_path / "out").exists()


class TestEverySeries:
    """A tree as an archive gives it: two patients' series, and all sorts of files among them."""

    @pytest.fixture
    def tree(self, data_dir: Path, tmp_path: Path) -> Path:
        tree = tmp_path / "tree"
        for number, folder in enumerate(("Nightingale_Florence/MR", "Other^Patient/MR", "Other^Patient/CT")):
            (tree / folder).mkdir(parents=True)
            for path in sorted((data_dir / "dicom_hippocrop").glob("*.dcm")):
                dataset = pydicom.dcmread(path)
                # Each its own patient, study and instances.
                dataset.SeriesInstanceUID, dataset.StudyInstanceUID = f"1.2.{number + 1}", f"1.3.{number + 1}"
                dataset.PatientID, dataset.SeriesNumber = f"patient {number}", 7
                dataset.SOPInstanceUID = f"{dataset.SOPInstanceUID[:50]}.{number}"
                dataset.SeriesDescription = "T1 sag/3D"
                dataset.Modality = folder[-2:]
                dataset.save_as(tree / folder / path.name)
        (tree / "note.txt").write_text("hello")
        return tree

    def studies(self, tree: Path, listener: Listener, **wanted: Any) -> list[Study]:
        return find_studies([tree], Wanted(planned(1), series="all", **wanted), console=listener)

    def test_each_is_segmented_and_the_others_are_set_aside(self, model: Model, tree: Path, tmp_path: Path) -> None:
        (tree / "Other^Patient" / "MR" / "cut.dcm").write_bytes(
            sorted((tree / "Other^Patient" / "MR").glob("*.dcm"))[0].read_bytes()[:400]
        )
        listener = Listener()
        studies = self.studies(tree, listener)
        settings = replace(SETTINGS, formats=("seg", "nifti"), series="all")
        written, failures = segment_studies(model, studies, tmp_path / "out", settings=settings, console=listener)
        names = [study.name for study in studies]
        assert len(set(names)) == 3
        assert [name[:-8] for name in names] == ["tree_7_MR_T1_sag_3D_", "tree_7_MR_T1_sag_3D_", "tree_7_CT_T1_sag_3D_"]
        assert [file.path.name for file in written] == [f"{names[0]}.seg.dcm", f"{names[0]}.nii.gz"]
        damaged, ct = failures
        assert (damaged.case_id, ct.case_id) == (names[1], names[2])
        assert "not readable: damaged-file: cut.dcm names no series" in damaged.reason
        assert ct.reason.endswith(
            "the input is CT, the model's channel T1 is MR; choose a model that was trained on CT"
        )
        # Folders may be called after patients: not in a name of a result.
        assert not [
            path for path in (tmp_path / "out").rglob("*") if "Nightingale" in path.name or "Other" in path.name
        ]

    def test_names_stay_as_long_as_the_slices_do(self, tree: Path) -> None:
        first = [study.name for study in self.studies(tree, Listener())]
        moved = tree.rename(tree.parent / "moved").rename(tree)
        shutil.rmtree(moved / "Nightingale_Florence")
        assert [study.name for study in self.studies(tree, Listener())] == first[1:]
        sorted((tree / "Other^Patient" / "MR").glob("*.dcm"))[0].unlink()
        assert next(study.name for study in self.studies(tree, Listener())) not in first

    def test_what_is_no_image_is_passed_over(self, tree: Path) -> None:
        path = sorted((tree / "Other^Patient" / "CT").glob("*.dcm"))[0]
        dataset = pydicom.dcmread(path)
        dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = RTStructureSetStorage
        dataset.Modality, dataset.SeriesInstanceUID = "RTSTRUCT", "1.2.9"
        for keyword in ("PixelData", "Rows", "Columns"):
            delattr(dataset, keyword)
        dataset.save_as(tree / "plan.dcm")
        listener = Listener()
        assert len(self.studies(tree, listener)) == 3
        assert listener.notes == [f"{tree}: passed over 1 series without volumes (RTSTRUCT)"]
        shutil.rmtree(tree / "Other^Patient")
        shutil.rmtree(tree / "Nightingale_Florence")
        with pytest.raises(DicomError, match=r"no DICOM image series; found 1: RTSTRUCT .* give the images that these"):
            self.studies(tree, listener)
        (tree / "plan.dcm").unlink()
        with pytest.raises(DicomError, match="no DICOM image series; found no DICOM files"):
            self.studies(tree, listener)

    def test_headers_are_read_once(self, tree: Path, model: Model, tmp_path: Path) -> None:
        """Voxels are read by the index that found them, so files that come later change nothing."""
        shutil.rmtree(tree / "Other^Patient" / "CT")
        studies = self.studies(tree, Listener())
        (tree / "Nightingale_Florence" / "MR" / "cut.dcm").write_bytes(b"\0" * 128 + b"DICM" + b"x" * 40)
        settings = replace(SETTINGS, series="all")
        written, failures = segment_studies(model, studies, tmp_path / "out", settings=settings, console=Silence())
        assert (len(written), failures) == (2, [])

    def test_without_it_the_choice_is_the_users(self, model: Model, tree: Path, tmp_path: Path) -> None:
        _, failures = segment(model, [tree], tmp_path / "out")
        assert "3 image series of 3 patients, name one by number" in failures["tree"]
        assert failures["tree"].endswith("; or give --series all to segment each")
        assert "Nightingale" not in failures["tree"]

    def test_several_channels_cannot_be_told_apart(self, tree: Path) -> None:
        wanted = Wanted(planned(2), series="all")
        with pytest.raises(VolumeError, match=r"takes each series for a study, the model wants 2 channels in one"):
            find_studies([tree], wanted, console=Silence())

    def test_files_and_manifests_are_as_ever(self, model: Model, images: Path, tmp_path: Path) -> None:
        studies = find_studies([images], Wanted(planned(1), series="all"), console=Silence())
        assert [study.name for study in studies] == ["hippocampus_001", "hippocampus_015"]
        settings = replace(SETTINGS, series="all")
        written, _ = segment_studies(model, studies[:1], tmp_path / "out", settings=settings, console=Silence())
        assert len(written) == 1


class TestSources:
    def test_a_dicom_source_has_its_series(self, data_dir: Path) -> None:
        source = read_source(data_dir / "dicom_hippocrop", series=None)
        assert source.series is not None
        assert source.image.modality == "MR"
        with pytest.raises(DicomError):
            read_source(data_dir / "dicom_hippocrop", series="9.9.9")

    def test_a_schema_lies_beside_the_labels_or_is_given(
        self, model: Model, images: Path, tmp_path: Path, small_dataset: Dataset
    ) -> None:
        out = tmp_path / "out"
        segment(model, [images / "hippocampus_001.nii.gz"], out)
        labels = out / "hippocampus_001.nii.gz"
        assert schema_for(labels, None) == model.schema
        assert set(np.unique(read_label(labels).voxels)) <= {0, *model.schema.ids}
        save_manifest(small_dataset, tmp_path / "cases.json")
        assert schema_for(labels, tmp_path / "cases.json") == small_dataset.manifest.labels
        assert schema_for(images / "hippocampus_001.nii.gz", None) is None
        with pytest.raises(ManifestError):
            schema_for(labels, tmp_path / "missing.json")


def test_a_model_that_takes_axes_as_stored_tells_each_kind_once(model: Model, images: Path, tmp_path: Path) -> None:
    (bundle,) = model.bundles
    plan = bundle.plan.model_copy(update={"placing": Placing()})
    stored = replace(model, bundles=(replace(bundle, plan=plan),))
    for number in range(2):
        shutil.copy(images / "hippocampus_001.nii.gz", tmp_path / f"{number}.nii.gz")
    flipped = nib.load(images / "hippocampus_001.nii.gz")
    nib.save(flipped.slicer[::-1], tmp_path / "2.nii.gz")
    listener = Listener()
    studies = find_studies([tmp_path / f"{n}.nii.gz" for n in range(3)], Wanted(plan.channels), console=Silence())
    segment_studies(stored, studies, tmp_path / "out", settings=SETTINGS, console=listener)
    assert [note[: note.index(";")] for note in listener.notes] == ["0: axes are RAS", "2: axes are LAS"]
