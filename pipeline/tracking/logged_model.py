"""A model in MLflow: its files, its signature, what it was measured at, and its versions in the registry."""

from __future__ import annotations

import json
import re
import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from mlflow import MlflowClient, MlflowException
from mlflow.entities import LoggedModelOutput, Metric
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema, TensorSpec
from mlflow.utils.mlflow_tags import MLFLOW_MODEL_VERSIONS

from pipeline.files import sha256_of_folders
from pipeline.tracking.delivery import Refused
from pipeline.tracking.journal import Fact
from pipeline.tracking.store_uri import is_embedded
from pipeline.tracking.texts import as_key, shortened

_BUNDLE_TAG, _RESULT_TAG = "volseg.bundle_sha256", "result"

TIME_TAG = "volseg.told_ms"
"""When a model was last said to be its run's, in Unix time: one may be so again after another was."""

_SHOWN = ("patch_shape", "spacing_mm", "channels", "labels")
_TOLD = {"name", "paths", "sha256", "metrics", "step", "register_as", "result", *_SHOWN}
_EXAMPLE = "study.nii.gz"
_MOST_PARAM = 500

Ids = Mapping[str, str]


def log_model(client: MlflowClient, ids: Ids, fact: Fact, *, run_folder: Path) -> None:
    """Have a model in MLflow, tied to its run, and in the registry if it is wanted there. Once more changes nothing.

    Its files are those of now: where they were changed after the fact was noted, the model goes by their digest.

    Raises:
        Refused: a bundle is gone, or another version of volseg told of it in other words.
    """
    body = fact.body
    if not body.keys() >= _TOLD:
        raise Refused("another version of volseg wrote this; run the same command again with this one")
    for path in body["paths"]:
        if not (run_folder / path).is_dir():
            raise Refused(f"{run_folder / path} is gone")
    with tempfile.TemporaryDirectory(prefix="volseg-model-") as name:
        folder = Path(name)
        copies = _write_files(folder, [run_folder / path for path in body["paths"]])
        fact = replace(fact, body={**body, "sha256": sha256_of_folders(copies)})
        model_id = _model_id(client, ids, fact)
        _mlmodel(model_id, ids, fact).save(str(folder / "MLmodel"))
        client.log_model_artifacts(model_id, str(folder))
    client.finalize_logged_model(model_id, "READY")
    client.set_logged_model_tags(model_id, {TIME_TAG: str(fact.time_ms), _RESULT_TAG: body["result"]})
    # MLflow fails where the two are tied together already.
    outputs = client.get_run(ids["run"]).outputs
    if model_id not in {output.model_id for output in (outputs.model_outputs if outputs else [])}:
        client.log_outputs(ids["run"], [LoggedModelOutput(model_id, step=body["step"])])
    points = [
        Metric(as_key(key), float(value), fact.time_ms, body["step"], model_id=model_id, run_id=ids["run"])
        for key, value in body["metrics"].items()
    ]
    client.log_batch(ids["run"], metrics=points)
    if body["register_as"]:
        register(client, body["register_as"], model_id, run_id=ids["run"])


def register(client: MlflowClient, name: str, model_id: str, *, run_id: str) -> int:
    """The number of the model's version of that name, which is made where there is none."""
    name = registered_name(name)
    logged = client.get_logged_model(model_id)
    # MLflow looks `models:/ID` up in the process's own store, which on a server is the right one.
    source = f"models:/{model_id}" if not is_embedded(client.tracking_uri) else logged.artifact_location
    for found in client.search_model_versions(f"name = '{name}'"):
        if found.source == source:
            # A kill may have come between the creation of the version and the note of it.
            return _noted(client, model_id, name, int(found.version))
    try:
        client.create_registered_model(name, description=_describe(logged.params))
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    made = client.create_model_version(
        name,
        source,
        run_id=run_id,
        description=logged.tags.get(_RESULT_TAG),
        model_id=model_id,
        await_creation_for=0,
    )
    return _noted(client, model_id, name, int(made.version))


def _noted(client: MlflowClient, model_id: str, name: str, number: int) -> int:
    """The version, which stands in the tag of its model by which the run's page finds it."""
    noted = json.loads(client.get_logged_model(model_id).tags.get(MLFLOW_MODEL_VERSIONS, "[]"))
    if (name, number) not in {(version["name"], int(version["version"])) for version in noted}:
        noted.append({"name": name, "version": number})
        client.set_logged_model_tags(model_id, {MLFLOW_MODEL_VERSIONS: json.dumps(noted)})
    return number


def _describe(params: Mapping[str, str]) -> str:
    """What the registry says of a model: what it is for and how it is asked."""
    return (
        f"Segments {params.get('labels', '')} on {params.get('channels', '')}.\n\n"
        "`predict(PATH)` takes the path of a study: an image file, a DICOM folder, or a folder of NAME_0000, NAME_0001 "
        "and so on for several channels; or a list of them, or a table with the column `path`. It gives label maps, or "
        'with `params={"out": FOLDER}` the paths of NIfTI files that are written there.\n\n'
        "`volseg promote RUN --if-better` moves the alias `champion`."
    )


def registered_name(text: str) -> str:
    """A name as the registry takes it and a `models:/` address can hold it."""
    return re.sub(r"[^\w .-]", "_", text).strip() or "model"


def _model_id(client: MlflowClient, ids: Ids, fact: Fact) -> str:
    body = fact.body
    for model in client.search_logged_models([ids["experiment"]], f"source_run_id = '{ids['run']}'"):
        if model.tags.get(_BUNDLE_TAG) == body["sha256"]:
            return str(model.model_id)
    model = client.create_logged_model(
        ids["experiment"],
        re.sub(r"[^\w -]", "_", body["name"]),
        source_run_id=ids["run"],
        tags={_BUNDLE_TAG: body["sha256"], _RESULT_TAG: body["result"]},
        params={key: _told(body[key]) for key in _SHOWN} | {"networks": str(len(body["paths"]))},
        model_type="segmentation",
    )
    return str(model.model_id)


def _told(values: list[Any]) -> str:
    text = ", ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)
    return shortened(text, _MOST_PARAM)


def _write_files(folder: Path, bundles: list[Path]) -> list[Path]:
    """The bundles, laid out as `pipeline.bundle.find_bundles` finds them, and what MLflow wants beside them.

    Gives the folders of the copies.
    """
    copies = [folder / "model" / f"fold_{number}" / "bundle" for number in range(len(bundles))]
    for bundle, copy in zip(bundles, copies, strict=True):
        shutil.copytree(bundle, copy)
    (folder / "requirements.txt").write_text(f"volseg=={version('volseg')}\n", encoding="utf-8")
    table = {"columns": ["path"], "data": [[_EXAMPLE]]}
    (folder / "input_example.json").write_text(json.dumps(table), encoding="utf-8")
    request = {"dataframe_records": [{"path": _EXAMPLE}]}
    (folder / "serving_input_example.json").write_text(json.dumps(request), encoding="utf-8")
    return copies


def _mlmodel(model_id: str, ids: Ids, fact: Fact) -> Model:
    """Paths of studies in, their label maps out (see `pipeline.mlflow_model`); nothing is pickled."""
    body = fact.body
    # A column without a name: by one with a name MLflow would refuse a bare path.
    path = Schema([ColSpec(DataType.string)])
    label_maps = Schema([TensorSpec(np.dtype(np.int32), (-1, -1, -1, -1))])
    out = ParamSchema([ParamSpec("out", DataType.string, default="")])
    model = Model(
        run_id=ids["run"],
        signature=ModelSignature(path, label_maps, out),
        saved_input_example_info={
            "artifact_path": "input_example.json",
            "serving_input_path": "serving_input_example.json",
            "type": "dataframe",
            "pandas_orient": "split",
        },
        metadata={key: body[key] for key in (*_SHOWN, "sha256")},
        model_id=model_id,
        model_uuid=model_id,
    )
    python = ".".join(str(part) for part in sys.version_info[:3])
    flavour = {"loader_module": "pipeline.mlflow_model", "data": "model", "python_version": python}
    return model.add_flavor("python_function", **flavour, config={"root": ""})
