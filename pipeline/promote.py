"""Which version of a model counts: the alias `champion` moves to one that the paired test calls better."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.compare import Comparison, compare
from pipeline.config import EvaluateConfig
from pipeline.errors import RunError
from pipeline.report_values import REPORT_JSON, Report
from pipeline.tracking.registry import Candidate, Registry, Version


@dataclass(frozen=True)
class Promotion:
    """What became of an alias. `before` had it, `comparison` is that version (A) against the new one (B), if made."""

    alias: str
    version: Version
    before: Version | None
    comparison: Comparison | None
    moved: bool

    @property
    def told(self) -> str:
        """All of it in a sentence."""
        name, before = f"{self.alias} of {self.version.model}", self.before
        if before is None:
            return f"{name} is {self.version.told}; there was none before, so nothing to compare with"
        if before.number == self.version.number:
            return f"{name} is {self.version.told} already"
        if self.comparison is None:
            return f"{name} is {self.version.told}, moved from {before.told} without a comparison"
        figures = f"Dice {_figures(self.comparison)}"
        if self.moved:
            return f"{name} is {self.version.told}, moved from {before.told}: {figures}"
        word = "is worse" if self.comparison.better(self.comparison.overall) == "A" else "is not shown to be better"
        return f"{name} stays {before.told}: {self.version.told} {word}: {figures}"


def promote(registry: Registry, run_id: str, *, alias: str, model: str | None, if_better: bool) -> Promotion:
    """Give an alias to the model of a run; with `if_better` only on evidence that it beats the version that has it.

    The evidence is that of `pipeline.compare` on the out-of-fold Dice, mean over labels, case by case (`evident_sign`).

    Raises:
        RunError: the run has no model, or with `if_better` the two were not scored on the same cases and references.
    """
    candidate = registry.candidate(run_id, model=model)
    before = registry.aliased(candidate.model, alias)
    # Before anything is written, because it may refuse.
    comparison = _compared(registry, before, candidate) if before is not None and if_better else None
    version = registry.register(candidate)
    if before is not None and before.number == version.number:
        return Promotion(alias, version, before, None, moved=False)
    moved = comparison is None or comparison.better(comparison.overall) == "B"
    outcome = Promotion(alias, version, before, comparison, moved)
    if moved:
        registry.move(version, alias, because=outcome.told)
    return outcome


def _compared(registry: Registry, before: Version, candidate: Candidate) -> Comparison:
    a, b = before.dataset_sha256, candidate.dataset_sha256
    name, advice = f"run {candidate.run_name}", "evaluate both on the same cases, or leave out --if-better"
    if a and b and a != b:
        raise RunError(
            f"{name} was not scored on the cases and references of {before.told} (manifest {b} against {a}); {advice}"
        )
    reports = [
        Report.from_json(registry.read_json(run_id, REPORT_JSON)) for run_id in (before.run_id, candidate.run_id)
    ]
    found = compare(*reports, settings=EvaluateConfig())
    if found.only_in_a or found.only_in_b:
        raise RunError(
            f"{name} was not scored on the cases of {before.told}: {found.overall.n_cases} are in both, "
            f"{len(found.only_in_a)} only there, {len(found.only_in_b)} only here; {advice}"
        )
    return found


def _figures(comparison: Comparison) -> str:
    overall = comparison.overall
    if overall.mean_a is None or overall.mean_b is None or overall.difference is None:
        return "of no case in both"
    interval = overall.interval_95
    spread = "" if interval is None else f"95 % {interval[0]:+.4f} to {interval[1]:+.4f}, "
    p_value = "no case differs" if overall.p_corrected is None else f"p = {overall.p_corrected:.2g}"
    change = f"{overall.difference:+.4f} ({spread}{p_value})"
    return f"{overall.mean_b:.4f} against {overall.mean_a:.4f}, {change}, over {overall.n_cases} cases"
