"""BIDS folders as manifests: subjects are patients, sessions are cases, nothing is copied."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.errors import ManifestError
from pipeline.manifest import Channel, Dataset, load_dataset, save_manifest
from pipeline.manifest_bids import LabelRule, build_bids, image_kinds, is_bids, unlisted_subjects
from pipeline.manifest_build import PatientRule

IMAGE, LABEL = "images/hippocampus_001.nii.gz", "labels/hippocampus_001.nii.gz"
T1 = Channel(name="T1w", modality="MR")
FLAIR = Channel(name="FLAIR", modality="MR", optional=True)
SESSIONS = ("sub-01/ses-a", "sub-01/ses-b", "sub-02/ses-a")
TABLE = "index\tname\tcolor\n0\tbackground\t#000000\n1\tAnterior\t#ff0000\n2\tPosterior\t#00ff00\n"


@pytest.fixture
def bids(tmp_path: Path, data_dir: Path) -> Path:
    """Two subjects, one of them twice; labels of one pipeline; a FLAIR of one session."""
    for session in SESSIONS:
        stem = session.replace("/", "_")
        put(tmp_path / session / f"anat/{stem}_T1w.nii.gz", data_dir / "hippocampus" / IMAGE)
        put(tmp_path / f"derivatives/manual/{session}/anat/{stem}_dseg.nii.gz", data_dir / "hippocampus" / LABEL)
    put(tmp_path / "sub-01/ses-a/anat/sub-01_ses-a_FLAIR.nii.gz", data_dir / "hippocampus" / IMAGE)
    put(tmp_path / "sub-01/ses-a/func/sub-01_ses-a_task-rest_bold.nii.gz", data_dir / "hippocampus" / IMAGE)
    (tmp_path / "derivatives/manual/dseg.tsv").write_text(TABLE)
    description = {"Name": "Two", "License": "CC0", "BIDSVersion": "1.10.0", "DatasetDOI": "doi:10.1/2"}
    (tmp_path / "dataset_description.json").write_text(json.dumps(description))
    (tmp_path / "participants.tsv").write_text("participant_id\tage\nsub-01\t40\nsub-02\t50\n")
    return tmp_path


def put(path: Path, target: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


def refusal(folder: Path, *channels: Channel, labels: LabelRule | None = None) -> str:
    with pytest.raises(ManifestError) as caught:
        build_bids(folder, channels=channels or (T1,), labels=labels)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_subject_is_a_patient_and_a_session_a_case(bids: Path) -> None:
    manifest = build_bids(bids, channels=[T1, FLAIR]).manifest
    assert (manifest.name, manifest.licence, manifest.source) == ("Two", "CC0", "doi:10.1/2")
    assert [(c.case_id, c.patient_id) for c in manifest.cases] == [
        ("sub-01_ses-a", "sub-01"),
        ("sub-01_ses-b", "sub-01"),
        ("sub-02_ses-a", "sub-02"),
    ]
    assert manifest.cases[0].images == {
        "T1w": "sub-01/ses-a/anat/sub-01_ses-a_T1w.nii.gz",
        "FLAIR": "sub-01/ses-a/anat/sub-01_ses-a_FLAIR.nii.gz",
    }
    assert list(manifest.cases[1].images) == ["T1w"]
    assert manifest.cases[2].label == "derivatives/manual/sub-02/ses-a/anat/sub-02_ses-a_dseg.nii.gz"
    assert [(x.id, x.name) for x in manifest.labels.labels] == [(1, "Anterior"), (2, "Posterior")]


def test_what_is_built_is_read_back(bids: Path, tmp_path: Path) -> None:
    dataset = build_bids(bids, channels=[T1])
    save_manifest(dataset, tmp_path / "manifests/two.json")
    again = load_dataset(tmp_path / "manifests/two.json")
    assert (again.root, again.manifest.cases) == (dataset.root, dataset.manifest.cases)
    assert all(path.is_file() for case in again.manifest.cases for path in again.image_paths(case))


def test_without_sessions(tmp_path: Path, data_dir: Path) -> None:
    put(tmp_path / "sub-7/anat/sub-7_T1w.nii.gz", data_dir / "hippocampus" / IMAGE)
    assert is_bids(tmp_path)
    put(tmp_path / "derivatives/sub-7/anat/sub-7_dseg.nii.gz", data_dir / "hippocampus" / LABEL)
    case = build_bids(tmp_path, channels=[T1]).manifest.cases[0]
    assert (case.case_id, case.patient_id) == ("sub-7", "sub-7")
    assert case.label == "derivatives/sub-7/anat/sub-7_dseg.nii.gz"


def test_without_a_table_the_values_are_read(bids: Path) -> None:
    (bids / "derivatives/manual/dseg.tsv").unlink()
    labels = build_bids(bids, channels=[T1]).manifest.labels.labels
    assert [(x.id, x.name) for x in labels] == [(1, "label_1"), (2, "label_2")]


def test_a_table_of_other_label_maps_does_not_count(bids: Path) -> None:
    (bids / "derivatives/manual/desc-aseg_dseg.tsv").write_text("index\tname\n1\tThalamus\n")
    assert build_bids(bids, channels=[T1]).manifest.labels.names == ("Anterior", "Posterior")


def test_a_session_without_a_label_map_is_a_case_without_one(bids: Path) -> None:
    (bids / "derivatives/manual/sub-01/ses-b/anat/sub-01_ses-b_dseg.nii.gz").unlink()
    assert [case.label is None for case in build_bids(bids, channels=[T1]).manifest.cases] == [False, True, False]


def test_entities_tell_files_apart(bids: Path, data_dir: Path) -> None:
    for session in SESSIONS:
        stem = session.replace("/", "_")
        put(bids / session / f"anat/{stem}_ce-gd_T1w.nii.gz", data_dir / "hippocampus" / IMAGE)
    told = refusal(bids)
    assert "T1w stands for 2 files of one session" in told
    assert "--channel ce-gd_T1w" in told
    contrast = Channel(name="ce-gd_T1w", modality="MR")
    images = build_bids(bids, channels=[T1, contrast]).manifest.cases[2].images
    assert images == {
        "T1w": "sub-02/ses-a/anat/sub-02_ses-a_T1w.nii.gz",
        "ce-gd_T1w": "sub-02/ses-a/anat/sub-02_ses-a_ce-gd_T1w.nii.gz",
    }


@pytest.fixture
def world(tmp_path: Path, data_dir: Path) -> Callable[..., Path]:
    """A dataset of the named images and, in one pipeline, label maps (dseg and mask); the folders follow the names."""

    def made(*names: str) -> Path:
        for name in names:
            is_label = name.endswith(("dseg", "mask"))
            folder = tmp_path / ("derivatives/manual" if is_label else "") / name.split("_")[0] / "anat"
            put(folder / f"{name}.nii.gz", data_dir / "hippocampus" / (LABEL if is_label else IMAGE))
        return tmp_path

    return made


class TestKindsAcrossSessions:
    """One channel or label is one kind of file in every session, or the user is asked which."""

    def test_images_of_different_kinds(self, world: Callable[..., Path]) -> None:
        folder = world(
            "sub-01_T1w", "sub-02_ce-gad_T1w", "sub-03_part-phase_T1w", "sub-04_T1w", "sub-01_dseg", "sub-02_dseg"
        )
        assert refusal(folder) == (
            f"{folder}: T1w stands for files of different kinds in different sessions, T1w in 2 (such as "
            "sub-01_T1w.nii.gz), ce-gad_T1w in 1 (such as sub-02_ce-gad_T1w.nii.gz), part-phase_T1w in 1 (such as "
            "sub-03_part-phase_T1w.nii.gz); choose one, such as --channel ce-gad_T1w, or leave the files of the "
            "others out of the folder"
        )

    def test_one_of_them_is_chosen_as_told(self, world: Callable[..., Path]) -> None:
        folder = world("sub-01_T1w", "sub-02_part-mag_ce-gad_T1w", "sub-02_dseg")
        assert "--channel ce-gad_part-mag_T1w, or" in refusal(folder)
        chosen = Channel(name="ce-gad_part-mag_T1w", modality="MR")
        assert [case.case_id for case in build_bids(folder, channels=[chosen]).manifest.cases] == ["sub-02"]

    def test_the_advice_keeps_the_run_that_was_asked_for(self, world: Callable[..., Path]) -> None:
        folder = world("sub-01_ce-a_run-1_T1w", "sub-02_ce-b_run-1_T1w", "sub-02_ce-b_run-2_T1w")
        assert "--channel ce-a_run-1_T1w, or" in refusal(folder, Channel(name="run-1_T1w", modality="MR"))

    def test_a_channel_of_its_own_parts_them(self, world: Callable[..., Path]) -> None:
        folder = world("sub-01_T1w", "sub-02_ce-gad_T1w", "sub-02_T1w", "sub-01_dseg")
        gad = Channel(name="ce-gad_T1w", modality="MR", optional=True)
        images = [list(case.images) for case in build_bids(folder, channels=[T1, gad]).manifest.cases]
        assert images == [["T1w"], ["T1w", "ce-gad_T1w"]]

    def test_masks_of_different_things(self, world: Callable[..., Path]) -> None:
        folder = world("sub-01_T1w", "sub-02_T1w", "sub-01_desc-brain_mask", "sub-02_label-lesion_mask")
        told = refusal(folder, labels=LabelRule(None, "mask", {1: "lesion"}))
        assert told.startswith(f"{folder / 'derivatives/manual'}: mask stands for files of different kinds")
        assert "desc-brain_mask in 1 (such as sub-01_desc-brain_mask.nii.gz), label-lesion_mask in 1" in told
        assert "--label-file desc-brain_mask, or leave" in told
        chosen = build_bids(folder, channels=[T1], labels=LabelRule(None, "label-lesion_mask", {1: "lesion"}))
        assert [case.label is None for case in chosen.manifest.cases] == [True, False]

    def test_one_kind_that_the_options_do_not_spell_out(self, world: Callable[..., Path]) -> None:
        folder = world(*(f"sub-0{n}_{end}" for n in (1, 2) for end in ("acq-iso_T1w", "acq-iso_desc-all_dseg")))
        assert all(case.label for case in build_bids(folder, channels=[T1]).manifest.cases)

    def test_sites_name_their_acquisitions(self, world: Callable[..., Path]) -> None:
        folder = world("sub-01_acq-iso_T1w", "sub-02_acq-mprage_T1w", "sub-01_acq-iso_dseg", "sub-02_dseg")
        assert all(case.label for case in build_bids(folder, channels=[T1]).manifest.cases)

    def test_runs_are_repetitions_of_one_kind(self, world: Callable[..., Path]) -> None:
        folder = world("sub-01_run-1_T1w", "sub-02_run-02_T1w", "sub-03_T1w", "sub-01_run-01_dseg", "sub-02_run-2_dseg")
        assert [case.label is None for case in build_bids(folder, channels=[T1]).manifest.cases] == [False, False, True]


class TestLabelsOfTheirImages:
    """A label map whose name says another run, acquisition or space than the image's is not its reference."""

    @pytest.mark.parametrize(
        ("image", "label", "key"),
        [
            ("run-1_T1w", "run-2_dseg", "run"),
            ("acq-iso_T1w", "acq-thick_dseg", "acq"),
            ("ce-gad_T1w", "ce-none_dseg", "ce"),
            ("part-mag_T1w", "part-phase_dseg", "part"),
            ("echo-1_T1w", "echo-2_dseg", "echo"),
            ("T1w", "space-MNI_dseg", "space"),
            ("space-MNI_T1w", "dseg", "space"),
            ("space-MNI_T1w", "space-orig_dseg", "space"),
            ("space-MNI_T1w", "space-T1w_dseg", "space"),
        ],
    )
    def test_contradictions(self, world: Callable[..., Path], image: str, label: str, key: str) -> None:
        folder = world(f"sub-01_{image}", f"sub-01_{label}")
        assert refusal(folder) == (
            f"{folder / 'derivatives/manual'}: 1 label maps of another {key} than their image (choose both of one, by "
            f"--channel and --label-file): sub-01_{label}.nii.gz with sub-01_{image}.nii.gz"
        )

    def test_the_run_that_is_chosen_has_the_label_of_another(self, world: Callable[..., Path]) -> None:
        folder = world("sub-01_run-1_T1w", "sub-01_run-2_T1w", "sub-01_run-2_dseg")
        one, two = (Channel(name=f"run-{n}_T1w", modality="MR") for n in (1, 2))
        assert "1 label maps of another run than their image" in refusal(folder, one)
        (case,) = build_bids(folder, channels=[two]).manifest.cases
        assert case.label == "derivatives/manual/sub-01/anat/sub-01_run-2_dseg.nii.gz"

    @pytest.mark.parametrize(
        ("image", "label"),
        [
            ("run-1_T1w", "dseg"),
            ("T1w", "acq-iso_dseg"),
            ("run-1_T1w", "run-01_dseg"),
            ("desc-preproc_T1w", "desc-aseg_dseg"),
            ("space-MNI_T1w", "space-MNI_dseg"),
            ("T1w", "space-orig_dseg"),
        ],
    )
    def test_no_contradiction(self, world: Callable[..., Path], image: str, label: str) -> None:
        (case,) = build_bids(world(f"sub-01_{image}", f"sub-01_{label}"), channels=[T1]).manifest.cases
        assert case.label == f"derivatives/manual/sub-01/anat/sub-01_{label}.nii.gz"

    def test_it_need_agree_with_one_of_several_channels(self, world: Callable[..., Path]) -> None:
        folder = world("sub-01_acq-iso_T1w", "sub-01_acq-tse_FLAIR", "sub-01_acq-tse_dseg")
        assert build_bids(folder, channels=[T1, FLAIR]).manifest.cases[0].label is not None
        assert "another acq than their image" in refusal(folder, T1)

    def test_every_channel_is_in_its_space(self, world: Callable[..., Path]) -> None:
        folder = world("sub-01_T1w", "sub-01_space-MNI_FLAIR", "sub-01_dseg")
        told = refusal(folder, T1, FLAIR)
        assert told.endswith("sub-01_dseg.nii.gz with sub-01_T1w.nii.gz and sub-01_space-MNI_FLAIR.nii.gz")


def test_label_maps_by_another_ending_and_given_names(bids: Path, data_dir: Path) -> None:
    put(
        bids / "derivatives/lesions/sub-02/ses-a/anat/sub-02_ses-a_desc-lesion_mask.nii.gz",
        data_dir / "hippocampus" / LABEL,
    )
    manifest = build_bids(bids, channels=[T1], labels=LabelRule(None, "desc-lesion_mask", {1: "lesion"})).manifest
    assert [case.label is None for case in manifest.cases] == [True, True, False]
    assert manifest.labels.names == ("lesion",)


def test_labels_of_two_pipelines_are_a_choice(bids: Path, data_dir: Path) -> None:
    other = bids / "derivatives/auto/sub-02/ses-a/anat/sub-02_ses-a_dseg.nii.gz"
    put(other, data_dir / "hippocampus" / LABEL)
    assert "label maps lie in auto, manual; choose one with --labels" in refusal(bids)
    dataset = build_bids(bids, channels=[T1], labels=LabelRule(bids / "derivatives/auto", names={1: "x"}))
    assert [case.label for case in dataset.manifest.cases] == [None, None, other.relative_to(bids).as_posix()]


def test_a_rule_for_patients_wins(bids: Path) -> None:
    dataset: Dataset = build_bids(bids, channels=[T1], patients=PatientRule(pattern=r"^sub-(\d)"))
    assert {case.patient_id for case in dataset.manifest.cases} == {"0"}


def test_participants(bids: Path) -> None:
    assert unlisted_subjects(bids) == ([], [])
    (bids / "participants.tsv").write_text("participant_id\nsub-01\nsub-03\n")
    assert unlisted_subjects(bids) == (["sub-03"], ["sub-02"])


def test_kinds(bids: Path) -> None:
    assert image_kinds(bids) == {"T1w": 3, "FLAIR": 1, "bold": 1}
    assert not is_bids(bids / "derivatives")


def test_what_cannot_be_used_is_refused(bids: Path) -> None:
    assert "no file of PDw in sub-*/; found T1w (3)" in refusal(bids, Channel(name="PDw", modality="MR"))
    needed = Channel(name="FLAIR", modality="MR")
    assert "2 sessions without FLAIR (leave them out of the folder, or give --optional FLAIR)" in refusal(
        bids, T1, needed
    )
    assert "--channel T1-w: a BIDS file is named" in refusal(bids, Channel(name="T1-w", modality="MR"))
    assert "no label map *_mask below derivatives" in refusal(bids, labels=LabelRule(ending="mask"))
    manual = bids / "derivatives/manual"
    assert "no label map *_mask in sub-*/; found dseg (3)" in refusal(bids, labels=LabelRule(manual, "mask"))


def test_labels_without_an_image_are_refused(bids: Path) -> None:
    (bids / "sub-02/ses-a/anat/sub-02_ses-a_T1w.nii.gz").unlink()
    assert "1 label maps without an image: sub-02_ses-a" in refusal(bids)


@pytest.mark.parametrize(
    ("table", "told"),
    [
        ("index name\n1 Anterior\n", "line 2 has no index; the columns are separated by tabs"),
        ("index\tname\n1.0\tAnterior\n", "the index '1.0' of 'Anterior' is no whole number"),
        ("index\tname\n1\tAnterior\n1\tPosterior\n", "1 is 'Posterior' here and 'Anterior'"),
        ("index\tname\n1\tAnterior\n2\tAnterior\n", "label name Anterior stands more than once"),
    ],
)
def test_bad_tables(bids: Path, table: str, told: str) -> None:
    (bids / "derivatives/manual/dseg.tsv").write_text(table)
    assert told in refusal(bids)


def test_a_description_that_is_nested_too_deeply(bids: Path) -> None:
    (bids / "dataset_description.json").write_text("[" * 100_000)
    assert "dataset_description.json: cannot be read as JSON (RecursionError)" in refusal(bids)


def test_links_without_their_content(bids: Path) -> None:
    (bids / "derivatives/manual/dseg.tsv").unlink()
    label = bids / "derivatives/manual/sub-02/ses-a/anat/sub-02_ses-a_dseg.nii.gz"
    label.unlink()
    label.symlink_to(".git/annex/objects/gone")
    assert "links to content that is not here (datalad get): sub-02_ses-a_dseg.nii.gz" in refusal(bids)
