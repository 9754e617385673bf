"""Folds: what must hold for every dataset (hypothesis), worlds by hand, and the balance on real cases."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.checks import CaseFacts, check_dataset
from pipeline.errors import ManifestError, RunError
from pipeline.folds import Folds, assign_folds, read_folds, write_folds
from pipeline.manifest import load_dataset

ROOT = Path(__file__).parents[2]
LABELS = ("a", "b", "c")


def fact(
    case: str, patient: str | None = None, digest: str | None = None, fold: int | None = None, **mm3: float
) -> CaseFacts:
    """A case; each is its own patient with its own voxels unless told otherwise."""
    volumes = {name: float(mm3.get(name, 0.0)) for name in LABELS}
    return CaseFacts(case, patient or case, fold, (digest or f"voxels of {case}",), volumes, (8, 8, 8), (1.0, 1.0, 1.0))


@st.composite
def datasets(draw: st.DrawFn, patients: int = 12, most_cases: int = 30) -> list[CaseFacts]:
    """Cases of a few patients, now and then the same voxels, labels that are often absent."""
    count = draw(st.integers(2, most_cases))
    volume = st.one_of(st.just(0.0), st.floats(1, 1e6))
    return [
        fact(
            f"case{i:02d}",
            f"patient{draw(st.integers(0, patients))}",
            draw(st.sampled_from([None, None, None, "x", "y"])),
            **{name: draw(volume) for name in LABELS},
        )
        for i in range(count)
    ]


def components(cases: list[CaseFacts]) -> list[set[str]]:
    """Cases linked by patient or voxels, by brute force: join until nothing changes."""
    sets = [{c.case_id} for c in cases]
    keys = {c.case_id: {c.patient_id, *c.image_sha256} for c in cases}
    while True:
        for one in sets:
            other = next((s for s in sets if s is not one and any(keys[p] & keys[q] for p in one for q in s)), None)
            if other is not None:
                one |= other
                sets.remove(other)
                break
        else:
            return sets


@given(cases=datasets(), count=st.integers(2, 5), seed=st.integers(0, 3))
def test_what_always_holds(cases: list[CaseFacts], count: int, seed: int) -> None:
    groups = components(cases)
    if len(groups) < count:
        with pytest.raises(ManifestError, match=f"{len(groups)} patients"):
            assign_folds(cases, count=count, seed=seed)
        return
    folds = assign_folds(cases, count=count, seed=seed)
    ids = {case.case_id for case in cases}
    validated = [case for fold in range(count) for case in folds.validation_cases(fold)]
    assert sorted(validated) == sorted(ids)
    for group in groups:
        assert len({folds.fold_of[case] for case in group}) == 1
    for fold in range(count):
        training, validation = set(folds.training_cases(fold)), set(folds.validation_cases(fold))
        assert validation
        assert training | validation == ids
        assert not training & validation
    sizes = [len(folds.validation_cases(fold)) for fold in range(count)]
    assert max(sizes) - min(sizes) <= max(map(len, groups))
    assert folds.certificate()["sound"]


@given(cases=datasets(), order=st.randoms(use_true_random=False))
def test_the_order_of_the_cases_does_not_matter(cases: list[CaseFacts], order: np.random.Generator) -> None:
    if len(components(cases)) < 2:
        return
    shuffled = list(cases)
    order.shuffle(shuffled)
    assert assign_folds(shuffled, count=2, seed=0) == assign_folds(cases, count=2, seed=0)


@given(has=st.lists(st.booleans(), min_size=10, max_size=40), count=st.integers(2, 5), seed=st.integers(0, 3))
def test_a_label_is_spread_as_evenly_as_it_can_be(has: list[bool], count: int, seed: int) -> None:
    """One label, one case a patient: the folds' numbers of cases with it, and without it, differ by one at most."""
    cases = [fact(f"case{i:02d}", a=10.0 * (i + 1) if label else 0.0) for i, label in enumerate(has)]
    folds = assign_folds(cases, count=count, seed=seed)
    with_it = [sum(has[int(c[4:])] for c in folds.validation_cases(k)) for k in range(count)]
    assert max(with_it) - min(with_it) <= 1


def test_a_rare_label_is_dealt_before_a_common_one() -> None:
    """Two cases of twenty have b: with two folds each gets one, whatever the seed."""
    cases = [fact(f"case{i:02d}", a=100 + i, b=5.0 if i in (7, 8) else 0.0) for i in range(20)]
    for seed in range(20):
        folds = assign_folds(cases, count=2, seed=seed)
        assert folds.fold_of["case07"] != folds.fold_of["case08"]


def test_the_seed_decides() -> None:
    cases = [fact(f"case{i:02d}", a=100 + i) for i in range(20)]
    splits = {tuple(assign_folds(cases, count=2, seed=seed).fold_of.items()) for seed in range(10)}
    assert len(splits) > 5
    assert assign_folds(cases, count=2, seed=3) == assign_folds(cases, count=2, seed=3)


def test_the_split_is_the_same_on_every_machine() -> None:
    """Written down once: lots are drawn by SHA-256, so neither numpy nor Python can change them."""
    cases = [fact(f"case{i}", a=100 + i) for i in range(6)]
    assert assign_folds(cases, count=3, seed=0).fold_of == {
        "case0": 0,
        "case1": 1,
        "case2": 2,
        "case3": 1,
        "case4": 0,
        "case5": 2,
    }


def test_volumes_are_spread_where_a_random_split_does_not(data_dir: Path) -> None:
    facts = check_dataset(load_dataset(ROOT / "data_manifests/hippocampus_demo.json")).facts
    mm3 = {f.case_id: f.label_volumes_mm3 or {} for f in facts}

    def spread(parts: list[list[str]]) -> float:
        """Largest difference of the parts' mean volumes, relative to the mean."""
        means = {n: [np.mean([mm3[c][n] for c in part]) for part in parts] for n in ("Anterior", "Posterior")}
        return max(float((max(m) - min(m)) / np.mean(m)) for m in means.values())

    rng = np.random.default_rng(0)
    ids = sorted(mm3)
    shuffled = [rng.permutation(ids).tolist() for _ in range(200)]
    random_splits = sorted(spread([order[k::4] for k in range(4)]) for order in shuffled)
    ours = []
    for seed in range(10):
        folds = assign_folds(facts, count=4, seed=seed)
        ours.append(spread([list(folds.validation_cases(k)) for k in range(4)]))
    assert max(ours) < random_splits[40]


def test_one_mistaken_volume_does_not_decide() -> None:
    """A thousandfold volume is one rank above the next, so the others are spread as they were."""
    cases = [fact(f"case{i:02d}", a=100 + i) for i in range(19)]
    plain = assign_folds([*cases, fact("case19", a=119)], count=2, seed=0)
    mistaken = assign_folds([*cases, fact("case19", a=119_000)], count=2, seed=0)
    assert plain.fold_of == mistaken.fold_of


def test_patients_with_identical_volumes_are_joined_and_told() -> None:
    cases = [fact("a1", "a"), fact("a2", "a", "same"), fact("b1", "b", "same"), fact("c1"), fact("d1"), fact("e1")]
    folds = assign_folds([replace(c, label_volumes_mm3={"a": 1.0}) for c in cases], count=2, seed=0)
    assert folds.fold_of["a1"] == folds.fold_of["a2"] == folds.fold_of["b1"]
    certificate = folds.certificate()
    assert certificate["patients_joined_for_identical_volumes"] == [["a1", "a2", "b1"]]
    assert certificate["sound"]


def test_any_channel_links_two_cases() -> None:
    cases = [fact(name, a=1) for name in ("a", "b", "c", "d")]
    cases[0] = replace(cases[0], image_sha256=("one", "shared"))
    cases[3] = replace(cases[3], image_sha256=("shared", "two"))
    for seed in range(8):
        folds = assign_folds(cases, count=2, seed=seed)
        assert folds.fold_of["a"] == folds.fold_of["d"]


def test_the_certificate_finds_a_leak_it_did_not_make() -> None:
    cases = (fact("a1", "p", a=2), fact("a2", "p"), fact("b1", "q", "same", a=4), fact("c1", "r", "same"))
    folds = Folds(2, 0, False, {"a1": 0, "a2": 1, "b1": 0, "c1": 1}, cases)
    certificate = folds.certificate()
    assert not certificate["sound"]
    assert certificate["patients_on_two_sides"] == [["a1", "a2"]]
    assert certificate["identical_volumes_on_two_sides"] == [["b1", "c1"]]


def test_the_certificate_finds_a_case_that_is_never_validated() -> None:
    folds = Folds(2, 0, False, {"a": 0, "b": 1, "c": 5}, (fact("a"), fact("b"), fact("c")))
    assert not folds.certificate()["sound"]
    assert not folds.certificate()["each_case_validated_once"]


def test_the_certificate_counts() -> None:
    cases = (fact("a1", "p", a=2), fact("a2", "p", a=4, b=1), fact("b1", "q", a=10))
    certificate = Folds(2, 0, False, {"a1": 0, "a2": 0, "b1": 1}, cases).certificate()
    none = {"cases": 0, "mean_volume_mm3": None}
    assert certificate["folds"] == [
        {
            "fold": 0,
            "patients": 1,
            "cases": 2,
            "labels": {"a": {"cases": 2, "mean_volume_mm3": 3.0}, "b": {"cases": 1, "mean_volume_mm3": 1.0}, "c": none},
        },
        {
            "fold": 1,
            "patients": 1,
            "cases": 1,
            "labels": {"a": {"cases": 1, "mean_volume_mm3": 10.0}, "b": none, "c": none},
        },
    ]


def test_cases_without_labels_are_left_out() -> None:
    cases = [fact("a", a=1), fact("b", a=1), replace(fact("c"), label_volumes_mm3=None)]
    assert set(assign_folds(cases, count=2, seed=0).fold_of) == {"a", "b"}
    with pytest.raises(ManifestError, match="no labelled case"):
        assign_folds(cases[2:], count=2, seed=0)


def test_labelled_but_empty_cases_are_dealt_too() -> None:
    folds = assign_folds([fact(str(i)) for i in range(6)], count=3, seed=0)
    assert Counter(folds.fold_of.values()) == {0: 2, 1: 2, 2: 2}


def test_no_fold_stays_empty_beside_a_patient_with_many_cases() -> None:
    cases = [fact("c0", "P", a=1, b=2, c=8), fact("c1", "P", c=7), fact("c2", a=7, c=1), fact("c3", b=8, c=8)]
    folds = assign_folds(cases, count=3, seed=0)
    assert Counter(folds.fold_of.values()) == {folds.fold_of["c0"]: 2, folds.fold_of["c2"]: 1, folds.fold_of["c3"]: 1}


def test_no_label_outweighs_the_number_of_cases() -> None:
    cases = [fact("c0", a=6), fact("c1", a=3, c=5), fact("c2", a=7, b=2), fact("c3", a=8, b=6)]
    assert sorted(assign_folds(cases, count=4, seed=0).fold_of.values()) == [0, 1, 2, 3]
    mixed = [(7, 5, 0), (0, 8, 0), (0, 0, 7), (4, 0, 0), (2, 4, 0), (3, 3, 8), (0, 1, 0), (3, 0, 2), (0, 4, 7)]
    nine = [fact(f"c{i}", a=a, b=b, c=c) for i, (a, b, c) in enumerate(mixed)]
    assert sorted(Counter(assign_folds(nine, count=4, seed=0).fold_of.values()).values()) == [2, 2, 2, 3]


def test_too_few_patients_say_how_many_folds_there_can_be() -> None:
    cases = [fact("a", "p"), fact("b", "p"), fact("c", "q")]
    with pytest.raises(ManifestError, match=r"2 patients .* cannot be split into 3 folds; set folds\.count to 2"):
        assign_folds(cases, count=3, seed=0)
    with pytest.raises(ValueError, match="at least two folds"):
        assign_folds(cases, count=1, seed=0)


def test_the_manifests_folds_win() -> None:
    cases = [fact("a", fold=2), fact("b", fold=0), fact("c", fold=1), fact("d", fold=0)]
    folds = assign_folds(cases, count=2, seed=0)
    assert (folds.count, folds.fixed) == (3, True)
    assert folds.fold_of == {"a": 2, "b": 0, "c": 1, "d": 0}
    assert folds.validation_cases(0) == ("b", "d")
    assert folds.training_cases(0) == ("a", "c")


@pytest.mark.parametrize(
    ("cases", "told"),
    [
        ([fact("a", fold=0), fact("b", fold=1), fact("c")], "some cases have a fold and 1 have none: c"),
        ([fact("a", fold=0), fact("b", fold=2)], "the manifest's folds 0 to 2 leave out 1"),
        ([fact("a", fold=0), fact("b", fold=0)], "the manifest's folds 0 to 1 leave out 1"),
        ([fact("a", "p", fold=0), fact("b", "p", fold=1)], "patients on two sides, in cases a+b"),
        (
            [fact("a", "p", "x", fold=0), fact("b", "q", "x", fold=1)],
            "identical volumes on two sides, in cases a+b",
        ),
    ],
)
def test_the_manifests_folds_are_checked(cases: list[CaseFacts], told: str) -> None:
    with pytest.raises(ManifestError) as caught:
        assign_folds(cases, count=2, seed=0)
    assert told in str(caught.value)


def test_a_fold_that_is_not_there() -> None:
    folds = assign_folds([fact("a"), fact("b")], count=2, seed=0)
    for fold in (-1, 2):
        with pytest.raises(ValueError, match="there are folds 0 to 1"):
            folds.training_cases(fold)


def test_written_and_read_back(tmp_path: Path) -> None:
    folds = assign_folds([fact(f"case{i}", a=1.5 * i) for i in range(7)], count=3, seed=4)
    write_folds(folds, tmp_path / "folds.json")
    assert read_folds(tmp_path / "folds.json") == folds
    assert json.loads((tmp_path / "folds.json").read_text())["certificate"] == folds.certificate()


def test_a_file_that_was_changed_by_hand_is_found_out(tmp_path: Path) -> None:
    folds = assign_folds([fact("a1", "p"), fact("a2", "p"), fact("b", "q")], count=2, seed=0)
    value = folds.to_json()
    value["fold_of"]["a1"] = 1 - value["fold_of"]["a1"]
    path = tmp_path / "folds.json"
    path.write_text(json.dumps(value), encoding="utf-8")
    with pytest.raises(RunError, match="two sides"):
        read_folds(path)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": "volseg-folds-2"}', '{"format": "volseg-folds-1"}'])
def test_files_that_are_no_folds(tmp_path: Path, text: str) -> None:
    (tmp_path / "folds.json").write_text(text, encoding="utf-8")
    with pytest.raises(RunError, match=r"folds\.json"):
        read_folds(tmp_path / "folds.json")
