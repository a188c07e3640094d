"""``python -m benchmarks.plot_training_ops``: charts of the training ops' GPU results.

Draws ``docs/ops/training_ops_<gpu>.png`` from the committed ``benchmarks/results``: a line a size,
a mark a side.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import results

OPS = ("fake_quant", "gated_dkd", "cka", "linear_gated_dkd")
FOLDER = Path(__file__).parents[1] / "docs/ops"

_STYLES = {"grace": ("#2e8b57", "o"), "eager": ("#7f7f7f", "^"), "compile": ("#b5496a", "s")}
_OTHERS = [("#4c72b0", "D"), ("#dd8452", "v"), ("#8172b3", "P"), ("#937860", "X")]
_LEAST_MIB = 1.0  # what works in place has no place on a logarithmic axis


@dataclass(frozen=True)
class Line:
    """One size of an op: the floor in µs, and what each side took."""

    title: str
    floor: float
    times: Mapping[str, float]  # side → µs
    memory: Mapping[str, float]  # side → MiB


def lines(contents: Iterable[Mapping[str, Any]]) -> list[Line]:
    """Of one GPU's results, in the order of the files."""
    found = []
    for content in contents:
        sizes: dict[str, list[dict]] = {}
        for row in content["rows"]:
            if "us" in row:
                sizes.setdefault(_title(content["benchmark"], row["size"]), []).append(row)
        for title, rows in sizes.items():
            times = {row["side"]: row["us"] for row in rows}
            memory = {row["side"]: row["peak_mib"] for row in rows if "peak_mib" in row}
            found.append(Line(title, rows[0]["floor_us"], times, memory))
    return found


def _title(op: str, size: Mapping[str, Any]) -> str:
    return f"{op}  " + " ".join(f"{key}={value}" for key, value in size.items())


def gpu_results() -> dict[Path, list[dict]]:
    """Committed results of GPUs: chart → contents."""
    found = {}
    for folder in sorted(results.ROOT.iterdir()):
        paths = [folder / f"{op}.json" for op in OPS]
        contents = [json.loads(path.read_text()) for path in paths if path.exists()]
        if contents and not folder.name.startswith("cpu-"):
            found[FOLDER / f"training_ops_{folder.name}.png"] = contents
    return found


def draw(every: list[Line], path: Path) -> None:
    """Times as multiples of the floor on the left, memory on the right, both logarithmic."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 0.32 * len(every) + 1.2), dpi=120, layout="constrained")
    time, memory = figure.subplots(1, 2, sharey=True)
    sides = list(dict.fromkeys(side for line in every for side in line.times))
    others = [side for side in sides if side not in _STYLES]
    styles = _STYLES | dict(zip(others, itertools.cycle(_OTHERS), strict=False))
    for side in sides:
        over = {i: n.times[side] / n.floor for i, n in enumerate(every) if side in n.times}
        _marks(time, over, side, styles[side])
        taken = {i: n.memory.get(side, 0.0) for i, n in enumerate(every)}
        seen = {i: mib for i, mib in taken.items() if mib >= _LEAST_MIB}
        _marks(memory, seen, side, styles[side])
    time.axvline(1, color="black", linewidth=0.8, label="floor")
    time.set_xlabel("time, times the floor (forward + backward)")
    memory.set_xlabel("memory of a call, MiB")
    time.set_yticks(range(len(every)), [line.title for line in every], fontsize=8)
    time.invert_yaxis()
    time.legend(fontsize=8, frameon=False)
    figure.savefig(path)


def _marks(axes: Any, values: Mapping[int, float], side: str, style: tuple[str, str]) -> None:
    color, marker = style
    above = {"zorder": 3} if side == "grace" else {}
    places = (list(values.values()), list(values))
    axes.scatter(*places, s=22, c=color, marker=marker, label=side, **above)
    axes.set_xscale("log")
    axes.grid(alpha=0.25)


def main() -> None:
    """Writes every chart."""
    for chart, contents in gpu_results().items():
        draw(lines(contents), chart)
        print(chart)


if __name__ == "__main__":
    main()
