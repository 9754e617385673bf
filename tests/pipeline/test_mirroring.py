"""What mirrored passes must do to be worth their time."""

from __future__ import annotations

import pytest

from pipeline.mirroring import weigh_mirroring

from .test_compare import SETTINGS, report

PLAIN = {f"case_{n}": [0.5 + n / 100] for n in range(8)}


def gained(*gains: float) -> dict[str, list[float]]:
    return {i: [dices[0] + gain] for (i, dices), gain in zip(PLAIN.items(), gains, strict=True)}


def test_a_gain_in_every_case_is_worth_it() -> None:
    found = weigh_mirroring(report(PLAIN), report(gained(*[0.01 + n / 1000 for n in range(8)])), SETTINGS)
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
    found = weigh_mirroring(report(PLAIN), report(gained(*gains)), SETTINGS)
    assert not found.worth_it
    assert found.sentence.endswith("left out, which is quicker")


def test_one_patient_proves_nothing() -> None:
    patients = dict.fromkeys(PLAIN, "same")
    better = report(gained(*[0.01 + n / 1000 for n in range(8)]), patients=patients)
    assert not weigh_mirroring(report(PLAIN, patients=patients), better, SETTINGS).worth_it
