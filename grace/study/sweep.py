"""Tuning: each trained method tries as many candidates, once, on the validation split.

A candidate is the arm itself with other options of training, at a few numbers of bits and with one
seed; those with the highest total score are taken for the bits nearest to these and for all seeds.
sweep.json records every candidate, and what was not swept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from grace.study.arms import FULL, METHODS, Arm, arms_of
from grace.study.candidates import RATE, at_edge
from grace.study.config import StudyConfig
from grace.study.task import METRICS, Task
from grace.training.callbacks import read_metrics
from grace.training.config import PRESETS


def swept_methods(config: StudyConfig) -> list[str]:
    """Trained methods of the study that are swept themselves."""
    assert config.sweep is not None
    trained = [name for name in config.arms if METHODS[name].options is not None]
    # GRACE without quantization is a method of its own and no variant of the quantized one.
    return [m for m in trained if config.sweep.ablations or not _is_variant(m)]


def _is_variant(method: str) -> bool:
    return METHODS[method].tuned_as is not None and METHODS[method].quantized


def swept_arms(config: StudyConfig) -> list[Arm]:
    """What is swept: methods that are not quantized, and the others at each of the sweep's bits."""
    assert config.sweep is not None
    return [
        Arm(method, bits)
        for method in swept_methods(config)
        for bits in (config.sweep.bits if METHODS[method].quantized else (FULL,))
    ]


def sweep_tasks(config: StudyConfig, root: Path, device: str, until: float | None) -> list[Task]:
    """Every candidate of everything swept."""
    assert config.sweep is not None
    seed, count = config.sweep.seed, len(config.sweep.learning_rates)
    return [
        Task(arm, seed, config, root, device, number, until)
        for arm in swept_arms(config)
        for number in range(count)
    ]


def choose(
    config: StudyConfig, results: Sequence[Mapping[str, Any]], folders: Sequence[Path] = ()
) -> dict[str, Any]:
    """For everything swept the candidate with the highest validation score (the first of two
    alike), by the arm's name.

    Args:
        config: the study.
        results: of all of `sweep_tasks`, in their order.
        folders: theirs; of the one that is chosen `beta` keeps the mean over its steps, which is
            what an arm without the controller is given.
    """
    assert config.sweep is not None
    count = len(config.sweep.learning_rates)
    found: dict[str, Any] = {}
    for number, arm in enumerate(swept_arms(config)):
        own = results[number * count : (number + 1) * count]
        tried = config.sweep.of(arm.method, METHODS[arm.method].tuned_as)
        totals = [result["score"]["total"] for result in own]
        best = totals.index(max(totals))
        chosen = tried[best]
        found[arm.name] = {
            "method": arm.method,
            "seed": config.sweep.seed,
            "questions": own[0]["score"]["questions"],
            "candidates": tried,
            "totals": totals,
            "chosen": chosen,
            "at_edge": at_edge(chosen, tried),
            "beta": _mean_beta(folders[number * count + best]) if folders else None,
        }
    return found


def _mean_beta(folder: Path) -> float | None:
    betas = [row["beta"] for row in read_metrics(folder / METRICS) if "beta" in row]
    return fmean(betas) if betas else None


def told(config: StudyConfig) -> list[str]:
    """What is swept and what is not, in sentences."""
    if config.sweep is None:
        lines = ["Nothing is swept in this study."]
    else:
        count, bits = len(config.sweep.learning_rates), " and ".join(map(str, config.sweep.bits))
        lines = [
            f"Every swept method tries {count} candidates, at {bits} bits with seed "
            f"{config.sweep.seed} only. Arms take the best of the nearest bits (of two as near, of "
            "the lower), all seeds the same.",
            _weights_told(config),
        ]
    if config.tuned:
        fixed = "; ".join(f"{name}: {_options(own)}" for name, own in config.tuned.items())
        lines.append(f"Set beforehand, and not swept here: {fixed}.")
    if apart := _departures(config):
        lines.append(f"GRACE here is not GRACE as published: {apart}.")
    lines += config.notes
    variants = [m for m in config.arms if _is_variant(m)]
    if variants and (config.sweep is None or not config.sweep.ablations):
        lines.append(f"{', '.join(variants)} take the options of grace.")
    return lines


def _departures(config: StudyConfig) -> str:
    """Options of GRACE that the study sets, beside those that are swept, and the paper's values."""
    paper, found = PRESETS["paper"], list[str]()
    for arm in arms_of(config):
        if arm.method == "grace":
            own = config.options_of("grace", arm.name)
            found += [f"{k} {v} (paper {paper[k]})" for k, v in own.items() if v != paper.get(k, v)]
    return ", ".join(dict.fromkeys(found))


def _options(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in options.items())


def _weights_told(config: StudyConfig) -> str:
    assert config.sweep is not None
    swept = []
    for method in swept_methods(config):
        tried = config.sweep.of(method, METHODS[method].tuned_as)
        names = dict.fromkeys(name for each in tried for name in each if name != RATE)
        if names:
            swept.append(f"{method}: {', '.join(names)}")
    if not swept:
        return (
            "Nothing but learning rates is swept: temperature, weights of the terms, the "
            "controller, the ratio of scales' learning rate, warm-up and weight decay are the same "
            "for all methods that have them."
        )
    return (
        f"Beside learning rates, {'; '.join(swept)}. Nothing else is swept: temperature, the ratio "
        "of scales' learning rate, warm-up and weight decay are the same for all methods."
    )
