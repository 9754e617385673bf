"""Kept scores: what they decide again, how near it is to what was decided, and what is refused."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.lib.format as npy
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from pipeline.combining import segment_scores
from pipeline.errors import ConfigError, VolumeError
from pipeline.kept_scores import (
    LEVELS,
    Grids,
    Keeper,
    KeptScores,
    kept_scores_bytes,
    read_header,
    read_scores,
    write_scores,
)
from transforms.geometry import Geometry
from transforms.labels import LabelSchema, Region, schema_from_names
from transforms.resample import move_argmax, move_regions

pytestmark = pytest.mark.usefixtures("one_thread")

COARSE = Geometry((12, 13, 14), np.diag([2.0, 2, 2, 1]))
FINE = Geometry((22, 25, 30), np.diag([1.1, 1, 0.9, 1]))
ABC = schema_from_names({10: "a", 20: "b", 30: "c"})
REGIONS = LabelSchema(
    labels=schema_from_names({1: "a", 2: "b"}).labels,
    regions=(Region(name="whole", labels=("a", "b"), paints="b"), Region(name="core", labels=("a",), paints="a")),
)


def kept(
    probabilities: Tensor | Sequence[Sequence[float]],
    count: int,
    schema: LabelSchema = ABC,
    *,
    grid: Geometry | None = None,
    source: Geometry | None = None,
) -> KeptScores:
    """Those (O, I, J, K), or (O, I) of a line of voxels, as a prediction keeps them."""
    values = torch.as_tensor(probabilities)
    values = values if values.ndim == 4 else values[:, :, None, None]
    grid = grid or Geometry(tuple(values.shape[1:]), np.eye(4))
    keeper = Keeper(grid.shape, schema, count)
    for plane in range(grid.shape[1]):
        keeper.add(1, plane, values[:, :, plane])
    there = source or grid
    return keeper.kept(Grids(grid, there, there, there), ("volseg x", "1"), ("f00d",))


def drawn(outputs: int, shape: tuple[int, int, int], seed: int = 0) -> Tensor:
    """Smooth, as scores are: sure in places and not in others."""
    coarse = torch.randn(1, outputs, *(max(2, n // 4) for n in shape), generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(3 * coarse, size=shape, mode="trilinear")[0].softmax(dim=0)


def test_grids_whose_voxels_are_not_the_sources_are_refused() -> None:
    """They would have to be averaged, and classes cannot be."""
    grid = Geometry((6, 6, 6), np.eye(4))
    value = Grids(grid, grid, grid, grid).to_json()
    assert Grids.from_json(value).difference(Grids.from_json(value)) is None
    between = np.eye(4)
    between[:3, 3] = 0.5
    with pytest.raises(ValueError, match="box: its voxels are not some of the source's"):
        Grids.from_json({**value, "box": Grids(Geometry((5, 5, 5), between), *[grid] * 3).to_json()["grid"]})


class TestByHand:
    def test_the_likeliest_and_their_levels(self) -> None:
        found = kept([[0.2, 1.0], [0.5, 0.0], [0.0, 0.0], [0.3, 0.0]], 2)
        assert found.outputs[:, 0, 0, 0].tolist() == [1, 3]
        assert found.levels[:, 0, 0, 0].tolist() == [127, 76]  # half a level is none
        # What has no probability says nothing, so that it packs well.
        assert (found.outputs[:, 1, 0, 0].tolist(), found.levels[:, 1, 0, 0].tolist()) == ([0, 0], [LEVELS, 0])

    def test_what_is_not_kept_is_spread_over_the_others(self) -> None:
        scores = kept([[0.2], [0.5], [0.0], [0.3]], 2).dense(0, 0, 1)[:, 0, 0, 0]
        torch.testing.assert_close(scores, torch.tensor([0.1, 0.5, 0.1, 0.3]), atol=1 / LEVELS, rtol=0)

    def test_of_equals_the_first_wins_as_it_did(self) -> None:
        tied = [[0.25, 0.0], [0.25, 0.4], [0.25, 0.4], [0.25, 0.2]]
        assert segment_scores([kept(tied, 4)]).label_map.reshape(-1).tolist() == [0, 10]
        # 0.3005 and 0.2995 are one level.
        near = [[0.2], [0.2995], [0.3005], [0.2]]
        assert segment_scores([kept(near, 2)]).label_map.item() == 20

    def test_two_models_are_averaged(self) -> None:
        first = kept([[0.6], [0.4], [0.0], [0.0]], 3)
        second = kept([[0.1], [0.2], [0.7], [0.0]], 3)
        # Means 0.35, 0.3 and 0.35 to the last bit or level: three of the first against one of the second decide.
        assert segment_scores([second]).label_map.item() == 20
        assert segment_scores([first, first, second]).label_map.item() == 0
        assert segment_scores([first, second, second]).label_map.item() == 20

    def test_thresholds(self) -> None:
        # Of a the probability rises; beside it stands the background alone, or b with as much.
        line = [[0.9, 0.72, 0.68, 0.35], [0.1, 0.28, 0.32, 0.3], [0.0, 0.0, 0.0, 0.35], [0.0] * 4]

        def decided(**limits: float) -> list[int]:
            return [int(i) for i in segment_scores([kept(line, 3)], limits).label_map.reshape(-1)]

        assert decided() == [0, 0, 0, 0]
        assert decided(a=0.3) == [0, 0, 10, 10]
        assert decided(a=0.25) == [0, 10, 10, 10]
        assert decided(a=0.3, b=0.2) == [0, 0, 10, 20]

    def test_thresholds_of_regions_are_of_each(self) -> None:
        line = [[0.45, 0.45, 0.55], [0.1, 0.35, 0.35]]
        assert segment_scores([kept(line, 2, REGIONS)]).label_map.reshape(-1).tolist() == [0, 0, 2]
        found = segment_scores([kept(line, 2, REGIONS)], {"whole": 0.4, "core": 0.3}).label_map
        assert found.reshape(-1).tolist() == [2, 1, 1]

    def test_of_regions_all_are_kept(self) -> None:
        """Of nested ones the innermost paints last, and is never the likeliest."""
        inner = LabelSchema(
            labels=schema_from_names({1: "oedema", 2: "core", 3: "enhancing"}).labels,
            regions=(
                Region(name="whole", labels=("oedema", "core", "enhancing"), paints="oedema"),
                Region(name="core region", labels=("core", "enhancing"), paints="core"),
                Region(name="enhancing region", labels=("enhancing",), paints="enhancing"),
            ),
        )
        line = [[0.99, 0.99, 0.99, 0.2], [0.95, 0.95, 0.3, 0.2], [0.9, 0.2, 0.2, 0.2]]
        assert segment_scores([kept(line, 1, inner)]).label_map.reshape(-1).tolist() == [3, 2, 1, 0]

    def test_a_region_of_exactly_a_half_is_not_over_it(self) -> None:
        above = float(np.nextafter(np.float32(0.5), np.float32(1)))
        line = [[0.5, above], [0.1, 0.1]]
        assert segment_scores([kept(line, 2, REGIONS)]).label_map.reshape(-1).tolist() == [0, 2]

    @pytest.mark.parametrize("count", [1, 2, 3])
    @pytest.mark.parametrize("classes", [5, 6, 7, 9, 40])
    def test_what_is_left_is_less_than_what_won(self, classes: int, count: int) -> None:
        """All as likely but one, a little: what is left of each class rounds to more than what that one has."""
        schema = schema_from_names({n: f"label {n}" for n in range(1, classes)})
        for winner in (1, classes - 1):
            line = torch.full((classes, 1), 1 / classes - 1e-4)
            line[winner] += classes * 1e-4
            scores = kept(line, count, schema)
            assert segment_scores([scores]).label_map.item() == winner
            # Nor does it pass the least likely that is kept.
            dense = scores.dense(0, 0, 1).flatten()
            assert dense.argsort(descending=True)[:count].tolist() == scores.outputs.flatten().tolist()

    @pytest.mark.parametrize(("schema", "count"), [(ABC, 3), (ABC, 9), (REGIONS, 1), (REGIONS, 0)])
    def test_bytes(self, schema: LabelSchema, count: int) -> None:
        keeper = Keeper((4, 5, 6), schema, count)
        assert keeper.outputs.nbytes + keeper.levels.nbytes == kept_scores_bytes(120, schema, count)


class TestAgainstAllScores:
    @pytest.mark.parametrize("count", [1, 2, 4])
    def test_on_the_networks_grid_nothing_differs(self, count: int) -> None:
        scores = drawn(4, (12, 13, 14))
        classes = scores.argmax(dim=0).numpy()
        found = segment_scores([kept(scores, count)])
        assert len(np.unique(classes)) == 4
        assert np.array_equal(found.label_map, ABC.ids_from_classes(classes))

    def test_on_another_grid_hardly_anything(self) -> None:
        scores = drawn(4, COARSE.shape)
        expected = ABC.ids_from_classes(move_argmax(scores, COARSE, FINE)[0].numpy())
        found = segment_scores([kept(scores, 3, grid=COARSE, source=FINE)])
        assert found.geometry is FINE
        assert np.mean(found.label_map != expected) < 0.005

    def test_regions(self) -> None:
        scores = (1.6 * drawn(3, COARSE.shape)[:2]).clamp_max(1)
        expected = move_regions(scores, REGIONS.painted_classes, COARSE, FINE)[0].numpy()
        found = segment_scores([kept(scores, 2, REGIONS, grid=COARSE, source=FINE)])
        assert len(np.unique(expected)) == 3
        assert np.mean(found.label_map != REGIONS.ids_from_classes(expected)) < 0.005

    def test_slabs_are_not_seen(self, monkeypatch: pytest.MonkeyPatch) -> None:
        scores = kept(drawn(4, COARSE.shape), 3, grid=COARSE, source=FINE)
        whole = segment_scores([scores]).label_map
        monkeypatch.setattr("pipeline.combining._SLAB_VALUES", 1)
        assert np.array_equal(segment_scores([scores]).label_map, whole)


class TestRefusals:
    def test_other_studies_and_other_labels(self) -> None:
        first = kept([[0.6], [0.4], [0.0], [0.0]], 3)
        moved = Geometry((1, 1, 1), np.diag([1.0, 1, 2, 1]))
        with pytest.raises(VolumeError, match="not of one study"):
            segment_scores([first, kept([[0.6], [0.4], [0.0], [0.0]], 3, grid=moved)])
        with pytest.raises(VolumeError, match="different labels"):
            segment_scores([first, replace(first, schema=schema_from_names({1: "a", 2: "b", 3: "d"}))])

    @pytest.mark.parametrize(("name", "value"), [("d", 0.5), ("", 0.5), ("a", 0.0), ("a", 1.0), ("a", float("nan"))])
    def test_thresholds(self, name: str, value: float) -> None:
        with pytest.raises(ConfigError, match=f"--threshold {name}="):
            segment_scores([kept([[0.6], [0.4], [0.0], [0.0]], 3)], {name: value})


class TestFiles:
    def test_there_and_back(self, tmp_path: Path) -> None:
        scores = kept(drawn(4, (5, 6, 7)), 3)
        for name in ("a", "b"):
            write_scores(tmp_path / f"{name}.scores.npz", scores)
        found = read_scores(tmp_path / "a.scores.npz")
        assert np.array_equal(found.outputs, scores.outputs)
        assert np.array_equal(found.levels, scores.levels)
        assert (found.schema, found.made_by, found.models) == (scores.schema, scores.made_by, scores.models)
        assert found.grids.difference(scores.grids) is None
        assert (tmp_path / "a.scores.npz").read_bytes() == (tmp_path / "b.scores.npz").read_bytes()

    def test_what_is_none_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "x.scores.npz"
        with pytest.raises(VolumeError, match="cannot be read"):
            read_scores(path)
        write_scores(path, kept(drawn(4, (5, 6, 7)), 3))
        whole = path.read_bytes()
        for spoilt in (b"", b"text", whole[: len(whole) // 2], whole[:200] + bytes(200) + whole[400:]):
            path.write_bytes(spoilt)
            with pytest.raises(VolumeError, match=r"x\.scores\.npz"):
                read_scores(path)

    def test_what_contradicts_itself_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "x.scores.npz"
        scores = kept(drawn(4, (5, 6, 7)), 3)
        for wrong in (
            replace(scores, levels=scores.levels[:, 1:]),
            replace(scores, levels=scores.levels.astype(np.float32)),  # type: ignore[arg-type]
            replace(scores, outputs=scores.outputs + 4),
        ):
            write_scores(path, wrong)
            with pytest.raises(VolumeError, match="no kept scores"):
                read_scores(path)

    def test_pickles_are_not_loaded(self, tmp_path: Path) -> None:
        stream = io.BytesIO()
        np.save(stream, np.array([{}], dtype=object), allow_pickle=True)
        with zipfile.ZipFile(tmp_path / "x.scores.npz", "w") as archive:
            for name in ("header", "outputs", "levels"):
                archive.writestr(f"{name}.npy", stream.getvalue())
        with pytest.raises(VolumeError, match=r"a header of .* object"):
            read_scores(tmp_path / "x.scores.npz")

    def test_a_header_is_read_alone(self, tmp_path: Path) -> None:
        scores = kept(drawn(4, (5, 6, 7)), 3)
        write_scores(tmp_path / "x.scores.npz", scores)
        rewrite(tmp_path / "x.scores.npz", levels=b"", outputs=b"")
        found = read_header(tmp_path / "x.scores.npz")
        assert (found.schema, found.made_by, found.models) == (scores.schema, scores.made_by, scores.models)
        assert found.grids.difference(scores.grids) is None

    @pytest.mark.parametrize("name", ["grid", "field", "box", "source"])
    @pytest.mark.parametrize("wrong", ["large", "turned", "flat"])
    def test_grids_that_scores_cannot_come_to(self, tmp_path: Path, name: str, wrong: str) -> None:
        path = tmp_path / "x.scores.npz"
        write_scores(path, kept(drawn(4, (5, 6, 7)), 3))
        with np.load(path) as arrays:
            header = json.loads(bytes(arrays["header"]))
        turned = np.eye(4)
        turned[:3, :3] = [[0.8, -0.6, 0], [0.6, 0.8, 0], [0, 0, 1]]
        header["grids"][name] |= {
            "large": {"shape": [2**15, 2**15, 2**15]},
            "turned": {"affine_ras": turned.tolist()},
            "flat": {"shape": [5, 6, float("inf")]},
        }[wrong]
        rewrite(path, header=npy_of(np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)))
        with pytest.raises(VolumeError, match="no kept scores"):
            read_scores(path)

    def test_nothing_is_unpacked_that_does_not_fit(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "x.scores.npz"
        write_scores(path, kept(drawn(4, (5, 6, 7)), 3))
        read, seen = npy.read_array, []

        def counted(member: Any, **options: Any) -> Any:
            seen.append(member.name)
            return read(member, **options)

        monkeypatch.setattr(npy, "read_array", counted)
        # Of a thousand times as many voxels as the grid has, and of another type.
        for wrong in (np.zeros((3, 50, 60, 70), np.uint8), np.zeros((3, 5, 6, 7), np.float64)):
            rewrite(path, levels=npy_of(wrong))
            with pytest.raises(VolumeError, match="no kept scores"):
                read_scores(path)
        assert set(seen) == {"header.npy"}

    def test_regions_of_which_some_were_not_kept_are_refused(self, tmp_path: Path) -> None:
        scores = kept([[0.9], [0.8]], 2, REGIONS)
        write_scores(tmp_path / "x.scores.npz", replace(scores, outputs=scores.outputs[:1], levels=scores.levels[:1]))
        with pytest.raises(VolumeError, match="no kept scores"):
            read_scores(tmp_path / "x.scores.npz")


def npy_of(array: npt.NDArray[Any]) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def rewrite(path: Path, **members: bytes) -> None:
    """Other bytes for arrays of a file."""
    with zipfile.ZipFile(path) as archive:
        there = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in (there | {f"{name}.npy": content for name, content in members.items()}).items():
            archive.writestr(name, content)
