"""Learning rates: each trained method tries the same ones, once, on the validation split.

A candidate is the arm itself with another rate, at one number of bits and with one seed; the rate
with the highest total score is taken for all bits and seeds. sweep.json records every candidate,
and what was not swept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grace.study.arms import FULL, METHODS, Arm
from grace.study.config import StudyConfig
from grace.study.task import Task


def swept_methods(config: StudyConfig) -> list[str]:
    """Trained methods of the study that are swept themselves."""
    assert config.sweep is not None
    trained = [name for name in config.arms if METHODS[name].options is not None]
    # GRACE without quantization is a method of its own and no variant of the quantized one.
    return [m for m in trained if config.sweep.ablations or not _is_variant(m)]


def _is_variant(method: str) -> bool:
    return METHODS[method].tuned_as is not None and METHODS[method].quantized


def sweep_tasks(config: StudyConfig, root: Path, device: str, until: float | None) -> list[Task]:
    """Every candidate of every swept method."""
    assert config.sweep is not None
    return [
        Task(
            Arm(method, config.sweep.bits if METHODS[method].quantized else FULL),
            config.sweep.seed,
            config,
            root,
            device,
            rate,
            until,
        )
        for method in swept_methods(config)
        for rate in config.sweep.learning_rates
    ]


def choose(config: StudyConfig, results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """For every swept method the rate with the highest validation score (the lower of two alike).

    Args:
        config: the study.
        results: of all of `sweep_tasks`, in their order.
    """
    assert config.sweep is not None
    rates = config.sweep.learning_rates
    found: dict[str, Any] = {}
    for number, method in enumerate(swept_methods(config)):
        own = results[number * len(rates) : (number + 1) * len(rates)]
        totals = [result["score"]["total"] for result in own]
        best = max(range(len(rates)), key=lambda index: (totals[index], -rates[index]))
        found[method] = {
            "arm": own[best]["arm"],
            "seed": config.sweep.seed,
            "questions": own[best]["score"]["questions"],
            "learning_rates": list(rates),
            "totals": totals,
            "chosen": rates[best],
            # The best may lie beyond what was tried.
            "at_edge": rates[best] in (min(rates), max(rates)),
        }
    return found


def told(config: StudyConfig) -> list[str]:
    """What is not swept, in sentences."""
    if config.sweep is None:
        return ["Learning rates are not swept in this study."]
    lines = [
        f"Learning rates are swept at {config.sweep.bits} bits with seed {config.sweep.seed} only, "
        "and reused at all bits and for all seeds.",
        "Nothing else is swept: temperature, weights of the terms, the controller, the ratio of "
        "scales' learning rate, warm-up and weight decay are the same for all methods that have "
        "them.",
    ]
    variants = [m for m in config.arms if _is_variant(m)]
    if variants and not config.sweep.ablations:
        lines.append(f"{', '.join(variants)} take the learning rate of grace.")
    return lines
