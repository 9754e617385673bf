"""`volseg pacs`, and `volseg predict` on a study of an archive: options in, lines out."""

from __future__ import annotations

import hashlib
import json
import secrets
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli_console import TerminalConsole, show_table
from pipeline.errors import PacsError

if TYPE_CHECKING:
    from pipeline.cli_stages import Prediction
    from pipeline.pacs import Access
    from pipeline.pacs.archive import Level
    from pipeline.pacs.patience import Effort

pacs_app = typer.Typer(
    help="Archives (PACS), over DICOMweb and DIMSE: echo, find, fetch, send.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

NodeAddress = Annotated[
    str, typer.Argument(metavar="NODE", help="dicomweb[s]://HOST:PORT/PATH or dimse[s]://CALLED_AET@HOST:PORT.")
]
CredentialsFile = Annotated[
    Path | None,
    typer.Option("--credentials", help="TOML: username, password, token, ca_file, certificate, key; mode 600."),
]
KeyringUser = Annotated[
    str | None, typer.Option("--keyring", metavar="USER", help="Take USER's password from the keyring.")
]
Aet = Annotated[str, typer.Option("--aet", help="Our own AE title (DIMSE).")]
ReceivePort = Annotated[
    int | None, typer.Option("--receive-port", min=1, max=65535, help="Our port for C-MOVE, where C-GET is missing.")
]
ConnectS = Annotated[float, typer.Option("--connect-timeout", min=0.1, help="Seconds for a connection.")]
AnswerS = Annotated[float, typer.Option("--timeout", min=0.1, help="Seconds of silence before giving up.")]
TotalS = Annotated[float, typer.Option("--deadline", min=1, help="Seconds for the whole command.")]
Attempts = Annotated[int, typer.Option("--attempts", min=1, max=20, help="Attempts before giving up.")]
StudyUid = Annotated[str, typer.Option("--study", help="StudyInstanceUID.")]


@dataclass(frozen=True)
class Reach:
    """The options with which an archive is reached."""

    credentials: Path | None = None
    keyring: str | None = None
    aet: str = "VOLSEG"
    receive_port: int | None = None
    connect_s: float = 10.0
    answer_s: float = 60.0
    total_s: float = 14400.0
    attempts: int = 4


@pacs_app.command()
def echo(
    node: NodeAddress,
    credentials: CredentialsFile = None,
    keyring: KeyringUser = None,
    aet: Aet = "VOLSEG",
    connect_s: ConnectS = 10.0,
    answer_s: AnswerS = 60.0,
    attempts: Attempts = 1,
) -> None:
    """Ask an archive whether it answers."""
    from pipeline.pacs import open_archive

    reach = Reach(credentials, keyring, aet, connect_s=connect_s, answer_s=answer_s, attempts=attempts)
    access = _access(node, reach)
    with open_archive(access) as archive:
        _effort(access, "echo").run(archive.echo)
    print(f"{access.node} answers")


@pacs_app.command()
def find(
    node: NodeAddress,
    study: Annotated[str | None, typer.Option("--study", help="Show the series of this StudyInstanceUID.")] = None,
    modality: Annotated[str | None, typer.Option("--modality", help="As CT or MR.")] = None,
    date: Annotated[str | None, typer.Option("--date", help="As 20260131, or a range as 20260101-20260131.")] = None,
    description: Annotated[str | None, typer.Option("--description", help="With * and ? for any letters.")] = None,
    match: Annotated[
        Path | None, typer.Option("--match", help="TOML with PatientID, AccessionNumber and the like.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    credentials: CredentialsFile = None,
    keyring: KeyringUser = None,
    aet: Aet = "VOLSEG",
    connect_s: ConnectS = 10.0,
    answer_s: AnswerS = 60.0,
    attempts: Attempts = 4,
) -> None:
    """List studies, or the series of one; patients are shown as hashes that change from call to call."""
    from pipeline.pacs import open_archive
    from pipeline.pacs.finding import read_filters, rows_to_show
    from pipeline.pacs.node import check_uid

    level: Level = "SERIES" if study else "STUDY"
    names = ("Modality", "SeriesDate", "SeriesDescription")
    if not study:
        names = ("ModalitiesInStudy", "StudyDate", "StudyDescription")
    filters = {key: value for key, value in zip(names, (modality, date, description), strict=True) if value}
    filters |= read_filters(match, level) if match else {}
    if study:
        filters["StudyInstanceUID"] = check_uid(study, "--study")
    reach = Reach(credentials, keyring, aet, connect_s=connect_s, answer_s=answer_s, attempts=attempts)
    access = _access(node, reach)
    with open_archive(access) as archive:
        found = _effort(access, "find").run(lambda: archive.find(level, filters))
    rows = rows_to_show(found, level, salt=secrets.token_bytes(16))
    if as_json:
        print(json.dumps(rows, indent=2, ensure_ascii=False))
    else:
        show_table(str(access.node), rows)
        print(f"{len(rows)} {'series' if study else 'study' if len(rows) == 1 else 'studies'}")


@pacs_app.command()
def fetch(
    node: NodeAddress,
    study: StudyUid,
    out: Annotated[Path, typer.Option("--out", help="Folder; each series gets a folder in it.")],
    series: Annotated[str | None, typer.Option("--series", help="SeriesInstanceUID; default: all series.")] = None,
    credentials: CredentialsFile = None,
    keyring: KeyringUser = None,
    aet: Aet = "VOLSEG",
    receive_port: ReceivePort = None,
    connect_s: ConnectS = 10.0,
    answer_s: AnswerS = 60.0,
    total_s: TotalS = 14400.0,
    attempts: Attempts = 4,
) -> None:
    """Fetch a study; what lies there whole already is not fetched again."""
    from pipeline.pacs import open_archive
    from pipeline.pacs.fetching import fetch, series_of_study

    reach = Reach(credentials, keyring, aet, receive_port, connect_s, answer_s, total_s, attempts)
    access = _access(node, reach)
    effort = _effort(access, str(out))
    with closing(TerminalConsole()) as console, open_archive(access) as archive:
        found = series_of_study(archive, study, effort=effort)
        chosen = [row for row in found if series in (None, row["SeriesInstanceUID"])]
        if not chosen:
            raise PacsError(f"the study has no series {series}; its series: volseg pacs find NODE --study {study}")
        fetched = fetch(archive, chosen, out, effort=effort, console=console)
    for item in fetched:
        print(f"{item.folder}  {item.modality}, {item.instance_count} instances, {item.new_count} of them fetched now")


@pacs_app.command()
def send(
    node: NodeAddress,
    paths: Annotated[list[Path], typer.Argument(metavar="PATH...", help="DICOM files, or folders of them.")],
    journal: Annotated[
        Path | None, typer.Option("--journal", help="What arrived, for another go; default: a hidden file beside PATH.")
    ] = None,
    batch_mb: Annotated[float, typer.Option("--batch-mb", min=0.001, help="Size of a request in MB.")] = 16.0,
    credentials: CredentialsFile = None,
    keyring: KeyringUser = None,
    aet: Aet = "VOLSEG",
    connect_s: ConnectS = 10.0,
    answer_s: AnswerS = 60.0,
    total_s: TotalS = 14400.0,
    attempts: Attempts = 4,
) -> None:
    """Send DICOM files; what the archive has already is not sent, so the same command goes on after a break."""
    reach = Reach(credentials, keyring, aet, None, connect_s, answer_s, total_s, attempts)
    access = _access(node, reach)
    with closing(TerminalConsole()) as console:
        send_paths(access, paths, journal=journal, batch_mb=batch_mb, console=console)


def send_paths(
    access: Access, paths: list[Path], *, journal: Path | None, batch_mb: float, console: TerminalConsole
) -> None:
    """Send files and folders, and say how many arrived."""
    from pipeline.pacs import open_archive
    from pipeline.pacs.journal import Journal, journal_path
    from pipeline.pacs.sending import find_instances, send

    instances = find_instances(paths, console=console)
    kept = Journal(journal or journal_path(paths[0], access.node), access.node)
    with open_archive(access) as archive:
        sent = send(
            archive,
            instances,
            journal=kept,
            effort=_effort(access, str(kept.path)),
            console=console,
            batch_bytes=int(batch_mb * 1e6),
        )
    console.close()
    there = f"; {sent.before} were there already" if sent.before else ""
    print(f"{sent.total} of {sent.total} instances are in {access.node}: {sent.now} sent now{there}")


def predict_study(
    model: Path, node: str, out: Path, wanted: Prediction, *, study: str | None, sends: bool, reach: Reach
) -> bool:
    """`volseg predict` on a study of an archive; True when no series was set aside."""
    from dataclasses import replace

    from pipeline.bundle import find_bundles
    from pipeline.cli_stages import predict_inputs
    from pipeline.export import check_formats
    from pipeline.loop import SOURCE_FOLDER, check_sendable, choose_series, verified_results
    from pipeline.pacs import open_archive
    from pipeline.pacs.fetching import fetch, series_of_study

    if study is None:
        raise PacsError("which study? give --study UID; the archive's studies: volseg pacs find NODE")
    check_formats(wanted.formats)
    if sends:
        check_sendable(wanted.formats)
    find_bundles(model)
    access = _access(node, reach)
    effort = _effort(access, str(out))
    with closing(TerminalConsole()) as console:
        with open_archive(access) as archive:
            chosen, volume = choose_series(series_of_study(archive, study, effort=effort), wanted.series)
            fetched = fetch(archive, chosen, out / SOURCE_FOLDER, effort=effort, console=console)
        folders = [item.folder for item in fetched]
        predicted = predict_inputs(model, folders, out, replace(wanted, series=volume), console)
        if sends:
            results = verified_results(out, predicted.done, wanted.formats)
            journal = out / f"sent-{access.node.key}.jsonl"
            send_paths(access, results, journal=journal, batch_mb=16.0, console=console)
    return predicted.is_complete


def _access(node: str, reach: Reach) -> Access:
    from pipeline.pacs import Access
    from pipeline.pacs.credentials import Credentials, read_credentials, with_keyring
    from pipeline.pacs.node import check_aet, parse_node
    from pipeline.pacs.patience import Patience

    parsed = parse_node(node)
    credentials = read_credentials(reach.credentials) if reach.credentials else Credentials()
    if reach.keyring:
        credentials = with_keyring(credentials, parsed, reach.keyring)
    patience = Patience(reach.connect_s, reach.answer_s, reach.total_s, reach.attempts)
    return Access(parsed, credentials, check_aet(reach.aet, "--aet"), reach.receive_port, patience)


def _effort(access: Access, what: str) -> Effort:
    """Its jitter is seeded by what is done where, so commands that fail together do not come back together."""
    import numpy as np

    from pipeline.pacs.patience import Effort

    seed = hashlib.sha256(f"{access.node} {access.aet} {what}".encode()).digest()
    return Effort(access.patience, np.random.default_rng(int.from_bytes(seed[:8], "big")))
