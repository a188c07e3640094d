"""`grace export`: write a trained student as a packed checkpoint that servers load."""

from pathlib import Path
from typing import Annotated

import typer


def export(
    source: Annotated[Path, typer.Argument(help="Directory of the trained student.")],
    target: Annotated[Path, typer.Argument(help="Directory to write; new or empty.")],
    format: Annotated[
        str, typer.Option(help="compressed-tensors, awq or gptq.")
    ] = "compressed-tensors",
    dtype: Annotated[
        str, typer.Option(help="What is not quantized: auto, bfloat16, float16, float32.")
    ] = "auto",
    max_shard_size: Annotated[str, typer.Option(help="Largest size of a file.")] = "5GB",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the checkpoint in TARGET.")
    ] = False,
) -> None:
    """Write a trained student as a packed checkpoint that servers load, and verify it."""
    import torch

    from grace.export import export as write

    names = ("auto", "bfloat16", "float16", "float32")
    if dtype not in names:
        raise ValueError(f"export: dtype must be one of {', '.join(names)}, got {dtype}")
    certificate = write(
        source,
        target,
        format,
        dtype=None if dtype == "auto" else getattr(torch, dtype),
        max_shard_size=max_shard_size,
        overwrite=overwrite,
    )
    typer.echo(f"{target}: {certificate.summary()}")
