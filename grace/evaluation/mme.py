"""The MME benchmark: its folder layout, its answer parser, its scores, its result files.

MME asks two questions about an image. Per subtask

    acc = right answers / questions,  acc+ = images with both right / images,
    score = 100 acc + 100 acc+   (at most 200),

and perception (10 subtasks, at most 2000) and cognition (4, at most 800) are sums of scores.
Source: Fu et al., "MME: A Comprehensive Evaluation Benchmark for Multimodal Large Language Models",
arXiv 2306.13394, and its `calculation.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
COGNITION = (
    "commonsense_reasoning",
    "numerical_calculation",
    "text_translation",
    "code_reasoning",
)
SUBTASKS = (*PERCEPTION, *COGNITION)
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")

_SUFFIX = " Please answer yes or no."
_ENDINGS = {
    "official": _SUFFIX,
    "llava": "\nAnswer the question using a single word or phrase.",
    "plain": "",
}
PROMPTS = tuple(_ENDINGS)


@dataclass(frozen=True)
class Row:
    """One question about an image; `answer` is "Yes" or "No", `prediction` what a model said."""

    subtask: str
    image: Path
    question: str
    answer: str
    prediction: str | None = None


def load(root: str | Path) -> list[Row]:
    """Read a benchmark: each folder in `root` is a subtask, in MME's own two layouts.

    Either flat, `NNN.txt` beside `NNN.png|jpg|jpeg`, or `questions_answers_YN/NNN.txt` and
    `images/NNN.png|jpg|jpeg`. A .txt holds two lines `question<TAB>Yes|No`. Rows are ordered by
    subtask and file, the two questions about an image one after the other.

    Raises:
        FileNotFoundError: no such folder, or a question file without its image.
        ValueError: no subtask in it, an unknown or empty one, or a garbled question file.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"mme.load: root must be a folder, got {root}")
    # The official archive keeps its scripts beside the subtasks, in eval_tool.
    names = {
        p.name for p in root.iterdir() if p.is_dir() and p.name[0] != "." and p.name != "eval_tool"
    }
    if unknown := sorted(names - set(SUBTASKS)):
        raise ValueError(
            f"mme.load: folders in {root} must be named {', '.join(SUBTASKS)}, got {unknown[0]!r}"
        )
    if not names:
        raise ValueError(f"mme.load: root must hold folders of subtasks, got none in {root}")
    return [row for subtask in SUBTASKS if subtask in names for row in _subtask(root / subtask)]


def _subtask(folder: Path) -> list[Row]:
    nested = folder / "questions_answers_YN"
    texts, images = (nested, folder / "images") if nested.is_dir() else (folder, folder)
    files = sorted(texts.glob("*.txt"))
    if not files:
        raise ValueError(f"mme.load: {texts} must hold question files *.txt, got none")
    return [row for file in files for row in _pair(folder.name, file, images)]


def _pair(subtask: str, file: Path, images: Path) -> list[Row]:
    candidates = [images / (file.stem + suffix) for suffix in IMAGE_SUFFIXES]
    image = next((path for path in candidates if path.is_file()), None)
    if image is None:
        raise FileNotFoundError(
            f"mme.load: {file} must have an image {images / file.stem}.png|jpg|jpeg, got none"
        )
    lines = [line for line in _text(file).splitlines() if line.strip()]
    if len(lines) != 2:
        raise ValueError(f"mme.load: {file} must have two lines, got {len(lines)}")
    rows = []
    for number, line in enumerate(lines, 1):
        question, tab, answer = line.rpartition("\t")
        answer = answer.strip()
        if not tab or not question.strip() or answer not in ("Yes", "No"):
            raise ValueError(
                f"mme.load: {file} line {number} must be question<TAB>Yes|No, got {line!r}"
            )
        rows.append(Row(subtask, image, question.strip(), answer))
    return rows


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"mme: {file} must be UTF-8 text, got {error}") from error


def prompt(question: str, variant: str = "official") -> str:
    """The question as a model gets it.

    "official": as it stands in the file, ending in "Please answer yes or no."; "llava": with
    LLaVA's "Answer the question using a single word or phrase." on a new line in place of that
    ending; "plain": without an ending.
    """
    if variant not in _ENDINGS:
        raise ValueError(
            f"mme.prompt: variant must be one of {', '.join(PROMPTS)}, got {variant!r}"
        )
    if variant == "official":
        return question
    return question.removesuffix(_SUFFIX) + _ENDINGS[variant]


def parse_answer(text: str) -> str:
    """The official parser: "yes", "no", or "other", which counts as wrong.

    Lower case; then exactly yes or no; then "yes", then "no" within the first four characters.
    """
    text = text.lower()
    if text in ("yes", "no"):
        return text
    start = text[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def answered(rows: Sequence[Row], predictions: Sequence[str]) -> list[Row]:
    """The rows with what a model said to each; ValueError when the numbers differ."""
    if len(rows) != len(predictions):
        raise ValueError(
            f"mme.answered: predictions must be one a row ({len(rows)}), got {len(predictions)}"
        )
    return [replace(row, prediction=text) for row, text in zip(rows, predictions, strict=True)]


def score(rows: Iterable[Row], *, prompt: str = "official") -> dict[str, Any]:
    """Scores of answered rows; `prompt` names the variant that was asked and is recorded.

    Returns:
        {"subtasks": {name: {"acc", "acc_plus", "score", "images", "questions", "other"}},
         "perception": sum of scores, "cognition": sum of scores, "total": both,
         "questions": number of questions, "prompt": prompt}
        with acc and acc_plus in [0, 1], the sums over the subtasks that are present, and "other"
        the number of predictions that were neither yes nor no.

    Raises:
        ValueError: no rows, a row without a prediction, or an image without exactly two questions.
    """
    said: dict[str, dict[Path, list[tuple[str, str]]]] = {}  # (answer, parsed prediction)
    for number, row in enumerate(rows):
        if row.prediction is None:
            raise ValueError(f"mme.score: row {number} must have a prediction, got None")
        pair = (row.answer.lower(), parse_answer(row.prediction))
        said.setdefault(row.subtask, {}).setdefault(row.image, []).append(pair)
    if not said:
        raise ValueError("mme.score: rows must not be empty, got none")
    subtasks = {s: _subtask_score(s, said[s]) for s in SUBTASKS if s in said}
    sums = {
        name: sum(subtasks[s]["score"] for s in group if s in subtasks)
        for name, group in (("perception", PERCEPTION), ("cognition", COGNITION))
    }
    return {
        "subtasks": subtasks,
        **sums,
        "total": sums["perception"] + sums["cognition"],
        "questions": sum(s["questions"] for s in subtasks.values()),
        "prompt": prompt,
    }


def _subtask_score(subtask: str, said: dict[Path, list[tuple[str, str]]]) -> dict[str, Any]:
    for image, pairs in said.items():
        if len(pairs) != 2:
            raise ValueError(
                f"mme.score: {subtask} {image} must have two questions, got {len(pairs)}"
            )
    right = [[answer == parsed for answer, parsed in pairs] for pairs in said.values()]
    acc = sum(map(sum, right)) / (2 * len(right))
    acc_plus = sum(map(all, right)) / len(right)
    return {
        "acc": acc,
        "acc_plus": acc_plus,
        "score": 100 * acc + 100 * acc_plus,
        "images": len(right),
        "questions": 2 * len(right),
        "other": sum(parsed == "other" for pairs in said.values() for _, parsed in pairs),
    }


def write_results(folder: str | Path, rows: Sequence[Row]) -> list[Path]:
    """Write the official result files `<subtask>.txt`, which MME's `calculation.py` reads.

    A line is `image<TAB>question<TAB>ground truth<TAB>prediction`, the two of an image one after
    the other; tabs and line breaks in a prediction become spaces.
    """
    folder = Path(folder)
    score(rows)  # complete pairs and predictions, or nothing is written
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for subtask in SUBTASKS:
        lines = [
            "\t".join((r.image.name, r.question, r.answer, " ".join((r.prediction or "").split())))
            for r in sorted((r for r in rows if r.subtask == subtask), key=lambda r: r.image.name)
        ]
        if lines:
            files.append(folder / f"{subtask}.txt")
            files[-1].write_text("\n".join(lines) + "\n", encoding="utf-8")
    return files


def read_results(folder: str | Path) -> list[Row]:
    """Read official result files, from `write_results` or any other tool.

    Raises FileNotFoundError when there is no result file, ValueError for a garbled line.
    """
    files = [Path(folder) / f"{subtask}.txt" for subtask in SUBTASKS]
    rows = []
    for file in (file for file in files if file.is_file()):
        for number, line in enumerate(_text(file).splitlines(), 1):
            fields = line.split("\t")
            if len(fields) != 4 or fields[2] not in ("Yes", "No"):
                raise ValueError(
                    f"mme.read_results: {file} line {number} must be "
                    f"image<TAB>question<TAB>Yes|No<TAB>prediction, got {line!r}"
                )
            rows.append(Row(file.stem, Path(fields[0]), fields[1], fields[2], fields[3]))
    if not rows:
        raise FileNotFoundError(f"mme.read_results: {folder} must hold <subtask>.txt, got none")
    return rows
