"""A model's answer as it comes, and how long it took."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import TextIteratorStreamer

from grace.generation import Generator
from grace.nn import FusedLinear, PackedLinear

_SHOWN = 0.05  # seconds between two states of an answer that are shown


@dataclass(frozen=True)
class Side:
    """A model of the page: its name, itself, its processor, what makes its tokens, and the bytes of
    its weights."""

    name: str
    model: Any
    processor: Any
    generator: Generator
    bytes: int

    @property
    def kind(self) -> str:
        """How its weights are stored: "INT4", "INT8" (some of them), or the dtype of all."""
        modules = self.model.modules()
        bits = {layer.bits for layer in modules if isinstance(layer, PackedLinear | FusedLinear)}
        return f"INT{min(bits)}" if bits else str(self.model.dtype).removeprefix("torch.").upper()


@dataclass(frozen=True)
class Answer:
    """What a model has said so far.

    Attributes:
        text: all of it.
        tokens: how many tokens it took.
        first: seconds from the call to the first token, None before it.
        rate: tokens a second after the first; None below two tokens.
        peak: bytes of GPU memory that answering took above the weights; None on a CPU.
        done: whether that is all.
    """

    text: str = ""
    tokens: int = 0
    first: float | None = None
    rate: float | None = None
    peak: int | None = None
    done: bool = False


def make_side(name: str, model: Any, processor: Any) -> Side:
    """A model with what the page tells of it."""
    return Side(name, model, processor, Generator(model), weight_bytes(model))


def weight_bytes(model: Any) -> int:
    """Bytes of parameters and buffers; tensors that share memory count once."""
    storages = {}
    for tensor in (*model.parameters(), *model.buffers()):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def make_inputs(side: Side, image: Any, question: str, max_new_tokens: int) -> dict[str, Any]:
    """What the processor makes of an image and a question.

    Raises:
        ValueError: no image, no question, or more tokens than the model has places for.
    """
    if image is None:
        raise ValueError("Choose an image first: upload one, or take an example.")
    if not question.strip():
        raise ValueError("Write a question about the image first.")
    content = [{"type": "image"}, {"type": "text", "text": question.strip()}]
    text = side.processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    inputs = side.processor(text=[text], images=[image], return_tensors="pt")
    length, places = inputs["input_ids"].shape[1], _places(side)
    if length + max_new_tokens > places:
        raise ValueError(
            f"Too long for {side.name}: image and question take {length} tokens, the answer up to "
            f"{max_new_tokens}, and there is room for {places}. Shorten the question or the answer."
        )
    model = side.model
    return {
        name: value.to(model.device, model.dtype if value.is_floating_point() else None)
        for name, value in inputs.items()
    }


def _places(side: Side) -> int:
    """Tokens that a sequence may have."""
    text = side.model.config.get_text_config()
    limits = (
        getattr(text, "max_position_embeddings", None),
        getattr(side.processor.tokenizer, "model_max_length", None),
    )
    return min(limit for limit in (*limits, 10**9) if limit)


class _Stopped(Exception):
    """Ends a generation that nobody reads any more."""


@dataclass
class _Clock:
    """When the tokens came."""

    started: float = 0.0
    times: list[float] = field(default_factory=list)

    def state(self, text: str, done: bool = False) -> Answer:
        times = list(self.times)
        first = times[0] - self.started if times else None
        span = times[-1] - times[0] if len(times) > 1 else 0.0
        return Answer(
            text, len(times), first, (len(times) - 1) / span if span else None, None, done
        )


class _Streamer(TextIteratorStreamer):
    """Text of the tokens as they come, and their times; stops the generation when told to."""

    def __init__(self, tokenizer: Any, clock: _Clock) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.clock, self.stopped = clock, threading.Event()

    def put(self, value: Any) -> None:
        if self.stopped.is_set():
            raise _Stopped
        if not self.next_tokens_are_prompt:
            self.clock.times.append(time.perf_counter())
        super().put(value)


def answer(side: Side, image: Any, question: str, max_new_tokens: int = 128) -> Iterator[Answer]:
    """Yields states of the greedy answer, the last of them ``done``.

    Closing the iterator ends the generation.

    Args:
        side: the model.
        image: a PIL image.
        question: about it.
        max_new_tokens: most tokens of the answer.

    Raises:
        ValueError: see `make_inputs`.
        Exception: whatever the model raises.
    """
    inputs = make_inputs(side, image, question, max_new_tokens)
    clock = _Clock()
    streamer = _Streamer(side.processor.tokenizer, clock)
    failed: list[BaseException] = []
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": False}
    before = _reset_peak(side.model) - side.generator.cache_bytes

    def work() -> None:
        try:
            with torch.inference_mode():
                side.generator.generate(**inputs, **options, streamer=streamer)
        except _Stopped:
            pass
        except BaseException as error:  # noqa: BLE001 (raised again where it is read)
            failed.append(error)
        finally:
            streamer.end()

    thread = threading.Thread(target=work, daemon=True)
    clock.started = time.perf_counter()
    thread.start()
    text = ""
    try:
        for text in _collected(streamer):
            yield clock.state(text)
    finally:
        streamer.stopped.set()
        thread.join()
    if failed:
        raise failed[0]
    peak = _peak(side.model, before)
    yield replace(clock.state(text.strip(), done=True), peak=peak)


def _collected(streamer: TextIteratorStreamer) -> Iterator[str]:
    """All of the text so far, not more often than anyone can read, and never held back."""
    text = ""
    for piece in streamer:
        text += piece
        while not streamer.text_queue.empty() and streamer.text_queue.queue[0] is not None:
            text += streamer.text_queue.get()
        yield text
        time.sleep(_SHOWN)


def _reset_peak(model: Any) -> int:
    if model.device.type != "cuda":
        return 0
    torch.cuda.synchronize(model.device)
    torch.cuda.reset_peak_memory_stats(model.device)
    return torch.cuda.memory_allocated(model.device)


def _peak(model: Any, before: int) -> int | None:
    if model.device.type != "cuda":
        return None
    return max(0, torch.cuda.max_memory_allocated(model.device) - before)
