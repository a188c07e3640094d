"""One conversation as inputs of a model: tokens, labels, pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from grace.training.labels import IGNORE, render_turns, token_labels


def encode(
    processor: Any,
    messages: list[dict[str, Any]],
    images: Sequence[Any] = (),
    videos: Sequence[Any] = (),
    *,
    max_length: int | None = None,
    truncate: bool = False,
) -> dict[str, Tensor]:
    """Inputs of the model and labels for one conversation: int64 [S] each, and the pixels.

    Args:
        processor: with a chat template and a fast tokenizer.
        messages: turns whose image and video parts are bare.
        images: a picture for each image part, in order.
        videos: a path or a list of frames for each video part, in order.
        max_length: most tokens.
        truncate: cut what is longer at the end. An image or video is never cut.

    Raises:
        ValueError: too long, or a cut that would take part of an image or all answers; a text that
            holds the processor's own mark of an image; videos for a processor that takes none.
    """
    text, spans = render_turns(processor, messages)
    _check_marks(processor, text, images=len(images), videos=len(videos))
    inputs = processor(
        text=[text], return_tensors="pt", **_options(processor, text, images, videos)
    )
    offsets = inputs.pop("offset_mapping")[0].tolist()
    replaced = inputs.pop("text_replacement_offsets", None)
    ids = inputs["input_ids"][0]
    labels = token_labels(ids, offsets, spans, replaced[0] if replaced else [])
    by_token = {name: inputs[name][0] for name in inputs if _by_token(inputs[name], len(ids))}
    by_token["labels"] = labels
    return {**inputs, **_cut(processor, by_token, max_length, truncate)}


def _options(
    processor: Any, text: str, images: Sequence[Any], videos: Sequence[Any]
) -> dict[str, Any]:
    options: dict[str, Any] = {"images": list(images) or None, "return_offsets_mapping": True}
    options["return_text_replacement_offsets"] = True
    if videos:
        options["videos"] = list(videos)
        framed = {isinstance(video, list) for video in videos}
        if len(framed) > 1:
            raise ValueError("videos of a row must all be files or all lists of frames, got both")
        if framed == {True}:  # given as they are to be seen: there is no rate to sample them by
            options["videos_kwargs"] = {"do_sample_frames": False}
    start = processor.tokenizer.bos_token
    if start and text.startswith(start):  # the template wrote it: the tokenizer must not again
        options["add_special_tokens"] = False
    return options


def _by_token(value: Any, length: int) -> bool:
    return isinstance(value, Tensor) and value.shape[:2] == (1, length)


def _check_marks(processor: Any, text: str, **counts: int) -> None:
    """A row that writes the mark of an image itself would shift every image behind it."""
    for name, count in counts.items():
        mark = getattr(processor, f"{name.removesuffix('s')}_token", None)
        found = text.count(mark) if mark else 0
        if count and not mark:
            raise ValueError(f"{type(processor).__name__} takes no {name}, got {count}")
        if mark and found != count:
            raise ValueError(
                f"the conversation's text holds {found} marks {mark}, for {count} {name}"
            )
    if counts.get("videos") and getattr(processor, "video_processor", None) is None:
        raise ValueError(f"{type(processor).__name__} has no video processor (torchvision?)")


def _cut(
    processor: Any, by_token: dict[str, Tensor], max_length: int | None, truncate: bool
) -> dict[str, Tensor]:
    ids = by_token["input_ids"]
    if max_length is not None and len(ids) > max_length:
        if not truncate:
            raise ValueError(f"{len(ids)} tokens, max_length is {max_length}")
        for kind in ("image", "video"):
            token = getattr(processor, f"{kind}_token_id", None)
            if token is not None and (ids[max_length:] == token).any():
                raise ValueError(
                    f"{len(ids)} tokens, and max_length {max_length} would cut its {kind}s"
                )
        by_token = {name: value[:max_length] for name, value in by_token.items()}
    if (by_token["labels"] == IGNORE).all():
        raise ValueError(f"no token of an answer within {len(by_token['labels'])} tokens")
    return by_token
