"""`grace train`: a low-bit student from a YAML file."""

from pathlib import Path
from typing import Annotated

import typer


def train(
    config: Annotated[Path, typer.Argument(help="YAML: student, teacher, data, output_dir, …")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, over what the file says.")
    ] = None,
) -> None:
    """Train a low-bit student under a teacher, from a YAML file.

    Resume an interrupted run with `resume_from_checkpoint=true`.
    """
    from grace.training.run import read_config, run

    final = run(read_config(config, overrides or ()))
    typer.echo(f"trained student: {final}\npack it with: grace export {final} OUT")
