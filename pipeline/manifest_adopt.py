"""A manifest for a dataset that describes itself by a dataset.json (MSD, nnU-Net raw), with what that cannot say.

Those formats know no patients, no channels that a case may lack, and no folds beside their files. Nothing is copied:
the manifest names the files where they lie. nnU-Net's splits_final.json is a list with one object a fold, each with
the case names under `train` and `val` (documentation/manual_data_splits.md of its repository).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import ManifestError
from pipeline.files import safe_name
from pipeline.manifest import Dataset, load_dataset, parse_manifest
from pipeline.manifest_build import PatientRule, patients_of
from pipeline.manifest_formats import AS_DECLARED, Stated, named, refuse_all

_EXPECTED = 'expected nnU-Net\'s list of folds, each {"train": [cases], "val": [cases]}, as in its splits_final.json'


def describes_itself(path: Path) -> bool:
    """Whether a path is a dataset.json, or a folder with one."""
    return (path.is_file() and path.suffix == ".json") or (path / "dataset.json").is_file()


def adopt_dataset(
    path: Path,
    *,
    name: str | None = None,
    stated: Stated = AS_DECLARED,
    patients: PatientRule | None = None,
    splits: Path | None = None,
) -> Dataset:
    """The dataset with patients by the given rule (by default each case its own) and folds as in `splits`.

    Raises:
        ManifestError: as `load_dataset`, a rule that does not cover every case, or splits that are not of it.
    """
    dataset = load_dataset(path, stated=stated)
    document = dataset.manifest.model_dump(mode="json")
    files = {case.case_id: {n: dataset.root / f for n, f in case.images.items()} for case in dataset.manifest.cases}
    patient_of = {} if patients is None else patients_of(files, dataset.root, patients)
    fold_of = {} if splits is None else read_splits(splits, list(files))
    for case in document["cases"]:
        case["patient_id"] = patient_of.get(case["case_id"], case["patient_id"])
        case["fold"] = fold_of.get(case["case_id"])
    manifest = parse_manifest({**document, "name": name or document["name"]}, source=str(path))
    return Dataset(manifest=manifest, root=dataset.root)


def read_splits(path: Path, case_ids: Sequence[str]) -> dict[str, int]:
    """The fold that holds each case out, of nnU-Net's splits_final.json.

    Raises:
        ManifestError: not such a file, cases that are not of the dataset, held out twice or never, or a fold that
            does not train on all that it does not hold out, which a manifest cannot say.
    """
    known = set(case_ids)
    fold_of: dict[str, int] = {}
    problems: dict[str, list[str]] = {"cases that are not in the dataset": [], "cases that two folds hold out": []}
    for fold, split in enumerate(_splits(path)):
        held_out, trained = (set(map(safe_name, split[key])) for key in ("val", "train"))
        problems["cases that are not in the dataset"] += sorted((held_out | trained) - known)
        problems["cases that two folds hold out"] += sorted(held_out & fold_of.keys())
        fold_of.update(dict.fromkeys(held_out, fold))
        if trained != known - held_out and trained | held_out <= known:
            others = sorted((known - held_out) ^ trained)
            raise ManifestError(
                f"{path}: fold {fold} does not train on exactly the cases that it does not hold out (such as "
                f"{named(others[:3])}), which a manifest cannot say; leave --splits out or mend the file"
            )
    problems["cases that no fold holds out"] = sorted(known - set(fold_of))
    refuse_all({what: sorted(set(names)) for what, names in problems.items()}, str(path))
    return fold_of


def _splits(path: Path) -> list[Mapping[str, list[str]]]:
    try:
        document: Any = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise ManifestError(f"{path}: cannot be read as JSON ({type(error).__name__})") from error
    except RecursionError as error:
        raise ManifestError(f"{path}: lists or objects are nested too deeply to be read; {_EXPECTED}") from error
    well_formed = isinstance(document, list) and document
    if not well_formed or not all(_is_split(split) for split in document):
        raise ManifestError(f"{path}: {_EXPECTED}")
    return list(document)


def _is_split(split: Any) -> bool:
    return isinstance(split, dict) and all(
        isinstance(split.get(key), list) and all(isinstance(case, str) for case in split[key])
        for key in ("train", "val")
    )
