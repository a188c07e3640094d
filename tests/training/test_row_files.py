"""Files of rows: read in place, indexed once, and the same whatever form they have."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grace.training import row_files, row_index
from grace.training.row_files import read_rows

ROWS = [
    {
        "id": number,
        "image": f"{number}.png",
        "conversations": [
            {"from": "human", "value": f'<image>\nIs "ü" [{number}] }} \\ here ?' + "x" * number},
            {"from": "gpt", "value": "Yes 🙂"},
        ],
    }
    for number in range(40)
]


def _write(path: Path, rows: list, **options: Any) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, **options) + "\n" for row in rows))
    else:
        path.write_text(json.dumps(rows, **options))
    return path


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
@pytest.mark.parametrize("options", [{}, {"ensure_ascii": False}])
@pytest.mark.parametrize("chunk", [1, 50, 2**22])
def test_rows_are_read_where_they_stand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, options: dict, chunk: int
) -> None:
    monkeypatch.setattr(row_index, "_CHUNK", chunk)
    rows = read_rows(_write(tmp_path / name, ROWS, **options))
    assert len(rows) == len(ROWS)
    assert list(rows) == ROWS
    assert rows[-1] == ROWS[-1]
    assert rows[3:5] == ROWS[3:5]
    assert rows.facts["images"].tolist() == [1] * 40
    assert rows.facts["usable"].all()
    assert (np.diff(rows.facts["text"]) >= 1).all()
    with pytest.raises(IndexError, match="row must be below 40, got 40"):
        rows[40]


@given(st.lists(st.dictionaries(st.text(), st.text() | st.integers() | st.none()), min_size=1))
def test_any_list_of_objects(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]
) -> None:
    folder = tmp_path_factory.mktemp("any")
    spaced = json.dumps(rows, indent=1, ensure_ascii=False).encode("utf-8", "replace")
    (folder / "rows.json").write_bytes(b" \n" + spaced + b"\n ")
    assert list(read_rows(folder / "rows.json")) == json.loads(spaced)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1} {"b": 2}]', r"from row 1 on: '\{' where ',' or '\]' must be"),
        ('[{"a": 1}, {"b": ]', "must be JSON, got from row 1 on: Expecting value"),
        ('[{"a": 1}, ', "must be JSON, got from row 1 on"),
        ('[{"a": 1}', "must be JSON, got from row 1 on: '' where"),
        ('[{"a": 1}] x', "from row 1 on: 'x' behind the list"),
        ("", "must be JSON and must hold a list of rows, got an empty file"),
        ('{"a": 1}\n{"a": 2}', "got dict; JSON lines are read from .jsonl"),
    ],
)
def test_files_that_are_no_list(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_rows(tmp_path / "rows.json")
    assert [path.name for path in tmp_path.iterdir()] == ["rows.json"]


def test_a_file_that_is_not_text_or_of_no_known_suffix(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_bytes(b'[{"a": "\xff\xfe"}]')
    with pytest.raises(ValueError, match=r"rows.json must be UTF-8"):
        read_rows(tmp_path / "rows.json")
    (tmp_path / "rows.csv").write_text("a,b")
    with pytest.raises(ValueError, match=r"must end in one of \.json, \.jsonl, \.parquet, "):
        read_rows(tmp_path / "rows.csv")


def test_a_line_that_is_not_json_is_a_bad_row(tmp_path: Path) -> None:
    path = _write(tmp_path / "rows.jsonl", ROWS[:2])
    path.write_text(path.read_text() + "\n{broken\n" + json.dumps(ROWS[2]) + "\n")
    rows = read_rows(path)
    assert rows.facts["usable"].tolist() == [True, True, False, True]
    assert rows[3] == ROWS[2]
    with pytest.raises(ValueError, match=r"byte \d+ on must be JSON"):
        rows[2]


def test_an_index_is_made_once_for_one_state_of_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _write(tmp_path / "rows.json", ROWS)
    first = read_rows(path)
    made: list[Path] = []
    locate = row_files.TEXT_SUFFIXES[".json"]

    def count(file: Path) -> Any:
        made.append(file)
        return locate(file)

    monkeypatch.setitem(row_files.TEXT_SUFFIXES, ".json", count)
    again = read_rows(path)
    assert made == []
    assert isinstance(again.facts.base, np.memmap)
    assert np.array_equal(first.facts, again.facts)
    _write(path, ROWS[:7])
    assert len(read_rows(path)) == 7
    assert made == [path]
    assert list(read_rows(path, tmp_path / "cache")) == ROWS[:7]
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_killed_reading_leaves_no_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _write(tmp_path / "rows.json", ROWS)

    def stop(file: Any, *_: Any, **__: Any) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        read_rows(path)
    assert [found.name for found in tmp_path.iterdir()] == ["rows.json"]


def test_where_nothing_can_be_written_the_index_stays_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = _write(tmp_path / "rows.json", ROWS)

    def refuse(*_: Any) -> None:
        raise PermissionError("read-only file system")

    monkeypatch.setattr(row_index, "write_beside", refuse)
    assert list(read_rows(path)) == ROWS
    assert "is not kept (read-only file system); set data.cache_dir" in caplog.text


def test_rows_travel_to_another_process(tmp_path: Path) -> None:
    rows = read_rows(_write(tmp_path / "rows.jsonl", ROWS))
    assert rows[0] == ROWS[0]
    assert list(pickle.loads(pickle.dumps(rows))) == ROWS


def _table(arrow: Any) -> Any:
    """Both columns of images that data sets have: paths, and structs of bytes and path."""
    turns = [
        [{"role": "user", "content": "<image> Is it ?"}, {"role": "assistant", "content": "Yes"}]
        for _ in range(600)
    ]
    images = [[{"bytes": b"x" * number, "path": None}] for number in range(600)]
    return arrow.table({"messages": turns, "images": images})


@pytest.mark.parametrize("form", ["parquet", "arrow file", "arrow stream"])
def test_parquet_and_arrow(tmp_path: Path, form: str) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table, path = _table(arrow), tmp_path / f"rows.{form.split()[0]}"
    if form == "parquet":
        parquet.write_table(table, path, row_group_size=150)
    else:
        make = arrow.ipc.new_file if form == "arrow file" else arrow.ipc.new_stream
        with make(path, table.schema) as sink:
            sink.write_table(table, max_chunksize=100)
    rows = read_rows(path, tmp_path / "cache")
    assert len(rows) == 600
    assert rows.facts["usable"].all()
    assert rows.facts["images"].tolist() == [1] * 600
    assert [len(row["images"][0]["bytes"]) for row in rows] == list(range(600))
    assert pickle.loads(pickle.dumps(rows))[599] == rows[599]
    kept = len(list((tmp_path / "cache").iterdir()))
    assert kept == (2 if form == "parquet" else 1)
    assert read_rows(path, tmp_path / "cache")[7] == rows[7]
    assert len(list((tmp_path / "cache").iterdir())) == kept


@pytest.mark.parametrize("name", ["rows.parquet", "rows.arrow"])
def test_files_that_are_not_what_their_suffix_says(tmp_path: Path, name: str) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(b"something else entirely")
    with pytest.raises(ValueError, match=rf"{name} must be an? (parquet|Arrow) file"):
        read_rows(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows.parquet").write_bytes(b"")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.ipc", None)
    with pytest.raises(ImportError, match=r"pip install 'grace-vlm\[parquet\]'"):
        read_rows(tmp_path / "rows.parquet")
