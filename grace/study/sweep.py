"""Tune learning rates: every trained arm at every rate, scored on the validation split.

    python -m grace.study.sweep OUT --rates 3e-4 1e-3 3e-3

Each arm gets the same budget: the same rates, steps and seeds. The table that it prints is what
`StudyConfig`'s defaults were chosen from; a rate is taken over only by its number, so a test split
never sees a choice being made.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from grace.study.arms import Arm, quickstart_arms
from grace.study.config import SCALES, StudyConfig
from grace.study.progress import TerminalProgress
from grace.study.run import run_study, units

# The tuned benchmark is drawn from another seed than any that is reported.
_SEED = 1000


def sweep(config: StudyConfig, rates: Sequence[float], out: Path) -> dict[str, dict[float, float]]:
    """Total validation score by arm and learning rate; resumable like any study.

    Args:
        config: what is swept; its learning rates, split and seed are replaced.
        rates: learning rates that every arm is trained with.
        out: directory with one study a rate.
    """
    arms = [arm for arm in quickstart_arms(config.bits) if arm.trained]
    totals: dict[str, dict[float, float]] = {arm.name: {} for arm in arms}
    for rate in rates:
        tuned = replace(
            config, learning_rate=rate, learning_rates=(), split="validation", seed=_SEED
        )
        with TerminalProgress(units(tuned, arms)) as progress:
            study = run_study(tuned, arms, out / f"lr-{rate:g}", progress=progress)
        for arm in study["arms"]:
            totals[arm["name"]][rate] = arm["total"]
    return totals


def to_markdown(totals: Mapping[str, Mapping[float, float]], arms: Sequence[Arm]) -> str:
    """The sweep as a table, the best of every arm in bold."""
    rates = list(next(iter(totals.values())))
    lines = ["| arm | " + " | ".join(f"{rate:g}" for rate in rates) + " |"]
    lines.append("|---" * (len(rates) + 1) + "|")
    for arm in arms:
        scores = totals[arm.name]
        best = max(scores.values())
        cells = (f"**{s:.0f}**" if s == best else f"{s:.0f}" for s in scores.values())
        lines.append(f"| {arm.name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """The command line; see the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3])
    parser.add_argument("--steps", type=int, default=SCALES["default"].steps)
    parser.add_argument("--models", help="folder with teacher/ and student/")
    arguments = parser.parse_args()
    config = replace(SCALES["default"], steps=arguments.steps, models=arguments.models)
    totals = sweep(config, arguments.rates, arguments.out)
    arms = [arm for arm in quickstart_arms(config.bits) if arm.trained]
    table = to_markdown(totals, arms)
    (arguments.out / "sweep.md").write_text(table + "\n")
    print(table)


if __name__ == "__main__":
    main()
