"""`volseg scores`: what was kept of a prediction, decided again; and what is said of a prediction's quality."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.errors import ConfigError, RunError, VolumeError

if TYPE_CHECKING:
    from pipeline.segmentation import Segmentation
    from transforms.labels import LabelSchema

scores_app = typer.Typer(
    help="Scores that `volseg predict --keep-scores` kept.", no_args_is_help=True, rich_markup_mode=None
)

FORMATS = ("nifti", "nrrd", "stl", "gltf")
"""What can be written without the image that was segmented."""

MOST_STUDIES = 5
"""Studies that are named to be looked at first."""


@scores_app.callback()
def _scores() -> None:
    """Scores that `volseg predict --keep-scores` kept."""


@scores_app.command("combine")
def combine(
    inputs: Annotated[
        list[Path], typer.Argument(metavar="SCORES...", help="Files, or output folders of `volseg predict`.")
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder of the label maps, each named after its study.")],
    thresholds: Annotated[
        list[str] | None,
        typer.Option("--threshold", metavar="LABEL=P", help="As tumour=0.3: from which probability on it is taken."),
    ] = None,
    formats: Annotated[str, typer.Option("--as", metavar="FORMAT,...", help=", ".join(FORMATS))] = "nifti",
    force: Annotated[bool, typer.Option("--force", help="Replace results that are there.")] = False,
) -> None:
    """Average kept scores of the same studies, and write label maps: no network is run, nothing is post-processed."""
    from pipeline.cli_console import TerminalConsole
    from pipeline.combining import segment_scores
    from pipeline.files import write_text
    from pipeline.kept_scores import read_scores
    from pipeline.references import SCHEMA_FILE

    wanted, limits = _formats(formats), _thresholds(thresholds or ())
    studies = _studies(inputs)
    schema = _schema_of(studies)
    _refuse_results(out, schema, _targets(out, studies, wanted), force=force)
    console = TerminalConsole()
    for done, (name, files) in enumerate(studies.items(), start=1):
        made = segment_scores([read_scores(file) for file in files], limits)
        if done == 1:
            write_text(out / SCHEMA_FILE, schema.model_dump_json(indent=2) + "\n")
        for path in _export(made, out, name, wanted):
            print(path)
        console.progress("combining", done, len(studies), name)
    console.close()


def tell_quality(out: Path) -> None:
    """Which of the studies that a folder records are to be looked at first, and what of each was found."""
    from pipeline.quality import QUALITY_CSV, look_first
    from pipeline.record import recorded_quality

    found = recorded_quality(out)
    if not found:
        return
    told = []
    for name in look_first(found)[:MOST_STUDIES]:
        mean = found[name].mean
        missing = f"; not found: {', '.join(found[name].not_found)}" if found[name].not_found else ""
        told.append(f"  {name}: " + ("nothing was found" if mean is None else f"{mean:.3f}{missing}"))
    print("Dice to expect by the model's own probabilities" + (", to look at first:" if len(found) > 1 else ":"))
    print("\n".join(told))
    more = f"{len(found) - len(told)} more; " if len(found) > len(told) else ""
    print(f"{more}all of them by label: {out / QUALITY_CSV}")


def _formats(text: str) -> tuple[str, ...]:
    wanted = tuple(name.strip() for name in text.split(",") if name.strip())
    unknown = [name for name in wanted if name not in FORMATS]
    if unknown or not wanted:
        raise ConfigError(
            f"--as {text}: without the image there are {', '.join(FORMATS)}; "
            "for others write nifti, and then: volseg export LABELS --source IMAGE --as FORMAT --out FOLDER"
        )
    return wanted


def _thresholds(given: Sequence[str]) -> dict[str, float]:
    limits = {}
    for text in given:
        name, _, number = text.rpartition("=")
        try:
            limits[name] = float(number)
        except ValueError:
            name = ""
        if not name:
            raise ConfigError(f"--threshold {text}: expected a label and a probability, as tumour=0.3")
    return limits


def _studies(inputs: Sequence[Path]) -> dict[str, list[Path]]:
    """The files of each study, one of each input."""
    found = [_scores_in(path) for path in inputs]
    names = list(dict.fromkeys(name for each in found for name in each))
    for path, each in zip(inputs, found, strict=True):
        if missing := [name for name in names if name not in each]:
            raise VolumeError(
                f"{path}: no scores of {missing[0]}, which another input has; "
                "give inputs of the same studies, by the same names"
            )
    return {name: [each[name] for each in found] for name in names}


def _scores_in(path: Path) -> dict[str, Path]:
    from pipeline.confidence_files import SCORES
    from pipeline.kept_scores import SUFFIX

    folder = path / SCORES if (path / SCORES).is_dir() else path
    # What begins with a dot is being written, or a kill left it.
    files = sorted(folder.glob(f"[!.]*{SUFFIX}")) if path.is_dir() else [path]
    if not files:
        raise VolumeError(f"{path}: no file that ends in {SUFFIX}; `volseg predict --keep-scores 3` writes them")
    return {file.name.removesuffix(SUFFIX): file for file in files}


def _schema_of(studies: Mapping[str, Sequence[Path]]) -> LabelSchema:
    """The labels of all of them; by the headers alone, whatever cannot be combined is refused here."""
    from pipeline.combining import have_same_labels, refuse_others
    from pipeline.kept_scores import read_header

    firsts = [read_header(file) for file in next(iter(studies.values()))]
    for files in studies.values():
        headers = [read_header(file) for file in files]
        refuse_others(headers)
        if not have_same_labels(firsts[0].schema, headers[0].schema):
            raise VolumeError(f"{files[0]}: other labels than the study before; combine them into folders of their own")
        for file, header, first in zip(files, headers, firsts, strict=True):
            if header.models != first.models:
                raise VolumeError(
                    f"{file}: of another model than the study before in its folder, as after --force; "
                    "predict all of them again, or name the files of one study each time"
                )
    return firsts[0].schema


def _targets(out: Path, names: Iterable[str], formats: Sequence[str]) -> list[Path]:
    from pipeline.export import FORMATS as ALL

    return [out / f"{name}{ALL[key].suffix}" for name in names for key in formats]


def _refuse_results(out: Path, schema: LabelSchema, targets: Sequence[Path], *, force: bool) -> None:
    """Before anything is written: what is in `out` would be replaced, or be taken for what it is no longer."""
    from pipeline.combining import have_same_labels
    from pipeline.references import SCHEMA_FILE, known_schema
    from pipeline.results import RECORD

    if (out / RECORD).exists():
        raise RunError(f"{out}: holds results of `volseg predict`, which says what made them; choose another --out")
    if force:
        return
    if target := next((target for target in targets if target.exists()), None):
        raise RunError(f"{target} exists already; give --force to replace it, or another --out")
    there = known_schema(out, None) if out.is_dir() else None
    if there is not None and not have_same_labels(there, schema):
        raise RunError(f"{out / SCHEMA_FILE} is of other labels; give --force to replace it, or another --out")


def _export(made: Segmentation, out: Path, name: str, formats: Sequence[str]) -> list[Path]:
    """Write what was decided by the exporter of `volseg predict`, which needs of the image no more than its grid."""
    import numpy as np

    from pipeline.export import Source, export
    from transforms.volume import Volume

    grid = Volume(np.broadcast_to(np.float32(0), made.geometry.shape), made.geometry, None, 0.0)
    return [file.path for file in export(made, formats=formats, out=out, name=name, source=Source(grid))]
