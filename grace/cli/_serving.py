"""What `grace generate` and `grace chat` share: pictures, prompts, answers as they come."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def open_picture(path: Path) -> Any:
    """An image file, in RGB.

    Raises:
        ValueError: it is no picture.
        OSError: it cannot be read.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as opened:
            return opened.convert("RGB")
    except UnidentifiedImageError:
        raise ValueError(f"image must be a picture, got {path}") from None


def user_turn(prompt: str, pictures: int) -> dict[str, Any]:
    """A message of a chat template: pictures first, then the words."""
    content = [{"type": "image"} for _ in range(pictures)] + [{"type": "text", "text": prompt}]
    return {"role": "user", "content": content}


def inputs_of(
    model: Any, processor: Any, messages: Sequence[dict[str, Any]], pictures: Sequence[Any]
) -> dict[str, Any]:
    """What the model takes for a conversation so far and the pictures in it, in order."""
    text = processor.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
    inputs = processor(text=[text], images=list(pictures) or None, return_tensors="pt")
    return {
        name: value.to(model.device, model.dtype if value.is_floating_point() else None)
        for name, value in inputs.items()
    }


def sampling(temperature: float, top_p: float) -> dict[str, Any]:
    """Arguments of `generate`: at temperature 0 the likeliest token."""
    if temperature == 0:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": temperature, "top_p": top_p}


class Answer:
    """Streams an answer to stdout and keeps its tokens, also when it is interrupted."""

    def __init__(self, tokenizer: Any) -> None:
        from transformers import TextStreamer

        tokens: list[int] = []

        class Streamer(TextStreamer):
            """Prints whole words as they come."""

            def put(self, value: Any) -> None:
                if not self.next_tokens_are_prompt:
                    tokens.extend(value.flatten().tolist())
                super().put(value)

        self._tokenizer, self.tokens = tokenizer, tokens
        self.streamer = Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)

    @property
    def text(self) -> str:
        """What was said so far."""
        return self._tokenizer.decode(self.tokens, skip_special_tokens=True).strip()


def told(timing: Any, device: Any) -> str:
    """One line on how fast an answer was and what it took."""
    import torch

    line = f"{timing.new_tokens} tokens"
    if timing.new_tokens > 1:
        rate = 1000 / timing.ms_per_token
        line += f", {rate:.1f} tokens/s ({timing.ms_per_token:.2f} ms a token)"
    line += f", prefill {timing.prefill_ms:.0f} ms"
    if device.type == "cuda":
        line += f", peak memory {torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB"
    return line
