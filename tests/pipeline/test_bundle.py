"""Model bundles: what is saved comes back to the last bit, and what was touched is refused in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pipeline.bundle import (
    BundleFacts,
    find_bundles,
    is_bundle,
    load_bundle,
    refuse_to_replace,
    save_bundle,
    set_postprocessing,
)
from pipeline.errors import BundleError, RunError
from pipeline.files import sha256_of_file
from pipeline.manifest import Dataset
from pipeline.models.registry import build_network
from pipeline.plan import Plan
from pipeline.postprocessing import Action, PostProcessing

pytestmark = pytest.mark.usefixtures("one_thread")

FILES = {"bundle.json", "weights.safetensors", "plan.json", "labels.json", "config.yaml"}


@pytest.fixture
def bundle(small_bundle: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(small_bundle, tmp_path / "bundle"))


def refusal(folder: Path) -> str:
    with pytest.raises(BundleError) as caught:
        load_bundle(folder)
    message = str(caught.value)
    assert "\n" not in message
    return message


def change_index(folder: Path, change: Callable[[dict[str, object]], object]) -> None:
    index = json.loads((folder / "bundle.json").read_text())
    change(index)
    (folder / "bundle.json").write_text(json.dumps(index))


class TestRoundTrip:
    def test_logits_are_equal_to_the_last_bit(self, small_plan: Plan, small_bundle: Path) -> None:
        generator = torch.Generator().manual_seed(3)
        network = build_network("unet", small_plan.unet, small_plan.patch_shape, generator=generator).eval()
        loaded = load_bundle(small_bundle)
        image = torch.randn(1, 1, *small_plan.patch_shape, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            assert torch.equal(network(image), loaded.network(image))

    def test_everything_else_comes_back(self, small_bundle: Path, small_plan: Plan, small_dataset: Dataset) -> None:
        loaded = load_bundle(small_bundle)
        assert loaded.plan == small_plan
        assert loaded.schema == small_dataset.manifest.labels
        assert (loaded.index.name, loaded.index.fold, loaded.index.mirror) == ("small", None, True)
        assert loaded.digest == sha256_of_file(small_bundle / "weights.safetensors")
        assert not loaded.network.training

    def test_the_same_model_gives_the_same_files(self, small_bundle: Path, tmp_path: Path) -> None:
        loaded = load_bundle(small_bundle)
        facts = BundleFacts(
            name="small",
            fold=None,
            mirror=True,
            tile_step=0.5,
            plan=loaded.plan,
            schema=loaded.schema,
            config_yaml="name: small\n",
            provenance={"volseg": "0"},
        )
        save_bundle(tmp_path / "again", loaded.network.state_dict(), facts)
        assert {p.name for p in (tmp_path / "again").iterdir()} == FILES
        assert all((tmp_path / "again" / name).read_bytes() == (small_bundle / name).read_bytes() for name in FILES)

    def test_nothing_in_it_is_a_pickle(self, small_bundle: Path) -> None:
        """A pickle begins with its protocol, 0x80; torch's own files are zip archives that hold one."""
        for path in small_bundle.iterdir():
            assert path.read_bytes()[:2] not in (b"\x80\x02", b"\x80\x04", b"\x80\x05", b"PK")


class TestRefusals:
    def test_weights_that_were_changed(self, bundle: Path) -> None:
        content = bytearray((bundle / "weights.safetensors").read_bytes())
        content[-1] ^= 1
        (bundle / "weights.safetensors").write_bytes(content)
        assert "weights.safetensors: not the file that was saved (its hash differs)" in refusal(bundle)

    @pytest.mark.parametrize("name", sorted(FILES - {"bundle.json"}))
    def test_any_other_file_that_was_changed(self, bundle: Path, name: str) -> None:
        with (bundle / name).open("ab") as stream:
            stream.write(b" ")
        assert f"{name}: not the file that was saved" in refusal(bundle)

    @pytest.mark.parametrize("name", sorted(FILES - {"bundle.json"}))
    def test_a_missing_file(self, bundle: Path, name: str) -> None:
        (bundle / name).unlink()
        assert f"{name} is missing from the bundle" in refusal(bundle)

    def test_a_hash_that_is_missing(self, bundle: Path) -> None:
        change_index(bundle, lambda index: index["sha256"].pop("plan.json"))  # type: ignore[attr-defined]
        assert "plan.json: not the file that was saved" in refusal(bundle)

    def test_another_format(self, bundle: Path) -> None:
        change_index(bundle, lambda index: index.update(format="volseg-bundle-9"))
        assert "bundle.json: not a volseg model bundle: format: Input should be 'volseg-bundle-1'" in refusal(bundle)

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("{", "JSONDecodeError"),
            ("[]", "bundle.json: not a volseg model bundle: Input should be a valid dictionary"),
            ("{}", "bundle.json: not a volseg model bundle: the key 'name' is missing"),
        ],
    )
    def test_an_index_that_is_none(self, bundle: Path, text: str, says: str) -> None:
        (bundle / "bundle.json").write_text(text)
        assert says in refusal(bundle)

    def test_a_foreign_folder(self, tmp_path: Path) -> None:
        assert "not a model bundle (no bundle.json in it)" in refusal(tmp_path)
        assert "not a model bundle" in refusal(tmp_path / "missing")

    def test_weights_of_another_network(self, bundle: Path) -> None:
        import safetensors.torch

        safetensors.torch.save_file({"other": torch.zeros(3)}, bundle / "weights.safetensors")
        digest = sha256_of_file(bundle / "weights.safetensors")
        change_index(bundle, lambda index: index["sha256"].update({"weights.safetensors": digest}))  # type: ignore[attr-defined]
        assert "the weights are not those of the plan's network" in refusal(bundle)

    def test_weights_that_are_no_safetensors(self, bundle: Path) -> None:
        (bundle / "weights.safetensors").write_bytes(b"\x80\x04 a pickle")
        digest = sha256_of_file(bundle / "weights.safetensors")
        change_index(bundle, lambda index: index["sha256"].update({"weights.safetensors": digest}))  # type: ignore[attr-defined]
        assert "not a safetensors file" in refusal(bundle)

    def test_a_place_that_cannot_be_written(self, small_bundle: Path, tmp_path: Path) -> None:
        loaded = load_bundle(small_bundle)
        facts = BundleFacts("x", None, False, 0.5, loaded.plan, loaded.schema, "", {})
        (tmp_path / "file").write_text("")
        with pytest.raises(RunError, match="a file stands where a folder is needed"):
            save_bundle(tmp_path / "file" / "bundle", loaded.network.state_dict(), facts)


class TestPostProcessing:
    WANTED = PostProcessing(actions=(Action(kind="largest", name="Anterior", labels=("Anterior",)),))
    OTHER = PostProcessing(actions=(Action(kind="holes", name="Posterior", labels=("Posterior",)),))

    def test_it_is_stored_changed_and_taken_out_and_the_weights_stay(self, bundle: Path) -> None:
        before = {name: ((bundle / name).stat().st_mtime_ns, sha256_of_file(bundle / name)) for name in FILES}
        assert load_bundle(bundle).postprocessing is None
        for wanted in (self.WANTED, self.OTHER, self.OTHER):
            set_postprocessing(bundle, wanted)
            assert load_bundle(bundle).postprocessing == wanted
            assert {p.name for p in bundle.iterdir()} == FILES | {"postprocessing.json"}
        for _ in range(2):
            set_postprocessing(bundle, None)
            assert load_bundle(bundle).postprocessing is None
        assert {p.name for p in bundle.iterdir()} == FILES
        kept = FILES - {"bundle.json"}
        now = {name: ((bundle / name).stat().st_mtime_ns, sha256_of_file(bundle / name)) for name in FILES}
        assert {name: now[name] for name in kept} == {name: before[name] for name in kept}
        assert now["bundle.json"][1] == before["bundle.json"][1]

    def test_one_that_was_changed_or_is_missing_is_refused(self, bundle: Path) -> None:
        set_postprocessing(bundle, self.WANTED)
        (bundle / "postprocessing.json").write_text("{}")
        assert "postprocessing.json: not the file that was saved" in refusal(bundle)
        (bundle / "postprocessing.json").unlink()
        assert "postprocessing.json is missing from the bundle" in refusal(bundle)

    def test_one_that_the_index_does_not_name_is_of_a_writing_that_was_cut_short(self, bundle: Path) -> None:
        (bundle / "postprocessing.json").write_text(self.WANTED.model_dump_json())
        assert load_bundle(bundle).postprocessing is None

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("{}", "postprocessing.json: not a post-processing of volseg: the key 'actions' is missing"),
            (
                WANTED.model_dump_json().replace("Anterior", "Liver"),
                "post-processing of Liver, which is no label of the model",
            ),
        ],
    )
    def test_one_that_says_nothing_of_these_labels(self, bundle: Path, text: str, says: str) -> None:
        (bundle / "postprocessing.json").write_text(text)
        digest = sha256_of_file(bundle / "postprocessing.json")
        change_index(bundle, lambda index: index["sha256"].update({"postprocessing.json": digest}))  # type: ignore[attr-defined]
        assert says in refusal(bundle)

    def test_labels_of_another_model_are_not_stored(self, bundle: Path) -> None:
        liver = PostProcessing(actions=(Action(kind="largest", name="liver", labels=("liver",)),))
        set_postprocessing(bundle, self.WANTED)
        with pytest.raises(BundleError, match="post-processing of liver, which is no label"):
            set_postprocessing(bundle, liver)
        assert load_bundle(bundle).postprocessing == self.WANTED


class TestFinding:
    def test_a_bundle_a_run_and_a_cross_validation(self, small_bundle: Path, tmp_path: Path) -> None:
        assert find_bundles(small_bundle) == [small_bundle]
        for fold in (1, 0):
            shutil.copytree(small_bundle, tmp_path / "run" / f"fold_{fold}" / "bundle")
        assert find_bundles(tmp_path / "run" / "fold_1") == [tmp_path / "run" / "fold_1" / "bundle"]
        assert find_bundles(tmp_path / "run") == [tmp_path / "run" / f"fold_{n}" / "bundle" for n in (0, 1)]
        assert is_bundle(small_bundle)
        assert not is_bundle(tmp_path)

    def test_nothing(self, tmp_path: Path) -> None:
        with pytest.raises(BundleError, match="no such model; give a bundle or a run folder"):
            find_bundles(tmp_path / "missing")
        with pytest.raises(BundleError, match="neither a model bundle nor a run folder with a finished training"):
            find_bundles(tmp_path)
        (tmp_path / "model.pt").write_bytes(b"PK")
        with pytest.raises(BundleError, match="neither a model bundle nor a run folder"):
            find_bundles(tmp_path / "model.pt")


class TestReplacing:
    """What --force of an import may take away."""

    def test_an_imported_model_and_nothing_at_all(self, bundle: Path, tmp_path: Path) -> None:
        change_index(bundle, lambda index: index.update(provenance={"imported_from": "nnU-Net v2"}))
        folds = tmp_path / "folds"
        for fold in (0, 1):
            shutil.copytree(bundle, folds / f"fold_{fold}" / "bundle")
        (tmp_path / "empty").mkdir()
        for replaceable in (bundle, folds, tmp_path / "empty", tmp_path / "not there"):
            refuse_to_replace(replaceable)

    @pytest.mark.parametrize("place", [".", "fold_0/bundle"])
    def test_not_a_model_that_was_trained(self, bundle: Path, tmp_path: Path, place: str) -> None:
        shutil.copytree(bundle, tmp_path / "run" / place, dirs_exist_ok=True)
        with pytest.raises(RunError, match="run: holds a model that was trained, not to be replaced by an import"):
            refuse_to_replace(tmp_path / "run")
        (tmp_path / "run" / "run.json").touch()
        with pytest.raises(RunError, match=r"holds run\.json, so it is not an imported model and not to be replaced"):
            refuse_to_replace(tmp_path / "run")

    def test_not_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "thesis.txt").touch()
        with pytest.raises(RunError, match="not to be replaced"):
            refuse_to_replace(tmp_path / "thesis.txt")
