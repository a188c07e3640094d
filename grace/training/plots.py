"""Training curves as PNG, from the rows of metrics.jsonl."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Panel titles and the keys of metrics.jsonl they show; `name/` stands for all keys that begin so.
PANELS = {
    "cross-entropy": ("ce",),
    "distillation (GDKD, KD)": ("gdkd", "kd"),
    "RCKA (1 − CKA)": ("rcka",),
    "β": ("beta",),
    "gradient norm": ("grad_norm",),
    "code-flip rate": ("code_flip_rate",),
    "scale drift, mean |θ − θ₀|": ("scale_drift",),
    "code-flip rate by layer": ("code_flip_rate/",),
    "scale drift by layer": ("scale_drift/",),
}


def plot_curves(
    rows: Sequence[Mapping[str, Any]], path: Path, panels: Sequence[str] = tuple(PANELS)
) -> Path:
    """Draw one panel a quantity over steps; panels that the run has nothing of are left out.

    Args:
        rows: of a run's metrics.jsonl.
        path: PNG or SVG to write.
        panels: names of `PANELS`.
    """
    from matplotlib.figure import Figure

    shown = [title for title in panels if _curves(rows, title)]
    columns = max(1, min(3, len(shown)))
    lines = -(-max(1, len(shown)) // columns)
    figure = Figure(figsize=(4 * columns, 2.6 * lines), dpi=110, layout="constrained")
    for place, title in enumerate(shown, 1):
        axes = figure.add_subplot(lines, columns, place)
        _draw(axes, rows, title)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
        if PANELS[title][0].endswith("/"):
            axes.legend(fontsize=7)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    return path


def _draw(axes: Any, rows: Sequence[Mapping[str, Any]], title: str) -> None:
    """The curves of a run: one, or one a layer, from dark (first) to bright (last)."""
    from matplotlib import colormaps

    curves = _curves(rows, title)
    for number, (key, (steps, values)) in enumerate(curves.items()):
        drawn: dict[str, Any] = {"linewidth": 1.2}
        if "/" in key:
            ends = number in (0, len(curves) - 1)
            color = colormaps["viridis"](0.9 * number / max(1, len(curves) - 1))
            label = key.partition("/")[2].replace("_", " ") if ends else None
            drawn = {"linewidth": 0.8, "color": color, "label": label}
        axes.plot(steps, values, **drawn)


def _curves(
    rows: Sequence[Mapping[str, Any]], title: str
) -> dict[str, tuple[list[int], list[float]]]:
    """Steps and values of every key of a panel that `rows` have, layers in their order."""
    curves: dict[str, tuple[list[int], list[float]]] = {}
    for row in rows:
        for key in PANELS[title]:
            for found in [k for k in row if k.startswith(key)] if key.endswith("/") else [key]:
                if found in row:
                    steps, values = curves.setdefault(found, ([], []))
                    steps.append(row["step"])
                    values.append(row[found])
    return curves
