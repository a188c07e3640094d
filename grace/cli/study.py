"""`grace study`: what to do with a study's run directory."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Reports of a study.")


@app.callback()
def _group() -> None:
    """Reports of a study."""


@app.command()
def report(
    run_dir: Annotated[Path, typer.Argument(help="Directory that holds study.json, or the file.")],
    svg: Annotated[bool, typer.Option("--svg", help="Charts as SVG, too.")] = False,
) -> None:
    """Make report.md, the charts and report.html anew, from study.json (and questions.npz)."""
    from grace.study.report import print_report, read_study, write_report

    study = read_study(run_dir)
    files = write_report(run_dir, svg=svg)
    print_report(study)
    typer.echo("\n".join(map(str, files)))
