"""`grace import`: take over a checkpoint that another program quantized."""

from pathlib import Path
from typing import Annotated

import typer


def import_(
    source: Annotated[Path, typer.Argument(help="Directory of the quantized checkpoint.")],
    target: Annotated[Path, typer.Argument(help="Directory to write; new or empty.")],
    max_shard_size: Annotated[str, typer.Option(help="Largest size of a file.")] = "5GB",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the checkpoint in TARGET.")
    ] = False,
) -> None:
    """Make a packed checkpoint of a symmetric compressed-tensors, AWQ or GPTQ one, bit for bit."""
    from grace.importing import import_published

    certificate = import_published(
        source, target, max_shard_size=max_shard_size, overwrite=overwrite
    )
    typer.echo(f"{target}: {certificate.summary()}")
