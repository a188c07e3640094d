"""Scores with their standard errors, from right answers by image.

MME's score of a subtask is a mean over images of 50 · (right of its two questions) + 100 · (both
right), so its standard error is that of a mean. Neighbouring images of the synthetic benchmark are
twins (the same two questions, opposite answers) and not independent: the mean runs over pairs of
images. Scores of several seeds are averaged image by image first; the spread over seeds is told
apart from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

Right = Mapping[str, str]  # subtask -> a digit an image, how many of its two questions were right
_POINTS = np.array([0.0, 50.0, 200.0])


def pair_scores(right: str) -> np.ndarray:
    """Mean score of every pair of neighbouring images, [images / 2]."""
    points = _POINTS[np.frombuffer(right.encode(), dtype=np.uint8) - ord("0")]
    return points[: len(points) // 2 * 2].reshape(-1, 2).mean(1)


def subtask_errors(seeds: Sequence[Right]) -> dict[str, float]:
    """Standard error of every subtask's score, over pairs of images, seeds averaged."""
    return {name: _error(_mean_over_seeds(seeds, name)) for name in seeds[0]}


def total_error(seeds: Sequence[Right]) -> float:
    """Standard error of the sum of all subtasks' scores: subtasks have different images."""
    return float(np.sqrt(sum(error**2 for error in subtask_errors(seeds).values())))


def paired_difference(seeds: Sequence[Right], other: Sequence[Right]) -> tuple[float, float]:
    """Difference of two arms' total scores and its standard error, image pair by image pair."""
    differences = [
        _mean_over_seeds(seeds, name) - _mean_over_seeds(other, name) for name in seeds[0]
    ]
    error = np.sqrt(sum(_error(difference) ** 2 for difference in differences))
    return float(sum(difference.mean() for difference in differences)), float(error)


def _mean_over_seeds(seeds: Sequence[Right], subtask: str) -> np.ndarray:
    return np.mean([pair_scores(right[subtask]) for right in seeds], axis=0)


def _error(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")
