"""`grace generate`: an answer about an image, token by token."""

from pathlib import Path
from typing import Annotated, Any

import typer


def generate(
    model: Annotated[str, typer.Argument(help="Checkpoint directory or hub name.")],
    prompt: Annotated[str, typer.Option(help="What to ask.")],
    image: Annotated[list[Path] | None, typer.Option(help="Image file; may be repeated.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.", min=1)] = 256,
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16, float32.")] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu or cuda.")] = None,
    fuse: Annotated[bool, typer.Option(help="Run packed layers of one input as one.")] = True,
) -> None:
    """Ask a model about images; prints tokens as they come, then tokens per second."""
    pictures = [_open(path) for path in image or ()]
    from grace.cli._models import load_model

    network, processor = load_model(model, dtype, device, fuse)
    _stream(network, _inputs(network, processor, prompt, pictures), processor, max_new_tokens)


def _open(path: Path) -> Any:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as opened:
            return opened.convert("RGB")
    except UnidentifiedImageError:
        raise ValueError(f"generate: image must be a picture, got {path}") from None


def _inputs(model: Any, processor: Any, prompt: str, pictures: list[Any]) -> dict[str, Any]:
    content = [{"type": "image"} for _ in pictures] + [{"type": "text", "text": prompt}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    inputs = processor(text=[text], images=pictures or None, return_tensors="pt")
    return {
        name: value.to(model.device, model.dtype if value.is_floating_point() else None)
        for name, value in inputs.items()
    }


def _stream(model: Any, inputs: dict[str, Any], processor: Any, max_new_tokens: int) -> None:
    """Print the answer as it is made, and on stderr how fast it was."""
    import time

    import torch
    from transformers import TextStreamer

    started = time.perf_counter()
    times: list[float] = []

    class Clocked(TextStreamer):
        def put(self, value: Any) -> None:
            times.append(time.perf_counter())  # the first call brings the prompt
            super().put(value)

    streamer = Clocked(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    with torch.inference_mode():
        model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, streamer=streamer)
    made = times[1:]
    first = made[0] - started
    rate = (len(made) - 1) / (made[-1] - made[0]) if len(made) > 1 else 1 / first
    told = f"{len(made)} tokens, {rate:.1f} tokens/s, first after {1000 * first:.0f} ms"
    if model.device.type == "cuda":
        told += f", peak memory {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB"
    typer.echo(told, err=True)
