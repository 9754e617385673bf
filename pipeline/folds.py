"""Split labelled cases into folds: a patient never on two sides, labels and their volumes spread evenly.

Patients who share an identical volume count as one. The order of the work is that of Sechidis, Tsoumakas and
Vlahavas 2011 (On the Stratification of Multi-Label Data, ECML PKDD, doi 10.1007/978-3-642-23808-6_10): the
rarest label first, each of its patients to the fold that has fewest cases with it. What that leaves open is
decided by volume: each case has a rank among the volumes of each label, counted from the middle, and goes where
the ranks cancel best. Ranks, because one mistaken label would outweigh every true difference of volume.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline.checks import CaseFacts
from pipeline.errors import ManifestError, RunError
from pipeline.files import write_json
from pipeline.manifest_formats import named

_FORMAT = "volseg-folds-1"
_ROUNDS_SHUFFLED = 2

Keys = Callable[[CaseFacts], Iterable[str]]


@dataclass(frozen=True)
class Folds:
    """The fold in which each labelled case is validated; in all others it is trained on.

    cases: sorted by case id. fixed: the manifest gave the folds, so that `seed` had no say.
    """

    count: int
    seed: int
    fixed: bool
    fold_of: Mapping[str, int]
    cases: tuple[CaseFacts, ...]

    def training_cases(self, fold: int) -> tuple[str, ...]:
        """Case ids, sorted."""
        self._require(fold)
        return tuple(c.case_id for c in self.cases if self.fold_of[c.case_id] != fold)

    def validation_cases(self, fold: int) -> tuple[str, ...]:
        """Case ids, sorted."""
        self._require(fold)
        return tuple(c.case_id for c in self.cases if self.fold_of[c.case_id] == fold)

    def certificate(self) -> dict[str, Any]:
        """What holds of this assignment, found out from it and not from how it was made, as a JSON value.

        `sound` is true when every case is validated once and neither a patient nor an identical volume stands
        on two sides of any fold; otherwise the cases of each leak are listed.
        """
        patients, volumes = _leaks(self, _patient), _leaks(self, _volumes)
        validated = Counter(c for fold in range(self.count) for c in self.validation_cases(fold))
        once = validated == Counter(case.case_id for case in self.cases)
        return {
            "sound": once and not patients and not volumes,
            "each_case_validated_once": once,
            "patients_on_two_sides": patients,
            "identical_volumes_on_two_sides": volumes,
            "patients_joined_for_identical_volumes": _joined_patients(self.cases),
            "folds": [self._contents(fold) for fold in range(self.count)],
        }

    def to_json(self) -> dict[str, Any]:
        """Everything, with the certificate, as a JSON value."""
        return {
            "format": _FORMAT,
            "count": self.count,
            "seed": self.seed,
            "fixed": self.fixed,
            "fold_of": {case.case_id: self.fold_of[case.case_id] for case in self.cases},
            "certificate": self.certificate(),
            "cases": [asdict(case) for case in self.cases],
        }

    def _require(self, fold: int) -> None:
        if not 0 <= fold < self.count:
            raise ValueError(f"there are folds 0 to {self.count - 1}, found {fold}")

    def _contents(self, fold: int) -> dict[str, Any]:
        cases = [case for case in self.cases if self.fold_of[case.case_id] == fold]
        volumes: dict[str, list[float]] = {name: [] for c in self.cases for name in c.label_volumes_mm3 or {}}
        for case in cases:
            for name, volume in _present(case).items():
                volumes[name].append(volume)
        return {
            "fold": fold,
            "patients": len({case.patient_id for case in cases}),
            "cases": len(cases),
            "labels": {
                name: {"cases": len(v), "mean_volume_mm3": round(sum(v) / len(v), 3) if v else None}
                for name, v in volumes.items()
            },
        }


def assign_folds(facts: Sequence[CaseFacts], *, count: int, seed: int) -> Folds:
    """Split the labelled cases; the folds of the manifest win when every labelled case has one.

    The result depends on the cases, `count` and `seed` alone, not on the order of the cases. Folds differ by no
    more cases than the largest patient has.

    Raises:
        ManifestError: no labelled case, fewer patients than folds, or folds of the manifest that are incomplete,
            leave one out, or put a patient or an identical volume on two sides.
        ValueError: `count` is below two.
    """
    if count < 2:
        raise ValueError(f"at least two folds are needed, found {count}")
    cases = tuple(sorted((f for f in facts if f.label_volumes_mm3 is not None), key=lambda f: f.case_id))
    if not cases:
        raise ManifestError("no labelled case was found, so there is nothing to split into folds")
    if any(case.fold is not None for case in cases):
        return _fixed_folds(cases, seed)
    groups = _groups(cases, _patient, _volumes)
    if len(groups) < count:
        raise ManifestError(
            f"{len(groups)} patients (those with an identical volume count as one) cannot be split into {count} "
            f"folds; set folds.count to {len(groups)} or less"
        )
    ranks = _volume_ranks(cases)
    fold_of = _deal([_group(group, ranks) for group in groups], count, seed)
    return Folds(count, seed, False, {case.case_id: fold_of[case.case_id] for case in cases}, cases)


def write_folds(folds: Folds, path: Path) -> None:
    """Write `Folds.to_json` atomically.

    Raises:
        RunError: the file cannot be written.
    """
    write_json(path, folds.to_json())


def read_folds(path: Path) -> Folds:
    """The inverse of `write_folds`; the certificate is made anew, not believed.

    Raises:
        RunError: unreadable, of another format, or with a leak.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if value["format"] != _FORMAT:
            raise RunError(f"{path}: format '{value['format']}' found, expected '{_FORMAT}'")
        cases = tuple(CaseFacts.from_json(case) for case in value["cases"])
        folds = Folds(value["count"], value["seed"], value["fixed"], value["fold_of"], cases)
        sound = folds.certificate()["sound"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise RunError(f"{path}: cannot be read as folds ({type(error).__name__})") from error
    if not sound:
        raise RunError(f"{path}: its folds put a patient or a volume on two sides; delete it to split anew")
    return folds


def _patient(case: CaseFacts) -> list[str]:
    return [case.patient_id]


def _volumes(case: CaseFacts) -> tuple[str, ...]:
    return case.image_sha256


def _present(case: CaseFacts) -> dict[str, float]:
    return {name: volume for name, volume in (case.label_volumes_mm3 or {}).items() if volume > 0}


def _volume_ranks(cases: Sequence[CaseFacts]) -> dict[str, dict[str, float]]:
    """Case id to label name to the rank of its volume, -1/2 (smallest) to 1/2; absent labels are left out."""
    volumes: dict[str, list[float]] = defaultdict(list)
    for case in cases:
        for name, volume in _present(case).items():
            volumes[name].append(volume)
    for of_label in volumes.values():
        of_label.sort()
    return {
        case.case_id: {name: _rank(volume, volumes[name]) for name, volume in _present(case).items()} for case in cases
    }


def _rank(value: float, ordered: Sequence[float]) -> float:
    middle = (bisect_left(ordered, value) + bisect_right(ordered, value)) / 2
    return middle / len(ordered) - 0.5


def _leaks(folds: Folds, keys: Keys) -> list[list[str]]:
    """The cases of every key that some fold both trains on and validates."""
    holders = defaultdict(set)
    for case in folds.cases:
        for key in keys(case):
            holders[key].add(case.case_id)
    leaking = set()
    for fold in range(folds.count):
        training, validation = set(folds.training_cases(fold)), set(folds.validation_cases(fold))
        leaking |= {key for key, ids in holders.items() if ids & training and ids & validation}
    return sorted(sorted(holders[key]) for key in leaking)


def _groups(cases: Sequence[CaseFacts], *links: Keys) -> list[list[CaseFacts]]:
    """Cases that are linked by a shared key of any kind, directly or through others, each group once."""
    group_of = {case.case_id: [case] for case in cases}
    for keys in links:
        first: dict[str, CaseFacts] = {}
        for case in cases:
            for key in keys(case):
                kept = group_of[first.setdefault(key, case).case_id]
                joined = group_of[case.case_id]
                if joined is not kept:
                    kept += joined
                    group_of.update({c.case_id: kept for c in joined})
    return list({id(group): group for group in group_of.values()}.values())


def _joined_patients(cases: Sequence[CaseFacts]) -> list[list[str]]:
    groups = _groups(cases, _patient, _volumes)
    return sorted(sorted(c.case_id for c in g) for g in groups if len({c.patient_id for c in g}) > 1)


def _fixed_folds(cases: tuple[CaseFacts, ...], seed: int) -> Folds:
    without = [case.case_id for case in cases if case.fold is None]
    if without:
        raise ManifestError(f"some cases have a fold and {len(without)} have none: {named(without)}")
    fold_of = {case.case_id: case.fold for case in cases if case.fold is not None}
    count = max(2, max(fold_of.values()) + 1)
    empty = [str(fold) for fold in range(count) if fold not in fold_of.values()]
    if empty:
        raise ManifestError(f"the manifest's folds 0 to {count - 1} leave out {', '.join(empty)}")
    folds = Folds(count, seed, True, fold_of, cases)
    certificate = folds.certificate()
    for what in ("patients_on_two_sides", "identical_volumes_on_two_sides"):
        if certificate[what]:
            leaks = named(["+".join(ids) for ids in certificate[what]])
            raise ManifestError(f"the manifest's folds have {what.replace('_', ' ')}, in cases {leaks}")
    return folds


@dataclass(frozen=True)
class _Group:
    """Cases that must stay together: how many have each label, and the sum of their volumes' ranks."""

    case_ids: tuple[str, ...]
    presence: Counter[str]
    ranks: dict[str, float]

    def draw(self, seed: int) -> str:
        """A lot drawn for the group, the same whichever other groups there are."""
        return hashlib.sha256(f"{seed} {min(self.case_ids)}".encode()).hexdigest()

    def extremeness(self) -> float:
        """How far its volumes are from the middle."""
        return sum(rank**2 for rank in self.ranks.values())


@dataclass
class _Load:
    """What a fold holds so far."""

    cases: int = 0
    presence: Counter[str] = field(default_factory=Counter)
    ranks: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def add(self, group: _Group) -> None:
        self.cases += len(group.case_ids)
        self.presence.update(group.presence)
        for name, rank in group.ranks.items():
            self.ranks[name] += rank

    def resemblance(self, group: _Group) -> float:
        """Positive when the fold's volumes are large where the group's are, negative when they cancel."""
        return sum(rank * self.ranks[name] for name, rank in group.ranks.items())


def _group(members: Sequence[CaseFacts], ranks: Mapping[str, Mapping[str, float]]) -> _Group:
    presence: Counter[str] = Counter()
    summed: dict[str, float] = defaultdict(float)
    for case in sorted(members, key=lambda case: case.case_id):
        presence.update(ranks[case.case_id].keys())
        for name, rank in ranks[case.case_id].items():
            summed[name] += rank
    return _Group(tuple(sorted(case.case_id for case in members)), presence, dict(summed))


def _deal(groups: Sequence[_Group], count: int, seed: int) -> dict[str, int]:
    """Case id to fold."""
    loads = [_Load() for _ in range(count)]
    largest = max(len(group.case_ids) for group in groups)
    waiting = sorted(groups, key=lambda group: group.draw(seed))
    fold_of: dict[str, int] = {}
    while waiting:
        label = _rarest_label(waiting)
        now = [group for group in waiting if label is None or group.presence[label]]
        waiting = [group for group in waiting if label is not None and not group.presence[label]]
        for group in _dealing_order(now, count):
            fold = _fold_for(group, label, loads, largest)
            loads[fold].add(group)
            fold_of.update(dict.fromkeys(group.case_ids, fold))
    return fold_of


def _rarest_label(groups: Iterable[_Group]) -> str | None:
    """The label that the fewest cases have; None when there is none left."""
    cases: Counter[str] = Counter()
    for group in groups:
        cases.update(group.presence)
    return min(cases, key=lambda name: (cases[name], name), default=None)


def _dealing_order(groups: list[_Group], count: int) -> list[_Group]:
    """Most cases first, then the most extreme volumes; blocks of a few rounds keep the order that was drawn."""
    ranked = sorted(groups, key=lambda group: (-len(group.case_ids), -group.extremeness()))
    block = {group.case_ids: place // (_ROUNDS_SHUFFLED * count) for place, group in enumerate(ranked)}
    return sorted(groups, key=lambda group: (-len(group.case_ids), block[group.case_ids]))


def _fold_for(group: _Group, label: str | None, loads: Sequence[_Load], largest: int) -> int:
    """The fold with fewest of the label, then least like the group; none that would get too many cases."""
    fewest = min(load.cases for load in loads)
    # An empty fold comes first, so that none stays empty when a patient with many cases widens the bound.
    bound = fewest + largest if fewest else len(group.case_ids)
    open_folds = [i for i, load in enumerate(loads) if load.cases + len(group.case_ids) <= bound]

    def held(fold: int) -> tuple[int, float, int]:
        load = loads[fold]
        return load.presence[label or ""], load.resemblance(group), load.cases

    return min(open_folds, key=held)
