"""Intervals and p values of scores: a bootstrap over images, and t draws for seeds.

What is drawn again is a pair of twin images with its four questions (`grace.study.statistics`),
within its subtask, and for all arms alike: differences are paired by image. Pairs that ask the same
are drawn together, where study.json says which these are: an arm that knows a color knows it in all
its pictures, and an interval is to hold for other colors, too.

What another seed would change is added to every draw of an arm with n of them: s · t / √n, with t
drawn from Student's distribution. s² is the variance between seeds, pooled over arms of one kind
(trained under a teacher, trained without one, post-training) at one number of bits, with as many
degrees of freedom as these have seeds less one each; where those are fewer than `LEAST_FREEDOM`,
over all arms of the kind, or all with several seeds; and the arm's own where that is larger. Two or
three seeds of one arm alone say little of their own spread: a bootstrap over them rejects true
equality several times too often. s holds what seeds change on the very images, too, which the first
level has already: intervals are a little too wide where seeds hardly matter.

Where no arm has two seeds s is unknown (`Resampled.knows_seeds`): intervals then hold
images only, and say nothing about methods.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from grace.study.arms import UNTAUGHT
from grace.study.statistics import pair_scores

DRAWS = 10_000
LEAST_FREEDOM = 4
_MOST = 200.0  # of a subtask
_TOTAL = ""  # beside subtasks' names
_CHUNK = 1 << 22  # counts in work at once


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference(Interval):
    """A difference of two arms, and the two-sided p value of there being none."""

    p: float


class Resampled:
    """The scores of a study's arms, drawn again.

    Args:
        arms: of study.json; each has `name` and `seeds` with `seed` and `right`.
        wordings: of study.json's `benchmark`: by subtask, a number for every pair of images, the
            same for pairs that ask the same; without it every pair is drawn by itself.
        draws: how often.
        seed: of the draws: the same study gives the same report.

    Raises:
        ValueError: `wordings` has not a number for every pair.

    Attributes:
        subtasks: their names.
        scores: by arm and subtask, mean over seeds.
    """

    def __init__(
        self,
        arms: Sequence[Mapping[str, Any]],
        wordings: Mapping[str, Sequence[int]] | None = None,
        *,
        draws: int = DRAWS,
        seed: int = 0,
    ) -> None:
        self.subtasks = list(arms[0]["seeds"][0]["right"])
        columns = [(arm["name"], item["right"]) for arm in arms for item in arm["seeds"]]
        places: dict[str, list[int]] = {}
        for place, (name, _) in enumerate(columns):
            places.setdefault(name, []).append(place)
        random = np.random.default_rng(seed)
        self.scores: dict[str, dict[str, float]] = {name: {} for name in places}
        self._draws: dict[str, dict[str, np.ndarray]] = {name: {} for name in places}
        by_seed: dict[str, np.ndarray] = {}
        for subtask in self.subtasks:
            values = np.stack([pair_scores(right[subtask]) for _, right in columns])
            drawn = _image_draws(values, _groups(wordings, subtask, values), draws, random)
            by_seed[subtask] = values.mean(1)
            for name, own in places.items():
                self.scores[name][subtask] = float(values[own].mean())
                self._draws[name][subtask] = drawn[:, own].mean(1)
        by_seed[_TOTAL] = np.sum(list(by_seed.values()), axis=0)
        pools = {name: _alike(arm, arms) for name, arm in ((arm["name"], arm) for arm in arms)}
        self._unknown = {name for name, alike in pools.items() if alike is not None and not alike}
        self._seeds: dict[str, dict[str, np.ndarray]] = {}
        for name, alike in pools.items():
            if alike:
                groups = [places[other] for other in alike]
                freedom = sum(len(group) - 1 for group in groups)
                t = random.standard_t(freedom, draws) / np.sqrt(len(places[name]))
                itself = [places[name]] if len(places[name]) > 1 else groups
                spread = {
                    part: max(_pooled(scores, groups), _pooled(scores, itself))
                    for part, scores in by_seed.items()
                }
                self._seeds[name] = {part: t * size for part, size in spread.items()}

    def knows_seeds(self, name: str) -> bool:
        """Whether it is known what another seed would change of this arm; of one that has none,
        nothing."""
        return name not in self._unknown

    def total(self, name: str) -> Interval:
        """An arm's sum over subtasks."""
        return _within(_interval(self._total(name), self._sum(name)), _MOST * len(self.subtasks))

    def subtask(self, name: str, subtask: str) -> Interval:
        """An arm's score in a subtask."""
        drawn = self._draws[name][subtask] + self._of_seeds(name, subtask)
        return _within(_interval(drawn, self.scores[name][subtask]), _MOST)

    def ratio(self, name: str, other: str) -> Interval:
        """An arm's total over another's; NaN where that has none."""
        if self._sum(other) == 0:
            return Interval(float("nan"), float("nan"), float("nan"))
        with np.errstate(divide="ignore", invalid="ignore"):
            drawn = self._total(name) / self._total(other)
        return _interval(drawn[np.isfinite(drawn)], self._sum(name) / self._sum(other))

    def difference(self, name: str, other: str) -> Difference:
        """An arm's total minus another's."""
        drawn = self._total(name) - self._total(other)
        found = _interval(drawn, self._sum(name) - self._sum(other))
        return Difference(found.value, found.low, found.high, p_value(drawn))

    def _total(self, name: str) -> np.ndarray:
        images = np.sum([self._draws[name][subtask] for subtask in self.subtasks], axis=0)
        return images + self._of_seeds(name, _TOTAL)

    def _of_seeds(self, name: str, part: str) -> Any:
        return self._seeds[name][part] if name in self._seeds else 0.0

    def _sum(self, name: str) -> float:
        return sum(self.scores[name].values())


def p_value(drawn: np.ndarray) -> float:
    """Two-sided p of a drawn difference being 0: twice the smaller tail beyond it, at least
    2/(draws + 1)."""
    beyond = min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
    return min(1.0, 2 * (beyond + 1) / (len(drawn) + 1))


def holm(p: Sequence[float]) -> list[float]:
    """Holm's adjusted p values, in the order of `p`: any of a family that is at most 0.05 is wrong
    with a probability of at most 5 %, for the whole family."""
    order = sorted(range(len(p)), key=lambda index: p[index])
    adjusted, largest = [0.0] * len(p), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p) - rank) * p[index]))
        adjusted[index] = largest
    return adjusted


def cluster_counts(clusters: int, draws: int, random: np.random.Generator) -> np.ndarray:
    """How often each cluster is drawn, [draws, clusters]: each row sums to `clusters`."""
    return random.multinomial(clusters, np.full(clusters, 1 / clusters), size=draws)


def _groups(
    wordings: Mapping[str, Sequence[int]] | None, subtask: str, values: np.ndarray
) -> np.ndarray:
    """The group of every pair, 0 to one less than there are."""
    pairs = values.shape[1]
    if wordings is None:
        return np.arange(pairs)
    if len(wordings[subtask]) != pairs:
        raise ValueError(
            f"study: wordings of {subtask} must be a number for each of {pairs} pairs of images, "
            f"got {len(wordings[subtask])}"
        )
    return np.unique(wordings[subtask], return_inverse=True)[1]


def _image_draws(
    values: np.ndarray, groups: np.ndarray, draws: int, random: np.random.Generator
) -> np.ndarray:
    """Means of `values` [columns, pairs] over drawn groups of pairs, [draws, columns]."""
    count = int(groups.max()) + 1 if len(groups) else 0
    sizes = np.bincount(groups, minlength=count)
    sums = np.stack([np.bincount(groups, row, minlength=count) for row in values], axis=1)
    rows = max(1, _CHUNK // max(1, count))
    parts = []
    for start in range(0, draws, rows):
        drawn = cluster_counts(count, min(rows, draws - start), random)
        parts.append(drawn @ sums / (drawn @ sizes)[:, None])
    return np.concatenate(parts)


def _alike(arm: Mapping[str, Any], arms: Sequence[Mapping[str, Any]]) -> list[str] | None:
    """Names of the arms whose seeds vary as this one's do; None for an arm that is the same for
    all seeds, none where nobody has two."""
    if not _has_seeds(arm):
        return None
    several = [a for a in arms if len(a["seeds"]) > 1]
    kind = [a for a in several if _kind(a) == _kind(arm)]
    own = [a for a in kind if a["bits"] == arm["bits"]]
    for alike in (own, kind):
        if sum(len(a["seeds"]) - 1 for a in alike) >= LEAST_FREEDOM:
            return [a["name"] for a in alike]
    return [a["name"] for a in several]


def _kind(arm: Mapping[str, Any]) -> str:
    """Arms of a kind vary alike: a teacher can take one seed out of a plateau and leave another."""
    if not arm["trained"]:
        return "post-training"
    return "untaught" if arm["method"] in UNTAUGHT else "taught"


def _has_seeds(arm: Mapping[str, Any]) -> bool:
    started = arm.get("start", "student") != "student"  # from one that was trained
    return bool(arm["trained"]) or started or len(arm["seeds"]) > 1


def _pooled(scores: np.ndarray, groups: Sequence[Sequence[int]]) -> float:
    """Standard deviation between seeds, over several arms' scores: groups of places in `scores`."""
    squares = sum(float(((scores[g] - scores[g].mean()) ** 2).sum()) for g in map(list, groups))
    return float(np.sqrt(squares / sum(len(group) - 1 for group in groups)))


def _within(interval: Interval, most: float) -> Interval:
    """No score is below 0 or above the most there is, widened draws or not."""
    return Interval(interval.value, max(0.0, interval.low), min(most, interval.high))


def _interval(drawn: np.ndarray, value: float) -> Interval:
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Interval(float(value), float(low), float(high))
