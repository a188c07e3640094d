"""What lmms-eval's requests mean for `generate`: options, ends, pictures; nothing of lmms-eval."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from grace.evaluation.answer import opened

logger = logging.getLogger(__name__)

# lmms-eval's end of an answer for tasks that name none: it stands between few-shot examples. Its
# own models of instruction-tuned checkpoints do not heed it either.
DEFAULT_UNTIL = "\n\n"
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p")
_PENALTIES = ("repetition_penalty", "no_repeat_ngram_size", "min_new_tokens")
_BEAMS = ("num_beams", "length_penalty", "early_stopping")
_OWN = ("until", "do_sample", "max_new_tokens", "max_gen_toks")


def options_of(asked: Mapping[str, Any] | None, max_new_tokens: int) -> dict[str, Any]:
    """A task's ``generation_kwargs`` as arguments of ``model.generate``.

    Greedy where ``do_sample`` is false or the temperature is not above 0; sampled where it is
    above 0. What is said neither of sampling, nor of penalties, beams or lengths is left out, and
    logged: tasks hold settings of other models, too.

    Args:
        asked: of the task.
        max_new_tokens: where the task names no number.

    Raises:
        ValueError: a number of new tokens below 1.
    """
    said = {name: value for name, value in (asked or {}).items() if value is not None}
    new = said.get("max_new_tokens", said.get("max_gen_toks", max_new_tokens))
    if not isinstance(new, int) or new < 1:
        raise ValueError(f"lmms: max_new_tokens must be a number of at least 1, got {new!r}")
    if unknown := sorted(set(said).difference(_SAMPLING, _PENALTIES, _BEAMS, _OWN)):
        logger.warning("lmms: not heeded in generation_kwargs: %s", ", ".join(unknown))
    sample = _sampled(said)
    heeded = {*_PENALTIES, *_BEAMS, *(_SAMPLING if sample else ())}
    options = {name: value for name, value in said.items() if name in heeded}
    return {**options, "max_new_tokens": new, "do_sample": sample}


def _sampled(asked: Mapping[str, Any]) -> bool:
    temperature, sample = asked.get("temperature"), asked.get("do_sample")
    if temperature is None:
        return bool(sample)
    return temperature > 0 and sample is not False


def ends_of(asked: Mapping[str, Any] | None) -> tuple[str, ...]:
    """The texts behind which nothing of an answer counts: the task's ``until``."""
    until = (asked or {}).get("until") or ()
    texts = (until,) if isinstance(until, str) else tuple(until)
    return tuple(text for text in texts if text and text != DEFAULT_UNTIL)


def cut(text: str, ends: Iterable[str]) -> str:
    """The text before the first of `ends` in it."""
    for end in ends:
        text = text.split(end, 1)[0]
    return text


def conversation(messages: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], list[Any]]:
    """lmms-eval's chat messages as a chat template takes them, and the pictures in order, in RGB.

    Args:
        messages: ``{"role", "content": [{"type": "text", "text"} | {"type": "image", "url"}, …]}``,
            pictures as PIL images or paths.

    Raises:
        ValueError: content that is neither text nor a picture.
    """
    turns, pictures = list[dict[str, Any]](), list[Any]()
    for message in messages:
        parts = message["content"]
        if isinstance(parts, str):
            parts = [{"type": "text", "text": parts}]
        for part in parts:
            if part["type"] not in ("text", "image"):
                raise ValueError(f"lmms: content must be text or images, got {part['type']}")
            if part["type"] == "image":
                pictures.append(opened(part["url"]).convert("RGB"))
        plain = [{k: v for k, v in part.items() if k in ("type", "text")} for part in parts]
        turns.append({"role": message["role"], "content": plain})
    return turns, pictures


def new_tokens(row: Sequence[int], ends: Iterable[int]) -> int:
    """Tokens of an answer up to the first that ends it, that one included."""
    last = set(ends)
    return next((place for place, token in enumerate(row, 1) if token in last), len(row))
