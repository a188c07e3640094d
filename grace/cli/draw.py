"""`grace draw`: the drawn benchmark and rows to train on, from a seed."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Draw a visual-question benchmark with exact answers, or rows to train on.")

Seed = Annotated[int, typer.Option(help="Everything is drawn from it.")]
Pixels = Annotated[int, typer.Option(help="Width and height of the images.")]
Workers = Annotated[int, typer.Option(help="Processes that draw.")]


@app.command()
def benchmark(
    out: Annotated[Path, typer.Argument(help="Folder to make: absent or empty.")],
    images_per_subtask: Annotated[int, typer.Option(help="Even; two questions an image.")] = 100,
    level: Annotated[str, typer.Option(help="easy, medium or hard.")] = "medium",
    split: Annotated[str, typer.Option(help="heldout, validation or train.")] = "heldout",
    seed: Seed = 0,
    pixels: Pixels = 336,
    workers: Workers = 1,
) -> None:
    """Nine subtasks in MME's folder layout, for `grace evaluate`."""
    from grace.evaluation.drawn import benchmark as drawn

    scenes = drawn.draw(
        out,
        images_per_subtask=images_per_subtask,
        seed=seed,
        level=level,
        split=split,
        pixels=pixels,
        workers=workers,
    )
    questions = 2 * sum(map(len, scenes.values()))
    typer.echo(f"{questions} questions, {split}, {level}: {out}")


@app.command()
def rows(
    out: Annotated[Path, typer.Argument(help="Folder of train.json and images.")],
    images: Annotated[int, typer.Option(help="Images to draw, three rows each.")],
    level: Annotated[
        list[str] | None, typer.Option(help="May be given several times; default all three.")
    ] = None,
    split: Annotated[str, typer.Option(help="train or validation.")] = "train",
    seed: Seed = 0,
    pixels: Pixels = 336,
    workers: Workers = 1,
) -> None:
    """LLaVA rows and their images, for `grace train`; held-out compositions never occur in them."""
    from grace.evaluation.drawn import benchmark as drawn
    from grace.evaluation.drawn.levels import LEVELS

    if split not in ("train", "validation"):
        raise ValueError(f"draw: --split must be train or validation, got {split!r}")
    file = drawn.training_rows(
        out,
        images=images,
        seed=seed,
        levels=level or tuple(LEVELS),
        split=split,
        pixels=pixels,
        workers=workers,
    )
    typer.echo(f"{3 * images} rows about {images} images: {file}")
