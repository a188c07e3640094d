"""`grace generate`: an answer about an image, token by token."""

from pathlib import Path
from typing import Annotated

import typer


def generate(
    model: Annotated[str, typer.Argument(help="Checkpoint directory or hub name.")],
    prompt: Annotated[str, typer.Option(help="What to ask.")],
    image: Annotated[list[Path] | None, typer.Option(help="Image file; may be repeated.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.", min=1)] = 256,
    temperature: Annotated[float, typer.Option(help="0: the likeliest tokens.", min=0)] = 0.0,
    top_p: Annotated[float, typer.Option(help="Of sampling.", min=0, max=1)] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Of sampling.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16, float32.")] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu or cuda.")] = None,
    fuse: Annotated[bool, typer.Option(help="Run packed layers of one input as one.")] = True,
    compile: Annotated[
        bool, typer.Option("--compile", help="torch.compile decode steps first: slow to start.")
    ] = False,
    lm_head_bits: Annotated[
        int | None, typer.Option(help="8: output head at 8 bits; changes logits.")
    ] = None,
) -> None:
    """Ask a model about images; prints tokens as they come, then how fast it was."""
    from grace.cli import _serving
    from grace.models import load_model

    pictures = [_serving.open_picture(path) for path in image or ()]
    network, processor = load_model(model, dtype, device, fuse)

    import torch

    from grace.generation import Generator

    generator = Generator(network, max_batch_size=1, compile=compile, lm_head_bits=lm_head_bits)
    messages = [_serving.user_turn(prompt, len(pictures))]
    inputs = _serving.inputs_of(network, processor, messages, pictures)
    if seed is not None:
        torch.manual_seed(seed)
    answer = _serving.Answer(processor.tokenizer)
    generator.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        streamer=answer.streamer,
        **_serving.sampling(temperature, top_p),
    )
    typer.echo(_serving.told(generator.timing, network.device), err=True)
