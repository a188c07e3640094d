"""``python -m benchmarks.plot_generate``: tables and charts of what generation takes.

Fills the block ``measured`` of ``docs/generation.md`` and draws ``docs/generation_<gpu>.png`` from
the committed ``benchmarks/results/*/generate.json``; ``--check`` only compares.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.bench_generate import MODELS, SIDES
from benchmarks.pages import DOCS, Chart, gpu_results, update
from benchmarks.plot_dequant_gemm import markdown

PAGE = DOCS / "generation.md"
COMMAND = "python -m benchmarks.plot_generate"

_DASH = "–"
_BASE = "bf16"  # the side that ratios are to
Row = Mapping[str, Any]


# --- tables --------------------------------------------------------------------------------------


def cells(content: Mapping[str, Any]) -> dict[tuple[str, int], dict[str, Row]]:
    """(model, batch) → side → row, of what was measured; in the benchmark's order of all three."""
    found: dict[tuple[str, int], dict[str, Row]] = {}
    for row in sorted(content["rows"], key=_place):
        if "ms_per_token" in row:
            key = (row["size"]["model"], row["size"]["batch"])
            found.setdefault(key, {})[row["side"]] = row
    return found


def _place(row: Row) -> tuple[int, int, int]:
    model, side = row["size"]["model"], row["side"]
    models, sides = [*MODELS, model], [*SIDES, side]  # what the benchmark no longer has comes last
    return models.index(model), row["size"]["batch"], sides.index(side)


def side_table(sides: Mapping[str, Row]) -> str:
    """A line a side; in brackets over bf16 as transformers generates, above 1 where better."""
    base = sides.get(_BASE)
    header = ["side", "ms/token", "floor", "prefill ms", "tokens/s", "peak GiB", "weights GiB"]
    lines = []
    for name, row in sides.items():
        lines.append(
            [
                name,
                _ratio(row, base, lambda r: r["ms_per_token"], "{:.2f}"),
                f"{row['floor_ms']:.2f}" if "floor_ms" in row else _DASH,
                _ratio(row, base, lambda r: r["prefill_ms"], "{:.1f}"),
                f"{row['tokens_per_s']:.0f}",
                _ratio(row, base, lambda r: r.get("peak_mib"), "{:.2f}", 1024),
                f"{row['weights_mib']['all'] / 1024:.2f}",
            ]
        )
    return markdown(header, lines)


def _ratio(
    row: Row, base: Row | None, of: Callable[[Row], float | None], form: str, unit: float = 1.0
) -> str:
    value = of(row)
    if value is None:
        return _DASH
    text = form.format(value / unit)
    if base is None or row is base or not of(base):
        return text
    return f"{text} ({of(base) / value:.2f}×)"


_COMPILED, _OURS = "bf16 static compiled", "grace"


def headline(found: Mapping[tuple[str, int], Mapping[str, Row]]) -> str:
    """A line a model and batch that both bf16 and grace were measured at."""
    header = ["model, batch", "bf16", "compiled bf16", "grace", "over compiled", "over bf16"]
    header += ["prefill over bf16", "memory of bf16's"]
    lines = []
    for (model, batch), sides in found.items():
        if not {_BASE, _OURS} <= sides.keys():
            continue
        base, ours = sides[_BASE], sides[_OURS]
        times = [base, sides.get(_COMPILED, {}), ours]
        lines.append(
            [
                f"{model}, {batch}",
                *(f"{row['ms_per_token']:.2f}" if row else _DASH for row in times),
                *(_speed_up(row, ours, "ms_per_token") for row in (times[1], base)),
                _speed_up(base, ours, "prefill_ms"),
                _share(ours, base, "peak_mib"),
            ]
        )
    return markdown(header, lines)


def _speed_up(other: Row, ours: Row, key: str) -> str:
    return f"{other[key] / ours[key]:.2f}×" if key in other else _DASH


def _share(ours: Row, other: Row, key: str) -> str:
    return f"{100 * ours[key] / other[key]:.0f} %" if key in other else _DASH


def memory_table(found: Mapping[tuple[str, int], Mapping[str, Row]]) -> str:
    """Where the weights lie, of bf16 and of the packed model, MiB."""
    lines = []
    for model in dict.fromkeys(model for model, _ in found):
        sides = next(sides for (name, _), sides in found.items() if name == model)
        for side in (_BASE, "grace", "grace W8 head"):
            if side in sides:
                weights = sides[side]["weights_mib"]
                parts = ("layers", "vision", "embedding", "head")
                lines.append([model, side, *(f"{weights[part]:.0f}" for part in parts)])
    return markdown(["model", "side", "layers", "vision", "embedding", "head"], lines)


def kernel_table(row: Row) -> str:
    """What a captured step launches, the longest first."""
    ordered = sorted(row["kernels"], key=lambda kernel: -kernel["us_a_call"])
    total = sum(kernel["us_a_call"] for kernel in ordered)
    lines = [
        [k["kernel"], f"{k['launches']:g}", f"{k['us']:.1f}", f"{k['us_a_call']:.0f}"]
        for k in ordered[:16]
    ]
    together = ["all", f"{sum(k['launches'] for k in ordered):g}", "", f"{total:.0f}"]
    return markdown(["kernel", "launches", "µs each", "µs a token"], [*lines, together])


def section(gpu: str, content: Mapping[str, Any]) -> str:
    """All about one GPU."""
    facts, found = content["environment"], cells(content)
    head = (
        f"### {facts['device'].upper()}\n\n"
        f"Medians; torch {facts['torch']}, CUDA {facts.get('cuda', 'unknown')}, commit "
        f"{facts['commit'][:12]}. The floor is what reading a step's weights once takes at "
        f"the speed that its run read at ({facts['read_gb_per_s']:.0f} GB/s in the last). In "
        "brackets: bf16 as transformers generates, over the side; above 1 where the side is better."
    )
    parts = [head, f"![Time of a token and memory]({chart_of(gpu, content).path.name})"]
    for (model, batch), sides in found.items():
        size = next(iter(sides.values()))["size"]
        prompt = f"{size['prompt']} tokens with an image, {size['new']} new"
        parts += [f"**{model}, batch {batch}** ({prompt}):", side_table(sides)]
    parts += ["Memory of the weights, MiB:", memory_table(found)]
    for (model, batch), sides in found.items():
        for name, row in sides.items():
            if "kernels" in row:
                parts += [f"Kernels of a step, {model}, batch {batch}, {name}:", kernel_table(row)]
    if left_out := _absent(content):
        parts.append("Not measured:\n\n" + left_out)
    return "\n\n".join(parts)


def _absent(content: Mapping[str, Any]) -> str:
    rows = [row for row in content["rows"] if "absent" in row]
    lines = {f"- {row['size']['model']}, {row['side']}: {row['absent']}" for row in rows}
    return "\n".join(sorted(lines))


# --- chart ---------------------------------------------------------------------------------------


def draw(content: Mapping[str, Any]) -> Any:
    """A Figure: a bar a side under each model and batch, ms a token and, on the right, memory."""
    from matplotlib.figure import Figure

    lines: list[tuple[str, Row | None]] = []
    for (model, batch), sides in cells(content).items():
        lines += [(f"{model}, batch {batch}", None), *sides.items()]
    height = 0.22 * len(lines) + 0.9
    figure = Figure(figsize=(10, height), dpi=100, layout="constrained")
    time, memory = figure.subplots(1, 2, sharey=True, width_ratios=[3, 2])
    _bars(time, lines, lambda row: row["ms_per_token"], "ms a token (black: the floor)")
    _bars(memory, lines, lambda row: row.get("peak_mib", 0.0) / 1024, "peak memory, GiB")
    for y, (_, row) in enumerate(lines):
        if row is not None and "floor_ms" in row:
            time.plot([row["floor_ms"]] * 2, [y - 0.4, y + 0.4], color="black", linewidth=1.2)
    time.set_yticks(range(len(lines)), [name for name, _ in lines], fontsize=8)
    for label, (_, row) in zip(time.get_yticklabels(), lines, strict=True):
        label.set_fontweight("bold" if row is None else "normal")
    time.set_ylim(len(lines) - 0.5, -0.5)
    return figure


def _bars(
    axes: Any,
    lines: Sequence[tuple[str, Row | None]],
    of: Callable[[Row], float],
    label: str,
) -> None:
    for y, (name, row) in enumerate(lines):
        if row is None:
            continue
        color = "#2e8b57" if name.startswith("grace") else "#7f7f7f"
        axes.barh(y, of(row), color=color, height=0.7)
        place = {"textcoords": "offset points", "xytext": (4, 0), "va": "center"}
        axes.annotate(f"{of(row):.2f}", (of(row), y), fontsize=7, color=color, **place)
    axes.set_xlabel(label, fontsize=8)
    axes.tick_params(axis="x", labelsize=7)
    axes.margins(x=0.15)
    axes.spines[["top", "right", "left"]].set_visible(False)


def numbers(content: Mapping[str, Any]) -> list[Any]:
    """All that a chart shows."""
    return [
        [row["size"], row["side"], row["ms_per_token"], row.get("floor_ms"), row.get("peak_mib")]
        for sides in cells(content).values()
        for row in sides.values()
    ]


# --- page ----------------------------------------------------------------------------------------


def chart_of(gpu: str, content: Mapping[str, Any]) -> Chart:
    """The chart of a GPU's results."""
    path = DOCS / f"generation_{gpu}.png"
    return Chart(path, numbers(content), lambda: draw(content))


def measured(found: Mapping[str, Any]) -> str:
    """What stands between the markers."""
    sections = [section(gpu, content) for gpu, content in found.items()]
    return "\n\n".join(sections) or "No result of a GPU is committed yet."


def main(arguments: Sequence[str]) -> int:
    """Writes page and charts, or says with exit code 1 which the results do not give."""
    found = gpu_results("generate")
    charts = [chart_of(gpu, content) for gpu, content in found.items()]
    stale = update(PAGE, measured(found), charts, check="--check" in arguments)
    if stale:
        print(f"not what the committed results give: {', '.join(stale)}: {COMMAND}")
    return int(bool(stale))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
