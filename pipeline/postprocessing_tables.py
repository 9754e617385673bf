"""What the choice of a post-processing found, as tables and a sentence."""

from __future__ import annotations

from pipeline.postprocessing import Found, Tried, described
from pipeline.report_tables import Row, Table

MOST_ROWS = 15
"""Of what was tried; the rest is in the report's JSON."""

FIGURE_NAMES = {"dice": "Dice", "surface_dice": "surface Dice", "hausdorff_95_mm": "HD95 mm"}


def postprocessing_tables(found: Found) -> list[Table]:
    """What was tried, what it does to cases that had no say in it, and what each fold's cases were cleaned with."""
    tables = [
        Table(_tried_title(found), tuple(_tried_row(row) for row in _shown(found))),
        Table("Before and after post-processing, means over cases, labels that it changes", _effect_rows(found)),
        Table("What is chosen without the cases of a fold", _fold_rows(found)),
    ]
    return [table for table in tables if table.rows]


def honesty(found: Found) -> str:
    """How the figures after post-processing are to be read; empty where there are none."""
    if not found.effects:
        return ""
    return (
        "nested: each case cleaned with what the other folds' cases chose, an honest estimate; "
        "in sample: with what is chosen, measured on the very cases that chose it; "
        "all other figures are without post-processing; 1 where neither side has a label"
    )


def _shown(found: Found) -> list[Tried]:
    """What is chosen, then what gains and what loses, the least p first."""
    moved = [row for row in found.tried if row.p_value is not None or row.parts_lost or row.worst_change < 0]
    ranked = sorted(
        moved, key=lambda row: (not row.is_chosen, row.gain <= 0, 1.0 if row.p_value is None else row.p_value)
    )
    return ranked[:MOST_ROWS]


def _tried_title(found: Found) -> str:
    shown = _shown(found)
    more = f", the first {len(shown)}" if len(shown) == MOST_ROWS else ", those that change any Dice"
    return f"Post-processing: {len(found.tried)} actions tried on {found.patients} patients{more}"


def _tried_row(row: Tried) -> Row:
    return {
        "action": row.action.words,
        "patients changed": row.patients_changed,
        "Dice": row.before,
        "after": row.after,
        "worst loss": f"{-row.worst_change:.4f}" if row.worst_change < 0 else "none",
        "p (Holm)": None if row.p_corrected is None else f"{row.p_corrected:.2g}",
        "verdict": row.why,
    }


def _effect_rows(found: Found) -> tuple[Row, ...]:
    """Of labels that anything of it changes."""
    changed = {e.label for e in found.effects if not e.before == e.nested == e.chosen}
    return tuple(
        {
            "label": effect.label,
            "figure": FIGURE_NAMES.get(effect.figure, effect.figure),
            "before": effect.before,
            "nested": effect.nested,
            "in sample": effect.chosen,
        }
        for effect in found.effects
        if effect.label in changed
    )


def _fold_rows(found: Found) -> tuple[Row, ...]:
    """Empty where no fold is cleaned with anything."""
    if not any(choice.actions for choice in found.folds):
        return ()
    return tuple({"fold": choice.fold, "what the others choose": described(choice.actions)} for choice in found.folds)
