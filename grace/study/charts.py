"""Charts of a study, drawn from study.json alone: scores by arm and subtask, training curves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from grace.study.arms import FULL
from grace.training.plots import plot_curves

Charts = Iterable[tuple[str, Callable[[Path], Any]]]
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


def draw_charts(
    study: Mapping[str, Any], folder: Path, more: Charts = (), suffix: str = "png"
) -> dict[str, Path]:
    """Write `scores`, `subtasks`, `curves` where anything trained, and `more` charts.

    Args:
        study: study.json.
        folder: where they go, `<name>.<suffix>`.
        more: (name, function of a path), as of `grace.study.plots`.
        suffix: png or svg.

    Returns:
        Paths by name.
    """
    import matplotlib

    arms, curves = study["arms"], _named_curves(study)
    charts: list[tuple[str, Callable[[Path], Any]]] = [
        ("scores", lambda path: _scores(arms, path)),
        ("subtasks", lambda path: _subtasks(arms, path)),
        *more,
    ]
    if any(curves.values()):
        draw = lambda path: plot_curves(curves, path, styles=_styles(arms))  # noqa: E731
        charts.append(("curves", draw))
    with matplotlib.rc_context({"svg.hashsalt": "grace"}):  # the same bytes every time
        for name, draw in charts:
            draw(folder / f"{name}.{suffix}")
    return {name: folder / f"{name}.{suffix}" for name, _ in charts}


def save(figure: Any, path: Path) -> None:
    """Write a figure, without the date that an SVG would hold."""
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def title(arm: Mapping[str, Any]) -> str:
    """An arm's method and bits, for an axis."""
    return arm["label"] if arm["bits"] == FULL else f"{arm['label']}, {arm['bits']} bits"


def color_of(method: str) -> str:
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
            "color": color_of(arm["method"]),
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
        color=[color_of(arm["method"]) for arm in arms],
        height=0.7,
        capsize=3,
    )
    axes.set_yticks(places, [title(arm) for arm in arms], fontsize=9)
    for place, arm in zip(places, arms, strict=True):
        axes.annotate(f" {arm['total']:.0f}", (0, place), va="center", color="white", fontsize=8)
    axes.set_xlabel("perception + cognition (bars: standard error over images)", fontsize=9)
    axes.grid(axis="x", alpha=0.25)
    save(figure, path)
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
    save(figure, path)
    return path
