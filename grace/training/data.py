"""Training rows as inputs of a model with labels, read and encoded one at a time."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from grace.training.encoding import encode
from grace.training.formats import Conversation, media_of, read_conversation
from grace.training.lengths import LengthModel
from grace.training.media import missing_files, open_image, open_video
from grace.training.row_files import ListRows, Rows, read_rows
from grace.training.row_index import FACTS

__all__ = ["ConversationDataset", "RowError", "Source", "read_rows"]

ON_ERROR = ("raise", "skip")
SKIPPED = "skipped"  # key under which an item tells how many rows it stands for that were left out
_log = logging.getLogger(__name__)
# What reading, decoding and encoding a row raise for the row's sake. ImportError is not among
# them: a missing package is no row's fault.
_ROW_ERRORS = (ValueError, OSError, KeyError, TypeError, IndexError)


class RowError(ValueError):
    """A row that cannot be used; the message says which and why."""


@dataclass(frozen=True)
class Source:
    """One file of rows.

    Attributes:
        rows: as `read_rows` gives them, or a list.
        image_root: folder that its paths are relative to.
        weight: how often an epoch holds each of its rows. Of 1.5, an epoch holds every row once
            and half of the rows, drawn by the seed, again; the draw is the same in every epoch.
    """

    rows: Rows | Sequence[Any]
    image_root: str | Path = "."
    weight: float = 1.0


class ConversationDataset(Dataset):
    """Conversations about images as inputs of a model: `input_ids`, `labels`, pixels, `row_ids`.

    Nothing but an index of the rows is held in memory. Rows of an unknown form are known from it;
    what shows only when a row is read (a file that is missing or torn, too many tokens) is found
    then.

    Args:
        rows: as `read_rows` gives them, a list of rows, or a list of `Source`s.
        processor: of the student's checkpoint, with a chat template and a fast tokenizer.
        image_root: folder that image paths are relative to; a `Source` has its own.
        on_error: "raise": a row that cannot be used is an error with its file, index and reason.
            "skip": such rows are left out and counted: those of an unknown form in `skipped`,
            the others in the item that stands in their place.
        max_length: a row of more tokens cannot be used.
        truncate: cut a row of more tokens at its end instead; one whose images would be cut still
            cannot be used.
        check_files: look for every file that a row names before the first is read (with "raise").
        seed: of the draw that fractional weights make.

    Attributes:
        entries: int64 [n]: the row of each item, counted through all sources.
        skipped: rows left out because of their form.

    Raises:
        ValueError: no row is left, an option out of range, or (raise) a bad row.
    """

    def __init__(
        self,
        rows: Rows | Sequence[Any],
        processor: Any,
        image_root: str | Path = ".",
        *,
        on_error: str = "raise",
        max_length: int | None = None,
        truncate: bool = False,
        check_files: bool = True,
        seed: int = 0,
    ) -> None:
        if on_error not in ON_ERROR:
            raise ValueError(f"data: on_error must be one of {ON_ERROR}, got {on_error!r}")
        self.processor, self.on_error = processor, on_error
        self.max_length, self.truncate = max_length, truncate
        self.sources = _sources(rows, image_root)
        self.starts = np.cumsum([0, *(len(source.rows) for source in self.sources)])
        usable = np.concatenate([_facts(source)["usable"] for source in self.sources])
        self.skipped = int((~usable).sum())
        if self.skipped:
            self._report_unusable(int(np.argmin(usable)), len(usable))
        self.entries = self._draw(usable, seed)
        if not len(self.entries):
            raise ValueError(f"data: at least one row must be usable, got {self.skipped} bad rows")
        if check_files and on_error == "raise":
            self._check_files(usable)
        self._length_model: LengthModel | None = None

    def _report_unusable(self, first: int, of: int) -> None:
        try:
            self._attempt(first, None)
        except RowError as error:
            if self.on_error == "raise":
                raise
            _log.warning("data: skipped %d of %d rows, the first: %s", self.skipped, of, error)

    def _draw(self, usable: np.ndarray, seed: int) -> np.ndarray:
        random, drawn = np.random.default_rng(seed), []
        for number, source in enumerate(self.sources):
            start, end = self.starts[number : number + 2]
            rows = start + np.flatnonzero(usable[start:end])
            whole, part = divmod(source.weight, 1)
            again = random.permutation(rows)[: round(part * len(rows))]
            drawn += [np.repeat(rows, int(whole)), np.sort(again)]
        return np.concatenate(drawn)

    def _check_files(self, usable: np.ndarray) -> None:
        for number, source in enumerate(self.sources):
            start, end = self.starts[number : number + 2]
            facts = _facts(source)
            shows = (facts["images"] + facts["videos"] > 0) & usable[start:end]
            for row in np.flatnonzero(shows).tolist():
                self._check_row(source, row, start + row)

    def _check_row(self, source: Source, row: int, place: int) -> None:
        try:
            missing = missing_files(*media_of(source.rows[row]), source.image_root)
        except _ROW_ERRORS as error:
            raise self._row_error(place, error) from error
        if missing:
            raise self._row_error(place, f"no file {missing[0]}")

    def _row_error(self, row: int, reason: Any) -> RowError:
        return RowError(f"data: {self.where(row)} must be usable, got: {reason}")

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, item: int) -> dict[str, Tensor]:
        """The item's row as tensors without a batch dimension (pixels keep theirs).

        Where skipping is asked for, the next row takes the place of one that cannot be used;
        `skipped` int64 [] says how many were passed over.
        """
        for offset in range(len(self)):
            found = self.read((item + offset) % len(self))
            if found is not None:
                return {**found, SKIPPED: torch.tensor(offset)}
        raise ValueError("data: at least one row must be usable, got none")

    def read(self, item: int) -> dict[str, Tensor] | None:
        """As `[item]`, but None where the row cannot be used and skipping is asked for."""
        row = int(self.entries[item])
        try:
            return self._attempt(row, self.processor)
        except RowError as error:
            if self.on_error == "raise":
                raise
            _log.warning("data: skipped a row: %s", error)
            return None

    def where(self, row: int) -> str:
        """File and place in it of a row that is counted through all sources."""
        number = int(np.searchsorted(self.starts, row, side="right")) - 1
        rows = self.sources[number].rows
        return (
            rows.where(row - int(self.starts[number])) if isinstance(rows, Rows) else f"row {row}"
        )

    def _attempt(self, row: int, processor: Any) -> Any:
        """Read the row; with a processor, open what it shows and encode it."""
        try:
            found, root = self._conversation(row)
            return None if processor is None else self._encode(row, found, root)
        except _ROW_ERRORS as error:
            raise self._row_error(row, error if str(error) else repr(error)) from error

    def _conversation(self, row: int) -> tuple[Conversation, Path]:
        number = int(np.searchsorted(self.starts, row, side="right")) - 1
        source = self.sources[number]
        return read_conversation(source.rows[row - int(self.starts[number])]), Path(
            source.image_root
        )

    def _encode(self, row: int, found: Conversation, root: Path) -> dict[str, Tensor]:
        inputs = encode(
            self.processor,
            found.messages,
            [open_image(image, root) for image in found.images],
            [open_video(video, root) for video in found.videos],
            max_length=self.max_length,
            truncate=self.truncate,
        )
        return {**inputs, "row_ids": torch.tensor(row)}

    # What sampling and packing go by

    @property
    def lengths(self) -> np.ndarray:
        """Estimated tokens of each item, int32 [n]; see `LengthModel`."""
        if self._length_model is None:
            self._length_model = LengthModel.fit(self)
        every = [self._length_model(_facts(source)) for source in self.sources]
        return np.concatenate(every)[self.entries]

    def facts_of_items(self, items: np.ndarray) -> np.ndarray:
        """`row_index.FACTS` of some items."""
        rows = self.entries[items]
        numbers = np.searchsorted(self.starts, rows, side="right") - 1
        pairs = zip(numbers, rows - self.starts[numbers], strict=True)
        return np.array([_facts(self.sources[number])[row] for number, row in pairs], FACTS)

    def set_length_model(self, model: LengthModel) -> None:
        """Take a model of lengths that another process fitted."""
        self._length_model = model

    @property
    def fingerprint(self) -> str:
        """What tells these items, in their order, from others."""
        digest = hashlib.sha256(self.entries.tobytes())
        for source in self.sources:
            for name in ("text", "images", "videos", "turns"):
                digest.update(np.ascontiguousarray(_facts(source)[name]).tobytes())
        return digest.hexdigest()[:16]


def _sources(rows: Any, image_root: str | Path) -> list[Source]:
    given = list(rows) if isinstance(rows, list) and rows and isinstance(rows[0], Source) else None
    sources = given or [Source(rows, image_root)]
    for source in sources:
        if not source.weight > 0:
            raise ValueError(f"data: weight must be > 0, got {source.weight!r}")
    return [
        source
        if isinstance(source.rows, Rows)
        else Source(ListRows(source.rows), source.image_root, source.weight)
        for source in sources
    ]


def _facts(source: Source) -> np.ndarray:
    return source.rows.facts  # type: ignore[union-attr]
