"""The paper's claims, and what a study says to each: by rules, from the numbers.

- "above": the difference of two arms. `HOLDS` where Holm's p is at most 5 % and it is positive,
  `FAILS` where it is at most 5 % and negative, else `UNSEPARATED`; `ONE_SEED` where it is not known
  what another seed would change.
- "keeps": the share of a score that is kept. `HOLDS` where the whole 95 % interval is at or above
  the paper's share, `FAILS` where it is below, else `UNSEPARATED` (or `ONE_SEED`).
- "rises with": a correlation. `HOLDS` where the whole interval is above 0, `FAILS` where it is
  below, else `UNSEPARATED`; so with fewer than `FEWEST` errors, whose interval says too much.
- "nearer": CKA to the teacher, a difference a seed. `HOLDS` where the 95 % interval of their mean,
  by Student's t, is above 0, `FAILS` where it is below, else `UNSEPARATED`. The term trains what is
  measured: it is a check that it works.
- `ABSENT` where the study has not run what the claim is about.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from grace.study.answers import PAPER_R, EntropyError
from grace.study.arms import FULL, METHODS
from grace.study.comparisons import ABOVE, BELOW, ONE_SEED, Comparison
from grace.study.resampling import Interval, Resampled

HOLDS, FAILS, UNSEPARATED = "holds", "does not hold", "not separated"
ABSENT = "not in this study"
SOURCE = "arXiv 2601.22709"
BFLOAT16 = "16"  # bits of a claim about what is not quantized
FEWEST = 30  # errors, and answers that are none, behind a correlation
# 97.5 % of Student's t, by degrees of freedom; with more than these the last is a little wide.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclass(frozen=True)
class Claim:
    """A sentence of the paper and its number, what this study has, and whether it holds."""

    text: str
    paper: str
    bits: str
    found: str
    verdict: str


# (arm's method, other's method, sentence, the paper's number); LLaVA-1.5-7B, average of benchmarks.
_ABOVE = (
    ("grace", "rtn", "GRACE is above round-to-nearest", "67.2 and 65.2"),
    ("grace", "gptq", "GRACE is above GPTQ", ""),
    ("grace", "awq", "GRACE is above AWQ", "67.2 and 65.6"),
    ("grace", "qat", "GRACE is above QAT without a teacher", "67.2 and 65.9"),
    ("grace", "kd", "GRACE is above QAT with plain distillation", ""),
    ("grace", "student", "quantized GRACE is above the student it began with", "67.2 and 66.5"),
    ("grace", "control", "quantized GRACE is above the student trained as long without it", ""),
    ("grace", "grace-no-gate", "the confidence gate helps", ""),
    ("grace", "grace-no-rcka", "relational alignment (RCKA) helps", ""),
    ("grace", "grace-fixed-beta", "the adaptive β helps", ""),
    ("grace", "grace-per-channel", "scales of groups are above scales of rows", ""),
)
_PAPER_BITS = 4  # those of the numbers above
# What INT4 and INT8 keep of the distilled model in bf16: averages of Qwen3-VL-2B by the cards of
# the released models. These were quantized from it, in a second stage; here there is one.
_KEEPS = {4: (75.0, 76.7), 8: (75.9, 76.7)}


def claims(
    arms: Sequence[Mapping[str, Any]],
    comparisons: Sequence[Comparison],
    resampled: Resampled,
    entropy: EntropyError | None,
) -> list[Claim]:
    """All claims, those about quantized models once for each number of bits."""
    methods = {(a["method"], a["bits"]): a for a in arms if a.get("start", "student") == "student"}
    low = sorted({arm["bits"] for arm in arms if arm["bits"] != FULL}, reverse=True)
    by_pair = {(c.arm, c.to): c for c in comparisons}
    found = []
    for one, other, text, paper in _ABOVE:
        for bits in low:
            to = methods.get((other, bits)) or methods.get((other, FULL))
            arm = methods.get((one, bits))
            compared = by_pair.get((arm["name"], to["name"])) if arm and to else None
            found.append(_above(text, paper if bits == _PAPER_BITS else "", str(bits), compared))
    found += _fairer(arms, by_pair)
    found += [_keeps(methods, resampled, bits) for bits in low if bits in _KEEPS]
    text = "distillation is above the student it began with, unquantized"  # by the same cards
    found.append(_above(text, "76.7 and 67.3", BFLOAT16, by_pair.get(("distil", "student"))))
    text = "distillation is above training on without a teacher, unquantized"
    found.append(_above(text, "", BFLOAT16, by_pair.get(("distil", "control"))))
    found.append(_entropy(entropy))
    found += [_nearer(methods, bits) for bits in low]
    return found


def _fairer(
    arms: Sequence[Mapping[str, Any]], by_pair: Mapping[tuple[str, str], Comparison]
) -> list[Claim]:
    """GRACE against post-training methods with zero points, and on the student that trained as
    long: the paper has no such rows, and without the latter training and quantization are not told
    apart."""
    found = []
    for arm in arms:
        started = arm.get("start", "student") != "student"
        asymmetric = arm["method"] in METHODS and METHODS[arm["method"]].zero_points
        grace = next((a for a in arms if (a["method"], a["bits"]) == ("grace", arm["bits"])), None)
        if grace is not None and (started or asymmetric):
            name, _, kind = arm["method"].partition("-")
            text = f"GRACE is above {kind} {name.upper()}".replace("  ", " ")
            text += " of the student trained on" if started else ""
            compared = by_pair.get((grace["name"], arm["name"]))
            found.append(_above(text, "", str(arm["bits"]), compared))
    return found


def _above(text: str, paper: str, bits: str, compared: Comparison | None) -> Claim:
    if compared is None:
        return Claim(text, paper, bits, "", ABSENT)
    known = {ABOVE: HOLDS, BELOW: FAILS, ONE_SEED: ONE_SEED}
    verdict = known.get(compared.verdict, UNSEPARATED)
    points = compared.difference
    told = f"{signed(points)}, p {compared.adjusted:.2g}"
    return Claim(text, paper, bits, told, verdict)


def signed(interval: Interval) -> str:
    """A difference in points, with its interval."""
    value, low, high = (round(x) for x in (interval.value, interval.low, interval.high))
    return f"{value:+d} [{low:+d}, {high:+d}]"


def _keeps(
    methods: Mapping[tuple[str, int], Mapping[str, Any]], resampled: Resampled, bits: int
) -> Claim:
    quantized, plain = _KEEPS[bits]
    share = quantized / plain
    text = f"quantized GRACE keeps {share:.1%} of the distilled student"
    paper = f"{quantized} of {plain}"
    arm, other = methods.get(("grace", bits)), methods.get(("distil", FULL))
    if arm is None or other is None:
        return Claim(text, paper, str(bits), "", ABSENT)
    kept = resampled.ratio(arm["name"], other["name"])
    told = f"{kept.value:.1%} [{kept.low:.1%}, {kept.high:.1%}]"
    known = resampled.knows_seeds(arm["name"]) and resampled.knows_seeds(other["name"])
    return Claim(text, paper, str(bits), told, side_of(kept, share) if known else ONE_SEED)


def side_of(interval: Interval, bound: float) -> str:
    """`HOLDS` where the interval is at or above a bound, `FAILS` where it is below."""
    if interval.low >= bound:
        return HOLDS
    return FAILS if interval.high < bound else UNSEPARATED


def _entropy(entropy: EntropyError | None) -> Claim:
    text, paper = "the teacher errs where its entropy is high", f"r = {PAPER_R}"
    if entropy is None or entropy.r is None:
        never = "" if entropy is None else f"{entropy.errors} errors of {entropy.questions}"
        return Claim(text, paper, BFLOAT16, never, ABSENT)
    r = entropy.r
    told = f"r = {r.value:.3f} [{r.low:.3f}, {r.high:.3f}]"
    verdict = HOLDS if r.low > 0 else FAILS if r.high < 0 else UNSEPARATED
    if min(entropy.errors, entropy.questions - entropy.errors) < FEWEST:
        told, verdict = f"{told}, of {entropy.errors} errors", UNSEPARATED
    return Claim(text, paper, BFLOAT16, told, verdict)


def _nearer(methods: Mapping[tuple[str, int], Mapping[str, Any]], bits: int) -> Claim:
    text = "RCKA brings visual tokens nearer to the teacher's (CKA)"
    pair = [_cka(methods.get((name, bits))) for name in ("grace", "grace-no-rcka")]
    seeds = sorted(set(pair[0]) & set(pair[1]))
    if not seeds:
        return Claim(text, "", str(bits), "", ABSENT)
    more = [pair[0][seed] - pair[1][seed] for seed in seeds]
    told = ", ".join(f"{value:+.3f}" for value in more)
    if len(more) == 1:
        return Claim(text, "", str(bits), told, ONE_SEED)
    mean = fmean(more)
    width = _T[min(len(more) - 1, len(_T)) - 1] * stdev(more) / len(more) ** 0.5
    verdict = HOLDS if mean > width else FAILS if mean < -width else UNSEPARATED
    return Claim(text, "", str(bits), told, verdict)


def _cka(arm: Mapping[str, Any] | None) -> dict[int, float]:
    """CKA to the teacher when an arm is made, by seed."""
    found = {
        item["seed"]: (item.get("cka") or {}).get("after")
        for item in (arm or {"seeds": ()})["seeds"]
    }
    return {seed: value for seed, value in found.items() if value is not None}
