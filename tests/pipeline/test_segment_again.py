"""What is made again, and what is kept: of the same content, by the same model, and never a user's own files."""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pydicom
import pytest
import SimpleITK as sitk

from pipeline.console import Silence
from pipeline.errors import RunError, VolumeError
from pipeline.export.confidentiality import Confidentiality
from pipeline.predict import Model
from pipeline.record import Record, origin_of
from pipeline.results import find_results
from pipeline.segment import segment_studies
from pipeline.studies import Study, Wanted, find_studies
from tests.pipeline.test_segment import SETTINGS, Listener, segment, touch
from transforms.labels import schema_from_names

pytestmark = pytest.mark.usefixtures("one_thread")


class TestAgain:
    @pytest.fixture
    def out(self, model: Model, images: Path, tmp_path: Path) -> Path:
        segment(model, [images], tmp_path / "out")
        return tmp_path / "out"

    def test_results_are_kept(self, model: Model, images: Path, out: Path) -> None:
        before = {p.name: p.stat().st_mtime_ns for p in out.glob("*.nii.gz")}
        listener = Listener()
        studies = find_studies([images], Wanted(model.plan.channels), console=Silence())
        assert segment_studies(model, studies, out, settings=SETTINGS, console=listener) == ([], [])
        assert {p.name: p.stat().st_mtime_ns for p in out.glob("*.nii.gz")} == before
        assert listener.notes[0] == (
            "hippocampus_001 was segmented by this model before, kept; give --force to do it again"
        )

    def test_force_does_them_again(self, model: Model, images: Path, out: Path) -> None:
        assert len(segment(model, [images], out, force=True)[0]) == 2

    def test_what_was_taken_away_is_done_again(self, model: Model, images: Path, out: Path) -> None:
        (out / "hippocampus_015.nii.gz").unlink()
        assert segment(model, [images], out)[0] == ["hippocampus_015.nii.gz"]

    def test_another_format_is_done_as_well(self, model: Model, images: Path, out: Path) -> None:
        one = images / "hippocampus_001.nii.gz"
        assert segment(model, [one], out, formats=("overlay",))[0] == ["hippocampus_001.png"]

    def test_another_input_of_the_same_name_is_no_result_of_this_one(
        self, model: Model, images: Path, out: Path, tmp_path: Path
    ) -> None:
        other = tmp_path / "elsewhere" / "hippocampus_001.nii.gz"
        other.parent.mkdir()
        shutil.copy(images / "hippocampus_015.nii.gz", other)
        before = (out / "hippocampus_001.nii.gz").read_bytes()
        for formats in (("nifti",), ("overlay",)):
            written, reasons = segment(model, [other], out, formats=formats)
            assert written == []
            assert (
                "holds the result of another input named hippocampus_001; choose another --out, or give --force"
                in (reasons["hippocampus_001"])
            )
        assert (out / "hippocampus_001.nii.gz").read_bytes() == before
        assert segment(model, [other], out, force=True)[0] == ["hippocampus_001.nii.gz"]
        assert (out / "hippocampus_001.nii.gz").read_bytes() != before

    def test_another_series_of_a_folder_is_another_input(self, model: Model, data_dir: Path, tmp_path: Path) -> None:
        folder = data_dir / "dicom_hippocrop"
        segment(model, [folder], tmp_path / "out")
        _, reasons = segment(model, [folder], tmp_path / "out", series="1")
        assert "another input named dicom_hippocrop" in reasons["dicom_hippocrop"]

    @pytest.mark.parametrize("change", [{"model": ["other"]}, {"mirror": True}])
    def test_results_of_another_model_or_setting_are_not_mixed_in(
        self, model: Model, images: Path, out: Path, change: dict[str, Any]
    ) -> None:
        record = json.loads((out / "predictions.json").read_text())
        (out / "predictions.json").write_text(json.dumps(record | change))
        with pytest.raises(RunError, match="holds results of another model or setting; choose another --out"):
            segment(model, [images], out)
        assert len(segment(model, [images], out, force=True)[0]) == 2

    @pytest.mark.parametrize("force", [False, True])
    def test_what_is_segmented_is_never_replaced(self, model: Model, images: Path, *, force: bool) -> None:
        """The results would go to the folder of the images, under their names."""
        before = {path.name: path.read_bytes() for path in images.iterdir()}
        written, reasons = segment(model, [images], images, force=force)
        assert written == []
        for name, reason in reasons.items():
            assert reason == (
                f"{images / name}.nii.gz is what is to be segmented, and its result would replace it; choose another "
                "--out"
            )
        assert {path.name: path.read_bytes() for path in images.glob("*.nii.gz")} == before

    def test_a_file_that_is_no_result_is_replaced_only_by_force(
        self, model: Model, images: Path, tmp_path: Path
    ) -> None:
        out, one = tmp_path / "drawn", images / "hippocampus_001.nii.gz"
        out.mkdir()
        (out / one.name).write_text("drawn by hand")
        written, reasons = segment(model, [images], out)
        assert written == ["hippocampus_015.nii.gz"]
        assert reasons["hippocampus_001"].endswith(
            "exists already and is no result of volseg; choose another --out, or give --force"
        )
        assert (out / one.name).read_text() == "drawn by hand"
        assert segment(model, [one], out, force=True)[0] == [one.name]

    def test_labels_of_other_results_are_not_replaced(self, model: Model, images: Path, tmp_path: Path) -> None:
        (tmp_path / "labels.json").write_text("of others")
        with pytest.raises(RunError, match=r"labels.json is of other label maps; choose another --out"):
            segment(model, [images], tmp_path)
        assert (tmp_path / "labels.json").read_text() == "of others"

    def test_what_a_kill_left_is_done_again(
        self, model: Model, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The file of a result is there, and the record was not written any more."""

        def killed(*_: object) -> None:
            raise KeyboardInterrupt

        one = images / "hippocampus_001.nii.gz"
        add = Record.add
        monkeypatch.setattr(Record, "add", killed)
        with pytest.raises(KeyboardInterrupt):
            segment(model, [one], tmp_path / "out")
        assert (tmp_path / "out" / one.name).exists()
        monkeypatch.setattr(Record, "add", add)
        assert segment(model, [one], tmp_path / "out")[0] == [one.name]

    @pytest.mark.parametrize("text", ["", "[]", "null", "\udcff"])
    def test_a_damaged_record_is_not_believed(self, model: Model, images: Path, out: Path, text: str) -> None:
        (out / "predictions.json").write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(RunError, match="holds results of another model"):
            segment(model, [images], out)


class TestContent:
    """What lies in a folder, or beside a header, is what is segmented, though its path stays the same."""

    @pytest.fixture
    def series(self, data_dir: Path, tmp_path: Path) -> Path:
        return Path(shutil.copytree(data_dir / "dicom_hippocrop", tmp_path / "series"))

    @pytest.mark.parametrize("change", ["other pixels", "a slice less", "a slice more"])
    def test_another_series_in_the_same_folder_is_another_input(
        self, model: Model, series: Path, tmp_path: Path, change: str
    ) -> None:
        slices, out = sorted(series.glob("*.dcm"), key=lambda path: int(path.stem)), tmp_path / "out"
        held_back = slices[-1].rename(tmp_path / "held_back") if change == "a slice more" else slices[-1]
        assert segment(model, [series], out) == (["series.nii.gz"], {})
        assert segment(model, [series], out) == ([], {})
        if change == "other pixels":
            for path in slices:
                dataset = pydicom.dcmread(path)
                dataset.PixelData, dataset.PatientID = dataset.pixel_array[::-1].tobytes(), "another"
                dataset.save_as(path)
        elif change == "a slice less":
            slices[-1].unlink()
        else:
            held_back.rename(slices[-1])
        written, reasons = segment(model, [series], out)
        assert written == []
        assert reasons == {
            "series": f"{series}: {out} holds the result of another input named series; choose another --out, or give "
            "--force"
        }
        assert segment(model, [series], out, force=True)[0] == ["series.nii.gz"]
        assert segment(model, [series], out) == ([], {})

    @pytest.mark.parametrize("suffix", [".mhd", ".nhdr"])
    def test_other_voxels_beside_the_same_header_are_another_input(
        self, model: Model, images: Path, tmp_path: Path, suffix: str
    ) -> None:
        header = tmp_path / f"case{suffix}"
        sitk.WriteImage(sitk.ReadImage(images / "hippocampus_001.nii.gz"), header)
        assert len(segment(model, [header], tmp_path / "out")[0]) == 1
        assert segment(model, [header], tmp_path / "out") == ([], {})
        voxels = tmp_path / "case.raw"
        voxels.write_bytes(voxels.read_bytes()[::-1])
        assert "another input named case" in segment(model, [header], tmp_path / "out")[1]["case"]

    def test_results_in_the_folder_of_the_images_are_none_of_them(self, model: Model, series: Path) -> None:
        for out in (series, series / "out"):
            wanted = {"formats": ("seg", "overlay"), "uncertainty": True}
            assert len(segment(model, [series], out, **wanted)[0]) == 3
            assert segment(model, [series], out, **wanted) == ([], {})
            shutil.rmtree(series / "out", ignore_errors=True)

    def test_a_record_that_does_not_tell_the_content_is_not_believed(
        self, model: Model, series: Path, images: Path, tmp_path: Path
    ) -> None:
        """Nor is it a reason to refuse what may well be the same; what tells as much as ever is kept."""
        out, record = tmp_path / "out", tmp_path / "out" / "predictions.json"
        inputs = [series, images / "hippocampus_001.nii.gz"]
        segment(model, inputs, out, formats=("nifti", "overlay"))
        value = json.loads(record.read_text())
        (study,) = find_studies([series], Wanted(model.plan.channels), console=Silence())
        value["origins"]["series"] = origin_of(study, out, series=None, resample_uneven=False).by_paths
        record.write_text(json.dumps(value))
        assert segment(model, inputs, out) == (["series.nii.gz"], {})
        assert not (out / "series.png").exists(), "it is of what lay in the folder then"
        assert (out / "hippocampus_001.png").exists()
        assert segment(model, inputs, out) == ([], {})

    def test_of_a_tree_each_series_is_its_own_slices(
        self, model: Model, series: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        other = series / "other"
        other.mkdir()
        for path in sorted(series.glob("*.dcm")):
            dataset = pydicom.dcmread(path)
            dataset.SeriesInstanceUID, dataset.SOPInstanceUID = "1.2.3", f"{dataset.SOPInstanceUID[:50]}.1"
            dataset.save_as(other / path.name)

        def again() -> tuple[int, list[str]]:
            studies = find_studies([series], Wanted(model.plan.channels, series="all"), console=Silence())
            monkeypatch.setattr("pipeline.record._files_below", None)  # the tree is walked by its index alone
            settings = replace(SETTINGS, series="all")
            written, failures = segment_studies(model, studies, tmp_path / "out", settings=settings, console=Silence())
            monkeypatch.undo()
            return len(written), [failure.reason for failure in failures]

        assert again() == (2, [])
        assert again() == (0, [])
        for path in other.iterdir():
            dataset = pydicom.dcmread(path)
            dataset.PixelData = dataset.pixel_array[::-1].tobytes()
            dataset.save_as(path)
        written, (reason,) = again()
        assert written == 0
        assert "holds the result of another input" in reason


class TestOurs:
    """What volseg made is replaced or goes; what it did not make stays."""

    def test_made_again_nothing_is_left_of_what_was(self, model: Model, images: Path, tmp_path: Path) -> None:
        one, name = images / "hippocampus_001.nii.gz", "hippocampus_001"
        segment(model, [images], tmp_path, formats=("nifti", "stl", "gltf"))
        (tmp_path / f"{name}.png").write_text("the user's own")
        assert segment(Model(model.bundles * 2), [one], tmp_path, formats=("nrrd",), force=True)[1] == {}
        assert {path.name for path in tmp_path.glob(f"{name}.*")} == {
            *(f"{name}.seg.nrrd", f"{name}.verification.json", f"{name}.png")
        }
        report = json.loads((tmp_path / f"{name}.verification.json").read_text())
        assert [row["format"] for row in report["files"]] == ["nrrd"]
        with pytest.raises(RunError, match="holds no NIfTI label map"):
            find_results(tmp_path)
        # The other study's files are the first model's, and go when its turn comes, which needs no force.
        written, failures = segment(Model(model.bundles * 2), [images], tmp_path, formats=("overlay",))
        assert (written, set(failures)) == (["hippocampus_015.png"], {name})
        assert [path.name for path in tmp_path.glob("hippocampus_015.*")] == ["hippocampus_015.png"]

    def test_so_it_is_with_copies_of_the_source(self, model: Model, data_dir: Path, tmp_path: Path) -> None:
        hidden = Confidentiality(bytes(range(32)), copies_source=True)
        study = Study("case", (data_dir / "dicom_hippocrop",))
        for confidentiality, ends in ((hidden, [".nii.gz", ".source"]), (None, [".nii.gz"])):
            settings = replace(SETTINGS, confidentiality=confidentiality, force=True)
            segment_studies(model, [study], tmp_path, settings=settings, console=Silence())
            found = {path.name for path in tmp_path.glob("case.*")}
            assert found == {"case.verification.json", *(f"case{end}" for end in ends)}

    def test_another_format_of_the_same_model_takes_nothing_away(
        self, model: Model, images: Path, tmp_path: Path
    ) -> None:
        one = images / "hippocampus_001.nii.gz"
        for form in ("nifti", "nrrd"):
            assert len(segment(model, [one], tmp_path, formats=(form,))[0]) == 1
        assert segment(model, [one], tmp_path, formats=("nifti", "nrrd")) == ([], {})
        report = json.loads((tmp_path / "hippocampus_001.verification.json").read_text())
        assert [row["format"] for row in report["files"]] == ["nifti", "nrrd"]

    def test_a_file_of_the_users_is_refused_in_a_folder_of_results_too(
        self, model: Model, images: Path, tmp_path: Path
    ) -> None:
        out, own = tmp_path / "out", tmp_path / "out" / "hippocampus_015.nii.gz"
        segment(model, [images / "hippocampus_001.nii.gz"], out)
        own.write_text("drawn by hand")
        map_of_another = out / "uncertainty" / "hippocampus_015_entropy.nii.gz"
        touch(map_of_another.parent, map_of_another.name)
        written, reasons = segment(model, [images], out)
        assert written == []
        assert reasons["hippocampus_015"].endswith(
            f"{own} exists already and is no result of volseg; choose another --out, or give --force"
        )
        assert own.read_text() == "drawn by hand"
        own.unlink()
        assert segment(model, [images], out)[0] == [own.name]
        assert map_of_another.read_text() == "x"

    def test_a_table_of_the_users_stays(self, model: Model, images: Path, tmp_path: Path) -> None:
        table = touch(tmp_path / "out", "quality.csv") / "quality.csv"
        assert len(segment(model, [images], table.parent)[0]) == 2
        assert table.read_text() == "x"
        written, reasons = segment(model, [images], table.parent, uncertainty=True)
        assert written == []
        assert {reason.partition(": ")[2] for reason in reasons.values()} == {
            f"{table} exists already and is no result of volseg; choose another --out, or give --force"
        }
        assert table.read_text() == "x"
        assert len(segment(model, [images], table.parent, uncertainty=True, force=True)[0]) == 2 * 2
        assert table.read_text().startswith("study,")
        # From now on it is volseg's, and goes with the last estimate.
        assert len(segment(model, [images], table.parent, force=True)[0]) == 2
        assert not table.exists()

    def test_what_a_kill_left_unfinished_goes(self, model: Model, images: Path, tmp_path: Path) -> None:
        touch(tmp_path, ".writing-abc-x.nii.gz")
        touch(tmp_path / "uncertainty", ".writing-abc-x_entropy.nii.gz")
        (tmp_path / ".writing-folder").mkdir()
        segment(model, [images / "hippocampus_001.nii.gz"], tmp_path)
        assert list(tmp_path.rglob(".writing-*")) == []

    def test_all_that_the_formats_mean_is_there_or_made(self, model: Model, data_dir: Path, tmp_path: Path) -> None:
        """A report refers to a segmentation, and copies of the source may be wanted later."""
        series, out = data_dir / "dicom_hippocrop", tmp_path / "out"
        assert len(segment(model, [series], out, formats=("sr",))[0]) == 2
        assert segment(model, [series], out, formats=("sr",)) == ([], {})
        (out / "dicom_hippocrop.seg.dcm").unlink()
        assert "dicom_hippocrop.seg.dcm" in segment(model, [series], out, formats=("sr",))[0]
        hidden = tmp_path / "hidden"
        for copies, count in ((False, 1), (True, 2), (True, 0)):
            how = Confidentiality(b"k" * 32, copies_source=copies)
            assert len(segment(model, [series], hidden, formats=("seg",), confidentiality=how)[0]) == count

    def test_the_same_files_as_other_channels_are_another_input(
        self, model: Model, images: Path, tmp_path: Path
    ) -> None:
        out = tmp_path / "out"
        segment(model, [images], out)
        record = json.loads((out / "predictions.json").read_text())
        record["missing"] = {"hippocampus_001": ["T2"]}
        (out / "predictions.json").write_text(json.dumps(record))
        assert list(segment(model, [images], out)[1]) == ["hippocampus_001"]


class TestNames:
    """Label maps are read by labels.json beside them, which has to be of the model that made them."""

    @pytest.fixture
    def other(self, model: Model) -> Model:
        schema = schema_from_names({label.id: f"other {label.id}" for label in model.schema.labels})
        return Model(tuple(replace(bundle, schema=schema) for bundle in model.bundles * 2))

    @pytest.fixture
    def out(self, model: Model, images: Path, tmp_path: Path) -> Path:
        segment(model, [images], tmp_path / "out")
        return tmp_path / "out"

    def test_nothing_made_nothing_renamed(
        self, other: Model, images: Path, out: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refused(*_: object, **__: object) -> None:
            raise VolumeError("nothing to see")

        before = {path.name: path.read_bytes() for path in out.glob("*.nii.gz")}
        names = (out / "labels.json").read_text()
        monkeypatch.setattr("pipeline.segment.predict", refused)
        assert len(segment(other, [images], out, force=True)[1]) == 2
        assert (out / "labels.json").read_text() == names
        assert {path.name: path.read_bytes() for path in out.glob("*.nii.gz")} == before
        monkeypatch.undo()
        assert len(segment(other, [images], out, force=True)[0]) == 2
        assert "other 1" in (out / "labels.json").read_text()

    def test_what_is_not_made_again_is_not_renamed(self, other: Model, images: Path, out: Path) -> None:
        with pytest.raises(RunError, match="holds results of hippocampus_015 with labels of other names, which are no"):
            segment(other, [images / "hippocampus_001.nii.gz"], out, force=True)
        (out / "hippocampus_015.nii.gz").unlink()
        assert len(segment(other, [images / "hippocampus_001.nii.gz"], out, force=True)[0]) == 1

    def test_what_cannot_be_made_again_goes(self, other: Model, images: Path, out: Path) -> None:
        (images / "hippocampus_015.nii.gz").write_text("damaged")
        written, failures = segment(other, [images], out, force=True)
        assert (written, list(failures)) == (["hippocampus_001.nii.gz"], ["hippocampus_015"])
        assert [path.name for path in out.glob("*.nii.gz")] == ["hippocampus_001.nii.gz"]


@pytest.mark.skipif(sys.platform == "darwin", reason="its file systems refuse such names")
def test_names_that_are_no_utf_8(model: Model, images: Path, data_dir: Path, tmp_path: Path) -> None:
    """As an old CD has them, of an image and beside slices."""
    series = Path(shutil.copytree(data_dir / "dicom_hippocrop", tmp_path / "series"))
    odd = os.fsdecode(b"bericht_\xfc")
    (series / f"{odd}.txt").write_text("x")
    (images / "hippocampus_001.nii.gz").rename(images / f"{odd}.nii.gz")
    out = tmp_path / "out"
    assert len(segment(model, [series, images], out)[0]) == 3
    assert segment(model, [series, images], out) == ([], {})
    assert len(find_results(out)) == 3
    (images / f"{odd}.nii.gz").write_text("damaged")
    assert list(segment(model, [images], out, force=True)[1]) == ["bericht__"]


def test_a_link_to_itself_is_that_study_s_fault_alone(
    model: Model, images: Path, data_dir: Path, tmp_path: Path
) -> None:
    series = Path(shutil.copytree(data_dir / "dicom_hippocrop", tmp_path / "series"))
    (series / "loop").symlink_to(series / "loop")
    written, failures = segment(model, [series, images], tmp_path / "out")
    assert len(written) == 2
    assert list(failures) == ["series"]
    assert f"{series / 'loop'}: " in failures["series"]
