"""`grace train`: a low-bit student from a YAML file."""

import os
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

    Resume an interrupted run with `resume_from_checkpoint=true` (`auto`: if there is one). Ctrl-C
    and SIGTERM leave a checkpoint; a second Ctrl-C does not. Several GPUs:
    `torchrun --nproc-per-node=2 -m grace.cli train config.yaml`.
    """
    if plan:
        from grace.training.run_plan import describe, plan_run, read_plan_config

        found = read_plan_config(config, overrides or ())
        typer.echo(describe(plan_run(found, gpus=gpus, tokens=tokens)))
        return

    from grace.training.interrupt import Interrupted
    from grace.training.run import run
    from grace.training.run_config import read_config

    try:
        final = run(read_config(config, overrides or ()))
    except Interrupted as stop:
        typer.echo(f"grace: {stop}", err=True)
        raise typer.Exit(stop.exit_code) from None
    if os.environ.get("RANK", "0") == "0":
        typer.echo(f"trained student: {final}\npack it with: grace export {final} OUT")
