"""POPE: does a model see objects that are not there? Local files, three settings.

Each setting (random, popular, adversarial) asks about objects that are in an image and about as
many that are not. With "yes" as the positive answer,

    precision = TP / (TP + FP),  recall = TP / (TP + FN),  F1 = 2 P R / (P + R),
    accuracy = right answers / questions,  yes_ratio = parsed as yes / questions.

Source: Li et al., "Evaluating Object Hallucination in Large Vision-Language Models",
arXiv 2305.10355. Its script takes every reply without a "no" or "not" among its words for a yes;
here `grace.evaluation.replies.yes_or_no` reads it, and a reply that is neither is wrong.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .replies import yes_or_no

SETTINGS = ("random", "popular", "adversarial")
_ENDINGS = {"official": "", "llava": "\nAnswer the question using a single word or phrase."}
PROMPTS = tuple(_ENDINGS)


@dataclass(frozen=True)
class Row:
    """One question about an object; `label` is "yes" or "no"."""

    setting: str
    image: Path
    question: str
    label: str


def load(folder: str | Path, images: str | Path) -> list[Row]:
    """Read the official files `*_pope_<setting>.json` of a folder, as many as there are.

    A line is `{"question_id", "image", "text", "label": "yes" | "no"}`, `image` a file in `images`.

    Raises:
        FileNotFoundError: no such file, or an image that is not there.
        ValueError: two files of one setting, an empty file or a garbled line.
    """
    rows = []
    for setting in SETTINGS:
        files = sorted(Path(folder).glob(f"*pope_{setting}.json*"))
        if len(files) > 1:
            raise ValueError(
                f"pope.load: {folder} must hold one file of setting {setting}, got "
                f"{', '.join(file.name for file in files)}"
            )
        rows += [row for file in files for row in _read(file, setting, Path(images))]
    if not rows:
        raise FileNotFoundError(
            f"pope.load: {folder} must hold *_pope_random.json, *_pope_popular.json or "
            f"*_pope_adversarial.json, got none"
        )
    return rows


def _read(file: Path, setting: str, images: Path) -> list[Row]:
    lines = [line for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"pope.load: {file} must hold questions, got an empty file")
    return [_row(f"{file} line {n}", line, setting, images) for n, line in enumerate(lines, 1)]


def _row(where: str, line: str, setting: str, images: Path) -> Row:
    try:
        raw = json.loads(line)
        image, text, label = raw["image"], raw["text"], raw["label"].strip().lower()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"pope.load: {where} must be JSON with image, text and label, got {line[:80]!r}"
        ) from error
    if label not in ("yes", "no"):
        raise ValueError(f"pope.load: {where}: label must be yes or no, got {label!r}")
    if not (images / image).is_file():
        raise FileNotFoundError(f"pope.load: {where}: image must be a file, got {images / image}")
    return Row(setting, images / image, text, label)


def prompt(question: str, variant: str = "official") -> str:
    """The question as a model gets it: "official" as in the file, "llava" with its instruction."""
    if variant not in _ENDINGS:
        raise ValueError(
            f"pope.prompt: variant must be one of {', '.join(PROMPTS)}, got {variant!r}"
        )
    return question + _ENDINGS[variant]


def score(rows: Sequence[Row], replies: Sequence[str], *, prompt: str = "official") -> dict:
    """Scores of replies, one a row.

    A reply that is neither yes nor no is wrong, misses its object where the label is yes, and is
    in neither precision nor yes_ratio.

    Returns:
        {"settings": {name: {"accuracy", "precision", "recall", "f1", "yes_ratio", "questions",
         "other"}}, "accuracy": mean over settings, "f1": mean over settings, "questions", "prompt"}
        with rates in [0, 1]; precision, recall and F1 are 0 where they would be 0/0.

    Raises:
        ValueError: no rows, or not one reply a row.
    """
    if not rows or len(rows) != len(replies):
        raise ValueError(
            f"pope.score: replies must be one a row, and rows not empty, got {len(rows)} rows and "
            f"{len(replies)} replies"
        )
    said: dict[str, list[tuple[str, str]]] = {}
    for row, text in zip(rows, replies, strict=True):
        said.setdefault(row.setting, []).append((row.label, yes_or_no(text)))
    settings = {name: _rates(said[name]) for name in SETTINGS if name in said}
    means = {
        key: sum(part[key] for part in settings.values()) / len(settings)
        for key in ("accuracy", "f1")
    }
    return {"settings": settings, **means, "questions": len(rows), "prompt": prompt}


def _rates(pairs: list[tuple[str, str]]) -> dict[str, Any]:
    hits = pairs.count(("yes", "yes"))
    yes_said = sum(said == "yes" for _, said in pairs)
    yes_true = sum(label == "yes" for label, _ in pairs)
    return {
        "accuracy": sum(label == said for label, said in pairs) / len(pairs),
        "precision": hits / yes_said if yes_said else 0.0,
        "recall": hits / yes_true if yes_true else 0.0,
        "f1": 2 * hits / (yes_said + yes_true) if hits else 0.0,
        "yes_ratio": yes_said / len(pairs),
        "questions": len(pairs),
        "other": sum(said == "other" for _, said in pairs),
    }
