"""Charts of one dot an arm: totals, GRACE against the others, subtasks, alignment.

Arms of as many bits share a panel: totals of two bits and of eight share no scale on which methods
differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grace.study.arms import FULL
from grace.study.charts import Arm, bits_label, by_bits, color_of, error_bars, grid, save, title
from grace.study.comparisons import ABOVE, BELOW, Comparison
from grace.study.resampling import Resampled

_ROW = 0.21  # inches
TOTAL = "perception + cognition"
_FOCUS = "grace"  # whose differences are drawn
_MANY = 24  # rows of a heat map; with more, GRACE's variants stand in the tables alone


@dataclass(frozen=True)
class Row:
    """A dot with its interval (value, low, high) and, where it began elsewhere, a ring there."""

    label: str
    color: str
    interval: Any = None
    value: float | None = None
    before: float | None = None
    filled: bool = True


def scores(arms: Sequence[Arm], resampled: Resampled, path: Path) -> None:
    """Total score and 95 % interval of every arm; what is not quantized stands in every panel."""
    whole = [arm for arm in arms if arm["bits"] == FULL]
    panels = {
        bits: [_total(arm, resampled) for arm in (*whole, *own)]
        for bits, own in (by_bits(arms) or {FULL: []}).items()
    }
    reference = next((a for m in ("control", "student") for a in whole if a["method"] == m), None)
    line = None if reference is None else resampled.total(reference["name"]).value
    _draw(panels, f"{TOTAL}, 95 % interval", path, line)


def _total(arm: Arm, resampled: Resampled) -> Row:
    name = arm["label"]
    return Row(name, color_of(arm["method"]), resampled.total(arm["name"]))


def focused(comparisons: Sequence[Comparison], arms: Sequence[Arm]) -> list[Comparison]:
    """What GRACE is compared with at low bits."""
    methods = {arm["name"]: arm["method"] for arm in arms}
    return [c for c in comparisons if methods[c.arm] == _FOCUS and c.bits != FULL]


def differences(arms: Sequence[Arm], comparisons: Sequence[Comparison], path: Path) -> None:
    """GRACE minus every other arm; a filled dot is separated from zero."""
    by_name = {arm["name"]: arm for arm in arms}
    panels: dict[int, list[Row]] = {bits: [] for bits in by_bits(arms)}
    for found in focused(comparisons, arms):
        other = by_name[found.to]
        panels[found.bits].append(
            Row(
                f"− {other['label']}",
                color_of(other["method"]),
                found.difference,
                filled=found.verdict in (ABOVE, BELOW),
            )
        )
    shown = {bits: rows for bits, rows in panels.items() if rows}
    _draw(shown, "GRACE minus another: points, 95 % interval; filled: separated", path, 0.0)


def alignments(arms: Sequence[Arm]) -> list[tuple[Arm, float, float]]:
    """Arms whose CKA to the teacher is known before and after they were made."""
    known = [(arm, arm.get("cka") or {}) for arm in arms]
    return [
        (arm, cka["before"], cka["after"])
        for arm, cka in known
        if cka.get("before") is not None and cka.get("after") is not None
    ]


def cka(arms: Sequence[Arm], path: Path) -> None:
    """CKA of visual tokens to the teacher's, before (ring) and after (dot) an arm was made."""
    known = [item for item in alignments(arms) if item[0]["method"] != "teacher"]
    whole = [item for item in known if item[0]["bits"] == FULL]
    groups = by_bits([arm for arm, _, _ in known]) or {FULL: []}
    panels = {
        bits: [
            Row(arm["label"], color_of(arm["method"]), value=after, before=before)
            for arm, before, after in (*whole, *(item for item in known if item[0] in own))
        ]
        for bits, own in groups.items()
    }
    _draw(panels, "CKA to the teacher: before (ring), after (dot)", path)


def _draw(
    panels: dict[int, list[Row]], label: str, path: Path, reference: float | None = None
) -> None:
    longest = max(map(len, panels.values()))
    figure, made = grid(len(panels), width=4.8, height=_ROW * longest + 0.8)
    for axes, (bits, rows) in zip(made, panels.items(), strict=True):
        if reference is not None:
            axes.axvline(reference, color="#999999", linestyle="--", linewidth=0.9)
        for place, row in enumerate(rows):
            _dot(axes, row, place)
        axes.set_yticks(range(len(rows)), [row.label for row in rows], fontsize=8)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        if len(panels) > 1 or bits != FULL:
            axes.set_title(bits_label(bits), fontsize=9)
    figure.supxlabel(label, fontsize=9)
    save(figure, path)


def _dot(axes: Any, row: Row, place: int) -> None:
    value = row.interval.value if row.interval is not None else row.value
    if row.before is not None:
        axes.plot([row.before, value], [place, place], color=row.color, linewidth=1.2)
        axes.plot(row.before, place, "o", color=row.color, fillstyle="none", markersize=5)
    bars = None if row.interval is None else error_bars([row.interval])
    fill = row.color if row.filled else "white"
    axes.errorbar(
        value, place, xerr=bars, fmt="o", color=row.color, markerfacecolor=fill,
        markersize=5, capsize=2, linewidth=1.2,
    )  # fmt: skip


def subtasks(arms: Sequence[Arm], path: Path) -> None:
    """Score of every arm in every subtask."""
    shown = [arm for arm in arms if len(arms) <= _MANY or "-" not in arm["method"]]
    names = list(shown[0]["subtasks"])
    figure, (axes,) = grid(1, width=7, height=_ROW * len(shown) + 1.2)
    axes.grid(visible=False)
    table = [[arm["subtasks"][name] for name in names] for arm in shown]
    axes.imshow(table, vmin=0, vmax=200, cmap="viridis", aspect="auto")
    axes.set_xticks(range(len(names)), names, fontsize=8, rotation=20, ha="right")
    axes.set_yticks(range(len(shown)), [title(arm) for arm in shown], fontsize=8)
    for row, values in enumerate(table):
        if row and shown[row]["bits"] != shown[row - 1]["bits"]:
            axes.axhline(row - 0.5, color="white", linewidth=2)
        for column, value in enumerate(values):
            color = "white" if value < 120 else "black"
            axes.text(
                column, row, f"{value:.0f}", ha="center", va="center", color=color, fontsize=7
            )
    save(figure, path)
