"""Answers that survive an interruption: written as they come, taken up where they stopped."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Ask = Callable[[Sequence[Any]], Sequence[str]]


def answer_all(
    ask: Ask, rows: Sequence[Any], log: str | Path, run: Mapping[str, Any], *, chunk: int = 256
) -> list[str]:
    """What `ask` says to all rows, of which those in `log` are not asked again.

    Rows are asked in chunks of fixed places, and a chunk is written when it is whole: a run that
    was stopped asks the same batches as one that was not. The log's first line holds `run` and a
    digest of the questions; a last line that was cut off is dropped.

    Args:
        ask: gives one text a row (`grace.evaluation.answer.answer` with its model).
        rows: objects with `question`.
        log: JSON-lines file, made where it is not there.
        run: what decides the answers (model, prompt, …), JSON values.
        chunk: rows asked between two writes.

    Raises:
        ValueError: no rows, a chunk below 1, a log of another run, or not a log; `ask` did not give
            one text a row.
    """
    if not rows or chunk < 1:
        raise ValueError(
            f"resume.answer_all: rows must not be empty and chunk must be at least 1, "
            f"got {len(rows)} rows and {chunk}"
        )
    log = Path(log)
    head = json.loads(json.dumps({**run, "questions": _digest(rows), "chunk": chunk}))
    said = _read(log, head)
    with log.open("a", encoding="utf-8") as file:
        for start in range(len(said), len(rows), chunk):
            part = rows[start : start + chunk]
            new = list(ask(part))
            if len(new) != len(part):
                raise ValueError(
                    f"resume.answer_all: ask must give one text a row ({len(part)}), got {len(new)}"
                )
            file.write(json.dumps(new, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
            said += new
    return said


def _digest(rows: Sequence[Any]) -> str:
    texts = json.dumps([row.question for row in rows])
    return hashlib.sha256(texts.encode()).hexdigest()


def _read(log: Path, head: dict[str, Any]) -> list[str]:
    """Answers of the whole chunks in a log, which is left with just them."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    lines = text.split("\n")[:-1]  # behind the last line break is nothing, or a line cut off
    if lines:
        _check(log, lines[0], head)
    kept, said = [json.dumps(head)], list[str]()
    for line in lines[1:]:
        try:
            said += json.loads(line)
        except ValueError as error:
            raise ValueError(f"resume: {log} must hold whole lines, got {line[:60]!r}") from error
        kept.append(line)
    log.parent.mkdir(parents=True, exist_ok=True)
    beside = log.with_name(log.name + ".tmp")
    beside.write_text("\n".join(kept) + "\n", encoding="utf-8")
    os.replace(beside, log)
    return said


def _check(log: Path, line: str, head: dict[str, Any]) -> None:
    try:
        found = json.loads(line)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"resume: {log} must be a log of answers, got {line[:60]!r}")
    for key in {**head, **found}:
        if found.get(key) != head.get(key):
            raise ValueError(
                f"resume: {log} must be of the same run ({key}={head.get(key)!r}), got "
                f"{found.get(key)!r}; remove it to start anew"
            )


def fingerprint(model: str) -> str:
    """A checkpoint's name with sizes and times of its files: another in its place differs."""
    folder = Path(model)
    if not folder.is_dir():
        return model
    files = sorted(path for path in folder.iterdir() if path.is_file())
    facts = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return f"{model} {hashlib.sha256(repr(facts).encode()).hexdigest()[:16]}"
