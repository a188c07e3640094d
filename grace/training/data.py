"""Training rows: LLaVA/ShareGPT4V JSON and JSONL, turned into inputs of a model with labels.

A row is `{"image": "path" or ["path", …], "conversations": [{"from": "human", "value":
"<image>\\n…"}, {"from": "gpt", "value": "…"}, …]}`; without `image` it is text alone.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from grace.training.labels import render_turns, token_labels

ON_ERROR = ("raise", "skip")
IMAGE_MARK = "<image>"
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
_ROLES["system"] = "system"
_log = logging.getLogger(__name__)


class RowError(ValueError):
    """A row that cannot be used; the message says which and why."""


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Rows of a `.json` (one list) or `.jsonl` (one object a line) file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON, not a list of objects, or no row in it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"data: file must exist, got {path}")
    rows = _read_lines(path) if path.suffix == ".jsonl" else _parse(path, path.read_text())
    if not isinstance(rows, list):
        raise ValueError(f"data: {path} must hold a list of rows, got {type(rows).__name__}")
    if not rows:
        raise ValueError(f"data: {path} must hold at least one row, got an empty list")
    return rows


def _read_lines(path: Path) -> list[Any]:
    with path.open() as lines:
        numbered = ((number, line) for number, line in enumerate(lines, 1) if line.strip())
        return [_parse(f"{path}, line {number}", line) for number, line in numbered]


def _parse(where: str | Path, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"data: {where} must be JSON, got {error}") from error


class ConversationDataset(Dataset):
    """Conversations about images as inputs of a model: `input_ids`, `labels`, pixels, `row_ids`.

    Args:
        rows: as `read_rows` gives them.
        processor: of the student's checkpoint, with a chat template and a fast tokenizer.
        image_root: folder that image paths are relative to.
        on_error: "raise": a row that cannot be used is an error with its index. "skip": such rows
            are left out and counted (`skipped`).
        max_length: a row of more tokens cannot be used (cutting it would tear images apart).

    Raises:
        ValueError: no row is left, an unknown `on_error`, or (raise) a bad row.
    """

    def __init__(
        self,
        rows: Sequence[dict[str, Any]],
        processor: Any,
        image_root: str | Path = ".",
        *,
        on_error: str = "raise",
        max_length: int | None = None,
    ) -> None:
        if on_error not in ON_ERROR:
            raise ValueError(f"data: on_error must be one of {ON_ERROR}, got {on_error!r}")
        self.processor, self.root = processor, Path(image_root)
        self.on_error, self.max_length = on_error, max_length
        self.rows, self.skipped = rows, 0
        self.indices = [index for index in range(len(rows)) if self._usable(index)]
        if not self.indices:
            raise ValueError(f"data: at least one row must be usable, got {self.skipped} bad rows")
        if self.skipped:
            _log.warning("data: skipped %d of %d rows", self.skipped, len(rows))

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, item: int) -> dict[str, Tensor]:
        """The item's row as tensors without a batch dimension (pixels keep theirs).

        Where skipping is asked for, a row that turns out bad only now (a torn image, too many
        tokens) is counted, and the next one takes its place.
        """
        for offset in range(len(self.indices)):
            index = self.indices[(item + offset) % len(self.indices)]
            try:
                return self._attempt(index, self._encode)
            except RowError:
                if self.on_error == "raise":
                    raise
                self.skipped += 1
                _log.warning("data: skipped row %d", index)
        raise ValueError("data: at least one row must be usable, got none")

    def _usable(self, index: int) -> bool:
        """Whether the row has the right form and its images exist; cheap enough for every row."""
        try:
            self._attempt(index, self._check)
        except RowError:
            if self.on_error == "raise":
                raise
            self.skipped += 1
            return False
        return True

    def _attempt(self, index: int, action: Callable[[int], Any]) -> Any:
        try:
            return action(index)
        except (ValueError, OSError, KeyError, TypeError) as error:
            raise RowError(f"data: row {index} must be usable, got: {error}") from error

    def _check(self, index: int) -> None:
        row = self.rows[index]
        to_messages(row)
        for path in image_paths(row):
            if not (self.root / path).is_file():
                raise FileNotFoundError(f"no image {self.root / path}")

    def _encode(self, index: int) -> dict[str, Tensor]:
        row = self.rows[index]
        images = [_open(self.root / path) for path in image_paths(row)]
        inputs = encode(self.processor, to_messages(row), images)
        length = inputs["input_ids"].numel()
        if self.max_length is not None and length > self.max_length:
            raise ValueError(f"{length} tokens, max_length is {self.max_length}")
        return {**inputs, "row_ids": torch.tensor(index)}


def image_paths(row: dict[str, Any]) -> list[str]:
    """The row's images, in the order of its marks."""
    images = row.get("image") or row.get("images") or []
    return [images] if isinstance(images, str) else list(images)


def to_messages(row: Any) -> list[dict[str, Any]]:
    """The row's turns as chat messages; ValueError tells what is wrong with it."""
    if not isinstance(row, dict) or not isinstance(row.get("conversations"), list):
        raise ValueError("no list 'conversations'")
    messages = [_message(turn) for turn in row["conversations"]]
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns or turns != ["user", "assistant"] * (len(turns) // 2):
        raise ValueError(f"turns must alternate human and gpt and end with gpt, got {roles}")
    marks = sum(part["type"] == "image" for message in messages for part in message["content"])
    images = len(image_paths(row))
    if marks == 0 and images:  # LLaVA's rule: images that no text mentions come first
        first = messages[roles.index("user")]["content"]
        first[:0] = [{"type": "image"}] * images
    elif marks != images:
        raise ValueError(f"{images} images for {marks} marks {IMAGE_MARK}")
    return messages


def _message(turn: Any) -> dict[str, Any]:
    role = _ROLES.get(str(turn.get("from"))) if isinstance(turn, dict) else None
    text = turn.get("value") if isinstance(turn, dict) else None
    if role is None or not isinstance(text, str):
        raise ValueError(f"a turn must have 'from' (human, gpt) and a text 'value', got {turn!r}")
    if role == "assistant":
        if not text.strip():
            raise ValueError("an answer must not be empty")
        return {"role": role, "content": [{"type": "text", "text": text.strip()}]}
    parts: list[dict[str, str]] = []
    for number, piece in enumerate(text.split(IMAGE_MARK)):
        if number:
            parts.append({"type": "image"})
        if piece.strip():
            parts.append({"type": "text", "text": piece.strip()})
    return {"role": role, "content": parts}


def _open(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def encode(
    processor: Any, messages: list[dict[str, Any]], images: Sequence[Image.Image]
) -> dict[str, Tensor]:
    """Inputs of the model and labels for one conversation: int64 [S] each, and the pixels."""
    text, spans = render_turns(processor, messages)
    inputs = processor(
        text=[text],
        images=list(images) or None,
        return_tensors="pt",
        return_offsets_mapping=True,
        return_text_replacement_offsets=True,
    )
    offsets = inputs.pop("offset_mapping")[0].tolist()
    replaced = inputs.pop("text_replacement_offsets", None)
    ids = inputs["input_ids"][0]
    labels = token_labels(ids, offsets, spans, replaced[0] if replaced else [])
    by_token = {name: inputs[name][0] for name in inputs if inputs[name].shape[:2] == (1, len(ids))}
    return {**inputs, **by_token, "labels": labels}
