"""What mirrored passes must do to be worth their time."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.bundle import find_bundles, load_bundle, set_mirror
from pipeline.errors import BundleError
from pipeline.mirroring import weigh_mirroring
from pipeline.predict import Model
from pipeline.report_values import CaseScores, Mirroring
from pipeline.segment import SegmentSettings, predict_settings

from .test_compare import SETTINGS, few_gain_much, report

PLAIN = {f"case_{n}": [0.5 + n / 100] for n in range(8)}
CLEAR = [0.01 + n / 1000 for n in range(8)]


def weighed(plain: Sequence[CaseScores], mirrored: Sequence[CaseScores]) -> Mirroring:
    return weigh_mirroring(plain, mirrored, SETTINGS)


def cases(
    dices: Mapping[str, Sequence[float | None]], *, patients: Mapping[str, str] | None = None
) -> tuple[CaseScores, ...]:
    return report(dices, patients=patients).cases


def gained(*gains: float) -> dict[str, list[float]]:
    return {i: [dices[0] + gain] for (i, dices), gain in zip(PLAIN.items(), gains, strict=True)}


def test_a_gain_in_every_case_is_worth_it() -> None:
    found = weighed(cases(PLAIN), cases(gained(*CLEAR)))
    assert found.worth_it
    assert (found.n_cases, found.p_value) == (8, pytest.approx(2 / 2**8))
    assert found.sentence == (
        "mirrored passes: Dice 0.5350 without, 0.5485 with them over 8 cases, p = 0.0078; "
        "taken by every prediction of this model"
    )


@pytest.mark.parametrize(
    "gains",
    [
        pytest.param((0.04, -0.02, 0.03, -0.01, 0.05, -0.03, 0.02, -0.015), id="luck"),
        pytest.param(tuple(0.0005 + n / 1e5 for n in range(8)), id="beyond doubt but tiny"),
        pytest.param(tuple(-0.01 - n / 1000 for n in range(8)), id="harm"),
        pytest.param((0.0,) * 8, id="nothing"),
    ],
)
def test_what_is_not_worth_it(gains: tuple[float, ...]) -> None:
    found = weighed(cases(PLAIN), cases(gained(*gains)))
    assert not found.worth_it
    assert found.sentence.endswith("left out, which is quicker")


def test_what_harms_most_patients_is_not_worth_what_a_few_gain() -> None:
    plain = {f"c{n:02}": [0.5] for n in range(40)}
    found = weighed(cases(plain), cases({i: [0.5 + x] for i, x in zip(plain, few_gain_much(), strict=True)}))
    assert found.p_value is not None
    assert found.p_value < 0.001
    assert not found.worth_it


def test_one_patient_proves_nothing() -> None:
    patients = dict.fromkeys(PLAIN, "same")
    assert not weighed(cases(PLAIN, patients=patients), cases(gained(*CLEAR), patients=patients)).worth_it


def test_no_dice_in_both_tells_nothing() -> None:
    found = weighed(cases({"a": [0.5], "b": [None]}), cases({"a": [None], "b": [0.5]}))
    assert (found.n_cases, found.worth_it) == (0, False)
    assert found.sentence == "mirrored passes: no case tells what they are worth; they are left out"


def test_each_fold_by_what_the_others_say() -> None:
    """Eight cases of fold 1 gain, those of fold 0 do not: they alone would not take what they do not gain by."""
    plain = {f"case_{n}": [0.5] for n in range(16)}
    mirrored = {f"case_{n}": [0.5 + (CLEAR[n - 8] if n >= 8 else 0.0)] for n in range(16)}
    ways = (
        [case.model_copy(update={"fold": int(int(case.case_id[5:]) >= 8)}) for case in cases(dices)]
        for dices in (plain, mirrored)
    )
    found = weighed(*ways)
    assert found.worth_it
    assert found.dice_mirrored == pytest.approx(0.5 + sum(CLEAR) / 16)
    # Fold 0 hears of the gain and has none; fold 1, which has it, hears of nothing.
    assert found.dice_nested == pytest.approx(0.5)
    assert found.sentence.endswith("; 0.5000 where each fold heeds only the others")


def test_folds_that_disagree_are_refused_unless_it_is_said(small_bundle: Path, tmp_path: Path) -> None:
    for fold, wanted in enumerate((True, False)):
        shutil.copytree(small_bundle, tmp_path / f"fold_{fold}" / "bundle")
        set_mirror(tmp_path / f"fold_{fold}" / "bundle", wanted, {})
    one, other = (load_bundle(path) for path in find_bundles(tmp_path))
    assert (Model((one,)).mirror, Model((other,)).mirror) == (True, False)
    left_open = SegmentSettings(("nifti",), None, None, False)
    for bundles in ((one, other), (other, one)):
        with pytest.raises(BundleError, match=r"mirrored passes.*`volseg postprocess RUN`, or give --mirror or --no-"):
            predict_settings(Model(bundles), left_open)
        assert predict_settings(Model(bundles), replace(left_open, mirror=False)).mirror is False
