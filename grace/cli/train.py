"""`grace train`: a low-bit student from a YAML file."""

from pathlib import Path
from typing import Annotated

import typer


def train(
    config: Annotated[Path, typer.Argument(help="YAML: student, teacher, data, output_dir, …")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, over what the file says.")
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Tell what memory the run takes a GPU; load nothing.")
    ] = False,
    gpus: Annotated[int, typer.Option(help="With --plan: GPUs of the run.")] = 1,
    tokens: Annotated[
        int | None, typer.Option(help="With --plan: tokens of a row (data.max_length, or 2048).")
    ] = None,
) -> None:
    """Train a low-bit student under a teacher, from a YAML file.

    Resume an interrupted run with `resume_from_checkpoint=true`.
    """
    if plan:
        from grace.training.run_plan import describe, plan_run, read_plan_config

        found = read_plan_config(config, overrides or ())
        typer.echo(describe(plan_run(found, gpus=gpus, tokens=tokens)))
        return

    from grace.training.run import read_config, run

    final = run(read_config(config, overrides or ()))
    typer.echo(f"trained student: {final}\npack it with: grace export {final} OUT")
