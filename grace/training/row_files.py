"""Files of rows, read one row at a time: JSON, JSON lines, parquet, Arrow."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from grace.training.row_index import (
    Located,
    cache_place,
    cached_facts,
    items_of,
    lines_of,
    make_facts,
    write_beside,
)

TEXT_SUFFIXES = {".json": items_of, ".jsonl": lines_of}
ARROW_SUFFIXES = (".parquet", ".arrow")
_BATCH = 256  # rows of an Arrow record batch: what one read of a row maps


class Rows(Sequence):
    """Rows in a file or in memory: `len`, `[index]`, and `facts` about each.

    Attributes:
        name: the file, as messages call it; empty for rows in memory.
        facts: `row_index.FACTS` [n].
    """

    name: str = ""
    facts: np.ndarray

    def __len__(self) -> int:
        return len(self.facts)

    @overload
    def __getitem__(self, index: int) -> Any: ...

    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self._read(number) for number in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"data: row must be below {len(self)}, got {index}")
        return self._read(index % len(self))

    def _read(self, index: int) -> Any:
        raise NotImplementedError

    def where(self, index: int) -> str:
        """What messages call the row."""
        return f"{self.name}, row {index}" if self.name else f"row {index}"


class ListRows(Rows):
    """Rows that are in memory."""

    def __init__(self, rows: Sequence[Any]) -> None:
        self.rows = rows
        self.facts = make_facts((0, 0, row) for row in rows)

    def _read(self, index: int) -> Any:
        return self.rows[index]


class TextRows(Rows):
    """Rows of a `.json` (one list) or `.jsonl` (one object a line) file, read by their offsets."""

    def __init__(self, path: Path, cache_dir: str | Path | None = None) -> None:
        self.name, self.path = str(path), path
        locate = TEXT_SUFFIXES[path.suffix]
        self.facts = cached_facts(path, lambda: make_facts(locate(path)), cache_dir)
        self._file: int | None = None

    def _read(self, index: int) -> Any:
        if self._file is None:
            self._file = os.open(self.path, os.O_RDONLY)
        offset, size, *_ = self.facts[index].item()
        # pread moves no position that forked workers would share.
        data = os.pread(self._file, size, offset)
        try:
            return json.loads(data)
        except ValueError as error:
            raise ValueError(f"byte {offset} on must be JSON, got {error}") from error

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_file": None}

    def __del__(self) -> None:
        if getattr(self, "_file", None) is not None:
            os.close(self._file)  # type: ignore[arg-type]


class ArrowRows(Rows):
    """Rows of an Arrow file, memory-mapped; a parquet file is first rewritten as one.

    Parquet is read a row group at a time, which a shuffled order would do for every row: the copy
    stands beside the file or in `cache_dir`, as large as the file's data, and is made once.

    Raises:
        ImportError: pyarrow is not installed.
        ValueError: not a parquet or Arrow file.
    """

    def __init__(self, path: Path, cache_dir: str | Path | None = None) -> None:
        _import_pyarrow()
        self.name, self.path = str(path), path
        if path.suffix == ".parquet":
            self.path = cache_place(path, ".arrow", cache_dir)
            if not self.path.is_file():
                self.path.parent.mkdir(parents=True, exist_ok=True)
                write_beside(self.path, lambda file: _parquet_to_arrow(path, file))
        self._batches: Any = None
        self.facts = cached_facts(path, lambda: make_facts(self._locate()), cache_dir)

    def _open(self) -> Any:
        if self._batches is None:
            self._batches = _open_arrow(self.path)
        return self._batches

    def _locate(self) -> Iterator[Located]:
        for number, batch in enumerate(self._open()):
            for place, row in enumerate(_without_media(batch)):
                yield number, place, row

    def _read(self, index: int) -> Any:
        number, place, *_ = self.facts[index].item()
        return self._open()[number].slice(place, 1).to_pylist()[0]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_batches": None}


def _import_pyarrow() -> Any:
    try:
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(
            "data: parquet and Arrow files need pyarrow; pip install 'grace-vlm[parquet]'"
        ) from error
    return pyarrow


def _parquet_to_arrow(path: Path, file: Any) -> None:
    arrow = _import_pyarrow()
    try:
        with (
            arrow.parquet.ParquetFile(path) as source,
            arrow.ipc.new_file(file, source.schema_arrow) as sink,
        ):
            for batch in source.iter_batches(batch_size=_BATCH):
                sink.write_batch(batch)
    except arrow.ArrowInvalid as error:
        raise ValueError(f"data: {path} must be a parquet file, got {error}") from error


def _open_arrow(path: Path) -> Sequence[Any]:
    """Record batches of an Arrow file in either of its two forms; they stay on disk."""
    arrow = _import_pyarrow()
    mapped = arrow.memory_map(str(path))
    try:
        reader = arrow.ipc.open_file(mapped)
        return [reader.get_batch(number) for number in range(reader.num_record_batches)]
    except arrow.ArrowInvalid:
        mapped.seek(0)
    try:
        return list(arrow.ipc.open_stream(mapped))
    except arrow.ArrowInvalid as error:
        raise ValueError(f"data: {path} must be an Arrow file, got {error}") from error


def _without_media(batch: Any) -> list[dict[str, Any]]:
    """Rows with a stand-in for each image and video beside the turns: none is read."""
    names = [name for name in batch.schema.names if name not in ("conversations", "messages")]
    rows = batch.drop_columns(names).to_pylist()
    for name in {"image", "images", "video", "videos"} & set(names):
        for row, count in zip(rows, _counts(batch.column(name)), strict=True):
            row[name] = ["-"] * count
    return rows


def _counts(column: Any) -> list[int]:
    arrow = _import_pyarrow()
    import pyarrow.compute as compute

    if arrow.types.is_list(column.type) or arrow.types.is_large_list(column.type):
        return compute.list_value_length(column).fill_null(0).to_pylist()
    return [int(valid) for valid in column.is_valid().to_pylist()]


def read_rows(path: str | Path, cache_dir: str | Path | None = None) -> Rows:
    """The rows of a file, by its suffix: `.json`, `.jsonl`, `.parquet` or `.arrow`.

    Only an index of the file is held in memory; it is made by the first reading and kept beside
    the file, or in `cache_dir`.

    Raises:
        FileNotFoundError: no such file.
        ImportError: parquet or Arrow without pyarrow.
        ValueError: another suffix, a file that is not what its suffix says, or no row in it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"data: file must exist, got {path}")
    if path.suffix not in (*TEXT_SUFFIXES, *ARROW_SUFFIXES):
        known = ", ".join((*TEXT_SUFFIXES, *ARROW_SUFFIXES))
        raise ValueError(f"data: a file must end in one of {known}, got {path}")
    kind = TextRows if path.suffix in TEXT_SUFFIXES else ArrowRows
    rows: Rows = kind(path, cache_dir)
    if not len(rows):
        raise ValueError(f"data: {path} must hold at least one row, got none")
    return rows
