"""What a sweep tried, as sweep.json and reports have it: candidates, and what tells them apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

RATE = "learning_rate"


def named(candidate: Mapping[str, Any], among: Sequence[Mapping[str, Any]]) -> str:
    """What a candidate has and others have not, beside its learning rate: `omega 5`."""
    differing = [
        name
        for name in candidate
        if name != RATE and any(other.get(name) != candidate[name] for other in among)
    ]
    return ", ".join(f"{name} {candidate[name]}" for name in differing)


def at_edge(chosen: Mapping[str, Any], among: Sequence[Mapping[str, Any]]) -> list[str]:
    """Options of which the chosen value is the smallest or the largest that was tried: the best
    may lie beyond."""
    found = []
    for name, value in chosen.items():
        tried = {other[name] for other in among if name in other}
        numbers = all(isinstance(each, int | float) for each in tried)
        if len(tried) > 1 and numbers and value in (min(tried), max(tried)):
            found.append(name)
    return found


def by_weights(found: Mapping[str, Any]) -> dict[str, dict[float, float]]:
    """Totals of a method in sweep.json by learning rate, for each of its other options."""
    lines: dict[str, dict[float, float]] = {}
    for candidate, total in zip(found["candidates"], found["totals"], strict=True):
        lines.setdefault(named(candidate, found["candidates"]), {})[candidate[RATE]] = total
    return {weights: dict(sorted(totals.items())) for weights, totals in lines.items()}
