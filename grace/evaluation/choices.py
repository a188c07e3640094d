"""Multiple-choice questions about images: ScienceQA-IMG and tables in the layout of MMBench.

Accuracy is right answers / questions; a reply is read by `grace.evaluation.replies.option`, and one
that names no option or several is wrong: nobody guesses for it. Where a table holds the rotations
of a question (MMBench's indices i, i + 10⁶, i + 2·10⁶, …), "circular" counts a question as right
when all of its rotations are.

Sources: Lu et al., "Learn to Explain", arXiv 2209.09513; Liu et al., "MMBench", arXiv 2307.06281.
"""

from __future__ import annotations

import base64
import binascii
import csv
import io
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from .replies import option

LETTERS = "ABCDEFGHIJ"
_ROTATION = 1_000_000
_COLUMNS = ("index", "question", "A", "B", "answer", "image")
_ENDINGS = {"official": "\nAnswer with the option's letter from the given choices directly."}
_ENDINGS["plain"] = ""
PROMPTS = tuple(_ENDINGS)


@dataclass(frozen=True)
class Row:
    """One question with its options by letter; `answer` is the letter of the right one.

    `groups` are what scores are also given by, such as {"subject": "natural science"}; rows of one
    `question_id` are rotations of one question.
    """

    question_id: str
    picture: Path | bytes
    stem: str
    options: dict[str, str]
    answer: str
    groups: dict[str, str]
    hint: str = ""

    @property
    def image(self) -> Path | Image.Image:
        """A file, or a picture decoded now from the bytes of a table."""
        if isinstance(self.picture, Path):
            return self.picture
        with Image.open(io.BytesIO(self.picture)) as image:
            return image.convert("RGB")

    @property
    def question(self) -> str:
        """Hint, question and lettered options, each on a line of its own."""
        lines = [self.hint, self.stem, *(f"{k}. {v}" for k, v in self.options.items())]
        return "\n".join(line for line in lines if line)


def load_scienceqa(root: str | Path, split: str = "test") -> list[Row]:
    """ScienceQA's questions with an image, from `problems.json` and `pid_splits.json` in `root`.

    Images are `root/<split>/<id>/image.png`, or the same under `root/images`. Groups:
    subject, and grade ("1-6" or "7-12").

    Raises:
        FileNotFoundError: a file or an image that is not there.
        ValueError: a split that is none, a garbled file or question, or no question with an image.
    """
    root = Path(root)
    splits, problems = _json(root / "pid_splits.json"), _json(root / "problems.json")
    if split not in splits:
        raise ValueError(
            f"choices.load_scienceqa: split must be one of {', '.join(splits)}, got {split!r}"
        )
    try:
        shown = [(pid, problems[pid]) for pid in splits[split] if problems[pid].get("image")]
        rows = [_scienceqa_row(root, split, pid, problem) for pid, problem in shown]
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(
            f"choices.load_scienceqa: {root / 'problems.json'} must hold every question of {split} "
            f"with question, choices, answer and image, got {error!r}"
        ) from error
    if not rows:
        raise ValueError(f"choices.load_scienceqa: {split} must hold images, got none in {root}")
    return rows


def _json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"choices: {file} must be JSON, got {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"choices: {file} must hold an object, got {type(value).__name__}")
    return value


def _scienceqa_row(root: Path, split: str, pid: str, problem: dict[str, Any]) -> Row:
    places = [folder / split / pid / problem["image"] for folder in (root, root / "images")]
    image = next((path for path in places if path.is_file()), None)
    if image is None:
        raise FileNotFoundError(f"choices.load_scienceqa: image must be a file, got {places[0]}")
    options = dict(zip(LETTERS, problem["choices"], strict=False))
    grade = problem.get("grade", "").removeprefix("grade")
    groups = {"subject": problem.get("subject", "")}
    if grade.isdigit():
        groups["grade"] = "1-6" if int(grade) <= 6 else "7-12"
    hint = f"Context: {problem['hint']}" if problem.get("hint") else ""
    answer = list(options)[problem["answer"]]
    return Row(pid, image, problem["question"], options, answer, groups, hint)


def load_mmbench(file: str | Path) -> list[Row]:
    """A tab-separated table with columns index, question, A, B, …, answer and image.

    `image` is base64, or the index of the row that has the picture. Columns hint, category and
    l2-category are optional; the latter two become groups. Empty options are left out.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a folder, no rows, a column that is missing, an answer that is no option (as in
            the unlabelled test tables), or an image that cannot be decoded.
    """
    if Path(file).is_dir():
        raise ValueError(f"choices.load_mmbench: a .tsv file must be given, got the folder {file}")
    csv.field_size_limit(sys.maxsize)  # a field is a whole picture
    with Path(file).open(encoding="utf-8-sig", newline="") as lines:
        raw = list(csv.DictReader(lines, delimiter="\t"))
    if not raw:
        raise ValueError(f"choices.load_mmbench: {file} must hold rows, got none")
    if missing := [column for column in _COLUMNS if column not in raw[0]]:
        raise ValueError(
            f"choices.load_mmbench: {file} must have a column {missing[0]}, got {', '.join(raw[0])}"
        )
    images = {row["index"]: row["image"] for row in raw}
    return [_mmbench_row(f"{file} index {row['index']}", row, images) for row in raw]


def _mmbench_row(where: str, raw: dict[str, str], images: dict[str, str]) -> Row:
    options = {k: raw[k] for k in LETTERS if raw.get(k) and raw[k] != "nan"}
    answer = (raw["answer"] or "").strip()
    if answer not in options:
        raise ValueError(
            f"choices.load_mmbench: {where}: answer must be one of {', '.join(options)}, "
            f"got {answer!r}"
        )
    if not raw["index"].isdigit():
        raise ValueError(f"choices.load_mmbench: {where}: index must be a whole number")
    groups = {key: raw[key] for key in ("category", "l2-category") if raw.get(key)}
    hint = "" if raw.get("hint") in (None, "nan") else raw["hint"]
    question_id = str(int(raw["index"]) % _ROTATION)
    picture = _picture(where, raw["image"], images)
    return Row(question_id, picture, raw["question"], options, answer, groups, hint)


def _picture(where: str, image: str, images: dict[str, str]) -> bytes:
    text = images.get(image, "") if image.isdigit() else image
    try:
        data = base64.b64decode(text, validate=True)
        Image.open(io.BytesIO(data)).close()
    except (binascii.Error, OSError) as error:
        raise ValueError(f"choices.load_mmbench: {where}: image must be base64, {error}") from error
    return data


def prompt(question: str, variant: str = "official") -> str:
    """The question as a model gets it: "official" asks for a letter, "plain" does not."""
    if variant not in _ENDINGS:
        raise ValueError(
            f"choices.prompt: variant must be one of {', '.join(PROMPTS)}, got {variant!r}"
        )
    return question + _ENDINGS[variant]


def score(rows: Sequence[Row], replies: Sequence[str], *, prompt: str = "official") -> dict:
    """Scores of replies, one a row.

    Returns:
        {"accuracy", "circular", "groups": {name: {value: {"accuracy", "questions"}}}, "questions",
         "other", "prompt"}: rates in [0, 1]; "circular" over questions with all their rotations
        (equal to accuracy where there are none), "other" the replies that named no single option.

    Raises:
        ValueError: no rows, or not one reply a row.
    """
    if not rows or len(rows) != len(replies):
        raise ValueError(
            f"choices.score: replies must be one a row, and rows not empty, got {len(rows)} rows "
            f"and {len(replies)} replies"
        )
    said = [option(text, row.options) for row, text in zip(rows, replies, strict=True)]
    right = [letter == row.answer for letter, row in zip(said, rows, strict=True)]
    circles: dict[str, list[bool]] = defaultdict(list)
    grouped: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for row, good in zip(rows, right, strict=True):
        circles[row.question_id].append(good)
        for name, value in row.groups.items():
            grouped[name][value].append(good)
    groups = {
        name: {value: _rate(part) for value, part in sorted(values.items())}
        for name, values in grouped.items()
    }
    return {
        "accuracy": sum(right) / len(right),
        "circular": sum(map(all, circles.values())) / len(circles),
        "groups": groups,
        "questions": len(rows),
        "other": said.count(None),
        "prompt": prompt,
    }


def _rate(right: list[bool]) -> dict[str, Any]:
    return {"accuracy": sum(right) / len(right), "questions": len(right)}
