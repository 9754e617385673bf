"""The schema of configs: the reference names every key, a typo is told its nearest, what is written reads back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.config import Config, Section, config_to_yaml, flatten, load_config, parse_config, reference
from pipeline.errors import ConfigError

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
MINIMAL = "name: tiny\ndata:\n  manifest: cases.json\n"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(MINIMAL)
    return path


def keys_of(section: Section, prefix: str = "") -> list[str]:
    """Dotted keys, found from the dumped values and not from the schema that `reference` walks."""

    def walk(value: Any, key: str) -> list[str]:
        if isinstance(value, dict):
            return [x for name, below in value.items() for x in walk(below, f"{key}.{name}" if key else name)]
        return [key]

    return walk(section.model_dump(mode="json"), prefix)


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


class TestReference:
    def test_every_key_stands_in_it_once_with_a_meaning(self, path: Path) -> None:
        rows = [line.split(" | ") for line in reference().splitlines()[2:]]
        assert [row[0].strip("| `") for row in rows] == keys_of(load_config(path))
        assert all(len(row[-1].strip("| ")) > 5 for row in rows)

    def test_it_names_kinds_and_defaults(self) -> None:
        text = reference()
        assert "| `data.manifest` | path | required |" in text
        assert "| `train.optimiser` | adamw \\| sgd | `adamw` |" in text
        assert "| `plan.patch_shape` | 3 int | `null` |" in text
        assert "| `tracking.enabled` | bool | `true` |" in text

    def test_a_section_that_is_given_other_values_by_the_one_above_shows_those(self) -> None:
        text = reference()
        assert "| `loss.terms.dice` | float | `1.0` |" in text
        assert "| `loss.terms.tversky` | float | `0.0` |" in text

    def test_the_page_in_configs_is_what_the_code_gives(self) -> None:
        page = (ROOT / "configs" / "README.md").read_text(encoding="utf-8")
        assert page.endswith("\n\n" + reference()), "replace the table of configs/README.md by `volseg config`"


class TestLoading:
    @pytest.mark.parametrize("config", CONFIGS, ids=lambda p: p.stem)
    def test_every_recipe_loads_and_its_manifest_is_there(self, config: Path) -> None:
        loaded = load_config(config)
        assert loaded.name == config.stem
        assert loaded.data.manifest.is_file()

    def test_recipes_are_found(self) -> None:
        assert {config.stem for config in CONFIGS} >= {"demo", "hippocampus", "hn_ct"}

    def test_a_section_without_keys_is_its_defaults(self, path: Path) -> None:
        path.write_text(MINIMAL + "train:\nplan:\n")
        assert load_config(path) == load_config(path, ["train={}"])

    def test_paths_of_the_file_start_at_the_file_and_those_set_here(self, path: Path, tmp_path: Path) -> None:
        path.write_text(MINIMAL + "  root: voxels\n")
        config = load_config(path, ["data.cache=somewhere", "data.root=~/voxels"])
        assert config.data.manifest == tmp_path / "cases.json"
        assert config.data.cache == Path("somewhere")
        assert config.data.root == Path("~/voxels").expanduser()

    def test_values_may_be_set(self, path: Path) -> None:
        values = ["train.steps=7", "plan.features=[4, 8]", "train.learning_rate=3e-4", "tracking.enabled=no"]
        config = load_config(path, values)
        assert (config.train.steps, config.plan.features) == (7, (4, 8))
        assert (config.train.learning_rate, config.tracking.enabled) == (3e-4, False)
        assert load_config(path, ["train.steps=7", "train.steps=null"]).train.steps is None

    @pytest.mark.parametrize(
        ("loss", "overrides", "terms"),
        [
            ("", [], {"dice": 1, "cross_entropy": 1}),
            ("loss:\n  terms: {top_k: 0.5}\n", [], {"top_k": 0.5}),
            ("", ["loss.terms={dice: 1, top_k: 0.5}"], {"dice": 1, "top_k": 0.5}),
            ("", ["loss.terms.tversky=1"], {"dice": 1, "cross_entropy": 1, "tversky": 1}),
            ("loss:\n  terms:\n", ["loss.terms.tversky=1"], {"dice": 1, "cross_entropy": 1, "tversky": 1}),
            ("loss:\n  terms: {top_k: 0.5}\n", ["loss.terms.tversky=1"], {"top_k": 0.5, "tversky": 1}),
            ("", ["loss.terms.focal=2", "loss.terms.dice=0"], {"cross_entropy": 1, "focal": 2}),
        ],
    )
    def test_a_mapping_of_terms_is_all_of_them_and_a_single_one_is_added(
        self, path: Path, loss: str, overrides: list[str], terms: dict[str, float]
    ) -> None:
        path.write_text(MINIMAL + loss)
        assert {name: weight for name, weight in load_config(path, overrides).loss.terms if weight} == terms

    @pytest.mark.parametrize(("word", "meant"), [("on", "on"), ("off", "off"), ("auto", "auto")])
    def test_a_bare_on_is_no_boolean(self, path: Path, word: str, meant: str) -> None:
        path.write_text(f"{MINIMAL}network:\n  checkpointing: {word}\n")
        assert load_config(path).network.checkpointing == meant

    def test_a_config_is_frozen(self, path: Path) -> None:
        with pytest.raises(ValueError, match="frozen"):
            load_config(path).train.steps = 3  # type: ignore[misc]


class TestRoundTrip:
    @pytest.mark.parametrize("config", CONFIGS, ids=lambda p: p.stem)
    def test_what_is_written_reads_back_the_same(self, config: Path, tmp_path: Path) -> None:
        settings = ["augment.mirror_axes=[0, 2]", "network.checkpointing='on'", "plan.spacing_mm=[1, 1, 2.5]"]
        before = load_config(config, settings)
        written = tmp_path / "run" / "config.yaml"
        written.parent.mkdir()
        written.write_text(config_to_yaml(before, written.parent), encoding="utf-8")
        after = load_config(written)
        assert after.data.manifest.resolve() == before.data.manifest.resolve()
        assert after.model_dump(exclude={"data"}) == before.model_dump(exclude={"data"})

    def test_the_copy_in_a_run_serves_when_the_recipe_was_named_from_here(
        self, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "runs").mkdir()
        copy = tmp_path / "runs" / "config.yaml"
        copy.write_text(config_to_yaml(load_config(Path(path.name)), Path("runs")), encoding="utf-8")
        assert load_config(copy).data.manifest.resolve() == tmp_path / "cases.json"
        assert str(tmp_path) not in copy.read_text()

    def test_flat_rows_have_every_key(self, path: Path) -> None:
        config = load_config(path)
        rows = flatten(config)
        assert list(rows) == keys_of(config)
        assert rows["plan.patch_shape"] == "None"


class TestRefusals:
    @pytest.mark.parametrize(
        ("wrong", "right"),
        [
            ("train.budget_minute=3", "train.budget_minutes"),
            ("trian.steps=3", "train"),
            ("steps=3", "train.steps"),
            ("plan.patch_size=[8, 8, 8]", "plan.batch_size' or 'plan.patch_shape"),
            ("augment.rotation_degree=3", "augment.rotation_degrees"),
            ("network.normalization=batch", "network.normalisation"),
            ("train.loss=dice", "loss.terms"),
            ("loss.terms.cross_entrpy=1", "loss.terms.cross_entropy"),
            ("loss.term.dice=1", "loss.terms"),
            ("loss.dice=1", "loss.terms.dice"),
        ],
    )
    def test_a_typo_is_told_the_nearest_key(self, path: Path, wrong: str, right: str) -> None:
        assert refusal(path, wrong).endswith(f"; did you mean '{right}'?")

    def test_a_key_that_is_like_none_is_told_all(self, path: Path) -> None:
        assert refusal(path, "folds.zebra=1").endswith("unknown key 'folds.zebra'; known here: folds.count, folds.seed")

    def test_what_is_known_is_told_once(self, path: Path) -> None:
        message = refusal(path, "folds.zebra=1", "folds.okapi=1", "plan.zebra=1")
        assert message.count("known here: folds.count, folds.seed") == 1
        assert message.count("known here: plan.") == 1
        assert all(f"unknown key '{key}'" in message for key in ("folds.zebra", "folds.okapi", "plan.zebra"))

    def test_a_missing_key(self, path: Path) -> None:
        path.write_text("name: tiny\n")
        assert refusal(path) == f"{path}: the key 'data' is missing"

    @pytest.mark.parametrize(
        ("override", "says"),
        [
            ("train.steps=0", "train.steps: should be greater than or equal to 1, found 0"),
            ("train.budget_minutes=.inf", "train.budget_minutes: should be a finite number, found inf"),
            ("train.budget_minutes=long", "train.budget_minutes: should be a valid number"),
            ("train.optimiser=adam", "train.optimiser: should be 'adamw' or 'sgd', found 'adam'"),
            ("train=5", "train: a section holds keys with values, found 5"),
            ("plan.patch_shape=[8, 8]", "plan.patch_shape: expected 3 int, found [8, 8]"),
            ("plan.features=[]", "plan.features: tuple should have at least 1 item"),
            ("plan.features=[0, 8]", "plan.features.0: should be greater than or equal to 1, found 0"),
            ("augment.mirror_axes=[3]", "augment.mirror_axes: expected auto | any number of 0 | 1 | 2"),
            ("augment.gamma_range=[1.5, 0.7]", "expected two positive numbers, the smaller first, found [1.5, 0.7]"),
            ("augment.scaling_range=[0, 1]", "augment.scaling_range: expected two positive numbers"),
            ("loss.terms={dice: 0}", "loss.terms: expected at least one term with a weight above 0, found {'dice': 0}"),
            ("loss.terms.dice=-1", "loss.terms.dice: should be greater than or equal to 0, found -1"),
            ("loss.terms=dice", "loss.terms: a section holds keys with values, found 'dice'"),
            ("loss.top_k_share=0", "loss.top_k_share: should be greater than 0, found 0"),
            ("name=a b", "name: string should match pattern"),
            ("train.steps", "--set train.steps: expected section.key=value"),
            ("=3", "--set =3: expected section.key=value"),
            ("name.first=3", "--set name.first=3: 'name' is not a section"),
            ("train.steps=[", "--set train.steps=[: the value is not valid YAML"),
        ],
    )
    def test_a_value_that_does_not_fit(self, path: Path, override: str, says: str) -> None:
        assert says in refusal(path, override)

    def test_many_faults_are_told_at_once_but_not_without_end(self, path: Path) -> None:
        message = refusal(path, *[f"train.wrong_{n}=1" for n in range(8)])
        assert "train.wrong_0" in message
        assert message.endswith("; and 3 more")

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("", "a config is a mapping of sections, found nothing"),
            ("- a\n- b\n", "a config is a mapping of sections, found list"),
            ("train: {steps: 3\n", "not valid YAML"),
            (MINIMAL + "train:\n  steps: 3\n  steps: 4\n", "the key 'steps' stands twice in one section; keep one"),
        ],
    )
    def test_a_file_that_is_no_config(self, path: Path, text: str, says: str) -> None:
        path.write_text(text)
        assert says in refusal(path)

    def test_a_file_that_is_not_there_or_no_text(self, path: Path, tmp_path: Path) -> None:
        assert "no such config file; see configs/" in refusal(tmp_path / "missing.yaml")
        assert "a folder; a config is a YAML file" in refusal(tmp_path)
        for content in (b"\xff\xfe\x00", b"\x5c\x01\x00\x00"):  # the second one is text to UTF-8, as a NIfTI header is
            path.write_bytes(content)
            assert refusal(path).startswith(f"{path}: is not a config (YAML) but a binary file")

    @pytest.mark.parametrize(
        "text",
        ['{"format": "volseg-manifest-1", "name": "x", "cases": []}', '{"channel_names": {"0": "CT"}, "labels": {}}'],
    )
    def test_a_manifest_is_called_one(self, path: Path, text: str) -> None:
        path.write_text(text)
        assert refusal(path) == (
            f"{path}: this is a manifest, expected a config; a config names it: data.manifest: {path}"
        )

    def test_code_in_yaml_is_not_run(self, path: Path, tmp_path: Path) -> None:
        path.write_text(f"name: !!python/object/apply:os.mkdir ['{tmp_path}/made']\n")
        assert "not valid YAML" in refusal(path)
        assert not (tmp_path / "made").exists()

    def test_the_source_is_named(self) -> None:
        with pytest.raises(ConfigError, match=r"^here: the key 'name' is missing"):
            parse_config({"data": {"manifest": "x"}}, source="here")

    def test_sections_are_values(self, path: Path) -> None:
        assert isinstance(hash(load_config(path)), int)
        assert load_config(path) == Config.model_validate(load_config(path).model_dump())


def test_what_the_command_line_spoilt_is_told_of_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("name: x\ndata: {manifest: m.json}\n")
    with pytest.raises(ConfigError, match=r"^--set: train\.seed: "):
        load_config(file, ["train.seed=-1"])
    file.write_text("name: x\ndata: {manifest: m.json}\ntrain: {seed: -1}\n")
    with pytest.raises(ConfigError, match=r"recipe\.yaml: train\.seed: "):
        load_config(file, ["train.steps=5"])
