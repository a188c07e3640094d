"""`grace demo`: a page on which one or two models answer about an image."""

from typing import Annotated

import typer


def demo(
    models: Annotated[
        list[str], typer.Argument(help="One or two checkpoint directories or hub names.")
    ],
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at.", min=1, max=65535)] = 7860,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.", min=1)] = 128,
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16, float32.")] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu or cuda.")] = None,
    fuse: Annotated[bool, typer.Option(help="Run packed layers of one input as one.")] = True,
) -> None:
    """Show a page that asks one model, or two side by side, about an image.

    Needs the extra demo of grace-vlm.
    """
    import importlib.util

    from grace.models import load_model, require_checkpoint

    if len(models) > 2:
        raise ValueError(f"demo: models must be one or two, got {len(models)}")
    for name in models:
        require_checkpoint(name)
    if importlib.util.find_spec("gradio") is None:
        raise ValueError(
            "demo: gradio must be installed (pip install grace-vlm[demo]), got no gradio"
        )
    from grace.demo.answering import make_side
    from grace.demo.page import launch, make_page

    names = _names(models)
    sides = [
        make_side(name, *load_model(model, dtype, device, fuse))
        for name, model in zip(names, models, strict=True)
    ]
    page = make_page(sides, max_new_tokens)
    typer.echo(f"http://{host}:{port}", err=True)
    launch(page, host, port)


def _names(models: list[str]) -> list[str]:
    """Last parts of the paths; the whole paths where these are the same."""
    short = [model.rstrip("/").rsplit("/", 1)[-1] for model in models]
    return short if len(set(short)) == len(short) else models
