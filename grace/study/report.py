"""The report of a study, made from study.json: Markdown, charts, one HTML file."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grace.study.answers import from_json
from grace.study.arms import CALIBRATED, FULL, METHODS
from grace.study.charts import draw_charts, title
from grace.study.claims import ABSENT, FAILS, HOLDS, claims
from grace.study.comparisons import ABOVE, BELOW, ONE_SEED, UNSEPARATED, compare
from grace.study.gather import FORMAT, VERSION
from grace.study.plots import charts_of
from grace.study.resampling import Resampled
from grace.study.sections import (
    Example,
    Findings,
    example,
    has_many_bits,
    overview,
    sections,
    titles_of,
)

# Names that let the table fit a terminal of 80 columns.
_SHORT = {
    "existence": "exist",
    "position": "pos",
    "numerical_calculation": "num",
    "perception + cognition": "P + C",
    "between seeds": "seeds",
}
_VERDICTS = {
    HOLDS: "good",
    FAILS: "bad",
    ABOVE: "good",
    BELOW: "bad",
    UNSEPARATED: "open",
    ONE_SEED: "open",
    ABSENT: "open",
}
_TEMPLATE = Path(__file__).parent / "templates" / "report.html.j2"


def read_study(path: Path) -> dict[str, Any]:
    """study.json of a run directory (or the file itself).

    Raises:
        FileNotFoundError: there is none.
        ValueError: not a study, or one of another version.
    """
    path = path / "study.json" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"study: report needs a study.json, got none at {path}")
    try:
        study = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"study: {path} must be JSON, got {error}") from error
    kind = (study.get("format"), study.get("version")) if isinstance(study, dict) else None
    if kind != (FORMAT, VERSION):
        raise ValueError(f"study: {path} must be a {FORMAT} of version {VERSION}, got {kind}")
    return study


def write_report(path: Path, *, svg: bool = False) -> list[Path]:
    """Write `report.md`, the charts and `report.html` beside a study.json.

    Args:
        path: the run directory, or its study.json.
        svg: every chart as SVG, too.

    Raises:
        FileNotFoundError, ValueError: as `read_study`.
    """
    study = read_study(path)
    folder = path if path.is_dir() else path.parent
    found = findings(study)
    wanted = charts_of(study, found.resampled, found.comparisons, found.entropy)
    charts = draw_charts(wanted, folder)
    drawn = list(charts.values())
    if svg:
        drawn += draw_charts(wanted, folder, "svg").values()
    markdown, html = folder / "report.md", folder / "report.html"
    markdown.write_text(to_markdown(study, found, charts))
    html.write_text(to_html(study, found, charts))
    return [markdown, *drawn, html]


def resample(study: Mapping[str, Any]) -> Resampled:
    """The study's arms, drawn again as its questions allow."""
    return Resampled(study["arms"], study["benchmark"].get("wordings"))


def findings(study: Mapping[str, Any]) -> Findings:
    """What is computed of a study: intervals, comparisons, claims, the teacher's entropy."""
    arms = study["arms"]
    resampled = resample(study)
    comparisons = compare(arms, resampled)
    entropy = from_json(study.get("teacher_entropy"))
    return Findings(resampled, comparisons, claims(arms, comparisons, resampled, entropy), entropy)


def table(study: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the one table: method, bits, subtasks, sum with its errors, size."""
    names = study["benchmark"]["subtasks"]
    header = ["method", "bits", *names, "perception + cognition", "between seeds", "MB"]
    rows = []
    for arm in study["arms"]:
        bits = "fp32" if arm["bits"] == FULL else str(arm["bits"])
        total = f"{arm['total']:.0f} ± {arm['total_error']:.0f}"
        spread = "" if arm["spread"] is None else f"± {arm['spread']:.0f}"
        cells = [f"{arm['subtasks'][name]:.0f}" for name in names]
        rows.append([arm["label"], bits, *cells, total, spread, f"{arm['megabytes']:.2f}"])
    return header, rows


def _first_table(study: Mapping[str, Any], found: Findings) -> tuple[list[str], list[list[str]]]:
    """What a report begins with: `table`, or, with many numbers of bits, totals alone."""
    if not has_many_bits(study):
        return table(study)
    shown = overview(study, found.resampled)
    return shown.header, shown.rows


def _label_errors(config: Mapping[str, Any]) -> list[str]:
    made = config.get("make") or {}
    shares = {"trained arms": config.get("label_errors", 0.0)}
    for which in ("teacher", "student"):
        shares[f"the {which}"] = made.get(which, {}).get("label_errors", 0.0)
    wrong = ", ".join(f"{share:.0%} of what {who} learned from" for who, share in shares.items())
    told = f"Wrong yes/no answers: {wrong}; what is scored is exact."
    return [told] if any(shares.values()) else []


def footnotes(study: Mapping[str, Any]) -> list[str]:
    """What stands behind the numbers."""
    config, drawn = study["config"], study["benchmark"]
    low = {arm["bits"] for arm in study["arms"]}
    seeds = max(len(arm["seeds"]) for arm in study["arms"])
    notes = [
        f"Scores are MME's (200 a subtask, 100·acc + 100·acc⁺) on {drawn['questions']} held-out "
        f"questions about {drawn['images']} drawn images; "
        + (
            "with 95 % intervals, see below."
            if has_many_bits(study)
            else "± is one standard error over images."
        ),
        f"Trained arms: {seeds} seed{'s' if seeds > 1 else ''}, {config['steps']} steps of "
        f"{config['batch_images']} images with {_of_an_image(config)} each, the same data for all; "
        + (
            "each method's options were swept, see below."
            if study.get("sweep")
            else "every method's options were set beforehand."
        )
        + (" One seed: the spread between seeds is not known." if seeds == 1 else ""),
        *_label_errors(config),
        "MB: weights with quantized layers at their bits, scales and the rest at 16 bits"
        + (", also where no kernel serves such (2 and 3 bits)." if low & {2, 3} else "."),
    ]
    methods = {arm["method"] for arm in study["arms"]}
    if any(METHODS[name].zero_points for name in methods if name in METHODS):
        notes.append(
            "Methods quantize to one grid, symmetric; asymmetric ones have zero points beside "
            "scales, as published. Those are scored fake-quantized: no kernel here serves them."
        )
    elif methods & set(CALIBRATED):
        notes.append(
            "All methods quantize to one grid, symmetric; as published, AWQ (and often GPTQ) have "
            "zero points beside scales."
        )
    if unfinished := study.get("unfinished"):
        notes.append(f"Not run yet: {_by_arm(unfinished)}.")
    rates = [(arm["agreement"], title(arm)) for arm in study["arms"] if arm["deployed"]]
    if rates:
        (least, worst), (most, _) = min(rates), max(rates)
        notes.append(
            "4- and 8-bit arms are scored as deployed: exported to compressed-tensors, loaded into "
            "packed layers. Answers that agree with the fake-quantized model's: "
            + (f"{least:.2%} ({worst}) to {most:.2%}." if least < most else f"{least:.2%}.")
        )
    return notes


def _by_arm(names: Sequence[str]) -> str:
    """`grace-3-s0`, `grace-3-s1` as one: grace-3 (seeds 0, 1)."""
    seeds: dict[str, list[str]] = {}
    for name in names:
        arm, _, seed = name.rpartition("-s")
        seeds.setdefault(arm, []).append(seed)
    told = (f"seed{'s' if len(each) > 1 else ''} {', '.join(each)}" for each in seeds.values())
    return ", ".join(f"{arm} ({which})" for arm, which in zip(seeds, told, strict=True))


def _of_an_image(config: Mapping[str, Any]) -> str:
    if config.get("benchmark") == "drawn":
        return f"{3 + config['further_questions']} questions and a description"
    return f"{config['questions_per_image']} questions"


def to_markdown(study: Mapping[str, Any], found: Findings, charts: Mapping[str, Path]) -> str:
    """The table, what stands behind it, and all sections, as Markdown beside its charts."""
    first = _table(*_first_table(study, found))
    lines = [*first, *(f"- {note}" for note in footnotes(study)), ""]
    for section in sections(study, found):
        lines += [f"## {section.heading}", ""]
        lines += [f"![{name}]({charts[name].name})\n" for name in section.charts if name in charts]
        for shown in section.tables:
            rows = _table(shown.header, shown.rows)
            lines += _folded(rows, len(shown.rows)) if shown.folded else rows
        lines += [line for note in section.notes for line in (note, "")]
        for answered in section.examples:
            lines += [*_example(answered), ""]
    return "\n".join(lines).rstrip() + "\n"


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    return [_row(header), _row(["---"] * len(header)), *map(_row, rows), ""]


def _folded(lines: list[str], rows: int) -> list[str]:
    return [f"<details><summary>{rows} rows</summary>", "", *lines, "</details>", ""]


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _example(shown: Example) -> list[str]:
    answers = [f"- {answer.text}: {answer.arms}" for answer in shown.answers]
    return [f"Example ({shown.subtask}): {shown.question} Truth: {shown.truth}", "", *answers]


def to_html(study: Mapping[str, Any], found: Findings, charts: Mapping[str, Path]) -> str:
    """One HTML page with everything in it: images are embedded, nothing is fetched."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATE.parent), autoescape=True, undefined=StrictUndefined
    )
    header, rows = _first_table(study, found)
    return environment.get_template(_TEMPLATE.name).render(
        study=study,
        header=header,
        rows=rows,
        notes=footnotes(study),
        sections=sections(study, found),
        titles=titles_of(study),
        verdicts=_VERDICTS,
        student=next((a for a in study["arms"] if a["method"] == "student"), study["arms"][0]),
        charts={n: base64.b64encode(p.read_bytes()).decode() for n, p in charts.items()},
    )


def print_report(study: Mapping[str, Any]) -> None:
    """The table, what stands behind it and the example, in the terminal."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    wide = has_many_bits(study)
    header, rows = _first_table(study, findings(study)) if wide else table(study)
    shown = Table(box=None, padding=(0, 1, 0, 0), header_style="bold underline")
    for number, name in enumerate(header):
        justify: Any = "left" if number == 0 else "right"
        shown.add_column(_SHORT.get(name, name), justify=justify, no_wrap=not wide)
    for row in rows:
        row = [cell.replace(", ", ",\u00a0") for cell in row] if wide else row  # whole intervals
        shown.add_row(*row, style="bold" if row[0] == "GRACE" else None)
    console.print(shown, "")
    for note in footnotes(study):
        console.print(f"[dim]{note}[/dim]")
    console.print("", *_example(example(study, study["example"])), sep="\n", markup=False)
