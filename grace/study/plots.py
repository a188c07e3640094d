"""Charts that need more than scores: bits, sizes, β, the teacher's entropy, CKA, the sweep."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from grace.study.answers import PAPER_R, EntropyError
from grace.study.arms import FULL
from grace.study.candidates import RATE, by_weights
from grace.study.charts import color_of, save, title
from grace.study.comparisons import counterpart
from grace.study.resampling import Resampled

Arm = Mapping[str, Any]
_DASHES = ("solid", "dashed", "dotted", "dashdot")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def further_charts(
    study: Mapping[str, Any], resampled: Resampled, entropy: EntropyError | None
) -> list[tuple[str, Callable[[Path], Any]]]:
    """(name, function that draws into a path) of what the study has data for."""
    arms = study["arms"]
    low = [arm for arm in arms if arm["bits"] != FULL]
    betas = betas_of(study)
    charts: list[tuple[str, bool, Callable[[Path], Any]]] = [
        ("bits", bool(low), lambda path: _bits(arms, resampled, path)),
        ("sizes", bool(low), lambda path: _sizes(arms, resampled, path)),
        ("beta", bool(betas), lambda path: _betas(arms, betas, path)),
        (
            "entropy",
            bool(entropy and entropy.bins and entropy.r),
            lambda path: _entropy(entropy, path),
        ),
        ("cka", bool(alignments(arms)), lambda path: _cka(arms, path)),
        ("sweep", bool(study.get("sweep")), lambda path: _sweep(study["sweep"], path)),
    ]
    return [(name, draw) for name, wanted, draw in charts if wanted]


def betas_of(study: Mapping[str, Any]) -> dict[str, dict[str, list[Sequence[float]]]]:
    """By arm and seed, [step, β] where β moves: of `betas`, or of the curves of the first seeds."""
    found = study.get("betas")
    if found is None:
        curves = {
            arm: [[row["step"], row["beta"]] for row in rows if "beta" in row]
            for arm, rows in study["curves"].items()
        }
        found = {arm: {"": points} for arm, points in curves.items() if points}
    return {
        arm: seeds
        for arm, seeds in found.items()
        if len({value for points in seeds.values() for _, value in points}) > 1
    }


def alignments(arms: Sequence[Arm]) -> list[tuple[Arm, float, float]]:
    """Arms whose CKA to the teacher is known before and after they were made."""
    known = [(arm, arm.get("cka") or {}) for arm in arms]
    return [
        (arm, cka["before"], cka["after"])
        for arm, cka in known
        if cka.get("before") is not None and cka.get("after") is not None
    ]


def _axes(width: float = 7.0, height: float = 4.2) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    axes.grid(alpha=0.25)
    axes.tick_params(labelsize=8)
    return figure, axes


def _log_axis(axes: Any) -> None:
    """A logarithmic x axis with plain numbers on it."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _bars(intervals: Sequence[Any]) -> list[list[float]]:
    """Error bars of intervals, below and above their values."""
    return [
        [max(0.0, i.value - i.low) for i in intervals],
        [max(0.0, i.high - i.value) for i in intervals],
    ]


def _bits(arms: Sequence[Arm], resampled: Resampled, path: Path) -> None:
    """Total score over bits: a line a method, ending in the same training without quantization."""
    figure, axes = _axes()
    places = {bits: place for place, bits in enumerate(sorted({arm["bits"] for arm in arms}))}
    for label in dict.fromkeys(arm["label"] for arm in arms if arm["bits"] != FULL):
        own = sorted((a for a in arms if a["label"] == label), key=lambda arm: arm["bits"])
        last = counterpart(own[-1], arms)
        shown = [*own, last] if last is not None else own
        totals = [resampled.total(arm["name"]) for arm in shown]
        axes.errorbar(
            [places[arm["bits"]] for arm in shown],
            [total.value for total in totals],
            yerr=_bars(totals),
            color=color_of(own[0]["method"]),
            linestyle="-" if own[0].get("start", "student") == "student" else ":",
            marker="o", markersize=4, capsize=3, linewidth=1.2, label=label,
        )  # fmt: skip
    for arm in (arm for arm in arms if arm["method"] == "teacher"):
        axes.axhline(resampled.total(arm["name"]).value, color=color_of("teacher"), linestyle="--")
    axes.set_xticks(list(places.values()), [_bits_label(b) for b in places])
    axes.set_xlabel("bits of the decoder's linears", fontsize=9)
    axes.set_ylabel("perception + cognition", fontsize=9)
    axes.legend(fontsize=7)
    save(figure, path)


def _bits_label(bits: int) -> str:
    return "none quantized" if bits == FULL else f"{bits} bits"


def _sizes(arms: Sequence[Arm], resampled: Resampled, path: Path) -> None:
    """Total score over megabytes of weights as served: a color a method, a shape a bit width."""
    figure, axes = _axes()
    shapes = dict(zip(sorted({arm["bits"] for arm in arms}), _MARKERS, strict=False))
    for arm in arms:
        total = resampled.total(arm["name"])
        axes.errorbar(
            arm["megabytes"], total.value, yerr=_bars([total]), color=color_of(arm["method"]),
            marker=shapes.get(arm["bits"], "."), markersize=6, capsize=2, linestyle="none",
        )  # fmt: skip
    for bits, shape in shapes.items():
        axes.plot([], [], "k" + shape, label=_bits_label(bits), linestyle="none")
    firsts = {a["method"]: a for a in reversed(arms) if "-" not in a["method"]}
    for arm in reversed(firsts.values()):
        axes.plot([], [], color=color_of(arm["method"]), linewidth=4, label=arm["label"])
    _log_axis(axes)
    axes.set_xlabel("MB of weights as served", fontsize=9)
    axes.set_ylabel("perception + cognition", fontsize=9)
    axes.legend(fontsize=7, ncols=2)
    save(figure, path)


def _betas(
    arms: Sequence[Arm], betas: Mapping[str, Mapping[str, list[Sequence[float]]]], path: Path
) -> None:
    """β over steps, a line an arm and seed."""
    figure, axes = _axes(height=3.2)
    by_name = {arm["name"]: arm for arm in arms}
    bits = sorted({arm["bits"] for arm in arms})
    styles = dict(zip(bits, ("-", "--", ":", "-."), strict=False))
    for name, seeds in betas.items():
        arm = by_name[name]
        for number, points in enumerate(seeds.values()):
            axes.plot(
                [step for step, _ in points], [value for _, value in points],
                color=color_of(arm["method"]), linestyle=styles.get(arm["bits"], "-"),
                linewidth=1, alpha=0.9 if number == 0 else 0.4,
                label=title(arm) if number == 0 else None,
            )  # fmt: skip
    axes.set_xlabel("step", fontsize=9)
    axes.set_ylabel("β", fontsize=9)
    axes.legend(fontsize=7)
    save(figure, path)


def _entropy(entropy: EntropyError | None, path: Path) -> None:
    """Share of errors over the teacher's entropy, and the lines of this r and of the paper's."""
    assert entropy is not None
    assert entropy.deviations is not None
    figure, axes = _axes(height=3.6)
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


def _cka(arms: Sequence[Arm], path: Path) -> None:
    """CKA of visual tokens to the teacher's, before (ring) and after (dot) an arm was made."""
    known = [item for item in alignments(arms) if item[0]["method"] != "teacher"]
    figure, axes = _axes(height=0.28 * len(known) + 1)
    places = list(range(len(known)))[::-1]
    for place, (arm, before, after) in zip(places, known, strict=True):
        color = color_of(arm["method"])
        axes.plot([before, after], [place, place], color=color, linewidth=1.2)
        axes.plot(before, place, "o", color=color, fillstyle="none")
        axes.plot(after, place, "o", color=color)
    axes.set_yticks(places, [title(arm) for arm, _, _ in known], fontsize=8)
    axes.set_xlabel("CKA to the teacher: before (ring), after (dot)", fontsize=9)
    save(figure, path)


def _sweep(sweep: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Validation score over learning rates, a line for each method and its weights; what was
    chosen filled."""
    figure, axes = _axes(height=3.6)
    for name, found in sweep.items():
        color = color_of(found["method"])
        styles = cycle(_DASHES)
        for weights, totals in by_weights(found).items():
            label = f"{name}, {weights}" if weights else name
            line = {
                "color": color,
                "fillstyle": "none",
                "linewidth": 1.2,
                "linestyle": next(styles),
            }
            axes.plot(list(totals), list(totals.values()), marker="o", label=label, **line)
        axes.plot(found["chosen"][RATE], max(found["totals"]), "o", color=color)
    _log_axis(axes)
    axes.set_xlabel("learning rate", fontsize=9)
    axes.set_ylabel("total on the validation split", fontsize=9)
    axes.legend(fontsize=7)
    save(figure, path)
