"""Intervals and p values of scores, by a bootstrap over images and seeds.

What is drawn again is a pair of twin images with its four questions (`grace.study.statistics`),
within its subtask, and for all arms alike: differences are paired. Seeds are the second level: of n
seeds, n are drawn with replacement, the same ones for all arms that ran with them. The mean of n
drawn seeds varies by (n − 1)/n of what a mean of n seeds does; its deviation is widened by
√(n/(n − 1)). With one seed the spread between seeds is not known, and no interval holds it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from grace.study.statistics import pair_scores

DRAWS = 10_000
_MOST = 200.0  # of a subtask
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
        draws: how often.
        seed: of the draws: the same study gives the same report.

    Attributes:
        subtasks: their names.
        scores: by arm and subtask, mean over seeds.
    """

    def __init__(
        self, arms: Sequence[Mapping[str, Any]], *, draws: int = DRAWS, seed: int = 0
    ) -> None:
        self.subtasks = list(arms[0]["seeds"][0]["right"])
        columns = [(arm["name"], item["right"]) for arm in arms for item in arm["seeds"]]
        places: dict[str, list[int]] = {}
        for place, (name, _) in enumerate(columns):
            places.setdefault(name, []).append(place)
        random = np.random.default_rng(seed)
        chosen = _seed_draws(arms, draws, random)
        self.scores: dict[str, dict[str, float]] = {name: {} for name in places}
        self._draws: dict[str, dict[str, np.ndarray]] = {name: {} for name in places}
        for subtask in self.subtasks:
            values = np.stack([pair_scores(right[subtask]) for _, right in columns])
            drawn = _image_draws(values, draws, random)
            for name, own in places.items():
                self.scores[name][subtask] = float(values[own].mean())
                self._draws[name][subtask] = _with_seeds(drawn[:, own], chosen[name])

    def total(self, name: str) -> Interval:
        """An arm's sum over subtasks."""
        return _within(_interval(self._total(name), self._sum(name)), _MOST * len(self.subtasks))

    def subtask(self, name: str, subtask: str) -> Interval:
        """An arm's score in a subtask."""
        drawn = _interval(self._draws[name][subtask], self.scores[name][subtask])
        return _within(drawn, _MOST)

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
        return np.sum([self._draws[name][subtask] for subtask in self.subtasks], axis=0)

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


def _image_draws(values: np.ndarray, draws: int, random: np.random.Generator) -> np.ndarray:
    """Means of `values` [columns, pairs] over drawn pairs, [draws, columns]."""
    pairs = values.shape[1]
    rows = max(1, _CHUNK // max(1, pairs))
    parts = [
        cluster_counts(pairs, min(rows, draws - start), random) @ values.T / pairs
        for start in range(0, draws, rows)
    ]
    return np.concatenate(parts)


def _seed_draws(
    arms: Sequence[Mapping[str, Any]], draws: int, random: np.random.Generator
) -> dict[str, np.ndarray]:
    """By arm, which of its seeds are drawn, [draws, seeds]; arms of the same seeds share them."""
    shared: dict[tuple[int, ...], np.ndarray] = {}
    found = {}
    for arm in arms:
        seeds = tuple(item["seed"] for item in arm["seeds"])
        if seeds not in shared:
            shared[seeds] = random.integers(len(seeds), size=(draws, len(seeds)))
        found[arm["name"]] = shared[seeds]
    return found


def _with_seeds(drawn: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Means over drawn seeds, [draws], of `drawn` [draws, seeds]."""
    mean, seeds = drawn.mean(1), drawn.shape[1]
    if seeds == 1:
        return mean
    again = np.take_along_axis(drawn, chosen, axis=1).mean(1)
    return mean + np.sqrt(seeds / (seeds - 1)) * (again - mean)


def _within(interval: Interval, most: float) -> Interval:
    """No score is below 0 or above the most there is, widened draws or not."""
    return Interval(interval.value, max(0.0, interval.low), min(most, interval.high))


def _interval(drawn: np.ndarray, value: float) -> Interval:
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Interval(float(value), float(low), float(high))
