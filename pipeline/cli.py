"""The command line: one command, a subcommand a stage. Turns errors into one clear line; no arithmetic.

Everything heavy is imported inside the subcommand that needs it, so that `volseg --help` answers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from pipeline.cli_dicom import dicom_app
from pipeline.cli_inspect import inspect_network
from pipeline.cli_interop import bundle_app, import_app
from pipeline.cli_manifest import manifest_app
from pipeline.cli_pacs import Aet, CredentialsFile, KeyringUser, Reach, ReceivePort, pacs_app
from pipeline.cli_postprocess import choose_postprocessing
from pipeline.cli_results import compare_runs, list_tracked, promote_run, write_page
from pipeline.cli_scores import scores_app

if TYPE_CHECKING:
    from pipeline.cli_console import TerminalConsole
    from pipeline.config import Config

app = typer.Typer(
    name="volseg",
    help="3D medical volume segmentation: check, plan, train, cross-validate, predict, evaluate, export.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(manifest_app, name="manifest")
app.add_typer(dicom_app, name="dicom")
app.add_typer(pacs_app, name="pacs")
app.add_typer(import_app, name="import")
app.add_typer(bundle_app, name="bundle")
app.add_typer(scores_app, name="scores")

Sets = Annotated[list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Set a config value.")]
ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file as in configs/.")]
RunFolder = Annotated[Path | None, typer.Option("--out", help="Run folder; default: RUNS/NAME of the config.")]
CheckpointEvery = Annotated[
    float | None,
    typer.Option("--checkpoint-every", metavar="MINUTES", help="Time between checkpoints; train.checkpoint_minutes."),
]
InspectEvery = Annotated[
    int | None,
    typer.Option(
        "--inspect-every", metavar="UPDATES", min=1, help="Figures of every level of the network; train.inspect_every."
    ),
]
Root = Annotated[Path | None, typer.Option("--root", help="Folder that the manifest's paths start from.")]
FORMAT_HELP = "DICOM: seg, labelmap, rtstruct, sr, capture; nifti, nrrd (3D Slicer), stl, gltf, overlay (PNG)."
Formats = Annotated[str, typer.Option("--as", metavar="FORMAT,...", help=FORMAT_HELP)]
SeriesUid = Annotated[str | None, typer.Option("--series", help="Which series, where a DICOM folder holds several.")]
AnySeries = Annotated[
    str | None, typer.Option("--series", help="Which series, where a DICOM folder holds several; all: each is a study.")
]
ResampleUneven = Annotated[
    bool, typer.Option("--resample-uneven", help="Interpolate DICOM slices with uneven gaps instead of refusing them.")
]
MaxMemory = Annotated[
    str | None,
    typer.Option(
        "--max-memory",
        metavar="SIZE",
        help="As 6GB: what may be held in all; default: 80 % of what is free. Results are the same.",
    ),
]
Explain = Annotated[
    bool, typer.Option("--explain", help="Say what memory each study will take, and stop: nothing is segmented.")
]
Backend = Annotated[
    str, typer.Option("--backend", metavar="NAME", help="What runs the network; a name that is none lists them.")
]
Step = Annotated[
    float | None,
    typer.Option("--step", min=0.1, max=1.0, help="Distance of windows, of a window's side; default: the model's."),
]
Uncertainty = Annotated[
    bool,
    typer.Option("--uncertainty", help="Write maps of where the model is unsure, and which studies to look at first."),
]
KeepScores = Annotated[
    int,
    typer.Option("--keep-scores", metavar="K", min=0, help="Keep each voxel's K likeliest classes, to decide again."),
]
PostProcess = Annotated[
    bool, typer.Option("--postprocessing/--no-postprocessing", help="Do what the cross-validation found to help.")
]
SkipAir = Annotated[
    bool,
    typer.Option("--skip-air/--no-skip-air", help="Skip dark windows if the model's held-out cases kept every label."),
]
Smooth = Annotated[int, typer.Option("--smooth", metavar="ROUNDS", min=0, help="Rounds of smoothing of meshes.")]
Deidentify = Annotated[
    bool, typer.Option("--deidentify", help="Remove the patient's identity from the results (PS3.15 basic profile).")
]
DeidentifySource = Annotated[
    bool, typer.Option("--deidentify-source", help="The same, with copies of the DICOM source in NAME.source.")
]
KeyFile = Annotated[
    Path | None, typer.Option("--key", help="File of the key for pseudonyms, made if missing; default: a new key.")
]


class Runner(Enum):
    """Where folds run."""

    local = "local"
    ray = "ray"


@app.callback(invoke_without_command=True)
def _volseg(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the trace of an error.")] = False,
) -> None:
    if version:
        from importlib.metadata import version as installed

        print(f"volseg {installed('volseg')}")
        raise typer.Exit


@app.command()
def check(
    manifest: Annotated[Path, typer.Argument(help="Manifest, MSD dataset.json or nnU-Net raw folder.")],
    root: Root = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything found as JSON.")] = None,
    workers: Annotated[int, typer.Option("--workers", min=1, help="Cases read at a time.")] = 2,
) -> None:
    """Open every file of a dataset and report every fault of every case; exit code 1 if there is any."""
    from pipeline.cli_stages import check_manifest

    if not check_manifest(manifest, root, json_file=json_file, workers=workers, console=_console()):
        raise typer.Exit(1)


@app.command()
def plan(
    config: ConfigFile,
    sets: Sets = None,
    out: Annotated[Path | None, typer.Option("--out", help="Write the plan as JSON.")] = None,
) -> None:
    """Measure the training cases and derive every size, each with its reason."""
    from pipeline.cli_stages import show_plan

    show_plan(_load(config, sets), out, _console())


@app.command()
def train(
    config: ConfigFile,
    fold: Annotated[int, typer.Option("--fold", min=0, help="The fold to hold out.")],
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted training.")] = False,
    checkpoint_every: CheckpointEvery = None,
    inspect_every: InspectEvery = None,
    out: RunFolder = None,
    sets: Sets = None,
    devices: Annotated[
        int, typer.Option("--devices", metavar="N", min=1, help="Devices of each machine that share every batch.")
    ] = 1,
    nodes: Annotated[int, typer.Option("--nodes", metavar="M", min=1, help="Machines, under torchrun or SLURM.")] = 1,
) -> None:
    """Train on all folds but one, then predict and score the one held out."""
    from pipeline.cli_stages import train_one_fold

    train_one_fold(_load(config, _with(sets, checkpoint_every, inspect_every)), out, fold=fold, resume=resume,
                   devices=(devices, nodes), console=_console())  # fmt: skip


@app.command()
def crossval(
    config: ConfigFile,
    folds: Annotated[str | None, typer.Option("--folds", metavar="0,1,...", help="Which folds; default: all.")] = None,
    checkpoint_every: CheckpointEvery = None,
    inspect_every: InspectEvery = None,
    out: RunFolder = None,
    sets: Sets = None,
    parallel: Annotated[
        int | None,
        typer.Option("--parallel", metavar="K", min=1, help="Folds at a time, each with its share of GPUs or threads."),
    ] = None,
    threads: Annotated[
        int | None, typer.Option("--threads", metavar="N", min=1, help="CPU threads of each fold; default: its share.")
    ] = None,
    runner: Annotated[
        Runner, typer.Option("--runner", help="Where folds run: this machine, or a Ray cluster that shares --out.")
    ] = Runner.local,
    address: Annotated[
        str | None, typer.Option("--address", help="Of the Ray cluster: HOST:PORT, or auto; default: start one here.")
    ] = None,
) -> None:
    """Run the folds that aren't finished yet and score all out-of-fold predictions together."""
    from pipeline.cli_stages import Where, run_folds

    if address and runner is not Runner.ray:
        raise typer.BadParameter("only with --runner ray", param_hint="--address")
    where, wanted = Where(runner.value, parallel, threads, address), _numbers(folds)
    wanted_config = _load(config, _with(sets, checkpoint_every, inspect_every))
    run_folds(wanted_config, out, folds=wanted, where=where, console=_console())


@app.command()
def predict(
    model: Annotated[Path, typer.Argument(help="A model bundle or a run folder (its folds are averaged).")],
    inputs: Annotated[
        list[str],
        typer.Argument(metavar="INPUT...", help="Files, folders, DICOM folders, manifests; or an archive."),
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder of the results, each named after its input.")],
    mirror: Annotated[bool | None, typer.Option("--mirror/--no-mirror", help="Average over mirrored passes.")] = None,
    formats: Formats = "nifti",
    series: AnySeries = None,
    root: Root = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")] = "auto",
    force: Annotated[bool, typer.Option("--force", help="Replace results that are there.")] = False,
    resample_uneven: ResampleUneven = False,
    study: Annotated[str | None, typer.Option("--study", help="StudyInstanceUID, where INPUT is an archive.")] = None,
    send: Annotated[bool, typer.Option("--send", help="Send verified DICOM results back to the archive.")] = False,
    credentials: CredentialsFile = None,
    keyring: KeyringUser = None,
    aet: Aet = "VOLSEG",
    receive_port: ReceivePort = None,
    deidentify: Deidentify = False,
    deidentify_source: DeidentifySource = False,
    key: KeyFile = None,
    smooth: Smooth = 0,
    max_memory: MaxMemory = None,
    explain: Explain = False,
    backend: Backend = "torch",
    step: Step = None,
    uncertainty: Uncertainty = False,
    keep_scores: KeepScores = 0,
    postprocessing: PostProcess = True,
    skip_air: SkipAir = True,
) -> None:
    """Segment volumes, or a study of an archive; results lie on the grid of their source."""
    from pipeline.cli_pacs import predict_study
    from pipeline.cli_stages import Prediction, Removal, predict_inputs
    from pipeline.pacs.node import is_node

    removal = Removal(deidentify, deidentify_source, key)
    wanted = Prediction(tuple(_names(formats)), mirror, series, root, device, force, resample_uneven, removal, smooth,
                        max_memory, explain, backend, step, uncertainty, keep_scores, postprocessing,
                        skip_air)  # fmt: skip
    if any(map(is_node, inputs)):
        if explain:
            raise typer.BadParameter("not for a study of an archive; fetch it first", param_hint="--explain")
        if removal != Removal():
            raise typer.BadParameter("not for a study of an archive; fetch it, then predict", param_hint="--deidentify")
        if len(inputs) > 1:
            raise typer.BadParameter("one archive at a time, and nothing beside it", param_hint="INPUT")
        reach = Reach(credentials, keyring, aet, receive_port)
        done = predict_study(model, inputs[0], out, wanted, study=study, sends=send, reach=reach)
    elif study or send:
        raise typer.BadParameter("only where INPUT is the address of an archive", param_hint="--study, --send")
    else:
        done = predict_inputs(model, [Path(text) for text in inputs], out, wanted, _console()).is_complete
    if not done:
        raise typer.Exit(1)


@app.command()
def evaluate(
    predictions: Annotated[Path, typer.Argument(metavar="PRED", help="A label map, or a folder of them.")],
    references: Annotated[Path, typer.Argument(metavar="REF", help="A label map, a folder, or a manifest.")],
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the report as JSON.")] = None,
    csv_file: Annotated[Path | None, typer.Option("--csv", help="Write one row a case and label.")] = None,
    html_file: Annotated[Path | None, typer.Option("--html", help="Write a page with figures and every case.")] = None,
    root: Root = None,
    allow_missing: Annotated[bool, typer.Option("--allow-missing", help="Score what is there.")] = False,
    tolerances: Annotated[
        list[str] | None,
        typer.Option(
            "--tolerance", metavar="[LABEL=]MM", help="Of the surface Dice, of all labels or one. [default: 2]"
        ),
    ] = None,
    lesions: Annotated[
        list[str] | None, typer.Option("--lesions", metavar="LABEL", help="Count this label lesion by lesion.")
    ] = None,
) -> None:
    """Dice, surface distances and volumes per case and label, with worst cases and bootstrap 95 % intervals."""
    from pipeline.cli_evaluate import Wishes, evaluate_paths

    wishes = Wishes(json_file, csv_file, html_file, tolerances or (), lesions or (), allow_missing)
    if not evaluate_paths(predictions, references, root, wishes=wishes, console=_console()):
        raise typer.Exit(1)


@app.command()
def export(
    labels: Annotated[Path, typer.Argument(metavar="LABELS", help="A label map on the grid of its source.")],
    source: Annotated[Path, typer.Option("--source", help="The image, or the DICOM folder, that was segmented.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the results.")],
    formats: Formats = "seg",
    schema: Annotated[
        Path | None, typer.Option("--schema", help="Manifest or labels.json; default: labels.json beside LABELS.")
    ] = None,
    series: SeriesUid = None,
    resample_uneven: ResampleUneven = False,
    deidentify: Deidentify = False,
    deidentify_source: DeidentifySource = False,
    key: KeyFile = None,
    smooth: Smooth = 0,
) -> None:
    """Write a label map in other formats; each is read back and compared before it is called done."""
    from pipeline.cli_stages import Removal, export_labels

    export_labels(labels, source, out, formats=_names(formats), schema=schema, series=series,
                  resample_uneven=resample_uneven, smoothing=smooth,
                  removal=Removal(deidentify, deidentify_source, key), console=_console())  # fmt: skip


@app.command()
def view(
    result: Annotated[Path, typer.Argument(metavar="RESULT", help="A label map, a DICOM SEG, or a folder of predict.")],
    image: Annotated[
        Path | None, typer.Option("--image", help="The image; default: the one that RESULT was made from.")
    ] = None,
    schema: Annotated[
        Path | None, typer.Option("--schema", help="Manifest or labels.json; default: labels.json beside RESULT.")
    ] = None,
    series: SeriesUid = None,
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port on loopback; 0: any free one.")] = 0,
    opens_browser: Annotated[bool, typer.Option("--open/--no-open", help="Open the page in the browser.")] = True,
) -> None:
    """Look at a result in the browser: three planes and 3D; served on this machine only, until Ctrl-C."""
    from pipeline.cli_view import view_result

    view_result(result, image=image, schema=schema, series=series, port=port, opens_browser=opens_browser)


@app.command()
def info(
    path: Annotated[Path, typer.Argument(help="A volume, a DICOM folder, a manifest, a model or a run.")],
    resample_uneven: ResampleUneven = False,
) -> None:
    """Say what a file or folder is."""
    from pipeline.cli_stages import describe

    describe(path, resample_uneven=resample_uneven)


@app.command("config")
def config_reference() -> None:
    """Print every key that a config may have, with its default and meaning."""
    from pipeline.config import reference

    print(reference(), end="")


app.command("compare")(compare_runs)
app.command("inspect")(inspect_network)
app.command("postprocess")(choose_postprocessing)
app.command("report")(write_page)
app.command("promote")(promote_run)
app.command("runs")(list_tracked)

INTERRUPTED = 130


def main() -> None:
    """The console script. Exit codes: 0 done, 1 an error in one line, 2 wrong usage, 130 interrupted."""
    arguments = sys.argv[1:]
    if "--debug" in arguments:
        app([a for a in arguments if a != "--debug"])
        return
    from pipeline.errors import VolsegError

    try:
        app(arguments)
    except VolsegError as error:
        _fail(f"error: {error}", 1)
    except (KeyboardInterrupt, SystemExit) as stop:
        # typer turns an interrupt into an exit of its own, without a word.
        if isinstance(stop, SystemExit) and stop.code != INTERRUPTED:
            raise
        _fail("interrupted; finished parts are kept, and an unfinished training goes on with --resume", INTERRUPTED)
    except BrokenPipeError:
        _fail("", 1)
    except OSError as error:
        _fail(f"error: {error.filename or 'a file'}: {(error.strerror or str(error)).lower()}", 1)
    except MemoryError:
        _fail("error: not enough memory; close other programs, or lower plan.memory_gb for a training", 1)
    except Exception as error:  # No trace, and no text that might quote a header, whatever was overlooked here.
        _fail(f"error: unexpected {type(error).__name__}; this is a fault of volseg, --debug shows where", 1)


def _fail(message: str, code: int) -> NoReturn:
    _close_console()
    if message:
        print(" ".join(message.split()), file=sys.stderr)
    sys.exit(code)


_open_consoles: list[TerminalConsole] = []


def _console() -> TerminalConsole:
    from pipeline.cli_console import TerminalConsole

    _open_consoles.append(TerminalConsole())
    return _open_consoles[-1]


def _close_console() -> None:
    for console in _open_consoles:
        console.close()


def _load(config: Path, sets: Sequence[str] | None) -> Config:
    from pipeline.config import load_config

    return load_config(config, sets or ())


def _with(sets: Sequence[str] | None, checkpoint_every: float | None, inspect_every: int | None) -> list[str]:
    """The options are config values under names of their own."""
    named = {"checkpoint_minutes": checkpoint_every, "inspect_every": inspect_every}
    return [*(sets or ()), *(f"train.{key}={value}" for key, value in named.items() if value is not None)]


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _numbers(text: str | None) -> list[int] | None:
    if text is None:
        return None
    if not all(part.isdigit() for part in _names(text)) or not _names(text):
        raise typer.BadParameter(f"'{text}' is not a list of folds, as 0,1,2", param_hint="--folds")
    return [int(part) for part in _names(text)]


if __name__ == "__main__":
    main()
