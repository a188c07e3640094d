"""Charts of a study as PNG, drawn from study.json alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grace.study.arms import FULL
from grace.training.plots import plot_curves

_COLORS = {
    "teacher": "#7f7f7f",
    "student": "#8fb8de",
    "control": "#3a7abf",
    "rtn": "#c9a227",
    "qat": "#d9822b",
    "kd": "#b5496a",
    "grace": "#2e8b57",
    "distil": "#1f5f5b",
    "gptq": "#8a6d1a",
    "awq": "#e0b84c",
}


def draw_charts(study: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write `scores.png`, `subtasks.png` and `curves.png`; returns their paths."""
    return [
        _scores(study["arms"], folder / "scores.png"),
        _subtasks(study["arms"], folder / "subtasks.png"),
        plot_curves(_named_curves(study), folder / "curves.png", styles=_styles(study["arms"])),
    ]


def title(arm: Mapping[str, Any]) -> str:
    """An arm's method and bits, for an axis."""
    return arm["label"] if arm["bits"] == FULL else f"{arm['label']}, {arm['bits']} bits"


def _color(method: str) -> str:
    """A variant has the color of what it varies."""
    return _COLORS.get(method) or _COLORS.get(method.split("-")[0], "#555555")


def _named_curves(study: Mapping[str, Any]) -> dict[str, Sequence[Mapping[str, Any]]]:
    titles = {arm["name"]: title(arm) for arm in study["arms"]}
    return {titles[name]: rows for name, rows in study["curves"].items()}


def _styles(arms: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, str]]:
    """A method has a color, and its lowest number of bits a dashed line."""
    low = [arm["bits"] for arm in arms if arm["bits"] != FULL]
    lowest = min(low) if len(set(low)) > 1 else None
    return {
        title(arm): {
            "color": _color(arm["method"]),
            "linestyle": "--" if arm["bits"] == lowest else "-",
        }
        for arm in arms
    }


def _scores(arms: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Total score of every arm with its standard error."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 0.42 * len(arms) + 1), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    places = list(range(len(arms)))[::-1]
    axes.barh(
        places,
        [arm["total"] for arm in arms],
        xerr=[arm["total_error"] for arm in arms],
        color=[_color(arm["method"]) for arm in arms],
        height=0.7,
        capsize=3,
    )
    axes.set_yticks(places, [title(arm) for arm in arms], fontsize=9)
    for place, arm in zip(places, arms, strict=True):
        axes.annotate(f" {arm['total']:.0f}", (0, place), va="center", color="white", fontsize=8)
    axes.set_xlabel("perception + cognition (bars: standard error over images)", fontsize=9)
    axes.grid(axis="x", alpha=0.25)
    figure.savefig(path)
    return path


def _subtasks(arms: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Score of every arm in every subtask."""
    from matplotlib.figure import Figure

    names = list(arms[0]["subtasks"])
    figure = Figure(figsize=(7, 0.42 * len(arms) + 1.4), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    table = [[arm["subtasks"][name] for name in names] for arm in arms]
    axes.imshow(table, vmin=0, vmax=200, cmap="viridis", aspect="auto")
    axes.set_xticks(range(len(names)), names, fontsize=8, rotation=20, ha="right")
    axes.set_yticks(range(len(arms)), [title(arm) for arm in arms], fontsize=8)
    for row, values in enumerate(table):
        for column, value in enumerate(values):
            color = "white" if value < 120 else "black"
            axes.text(
                column, row, f"{value:.0f}", ha="center", va="center", color=color, fontsize=8
            )
    figure.savefig(path)
    return path
