"""``python -m benchmarks.plot_dequant_gemm``: tables and charts of dequant_gemm's GPU results.

Fills the marked block of ``docs/ops/dequant_gemm.md`` and draws ``docs/ops/dequant_gemm_<gpu>.png``
from the committed ``benchmarks/results``; ``--check`` only compares.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.layers import GROUP, Shape, names

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/ops/dequant_gemm.md"
TARGETS = json.loads((Path(__file__).parent / "dequant_gemm_targets.json").read_text())
DENSE = ("bf16", "fp16")
COMMAND = "python -m benchmarks.plot_dequant_gemm"

_BLOCK = re.compile(r"(<!-- begin measured .*?-->\n).*?(<!-- end measured -->)", flags=re.DOTALL)


@dataclass(frozen=True)
class Point:
    """One size: what each side took, in µs."""

    shape: Shape
    m: int
    floor: float
    times: Mapping[str, float]

    @property
    def size(self) -> str:
        """large, medium, small or tiny, by the number of weights."""
        weights = self.shape.n * self.shape.k
        return next(name for name, least in TARGETS["sizes"].items() if weights >= least)

    @property
    def ours(self) -> float:
        """µs of grace."""
        return self.times["grace"]

    @property
    def dense(self) -> float:
        """µs of the dense product."""
        return next(time for side, time in self.times.items() if side in DENSE)

    @cached_property
    def peer(self) -> tuple[str, float] | None:
        """The fastest int4 peer that was timed here, and its µs."""
        peers = {s: t for s, t in self.times.items() if s != "grace" and s not in DENSE}
        best = min(peers, key=lambda side: peers[side], default=None)
        return None if best is None else (best, peers[best])

    @property
    def over_dense(self) -> float:
        """Speed-up over the dense product."""
        return self.dense / self.ours

    @property
    def over_peer(self) -> float | None:
        """Speed-up over the best peer."""
        return None if self.peer is None else self.peer[1] / self.ours

    def missed(self) -> list[str]:
        """Targets that were not reached, in words."""
        goal = next(row for row in TARGETS["rows"] if row["m"] is None or self.m <= row["m"])
        pairs = (
            (self.over_dense, goal.get(self.size), "cuBLAS"),
            (self.over_peer, goal["peer"], "peer"),
        )
        return [
            f"{against} ≥ {least:g}×"
            for reached, least, against in pairs
            if reached is not None and least is not None and round(reached, 2) < least
        ]


def points(content: Mapping[str, Any], kind: Mapping[str, Any]) -> list[Point]:
    """Sizes of that kind: ``{}`` for 4 bits and bfloat16, ``{"bits": 8}`` and the like."""
    sizes: dict[tuple[int, int, int], dict[str, Any]] = {}
    for row in content["rows"]:
        size = row["size"]
        if "us" in row and {k: v for k, v in size.items() if k not in ("M", "N", "K")} == kind:
            place = sizes.setdefault((size["N"], size["K"], size["M"]), {"times": {}})
            place["floor"] = row["floor_us"]
            place["times"][row["side"]] = row["us"]
    return [
        Point(Shape(n, k), m, place["floor"], place["times"])
        for (n, k, m), place in sizes.items()
        if "grace" in place["times"]
    ]


# --- tables --------------------------------------------------------------------------------------


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table; numbers to the right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, rule, *lines])


def times(value: float | None) -> str:
    """A ratio, or a dash."""
    return "–" if value is None else f"{value:.2f}×"


def summary(every: Sequence[Point]) -> str:
    """A line a number of rows: geometric means by size of layer, and targets reached."""
    classes = [name for name in TARGETS["sizes"] if any(p.size == name for p in every)]
    over = [f"over cuBLAS, {name}" for name in classes]
    header = ["M", *over, "over the best peer", "targets reached"]
    lines = []
    for m in sorted({p.m for p in every}):
        here = [p for p in every if p.m == m]
        means = [mean(p.over_dense for p in here if p.size == name) for name in classes]
        peers = [p.over_peer for p in here if p.over_peer is not None]
        reached = sum(not p.missed() for p in here)
        line = [*map(times, means), times(mean(peers)), f"{reached} of {len(here)}"]
        lines.append([str(m), *line])
    return markdown(header, lines)


def mean(values: Iterable[float]) -> float | None:
    """The geometric one; None of nothing."""
    found = list(values)
    return statistics.geometric_mean(found) if found else None


def layer_table(here: Sequence[Point], *, targets: bool) -> str:
    """A layer's sizes, a line each."""
    header = ["M", "floor", "cuBLAS", "best peer", "grace", "over cuBLAS", "over the peer"]
    lines = []
    for p in here:
        peer = "–" if p.peer is None else f"{p.peer[1]:.1f} {p.peer[0]}"
        cells = [f"{p.floor:.1f}", f"{p.dense:.1f}", peer, f"{p.ours:.1f}"]
        cells += [times(p.over_dense), times(p.over_peer)]
        lines.append([str(p.m), *cells, *([target_text(p)] if targets else [])])
    return markdown([*header, *(["targets"] if targets else [])], lines)


def target_text(point: Point) -> str:
    """``reached``, or what was missed."""
    missed = point.missed()
    return "reached" if not missed else "missed: " + ", ".join(missed)


def layer_tables(every: Sequence[Point], *, targets: bool) -> list[str]:
    """A folded table a layer."""
    parts = []
    for shape in dict.fromkeys(p.shape for p in every):
        here = [p for p in every if p.shape == shape]
        title = f"{shape.n} × {shape.k} ({here[0].size}): {names(shape)}"
        table = layer_table(here, targets=targets)
        parts.append(f"<details><summary>{title}</summary>\n\n{table}\n\n</details>")
    return parts


def absences(content: Mapping[str, Any]) -> list[str]:
    """A line a peer and reason, where something was not timed."""
    counts: dict[str, int] = {}
    for row in content["rows"]:
        for finding in ("absent", "wrong"):
            if finding in row:
                text = f"{row['side']}: {finding}, {row[finding]}"
                counts[text] = counts.get(text, 0) + 1
    return [f"- {text} ({count} sizes)" for text, count in counts.items()]


def section(content: Mapping[str, Any], chart: str) -> str:
    """All about one GPU."""
    facts = content["environment"]
    main = points(content, {})
    head = (
        f"### {facts['device'].upper()}\n\n"
        f"W4, group {GROUP}, bfloat16, cold weights, medians; torch {facts['torch']}, CUDA "
        f"{facts.get('cuda', 'unknown')}, driver {facts.get('driver', 'unknown')}, commit "
        f"{facts['commit'][:12]}. Read {facts['read_gb_per_s']:.0f} GB/s, bf16 product "
        f"{facts['matmul_tflop_per_s']:.0f} TFLOP/s: these set the floor. Ratios are speed-ups of "
        "grace, above 1 when it is faster; the first table has geometric means over layers."
    )
    parts = [head, f"![Speed-up and share of the floor, by rows of x]({chart})", summary(main)]
    parts.append("By layer, in µs:")
    parts += layer_tables(main, targets=True)
    for kind, title in (({"bits": 8}, "8 bits"), ({"dtype": "float16"}, "float16")):
        if found := points(content, kind):
            parts += [f"{title}, in µs:", *layer_tables(found, targets=False)]
    if left_out := absences(content):
        parts.append("Not timed:\n\n" + "\n".join(left_out))
    return "\n\n".join(parts)


# --- chart ---------------------------------------------------------------------------------------

_STYLES = {"grace": ("#2e8b57", "-", "o"), "best peer": ("#b5496a", "--", "s")}
_DENSE_STYLE = ("#7f7f7f", ":", "^")


def draw(every: Sequence[Point], path: Path) -> None:
    """Speed-up over the dense product above, share of the floor below; a column a size of layer."""
    from matplotlib.figure import Figure

    classes = [name for name in TARGETS["sizes"] if any(p.size == name for p in every)]
    figure = Figure(figsize=(3.2 * len(classes) + 1, 6), dpi=120, layout="constrained")
    grid = figure.subplots(2, len(classes), squeeze=False, sharex=True, sharey="row")
    for column, name in enumerate(classes):
        here = [p for p in every if p.size == name]
        layers = len({p.shape for p in here})
        grid[0][column].set_title(f"{name}: {layers} layer{'s' * (layers > 1)}", fontsize=10)
        _speed_up(grid[0][column], here, name)
        _floor_share(grid[1][column], here)
    grid[0][0].set_ylabel("speed-up over cuBLAS bf16")
    grid[1][0].set_ylabel("share of the floor")
    grid[0][0].legend(fontsize=8, frameon=False)
    grid[1][0].legend(fontsize=8, frameon=False)
    figure.savefig(path)


def _band(axes: Any, here: Sequence[Point], of: Callable[[Point], float | None], name: str) -> None:
    """The mean over layers as a line, from least to most as a band."""
    color, dash, marker = _STYLES.get(name, _DENSE_STYLE)
    values = {
        m: [v for p in here if p.m == m and (v := of(p))] for m in sorted({p.m for p in here})
    }
    rows = [m for m, found in values.items() if found]
    means = [mean(values[m]) for m in rows]
    axes.plot(rows, means, dash, color=color, marker=marker, markersize=3.5, label=name)
    low, high = [min(values[m]) for m in rows], [max(values[m]) for m in rows]
    axes.fill_between(rows, low, high, color=color, alpha=0.15, linewidth=0)


def _speed_up(axes: Any, here: Sequence[Point], size: str) -> None:
    _band(axes, here, lambda p: p.over_dense, "grace")
    _band(axes, here, lambda p: p.dense / p.peer[1] if p.peer else None, "best peer")
    rows = sorted({p.m for p in here})
    goals = [_goal(m, size) for m in rows]
    if None not in goals:
        axes.step(rows, goals, where="mid", color="black", linewidth=0.8, label="target")
    axes.axhline(1, color=_DENSE_STYLE[0], linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.grid(alpha=0.25)


def _goal(m: int, size: str) -> float | None:
    goal = next(row for row in TARGETS["rows"] if row["m"] is None or m <= row["m"])
    return goal.get(size)


def _floor_share(axes: Any, here: Sequence[Point]) -> None:
    _band(axes, here, lambda p: p.floor / p.ours, "grace")
    _band(axes, here, lambda p: p.floor / p.peer[1] if p.peer else None, "best peer")
    _band(axes, here, lambda p: p.floor / p.dense, "cuBLAS bf16")
    axes.set_xlabel("rows of x (M)")
    axes.set_ylim(0, 1.05)
    axes.set_xticks([1, 4, 16, 64, 256, 1024, 4096], ["1", "4", "16", "64", "256", "1k", "4k"])
    axes.grid(alpha=0.25)


# --- page ----------------------------------------------------------------------------------------


def gpu_results() -> dict[Path, dict]:
    """Committed results of GPUs: chart → content."""
    found = sorted(results.ROOT.glob("*/dequant_gemm.json"))
    contents = {path.parent.name: json.loads(path.read_text()) for path in found}
    return {
        PAGE.with_name(f"dequant_gemm_{gpu}.png"): content
        for gpu, content in contents.items()
        if not gpu.startswith("cpu-")
    }


def measured(contents: Mapping[Path, dict]) -> str:
    """What stands between the markers."""
    sections = [section(content, chart.name) for chart, content in contents.items()]
    return "\n\n".join(sections) or "No result of a GPU is committed yet."


def filled(page: str, contents: Mapping[Path, dict]) -> str:
    """The page with its marked block made anew."""
    text, count = _BLOCK.subn(lambda m: f"{m[1]}{measured(contents)}\n{m[2]}", page)
    if count != 1:
        raise ValueError(f"plot: {PAGE.name} must have one block measured, got {count}")
    return text


def main() -> int:
    """Writes page and charts, or says with exit code 1 that they are not what the results give."""
    contents, page = gpu_results(), PAGE.read_text()
    new = filled(page, contents)
    if "--check" in sys.argv[1:]:
        missing = [chart.name for chart in contents if not chart.exists()]
        if new == page and not missing:
            return 0
        print(f"{PAGE.name} or its charts are not what the committed results give: {COMMAND}")
        return 1
    for chart, content in contents.items():
        draw(points(content, {}), chart)
    results.write_whole(PAGE, new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
