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
Question = tuple[Sequence[int], Sequence[int], Sequence[int]]  # prefix, tokens, labels of tokens


def pack_questions(
    processor: Any,
    images: Sequence[Any],
    questions: Sequence[Sequence[tuple[str, str]]],
    *,
    length: int | None = None,
    mask_dtype: torch.dtype = torch.bool,
) -> dict[str, Tensor]:
    """Make one training batch: row b holds image b and all of `questions[b]`.

    Args:
        processor: a LLaVA-like processor with a chat template that puts the image first.
        images: B images (PIL, or uint8 arrays [H, W, 3]), one a row.
        questions: B lists of (question, answer).
        length: pad rows to this many tokens (default: the longest row).
        mask_dtype: torch.bool for "sdpa" attention; "eager" attention adds the mask to its scores
            and needs the model's floating-point dtype.

    Returns:
        pixel_values  [B, 3, H, W] as the image processor makes them;
        input_ids     int64 [B, S], padded on the right;
        labels        int64 [B, S], answer tokens and their end, elsewhere -100 (not shifted);
        position_ids  int64 [B, S], restarting behind the prefix at each question;
        attention_mask  [B, 1, S, S], True (or 0, elsewhere the lowest number of a floating-point
            `mask_dtype`) where token i may look at token j.

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
    packed = pack_tokens(rows, _pad_id(processor), length=length, mask_dtype=mask_dtype)
    return {"pixel_values": pixels, **packed}


def pack_tokens(
    rows: Sequence[Sequence[Question]],
    pad_id: int,
    *,
    length: int | None = None,
    mask_dtype: torch.dtype = torch.bool,
) -> dict[str, Tensor]:
    """As `pack_questions`, from token ids: each question is (prefix, tokens, labels of tokens).

    All questions of a row must have the same prefix; ValueError otherwise.
    """
    laid_out = [lay_out(row, index) for index, row in enumerate(rows)]
    longest = max(layout.shape[1] for layout in laid_out)
    size = length or longest
    if longest > size:
        raise ValueError(f"pack_tokens: length must be at least {longest}, got {size}")
    # Padding is a block of its own (-1) that sees itself, so that no row of the mask is empty.
    sheets = torch.tensor([pad_id, IGNORE, 0, -1])[:, None, None].repeat(1, len(rows), size)
    for index, layout in enumerate(laid_out):
        sheets[:, index, : layout.shape[1]] = layout
    input_ids, labels, position_ids, blocks = sheets.unbind()
    return {
        "input_ids": input_ids,
        "labels": labels,
        "position_ids": position_ids,
        "attention_mask": block_mask(blocks, mask_dtype),
    }


def lay_out(row: Sequence[Question], index: int) -> Tensor:
    """int64 [4, tokens]: ids, labels, positions and block numbers of one row."""
    prefix = row[0][0]
    start = len(prefix)
    ids, labels, blocks = [*prefix], [IGNORE] * start, [0] * start
    positions = [*range(start)]
    for number, (before, tokens, wanted) in enumerate(row, 1):
        if tuple(before) != tuple(prefix):
            raise ValueError(
                f"pack_tokens: row {index} must have one prefix, got another in question "
                f"{number - 1}"
            )
        ids += tokens
        labels += wanted
        positions += range(start, start + len(tokens))
        blocks += [number] * len(tokens)
    return torch.tensor([ids, labels, positions, blocks])


def block_mask(blocks: Tensor, dtype: torch.dtype = torch.bool) -> Tensor:
    """[B, 1, S, S] from block numbers int64 [B, S]: causal, within a block or to block 0."""
    size = blocks.shape[1]
    causal = torch.ones(size, size, dtype=torch.bool, device=blocks.device).tril()
    same = blocks[:, :, None] == blocks[:, None, :]
    prefix = (blocks[:, None, :] == 0) & (blocks[:, :, None] >= 0)
    allowed = ((same | prefix) & causal)[:, None]
    if dtype == torch.bool:
        return allowed
    return torch.zeros_like(allowed, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)


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
        ids = tokenizer.encode(text, add_special_tokens=False)
        # The ids of one image token are repeated, not its text: that would take most of the time.
        return tuple(i for id in ids for i in [id] * (image_tokens if id == image_id else 1))

    image_id = tokenizer.convert_tokens_to_ids(image_token)
    asked, full = encode([user], True), encode([user, reply], False)
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
