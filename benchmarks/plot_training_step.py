"""``python -m benchmarks.plot_training_step``: what a whole training step takes, and on two GPUs.

Fills the block ``measured`` of ``docs/training_step.md`` and draws ``docs/training_step_<gpu>.png``
from the committed results of ``training_step`` and ``scaling``; ``--check`` only compares.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.pages import DOCS, Chart, gpu_results, heading, update
from benchmarks.plot_dequant_gemm import absences, markdown
from benchmarks.results import since

PAGE = DOCS / "training_step.md"
COMMAND = "python -m benchmarks.plot_training_step"
TARGET = 1.08  # of the student's fine-tuning and the teacher's forward

_GIB = 1024
_DASH = "–"
_COLORS = {
    "matrix products": "#4c72b0",
    "attention": "#64b5cd",
    "elementwise and reductions": "#8172b3",
    "copies and casts": "#937860",
    "softmax and cross-entropy": "#da8bc3",
    "gathers": "#ccb974",
    "fake_quant": "#2e8b57",
    "gated_dkd": "#55a868",
    "cka": "#8fd19e",
    "other": "#8c8c8c",
    "idle": "#e3e3e3",
}
Row = Mapping[str, Any]


def steps(content: Mapping[str, Any]) -> dict[str, dict[str, Row]]:
    """Size in words → side → row, of what was timed."""
    found: dict[str, dict[str, Row]] = {}
    for row in content["rows"]:
        if "us" in row:
            found.setdefault(title(row["size"]) + since(row), {})[row["side"]] = row
    return found


def title(size: Mapping[str, Any]) -> str:
    """Models, batch and the masters' dtype."""
    packed = f" of {size['packed']} packed segments" if size["packed"] > 1 else ""
    tokens = f"{size['rows']}×{size['packed'] * size['tokens']} tokens{packed}"
    return f"{size['pair']}, {tokens}, {size['masters']} masters"


def time_table(found: Mapping[str, Mapping[str, Row]]) -> str:
    """ms of every side; ours over fine-tuning and teacher, and the authors' over ours."""
    header = ["step", "SFT", "teacher", "grace", "over SFT + teacher", f"≤ {TARGET}×"]
    lines = []
    for name, sides in found.items():
        yardstick = sum(sides[side]["us"] for side in ("SFT", "teacher"))
        for side in _ours(sides):
            ratio = sides[side]["us"] / yardstick
            cells = [*(_ms(sides, s) for s in ("SFT", "teacher", side)), f"{ratio:.3f}×"]
            cells.append("reached" if round(ratio, 2) <= TARGET else "missed")
            authors = sides.get("authors")
            over = f"{authors['us'] / sides[side]['us']:.2f}×" if authors else _DASH
            called = name if side == "grace" else f"{name}; {side}"
            lines.append([called, *cells, _ms(sides, "authors"), over])
    return markdown([*header, "authors", "authors over grace"], lines)


def _ours(sides: Mapping[str, Row]) -> list[str]:
    return [side for side in sides if side in ("grace", "held", "not held")]


def _ms(sides: Mapping[str, Row], side: str) -> str:
    return f"{sides[side]['us'] / 1e3:.0f}" if side in sides else _DASH


def memory_table(found: Mapping[str, Mapping[str, Row]]) -> str:
    """GiB at the peak, both models included."""
    names = list(dict.fromkeys(side for sides in found.values() for side in sides))
    lines = [
        [name, *(_peak(sides[side]) if side in sides else _DASH for side in names)]
        for name, sides in found.items()
    ]
    return markdown(["step", *names], lines)


def _peak(row: Row) -> str:
    return f"{(row['peak_mib'] + row['resident_mib']) / _GIB:.1f}"


def scaling_table(content: Mapping[str, Any]) -> str:
    """Tokens a second of every way to share the work."""
    lines = [
        [
            row["side"] if row["gpus"] > 1 else "alone",
            *(f"{row[key]}" for key in ("gpus", "accumulation")),
            f"{row['step_ms']:.0f} ({'–'.join(f'{ms:.0f}' for ms in row['step_ms_spread'])})",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['efficiency']:.2f}",
            f"{row['peak_mib'] / _GIB:.1f}",
        ]
        for row in content["rows"]
    ]
    header = ["side", "GPUs", "micro-batches", "ms (spread)", "tokens/s", "efficiency", "peak GiB"]
    return markdown(header, lines)


def spent(row: Row) -> dict[str, float]:
    """Milliseconds of a step by kernel; idle is what kernels leave of the step's time."""
    kernels = {part: ms for part, ms in row["breakdown_ms"].items() if part != "idle"}
    return kernels | {"idle": round(max(0.0, row["us"] / 1e3 - sum(kernels.values())), 3)}


def draw(found: Mapping[str, Mapping[str, Row]]) -> Any:
    """A Figure: under each step a bar a side, cut by what its time goes to."""
    from matplotlib.figure import Figure

    bars = [(name, side) for name, sides in found.items() for side in ("", *sides)]
    figure = Figure(figsize=(10, 0.24 * len(bars) + 1.0), dpi=100, layout="constrained")
    axes = figure.subplots()
    for y, (name, side) in enumerate(bars):
        if side:
            _bar(axes, y, spent(found[name][side]))
        else:
            axes.text(0, y + 0.1, name, fontsize=8, fontweight="bold", va="center")
    axes.set_yticks(range(len(bars)), [side for _, side in bars], fontsize=7)
    axes.set_ylim(len(bars) - 0.5, -0.5)
    axes.set_xlabel("ms of a step, by kernel; idle: the GPU waits for the host", fontsize=8)
    patches = [axes.barh(-9, 0, color=color, label=part) for part, color in _COLORS.items()]
    figure.legend(handles=patches, fontsize=7, frameon=False, ncols=6, loc="outside upper center")
    axes.tick_params(labelsize=7, length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    return figure


def _bar(axes: Any, y: int, spent: Mapping[str, float]) -> None:
    left = 0.0
    for part, color in _COLORS.items():
        if part in spent:
            axes.barh(y, spent[part], left=left, color=color, height=0.75)
            left += spent[part]
    axes.annotate(f"{left:.0f}", (left, y), (4, 0), textcoords="offset points", va="center", size=7)


def chart_of(gpu: str, found: Mapping[str, Mapping[str, Row]]) -> Chart:
    """The chart of a GPU's steps."""
    numbers = [
        [n, side, row["breakdown_ms"]] for n, rows in found.items() for side, row in rows.items()
    ]
    return Chart(DOCS / f"training_step_{gpu}.png", numbers, lambda: draw(found))


def section(gpu: str, content: Mapping[str, Any], scaling: Mapping[str, Any] | None) -> str:
    """All about one GPU."""
    found = steps(content)
    parts = [
        heading(content["environment"]),
        "Forward and backward of a step by eager calls, medians in ms:",
        time_table(found),
        f"![What a step's time goes to]({chart_of(gpu, found).path.name})",
        "Memory at the peak, both models included, GiB:",
        memory_table(found),
    ]
    if left_out := absences(content):
        parts.append("Not timed:\n\n" + "\n".join(left_out))
    if scaling is not None:
        commit = scaling["environment"]["commit"][:12]
        parts += [
            f"Whole steps of `python -m benchmarks.scaling`, optimizer included, commit {commit}; "
            "efficiency is tokens/s over as many times those of one GPU alone:",
            scaling_table(scaling),
        ]
    return "\n\n".join(parts)


def main(arguments: Sequence[str]) -> int:
    """Writes page and charts, or says with exit code 1 which the results do not give."""
    found, scaling = gpu_results("training_step"), gpu_results("scaling")
    text = "\n\n".join(section(gpu, c, scaling.get(gpu)) for gpu, c in found.items())
    charts = [chart_of(gpu, steps(content)) for gpu, content in found.items()]
    stale = update(
        PAGE, text or "No result is committed yet.", charts, check="--check" in arguments
    )
    if stale:
        print(f"not what the committed results give: {', '.join(stale)}: {COMMAND}")
    return int(bool(stale))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
