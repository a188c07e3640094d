"""Which tokens are answers, found from the chat template's own text.

A template that marks its answers with `{% generation %}` tells where they are. Any other is
rendered up to each answer (with its generation prompt) and through it: what lies between is the
answer, the end-of-turn mark included. Characters are then mapped to tokens by the tokenizer's
offsets, behind the processor's expansion of image marks. No token id is looked for, so a user who
writes "ASSISTANT:" does not unmask his own words.

transformers' own `assistant_masks` come from the same marks, but up to 5.17 they are shifted by
what the images expand to; here the marks are read before the expansion and moved along with it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.utils.chat_template_utils import render_jinja_template

IGNORE = -100
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


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
    template = processor.chat_template
    if isinstance(template, str) and _GENERATION.search(template):
        text, spans = _render_marked(processor, messages)
    else:
        text, spans = _render(processor, messages, prompt=False), _prefix_spans(processor, messages)
    answers = sum(message["role"] == "assistant" for message in messages)
    if len(spans) != answers:
        raise ValueError(
            f"the chat template must mark {answers} answers of a conversation, got {len(spans)}"
        )
    end = processor.tokenizer.eos_token or ""
    if end and not text.rstrip().endswith(end):
        text = text.rstrip() + end
        spans[-1] = (spans[-1][0], len(text))
    return text, spans


def _render_marked(
    processor: Any, messages: list[dict[str, Any]]
) -> tuple[str, list[tuple[int, int]]]:
    found: Any = render_jinja_template(
        conversations=[messages],
        chat_template=processor.chat_template,
        return_assistant_tokens_mask=True,
        **processor.tokenizer.special_tokens_map,
    )
    texts, spans = found
    return texts[0], [(start, end) for start, end in spans[0] if start < end]


def _prefix_spans(processor: Any, messages: list[dict[str, Any]]) -> list[tuple[int, int]]:
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
    return spans


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
