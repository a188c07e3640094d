"""The end of a run in a few numbers: summary.json, and the lines that the terminal shows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grace.training.files import write_whole

SUMMARY = "summary.json"
_TERMS = ("ce", "gdkd", "kd", "rcka", "beta", "code_flip_rate", "scale_drift")


def summarize(
    rows: Sequence[Mapping[str, Any]],
    *,
    steps: int,
    seconds: float,
    memory: Mapping[str, float],
    ranks: int,
) -> dict[str, Any]:
    """Steps, time, speed, memory, and each term at its first and its last logging step.

    Args:
        rows: of metrics.jsonl; a run shorter than `logging_steps` has none.
        steps: optimizer steps that are done.
        seconds: of this process's training; a resumed run counts from its resume.
        memory: as `grace.training.memory.peak_gib`, the largest of all ranks.
        ranks: processes that trained.
    """
    last: Mapping[str, Any] = rows[-1] if rows else {}
    speeds = sorted(row["tokens_per_second"] for row in rows if "tokens_per_second" in row)
    return {
        "steps": steps,
        "seconds": round(seconds, 1),
        "ranks": ranks,
        "median_tokens_per_second": speeds[len(speeds) // 2] if speeds else None,
        "dropped_terms": last.get("dropped_terms", 0),
        **memory,
        "first": {name: rows[0][name] for name in _TERMS if rows and name in rows[0]},
        "last": {name: last[name] for name in _TERMS if name in last},
    }


def write_summary(summary: Mapping[str, Any], folder: Path) -> Path:
    """Write `summary.json` into a run directory, whole or not at all."""
    return write_whole(folder / SUMMARY, json.dumps(summary, indent=1) + "\n")


def lines(summary: Mapping[str, Any]) -> list[str]:
    """The summary as a few lines of text."""
    speed = summary["median_tokens_per_second"]
    memory = [
        f"{name.removeprefix('peak_').removesuffix('_gib').replace('_', ' ')} {value:.2f} GiB"
        for name, value in summary.items()
        if name.startswith("peak_")
    ]
    text = [
        f"{summary['steps']} steps in {summary['seconds']:.0f} s on {summary['ranks']} rank(s)"
        + (f", {speed:,.0f} tokens/s" if speed else ""),
    ]
    if memory:
        text.append(f"peak memory: {', '.join(memory)}")
    for name, value in summary["last"].items():
        text.append(f"{name}: {summary['first'].get(name, value):.4g} -> {value:.4g}")
    if summary["dropped_terms"]:
        text.append(f"dropped terms: {summary['dropped_terms']}")
    return text
