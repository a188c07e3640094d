"""What a report holds, in order: sections of notes, tables, charts and examples.

Markdown and HTML are two renderings of the same sections; every number in them comes from
study.json by this file and those it imports.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, variance
from typing import Any

from grace.study.answers import PAPER_R, EntropyError
from grace.study.arms import FULL
from grace.study.candidates import RATE, at_edge, by_weights, named
from grace.study.charts import title
from grace.study.claims import ABSENT, BFLOAT16, SOURCE, Claim, signed
from grace.study.comparisons import Comparison, counterpart
from grace.study.dots import alignments
from grace.study.resampling import DRAWS, Interval, Resampled
from grace.study.statistics import pair_scores

Study = Mapping[str, Any]
_LONG = 30  # rows
_FEW_BITS = 3  # numbers of bits (with none) that a row an arm shows at a glance


@dataclass(frozen=True)
class Table:
    """Header and rows of text."""

    header: list[str]
    rows: list[list[str]]

    @property
    def folded(self) -> bool:
        """Whether it is so long that a page shows it when asked to."""
        return len(self.rows) > _LONG


@dataclass(frozen=True)
class Answer:
    """What was said, whether it is right, and which arms (their first seeds) said it."""

    text: str
    right: bool
    arms: str


@dataclass(frozen=True)
class Example:
    """A question about an image (PNG in base64), and the answers, right ones first."""

    subtask: str
    question: str
    truth: str
    image: str
    answers: list[Answer]


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it: charts (by name), tables, notes, examples."""

    heading: str
    tables: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    charts: list[str] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)


@dataclass(frozen=True)
class Findings:
    """What is computed of a study, once, for its report."""

    resampled: Resampled
    comparisons: list[Comparison]
    claims: list[Claim]
    entropy: EntropyError | None


def sections(study: Study, found: Findings) -> list[Section]:
    """The sections that the study has something for."""
    made = [
        _intervals(study, found.resampled),
        _claims(found.claims),
        _seeds(study),
        _kept(study, found.resampled),
        _differences(study, found.comparisons),
        _entropy(found.entropy),
        _alignment(study),
        _training(study),
        _sweep(study),
        _examples(study),
    ]
    return [section for section in made if section is not None]


def titles_of(study: Study) -> dict[str, str]:
    """What tables and charts call each arm."""
    return {arm["name"]: title(arm) for arm in study["arms"]}


def _shown(interval: Interval, digits: int = 0) -> str:
    value, low, high = (f"{x:.{digits}f}" for x in (interval.value, interval.low, interval.high))
    return f"{value} [{low}, {high}]"


def _percent(interval: Interval) -> str:
    return _shown(Interval(100 * interval.value, 100 * interval.low, 100 * interval.high), 1)


def has_many_bits(study: Study) -> bool:
    """Whether a table with a row a method and a column a number of bits tells more at a glance than
    one with a row an arm."""
    return len({arm["bits"] for arm in study["arms"]}) > _FEW_BITS


def overview(study: Study, resampled: Resampled) -> Table:
    """Totals with 95 % intervals: a row a method, a column a number of bits."""
    return _by_bits(study["arms"], lambda arm: _shown(resampled.total(arm["name"])))


def _by_bits(arms: Sequence[Mapping[str, Any]], told: Callable[[Mapping[str, Any]], str]) -> Table:
    """What is `told` of every arm: a row a method, a column a number of bits."""
    bits = sorted({arm["bits"] for arm in arms}, reverse=True)
    rows: dict[str, list[str]] = {}
    for arm in arms:
        rows.setdefault(arm["label"], [""] * len(bits))[bits.index(arm["bits"])] = told(arm)
    header = ["method", *("not quantized" if b == FULL else f"{b} bits" for b in bits)]
    return Table(header, [[label, *cells] for label, cells in rows.items()])


def _intervals(study: Study, resampled: Resampled) -> Section:
    """Every subtask's score and the total with 95 % intervals, and the spread over seeds."""
    names = resampled.subtasks
    rows = []
    for arm in study["arms"]:
        cells = [_shown(resampled.subtask(arm["name"], name)) for name in names]
        spread = "" if arm["spread"] is None else f"{arm['spread']:.1f}"
        total = _shown(resampled.total(arm["name"]))
        rows.append([title(arm), *cells, total, spread, str(len(arm["seeds"]))])
    seeds = max(len(arm["seeds"]) for arm in study["arms"])
    grouped = bool(study["benchmark"].get("wordings"))
    notes = [
        f"95 % intervals: {DRAWS:,} bootstrap draws of pairs of twin images with their questions"
        + (" (those that ask the same together)" if grouped else "")
        + ", within subtasks, and what another seed would change, by Student's t with the variance "
        "between seeds of all arms of a kind (trained under a teacher, trained without one, "
        "post-training) at a number of bits, or the arm's own where that is larger. They speak of "
        + ("other questions of their kind" if grouped else "new pictures of the same questions")
        + ", and of this student and teacher. The spread is the standard deviation of the total "
        "between seeds.",
    ]
    if seeds == 1:
        notes.append("One seed: what another would change is in no interval.")
    header = ["method", *names, "total", "spread", "seeds"]
    charts = ["scores", "subtasks", "bits", "sizes"]
    return Section("Scores", [Table(header, rows)], notes, charts)


def _seeds(study: Study) -> Section | None:
    """The subtask in which seeds differ the most, seed by seed: a mean says little where some runs
    learn what others do not."""
    several = [arm for arm in study["arms"] if arm["trained"] and len(arm["seeds"]) > 1]
    if not several:
        return None

    def scores(arm: Mapping[str, Any], subtask: str) -> list[float]:
        return [float(pair_scores(seed["right"][subtask]).mean()) for seed in arm["seeds"]]

    spread = {s: fmean(variance(scores(a, s)) for a in several) for s in several[0]["subtasks"]}
    most = max(spread, key=lambda subtask: spread[subtask])
    told = _by_bits(several, lambda arm: " / ".join(f"{score:.0f}" for score in scores(arm, most)))
    rest = sorted(spread[subtask] ** 0.5 for subtask in spread if subtask != most)
    note = (
        f"Seeds of trained arms differ the most in {most}, by {spread[most] ** 0.5:.1f} points "
        "(root of the mean variance over arms)"
        + (f", in others by {rest[0]:.1f} to {rest[-1]:.1f}" if rest else "")
        + f". Its scores, seed by seed ({', '.join(str(s['seed']) for s in several[0]['seeds'])})."
    )
    return Section("Between seeds", [told], [note])


def _kept(study: Study, resampled: Resampled) -> Section | None:
    """What quantized arms keep of the student and of the same training without quantization."""
    arms = study["arms"]
    names, rows = titles_of(study), []
    for arm in (arm for arm in arms if arm["bits"] != FULL):
        plain = counterpart(arm, arms)
        others = ["student", plain["name"] if plain else ""]
        kept = [_percent(resampled.ratio(arm["name"], o)) if o in names else "" for o in others]
        told = names[plain["name"]] if plain else ""
        rows.append([title(arm), f"{arm['megabytes']:.2f}", *kept, told])
    if not rows:
        return None
    header = ["method", "MB", "% of the student", "% of its counterpart", "counterpart"]
    note = (
        "Total score over that of the student as it comes, and of the counterpart, which is the "
        "same but for quantization; MB are weights as served."
    )
    return Section("What is kept", [Table(header, rows)], [note])


def _differences(study: Study, comparisons: Sequence[Comparison]) -> Section | None:
    if not comparisons:
        return None
    names, rows = titles_of(study), []
    for item in comparisons:
        told, p = f"{names[item.arm]} − {names[item.to]}", item.difference.p
        points = signed(item.difference)
        rows.append([told, points, f"{p:.2g}", f"{item.adjusted:.2g}", item.verdict])
    notes = [
        "Total score of an arm minus another's, on the same drawn images. p: two-sided, "
        f"at least {2 / (DRAWS + 1):.2g}; by Holm: for all comparisons at one number of bits "
        "together. Above 0.05 by Holm the benchmark does not separate the two. One seed: what "
        "another would change is not known, and nothing is said of methods."
    ]
    header = ["difference", "points", "p", "p by Holm", "verdict"]
    return Section("Paired differences", [Table(header, rows)], notes, ["differences"])


def _claims(claims: Sequence[Claim]) -> Section:
    """A row a claim, a column a number of bits."""
    bits = sorted({claim.bits for claim in claims}, key=int, reverse=True)
    rows: dict[str, list[str]] = {}
    for claim in claims:
        row = rows.setdefault(claim.text, [claim.text, *[""] * (len(bits) + 1)])
        row[2 + bits.index(claim.bits)] = _verdict(claim)
        if claim.paper:
            row[1] = claim.paper + ("" if claim.bits == BFLOAT16 else f" ({claim.bits} bits)")
    notes = [
        f"Claims of {SOURCE} and of the cards of its released models, with their numbers (other "
        "models, averages of other benchmarks). A difference holds, or does not, where p by Holm "
        "is at most 0.05; a share where the whole interval is on one side of the paper's; a "
        "correlation and CKA where it is on one side of 0. The rules are those of "
        "grace.study.claims."
    ]
    header = [
        "claim",
        "the paper",
        *("not quantized" if b == BFLOAT16 else f"{b} bits" for b in bits),
    ]
    return Section("The paper's claims", [Table(header, list(rows.values()))], notes)


def _verdict(claim: Claim) -> str:
    return claim.verdict if claim.verdict == ABSENT else f"{claim.verdict}: {claim.found}"


def _entropy(entropy: EntropyError | None) -> Section | None:
    if entropy is None:
        return None
    asked = f"{entropy.errors} of {entropy.questions} answers wrong"
    if entropy.r is None:
        told = f"The teacher has {asked}: nothing can go with its entropy."
    else:
        told = (
            f"Pearson's r of the entropy of the teacher's answer and its error: "
            f"{_shown(entropy.r, 3)} ({asked}); the paper has {PAPER_R}."
        )
    return Section("The teacher's entropy and its errors", notes=[told], charts=["entropy"])


def _alignment(study: Study) -> Section | None:
    known = alignments(study["arms"])
    if not known:
        return None
    rows = [
        [title(arm), f"{before:.3f}", f"{after:.3f}", f"{after - before:+.3f}"]
        for arm, before, after in known
    ]
    note = "CKA of visual tokens to the teacher's, mean over images and seeds."
    header = ["method", "before", "after", "change"]
    return Section("Alignment with the teacher", [Table(header, rows)], [note], ["cka"])


def _training(study: Study) -> Section | None:
    return Section("Training", charts=["curves", "beta"]) if any(study["curves"].values()) else None


def _sweep(study: Study) -> Section | None:
    notes = list(study.get("not_swept") or ())
    sweep = study.get("sweep") or {}
    if not sweep:
        return Section("Tuning", notes=notes) if notes else None
    rates = sorted({each[RATE] for found in sweep.values() for each in found["candidates"]})
    rows = []
    for name, found in sweep.items():
        for weights, totals in by_weights(found).items():
            beyond = at_edge(found["chosen"], found["candidates"])
            edge = f" (at the edge: {', '.join(beyond)})" if beyond else ""
            best = weights == named(found["chosen"], found["candidates"])
            chosen = f"{found['chosen'][RATE]:g}{edge}" if best else ""
            cells = [f"{totals[rate]:.0f}" if rate in totals else "" for rate in rates]
            rows.append([name, weights, *cells, chosen])
    header = ["arm", "weights", *(f"{rate:g}" for rate in rates), "chosen"]
    first = "Total on the validation split by learning rate; the best candidate is taken."
    return Section("Tuning", [Table(header, rows)], [first, *notes], ["sweep"])


def _examples(study: Study) -> Section | None:
    shown = study.get("examples") or [study.get("example")]
    made = [example(study, each) for each in shown if each]
    return Section("Where methods disagree", examples=made) if made else None


def example(study: Study, shown: Mapping[str, Any]) -> Example:
    """One of the study's examples, its arms by what they answered."""
    said: dict[str, dict[str, list[str]]] = {}
    for arm in study["arms"]:
        if arm["name"] in shown["answers"]:
            labels = said.setdefault(shown["answers"][arm["name"]], {})
            bits = [] if arm["bits"] == FULL else [str(arm["bits"])]
            labels.setdefault(arm["label"], []).extend(bits)
    truth = shown["truth"]
    answers = [
        Answer(text, text.lower() == truth.lower(), "; ".join(_who(*item) for item in who.items()))
        for text, who in said.items()
    ]
    answers.sort(key=lambda answer: not answer.right)
    return Example(shown["subtask"], shown["question"], truth, shown["image"], answers)


def _who(label: str, bits: Sequence[str]) -> str:
    return f"{label} ({', '.join(bits)} bits)" if bits else label
