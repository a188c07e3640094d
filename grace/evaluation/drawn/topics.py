"""What is asked: pairs of questions of which exactly one is true in a picture.

Which of the two it is never depends on the topic, so that words alone say nothing about answers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import combinations, product
from random import Random
from typing import Any

from ..topics import SUFFIX, plural
from .levels import LEVELS
from .programs import Program, calculation, program
from .vocabulary import (
    ADJECTIVES,
    COLORS,
    CONDITIONS,
    NOUNS,
    PLACES,
    SHAPES,
    Composition,
    english,
    may_ask,
    word,
)

SUBTASKS = (
    "existence",
    "count",
    "position",
    "color",
    "scene",
    "OCR",
    "numerical_calculation",
    "text_translation",
    "code_reasoning",
)


@dataclass(frozen=True)
class Topic:
    """Two questions of one subtask, exactly one of them true in a scene.

    `facts[i]` is what a scene has to show for question i to be true, `asked[i]` the composition
    that question i is about. `open_question` has the answer `open_answers[i]` where question i is
    true. `about` are the shapes that both questions name, of a count the color and the shape.
    """

    subtask: str
    facts: tuple[Any, Any]
    asked: tuple[Composition, Composition]
    questions: tuple[str, str]
    open_question: str
    open_answers: tuple[str, str]
    about: tuple[str, ...] = ()


def _with_article(name: str) -> str:
    return f"a{'n' * (name[0] == 'o')} {name}"


def ask_existence(color: str, shape: str) -> str:
    """Whether such a shape is there."""
    return f"Is there {_with_article(f'{color} {shape}')} in this image?"


def ask_count(color: str, shape: str) -> str:
    """How many such shapes are there; of all colors where `color` is empty."""
    return f"How many {f'{color} {plural(shape)}'.lstrip()} are there in this image?"


def ask_color(shape: str) -> str:
    """The color of the only such shape."""
    return f"What color is the {shape} in this image?"


def ask_position(one: str, side: str, other: str) -> str:
    """Whether one shape lies on a side (left, right, above, below) of another."""
    words = {"left": "on the left of", "right": "on the right of"}
    return f"Is the {one} {words.get(side, side)} the {other} in this image?"


def landscape_named(place: str, condition: str) -> str:
    """A landscape in words."""
    return f"{_place_named(place)} {CONDITIONS[condition]}"


def _place_named(place: str) -> str:
    return "mountains" if place == "mountain" else f"a {place}"


def ask_landscape(place: str, condition: str) -> str:
    """Whether the landscape is this one."""
    return f"Does this image show {landscape_named(place, condition)}?"


def ask_place(place: str) -> str:
    """Whether the landscape is there, whatever the sky."""
    return f"Does this image show {_place_named(place)}?"


def ask_condition(condition: str) -> str:
    """Whether the landscape is under this sky."""
    return f"Does this image show a place {CONDITIONS[condition]}?"


def ask_result(kind: str, number: int) -> str:
    """Whether `number` comes out of the "sum" or "program"."""
    if kind == "sum":
        return f"Is the answer to the calculation in this image {number}?"
    return f"The image shows Python code. Is its output {number}?"


def ask_translation(noun: str, adjective: str) -> str:
    """Whether the French means this."""
    name = english(noun, adjective)
    return f'Is it right to translate the French in this image into English as "{name}"?'


@cache
def _pairs(kind: str, split: str) -> tuple[tuple[Any, Any], ...]:
    """All compositions of two parts that `split` asks about."""
    parts: dict[str, tuple[Any, Any]] = {
        "color": (COLORS, SHAPES),
        "scene": (PLACES, CONDITIONS),
        "translation": (NOUNS, ADJECTIVES),
    }
    every = combinations(SHAPES, 2) if kind == "position" else product(*parts[kind])
    return tuple(pair for pair in every if may_ask((kind, *pair), split))


def _existence(level: str, split: str, rng: Random) -> Topic:
    one = rng.choice(_pairs("color", split))
    other = rng.choice([p for p in _pairs("color", split) if p[0] != one[0] and p[1] != one[1]])
    names = [" ".join(pair) for pair in (one, other)]
    first, second = (_with_article(name) for name in names)
    return Topic(
        "existence",
        (one, other),
        (("color", *one), ("color", *other)),
        (ask_existence(*one), ask_existence(*other)),
        f"Is there {first} or {second} in this image?",
        (names[0], names[1]),
    )


def _count(level: str, split: str, rng: Random) -> Topic:
    """Of a color and shape that training shows; how many of them is what may be held out."""
    numbers = _numbers_of(level, split)
    color, shape = rng.choice(sorted(numbers))
    one = rng.choice(numbers[color, shape])
    near = sorted((n for n in numbers[color, shape] if n != one), key=lambda n: abs(n - one))
    other = rng.choice([n for n in near if abs(n - one) <= max(2, abs(near[0] - one))])

    def text(n: int) -> str:
        return f"{'Is' if n == 1 else 'Are'} there {n} {color} {shape if n == 1 else plural(shape)}"

    return Topic(
        "count",
        (one, other),
        (("count", one, color, shape), ("count", other, color, shape)),
        (f"{text(one)} in this image?", f"{text(other)} in this image?"),
        ask_count(color, shape),
        (str(one), str(other)),
        (color, shape),
    )


@cache
def _numbers_of(level: str, split: str) -> dict[tuple[str, str], list[int]]:
    """Numbers that `split` asks about, of every color and shape of which there is more than one."""
    every = range(1, LEVELS[level].count + 1)
    found = {
        pair: [n for n in every if may_ask(("count", n, *pair), split)]
        for pair in _pairs("color", "train")
    }
    return {pair: numbers for pair, numbers in found.items() if len(numbers) > 1}


def _position(level: str, split: str, rng: Random) -> Topic:
    pair = rng.choice(_pairs("position", split))
    one, other = rng.sample(pair, 2)
    sides = ["left", "right"] if rng.random() < 0.5 else ["above", "below"]
    choice = "on the left or on the right of" if "left" in sides else "above or below"
    rng.shuffle(sides)
    texts = [ask_position(one, side, other) for side in sides]
    return Topic(
        "position",
        (sides[0], sides[1]),
        (("position", one, other), ("position", one, other)),
        (texts[0], texts[1]),
        f"Is the {one} {choice} the {other} in this image?",
        (sides[0], sides[1]),
        (one, other),
    )


def _color(level: str, split: str, rng: Random) -> Topic:
    shape = rng.choice(SHAPES)
    one, other = rng.sample([c for c, s in _pairs("color", split) if s == shape], 2)
    return Topic(
        "color",
        (one, other),
        (("color", one, shape), ("color", other, shape)),
        (f"Is the {shape} {one} in this image?", f"Is the {shape} {other} in this image?"),
        ask_color(shape),
        (one, other),
        (shape,),
    )


def _near(kind: str, split: str, rng: Random) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """Two compositions that have one part in common."""
    one = rng.choice(_pairs(kind, split))
    near = [p for p in _pairs(kind, split) if (p[0] == one[0]) != (p[1] == one[1])]
    return one, rng.choice(near)


def _scene(level: str, split: str, rng: Random) -> Topic:
    one, other = _near("scene", split, rng)
    names = [landscape_named(*pair) for pair in (one, other)]
    return Topic(
        "scene",
        (one, other),
        (("scene", *one), ("scene", *other)),
        (ask_landscape(*one), ask_landscape(*other)),
        "What does this image show?",
        (names[0], names[1]),
    )


def _ocr(level: str, split: str, rng: Random) -> Topic:
    """Two words that differ in one letter, at level "easy" in all they like."""
    letters = rng.randint(*LEVELS[level].letters)
    one = other = ""
    while one == other or not (may_ask(("OCR", one), split) and may_ask(("OCR", other), split)):
        one, other = word(rng, letters), word(rng, letters)
        if level != "easy":
            place = rng.randrange(letters)
            other = one[:place] + rng.choice("ABDEFGIKLMNOPRSTUVZ") + one[place + 1 :]
    return Topic(
        "OCR",
        (one, other),
        (("OCR", one), ("OCR", other)),
        (f"Is the word in this image {one}?", f"Is the word in this image {other}?"),
        "What is the word in this image?",
        (one, other),
    )


def _numbers(
    draw: Callable[[str, Random], Program], kind: str, level: str, split: str, rng: Random
) -> tuple[Program, Program]:
    """Two programs with different results, at most six apart."""
    while True:
        one = draw(level, rng)
        if may_ask((kind, one[0]), split):
            break
    for _ in range(2000):
        other = draw(level, rng)
        if 0 < abs(other[1] - one[1]) <= 6 and may_ask((kind, other[0]), split):
            return one, other
    return _numbers(draw, kind, level, split, rng)  # nothing is near `one`


def _numerical_calculation(level: str, split: str, rng: Random) -> Topic:
    one, other = _numbers(calculation, "sum", level, split, rng)
    return Topic(
        "numerical_calculation",
        (one[0], other[0]),
        (("sum", one[0]), ("sum", other[0])),
        (ask_result("sum", one[1]), ask_result("sum", other[1])),
        "What is the answer to the calculation in this image?",
        (str(one[1]), str(other[1])),
    )


def _code_reasoning(level: str, split: str, rng: Random) -> Topic:
    one, other = _numbers(program, "program", level, split, rng)
    return Topic(
        "code_reasoning",
        (one[0], other[0]),
        (("program", one[0]), ("program", other[0])),
        (ask_result("program", one[1]), ask_result("program", other[1])),
        "The image shows Python code. What is its output?",
        (str(one[1]), str(other[1])),
    )


def _text_translation(level: str, split: str, rng: Random) -> Topic:
    one, other = _near("translation", split, rng)
    names = (english(*one), english(*other))
    return Topic(
        "text_translation",
        (one, other),
        (("translation", *one), ("translation", *other)),
        (ask_translation(*one), ask_translation(*other)),
        "What is the French in this image in English?",
        names,
    )


_POSE: dict[str, Callable[[str, str, Random], Topic]] = {
    "existence": _existence,
    "count": _count,
    "position": _position,
    "color": _color,
    "scene": _scene,
    "OCR": _ocr,
    "numerical_calculation": _numerical_calculation,
    "text_translation": _text_translation,
    "code_reasoning": _code_reasoning,
}


def pose(subtask: str, level: str, split: str, rng: Random) -> Topic:
    """A random topic; about held-out compositions if and only if `split` is "heldout"."""
    return _POSE[subtask](level, split, rng)


def worded(question: str) -> str:
    """The yes/no question as it stands in a file."""
    return question + SUFFIX
