"""Charts over steps or learning rates: curves of training, β, the sweep; a panel a number of
bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from grace.study.arms import FULL
from grace.study.candidates import RATE, by_weights
from grace.study.charts import Arm, bits_label, color_of, grid, log_axis, save

_DASHES = ("solid", "dashed", "dotted", "dashdot")
_TERMS = {
    "cross-entropy": ("ce",),
    "distillation (GDKD, KD)": ("gdkd", "kd"),
    "RCKA (1 − CKA)": ("rcka",),
}
_Rows = Mapping[str, Sequence[Mapping[str, Any]]]  # of metrics.jsonl, by arm
_Betas = Mapping[str, Mapping[str, list[Sequence[float]]]]


def curves(arms: Sequence[Arm], rows: _Rows, path: Path) -> None:
    """Terms of the loss over steps: a line of panels a number of bits, one panel a term."""
    groups = _groups([arm for arm in arms if rows.get(arm["name"])])
    terms = {
        name: keys
        for name, keys in _TERMS.items()
        if any(key in row for own in rows.values() for row in own for key in keys)
    }
    count = len(terms)
    figure, made = grid(len(groups) * count, width=3.6, height=2.2, columns=count)
    for number, (bits, own) in enumerate(groups.items()):
        line = made[number * count : (number + 1) * count]
        for axes, (name, keys) in zip(line, terms.items(), strict=True):
            _term(axes, own, rows, keys)
            axes.set_title(f"{name}, {bits_label(bits)}", fontsize=9)
            axes.set_visible(bool(axes.lines))
        _legend(line[0])
    figure.supxlabel("step", fontsize=9)
    save(figure, path)


def _term(axes: Any, arms: Sequence[Arm], rows: _Rows, keys: Sequence[str]) -> None:
    for arm in arms:
        points = [(r["step"], r[key]) for r in rows[arm["name"]] for key in keys if key in r]
        if points:
            color = color_of(arm["method"])
            axes.plot(*zip(*points, strict=True), color=color, linewidth=1, label=arm["label"])


def _groups(arms: Sequence[Arm]) -> dict[int, list[Arm]]:
    """Arms by bits, those that are not quantized first."""
    every = sorted({arm["bits"] for arm in arms}, reverse=True)
    return {bits: [arm for arm in arms if arm["bits"] == bits] for bits in every}


def _legend(axes: Any) -> None:
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=6, framealpha=0.6)


def betas_of(study: Mapping[str, Any]) -> dict[str, dict[str, list[Sequence[float]]]]:
    """By arm and seed, [step, β] where β moves: of `betas`, or of the curves of the first seeds."""
    found = study.get("betas")
    if found is None:
        lines = {
            arm: [[row["step"], row["beta"]] for row in rows if "beta" in row]
            for arm, rows in study["curves"].items()
        }
        found = {arm: {"": points} for arm, points in lines.items() if points}
    return {
        arm: seeds
        for arm, seeds in found.items()
        if len({value for points in seeds.values() for _, value in points}) > 1
    }


def betas(arms: Sequence[Arm], found: _Betas, path: Path) -> None:
    """β over steps, a line an arm and seed."""
    groups = _groups([arm for arm in arms if arm["name"] in found])
    figure, made = grid(len(groups), width=4.8, height=2.4)
    for axes, (bits, own) in zip(made, groups.items(), strict=True):
        for arm in own:
            for number, points in enumerate(found[arm["name"]].values()):
                axes.plot(
                    *zip(*points, strict=True),
                    color=color_of(arm["method"]),
                    linewidth=1,
                    alpha=0.9 if number == 0 else 0.4,
                    label=arm["label"] if number == 0 else None,
                )
        axes.set_title(bits_label(bits), fontsize=9)
        axes.set_ylabel("β", fontsize=9)
        _legend(axes)
    figure.supxlabel("step", fontsize=9)
    save(figure, path)


def sweep(found: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Validation score over learning rates, a line for each method and its weights; what was
    chosen filled."""
    groups: dict[int, list[str]] = {}
    for name, own in found.items():
        at = name.removeprefix(own["method"]).lstrip("-")
        groups.setdefault(int(at) if at else FULL, []).append(name)
    figure, made = grid(len(groups), width=4.8, height=3.4)
    for axes, (bits, names) in zip(made, groups.items(), strict=True):
        for name in names:
            _tried(axes, found[name])
        log_axis(axes)
        axes.set_title(bits_label(bits), fontsize=9)
        axes.set_ylabel("total on the validation split", fontsize=9)
        _legend(axes)
    figure.supxlabel("learning rate", fontsize=9)
    save(figure, path)


def _tried(axes: Any, found: Mapping[str, Any]) -> None:
    color, styles = color_of(found["method"]), cycle(_DASHES)
    for weights, totals in by_weights(found).items():
        label = f"{found['method']}, {weights}" if weights else found["method"]
        axes.plot(
            list(totals), list(totals.values()), marker="o", fillstyle="none", color=color,
            linestyle=next(styles), linewidth=1.2, label=label,
        )  # fmt: skip
    axes.plot(found["chosen"][RATE], max(found["totals"]), "o", color=color)
