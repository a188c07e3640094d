"""Training examples without end: example i of a seed is drawn when it is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from PIL import Image

from ..topics import Question
from .composing import compose
from .levels import LEVELS, level_named
from .rendering import render
from .scenes import WIDTH, Scene
from .topics import SUBTASKS, Topic, pose, worded
from .vocabulary import SPLITS


@dataclass(frozen=True)
class Example:
    """One picture and what is asked about it: two yes/no questions and an open one, shuffled."""

    index: int
    scene: Scene
    questions: tuple[Question, ...]

    def picture(self, pixels: int = WIDTH) -> Image.Image:
        """The picture, drawn now; the same each time."""
        return render(self.scene, pixels)

    def rows(self, image: str) -> list[dict[str, Any]]:
        """LLaVA rows, one a question, about the picture in file `image`."""
        return [
            {
                "id": f"{self.index:07d}-{number}",
                "image": image,
                "subtask": question.subtask,
                "level": self.scene.level,
                "conversations": [
                    {"from": "human", "value": f"<image>\n{question.text}"},
                    {"from": "gpt", "value": question.answer},
                ],
            }
            for number, question in enumerate(self.questions)
        ]


class Examples:
    """`Examples(seed)[i]` is an `Example`, for every i from 0 on; nothing is kept.

    Subtasks take turns, levels are drawn. An example depends on (seed, split, levels, i) alone, so
    any process may draw any part.

    Args:
        seed: everything is drawn from it.
        levels: names of `LEVELS` to draw from.
        split: "train" and "validation" never show or name a held-out composition and never share
            a seed; "heldout" asks about held-out compositions only.

    Raises:
        ValueError: an unknown level or split, or a negative index.
    """

    def __init__(
        self, seed: int, levels: Sequence[str] = tuple(LEVELS), split: str = "train"
    ) -> None:
        if not levels:
            raise ValueError(f"drawn: levels must name some of {', '.join(LEVELS)}, got none")
        for level in levels:
            level_named(level)
        check_split(split)
        self.seed, self.levels, self.split = seed, tuple(levels), split

    def __getitem__(self, index: int) -> Example:
        if index < 0:
            raise ValueError(f"drawn.Examples: index must be at least 0, got {index}")
        rng = Random(f"drawn rows {self.split} {self.seed} {index}")
        subtask, level = SUBTASKS[index % len(SUBTASKS)], rng.choice(self.levels)
        topic, which = pose(subtask, level, self.split, rng), rng.randrange(2)
        scene = compose(topic, which, level, self.split, rng)
        return Example(index, scene, _questions(topic, which, rng))


def check_split(split: str) -> None:
    """ValueError for a split that is none."""
    if split not in SPLITS:
        raise ValueError(f"drawn: split must be one of {', '.join(SPLITS)}, got {split!r}")


def _questions(topic: Topic, which: int, rng: Random) -> tuple[Question, ...]:
    asked = [
        Question(topic.subtask, worded(text), "Yes" if index == which else "No")
        for index, text in enumerate(topic.questions)
    ]
    asked.append(Question(topic.subtask, topic.open_question, topic.open_answers[which]))
    rng.shuffle(asked)
    return tuple(asked)
