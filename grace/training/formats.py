"""Rows of training files as chat messages and the media that they show.

Two forms of row are known: LLaVA's and ShareGPT4V's `conversations` (`from`, `value`, marks
`<image>` and `<video>` in the text, media beside it), and chat `messages` (`role`, `content` as
text or as parts, media in the parts or beside them). `read_conversation` makes one form of both.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

IMAGE_MARK, VIDEO_MARK = "<image>", "<video>"
_MARKS = {IMAGE_MARK: "image", VIDEO_MARK: "video"}
_SPLIT = re.compile(f"({IMAGE_MARK}|{VIDEO_MARK})")
_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}
# Keys under which a part of a message may carry what it shows, and columns of a row that may.
_PAYLOADS = {"image": ("image", "path", "url", "bytes"), "video": ("video", "path", "url")}
_COLUMNS = {"image": ("image", "images"), "video": ("video", "videos")}


@dataclass
class Conversation:
    """Chat messages whose image and video parts are bare, and what these show, in order.

    `images` are paths, bytes, `{bytes, path}` mappings or pictures; `videos` are paths or lists of
    frames, each frame as an image.
    """

    messages: list[dict[str, Any]]
    images: list[Any] = field(default_factory=list)
    videos: list[Any] = field(default_factory=list)

    @property
    def text_bytes(self) -> int:
        """Bytes of all texts in UTF-8: what the number of text tokens goes with."""
        texts = [part["text"] for part in self.parts("text")]
        return sum(len(text) if text.isascii() else len(text.encode()) for text in texts)

    def parts(self, kind: str) -> Iterator[dict[str, Any]]:
        """The parts of one kind ("text", "image", "video"), turn after turn."""
        for message in self.messages:
            for part in message["content"]:
                if part["type"] == kind:
                    yield part


def read_conversation(row: Any) -> Conversation:
    """The conversation of a row; nothing that it shows is opened.

    Raises:
        ValueError: not a row of a known form; turns that do not alternate and end with an answer;
            an empty answer; media and marks that do not match. The message says which.
    """
    if not isinstance(row, dict):
        raise ValueError(f"a row must be a mapping, got {type(row).__name__}")
    if isinstance(row.get("conversations"), list):
        messages = [_llava_message(turn) for turn in row["conversations"]]
    elif isinstance(row.get("messages"), list):
        marked = any(_column(row, kind) for kind in _COLUMNS)
        messages = [_chat_message(turn, marked) for turn in row["messages"]]
    else:
        raise ValueError("a row must have a list 'conversations' or 'messages', got no such list")
    _check_turns([message["role"] for message in messages])
    found = Conversation(messages)
    found.images, found.videos = (_attach(found, row, kind) for kind in _COLUMNS)
    return found


def media_of(row: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    """Images and videos of a row that `read_conversation` accepts, where possible without it."""
    if isinstance(row.get("conversations"), list):
        return _column(row, "image"), _column(row, "video")
    found = read_conversation(row)
    return found.images, found.videos


def _check_turns(roles: list[str]) -> None:
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if "assistant" not in turns:
        raise ValueError(f"a row must have an assistant turn, got {roles}")
    if turns != ["user", "assistant"] * (len(turns) // 2):
        raise ValueError(
            f"turns must alternate user (human) and assistant (gpt) and end with an answer, "
            f"got {roles}"
        )


def _llava_message(turn: Any) -> dict[str, Any]:
    role = _role(turn, "from")
    text = turn.get("value")
    if not isinstance(text, str):
        raise ValueError(f"a turn must have a text 'value', got {turn!r}")
    if role == "user":
        return {"role": role, "content": _marked_parts(text)}
    return _text_message(role, text.strip())


def _chat_message(turn: Any, marked: bool) -> dict[str, Any]:
    role, content = _role(turn, "role"), turn.get("content")
    if isinstance(content, str):
        if role == "user" and marked:
            return {"role": role, "content": _marked_parts(content)}
        return _text_message(role, content)
    if not isinstance(content, list):
        raise ValueError(f"a message must have a 'content' of text or parts, got {turn!r}")
    parts = [_part(part) for part in content]
    if role != "user":
        if any(part["type"] != "text" for part in parts):
            raise ValueError(f"images and videos must stand in user turns, got one of {role}")
        return _text_message(role, "".join(part["text"] for part in parts))
    return {"role": role, "content": parts}


def _role(turn: Any, key: str) -> str:
    given = turn.get(key) if isinstance(turn, dict) else None
    role = _ROLES.get(given) if isinstance(given, str) else None
    if role is None:
        raise ValueError(f"a turn must have '{key}' (one of {', '.join(_ROLES)}), got {turn!r}")
    return role


def _text_message(role: str, text: str) -> dict[str, Any]:
    if role == "assistant" and not text.strip():
        raise ValueError("an answer must not be empty")
    return {"role": role, "content": [{"type": "text", "text": text}]}


def _marked_parts(text: str) -> list[dict[str, Any]]:
    """Text with marks as parts; white space round a mark goes, as in LLaVA."""
    if "<" not in text:
        text = text.strip()
        return [{"type": "text", "text": text}] if text else []
    pieces = [piece.strip() for piece in _SPLIT.split(text)]
    return [
        {"type": _MARKS[piece]} if piece in _MARKS else {"type": "text", "text": piece}
        for piece in pieces
        if piece
    ]


def _part(part: Any) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind == "image_url":  # OpenAI's form
        shown = part.get("image_url")
        kind, part = "image", {"url": shown.get("url") if isinstance(shown, dict) else shown}
    if kind in _PAYLOADS:
        given = [part[key] for key in _PAYLOADS[kind] if part.get(key) is not None]
        return {"type": kind, "payload": given[0]} if given else {"type": kind}
    raise ValueError(f"a part must be of type text, image or video with its content, got {part!r}")


def _column(row: dict[str, Any], kind: str) -> list[Any]:
    """What the row carries beside its turns: one image or video, or a list of them."""
    for name in _COLUMNS[kind]:
        value = row.get(name)
        if value is not None and not (isinstance(value, (list, str, bytes)) and not len(value)):
            return list(value) if isinstance(value, list) else [value]
    return []


def _attach(found: Conversation, row: dict[str, Any], kind: str) -> list[Any]:
    """What the parts of one kind show, in order; the parts are left bare."""
    parts, given = list(found.parts(kind)), _column(row, kind)
    carried = [part.pop("payload") for part in parts if "payload" in part]
    if carried and len(carried) == len(parts) and not given:
        return carried
    if carried:
        raise ValueError(
            f"{kind}s must all stand in their parts or all beside the turns, got {len(carried)} of "
            f"{len(parts)} parts with one and {len(given)} beside"
        )
    if not parts and given:  # LLaVA's rule: what no text mentions comes first
        first = next(message for message in found.messages if message["role"] == "user")
        first["content"][:0] = [{"type": kind} for _ in given]
    elif len(parts) != len(given):
        raise ValueError(f"{len(given)} {kind}s for {len(parts)} marks of them")
    return given
