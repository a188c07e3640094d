"""Tune the trained methods: six candidates each, scored on the validation split.

    python -m grace.study.sweep OUT

Every method gets the same number of candidates, steps and seeds: learning rates for those that have
nothing else, learning rates and weights of their terms for those that have. The benchmark is drawn
from another seed and split than any that is reported.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from grace.study.arms import Arm, quickstart_arms
from grace.study.config import SCALES, SMALL_BETA, StudyConfig
from grace.study.progress import TerminalProgress
from grace.study.run import run_study, units

_SEED = 1000
_RATES = [{"learning_rate": rate} for rate in (3e-4, 5e-4, 1e-3, 1.5e-3, 2e-3, 3e-3)]
CANDIDATES: dict[str, list[dict[str, Any]]] = {
    "control": _RATES,
    "qat": _RATES,
    "kd": [
        {"learning_rate": rate, "beta_init": beta}
        for rate in (5e-4, 1e-3, 2e-3)
        for beta in (0.5, 1.0)
    ],
    "grace": [
        {"learning_rate": rate, "omega": omega, **SMALL_BETA}
        for rate in (5e-4, 1e-3, 2e-3)
        for omega in (0.3, 1.0)
    ],
}
_BUDGET = 6


def sweep(config: StudyConfig, out: Path) -> dict[str, list[float]]:
    """Total validation score of every trained arm's candidates, in order; resumable.

    Args:
        config: what is swept; its options, split and seed are replaced.
        out: directory with one study a candidate.
    """
    arms = _arms(config)
    totals: dict[str, list[float]] = {arm.name: [] for arm in arms}
    for number in range(_BUDGET):
        tuned = {method: candidates[number] for method, candidates in CANDIDATES.items()}
        tried = replace(config, tuned=tuned, split="validation", seed=_SEED, arms=tuple(CANDIDATES))
        folder = out / f"candidate-{number}"
        _share_data(folder, out / "candidate-0")
        with TerminalProgress(units(tried)) as progress:
            study = run_study(tried, folder, progress=progress)
        for arm in study["arms"]:
            totals[arm["name"]].append(arm["total"])
    return totals


def _arms(config: StudyConfig) -> list[Arm]:
    return [arm for arm in quickstart_arms(config.bits) if arm.trained]


def _share_data(folder: Path, first: Path) -> None:
    """Candidates train and score on the same data: it is drawn once."""
    folder.mkdir(parents=True, exist_ok=True)
    if folder != first and not (folder / "data").exists():
        (folder / "data").symlink_to((first / "data").resolve())


def to_markdown(totals: Mapping[str, list[float]], arms: list[Arm]) -> str:
    """Every arm's candidates and scores as a table, the best in bold."""
    lines = ["| arm | " + " | ".join(f"{n + 1}" for n in range(_BUDGET)) + " |"]
    lines.append("|---" * (_BUDGET + 1) + "|")
    for arm in arms:
        scores = totals[arm.name]
        cells = (f"**{s:.0f}**" if s == max(scores) else f"{s:.0f}" for s in scores)
        lines.append(f"| {arm.name} | " + " | ".join(cells) + " |")
    lines.append("")
    for method, candidates in CANDIDATES.items():
        told = "; ".join(_differences(candidate, candidates) for candidate in candidates)
        lines.append(f"- {method}: {told}")
    return "\n".join(lines)


def _differences(candidate: Mapping[str, Any], candidates: list[dict[str, Any]]) -> str:
    """The options of a candidate that not all candidates share."""
    own = (key for key in candidate if len({str(other[key]) for other in candidates}) > 1)
    return ", ".join(f"{key} {candidate[key]:g}" for key in own)


def main() -> None:
    """The command line; see the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=SCALES["default"].steps)
    parser.add_argument("--models", help="folder with teacher/ and student/")
    arguments = parser.parse_args()
    config = replace(SCALES["default"], seeds=(0,), steps=arguments.steps, models=arguments.models)
    table = to_markdown(sweep(config, arguments.out), _arms(config))
    (arguments.out / "sweep.md").write_text(table + "\n")
    print(table)


if __name__ == "__main__":
    main()
