"""Which charts a study has, and those that are neither dots nor curves: bits, sizes, entropy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from grace.study import dots, lines
from grace.study.answers import PAPER_R, EntropyError
from grace.study.arms import FULL
from grace.study.charts import (
    Arm,
    bits_label,
    color_of,
    error_bars,
    grid,
    line_of,
    log_axis,
    save,
)
from grace.study.comparisons import Comparison, counterpart
from grace.study.resampling import Resampled

_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def charts_of(
    study: Mapping[str, Any],
    resampled: Resampled,
    comparisons: Sequence[Comparison],
    entropy: EntropyError | None,
) -> list[tuple[str, Callable[[Path], Any]]]:
    """(name, function that draws into a path) of what the study has data for."""
    arms = study["arms"]
    low = [arm for arm in arms if arm["bits"] != FULL]
    moving, curves = lines.betas_of(study), study["curves"]
    charts: list[tuple[str, bool, Callable[[Path], Any]]] = [
        ("scores", True, lambda path: dots.scores(arms, resampled, path)),
        ("subtasks", True, lambda path: dots.subtasks(arms, path)),
        ("bits", bool(low), lambda path: _bits(arms, resampled, path)),
        ("sizes", bool(low), lambda path: _sizes(arms, resampled, path)),
        (
            "differences",
            bool(dots.focused(comparisons, arms)),
            lambda path: dots.differences(arms, comparisons, path),
        ),
        ("curves", any(curves.values()), lambda path: lines.curves(arms, curves, path)),
        ("beta", bool(moving), lambda path: lines.betas(arms, moving, path)),
        (
            "entropy",
            bool(entropy and entropy.bins and entropy.r),
            lambda path: _entropy(entropy, path),
        ),
        ("cka", bool(dots.alignments(arms)), lambda path: dots.cka(arms, path)),
        ("sweep", bool(study.get("sweep")), lambda path: lines.sweep(study["sweep"], path)),
    ]
    return [(name, draw) for name, wanted, draw in charts if wanted]


def _bits(arms: Sequence[Arm], resampled: Resampled, path: Path) -> None:
    """Total score over bits: a line a method, ending in the same training without quantization;
    GRACE's variants are among the differences."""
    figure, (axes,) = grid(1, width=7, height=4.2)
    places = {bits: place for place, bits in enumerate(sorted({arm["bits"] for arm in arms}))}
    low = [arm for arm in arms if arm["bits"] != FULL and "-" not in arm["method"]]
    labels = list(dict.fromkeys(arm["label"] for arm in low))
    for number, label in enumerate(labels):
        own = sorted((a for a in low if a["label"] == label), key=lambda arm: arm["bits"])
        last = counterpart(own[-1], arms)
        shown = [*own, last] if last is not None else own
        totals = [resampled.total(arm["name"]) for arm in shown]
        beside = 0.03 * (number - (len(labels) - 1) / 2)  # so that no interval hides another
        axes.errorbar(
            [places[arm["bits"]] + beside for arm in shown],
            [total.value for total in totals],
            yerr=error_bars(totals),
            color=color_of(own[0]["method"]),
            linestyle=line_of(own[0]),
            marker="o", markersize=4, capsize=2, linewidth=1.2, label=label,
        )  # fmt: skip
    for arm in (arm for arm in arms if arm["method"] == "teacher"):
        axes.axhline(resampled.total(arm["name"]).value, color=color_of("teacher"), linestyle="--")
    axes.set_xticks(list(places.values()), [bits_label(b) for b in places])
    axes.set_xlabel("bits of the decoder's linears", fontsize=9)
    axes.set_ylabel(dots.TOTAL, fontsize=9)
    axes.legend(fontsize=7)
    save(figure, path)


def _sizes(arms: Sequence[Arm], resampled: Resampled, path: Path) -> None:
    """Total score over megabytes of weights as served: a color a method, a shape a bit width."""
    figure, (axes,) = grid(1, width=7, height=4.2)
    shapes = dict(zip(sorted({arm["bits"] for arm in arms}), _MARKERS, strict=False))
    plain = [arm for arm in arms if "-" not in arm["method"]]
    for arm in plain:
        total = resampled.total(arm["name"])
        axes.errorbar(
            arm["megabytes"], total.value, yerr=error_bars([total]), color=color_of(arm["method"]),
            marker=shapes.get(arm["bits"], "."), markersize=6, capsize=2, linestyle="none",
        )  # fmt: skip
    for bits, shape in shapes.items():
        axes.plot([], [], "k" + shape, label=bits_label(bits), linestyle="none")
    firsts = {arm["method"]: arm for arm in reversed(plain)}
    for arm in reversed(firsts.values()):
        axes.plot([], [], color=color_of(arm["method"]), linewidth=4, label=arm["label"])
    log_axis(axes)
    axes.set_xlabel("MB of weights as served", fontsize=9)
    axes.set_ylabel(dots.TOTAL, fontsize=9)
    axes.legend(fontsize=7, ncols=2)
    save(figure, path)


def _entropy(entropy: EntropyError | None, path: Path) -> None:
    """Share of errors over the teacher's entropy, and the lines of this r and of the paper's."""
    assert entropy is not None
    assert entropy.deviations is not None
    figure, (axes,) = grid(1, width=7, height=3.6)
    x, share, error = zip(*entropy.bins, strict=True)
    axes.errorbar(x, share, yerr=error, fmt="o", color=color_of("teacher"), capsize=3,
                  label="questions of like entropy, standard error")  # fmt: skip
    spread, wrong = entropy.deviations
    mean = entropy.errors / entropy.questions
    ends = [min(x), max(x)]
    lines = {} if entropy.r is None else {f"r = {entropy.r.value:.3f}": (entropy.r.value, "-")}
    lines[f"the paper's r = {PAPER_R}"] = (PAPER_R, "--")
    for label, (r, style) in lines.items():
        slope = r * wrong / spread if spread else 0.0
        heights = [mean + slope * (end - entropy.mean) for end in ends]
        axes.plot(ends, heights, color="#222222", linestyle=style, linewidth=1, label=label)
    axes.set_xlabel("entropy of the teacher's answer token, nats", fontsize=9)
    axes.set_ylabel("share of wrong answers", fontsize=9)
    axes.legend(fontsize=7)
    save(figure, path)
