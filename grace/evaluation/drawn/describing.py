"""What a model that starts from nothing learns beside the benchmark's own questions.

A yes/no question rewards a model only once it finds, reads and compares. A *description* rewards
each of these alone: it names every shape with its color and place, spells a text, or names a
landscape. *Further questions* ask the same picture more, in the benchmark's words, and of a
landscape about its place and its sky alone. Neither names a held-out composition.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from random import Random

from ..topics import SUFFIX
from .examples import Example
from .scenes import WIDTH, Scene
from .topics import (
    ask_color,
    ask_condition,
    ask_count,
    ask_existence,
    ask_landscape,
    ask_place,
    ask_position,
    ask_result,
    ask_translation,
    landscape_named,
)
from .vocabulary import ADJECTIVES, COLORS, CONDITIONS, NOUNS, PLACES, may_ask

DESCRIBE = "Describe this image."
GRID = 10  # columns and rows that places are told in, 0 to 9
_SIDES = {"left": "right", "right": "left", "above": "below", "below": "above"}
_LETTERS = "ABDEFGIKLMNOPRSTUVZ"
_Asked = tuple[str, str]  # question, answer


def description(scene: Scene) -> str:
    """`0 3 red star 4 7 blue ring` (row, column, what is there; in reading order), `text : CHAT`,
    or a landscape.

    The place comes first, so that color and shape only have to be looked up there.
    """
    if scene.place:
        return landscape_named(scene.place, scene.condition)
    if scene.text:
        return "text : " + scene.text.replace("\n", " ; ")
    cells = [(int(GRID * i.y / WIDTH), int(GRID * i.x / WIDTH), i) for i in scene.items]
    cells.sort(key=lambda cell: cell[:2])
    return " ".join(f"{y} {x} {item.color} {item.shape}" for y, x, item in cells)


def further_questions(example: Example, count: int, rng: Random) -> list[_Asked]:
    """`count` more questions about a training example and their answers; half of all yes/no
    answers are yes, whatever the words."""
    scene = example.scene
    if scene.items and not scene.text:
        return [rng.choice(_ABOUT_SHAPES)(scene, rng) for _ in range(count)]
    return [_about_rest(example, rng) for _ in range(count)]


def _yes_no(text: str, true: bool) -> _Asked:
    return text + SUFFIX, "Yes" if true else "No"


def _about_rest(example: Example, rng: Random) -> _Asked:
    """A text or a landscape: the truth, or something near it."""
    scene, true = example.scene, rng.random() < 0.5
    if scene.place:
        return _about_landscape(scene, true, rng)
    if scene.phrase:
        return _yes_no(ask_translation(*_or_near("translation", scene.phrase, true, rng)), true)
    if scene.kind == "OCR":
        word = scene.text if true else _other_word(scene.text, rng)
        return _yes_no(f"Is the word in this image {word}?", true)
    result = int(next(q.answer for q in example.questions if q.answer not in ("Yes", "No")))
    steps = [step for step in range(-6, 7) if step and result + step >= 0]
    return _yes_no(ask_result(scene.kind, result + (0 if true else rng.choice(steps))), true)


def _about_landscape(scene: Scene, true: bool, rng: Random) -> _Asked:
    """Place and sky, or one of them."""
    about = rng.randrange(3)
    if about == 0:
        other = [place for place in PLACES if place != scene.place]
        return _yes_no(ask_place(scene.place if true else rng.choice(other)), true)
    if about == 1:
        skies = [sky for sky in CONDITIONS if sky != scene.condition]
        return _yes_no(ask_condition(scene.condition if true else rng.choice(skies)), true)
    fact = (scene.place, scene.condition)
    return _yes_no(ask_landscape(*_or_near("scene", fact, true, rng)), true)


def _or_near(kind: str, fact: tuple[str, str], true: bool, rng: Random) -> tuple[str, str]:
    """`fact`, or another that shares a part with it."""
    first, second = (PLACES, CONDITIONS) if kind == "scene" else (NOUNS, ADJECTIVES)
    others = [(part, fact[1]) for part in first if part != fact[0]]
    others += [(fact[0], part) for part in second if part != fact[1]]
    return fact if true else rng.choice([o for o in others if may_ask((kind, *o), "train")])


def _other_word(word: str, rng: Random) -> str:
    while True:
        place = rng.randrange(len(word))
        other = word[:place] + rng.choice(_LETTERS) + word[place + 1 :]
        if other != word and may_ask(("OCR", other), "train"):
            return other


def _single(scene: Scene) -> list[str]:
    counts = Counter(item.shape for item in scene.items)
    return sorted(shape for shape, number in counts.items() if number == 1)


def _count(scene: Scene, rng: Random) -> _Asked:
    """Of a color and shape, or of a shape in all colors."""
    if rng.random() < 0.5:
        alike = Counter((item.color, item.shape) for item in scene.items)
        color, shape = rng.choice(sorted(alike))
        return ask_count(color, shape), str(alike[color, shape])
    counts = Counter(item.shape for item in scene.items)
    shape = rng.choice(sorted(counts))
    return ask_count("", shape), str(counts[shape])


def _color(scene: Scene, rng: Random) -> _Asked:
    single = _single(scene)
    if not single:
        return _count(scene, rng)
    shape = rng.choice(single)
    return ask_color(shape), next(item.color for item in scene.items if item.shape == shape)


def _existence(scene: Scene, rng: Random) -> _Asked:
    """A pair that is there, or one of its shape or color that is not."""
    shown = sorted({(item.color, item.shape) for item in scene.items})
    color, shape = rng.choice(shown)
    if rng.random() < 0.5:
        return _yes_no(ask_existence(color, shape), True)
    shapes = sorted({shape for _, shape in shown})
    near = [(c, shape) for c in COLORS] + [(color, s) for s in shapes]
    absent = [p for p in near if p not in shown and may_ask(("color", *p), "train")]
    return _yes_no(ask_existence(*rng.choice(absent)), False) if absent else _count(scene, rng)


def _position(scene: Scene, rng: Random) -> _Asked:
    """Two shapes that stand clearly apart along the axis asked about."""
    single = {item.shape: item for item in scene.items if item.shape in _single(scene)}
    pairs = [
        (one, other, axis)
        for one in single
        for other in single
        for axis in "xy"
        if abs(getattr(single[one], axis) - getattr(single[other], axis)) > WIDTH / 8
        and may_ask(("position", one, other), "train")
    ]
    if not pairs:
        return _existence(scene, rng)
    one, other, axis = rng.choice(sorted(pairs))
    before = getattr(single[one], axis) < getattr(single[other], axis)
    side = {"x": ("right", "left"), "y": ("below", "above")}[axis][before]
    true = rng.random() < 0.5
    return _yes_no(ask_position(one, side if true else _SIDES[side], other), true)


_ABOUT_SHAPES: tuple[Callable[[Scene, Random], _Asked], ...] = (
    _existence,
    _count,
    _position,
    _color,
)
