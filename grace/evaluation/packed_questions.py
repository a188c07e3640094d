"""Several questions about one image in one sequence, each as if it were asked alone.

    tokens      <s> USER: <image>*16 | question 1 ASSISTANT: answer 1 </s> | question 2 ...
    positions   0   1     2 ... 17   | 18 19 ...                           | 18 19 ...

A question sees the shared prefix and itself, never another question. Its logits are therefore
those of the unpacked row, and an image costs its tokens once.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

IGNORE = -100


def pack_questions(
    processor: Any,
    images: Sequence[Any],
    questions: Sequence[Sequence[tuple[str, str]]],
    *,
    length: int | None = None,
) -> dict[str, Tensor]:
    """Make one training batch: row b holds image b and all of `questions[b]`.

    Args:
        processor: a LLaVA-like processor with a chat template that puts the image first.
        images: B images (PIL, or uint8 arrays [H, W, 3]), one a row.
        questions: B lists of (question, answer).
        length: pad rows to this many tokens (default: the longest row).

    Returns:
        pixel_values  [B, 3, H, W] as the image processor makes them;
        input_ids     int64 [B, S], padded on the right;
        labels        int64 [B, S], answer tokens and their end, elsewhere -100 (not shifted);
        position_ids  int64 [B, S], restarting behind the prefix at each question;
        attention_mask  bool [B, 1, S, S], True where row i may look at column j.
        `model(**batch)` works with the "sdpa" and "eager" attention of transformers.

    Raises:
        ValueError: no images, lists of different lengths, an image without questions, or a row
            longer than `length`.
    """
    if not images or len(images) != len(questions):
        raise ValueError(
            f"pack_questions: images and questions must have the same length above 0, "
            f"got {len(images)} and {len(questions)}"
        )
    pixels = processor.image_processor(images=list(images), return_tensors="pt")["pixel_values"]
    prefix_images = _image_tokens(processor, pixels)
    rows = []
    for index, asked in enumerate(questions):
        if not asked:
            raise ValueError(f"pack_questions: questions[{index}] must hold a question, got none")
        rows.append([tokenize(processor, q, a, prefix_images) for q, a in asked])
    return {"pixel_values": pixels, **pack_tokens(rows, _pad_id(processor), length=length)}


def pack_tokens(
    rows: Sequence[Sequence[tuple[Sequence[int], Sequence[int], Sequence[int]]]],
    pad_id: int,
    *,
    length: int | None = None,
) -> dict[str, Tensor]:
    """As `pack_questions`, from token ids: each question is (prefix, tokens, labels of tokens).

    All questions of a row must have the same prefix; ValueError otherwise.
    """
    totals = [len(row[0][0]) + sum(len(tokens) for _, tokens, _ in row) for row in rows]
    size = length or max(totals)
    if max(totals) > size:
        raise ValueError(f"pack_tokens: length must be at least {max(totals)}, got {size}")
    input_ids = torch.full((len(rows), size), pad_id)
    labels = torch.full((len(rows), size), IGNORE)
    positions = torch.zeros((len(rows), size), dtype=torch.long)
    # Block 0 is the prefix; padding gets a block of its own, so that no row of the mask is empty.
    blocks = torch.full((len(rows), size), -1)
    for index, row in enumerate(rows):
        prefix = list(row[0][0])
        ids, targets, places = [*prefix], [IGNORE] * len(prefix), [*range(len(prefix))]
        block = [0] * len(prefix)
        for number, (start, tokens, wanted) in enumerate(row, 1):
            if list(start) != prefix:
                raise ValueError(
                    f"pack_tokens: row {index} must have one prefix, got another in question "
                    f"{number - 1}"
                )
            ids += tokens
            targets += wanted
            places += range(len(prefix), len(prefix) + len(tokens))
            block += [number] * len(tokens)
        for target, values in (
            (input_ids, ids),
            (labels, targets),
            (positions, places),
            (blocks, block),
        ):
            target[index, : len(values)] = torch.tensor(values)
    return {
        "input_ids": input_ids,
        "labels": labels,
        "position_ids": positions,
        "attention_mask": block_mask(blocks),
    }


def block_mask(blocks: Tensor) -> Tensor:
    """bool [B, 1, S, S] from block numbers int64 [B, S]: causal, within a block or to block 0."""
    size = blocks.shape[1]
    causal = torch.ones(size, size, dtype=torch.bool, device=blocks.device).tril()
    same = blocks[:, :, None] == blocks[:, None, :]
    prefix = (blocks[:, None, :] == 0) & (blocks[:, :, None] >= 0)
    return ((same | prefix) & causal)[:, None]


def tokenize(
    processor: Any, question: str, answer: str, image_tokens: int
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """(prefix up to the last image token, the tokens behind it, their labels)."""
    template = processor.chat_template
    return _tokenize(
        processor.tokenizer, template, processor.image_token, question, answer, image_tokens
    )


@lru_cache(maxsize=1 << 16)
def _tokenize(
    tokenizer: Any, template: str, image_token: str, question: str, answer: str, image_tokens: int
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    user = {
        "role": "user",
        "content": [{"type": "image"}, {"type": "text", "text": question}],
    }
    reply = {"role": "assistant", "content": [{"type": "text", "text": answer}]}

    def encode(messages: list, prompt: bool) -> tuple[int, ...]:
        text = tokenizer.apply_chat_template(
            messages, chat_template=template, add_generation_prompt=prompt, tokenize=False
        )
        text = text.replace(image_token, image_token * image_tokens)
        return tuple(tokenizer.encode(text, add_special_tokens=False))

    asked, full = encode([user], True), encode([user, reply], False)
    image_id = tokenizer.convert_tokens_to_ids(image_token)
    if full[: len(asked)] != asked:
        raise ValueError(
            f"pack_questions: the chat template must render a turn as prompt + answer, got "
            f"{tokenizer.decode(full)!r} for the prompt {tokenizer.decode(asked)!r}"
        )
    start = len(asked) - asked[::-1].index(image_id)
    labels = (IGNORE,) * (len(asked) - start) + full[len(asked) :]
    return asked[:start], full[start:], labels


def _image_tokens(processor: Any, pixels: Tensor) -> int:
    """Tokens an image takes, as the processor itself expands its placeholder."""
    expanded = processor.replace_image_token({"pixel_values": pixels}, 0)
    return expanded.count(processor.image_token)


def _pad_id(processor: Any) -> int:
    pad = processor.tokenizer.pad_token_id
    return processor.tokenizer.eos_token_id if pad is None else pad
