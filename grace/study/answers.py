"""questions.npz beside a study.json: single answers, and what the teacher's entropy says of them.

    subtask, level, question, truth   text [Q]
    image                             int [Q]; images 2k and 2k + 1 are twins
    said.<arm>-s<seed>                text [Q]
    right.<arm>-s<seed>               bool [Q]
    entropy.<arm>-s<seed>             float [Q], of the answer's token, in nats

The file is optional: a study without it is reported without what needs it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from grace.study.resampling import DRAWS, Interval, cluster_counts

QUESTIONS = "questions.npz"
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


def read_answers(folder: Path) -> dict[str, np.ndarray] | None:
    """The arrays of a folder's questions.npz, None where there is none.

    Raises:
        ValueError: a file that is none.
    """
    path = folder / QUESTIONS
    if not path.is_file():
        return None
    try:
        with np.load(path) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"study: {path} must hold arrays, got {error}") from error


def entropy_error(study: Mapping[str, Any], answers: Answers | None) -> EntropyError | None:
    """Of the study's teacher; from study.json's summary where single answers are not there, None
    where neither is."""
    name = next((key for key in answers or () if key.startswith("entropy.teacher")), None)
    if answers is None or name is None:
        return _summarized(study.get("teacher_entropy"))
    entropy = answers[name].astype(np.float64)
    wrong = ~answers[name.replace("entropy.", "right.")].astype(bool)
    clusters = answers["image"] // 2
    return EntropyError(
        r=pearson(entropy, wrong.astype(np.float64), clusters),
        questions=len(wrong),
        errors=int(wrong.sum()),
        mean=float(entropy.mean()),
        deviations=(float(entropy.std()), float(wrong.std())),
        bins=tuple(_bins(entropy, wrong)),
    )


def _summarized(found: Mapping[str, Any] | None) -> EntropyError | None:
    if not found:
        return None
    r = found["r"]  # a study without its interval knows no more than that r is one
    r = None if r is None else Interval(r, found.get("low", -1.0), found.get("high", 1.0))
    return EntropyError(r, found["questions"], found["errors"], found["mean"])


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
