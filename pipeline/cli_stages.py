"""What each subcommand does: call its stage, show its values. No arithmetic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.cli_console import TerminalConsole, show_table
from pipeline.cli_evaluate import show_report
from pipeline.errors import ConfigError, VolumeError
from pipeline.files import write_json, write_text

if TYPE_CHECKING:
    from pipeline.config import Config
    from pipeline.console import Console
    from pipeline.crossval import FoldRunner
    from pipeline.export import ExportedFile
    from pipeline.export.confidentiality import Confidentiality
    from pipeline.failures import Failure
    from pipeline.plan import Plan
    from pipeline.predict import Model
    from pipeline.report_values import Report
    from pipeline.runs import Run


def check_manifest(
    manifest: Path, root: Path | None, *, json_file: Path | None, workers: int, console: TerminalConsole
) -> bool:
    """`volseg check`; True when nothing is wrong."""
    from pipeline.checks import check_dataset
    from pipeline.manifest import load_dataset

    dataset = load_dataset(manifest, root)
    report = check_dataset(
        dataset, workers=workers, on_progress=lambda done, total: console.progress("checking", done, total)
    )
    console.close()
    rows = [
        {"": f.severity, "case": f.case_id or "(all)", "file": f.file or "", "fault": f.kind, "what": f.message}
        for f in report.faults
    ]
    show_table(f"{report.dataset}: faults", rows)
    if json_file:
        write_json(json_file, report.to_json())
    errors = sum(f.severity == "error" for f in report.faults)
    tell_channels(report.channel_counts, report.case_count)
    print(f"{report.dataset}: {report.case_count} cases, {_count(errors, 'error')}, "
          f"{_count(len(report.faults) - errors, 'note')}")  # fmt: skip
    return report.ok


def tell_channels(counts: Mapping[str, int], case_count: int) -> None:
    """How many cases have each channel, where some lack one."""
    if any(count < case_count for count in counts.values()):
        print(f"channels: {', '.join(f'{name} in {count} of {case_count} cases' for name, count in counts.items())}")


def show_plan(config: Config, out: Path | None, console: TerminalConsole) -> None:
    """`volseg plan`."""
    from pipeline.runs import plan_dataset

    _, report, _, plan = plan_dataset(config, console)
    console.close()
    for fault in report.faults:
        if fault.severity == "error":
            console.note(f"not planned with: {fault.case_id or 'dataset'}: {fault.message}")
    show_table(f"plan for {report.dataset}", _plan_rows(plan))
    for warning in plan.warnings:
        print(f"warning: {warning}")
    if out:
        write_text(out, plan.model_dump_json(indent=2) + "\n")
        print(f"written to {out}")


def train_one_fold(
    config: Config,
    out: Path | None,
    *,
    fold: int,
    resume: bool,
    devices: tuple[int, int],
    console: TerminalConsole,
) -> None:
    """`volseg train`; `devices` are those of each machine, and the number of machines."""
    from pipeline.checkpoint import discard_checkpoints
    from pipeline.runs import open_run, read_done, send_leftovers

    def opened(teller: Console) -> Run:
        return open_run(config, out or config.runs / config.name, teller, wanted=[fold])

    if devices == (1, 1):
        run, report = _train_alone(opened(console), fold, console, resume=resume)
    else:
        from pipeline.device import choose_hardware
        from pipeline.runners.joined import train_together, with_devices

        hardware = with_devices(choose_hardware(config.train), *devices)
        together = train_together(opened, fold, console, hardware=hardware, resume=resume)
        if together is None:
            return
        run, report = together
    folder = run.fold_folder(fold)
    if report is None:
        discard_checkpoints(folder)  # where a kill came between the fold's end and this
        send_leftovers(run, console)
        console.note(f"fold {fold} is finished already ({read_done(folder)['steps']} steps); choose another --out")
    else:
        console.close()
        show_report(f"fold {fold}, held-out cases", report)
    print(f"model: {folder / 'bundle'}\nreport: {folder / 'report.json'}")
    if (folder / "inspection").is_dir():
        print(f"levels of the network: {folder / 'inspection' / 'overview.png'}")
    _show_tracking(config)


def _train_alone(run: Run, fold: int, console: TerminalConsole, *, resume: bool) -> tuple[Run, Report | None]:
    from pipeline.checkpoint import has_checkpoint
    from pipeline.crossval import train_fold
    from pipeline.runs import open_run_tracker

    if run.is_done(fold):
        return run, None
    if resume and not has_checkpoint(run.fold_folder(fold)):
        console.note(f"{run.fold_folder(fold)}: there is no checkpoint to go on from; the training begins")
    with open_run_tracker(run, console, fold=None):
        return run, train_fold(run, fold, console, resume=resume)


@dataclass(frozen=True)
class Where:
    """The options of `volseg crossval` that say where folds run, and with how much of it."""

    runner: str = "local"
    parallel: int | None = None
    threads: int | None = None
    address: str | None = None

    def fold_runner(self) -> FoldRunner:
        """What `cross_validate` is given."""
        if self.runner == "ray":
            from pipeline.runners.ray import on_ray

            return on_ray(self.address, parallel=self.parallel, threads=self.threads)
        if self.parallel is None or self.parallel == 1:
            from pipeline.crossval import one_after_another

            return one_after_another
        import torch

        from pipeline.runners.local import side_by_side

        return side_by_side(self.parallel, threads=torch.get_num_threads())

    def set_threads(self, fold_count: int) -> None:
        """What a fold will have, from now on: it is planned for, and trained with where folds run in this process."""
        import torch

        at_a_time = min(self.parallel or 1, fold_count) if self.runner == "local" else 1
        torch.set_num_threads(self.threads or max(1, torch.get_num_threads() // at_a_time))


def run_folds(
    config: Config, out: Path | None, *, folds: list[int] | None, where: Where, console: TerminalConsole
) -> None:
    """`volseg crossval`."""
    from pipeline.crossval import cross_validate
    from pipeline.runs import open_run

    where.set_threads(len(folds or ()) or config.folds.count)
    run = open_run(config, out or config.runs / config.name, console, wanted=folds or ())
    wanted = list(range(run.folds.count)) if folds is None else folds
    report = cross_validate(run, wanted, console, runner=where.fold_runner())
    console.close()
    show_report("out of fold", report)
    print(f"model: {run.folder} (its folds are averaged by `volseg predict`)\nreport: {run.folder / 'report.json'}")
    _show_tracking(config)


@dataclass(frozen=True)
class Removal:
    """The options that remove identity from exports."""

    deidentify: bool = False
    copies_source: bool = False
    key_file: Path | None = None

    def confidentiality(self) -> Confidentiality | None:
        """What exports are given."""
        from pipeline.export.confidentiality import chosen

        return chosen(deidentify=self.deidentify, copies_source=self.copies_source, key_file=self.key_file)


NO_REMOVAL = Removal()


@dataclass(frozen=True)
class Prediction:
    """The options of `volseg predict`."""

    formats: tuple[str, ...]
    mirror: bool | None
    series: str | None
    root: Path | None
    device: str
    force: bool
    resample_uneven: bool = False
    removal: Removal = NO_REMOVAL
    smoothing: int = 0
    max_memory: str | None = None
    explain: bool = False
    backend: str = "torch"
    tile_step: float | None = None
    uncertainty: bool = False
    keep_scores: int = 0
    postprocess: bool = True
    skip_air: bool = True


@dataclass(frozen=True)
class Predicted:
    """What became of the inputs: names of the studies that are done, written now or kept, and whether these are all."""

    done: tuple[str, ...]
    is_complete: bool


def predict_inputs(
    model_path: Path, inputs: Sequence[Path], out: Path, wanted: Prediction, console: TerminalConsole
) -> Predicted:
    """`volseg predict`."""
    from pipeline.export import check_formats
    from pipeline.memory_size import bytes_of
    from pipeline.segment import SegmentSettings, explain_studies, segment_studies
    from pipeline.studies import Wanted, find_studies

    check_formats(wanted.formats)
    limit_bytes = None if wanted.max_memory is None else bytes_of(wanted.max_memory, "--max-memory")
    model = _load_model(model_path, wanted)
    meant = Wanted(model.plan.channels, wanted.root, wanted.series, wanted.resample_uneven)
    studies = find_studies(inputs, meant, console=console)
    settings = SegmentSettings(
        *(wanted.formats, wanted.mirror, wanted.series, wanted.force, wanted.resample_uneven),
        confidentiality=wanted.removal.confidentiality(),
        smoothing=wanted.smoothing,
        max_memory_bytes=limit_bytes,
        tile_step=wanted.tile_step,
        backend=wanted.backend,
        uncertainty=wanted.uncertainty,
        keep_scores=wanted.keep_scores,
        postprocess=wanted.postprocess,
        skip_air=wanted.skip_air,
    )
    if wanted.explain:
        plans, failures = explain_studies(model, studies, settings=settings)
        for name, plan in plans:
            print("\n  ".join((name, *plan.lines())))
    else:
        written, failures = segment_studies(model, studies, out, settings=settings, console=console)
        console.close()
        for file in written:
            _tell(file)
        if wanted.uncertainty:
            from pipeline.cli_scores import tell_quality

            tell_quality(out)
    is_complete = _tell_set_aside(failures, len(studies), "explained" if wanted.explain else "segmented", console)
    aside = {failure.case_id for failure in failures}
    return Predicted(tuple(study.name for study in studies if study.name not in aside), is_complete)


def _load_model(path: Path, wanted: Prediction) -> Model:
    from pipeline.bundle import find_bundles, load_bundle
    from pipeline.config import TrainConfig
    from pipeline.device import choose_hardware
    from pipeline.predict import Model

    if wanted.device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"--device {wanted.device}: expected auto, cpu or cuda")
    device = choose_hardware(TrainConfig.model_validate({"device": wanted.device})).torch_device()
    bundles = [load_bundle(bundle, device) for bundle in find_bundles(path)]
    if wanted.backend != "torch":
        from pipeline.backends import with_backend

        bundles = [with_backend(bundle, wanted.backend) for bundle in bundles]
    model = Model(tuple(bundles))
    if wanted.backend == "openvino-int8":
        own = wanted.mirror in (None, model.mirror), wanted.tile_step in (None, model.tile_step)
        if not all(own):
            raise ConfigError(
                "--backend openvino-int8: proven with the model's own passes and windows alone; leave out --mirror, "
                "--no-mirror and --step, or use another backend"
            )
    return model


def _tell_set_aside(failures: Sequence[Failure], study_count: int, done: str, console: TerminalConsole) -> bool:
    """True when there was nothing to tell."""
    if len(failures) == study_count == 1:
        raise VolumeError(failures[0].reason)
    for failure in failures:
        console.note(f"set aside {failure.case_id}: {failure.reason}")
    if failures:
        rest = f"nothing was {done}" if len(failures) == study_count else "the others are done"
        console.note(f"{len(failures)} of {study_count} studies were set aside, {rest}")
    return not failures


def export_labels(
    labels: Path,
    source: Path,
    out: Path,
    *,
    formats: Sequence[str],
    schema: Path | None,
    series: str | None,
    resample_uneven: bool = False,
    removal: Removal = NO_REMOVAL,
    smoothing: int = 0,
    console: Console,
) -> None:
    """`volseg export`."""
    import numpy as np

    from pipeline.evaluate import require_nameless_labels
    from pipeline.export import Options, export
    from pipeline.manifest_formats import volume_stem
    from pipeline.segment import schema_for
    from pipeline.segmentation import Algorithm, Segmentation
    from pipeline.sources import read_source
    from transforms.labels import require_ids, schema_from_names
    from transforms.volume import read_label

    found = read_label(labels)
    require_ids(found.voxels, labels)
    known = schema_for(labels, schema)
    if known is None:
        require_nameless_labels(found, labels, advice="name them by --schema or labels.json beside LABELS")
        console.note("no labels.json beside LABELS: labels are called by their numbers; give --schema")
        known = schema_from_names({int(i): f"label {i}" for i in np.unique(found.voxels) if i != 0} or {1: "label 1"})
    given = read_source(source, series=series, resample_uneven=resample_uneven)
    # A value that the schema does not know is refused as it is, not as what is left of it in a byte.
    dtype = np.uint8 if max(*known.ids, int(found.voxels.max())) <= 255 else np.uint16
    segmentation = Segmentation(
        found.voxels.astype(dtype), found.geometry, known, Algorithm("label map given to volseg export", "")
    )
    options = Options(smoothing=smoothing, confidentiality=removal.confidentiality())
    name = volume_stem(labels)
    for file in export(segmentation, formats=formats, out=out, name=name, source=given, options=options):
        _tell(file)


def _tell(file: ExportedFile) -> None:
    verified = "" if file.verification is None else "  (read back and compared: the same)"
    print(f"{file.path}{verified}")


def describe(path: Path, *, resample_uneven: bool = False) -> None:
    """`volseg info`."""
    from pipeline.describe import facts_of

    title, rows = facts_of(path, resample_uneven=resample_uneven)
    show_table(title, rows)


def _plan_rows(plan: Plan) -> list[dict[str, Any]]:
    unet = plan.unet
    values: dict[str, str] = {
        "median_shape": "",
        "spacing_mm": _times(plan.spacing_mm),
        "patch_shape": _times(plan.patch_shape),
        "batch_size": str(plan.batch_size),
        "stages": str(unet.stages),
        "features": ", ".join(map(str, unet.features)),
        "checkpointing": "on" if unet.checkpointing else "off",
        "mirror_axes": ", ".join("xyz"[a] for a in plan.mirror_axes) or "none",
    }
    rows = [{"what": key, "value": values.get(key, ""), "why": reason} for key, reason in plan.reasons.items()]
    seen = f"largest labels reach {_times(plan.largest_label_extent_mm)} mm"
    rows.append({"what": "bottleneck sees", "value": f"{_times(plan.receptive_field_mm)} mm", "why": seen})
    cost = f"{plan.patch_gflop:g} GFLOP forward a patch"
    return [*rows, {"what": "memory", "value": f"{plan.memory_gb:.2f} GB", "why": f"estimated for a step; {cost}"}]


def _show_tracking(config: Config) -> None:
    from pipeline.runs import tracking_uri
    from pipeline.tracking import page_address, page_command

    if config.tracking.enabled:
        uri = tracking_uri(config)
        print(f"runs in MLflow: {page_command(uri)}\nand then open: {page_address(uri)}")


def _times(values: Sequence[float]) -> str:
    return " x ".join(f"{v:g}" for v in values)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
