"""Greedy answers of a vision-language model to rows of image and question, in batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from .decoding import Decoder


@dataclass(frozen=True)
class Batch:
    """Processor output for some rows; `indices` are their places among all rows."""

    indices: tuple[int, ...]
    inputs: dict[str, Tensor]


def prepare(
    processor: Any,
    rows: Sequence[Any],
    *,
    batch_size: int = 64,
    prompt: Callable[[str], str] | None = None,
) -> list[Batch]:
    """Tokenize rows and process their images once, to be answered by several models.

    Args:
        processor: any transformers VLM processor with a chat template.
        rows: objects with `image` (a path or a PIL image) and `question`.
        batch_size: rows a batch; rows of similar length share one, padded on the left.
        prompt: changes the question before it is asked (see `grace.evaluation.mme.prompt`).

    Raises:
        ValueError: no rows or a batch size below 1.
        FileNotFoundError: an image that is not there.
    """
    if not rows or batch_size < 1:
        raise ValueError(
            f"answer: rows must not be empty and batch_size must be at least 1, "
            f"got {len(rows)} rows and {batch_size}"
        )
    texts = [_chat(processor, prompt(row.question) if prompt else row.question) for row in rows]
    order = sorted(range(len(rows)), key=lambda index: len(texts[index].split()))
    return [
        _batch(processor, rows, texts, tuple(order[start : start + batch_size]))
        for start in range(0, len(rows), batch_size)
    ]


def _chat(processor: Any, question: str) -> str:
    content = [{"type": "image"}, {"type": "text", "text": question}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )


def _batch(processor: Any, rows: Sequence[Any], texts: list, indices: tuple[int, ...]) -> Batch:
    images = [opened(rows[index].image) for index in indices]
    return Batch(indices, encode(processor, [texts[index] for index in indices], images))


def encode(processor: Any, texts: Sequence[str], images: Sequence[Any]) -> dict[str, Tensor]:
    """Processor output for prompts as a chat template gives them, padded on the left.

    Args:
        processor: any transformers VLM processor.
        texts: one a row.
        images: PIL images of all rows, in the order in which the texts name them; may be empty.
    """
    processor.tokenizer.padding_side = "left"
    return dict(
        processor(images=list(images) or None, text=list(texts), padding=True, return_tensors="pt")
    )


def opened(image: Any) -> Image.Image:
    """A PIL image, of a file where a path is given; the last few files stay open in memory."""
    return _open(Path(image)) if isinstance(image, str | Path) else image


@lru_cache(maxsize=16)
def _open(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def answer(
    model: Any,
    processor: Any,
    rows: Sequence[Any],
    *,
    batch_size: int = 64,
    max_new_tokens: int = 16,
    prompt: Callable[[str], str] | None = None,
    progress: bool = True,
    decoder: Decoder | None = None,
) -> list[str]:
    """What the model says to every row, decoded greedily.

    Args:
        model: any transformers image-text-to-text model; it is put in eval mode for the call.
        processor: its processor.
        rows: objects with `image` and `question`, or the batches of `prepare`.
        batch_size, prompt: as in `prepare`; ignored for prepared batches.
        max_new_tokens: at most this many tokens an answer. With 1 a batch is one forward pass,
            and exact wherever the tokenizer has "Yes" and "No" as tokens.
        progress: show a progress bar.
        decoder: of this model. One that is kept between calls keeps its caches and graphs;
            default a new one, that decodes by `grace.generation.Generator` where it can.

    Returns:
        One text a row, in the order of the rows.

    Raises:
        ValueError: no rows, a number below 1, or a decoder of another model or for less rows.
    """
    if max_new_tokens < 1:
        raise ValueError(f"answer: max_new_tokens must be at least 1, got {max_new_tokens}")
    prepared = bool(rows) and isinstance(rows[0], Batch)
    batches = rows if prepared else prepare(processor, rows, batch_size=batch_size, prompt=prompt)
    decode = _fitting(decoder, model, max(len(batch.indices) for batch in batches))
    training = model.training
    model.eval()
    texts: dict[int, str] = {}
    try:
        for batch in tqdm(batches, desc="answer", unit="batch", disable=not progress):
            tokens = decode(batch.inputs, max_new_tokens, do_sample=False, num_beams=1)
            said = processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)
            texts.update(zip(batch.indices, said, strict=True))
    finally:
        model.train(training)
    return [texts[index].strip() for index in sorted(texts)]


def _fitting(decoder: Decoder | None, model: Any, rows: int) -> Decoder:
    if decoder is None:
        return Decoder(model, max_batch_size=rows)
    if decoder.model is not model or decoder.max_batch_size < rows:
        whose = "the same" if decoder.model is model else "another"
        raise ValueError(
            f"answer: decoder must be of the model and for {rows} rows, got one of {whose} model "
            f"for {decoder.max_batch_size}"
        )
    return decoder
