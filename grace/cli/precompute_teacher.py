"""`grace precompute-teacher`: the teacher's answers to a run's rows, made once."""

from pathlib import Path
from typing import Annotated

import typer


def precompute_teacher(
    config: Annotated[Path, typer.Argument(help="YAML of `grace train`, with student and teacher")],
    out: Annotated[Path, typer.Argument(help="Folder of the cache.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, over what the file says.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Rows a forward pass.")] = 8,
) -> None:
    """Run a training run's teacher over all of its rows, and keep what the losses look at.

    Training then takes `teacher_cache=OUT` in place of the teacher. Goes on where it was stopped.
    """
    from grace.training.precompute import precompute_teacher as precompute
    from grace.training.run_config import read_config

    folder = precompute(read_config(config, overrides or ()), out, batch_size=batch_size)
    typer.echo(
        f"teacher's cache: {folder}\ntrain with: grace train {config} teacher_cache={folder}"
    )
