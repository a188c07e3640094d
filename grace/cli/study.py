"""`grace study`: methods against each other, from a file; what to do with a study's folder."""

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup


class _RunByDefault(TyperGroup):
    """`grace study config.yaml` is `grace study run config.yaml`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put `run` in front of what is no command."""
        if args and args[0] not in self.commands and args[0] not in ("-h", "--help"):
            args = ["run", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_RunByDefault,
    help="Quantization-aware training against post-training quantization: "
    "grace study CONFIG.yaml key=value …",
)


@app.callback()
def _group() -> None:
    """Quantization-aware training against post-training quantization."""


@app.command()
def run(
    config: Annotated[Path, typer.Argument(help="YAML file, fields of StudyConfig.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, over the file's.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the study; default runs/NAME of the file.")
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(help="Stop cleanly by then; the same command goes on.", min=0.1),
    ] = None,
    arms: Annotated[
        str | None, typer.Option(help="Only these, by method or name: grace,rtn-4.")
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="Only these: 0,1.")] = None,
    until: Annotated[
        str | None, typer.Option(help="Stop behind a stage: data, models or sweep.")
    ] = None,
) -> None:
    """Run a study, or what is left of it, and write its study.json and report.

    A run that was stopped or killed goes on with the same command. A folder holds one
    configuration; only seeds, arms, bits and ptq_from may be added to it.
    """
    import time

    from grace.study.options import read_config
    from grace.study.run import check_choice, run_study, units
    from grace.study.worker import quiet

    deadline = None if minutes is None else time.time() + 60 * minutes
    if until not in (None, "data", "models", "sweep"):
        raise ValueError(f"study: --until must be data, models or sweep, got {until!r}")
    quiet()
    read = read_config(config, overrides or ())
    only, chosen = _names(arms), _numbers(seeds)
    check_choice(read, only, chosen)
    from grace.study.progress import TerminalProgress

    folder = out or Path("runs") / config.stem
    try:
        with TerminalProgress(units(read)) as progress:
            study = run_study(
                read,
                folder,
                only=only,
                seeds=chosen,
                until=deadline,
                stop_behind=until,
                progress=progress,
            )
    finally:
        if (folder / "study.json").is_file():
            _report(folder)
    _tell(study, folder)


def _names(text: str | None) -> list[str]:
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def _numbers(text: str | None) -> list[int]:
    try:
        return [int(name) for name in _names(text)]
    except ValueError:
        raise ValueError(f"study: --seeds must be whole numbers, got {text!r}") from None


def _report(folder: Path) -> None:
    from grace.study.report import write_report

    write_report(folder)


def _tell(study: dict[str, Any], folder: Path) -> None:
    left = study["unfinished"]
    if left:
        typer.echo(f"{len(left)} arms to run, first {left[0]}; the same command goes on: {folder}")
    if study["arms"]:
        typer.echo(f"report: {folder / 'report.html'}")


@app.command()
def merge(
    parts: Annotated[list[Path], typer.Argument(help="Folders of parts of one study.")],
    out: Annotated[Path, typer.Option(help="Folder to make: absent or empty.")],
) -> None:
    """Make one study of arms or seeds that ran apart, with its report."""
    from grace.study.merge import merge as merge_parts

    study = merge_parts(parts, out)
    _report(out)
    typer.echo(f"{len(study['arms'])} arms of {len(parts)} parts: {out / 'report.html'}")


@app.command()
def report(
    run_dir: Annotated[Path, typer.Argument(help="Directory that holds study.json, or the file.")],
    svg: Annotated[bool, typer.Option("--svg", help="Charts as SVG, too.")] = False,
) -> None:
    """Make report.md, the charts and report.html anew, from study.json."""
    from grace.study.report import print_report, read_study, write_report

    study = read_study(run_dir)
    files = write_report(run_dir, svg=svg)
    print_report(study)
    typer.echo("\n".join(map(str, files)))
