"""The manifest that data_manifests/README.md shows is one, and shows every key."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import ManifestError
from pipeline.manifest import Case, Channel, Manifest, parse_manifest
from transforms.labels import Label, LabelSchema, Region

README = Path(__file__).parents[2] / "data_manifests" / "README.md"


def shown() -> str:
    """Its JSON."""
    found = re.search(r"```json\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert found
    return found.group(1)


def test_it_is_a_manifest() -> None:
    manifest = parse_manifest(json.loads(shown()), source="README.md")
    assert [region.paints for region in manifest.labels.regions] == ["oedema", "core", "left eye", "right eye"]
    assert manifest.cases[1].annotated == ("oedema", "core")
    assert set(manifest.cases[1].images) == {"FLAIR"}


def test_every_key_is_shown() -> None:
    text = shown()
    for model in (Manifest, Channel, LabelSchema, Label, Region, Case):
        for key in model.model_fields:
            assert f'"{key}"' in text, f"{model.__name__}.{key}"


@pytest.mark.parametrize(
    "regions",
    [
        {"whole": [1, 2]},
        [{"name": "whole", "labels": [1, 2], "paints": "core"}],
        [{"id": 7, "name": "whole", "labels": ["core"], "paints": "core"}],
        ["core"],
    ],
)
def test_a_region_written_otherwise_is_told_how(regions: Any) -> None:
    document = json.loads(shown())
    document["labels"]["regions"] = regions
    with pytest.raises(ManifestError, match=r"labels\.regions.*expected a list of \{\"name\""):
        parse_manifest(document, source="README.md")
