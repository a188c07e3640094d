"""`grace verify`: compare a packed checkpoint with the student that it was made from."""

from pathlib import Path
from typing import Annotated

import typer


def verify(
    checkpoint: Annotated[Path, typer.Argument(help="Directory of the packed checkpoint.")],
    reference: Annotated[
        Path | None,
        typer.Argument(help="Directory of the student; without it, the files' hashes are checked."),
    ] = None,
) -> None:
    """Compare a packed checkpoint with the student that it was made from, bit for bit."""
    from grace.verification import verify as compare

    certificate = compare(checkpoint, reference)
    for difference in certificate.differences[:20]:
        typer.echo(difference, err=True)
    typer.echo(f"{checkpoint}: {certificate.summary()}")
    if not certificate.ok:
        raise typer.Exit(1)
