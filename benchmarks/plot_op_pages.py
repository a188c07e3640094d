"""``python -m benchmarks.plot_op_pages``: tables and charts of the GPU results on the ops' pages.

Fills the block ``measured`` of ``docs/ops/<op>.md``, wherever a page has one, and draws
``docs/ops/<op>_<gpu>.png`` from the committed ``benchmarks/results``: whatever sizes and sides the
results hold. ``--check`` only compares; a chart carries a digest of the numbers it was drawn from.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import profile_kernels, results
from benchmarks.pages import drawn_from, gpu_results, png
from benchmarks.plot_dequant_gemm import absences, markdown

OPS = (
    "fake_quant",
    "fake_quant_many",
    "search_log_scale",
    "quantize_pack",
    "gated_dkd",
    "linear_gated_dkd",
    "cka",
    "rms_norm",
    "rotary",
)
FOLDER = Path(__file__).parents[1] / "docs/ops"
COMMAND = "python -m benchmarks.plot_op_pages"
OURS = "grace"

_BLOCK = re.compile(r"(<!-- begin measured .*?-->\n).*?(<!-- end measured -->)", flags=re.DOTALL)
_DASH = "–"


@dataclass(frozen=True)
class Point:
    """One size: floor and, by side, what was measured."""

    size: Mapping[str, Any]
    floor: float
    times: Mapping[str, float] = field(default_factory=dict)  # µs
    eager_calls: Mapping[str, float] = field(default_factory=dict)  # µs
    memory: Mapping[str, float] = field(default_factory=dict)  # MiB
    not_captured: frozenset[str] = frozenset()  # sides whose time is by eager calls anyway
    since: str = ""  # the commit, where it is not that of the rest

    @property
    def title(self) -> str:
        """The size in words."""
        return " ".join(f"{key}={value}" for key, value in self.size.items()) + self.since


def points(content: Mapping[str, Any]) -> list[Point]:
    """The sizes of a result, in its order."""
    sizes: dict[str, list[dict]] = {}
    for row in content["rows"]:
        if "us" in row:
            sizes.setdefault(json.dumps(row["size"]), []).append(row)
    return [_point(json.loads(size), rows) for size, rows in sizes.items()]


def _point(size: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Point:
    def by_side(key: str) -> dict[str, float]:
        return {row["side"]: row[key] for row in rows if key in row}

    eager = frozenset(row["side"] for row in rows if row.get("timed_by") == "eager calls")
    columns = [by_side(key) for key in ("us", "us_eager_calls", "peak_mib")]
    return Point(size, rows[0]["floor_us"], *columns, eager, results.since(rows[0]))


def sides(every: Sequence[Point]) -> list[str]:
    """Sides that were timed anywhere, in the order of the results."""
    return list(dict.fromkeys(side for point in every for side in point.times))


# --- tables --------------------------------------------------------------------------------------


def number(value: float) -> str:
    """Three digits or more."""
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def time_table(every: Sequence[Point]) -> str:
    """µs; in brackets ours over the floor, and every other side over ours."""
    columns = sides(every)
    lines = []
    for point in every:
        cells = [_time(point, side) for side in columns]
        lines.append([point.title, number(point.floor), *cells])
    return markdown(["size", "floor", *columns], lines)


def _time(point: Point, side: str) -> str:
    if side not in point.times:
        return _DASH
    time, ours = point.times[side], point.times.get(OURS)
    mark = "†" if side in point.not_captured else ""
    if side == OURS:
        return f"{number(time)}{mark} ({time / point.floor:.2f}× floor)"
    return f"{number(time)}{mark}" + (f" ({time / ours:.2f}×)" if ours else "")


def side_table(every: Sequence[Point], of: Callable[[Point], Mapping[str, float]]) -> str:
    """A line a size, a column a side."""
    columns = [side for side in sides(every) if any(side in of(point) for point in every)]
    lines = [
        [p.title, *(number(of(p)[side]) if side in of(p) else _DASH for side in columns)]
        for p in every
    ]
    return markdown(["size", *columns], lines)


def product_table(every: Sequence[Point], fused: Sequence[Point]) -> str:
    """linear_gated_dkd against its target: 1.10 times its matrix products and the fused op."""
    losses = {(p.size["n"], p.size["V"]): p.times[OURS] for p in fused if OURS in p.times}
    header = ["size", "side", "its products", "gated_dkd", "together", "took", "ratio", "≤ 1.10×"]
    lines = []
    for point in every:
        loss, whole = (
            losses.get((point.size["n"], point.size["V"])),
            point.times.get("whole logits"),
        )
        for side, kind in ((OURS, ""), ("grace, logits kept", ", logits kept")):
            products = point.times.get("its matrix products" + kind)
            if side in point.times and products and loss:
                cells = _against(point.times[side], products, loss, whole)
                lines.append([point.title, side, *cells])
    return markdown([*header, "over whole logits"], lines) if lines else ""


def _against(took: float, products: float, loss: float, whole: float | None) -> list[str]:
    ratio = took / (products + loss)
    reached = "reached" if round(ratio, 2) <= 1.10 else "missed"
    over_whole = f"{took / whole:.2f}×" if whole else _DASH
    numbers = map(number, (products, loss, products + loss, took))
    return [*numbers, f"{ratio:.2f}×", reached, over_whole]


# --- chart ---------------------------------------------------------------------------------------

_COLORS = {"grace": "#2e8b57", "eager": "#7f7f7f", "compile": "#b5496a", "liger": "#dd8452"}
_OTHER = "#4c72b0"
_LEAST_MIB = 1.0  # what works in place has no place on a logarithmic axis


def chart(op: str, every: Sequence[Point]) -> bytes:
    """A PNG: a line a side under each size, time on the left and memory on the right."""
    from matplotlib.figure import Figure

    rows = _rows(every)
    height = 0.19 * len(rows) + 0.9
    figure = Figure(figsize=(10, height), dpi=100, layout="constrained")
    time, memory = figure.subplots(1, 2, sharey=True, width_ratios=[3, 2])
    _panel(time, rows, lambda p: p.times, "µs")
    _panel(memory, rows, lambda p: p.memory, "MiB", least=_LEAST_MIB)
    for first, last, floor in _floors(rows):
        time.plot([floor, floor], [first, last], color="black", linewidth=0.9)
    time.set_xlabel(f"{op}: time of a call, µs (black: the floor)", fontsize=8)
    memory.set_xlabel("memory a call takes at its peak, MiB", fontsize=8)
    time.set_yticks(range(len(rows)), [side or p.title for p, side in rows], fontsize=7)
    for label, (_, side) in zip(time.get_yticklabels(), rows, strict=True):
        label.set_fontweight("normal" if side else "bold")
    time.set_ylim(len(rows) - 0.5, -0.5)
    return png(figure, digest(every))


def _rows(every: Sequence[Point]) -> list[tuple[Point, str]]:
    """Lines from above to below: a size, with no side, then its sides, the fastest first."""
    rows = []
    for point in every:
        ordered = sorted(point.times, key=lambda side, p=point: p.times[side])
        rows += [(point, ""), *((point, side) for side in ordered)]
    return rows


def _floors(rows: Sequence[tuple[Point, str]]) -> list[tuple[float, float, float]]:
    """(first line, last line, floor) of each size."""
    starts = [i for i, (_, side) in enumerate(rows) if not side]
    ends = [*starts[1:], len(rows)]
    pairs = zip(starts, ends, strict=True)
    return [(start + 0.6, end - 0.6, rows[start][0].floor) for start, end in pairs]


def _panel(
    axes: Any,
    rows: Sequence[tuple[Point, str]],
    of: Callable[[Point], Mapping[str, float]],
    unit: str,
    least: float = 0.0,
) -> None:
    """A mark a line with its number beside it, on a logarithmic axis."""
    from matplotlib.ticker import NullFormatter

    found = [(y, side, of(p)[side]) for y, (p, side) in enumerate(rows) if side in of(p)]
    shown = [value for _, _, value in found if value >= least] or [1.0]
    axes.set_xscale("log")
    axes.set_xlim(min(shown) / 1.6, max(shown) * 3)
    for y, side, value in found:
        color = _COLORS.get(re.split(r"\W", side)[0], _OTHER)
        x, text = max(value, min(shown)), f"{number(value)}"
        if value >= least:
            axes.plot(x, y, "o", color=color, markersize=4.5)
        else:
            text = f"< {least:g} {unit}"
        place = {"textcoords": "offset points", "xytext": (5, 0), "va": "center"}
        axes.annotate(text, (x, y), fontsize=7, color=color, **place)
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="x", labelsize=7)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="x", alpha=0.25)


def digest(every: Sequence[Point]) -> str:
    """Of the numbers that a chart shows."""
    shown = [[p.title, p.floor, dict(p.times), dict(p.memory)] for p in every]
    return hashlib.sha256(json.dumps(shown).encode()).hexdigest()[:16]


# --- pages ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Page:
    """An op's page and its results: GPU → content."""

    op: str
    contents: Mapping[str, Mapping[str, Any]]

    @property
    def path(self) -> Path:
        """Of the page itself."""
        return FOLDER / f"{self.op}.md"

    def chart(self, gpu: str) -> Path:
        """Of a GPU's chart."""
        return FOLDER / f"{self.op}_{gpu}.png"


def pages() -> list[Page]:
    """The ops whose page has the block."""
    found = [Page(op, gpu_results(op)) for op in OPS]
    return [page for page in found if _BLOCK.search(page.path.read_text())]


def section(
    page: Page,
    gpu: str,
    fused: Mapping[str, Any] | None = None,
    kernels: Mapping[str, Any] | None = None,
) -> str:
    """All about one GPU; ``fused``: its results of gated_dkd, for what is made of it; ``kernels``:
    the op's profile."""
    content = page.contents[gpu]
    every, facts = points(content), content["environment"]
    head = (
        f"### {facts['device'].upper()}\n\n"
        f"Medians in µs, cold caches, ops that train forward and backward; torch {facts['torch']}, "
        f"CUDA {facts.get('cuda', 'unknown')}, driver {facts.get('driver', 'unknown')}, commit "
        f"{facts['commit'][:12]}. Read {facts['read_gb_per_s']:.0f} GB/s, bf16 product "
        f"{facts['matmul_tflop_per_s']:.0f} TFLOP/s: these set the floor, which bytes or products "
        "that no implementation avoids take. In brackets: over the floor, and of the other sides "
        "over grace, above 1 where grace is faster."
    )
    image = f"![Time and memory of every side]({page.chart(gpu).name})"
    captured = "Times are of a captured graph" + _footnote(every)
    parts = [head, image, f"{captured}:", time_table(every)]
    if fused is not None and (targets := product_table(every, points(fused))):
        parts += ["Against the products that it makes, and `gated_dkd` at that size:", targets]
    if any(point.eager_calls for point in every):
        parts += ["By eager calls, with their launches:"]
        parts += [side_table(every, lambda point: point.eager_calls)]
    if any(point.memory for point in every):
        parts += ["Memory of a call at its peak, its results included, MiB:"]
        parts += [side_table(every, lambda point: point.memory)]
    if kernels is not None:
        commit = kernels["environment"]["commit"][:12]
        parts += [
            f"Kernels of grace, each alone, µs a call (launches, if not one); commit {commit}:"
        ]
        parts += [profile_kernels.table(kernels)]
    if left_out := absences(content):
        parts.append("Not timed:\n\n" + "\n".join(left_out))
    return "\n\n".join(parts)


def _footnote(every: Iterable[Point]) -> str:
    return " (†: by eager calls)" if any(point.not_captured for point in every) else ""


def measured(page: Page) -> str:
    """What stands between the markers."""
    fused = gpu_results("gated_dkd") if page.op == "linear_gated_dkd" else {}
    kernels = gpu_results(f"{page.op}_kernels")
    sections = [section(page, gpu, fused.get(gpu), kernels.get(gpu)) for gpu in page.contents]
    return "\n\n".join(sections) or "No result of a GPU is committed yet."


def filled(page: Page, text: str) -> str:
    """The page's text with its marked block made anew."""
    made, count = _BLOCK.subn(lambda m: f"{m[1]}{measured(page)}\n{m[2]}", text)
    if count != 1:
        raise ValueError(f"plot: {page.path.name} must have one block measured, got {count}")
    return made


def stale(page: Page) -> list[str]:
    """Names of the page and charts that are not what the committed results give."""
    text = page.path.read_text()
    names = [] if filled(page, text) == text else [page.path.name]
    for gpu, content in page.contents.items():
        if drawn_from(page.chart(gpu)) != digest(points(content)):
            names.append(page.chart(gpu).name)
    return names


def main() -> int:
    """Writes pages and charts, or says with exit code 1 which the results do not give."""
    if "--check" in sys.argv[1:]:
        names = [name for page in pages() for name in stale(page)]
        if names:
            print(f"not what the committed results give: {', '.join(names)}: {COMMAND}")
        return int(bool(names))
    for page in pages():
        for gpu, content in page.contents.items():
            if drawn_from(page.chart(gpu)) != digest(points(content)):
                page.chart(gpu).write_bytes(chart(page.op, points(content)))
        results.write_whole(page.path, filled(page, page.path.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
