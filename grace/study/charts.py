"""How charts of a study look: one color a method, one panel a number of bits, the same bytes each
time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from grace.study.arms import FULL

Arm = Mapping[str, Any]
Charts = Iterable[tuple[str, Callable[[Path], Any]]]
_COLORS = {
    "teacher": "#7f7f7f",
    "student": "#8fb8de",
    "control": "#3a7abf",
    "distil": "#1f5f5b",
    "rtn": "#c9a227",
    "gptq": "#8a6d1a",
    "awq": "#e0b84c",
    "rtn-asymmetric": "#a3a3a3",
    "gptq-asymmetric": "#5f5f5f",
    "awq-asymmetric": "#c9c9c9",
    "qat": "#d9822b",
    "kd": "#b5496a",
    "grace": "#2e8b57",
    "grace-no-gate": "#8fce00",
    "grace-no-rcka": "#29b6c5",
    "grace-fixed-beta": "#9a7fd1",
    "grace-per-channel": "#6b7a3a",
}


def draw_charts(charts: Charts, folder: Path, suffix: str = "png") -> dict[str, Path]:
    """Write charts into a folder, `<name>.<suffix>`, and return their paths by name.

    Args:
        charts: (name, function that draws into a path).
        folder: where they go.
        suffix: png or svg.
    """
    import matplotlib

    paths = {}
    with matplotlib.rc_context({"svg.hashsalt": "grace"}):  # the same bytes every time
        for name, draw in charts:
            paths[name] = folder / f"{name}.{suffix}"
            draw(paths[name])
    return paths


def save(figure: Any, path: Path) -> None:
    """Write a figure, without the date that an SVG would hold."""
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def title(arm: Mapping[str, Any]) -> str:
    """An arm's method and bits, for an axis."""
    return arm["label"] if arm["bits"] == FULL else f"{arm['label']}, {arm['bits']} bits"


def color_of(method: str) -> str:
    """A variant has the color of what it varies."""
    return _COLORS.get(method) or _COLORS.get(method.split("-")[0], "#555555")


def line_of(arm: Arm) -> str:
    """Dotted where an arm starts from the student trained on."""
    return "-" if arm.get("start", "student") == "student" else ":"


def bits_label(bits: int) -> str:
    """A number of bits, for an axis or above a panel."""
    return "none quantized" if bits == FULL else f"{bits} bits"


def by_bits(arms: Sequence[Arm]) -> dict[int, list[Arm]]:
    """Quantized arms by their bits, from many to few."""
    low = sorted({arm["bits"] for arm in arms if arm["bits"] != FULL}, reverse=True)
    return {bits: [arm for arm in arms if arm["bits"] == bits] for bits in low}


def grid(count: int, *, width: float, height: float, columns: int = 2) -> tuple[Any, list[Any]]:
    """A figure of `count` panels, each so many inches wide and high, and their axes in order."""
    from matplotlib.figure import Figure

    columns = min(columns, count)
    lines = -(-count // columns)
    size = (width * columns, height * lines)
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    made = figure.subplots(lines, columns, squeeze=False).ravel().tolist()
    for axes in made:
        axes.grid(alpha=0.25)
        axes.tick_params(labelsize=8)
    for axes in made[count:]:
        axes.remove()
    return figure, made[:count]


def error_bars(intervals: Sequence[Any]) -> list[list[float]]:
    """Error bars of intervals, below and above their values."""
    return [
        [max(0.0, i.value - i.low) for i in intervals],
        [max(0.0, i.high - i.value) for i in intervals],
    ]


def log_axis(axes: Any) -> None:
    """A logarithmic x axis with plain numbers on it."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
