"""`volseg dicom`: what lies in a folder of DICOM files, and what of it can be segmented."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from pipeline.dicom_listing import ListingRow

dicom_app = typer.Typer(help="Folders of DICOM files.", no_args_is_help=True, rich_markup_mode=None)

PIPE_WIDTH = 240
"""Columns of the table where no terminal says how many there are."""

WIDE = 100
"""With fewer columns, identifiers of series are left out and findings come under the table."""

_COLUMNS = ("no.", "patient", "study", "series", "kind", "description", "size", "spacing mm", "plane", "usable")
_WRAPPING = {"study", "series", "description", "plane", "findings"}
_WIDEST = {"study": 8, "series": 8}
_USABLE = {True: ("yes", "green"), False: ("no", "red"), None: ("-", "dim")}


@dicom_app.callback()
def _dicom() -> None:
    """Folders of DICOM files."""


@dicom_app.command("ls")
def list_folder(
    folder: Annotated[Path, typer.Argument(metavar="PATH", help="A folder, searched with all below it, or a file.")],
    json_file: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Write all of it as JSON; - prints it instead.")
    ] = None,
    resample_uneven: Annotated[
        bool, typer.Option("--resample-uneven", help="Take slices with uneven gaps as --resample-uneven would.")
    ] = False,
    salt: Annotated[
        Path | None,
        typer.Option("--salt", metavar="FILE", help="Keeps patient keys the same between calls; made when missing."),
    ] = None,
) -> None:
    """List the series below a folder, headers only; exit code 1 if any image series cannot be used."""
    from pipeline.cli_console import TerminalConsole
    from pipeline.dicom_listing import index_tree, is_usable, listing_json, listing_rows, summary
    from pipeline.files import write_json

    console = TerminalConsole()
    try:
        index = index_tree(
            folder,
            resample_uneven=resample_uneven,
            salt_file=salt,
            progress=lambda done, total: console.progress("reading headers", done, total),
        )
    finally:
        console.close()
    if json_file == "-":
        print(json.dumps(listing_json(index, folder), indent=2, ensure_ascii=False))
    else:
        show_listing(listing_rows(index))
        print(summary(index))
    if json_file not in (None, "-"):
        write_json(Path(json_file), listing_json(index, folder))
    if any(is_usable(volume) is False for volume in index.series):
        raise typer.Exit(1)


def show_listing(rows: Sequence[ListingRow]) -> None:
    """The table, and under it why volumes cannot be used."""
    from rich.console import Console as RichConsole

    is_terminal = sys.stdout.isatty()
    console = RichConsole() if is_terminal else RichConsole(width=PIPE_WIDTH)
    is_wide = console.width >= WIDE
    console.print(_table(rows, is_wide=is_wide, sparse=is_terminal))
    lines = [(f"{row.numbers}: {problem}", "red") for row in rows for problem in row.problems]
    if not is_wide and (mended := _mended(rows)):
        lines.insert(0, (f"mended: {mended}", "dim"))
    for line, style in lines:
        console.print(line, style=style, markup=False, highlight=False, soft_wrap=not is_terminal)


def _mended(rows: Sequence[ListingRow]) -> str:
    """Which volumes have which findings, as 'gantry-tilt 3; duplicate 4, 7'."""
    found: dict[str, list[str]] = {}
    for row in rows:
        for name in row.findings if row.is_usable else ():
            found.setdefault(name, []).append(row.numbers)
    return "; ".join(f"{name} {', '.join(numbers)}" for name, numbers in found.items())


def _table(rows: Sequence[ListingRow], *, is_wide: bool, sparse: bool) -> Table:
    """`sparse` names a patient and a study once, where their rows begin."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2 if is_wide else 1, 0, 0), header_style="dim")
    for name in [*(name for name in _COLUMNS if is_wide or name != "series"), *(["findings"] if is_wide else [])]:
        wraps, right = name in _WRAPPING, name == "no."
        table.add_column(
            name,
            justify="right" if right else "left",
            no_wrap=not wraps,
            overflow="fold",
            max_width=_WIDEST.get(name) if sparse else None,
        )
    before = ("", "")
    for row in rows:
        whose = (row.patient, row.study)
        known = (sparse and whose[0] == before[0], sparse and whose == before)
        shown = ["" if seen else name for name, seen in zip(whose, known, strict=True)]
        what = [*([row.series] if is_wide else []), row.modality, row.description]
        usable = Text(*_USABLE[row.is_usable])
        cells = map(Text, (row.numbers, *shown, *what, row.size, row.spacing_mm, row.orientation))
        table.add_row(*cells, usable, *([Text(", ".join(row.findings))] if is_wide else []))
        before = whose
    return table
