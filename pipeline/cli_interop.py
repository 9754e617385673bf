"""`volseg import` and `volseg bundle`: models from elsewhere, and models for elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.interop.exporting import EXPORTERS, export_model

import_app = typer.Typer(help="Models that others trained.", no_args_is_help=True, rich_markup_mode=None)
bundle_app = typer.Typer(help="Trained models as bundles.", no_args_is_help=True, rich_markup_mode=None)

Out = Annotated[Path, typer.Option("--out", help="What to write; with several folds a run folder, else a bundle.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what is there.")]


@import_app.callback()
def _import() -> None:
    """Models that others trained."""


@bundle_app.callback()
def _bundle() -> None:
    """Trained models as bundles."""


@import_app.command("nnunet")
def import_nnunet_model(
    folder: Annotated[Path, typer.Argument(help="A trained model: plans.json, dataset.json and fold_* in it.")],
    out: Out,
    folds: Annotated[
        str | None, typer.Option("--folds", metavar="0,1,...", help="Which folds, or all; default: those there are.")
    ] = None,
    configuration: Annotated[
        str | None, typer.Option("--configuration", help="As 3d_fullres, where several were trained.")
    ] = None,
    as_planned: Annotated[
        bool, typer.Option("--as-planned", help="A trainer that is not nnU-Net's own builds the network of the plans.")
    ] = False,
    force: Force = False,
) -> None:
    """Turn a trained nnU-Net v2 model into a bundle, or into one a fold."""
    from pipeline.describe import facts_of
    from pipeline.interop.nnunet_import import import_nnunet

    chosen = None if folds is None else tuple(folds.split(","))
    bundles = import_nnunet(folder, out, folds=chosen, configuration=configuration, as_planned=as_planned, force=force)
    title, rows = facts_of(bundles[0])
    print(title)
    for row in rows:
        print(f"  {row['what']}: {row['value']}")
    for bundle in bundles:
        print(bundle)


@import_app.command("monai")
def import_monai_bundle(
    folder: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A MONAI bundle: configs/ and models/ in it.")],
    out: Out,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=JSON", help="A value in place of the configuration's, as pixdim=[1,1,1]."),
    ] = None,
    leave_out: Annotated[
        list[str] | None, typer.Option("--leave-out", metavar="TRANSFORM", help="Do without this transform.")
    ] = None,
    nested: Annotated[
        str | None, typer.Option("--nested", metavar="NAME,...", help="Outputs that overlap, outermost first.")
    ] = None,
    force: Force = False,
) -> None:
    """Turn a MONAI bundle into a bundle of volseg; no code in it is run."""
    from pipeline.describe import facts_of
    from pipeline.interop.monai_import import ImportChoices, import_monai

    outputs = tuple(name.strip() for name in nested.split(",")) if nested else ()
    choices = ImportChoices(tuple(overrides or ()), tuple(leave_out or ()), outputs)
    title, rows = facts_of(import_monai(folder, out, choices=choices, force=force))
    print(title)
    for row in rows:
        print(f"  {row['what']}: {row['value']}")
    print(out)


@bundle_app.command("export")
def export_bundle(
    model: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle, or a run folder.")],
    to: Annotated[str, typer.Option("--to", metavar="FORMAT", help=", ".join(EXPORTERS) + ".")],
    out: Annotated[Path, typer.Option("--out", help="The file or folder to write.")],
    force: Force = False,
) -> None:
    """Write a model in another format, and compare it with the bundle's own output."""
    for line in export_model(model, out, to=to, force=force):
        print(line)


@bundle_app.command("quantise")
def quantise_bundle(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A bundle, or a run folder.")],
    inputs: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[INPUT]...",
            help="Images to calibrate on and to prove it on, as for predict; of a manifest with labels the Dice is "
            "compared. Default: the training cases of the model's own run, and its held-out ones.",
        ),
    ] = None,
    root: Annotated[Path | None, typer.Option("--root", help="Folder that the manifest's paths start from.")] = None,
) -> None:
    """Put a network in eight bits into a model, for `predict --backend openvino-int8`.

    Only if cases prove it: their mean Dice falls by at most 0.002; without references, at most 3 % of the labelled
    voxels get another label.
    """
    from pipeline.backends.int8_proof import quantise
    from pipeline.cli_console import TerminalConsole

    console = TerminalConsole()
    for folder, evidence in quantise(model, inputs or [], root=root, console=console):
        console.close()
        print(f"{folder}: {evidence.sentence}")
    print("use it with: volseg predict MODEL INPUT --out FOLDER --backend openvino-int8")
