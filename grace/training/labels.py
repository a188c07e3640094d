"""Which tokens are answers, found from the chat template's own text.

The template is rendered up to each answer (with its generation prompt) and through it: what lies
between is the answer, the end-of-turn mark included. Characters are then mapped to tokens by the
tokenizer's offsets, behind the processor's expansion of image marks. No token id is looked for, so
a user who writes "ASSISTANT:" does not unmask his own words.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

IGNORE = -100


def render_turns(
    processor: Any, messages: Sequence[dict[str, Any]]
) -> tuple[str, list[tuple[int, int]]]:
    """The conversation's text and the spans [start, end) of its answers in it.

    A template that ends an answer without the tokenizer's end-of-sequence token gets it behind the
    last one: without it a model never learns to stop.

    Raises:
        ValueError: a template that renders a conversation other than turn after turn.
    """
    messages = list(messages)
    spans = []
    for turn, message in enumerate(messages):
        if message["role"] == "assistant":
            before = _render(processor, messages[:turn], prompt=True)
            through = _render(processor, messages[: turn + 1], prompt=False)
            if not through.startswith(before):
                raise ValueError(
                    "the chat template must render a turn as prompt and answer, got "
                    f"{through[-80:]!r} for the prompt {before[-80:]!r}"
                )
            spans.append((len(before), len(through)))
    text = _render(processor, messages, prompt=False)
    end = processor.tokenizer.eos_token or ""
    if end and not text.rstrip().endswith(end):
        text = text.rstrip() + end
        spans[-1] = (spans[-1][0], len(text))
    return text, spans


def _render(processor: Any, messages: list[dict[str, Any]], *, prompt: bool) -> str:
    return processor.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False)


def token_labels(
    ids: Tensor,
    offsets: Sequence[tuple[int, int]],
    spans: Sequence[tuple[int, int]],
    replacements: Sequence[dict[str, Any]],
) -> Tensor:
    """`ids` int64 [S] where a token lies within a span, -100 elsewhere.

    A template may end an answer with a space that the next turn's first token takes in: such a
    token is not the answer's.

    Args:
        ids: tokens of the expanded text.
        offsets: their [start, end) in the expanded text; empty for tokens that are added.
        spans: answers, in the text before expansion.
        replacements: the processor's, `span` before and `new_span` after expansion, in order.
    """
    starts, ends = torch.tensor(offsets).reshape(-1, 2).unbind(1)
    answers = torch.zeros(len(offsets), dtype=torch.bool)
    for start, end in spans:
        first, last = _expanded(start, replacements), _expanded(end, replacements)
        answers |= (starts < ends) & (starts >= first) & (ends <= last)
    return torch.where(answers, ids, IGNORE)


def _expanded(position: int, replacements: Sequence[dict[str, Any]]) -> int:
    """Where a character of the text stands once the marks before it are expanded."""
    shift = 0
    for item in replacements:
        if item["span"][1] <= position:
            shift = item["new_span"][1] - item["span"][1]
    return position + shift
