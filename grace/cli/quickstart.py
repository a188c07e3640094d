"""`grace quickstart`: every method on tiny models, in minutes, with a report."""

from pathlib import Path
from typing import Annotated

import typer


def quickstart(
    out: Annotated[Path, typer.Option(help="Directory of the run.")] = Path("runs/quickstart"),
    seed: Annotated[int | None, typer.Option(help="Seed of the drawn benchmark.")] = None,
    seeds: Annotated[int | None, typer.Option(help="Training seeds an arm.", min=1)] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of every trained arm.", min=1)] = None,
    heldout_images: Annotated[
        int | None, typer.Option(help="Held-out images a subtask, two questions each.", min=2)
    ] = None,
    group_size: Annotated[int | None, typer.Option(help="Weights that share a scale.")] = None,
    models: Annotated[
        Path | None, typer.Option(help="Folder with teacher/ and student/; default: those shipped.")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Of trained arms without one of their own.")
    ] = None,
    from_scratch: Annotated[
        bool, typer.Option("--from-scratch", help="Train teacher and student anew as well.")
    ] = False,
    scale: Annotated[str, typer.Option(help="default; tiny: everything once, as tests do.")] = (
        "default"
    ),
) -> None:
    """Draw a benchmark, run every method on tiny models, deploy, and report.

    A run that was interrupted goes on where it stopped; `grace study report OUT` makes the report
    anew from its study.json.
    """
    from grace.study.quickstart import configure
    from grace.study.quickstart import quickstart as run

    config = configure(
        scale,
        seed=seed,
        seeds=None if seeds is None else tuple(range(seeds)),
        steps=steps,
        heldout_images=heldout_images,
        group_size=group_size,
        models=None if models is None else str(models),
        learning_rate=learning_rate,
    )
    run(out, config, from_scratch=from_scratch)
    typer.echo(f"report: {out / 'report.html'}")
