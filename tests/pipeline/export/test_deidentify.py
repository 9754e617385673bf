"""De-identified exports: a phantom full of identities, the validator, other keys, and tampering."""

from __future__ import annotations

import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pydicom
import pytest
import torch
from pydicom import Dataset
from pydicom.dataelem import DataElement
from pydicom.uid import ExplicitVRLittleEndian

from pipeline.bundle import load_bundle
from pipeline.cli_stages import Removal, export_labels
from pipeline.console import Silence
from pipeline.errors import ExportError, RunError
from pipeline.export import Options, Source, export
from pipeline.export.confidentiality import Confidentiality, Identity, identity_of, load_key, new_key, profile
from pipeline.export.deidentify import deidentify_file
from pipeline.export.verify_deidentified import verify_deidentified, verify_plain
from pipeline.predict import Model
from pipeline.segment import SegmentSettings, segment_studies
from pipeline.segmentation import Segmentation
from pipeline.studies import Study
from transforms.labels import Label, LabelSchema

BIN = Path(sys.executable).parent
KEY = bytes(range(32))
HOW = Confidentiality(KEY)
ALL_FORMATS = ("seg", "sr", "capture", "nifti")
SECRETS = (
    *("muster", "erika", "id-4711", "19600102", "1960-01-02", "acc-99"),
    *("arzt", "anton", "klinikum", "waldweg", "sn20931"),
)

# What the text representations are filled with, one element each; the last two are in no table of the profile.
TEXTS = {
    "StationName": "MUSTERSTATION",  # SH, profile
    "InstitutionName": "Klinikum Nord",
    "DeviceSerialNumber": "SN20931",
    "InstitutionAddress": "Waldweg 3",
    "AdditionalPatientHistory": "Frau Muster, Erika",
    "PatientAge": "060Y",
    "OperatorsName": ["Arzt^Anton", "Muster^Erika"],
    "PerformedProcedureStepDescription": "Kopf von ID-4711",
    "IssuerOfPatientID": "Klinikum Nord",
    "RetrieveURL": "http://klinikum.example/ID-4711",
    "ScheduledStationAETitle": "KLINIKUM",
    "SequenceName": "muster_3d",
    "PatientSpeciesDescription": "Erika Muster",
}


def with_identities(folder: Path) -> None:
    """Fill every file with identity: all kinds of text, nested sequences, private elements, bytes, the header."""
    for path in folder.iterdir():
        dataset = pydicom.dcmread(path)
        for keyword, value in TEXTS.items():
            setattr(dataset, keyword, value)
        nested, inner = Dataset(), Dataset()
        inner.PatientName, inner.PatientID = "Muster^Erika", "ID-4711"
        inner.ReferencedSOPClassUID, inner.ReferencedSOPInstanceUID = "1.2.840.10008.5.1.4.1.1.4", "1.2.826.0.1.77"
        inner.CodeMeaning = "of Muster"
        nested.ReferencedImageSequence = [inner]
        nested.RequestingPhysician = "Arzt^Anton"
        dataset.DerivationCodeSequence = [nested]
        dataset.OtherPatientIDsSequence = [inner]
        dataset.ReferencedImageSequence = [inner]
        dataset.EncryptedAttributesSequence = [inner]
        block = dataset.private_block(0x0011, "MUSTER 1.0", create=True)
        block.add_new(0x01, "LO", "Muster^Erika")
        block.add_new(0x02, "UN", b"Erika Muster ")
        dataset.add(DataElement(0x60004000, "LT", "Erika"))
        dataset.add(DataElement(0x0028FF00, "UN", b"Muster "))
        dataset.file_meta.SourceApplicationEntityTitle = "KLINIKUM"
        dataset.file_meta.PrivateInformationCreatorUID = "1.2.3.4"
        dataset.file_meta.PrivateInformation = b"Muster"
        dataset.preamble = b"Erika Muster".ljust(128, b"\0")
        dataset.save_as(path)


@pytest.fixture(scope="module")
def known(phantoms: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Source:
    """A series in which everything tells who the patient is."""
    folder = phantoms.write_series(tmp_path_factory.mktemp("known") / "in", "oblique")
    with_identities(folder)
    return phantoms.source_of(folder)


@pytest.fixture(scope="module")
def results(phantoms: SimpleNamespace, known: Source, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Everything that is made of it, copies of it included, by format."""
    out = tmp_path_factory.mktemp("results")
    how = replace(HOW, copies_source=True)
    return exported(phantoms.segmentation_of(known), known, out, how, ALL_FORMATS)


def exported(
    segmentation: Segmentation,
    source: Source,
    out: Path,
    how: Confidentiality = HOW,
    formats: tuple[str, ...] = ("seg",),
) -> dict[str, Path]:
    options = Options(confidentiality=how)
    files = export(segmentation, formats=formats, out=out, name="case", source=source, options=options)
    return {file.format: file.path for file in files}


def dicom_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.dcm"))


def test_no_file_holds_a_trace(known: Source, results: dict[str, Path]) -> None:
    out = results["seg"].parent
    assert len(dicom_files(out)) == 1 + 1 + 6 + 6
    originals = identity_of(pydicom.dcmread(known.series.paths[0])).uids
    for path in (x for x in out.rglob("*") if x.is_file() and x.suffix != ".png"):
        content = path.read_bytes().lower()
        for secret in SECRETS:
            assert secret.encode() not in content, (path.name, secret)
            assert secret.encode("utf-16-le") not in content
        assert not [uid for uid in originals if uid.encode() in content]


def test_the_validator_finds_no_error(results: dict[str, Path]) -> None:
    for path in (results["seg"], results["sr"], results["capture"] / "00003.dcm"):
        run = subprocess.run([BIN / "dciodvfy", path], capture_output=True, text=True, check=False)
        assert [x for x in (run.stdout + run.stderr).splitlines() if x.startswith("Error")] == [], path.name


def test_identifiers_fit_together(results: dict[str, Path]) -> None:
    slices = [pydicom.dcmread(path) for path in dicom_files(results["source"])]
    seg, report = pydicom.dcmread(results["seg"]), pydicom.dcmread(results["sr"])
    captures = [pydicom.dcmread(path) for path in dicom_files(results["capture"])]
    everything = [*slices, seg, report, *captures]
    assert len({x.StudyInstanceUID for x in everything}) == len({x.PatientID for x in everything}) == 1
    assert seg.FrameOfReferenceUID == slices[0].FrameOfReferenceUID == captures[0].FrameOfReferenceUID
    uids = [x.SOPInstanceUID for x in slices]
    [series] = seg.ReferencedSeriesSequence
    assert series.SeriesInstanceUID == slices[0].SeriesInstanceUID
    assert [x.ReferencedSOPInstanceUID for x in series.ReferencedInstanceSequence] == uids
    assert [x.SourceImageSequence[0].ReferencedSOPInstanceUID for x in captures] == uids
    for frame in seg.PerFrameFunctionalGroupsSequence:
        [image] = frame.DerivationImageSequence[0].SourceImageSequence
        assert image.ReferencedSOPInstanceUID in uids
    evidence = report.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence
    assert evidence[1].ReferencedSOPSequence[0].ReferencedSOPInstanceUID == seg.SOPInstanceUID
    tracked = {segment.TrackingUID for segment in seg.SegmentSequence if segment.SegmentLabel != "Nowhere"}
    groups = next(x for x in report.ContentSequence if x.ConceptNameCodeSequence[0].CodeValue == "126010")
    found = {
        item.UID
        for group in groups.ContentSequence
        for item in group.ContentSequence
        if item.ConceptNameCodeSequence[0].CodeValue == "112040"
    }
    assert found == tracked
    for image in slices:
        assert image.file_meta.MediaStorageSOPInstanceUID == image.SOPInstanceUID
        assert image.SOPInstanceUID.startswith("2.25.")
        assert len(image.SOPInstanceUID) <= 64


def test_contents_stay(phantoms: SimpleNamespace, known: Source, results: dict[str, Path]) -> None:
    segmentation = phantoms.segmentation_of(known)
    again = phantoms.source_of(results["source"])
    assert np.array_equal(again.image.voxels, known.image.voxels)
    assert again.image.geometry.difference(known.image.geometry) is None
    seg = pydicom.dcmread(results["seg"])
    assert [x.SegmentLabel for x in seg.SegmentSequence] == ["Höcker", "Right half", "Nowhere"]
    assert seg.pixel_array.sum() == (segmentation.label_map > 0).sum()
    assert (seg.PatientIdentityRemoved, seg.LongitudinalTemporalInformationModified) == ("YES", "REMOVED")
    assert seg.DeidentificationMethodCodeSequence[0].CodeValue == "113100"
    assert seg.PatientBirthDate == seg.StudyDate == seg.AccessionNumber == ""
    assert str(seg.PatientName) == seg.PatientID
    assert seg.PatientID.startswith("VS-")


def test_a_source_that_was_de_identified_before(phantoms: SimpleNamespace, tmp_path: Path) -> None:
    """As TCIA's series, which name more methods than volseg's own objects."""
    folder = phantoms.write_series(tmp_path / "in", PatientIdentityRemoved="YES", DeidentificationMethod="by hand")
    for path in folder.iterdir():
        dataset = pydicom.dcmread(path)
        dataset.DeidentificationMethodCodeSequence = [Dataset(), Dataset(), Dataset()]
        for item, code in zip(dataset.DeidentificationMethodCodeSequence, ("113100", "113107", "113109"), strict=True):
            item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = code, "DCM", "some method"
        dataset.save_as(path)
    source = phantoms.source_of(folder)
    results = exported(phantoms.segmentation_of(source), source, tmp_path / "out", replace(HOW, copies_source=True))
    for path in (results["seg"], *dicom_files(results["source"])):
        codes = [x.CodeValue for x in pydicom.dcmread(path).DeidentificationMethodCodeSequence]
        assert codes[0] == "113100"
        assert "113107" not in codes


def test_the_same_key_gives_the_same_pseudonyms(phantoms: SimpleNamespace, known: Source, tmp_path: Path) -> None:
    segmentation = phantoms.segmentation_of(known)
    hows = (HOW, Confidentiality(KEY), Confidentiality(new_key()))
    heads = [
        pydicom.dcmread(exported(segmentation, known, tmp_path / str(n), how)["seg"]) for n, how in enumerate(hows)
    ]
    assert heads[0].PatientID == heads[1].PatientID != heads[2].PatientID
    assert heads[0].StudyInstanceUID == heads[1].StudyInstanceUID != heads[2].StudyInstanceUID


def test_only_dicom_s_own_identifiers_stay() -> None:
    assert HOW.uid("1.2.840.10008.5.1.4.1.1.4") == "1.2.840.10008.5.1.4.1.1.4"
    assert HOW.uid("1.2.840.100081") != "1.2.840.100081"
    assert HOW.uid("") == ""
    assert "key" not in repr(HOW)


def test_the_key_file(tmp_path: Path) -> None:
    path = tmp_path / "key"
    key = load_key(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert load_key(path) == key
    assert len(key) == 32
    path.write_text("something else\n", encoding="ascii")
    with pytest.raises(ExportError, match="holds no key of volseg"):
        load_key(path)
    with pytest.raises(ExportError, match="cannot be used"):
        load_key(tmp_path / "missing" / "key")


def test_burned_in_text_is_refused(phantoms: SimpleNamespace, tmp_path: Path) -> None:
    source = phantoms.source_of(phantoms.write_series(tmp_path / "in", BurnedInAnnotation="YES"))
    with pytest.raises(ExportError, match=r"case\.source was not written: .* burned into its pixels"):
        exported(phantoms.segmentation_of(source), source, tmp_path / "out", replace(HOW, copies_source=True))
    assert not (tmp_path / "out" / "case.source").exists()


def test_a_label_called_like_the_patient_is_refused(phantoms: SimpleNamespace, known: Source, tmp_path: Path) -> None:
    schema = LabelSchema(labels=(Label(id=3, name="Muster's half", colour=(86, 180, 233)),))
    labels = (phantoms.label_map() == 3).astype(np.uint8) * 3
    with pytest.raises(ExportError, match="SegmentLabel holds a word of the patient's identity") as caught:
        exported(phantoms.segmentation_of(known, labels, schema), known, tmp_path / "out")
    assert "Muster" not in str(caught.value)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("name", ["Muster", "erika_muster", "ID-4711", "scan_19600102"])
def test_a_name_that_tells_is_refused(phantoms: SimpleNamespace, known: Source, tmp_path: Path, name: str) -> None:
    options = Options(confidentiality=HOW)
    segmentation = phantoms.segmentation_of(known)
    with pytest.raises(ExportError, match="the name of the results") as caught:
        export(segmentation, formats=["nifti"], out=tmp_path / "out", name=name, source=known, options=options)
    assert name not in str(caught.value)


def test_a_source_that_is_no_dicom_is_refused(phantoms: SimpleNamespace, known: Source, tmp_path: Path) -> None:
    plain = Source(known.image)
    options = Options(confidentiality=HOW)
    with pytest.raises(ExportError, match="the source is no DICOM series"):
        export(
            phantoms.segmentation_of(known), formats=["nifti"], out=tmp_path, name="x", source=plain, options=options
        )


def test_words_of_the_standard_are_no_names(phantoms: SimpleNamespace, tmp_path: Path) -> None:
    """A patient called Long may have a long axis."""
    source = phantoms.source_of(phantoms.write_series(tmp_path / "in", PatientName="Long^Mean"))
    exported(phantoms.segmentation_of(source), source, tmp_path / "out", HOW, ("sr",))


def test_a_short_name_is_found_as_a_word_alone() -> None:
    identity = Identity(frozenset({"s1"}), frozenset({"li"}), frozenset({"1.2.3.4"}))
    assert identity.is_in("for Li, Wei")
    assert not identity.is_in("Lineal")
    assert identity.is_in("study S1")
    assert not identity.is_in("S12")
    assert identity.is_in("see 1.2.3.4.5")
    assert not identity.is_in("long axis of Li", words=False)


def test_the_profile_is_the_standard_s() -> None:
    """A few rows of PS3.15 table E.1-1, looked up by hand."""
    rows = {
        (0x0010, 0x0030): "empty",  # Patient's Birth Date, Z
        (0x0008, 0x0050): "empty",  # Accession Number, Z
        (0x0008, 0x0080): "dummy",  # Institution Name, X/Z/D
        (0x0010, 0x1040): "delete",  # Patient's Address, X
        (0x0020, 0x000D): "uid",  # Study Instance UID, U
        (0x0008, 0x1140): "recurse",  # Referenced Image Sequence, X/Z/U*
    }
    assert {tag: profile()[tag] for tag in rows} == rows
    assert len(profile()) > 600


def test_the_text_of_other_files_is_searched(tmp_path: Path) -> None:
    identity = Identity(frozenset({"muster^erika"}), frozenset(), frozenset({"1.2.826.55"}))
    (tmp_path / "a.txt").write_text("label 1", encoding="utf-8")
    verify_plain(tmp_path, identity)
    (tmp_path / "b.txt").write_text("made of 1.2.826.55", encoding="utf-8")
    with pytest.raises(ExportError, match="an identifier of the source"):
        verify_plain(tmp_path, identity)


Tamper = Callable[[Dataset], None]


def put(keyword: str, value: object) -> Tamper:
    return lambda dataset: setattr(dataset, keyword, value)


def nested_name(dataset: Dataset) -> None:
    dataset.DerivationCodeSequence[0].CodeMeaning = "Erika"


def private(dataset: Dataset) -> None:
    dataset.private_block(0x0011, "X", create=True).add_new(1, "LO", "harmless")


def pixels(dataset: Dataset) -> None:
    dataset.PixelData = dataset.PixelData[:-2] + b"\7\7"


def mirrored(dataset: Dataset) -> None:
    dataset.ImageOrientationPatient = [-x for x in dataset.ImageOrientationPatient]


def lost(dataset: Dataset) -> None:
    del dataset.Rows


def sender(dataset: Dataset) -> None:
    dataset.file_meta.SourceApplicationEntityTitle = "KLINIKUM"


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (put("PatientName", "Muster^Erika"), "PatientName holds a part"),
        (put("PatientID", "VS-000000000000"), "not the pseudonym|has not the pseudonym"),
        (put("SeriesDescription", "for Dr. Anton"), "SeriesDescription holds a part"),
        (put("StudyInstanceUID", "1.2.3"), "StudyInstanceUID is not the pseudonym"),
        (put("ImageComments", "born 1960-01-02"), "ImageComments holds a part"),
        (put("PatientIdentityRemoved", "NO"), "does not say that its identity was removed"),
        (nested_name, "holds a part|is not what it was"),
        (private, "private elements"),
        (pixels, "PixelData is not what it was"),
        (mirrored, "ImageOrientationPatient is not what it was"),
        (lost, "Rows is not what it was"),
        (sender, "the header of the file holds more"),
    ],
)
def test_tampering_is_seen(
    phantoms: SimpleNamespace, known: Source, tmp_path: Path, tamper: Tamper, message: str
) -> None:
    original, path = known.series.paths[0], tmp_path / "copy.dcm"
    identity = identity_of(pydicom.dcmread(original))
    deidentify_file(original, path, HOW, identity=identity, is_own=False)
    verify_deidentified(path, original, HOW, identity=identity, is_own=False)
    dataset = pydicom.dcmread(path)
    tamper(dataset)
    dataset.save_as(path)
    with pytest.raises(ExportError, match=message) as caught:
        verify_deidentified(path, original, HOW, identity=identity, is_own=False)
    assert not [secret for secret in SECRETS if secret in str(caught.value).lower()]


def test_the_original_of_another_key_is_seen(known: Source, tmp_path: Path) -> None:
    original, path = known.series.paths[0], tmp_path / "copy.dcm"
    identity = identity_of(pydicom.dcmread(original))
    deidentify_file(original, path, HOW, identity=identity, is_own=False)
    with pytest.raises(ExportError, match="is not the pseudonym"):
        verify_deidentified(path, original, Confidentiality(new_key()), identity=identity, is_own=False)


def test_a_real_series(hippocrop: Source, phantoms: SimpleNamespace, tmp_path: Path) -> None:
    labels = np.zeros(hippocrop.image.geometry.shape, dtype=np.uint8)
    labels[10:20, 20:30, 15:25] = 3
    files = exported(
        phantoms.segmentation_of(hippocrop, labels), hippocrop, tmp_path / "out", replace(HOW, copies_source=True)
    )
    copies = dicom_files(files["source"])
    assert len(copies) == 40
    assert pydicom.dcmread(copies[0]).file_meta.TransferSyntaxUID == ExplicitVRLittleEndian
    for path in dicom_files(tmp_path / "out"):
        assert b"Dumbledore" not in path.read_bytes()
        assert b"PGBM" not in path.read_bytes()


def test_the_command_line_s_options(phantom: Segmentation, known: Source, tmp_path: Path) -> None:
    affine = nib.Nifti1Image(phantom.label_map, known.image.geometry.affine_ras)
    nib.save(affine, tmp_path / "case.nii.gz")
    (tmp_path / "labels.json").write_text(phantom.schema.model_dump_json(), encoding="utf-8")
    removal = Removal(deidentify=False, copies_source=True, key_file=tmp_path / "key")
    folder = known.series.paths[0].parent
    export_labels(
        *(tmp_path / "case.nii.gz", folder, tmp_path / "out"),
        formats=["seg"],
        schema=None,
        series=None,
        removal=removal,
        console=Silence(),
    )
    seg = pydicom.dcmread(tmp_path / "out" / "case.seg.dcm")
    assert seg.PatientID == Confidentiality(load_key(tmp_path / "key")).patient(pydicom.dcmread(known.series.paths[0]))
    assert len(dicom_files(tmp_path / "out" / "case.source")) == 6
    assert Removal().confidentiality() is None
    with pytest.raises(ExportError, match="--key is for --deidentify"):
        Removal(key_file=tmp_path / "key").confidentiality()


@pytest.mark.usefixtures("one_thread")
def test_prediction_leaves_no_trace(small_bundle: Path, data_dir: Path, tmp_path: Path) -> None:
    model = Model((load_bundle(small_bundle, torch.device("cpu")),))
    studies = [Study("case", (data_dir / "dicom_hippocrop",))]
    settings = SegmentSettings(("seg", "nifti"), mirror=False, series=None, force=False)
    hidden = replace(settings, confidentiality=HOW)
    written, failures = segment_studies(model, studies, tmp_path / "out", settings=hidden, console=Silence())
    assert ([file.path.name for file in written], failures) == (["case.seg.dcm", "case.nii.gz"], [])
    assert pydicom.dcmread(written[0].path).PatientIdentityRemoved == "YES"
    for path in (tmp_path / "out").iterdir():
        for trace in (b"PGBM", b"Dumbledore", b"dicom_hippocrop", b"1.3.6.1.4.1.14519"):
            assert trace not in path.read_bytes(), path.name
    # What is kept from before would not be what is asked for now.
    with pytest.raises(RunError, match="another model or setting"):
        segment_studies(model, studies, tmp_path / "out", settings=settings, console=Silence())
