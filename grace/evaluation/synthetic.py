"""A VQA benchmark drawn from a seed, in the official folder layout of MME, and rows to train on.

    root/existence/000.png  000.txt  001.png  001.txt ...
    root/count/...  root/position/...  root/color/...  root/OCR/...  root/numerical_calculation/...

Each .txt has two lines `question<TAB>Yes|No`, one of each. Images 2k and 2k + 1 of a subtask are
twins: the same two questions with opposite answers (see `grace.evaluation.scenes`).
"""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

from PIL import Image

from . import drawing, topics
from .drawing import Scene
from .scenes import Fact, compose_in, questions

SPLITS = ("train", "validation", "heldout")


def draw(
    root: str | Path, *, images_per_subtask: int, seed: int, split: str = "heldout"
) -> dict[str, list[Scene]]:
    """Draw a benchmark of all six subtasks into `root`, which must be empty or absent.

    Args:
        root: folder to make.
        images_per_subtask: images of each subtask, two questions an image; with an even number
            exactly half of the answers to each question text are yes.
        seed: everything is drawn from it; the same seed gives the same bytes.
        split: "train", "validation" or "heldout"; images of different splits never show the same
            scene, whatever the seeds.

    Returns:
        The scene of every image, by subtask, in the order of the file names.

    Raises:
        ValueError: a number below 1, an unknown split, or a folder that is not empty.
    """
    root = Path(root)
    _check(images_per_subtask, "images_per_subtask", split)
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise ValueError(f"synthetic.draw: root must be an empty folder, got {root}")
    rng = Random(f"benchmark {split} {seed}")
    drawn: dict[str, list[Scene]] = {}
    for subtask in topics.SUBTASKS:
        drawn[subtask] = []
        lines = []
        for index in range(images_per_subtask):
            which = index % 2
            if which == 0:
                topic = topics.pose(subtask, rng)
            drawn[subtask].append(compose_in(split, rng, topic, which)[0])
            lines.append(_lines(topic, which))
        _write_subtask(root / subtask, drawn[subtask], lines, rng.getrandbits(32))
    return drawn


def training_rows(
    root: str | Path, *, images: int, seed: int, split: str = "train", questions_per_image: int = 18
) -> list[dict]:
    """Draw training images into `root/images` and LLaVA-style rows into `root/train.json`.

    Every image has up to 18 questions, three of each subtask: its two yes/no questions in the very
    words of the benchmark and an open-ended one. `questions_per_image` of them are kept, balanced
    over the subtasks. A row is one question:
    `{"id", "image": "images/00000.png", "subtask", "conversations": [{"from": "human", "value":
    "<image>\\n..."}, {"from": "gpt", "value": ...}]}`; the rows of one image follow each other.

    Raises:
        ValueError: a number out of range or an unknown split.
    """
    root = Path(root)
    _check(images, "images", split)
    if not 1 <= questions_per_image <= 3 * len(topics.SUBTASKS):
        raise ValueError(
            f"synthetic.training_rows: questions_per_image must be between 1 and "
            f"{3 * len(topics.SUBTASKS)}, got {questions_per_image}"
        )
    rng = Random(f"rows {split} {seed}")
    drawn = [compose_in(split, rng) for _ in range(images)]
    names = [f"images/{index:05d}.png" for index in range(images)]
    _save(root, names, [scene for scene, _ in drawn], rng.getrandbits(32))
    rows = [
        _row(f"{index:05d}-{number:02d}", name, question)
        for index, (name, (_, facts)) in enumerate(zip(names, drawn, strict=True))
        for number, question in enumerate(_balanced(facts, questions_per_image, rng))
    ]
    (root / "train.json").write_text(json.dumps(rows, indent=1) + "\n")
    return rows


def _check(images: int, name: str, split: str) -> None:
    if images < 1:
        raise ValueError(f"synthetic: {name} must be at least 1, got {images}")
    if split not in SPLITS:
        raise ValueError(f"synthetic: split must be one of {', '.join(SPLITS)}, got {split!r}")


def _balanced(facts: list[Fact], count: int, rng: Random) -> list[topics.Question]:
    """`count` questions whose numbers a subtask differ by at most one."""
    left: dict[str, list[topics.Question]] = {subtask: [] for subtask in topics.SUBTASKS}
    for question in questions(facts, rng):
        left[question.subtask].append(question)
    order = [left[s] for _ in range(3) for s in rng.sample(topics.SUBTASKS, len(topics.SUBTASKS))]
    return [questions.pop() for questions in order[:count]]


def _row(identifier: str, image: str, question: topics.Question) -> dict:
    return {
        "id": identifier,
        "image": image,
        "subtask": question.subtask,
        "conversations": [
            {"from": "human", "value": f"<image>\n{question.text}"},
            {"from": "gpt", "value": question.answer},
        ],
    }


def _lines(topic: topics.Topic, which: int) -> str:
    """The question that is true first, as in MME."""
    yes, no = topic.questions[which], topic.questions[1 - which]
    return f"{yes}{topics.SUFFIX}\tYes\n{no}{topics.SUFFIX}\tNo\n"


def _write_subtask(folder: Path, drawn: list[Scene], lines: list[str], seed: int) -> None:
    digits = max(3, len(str(len(drawn) - 1)))
    names = [f"{index:0{digits}d}" for index in range(len(drawn))]
    _save(folder, [f"{name}.png" for name in names], drawn, seed)
    for name, text in zip(names, lines, strict=True):
        (folder / f"{name}.txt").write_text(text)


def _save(root: Path, names: list[str], drawn: list[Scene], seed: int) -> None:
    for name, pixels in zip(names, drawing.render(drawn, seed), strict=True):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
