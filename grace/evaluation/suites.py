"""Benchmarks by name, as `grace evaluate` runs them: how to load, ask, score and keep replies."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import choices, mme, pope

Score = Callable[[Sequence[Any], Sequence[str], str], dict[str, Any]]


@dataclass(frozen=True)
class Suite:
    """One kind of benchmark.

    load(path, images, split) gives rows with `image` and `question`; prompt(question, variant)
    what is asked; score(rows, replies, variant) a dict of numbers; write(folder, rows, replies)
    keeps the replies.
    """

    load: Callable[[Path, Path | None, str], list[Any]]
    prompt: Callable[[str, str], str]
    score: Score
    write: Callable[[Path, Sequence[Any], Sequence[str]], Any]


def _write_replies(folder: Path, rows: Sequence[Any], replies: Sequence[str]) -> None:
    """`replies.jsonl`: one `{"question", "reply"}` a row, in their order."""
    lines = [
        json.dumps({"question": row.question, "reply": text}, ensure_ascii=False)
        for row, text in zip(rows, replies, strict=True)
    ]
    (folder / "replies.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


SUITES = {
    "mme": Suite(
        lambda path, images, split: mme.load(path),
        mme.prompt,
        lambda rows, said, prompt: mme.score(mme.answered(rows, said), prompt=prompt),
        lambda folder, rows, said: mme.write_results(folder, mme.answered(rows, said)),
    ),
    "pope": Suite(
        lambda path, images, split: pope.load(path, images or path / "images"),
        pope.prompt,
        lambda rows, said, prompt: pope.score(rows, said, prompt=prompt),
        _write_replies,
    ),
    "scienceqa": Suite(
        lambda path, images, split: choices.load_scienceqa(path, split),
        choices.prompt,
        lambda rows, said, prompt: choices.score(rows, said, prompt=prompt),
        _write_replies,
    ),
    "mmbench": Suite(
        lambda path, images, split: choices.load_mmbench(path),
        choices.prompt,
        lambda rows, said, prompt: choices.score(rows, said, prompt=prompt),
        _write_replies,
    ),
}


def suite_named(name: str) -> Suite:
    """The benchmark `name`; ValueError for one that is none."""
    if name not in SUITES:
        raise ValueError(f"evaluate: suite must be one of {', '.join(SUITES)}, got {name!r}")
    return SUITES[name]


def table(scores: dict[str, Any]) -> list[tuple[str, ...]]:
    """Scores as lines of text, the first of them the headings; rates in percent."""
    if "subtasks" in scores:
        return _mme_table(scores)
    if "settings" in scores:
        names = ("accuracy", "precision", "recall", "f1", "yes_ratio")
        lines = [
            (setting, *(_percent(part[n]) for n in names), str(part["questions"]))
            for setting, part in scores["settings"].items()
        ]
        return [("setting", *names, "questions"), *lines]
    lines = [
        (f"{name} {value}", _percent(part["accuracy"]), str(part["questions"]))
        for name, values in scores["groups"].items()
        for value, part in values.items()
    ]
    every = str(scores["questions"])
    lines += [(name, _percent(scores[name]), every) for name in ("circular", "accuracy")]
    return [("group", "accuracy", "questions"), *lines]


def _mme_table(scores: dict[str, Any]) -> list[tuple[str, ...]]:
    lines: list[tuple[str, ...]] = [("subtask", "acc", "acc+", "score", "questions", "other")]
    for name, part in scores["subtasks"].items():
        rates = (_percent(part["acc"]), _percent(part["acc_plus"]), f"{part['score']:.1f}")
        lines.append((name, *rates, str(part["questions"]), str(part["other"])))
    sums = ("perception", "cognition", "total")
    return lines + [(name, "", "", f"{scores[name]:.1f}", "", "") for name in sums]


def _percent(rate: float) -> str:
    return f"{100 * rate:.1f}"
