"""What the figures of a network mean, in the words of someone who has trained many. No sentence without its figure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pipeline.inspection.contributions import Change, Contributions, How
from pipeline.inspection.figures import LevelFigures
from pipeline.inspection.receptive import ReceptiveField
from pipeline.inspection.result import Inspection

NOTHING = 0.002
"""A change of Dice below this, in every case, is none. Another seed of the training moves a mean Dice by about 0.005
(benchmarks/LOG.md), and what is taken out here is taken out of the same weights, without that noise."""

HARDLY_DIFFERS = 0.02
"""The same where there is no reference, of the agreement with the untouched result: results that agree better than 0.98
differ by voxels along borders."""

FAILS_BELOW = 0.5
"""A network whose Dice is lower does not work on the case, so that its parts cannot be told from each other."""

DEAD_SHARE = 0.05
"""One channel in twenty; fewer do no harm."""

SILENT_SHARE = 0.95
"""Of activations that are zero or below; half are in a network as it is initialised."""

NARROW_SHARE = 0.25
"""Of the directions that a level could use, by its effective rank: below, a quarter of the channels might do."""

REPEATED_SHARE = 0.25
"""Of channels that repeat another."""

SHUT_SHARE = 0.1
"""Of the RMS of the encoder's features, what a gate lets through when it is as good as shut."""

AT_THE_END = 0.9
"""A radius this near to half a patch might be longer than the patch can show."""


@dataclass(frozen=True)
class Sentence:
    """`about`: the part it is about, as in 'skip 2', 'depth', 'channels of bottleneck 5', 'sight', 'case'."""

    about: str
    text: str


def words_of(found: Inspection) -> tuple[Sentence, ...]:
    """What is to be said, the most important first."""
    sentences: list[Sentence] = []
    if found.contributions is not None:
        changes = _Changes(found.contributions, len(found.cases))
        sentences += _about_cases(changes)
        if changes.tell:
            sentences += [*_about_depth(changes, found), *_about_skips(changes)]
    sentences += [*_about_channels(found.figures), *_about_gates(found.figures), *_about_sight(found.receptive)]
    return tuple(sentences)


class _Changes:
    """How changes of Dice are judged and told of."""

    def __init__(self, found: Contributions, case_count: int) -> None:
        self.found, self.case_count = found, case_count
        with_reference = found.against == "reference"
        self.score = "Dice" if with_reference else "agreement"
        self.nothing = NOTHING if with_reference else HARDLY_DIFFERS

    @property
    def tell(self) -> bool:
        """Whether anything can be read from them."""
        return self.found.dice >= FAILS_BELOW

    @property
    def where(self) -> str:
        """What they are of."""
        return "in this one case" if self.case_count == 1 else f"in the mean of {self.case_count} cases"

    def moves(self, change: Change) -> str:
        """As 'Dice falls by 0.003'."""
        return f"{self.score} {_moves(self.found.falls(change))}"

    def size(self, change: Change) -> str:
        """By how much."""
        return score_text(abs(self.found.falls(change)))

    def is_nothing(self, change: Change) -> bool:
        """In every case."""
        falls = self._falls(change)
        return bool(falls) and all(abs(fall) < self.nothing for fall in falls)

    def rises(self, change: Change) -> bool:
        """In the mean, and in more than half of the cases."""
        falls = self._falls(change)
        return self.found.falls(change) <= -self.nothing and 2 * sum(fall < 0 for fall in falls) > len(falls)

    def mixed(self, change: Change) -> str | None:
        """As 'helps in 2 of 5 cases and harms in 1', of what is changed; None where it harms in no case."""
        falls = self._falls(change)
        harmed = sum(fall <= -self.nothing for fall in falls)
        helped = sum(fall >= self.nothing for fall in falls)
        if not harmed:
            return None
        if not helped:
            return f"helps in no case and harms in {harmed} of {len(falls)}"
        return f"helps in {helped} of {len(falls)} cases and harms in {harmed}"

    def helps_nowhere(self, change: Change) -> bool:
        """What is changed is needed in no case."""
        falls = self._falls(change)
        return bool(falls) and all(fall < self.nothing for fall in falls)

    def of(self, how: How) -> list[Change]:
        """Those of a kind, from the finest level."""
        return sorted((change for change in self.found.changed if change.how == how), key=lambda c: c.level)

    def _falls(self, change: Change) -> list[float]:
        return [fall for fall in self.found.falls_of_cases(change) if not math.isnan(fall)]


def _about_cases(changes: _Changes) -> Iterator[Sentence]:
    dice = changes.found.dice
    if math.isnan(dice):
        yield Sentence("case", f"No label is to be found {changes.where} (no Dice): what parts bring cannot be told.")
    elif changes.found.against == "untouched":
        text = "Without a reference it is not told what is better: agreement is the Dice with the untouched result (1)."
        yield Sentence("case", text)
    elif not changes.tell:
        text = (
            f"The network does not work {changes.where} (Dice {score_text(dice)}): what its parts bring cannot be told."
        )
        yield Sentence("case", text)


def _about_depth(changes: _Changes, found: Inspection) -> Iterator[Sentence]:
    cuts = changes.of("cut")
    if not cuts:
        return

    def without(cut: Change, pronoun: str) -> str:
        return f"{changes.moves(cut)} without {pronoun}, {changes.where}"

    useless = next((cut for cut in cuts if changes.helps_nowhere(cut) or changes.rises(cut)), None)
    if useless is None:
        mixed, figure = changes.mixed(cuts[-1]), without(cuts[-1], "it")
        said = f"The depth is used, down to level {found.depth}" if mixed is None else f"Level {found.depth} {mixed}"
        yield Sentence("depth", f"{said} ({figure}).")
        return
    one = useless.level + 1 == found.depth
    if changes.is_nothing(useless):
        does = "changes nothing" if one else "change nothing"
    elif changes.rises(useless):
        does = "does harm" if one else "do harm"
    else:
        does = "helps in no case" if one else "help in no case"
    levels, figure = _levels(useless.level + 1, found.depth), without(useless, "it" if one else "them")
    yield Sentence("depth", f"The bottleneck is too deep: {levels} {does} ({figure}).{_worth_a_try(useless, found)}")


def _worth_a_try(useless: Change, found: Inspection) -> str:
    if found.features is None or useless.level < 2:
        return ""
    kept, what = list(found.features[: useless.level]), "it" if useless.level + 1 == found.depth else "they"
    return f" A training with plan.features {kept} would show whether {what} can go."


def _about_skips(changes: _Changes) -> Iterator[Sentence]:
    working = []
    for mean in changes.of("mean"):
        zeroed, skip = Change("zeroed", mean.level), f"skip {mean.level}"
        replaced = "when it is replaced by its mean"
        by_mean = f"{changes.moves(mean)} {replaced}"
        if changes.rises(mean):
            yield Sentence(skip, f"{_begun(skip)} carries noise ({by_mean}, {changes.where}).")
        elif (mixed := changes.mixed(mean)) is not None:
            yield Sentence(skip, f"{_begun(skip)} {mixed} ({by_mean}, {changes.where}).")
        elif not changes.is_nothing(mean):
            working.append(mean)
        elif changes.is_nothing(zeroed):
            yield Sentence(skip, f"{_begun(skip)} brings nothing ({by_mean}, {changes.where}).")
        else:
            figure = f"{changes.moves(zeroed)} when it is zeroed, by {changes.size(mean)} {replaced}"
            text = f"{_begun(skip)} is used as a constant, not for its detail ({figure}, {changes.where})."
            yield Sentence(skip, text)
    if working:
        yield Sentence("skips", _ranking(changes, working))


def _ranking(changes: _Changes, working: Sequence[Change]) -> str:
    first, *others = sorted(working, key=changes.found.falls, reverse=True)
    brings = "brings most" if others else "brings detail"
    text = f"Skip {first.level} {brings} ({changes.moves(first)} when it is replaced by its mean, {changes.where}"
    most = changes.found.most_changed(first)
    if most is not None and len(changes.found.headline) > 1:
        text += f"; {most[0]} {_moves(most[1])}"
    rest = ", ".join(f"skip {c.level} ({changes.size(c)})" for c in others)
    return f"{text}){', then ' if rest else ''}{rest}."


def _about_channels(figures: Sequence[LevelFigures]) -> Iterator[Sentence]:
    for level in figures:
        if not math.isfinite(level.energy):
            text = (
                f"{_begun(level.name)} holds values that are not finite (RMS {level.energy}): no result can be trusted."
            )
            yield Sentence(level.name, text)
        elif level.kind != "skip":  # what a skip hands on was said of its encoder
            yield from (Sentence(f"channels of {level.name}", text) for text in _of_channels(level))


def _of_channels(level: LevelFigures) -> Iterator[str]:
    where = "the bottleneck" if level.kind == "bottleneck" else level.name
    if level.dead_share >= DEAD_SHARE:
        are = "is dead: it never rises" if level.dead == 1 else "are dead: they never rise"
        yield f"{level.dead} of {level.channels} channels of {where} {are} above zero."
    elif level.sparsity >= SILENT_SHARE:
        yield f"{_begun(where)} is nearly silent: {level.sparsity:.0%} of its activations are zero or below."
    repeated = round(level.redundant_share * level.channels)
    if level.redundant_share >= REPEATED_SHARE:
        yield f"{repeated} of {level.channels} channels of {where} repeat others: fewer would do."
    possible = min(level.channels, level.voxels - 1)
    if 0 < level.effective_rank < NARROW_SHARE * possible:
        rank = f"effective rank {level.effective_rank:.0f} of at most {possible}"
        yield f"{_begun(where)} uses few of its {level.channels} channels' directions ({rank}): fewer might do."


def _about_gates(figures: Sequence[LevelFigures]) -> Iterator[Sentence]:
    of = {level.name: level for level in figures}
    for level in figures:
        encoder = of.get(f"encoder {level.level}") if level.kind == "skip" else None
        if encoder is not None and encoder.channels == level.channels and encoder.energy > 0:
            share = level.energy / encoder.energy
            if share < SHUT_SHARE:
                text = f"The gate of {level.name} is nearly shut: it lets through {share:.0%} of the encoder's RMS."
                yield Sentence(f"gate of {level.name}", text)


def _about_sight(sight: ReceptiveField) -> Iterator[Sentence]:
    if sight.radius_mm is None:
        return
    where = "around a voxel" if sight.slice_axis is None else "around a voxel in its slice"
    text = f"The network looks {mm_text(sight.radius_mm)} {where} (95 % of its gradient lies there)"
    if sight.extents_mm:
        name, extent = max(sight.extents_mm.items(), key=lambda item: item[1])
        text += f"; {name} is {mm_text(extent)} long, {_seen(sight.radius_mm, extent)}"
    yield Sentence("sight", f"{text}.")
    if sight.deepest_mm is not None and sight.slice_axis is None:
        yield from _about_limits(sight.deepest_mm, sight)


def _seen(radius_mm: float, extent_mm: float) -> str:
    if radius_mm >= extent_mm:
        return "so that it sees all of it from anywhere in it"
    if 2 * radius_mm >= extent_mm:
        return "so that it sees all of it from its middle, but not from its ends"
    return "so that it does not see all of it at once: it decides by what is near"


def _about_limits(deepest_mm: Sequence[float], sight: ReceptiveField) -> Iterator[Sentence]:
    """What stands in the way of seeing more: the depth, or the patch."""
    name, extent = max(sight.extents_mm.items(), key=lambda item: item[1], default=("", 0.0))
    field, patch = min(deepest_mm), min(sight.patch_mm)
    if min(field, patch) < extent:
        limit, what = (field, "Its deepest level sees") if field <= patch else (patch, "A patch shows")
        remedy = "a deeper network" if field <= patch else "a larger patch"
        text = f"{what} {mm_text(limit)} at its narrowest, less than the {mm_text(extent)} of {name}"
        yield Sentence("limit of sight", f"{text}: {remedy} or a coarser spacing would see all of it.")
    elif sight.radius_mm is not None and sight.radius_mm >= AT_THE_END * patch / 2:
        text = f"It looks as far as its patch goes ({mm_text(patch / 2)} from the middle): a larger patch might help."
        yield Sentence("limit of sight", text)


def _moves(fall: float) -> str:
    """As 'falls by 0.003'."""
    return f"{'rises' if fall < 0 else 'falls'} by {score_text(abs(fall))}"


def score_text(value: float) -> str:
    """Of a Dice or a change of one: as few digits as say it."""
    size = abs(value)
    if size < 0.00005:
        return "less than 0.0001"
    return f"{value:.4f}" if size < 0.002 else f"{value:.3f}" if size < 0.1 else f"{value:.2f}"


def mm_text(value: float) -> str:
    """A length."""
    return f"{value:.0f} mm" if value >= 10 else f"{value:.1f} mm"


def _levels(first: int, last: int) -> str:
    """As 'level 5' or 'levels 4, 5 and 6'."""
    numbers = [str(n) for n in range(first, last + 1)]
    return f"level {first}" if first == last else f"levels {', '.join(numbers[:-1])} and {numbers[-1]}"


def _begun(text: str) -> str:
    return text[0].upper() + text[1:]
