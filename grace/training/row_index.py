"""Where the rows of a file are and how large: the only thing of a data set that is held in memory.

A file is read once, as a stream; what is found of each row (`FACTS`, 29 bytes) is kept beside the
file or in a cache folder and memory-mapped from there by every later start and every rank.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from grace.training.formats import read_conversation

# `offset`, `size`: bytes in a text file; number of the record batch and row in it in an Arrow file.
# `text`: bytes of the turns' texts. `usable`: whether the row is of a known form.
FACTS = np.dtype(
    [
        ("offset", "<i8"),
        ("size", "<i8"),
        ("text", "<i4"),
        ("images", "<u2"),
        ("videos", "<u2"),
        ("turns", "<u4"),
        ("usable", "?"),
    ]
)
_VERSION = 1  # of what is found in a row; a cache of another version is not looked at
_CHUNK = 2**22  # characters read at once
_LONGEST = 2**26  # characters of a row
_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\n\r]*")
_log = logging.getLogger(__name__)


class _NotJSON:
    """In the place of a row that is not JSON; no row is equal to it."""


NOT_JSON = _NotJSON()
Located = tuple[int, int, Any]  # offset, size, row


def facts_of(row: Any) -> tuple[int, int, int, int, bool]:
    """text, images, videos, turns and usable of `FACTS`; zeros for a row of no known form."""
    try:
        found = read_conversation(row)
    except ValueError:
        return 0, 0, 0, 0, False
    counts = len(found.images), len(found.videos), len(found.messages)
    return found.text_bytes, *counts, True


def make_facts(rows: Iterable[Located]) -> np.ndarray:
    """`FACTS` [n] of rows with their places, in memory of 29 bytes a row."""
    found = ((offset, size, *facts_of(row)) for offset, size, row in rows)
    parts = [np.empty(0, FACTS)]
    while block := list(islice(found, 2**14)):
        parts.append(np.array(block, FACTS))
    return np.concatenate(parts)


def cached_facts(
    path: Path, make: Callable[[], np.ndarray], cache_dir: str | Path | None = None
) -> np.ndarray:
    """The facts that `make` finds in `path`, from the cache where it holds them.

    A cache belongs to one size and time of change of its file. It is written beside its place and
    renamed into it; where nothing can be written, the facts stay in memory and a warning says so.
    """
    place = cache_place(path, ".rows.npy", cache_dir)
    if place.is_file():
        found = _load(place)
        if found.dtype == FACTS:
            return found
    facts = make()
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        write_beside(place, lambda file: np.save(file, facts, allow_pickle=False))
    except OSError as error:
        _log.warning("data: the index of %s is not kept (%s); set data.cache_dir", path, error)
        return facts
    return _load(place)


def _load(place: Path) -> np.ndarray:
    """The array on disk; as a plain one, whose single rows are taken faster than a memmap's."""
    return np.load(place, mmap_mode="r", allow_pickle=False).view(np.ndarray)


def cache_place(path: Path, suffix: str, cache_dir: str | Path | None) -> Path:
    """Where what is made of `path` as it is now is kept."""
    status = path.stat()
    key = f"{_VERSION} {path.resolve()} {status.st_size} {status.st_mtime_ns}"
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    return Path(cache_dir or path.parent) / f".{path.name}.{digest}{suffix}"


def write_beside(place: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Let `write` fill a file that appears at `place` whole or not at all."""
    handle, name = tempfile.mkstemp(dir=place.parent, prefix=f"{place.name}.", suffix=".unfinished")
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
        os.replace(name, place)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def lines_of(path: Path) -> Iterator[Located]:
    """Rows of a JSON-lines file with offset and size in bytes; blank lines are none.

    A line that is not JSON is `NOT_JSON`.
    """
    offset = 0
    with path.open("rb") as lines:
        for line in lines:
            if line.strip():
                yield offset, len(line), _line(line)
            offset += len(line)


def _line(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:  # JSONDecodeError, UnicodeDecodeError
        return NOT_JSON


class _Text:
    """A file's text from a position on, read as far as it is needed."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file, self.path = file, path
        self.decoder = codecs.getincrementaldecoder("utf-8")()
        self.text, self.at, self.offset, self.ended = "", 0, 0, False

    def more(self) -> bool:
        """Read on; False at the end of the file."""
        if self.ended:
            return False
        data = self.file.read(max(_CHUNK, len(self.text)))
        self.ended = not data
        try:
            text = self.decoder.decode(data, final=self.ended)
        except UnicodeDecodeError as error:
            raise ValueError(f"data: {self.path} must be UTF-8, got {error}") from error
        self.text, self.at = self.text[self.at :] + text, 0
        return not self.ended

    def advance(self, end: int) -> int:
        """Go on to the character `end`; the bytes that were passed."""
        passed = self.text[self.at : end]
        size = len(passed) if passed.isascii() else len(passed.encode())
        self.at, self.offset = end, self.offset + size
        return size

    def peek(self) -> str:
        """The next character that is not white space; empty at the end."""
        while True:
            self.advance(_SPACE.match(self.text, self.at).end())  # type: ignore[union-attr]
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.more():
                return ""


def items_of(path: Path) -> Iterator[Located]:
    """Rows of a file that is one JSON list, with offset and size in bytes.

    Raises:
        ValueError: not a list, or not JSON; the message says from which row on.
    """
    with path.open("rb") as file:
        text, number = _Text(file, path), 0
        _expect_list(text)
        while text.peek() != "]":
            if number and text.peek() != ",":
                raise _not_json(path, number, f"{text.peek()!r} where ',' or ']' must be")
            if number:
                text.advance(text.at + 1)
                text.peek()
            offset = text.offset
            row, end = _decode(text, number)
            yield offset, text.advance(end), row
            number += 1
        text.advance(text.at + 1)
        if text.peek():
            raise _not_json(path, number, f"{text.peek()!r} behind the list")


def _expect_list(text: _Text) -> None:
    first = text.peek()
    if first != "[":
        kinds = {"{": "dict", '"': "str"}
        found = kinds.get(first, "something else" if first else "an empty file")
        advice = "; JSON lines are read from .jsonl" if first == "{" else ""
        raise ValueError(
            f"data: {text.path} must be JSON and must hold a list of rows, got {found}{advice}"
        )
    text.advance(text.at + 1)


def _decode(text: _Text, number: int) -> tuple[Any, int]:
    """The row at the text's position, and where it ends; a row cut off by a chunk is read on."""
    found = _attempt(text)
    while isinstance(found, json.JSONDecodeError):
        if len(text.text) - text.at > _LONGEST or not text.more():
            raise _not_json(text.path, number, str(found))
        found = _attempt(text)
    return found


def _attempt(text: _Text) -> Any:
    try:
        return _DECODER.raw_decode(text.text, text.at)
    except json.JSONDecodeError as error:
        return error


def _not_json(path: Path, number: int, found: str) -> ValueError:
    return ValueError(f"data: {path} must be JSON, got from row {number} on: {found}")
