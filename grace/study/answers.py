"""Single answers of a study, and what the teacher's entropy says of its errors.

Answers are arrays by name, as `grace.study.gather` keeps them in questions.npz.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from grace.study.resampling import DRAWS, Interval, cluster_counts

PAPER_R = 0.484  # Pearson's r of the teacher's entropy and its errors, in the paper
_BINS = 10
Answers = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class EntropyError:
    """Whether the teacher errs where it is uncertain.

    Attributes:
        r: Pearson's r of entropy and error over questions; None where it never errs, or always.
        questions, errors: how many.
        mean: of the entropy, in nats.
        deviations: standard deviations of entropy and error; None without single answers.
        bins: (mean entropy, share of errors, its standard error) of questions of like entropy.
    """

    r: Interval | None
    questions: int
    errors: int
    mean: float
    deviations: tuple[float, float] | None = None
    bins: tuple[tuple[float, float, float], ...] = ()


def wordings(answers: Answers) -> dict[str, list[int]]:
    """By subtask, a number for every pair of neighbouring images, in their order: that of what the
    two ask, so that pairs with the same questions have the same. A last image without another is
    left out, as in `grace.study.statistics`."""
    found: dict[str, list[int]] = {}
    for (subtask, _), (number, images) in _asked(answers).items():
        found.setdefault(subtask, []).extend([number] if images == 2 else [])
    return found


def _asked(answers: Answers) -> dict[tuple[str, int], tuple[int, int]]:
    """Of every subtask and pair: the number of what it asks, and how many images it has."""
    pairs = _pairs(answers)
    asked: dict[tuple[str, int], set[str]] = {}
    images: dict[tuple[str, int], set[int]] = {}
    for pair, image, question in zip(pairs, answers["image"], answers["question"], strict=True):
        asked.setdefault(pair, set()).add(str(question))
        images.setdefault(pair, set()).add(int(image))
    numbers: dict[tuple[str, frozenset[str]], int] = {}
    return {
        pair: (numbers.setdefault((pair[0], frozenset(each)), len(numbers)), len(images[pair]))
        for pair, each in asked.items()
    }


def _pairs(answers: Answers) -> list[tuple[str, int]]:
    """Of every question its subtask, and there the number of its image's pair."""
    places: dict[str, dict[int, int]] = {}
    found = []
    for subtask, image in zip(answers["subtask"], answers["image"], strict=True):
        own = places.setdefault(str(subtask), {})
        found.append((str(subtask), own.setdefault(int(image), len(own)) // 2))
    return found


def entropy_error(answers: Answers, teacher: str) -> EntropyError:
    """Of the answers of `teacher`, named `teacher-s<seed>`, as in the paper's figure: the interval
    is over pairs of twin images, those that ask the same together."""
    entropy = answers[f"entropy.{teacher}"].astype(np.float64)
    wrong = ~answers[f"right.{teacher}"].astype(bool)
    return EntropyError(
        r=pearson(entropy, wrong.astype(np.float64), _clusters(answers)),
        questions=len(wrong),
        errors=int(wrong.sum()),
        mean=float(entropy.mean()),
        deviations=(float(entropy.std()), float(wrong.std())),
        bins=tuple(_bins(entropy, wrong)),
    )


def _clusters(answers: Answers) -> np.ndarray:
    """Of every question, the number of what its pair of images asks."""
    asked = _asked(answers)
    return np.array([asked[pair][0] for pair in _pairs(answers)])


def as_json(found: EntropyError) -> dict[str, Any]:
    """What study.json holds as `teacher_entropy`."""
    r = found.r
    return {
        "questions": found.questions,
        "errors": found.errors,
        "mean": found.mean,
        "r": r and r.value,
        "low": r and r.low,
        "high": r and r.high,
        "deviations": found.deviations and list(found.deviations),
        "bins": [list(each) for each in found.bins],
    }


def from_json(found: Mapping[str, Any] | None) -> EntropyError | None:
    """The inverse of `as_json`; deviations and bins may be missing, and the interval, of which then
    no more is known than that r is one."""
    if not found:
        return None
    r = found["r"]
    r = None if r is None else Interval(r, found.get("low", -1.0), found.get("high", 1.0))
    deviations = tuple(found.get("deviations") or ()) or None
    bins = tuple((x, share, error) for x, share, error in found.get("bins", ()))
    return EntropyError(r, found["questions"], found["errors"], found["mean"], deviations, bins)


def pearson(
    x: np.ndarray, y: np.ndarray, clusters: np.ndarray, *, draws: int = DRAWS, seed: int = 0
) -> Interval | None:
    """Pearson's r of x and y with a 95 % interval, drawing whole clusters of them again; None where
    one of the two does not vary."""
    if x.std() == 0 or y.std() == 0:
        return None
    _, place = np.unique(clusters, return_inverse=True)
    parts = np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], 1)
    sums = np.zeros((place.max() + 1, 6))
    np.add.at(sums, place, parts)
    random, drawn = np.random.default_rng(seed), []
    rows = max(1, (1 << 22) // len(sums))
    for start in range(0, draws, rows):
        counts = cluster_counts(len(sums), min(rows, draws - start), random)
        drawn.append(_r_of_sums(counts @ sums))
    low, high = np.nanpercentile(np.concatenate(drawn), [2.5, 97.5])
    return Interval(float(_r_of_sums(sums.sum(0)[None])[0]), float(low), float(high))


def _r_of_sums(sums: np.ndarray) -> np.ndarray:
    """r by sums of 1, x, y, x², y², xy, [n, 6]; NaN where one does not vary."""
    n, x, y, xx, yy, xy = sums.T
    spread = (n * xx - x * x) * (n * yy - y * y)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(spread > 1e-9, (n * xy - x * y) / np.sqrt(spread), np.nan)


def _bins(entropy: np.ndarray, wrong: np.ndarray) -> list[tuple[float, float, float]]:
    """Questions sorted by entropy, in equally many a bin."""
    order = np.argsort(entropy, kind="stable")
    found = []
    for part in np.array_split(order, min(_BINS, len(order))):
        share = float(wrong[part].mean())
        error = float(np.sqrt(share * (1 - share) / len(part)))
        found.append((float(entropy[part].mean()), share, error))
    return found


def disagreements(answers: Answers, arms: Sequence[str], count: int = 6) -> list[int]:
    """Questions on which arms disagree and the teacher is right: the first of each subtask, then
    the second, and so on, in the file's order; nothing else is chosen for.

    Args:
        answers: of questions.npz.
        arms: `<arm>-s<seed>` of the arms that are compared.
        count: how many at most.
    """
    said = np.stack([answers[f"said.{name}"] for name in arms])
    differ = (said != said[0]).any(0)
    for name in answers:
        if name.startswith("right.teacher"):
            differ &= answers[name].astype(bool)
    seen: dict[str, int] = {}
    ranked = []
    for index in np.flatnonzero(differ).tolist():
        subtask = str(answers["subtask"][index])
        seen[subtask] = seen.get(subtask, 0) + 1
        ranked.append((seen[subtask], index))
    return [index for _, index in sorted(ranked)[:count]]
