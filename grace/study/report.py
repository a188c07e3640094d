"""The report of a study, made from study.json alone: a table, charts, one HTML file."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grace.study.arms import FULL
from grace.study.charts import draw_charts, title
from grace.study.gather import FORMAT, VERSION

# Names that let the table fit a terminal of 80 columns.
_SHORT = {
    "existence": "exist",
    "position": "pos",
    "numerical_calculation": "num",
    "perception + cognition": "P + C",
    "between seeds": "seeds",
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


def write_report(folder: Path) -> list[Path]:
    """Write `report.md`, the charts and `report.html` beside a run's study.json."""
    study = read_study(folder)
    charts = draw_charts(study, folder)
    markdown = folder / "report.md"
    markdown.write_text(to_markdown(study))
    html = folder / "report.html"
    html.write_text(to_html(study, charts))
    return [markdown, *charts, html]


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


def footnotes(study: Mapping[str, Any]) -> list[str]:
    """What stands behind the numbers."""
    config, drawn = study["config"], study["benchmark"]
    seeds = len(config["seeds"])
    notes = [
        f"Scores are MME's (200 a subtask, 100·acc + 100·acc⁺) on {drawn['questions']} held-out "
        f"questions about {drawn['images']} drawn images; ± is one standard error over images.",
        f"Trained arms: {seeds} seed{'s' if seeds > 1 else ''}, {config['steps']} steps of "
        f"{config['batch_images']} images with {config['questions_per_image']} questions each, the "
        "same data for all; how each method was tuned stands in studies/quickstart/sweep.md."
        + (" One seed: the spread between seeds is not known." if seeds == 1 else ""),
        "MB: weights as served, quantized layers at their bits with bf16 scales, the rest bf16.",
    ]
    rates = [(title(arm), arm["agreement"]) for arm in study["arms"] if arm["deployed"]]
    if rates:
        agreed = ", ".join(f"{name} {rate:.2%}" for name, rate in rates)
        notes.append(
            "4- and 8-bit arms are scored as deployed: exported to compressed-tensors, loaded into "
            f"packed layers. Answers that agree with the fake-quantized model's: {agreed}."
        )
    return notes


def to_markdown(study: Mapping[str, Any]) -> str:
    """The table, what stands behind it, differences and the example, as Markdown."""
    header, rows = table(study)
    lines = [_row(header), _row(["---"] * len(header)), *map(_row, rows), ""]
    lines += [f"- {note}" for note in footnotes(study)]
    titles = {arm["name"]: title(arm) for arm in study["arms"]}
    lines += ["", _row(["difference", "points", "standard error"]), _row(["---"] * 3)]
    for item in study["differences"]:
        name = f"{titles[item['arm']]} − {titles[item['to']]}"
        lines.append(_row([name, f"{item['points']:+.0f}", f"{item['error']:.0f}"]))
    lines += ["", *_example(study, titles)]
    return "\n".join(lines) + "\n"


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _example(study: Mapping[str, Any], titles: Mapping[str, str]) -> list[str]:
    shown = study["example"]
    answers = [f"- {titles[arm]}: {text}" for arm, text in shown["answers"].items()]
    head = f"Example ({shown['subtask']}): {shown['question']} Truth: {shown['truth']}"
    return [head, "", *answers]


def to_html(study: Mapping[str, Any], charts: list[Path]) -> str:
    """One HTML page with everything in it: images are embedded, nothing is fetched."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATE.parent), autoescape=True, undefined=StrictUndefined
    )
    header, rows = table(study)
    return environment.get_template(_TEMPLATE.name).render(
        study=study,
        header=header,
        rows=rows,
        notes=footnotes(study),
        titles={arm["name"]: title(arm) for arm in study["arms"]},
        charts={path.stem: base64.b64encode(path.read_bytes()).decode() for path in charts},
    )


def print_report(study: Mapping[str, Any]) -> None:
    """The table, what stands behind it and the example, in the terminal."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    header, rows = table(study)
    shown = Table(box=None, padding=(0, 1, 0, 0), header_style="bold underline")
    for number, name in enumerate(header):
        justify: Any = "left" if number == 0 else "right"
        shown.add_column(_SHORT.get(name, name), justify=justify, no_wrap=True)
    for row in rows:
        shown.add_row(*row, style="bold" if row[0] == "GRACE" else None)
    console.print(shown, "")
    for note in footnotes(study):
        console.print(f"[dim]{note}[/dim]")
    titles = {arm["name"]: title(arm) for arm in study["arms"]}
    console.print("", *_example(study, titles), sep="\n", markup=False)
