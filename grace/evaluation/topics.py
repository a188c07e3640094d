"""The six subtasks of the synthetic benchmark: what is asked, in which words.

A `Topic` is one subtask's pair of questions, exactly one of them true in a scene. Which of the two
it is does not depend on the topic, so the words alone say nothing about the answer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from .drawing import LETTERS, SHAPE_COLORS, SHAPES

SUBTASKS = ("existence", "count", "position", "color", "OCR", "numerical_calculation")
SUFFIX = " Please answer yes or no."
NUMBERS = ("one", "two", "three", "four")
SUMS = tuple(range(3, 10))


@dataclass(frozen=True)
class Topic:
    """Two questions of one subtask, exactly one of them true in a scene.

    `values[i]` is what has to hold for question i to be true; `shapes` are the shapes it is about.
    `open_question` has the answer `open_answers[i]` where question i is true.
    """

    subtask: str
    shapes: tuple[str, ...]
    values: tuple[str, str]
    questions: tuple[str, str]
    open_question: str
    open_answers: tuple[str, str]


@dataclass(frozen=True)
class Question:
    """A question about one scene with its answer."""

    subtask: str
    text: str
    answer: str


def plural(shape: str) -> str:
    """The name of several such shapes."""
    return shape + ("es" if shape.endswith("s") else "s")


def _count_question(number: str, shape: str) -> str:
    many = f"Are there {number} {plural(shape)} in this image?"
    return f"Is there one {shape} in this image?" if number == "one" else many


def _existence(rng: Random, shapes: list[str]) -> Topic:
    first, second = shapes.pop(), shapes.pop()
    return Topic(
        "existence",
        (first, second),
        (first, second),
        (f"Is there a {first} in this image?", f"Is there a {second} in this image?"),
        f"Is there a {first} or a {second} in this image?",
        (first, second),
    )


def _count(rng: Random, shapes: list[str]) -> Topic:
    shape = shapes.pop()
    first, second = rng.sample(NUMBERS, 2)
    return Topic(
        "count",
        (shape,),
        (first, second),
        (_count_question(first, shape), _count_question(second, shape)),
        f"How many {plural(shape)} are there in this image?",
        (first, second),
    )


def _position(rng: Random, shapes: list[str]) -> Topic:
    one, other = shapes.pop(), shapes.pop()
    sides = ["left", "right"] if rng.random() < 0.5 else ["above", "below"]
    words = {"left": "on the left of", "right": "on the right of"}
    rng.shuffle(sides)
    texts = [f"Is the {one} {words.get(s, s)} the {other} in this image?" for s in sides]
    choice = "on the left or on the right of" if "left" in sides else "above or below"
    return Topic(
        "position",
        (one, other),
        (sides[0], sides[1]),
        (texts[0], texts[1]),
        f"Is the {one} {choice} the {other} in this image?",
        (sides[0], sides[1]),
    )


def _color(rng: Random, shapes: list[str]) -> Topic:
    shape = shapes.pop()
    first, second = rng.sample(SHAPE_COLORS, 2)
    return Topic(
        "color",
        (shape,),
        (first, second),
        (f"Is the {shape} {first} in this image?", f"Is the {shape} {second} in this image?"),
        f"What color is the {shape} in this image?",
        (first, second),
    )


def _ocr(rng: Random, shapes: list[str]) -> Topic:
    """Two texts that differ in one letter, or in the order of their letters."""
    left, right, new = rng.sample(LETTERS, 3)
    first = f"{left} {right}"
    second = rng.choice((f"{left} {new}", f"{new} {right}", f"{right} {left}"))
    return Topic(
        "OCR",
        (),
        (first, second),
        (f"Is the text in this image {first}?", f"Is the text in this image {second}?"),
        "What is the text in this image?",
        (first, second),
    )


def _numerical_calculation(rng: Random, shapes: list[str]) -> Topic:
    """Two sums at most two apart, so that one of the digits alone says little."""
    first = rng.choice(SUMS)
    second = rng.choice([s for s in SUMS if 0 < abs(s - first) <= 2])
    values = (str(first), str(second))
    text = "Is the answer to the sum in this image {}?"
    return Topic(
        "numerical_calculation",
        (),
        values,
        (text.format(first), text.format(second)),
        "What is the answer to the sum in this image?",
        values,
    )


_POSE: dict[str, Callable[[Random, list[str]], Topic]] = {
    "existence": _existence,
    "count": _count,
    "position": _position,
    "color": _color,
    "OCR": _ocr,
    "numerical_calculation": _numerical_calculation,
}


def pose(subtask: str, rng: Random, shapes: list[str] | None = None) -> Topic:
    """A random topic of one subtask; the shapes it is about are taken from the end of `shapes`."""
    return _POSE[subtask](rng, rng.sample(SHAPES, len(SHAPES)) if shapes is None else shapes)
