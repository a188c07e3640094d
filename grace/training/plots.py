"""Training curves as PNG, from the rows of metrics.jsonl."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Panel titles and the keys of metrics.jsonl they show.
PANELS = {
    "cross-entropy": ("ce",),
    "distillation (GDKD, KD)": ("gdkd", "kd"),
    "RCKA (1 − CKA)": ("rcka",),
    "β": ("beta",),
    "gradient norm": ("grad_norm",),
    "code-flip rate": ("code_flip_rate",),
}


def plot_curves(
    runs: Sequence[Mapping[str, Any]] | Mapping[str, Sequence[Mapping[str, Any]]],
    path: Path,
    panels: Sequence[str] = tuple(PANELS),
    styles: Mapping[str, Mapping[str, Any]] | None = None,
) -> Path:
    """Draw one panel a quantity over steps; panels that no run has are left out.

    Args:
        runs: rows of one run, or rows by the name of a run.
        path: PNG to write.
        panels: names of `PANELS`.
        styles: arguments of matplotlib's `plot` by the name of a run.
    """
    from matplotlib.figure import Figure

    named = runs if isinstance(runs, Mapping) else {"": runs}
    shown = [title for title in panels if any(_points(rows, title)[0] for rows in named.values())]
    columns = max(1, min(3, len(shown)))
    lines = -(-max(1, len(shown)) // columns)
    figure = Figure(figsize=(4 * columns, 2.6 * lines), dpi=110, layout="constrained")
    for place, title in enumerate(shown, 1):
        axes = figure.add_subplot(lines, columns, place)
        for name, rows in named.items():
            steps, values = _points(rows, title)
            if steps:
                style = {"linewidth": 1.2, **((styles or {}).get(name) or {})}
                axes.plot(steps, values, label=name or None, **style)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
        if len(named) > 1 and place == 1:
            axes.legend(fontsize=7)
    figure.savefig(path)
    return path


def _points(rows: Sequence[Mapping[str, Any]], title: str) -> tuple[list[int], list[float]]:
    keys = PANELS[title]
    found = [(row["step"], row[key]) for row in rows for key in keys if key in row]
    return [step for step, _ in found], [value for _, value in found]
