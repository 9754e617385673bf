"""The loop through an archive: which series are meant, and which results may be sent."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.errors import ExportError, RunError, VolumeError
from pipeline.loop import check_sendable, choose_series, verified_results


def row(uid: str, modality: str = "CT") -> dict[str, str]:
    return {
        "SeriesInstanceUID": uid,
        "Modality": modality,
        "SeriesDescription": f"series {uid}",
        "NumberOfSeriesRelatedInstances": "3",
    }


STUDY = [row("1.2.10"), row("1.2.9", "SEG"), row("1.2.101", "MR"), row("1.3", "SR")]


class TestChoosing:
    def test_the_only_image_series(self) -> None:
        assert choose_series([STUDY[0], STUDY[1], STUDY[3]], None) == ([STUDY[0]], None)

    @pytest.mark.parametrize(
        ("wanted", "uid", "rest"),
        [("1", "1.2.10", None), ("2", "1.2.101", None), ("1.2.101", "1.2.101", None), ("1.2.10", "1.2.10", None),
         ("1.2.10#2", "1.2.10", "1.2.10#2")],
    )  # fmt: skip
    def test_by_number_or_identifier(self, wanted: str, uid: str, rest: str | None) -> None:
        (chosen,), left = choose_series(STUDY, wanted)
        assert (chosen["SeriesInstanceUID"], left) == (uid, rest)

    def test_all(self) -> None:
        assert choose_series(STUDY, "all") == ([STUDY[0], STUDY[2]], "all")

    @pytest.mark.parametrize("wanted", [None, "1.2", "3", "9.9", "1.2.9", "", "#1"])
    def test_otherwise_the_choices_are_listed(self, wanted: str | None) -> None:
        with pytest.raises(VolumeError, match=r"1: CT 'series 1\.2\.10', 3 instances, 1\.2\.10; 2: MR"):
            choose_series(STUDY, wanted)

    def test_no_images(self) -> None:
        with pytest.raises(VolumeError, match=r"no series of images \(CT, MR, PT\), only SEG, SR"):
            choose_series([STUDY[1], STUDY[3]], None)


class TestResults:
    def report(self, out: Path, name: str, *formats: str) -> None:
        rows = [{"format": form, "file": f"{name}.{form}.dcm", "verification": {}} for form in formats]
        (out / f"{name}.verification.json").write_text(json.dumps({"files": rows}))

    def test_only_what_was_verified_is_dicom_and_was_asked_for(self, tmp_path: Path) -> None:
        self.report(tmp_path, "series-a", "seg", "nifti")
        self.report(tmp_path, "series-b", "seg")
        (tmp_path / "series-c.seg.dcm").write_text("not verified")
        assert verified_results(tmp_path, ["series-a", "series-c"], ["seg"]) == [tmp_path / "series-a.seg.dcm"]

    def test_nothing_verified(self, tmp_path: Path) -> None:
        self.report(tmp_path, "series-a", "nifti")
        for studies in (["series-a"], []):
            with pytest.raises(RunError, match="nothing was sent, as this run has no verified DICOM result"):
                verified_results(tmp_path, studies, ["seg", "nifti"])

    def test_a_study_whose_name_only_begins_so_is_another(self, tmp_path: Path) -> None:
        for name in ("series-a", "series-a_CT_11", "series-a_CT_22"):
            self.report(tmp_path, name, "seg")
        for name in ("series-a", "series-a_CT_22"):
            assert verified_results(tmp_path, [name], ["seg"]) == [tmp_path / f"{name}.seg.dcm"]

    @pytest.mark.parametrize("text", ["", "[]", '{"files": [{}]}'])
    def test_a_damaged_report(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "series-a.verification.json").write_text(text)
        with pytest.raises(RunError, match="damaged"):
            verified_results(tmp_path, ["series-a"], ["seg"])

    def test_a_report_cannot_name_a_file_elsewhere(self, tmp_path: Path) -> None:
        rows = [{"format": "seg", "file": "../elsewhere.dcm"}]
        (tmp_path / "series-a.verification.json").write_text(json.dumps({"files": rows}))
        assert verified_results(tmp_path, ["series-a"], ["seg"]) == [tmp_path / "elsewhere.dcm"]

    def test_formats_without_dicom_are_refused(self) -> None:
        check_sendable(["nifti", "seg"])
        with pytest.raises(ExportError, match="--as names none; add one of seg"):
            check_sendable(["nifti"])
