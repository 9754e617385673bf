"""`volseg manifest`: what is said of a dataset on the command line, as a manifest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from pipeline.errors import ManifestError

if TYPE_CHECKING:
    from pipeline.manifest import Channel, Dataset
    from pipeline.manifest_build import PatientRule

manifest_app = typer.Typer(help="Datasets described as JSON.", no_args_is_help=True, rich_markup_mode=None)


@dataclass(frozen=True)
class Request:
    """What the options say, read but not yet judged against a dataset."""

    images: Path
    name: str | None
    modalities: dict[str, str]
    optional: frozenset[str]
    labels: Path | None
    label_file: str | None
    names: dict[int, str]
    patients: PatientRule | None
    splits: Path | None


@manifest_app.command("build")
def manifest_build(
    images: Annotated[
        Path,
        typer.Argument(help="Folder of images (or of one DICOM folder a case); or an nnU-Net, MSD or BIDS dataset."),
    ],
    out: Annotated[Path, typer.Option("--out", help="The manifest to write.")],
    name: Annotated[
        str | None, typer.Option("--name", help="Name of the dataset; default: its own, or the folder's.")
    ] = None,
    channel: Annotated[
        list[str] | None,
        typer.Option("--channel", metavar="NAME:MODALITY", help="A channel and its modality, as T1:MR."),
    ] = None,
    optional: Annotated[
        list[str] | None, typer.Option("--optional", metavar="NAME", help="A channel that cases may lack.")
    ] = None,
    labels: Annotated[Path | None, typer.Option("--labels", help="Folder of label maps.")] = None,
    label: Annotated[list[str] | None, typer.Option("--label", metavar="ID:NAME", help="A label's name.")] = None,
    label_file: Annotated[
        str | None,
        typer.Option("--label-file", metavar="ENDING", help="BIDS: how names of label maps end; default: dseg."),
    ] = None,
    patient_pattern: Annotated[
        str | None, typer.Option("--patient-pattern", help="Regular expression; its group 1 is the patient id.")
    ] = None,
    patient_table: Annotated[Path | None, typer.Option("--patient-table", help="CSV: case_id,patient_id.")] = None,
    splits: Annotated[
        Path | None, typer.Option("--splits", help="Folds as in this splits_final.json of nnU-Net.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing manifest.")] = False,
) -> None:
    """Make a manifest from folders of images and labels, or from an nnU-Net, MSD or BIDS dataset as it lies there."""
    from pipeline.manifest import save_manifest
    from pipeline.manifest_build import PatientRule, read_patient_table

    if out.is_dir():
        raise ManifestError(f"--out {out}: is a folder; give the name of a file, such as {out / 'manifest.json'}")
    if out.exists() and not force:
        raise ManifestError(f"{out} exists already; give --force to replace it, or another --out")
    table = None if patient_table is None else read_patient_table(patient_table)
    ruled = patient_pattern is not None or table is not None
    request = Request(
        images=images,
        name=name,
        modalities=_modalities(channel or []),
        optional=frozenset(optional or []),
        labels=labels,
        label_file=label_file,
        names=_label_names(label or []),
        patients=PatientRule(pattern=patient_pattern, table=table) if ruled else None,
        splits=splits,
    )
    dataset = _build(request)
    save_manifest(dataset, out)
    _tell(dataset, out)


def _build(request: Request) -> Dataset:
    from pipeline.manifest_adopt import describes_itself
    from pipeline.manifest_bids import is_bids

    if describes_itself(request.images):
        return _adopted(request)
    if request.splits is not None:
        raise ManifestError(f"--splits: {request.images} is no nnU-Net or MSD dataset (no dataset.json in it)")
    if request.images.is_dir() and is_bids(request.images):
        return _from_bids(request)
    return _paired(request)


def _adopted(request: Request) -> Dataset:
    from pipeline.manifest_adopt import adopt_dataset
    from pipeline.manifest_formats import Stated

    given = {"--labels": request.labels, "--label": request.names, "--label-file": request.label_file}
    if wrong := next((option for option, value in given.items() if value), None):
        raise ManifestError(f"{wrong}: the labels of {request.images} are those of its dataset.json; leave it out")
    return adopt_dataset(
        request.images,
        name=request.name,
        stated=Stated(request.modalities, request.optional),
        patients=request.patients,
        splits=request.splits,
    )


def _from_bids(request: Request) -> Dataset:
    from pipeline.manifest_bids import LabelRule, build_bids, image_kinds, unlisted_subjects
    from pipeline.manifest_formats import named

    if not request.modalities:
        known = ", ".join(f"{suffix} ({count})" for suffix, count in image_kinds(request.images).items()) or "none"
        raise ManifestError(
            f"{request.images}: a BIDS dataset; name the images to use and their modality, as --channel T1w:MR; "
            f"volumes found: {known}"
        )
    dataset = build_bids(
        request.images,
        name=request.name,
        channels=_channels(request),
        labels=LabelRule(request.labels, request.label_file or "dseg", request.names or None),
        patients=request.patients,
    )
    without_folder, unlisted = unlisted_subjects(request.images)
    for what, subjects in (("listed without a folder", without_folder), ("a folder, but not listed", unlisted)):
        if subjects:
            print(f"participants.tsv: {what}: {named(subjects)}")
    return dataset


def _paired(request: Request) -> Dataset:
    from pipeline.manifest_build import build_manifest, question_of_both

    if request.label_file is not None:
        raise ManifestError(f"--label-file: {request.images} is no BIDS dataset; label maps are named as their images")
    if not request.modalities:
        raise ManifestError("--channel is needed: the images' name and modality, as --channel T1:MR")
    if request.names and request.labels is None:
        question = question_of_both(request.images)
        raise ManifestError(
            "--label names labels, but there is no label map: give their folder with --labels"
            f"{'' if question is None else f'; {question}'}"
        )
    return build_manifest(
        request.images,
        request.labels,
        name=request.name or request.images.resolve().name,
        channels=_channels(request),
        label_names=request.names or None,
        patients=request.patients,
    )


def _tell(dataset: Dataset, out: Path) -> None:
    from pipeline.cli_stages import tell_channels

    cases = dataset.manifest.cases
    labelled = sum(case.label is not None for case in cases)
    patients = len({case.patient_id for case in cases})
    names = [channel.name for channel in dataset.manifest.channels]
    tell_channels({n: sum(n in case.images for case in cases) for n in names}, len(cases))
    print(
        f"{len(cases)} cases{f' of {patients} patients' if patients < len(cases) else ''}"
        f"{f', {labelled} of them labelled,' if labelled < len(cases) else ''} written to {out}; "
        f"run `volseg check {out}` next"
    )
    if not labelled:
        print("no case has a label: fit for prediction, not for training")


def _channels(request: Request) -> list[Channel]:
    from pipeline.manifest import Channel

    if unknown := sorted(request.optional - set(request.modalities)):
        raise ManifestError(f"--optional {unknown[0]}: no --channel has this name")
    return [
        Channel.model_validate({"name": name, "modality": modality, "optional": name in request.optional})
        for name, modality in request.modalities.items()
    ]


def _modalities(texts: Sequence[str]) -> dict[str, str]:
    from pipeline.manifest import Modality

    modalities: dict[str, str] = {}
    for channel, modality in (_pair(text, "--channel", "NAME:MODALITY") for text in texts):
        if modality not in get_args(Modality):
            raise ManifestError(
                f"--channel {channel}:{modality}: the modality is one of {', '.join(get_args(Modality))}"
            )
        if modalities.setdefault(channel, modality) != modality:
            raise ManifestError(f"--channel {channel}:{modality}: this channel is {modalities[channel]} already")
    return modalities


def _pair(text: str, option: str, form: str) -> tuple[str, str]:
    first, separator, second = text.partition(":")
    if not (first and separator and second):
        raise ManifestError(f"{option} {text}: expected {form}")
    return first, second


def _label_names(texts: Sequence[str]) -> dict[int, str]:
    """Label values and their names; two names for one value, or two values for one name, are refused."""
    names: dict[int, str] = {}
    for text in texts:
        number, name = _pair(text, "--label", "ID:NAME")
        label_id = _label_id(number, text)
        if names.setdefault(label_id, name) != name:
            raise ManifestError(f"--label {text}: label {label_id} is {names[label_id]} already")
        if taken := [other for other, known in names.items() if known == name and other != label_id]:
            raise ManifestError(f"--label {text}: {name} is label {taken[0]} already")
    return names


def _label_id(number: str, text: str) -> int:
    from transforms.labels import MAX_LABEL_ID

    if not number.isdecimal():
        raise ManifestError(f"--label {text}: a label's id is a whole number from 1")
    # Longer numbers are too large as well, and Python refuses to read very long ones.
    significant = number.lstrip("0") or "0"
    label_id = int(significant) if len(significant) <= len(str(MAX_LABEL_ID)) else MAX_LABEL_ID + 1
    if label_id == 0:
        raise ManifestError(f"--label {text}: 0 is the background; number labels from 1")
    if label_id > MAX_LABEL_ID:
        raise ManifestError(f"--label {text}: the largest id of a label is {MAX_LABEL_ID}")
    return label_id
