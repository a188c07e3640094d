"""Scenes in which one question of a topic is true and the other is not."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from .levels import LEVELS, level_named
from .scenes import WIDTH, Fixed, Scene, compositions, scatter
from .topics import Topic
from .vocabulary import COLORS, SHAPES, french, held_out, may_show

Thing = tuple[str, str]  # shape, color


def compose(topic: Topic, which: int, level: str, split: str, rng: Random) -> Scene:
    """A scene of which question `which` of `topic` is true; training splits show nothing held out.

    Raises ValueError for an unknown level.
    """
    level_named(level)
    while True:
        scene = _COMPOSE[topic.subtask](topic, which, level, split, rng)
        if split == "heldout" or not any(map(held_out, compositions(scene))):
            return scene


def _color_for(shape: str, split: str, rng: Random, but: tuple[str, ...] = ()) -> str:
    colors = [c for c in COLORS if c not in but and may_show(("color", c, shape), split)]
    return rng.choice(colors)


def _fillers(count: int, split: str, rng: Random, but: tuple[str, ...]) -> list[Thing]:
    """Shapes that are not asked about, at most two of each."""
    shapes = rng.sample([s for s in SHAPES if s not in but] * 2, count)
    return [(shape, _color_for(shape, split, rng)) for shape in shapes]


def _number_of_items(level: str, rng: Random) -> int:
    """Drawn before anything else: how full a picture is says nothing about its answer."""
    return rng.randint(*LEVELS[level].items)


def _existence(topic: Topic, which: int, level: str, split: str, rng: Random) -> Scene:
    """The pair asked about, and both colors and both shapes as often as those of the absent pair.

    Each of the two shapes stands there twice, each of the two colors on other shapes too: only
    the composition tells.
    """
    count = _number_of_items(level, rng)
    (color, shape), (absent_color, absent_shape) = topic.facts[which], topic.facts[1 - which]
    things = [(shape, color), (shape, _color_for(shape, split, rng, (color,)))]
    others_of_absent = (_color_for(absent_shape, split, rng, (absent_color,)) for _ in range(2))
    things += [(absent_shape, other) for other in others_of_absent]
    others = [s for s in SHAPES if s not in (shape, absent_shape)]
    for wanted in (color, absent_color, absent_color):
        carriers = [s for s in others if may_show(("color", wanted, s), split)]
        carrier = rng.choice(carriers)
        others.remove(carrier)
        things.append((carrier, wanted))
    used = tuple(shape for shape, _ in things)
    things += _fillers(count - len(things), split, rng, used)
    return _shapes(things, level, rng)


def _count(topic: Topic, which: int, level: str, split: str, rng: Random) -> Scene:
    """As many as are counted, and up to two of their shape in other colors."""
    (color, shape), number = topic.about, topic.facts[which]
    count = max(_number_of_items(level, rng), LEVELS[level].count + 1)
    things = [(shape, color)] * number
    others = min(rng.randint(0, 2), count - number)
    things += [(shape, _color_for(shape, split, rng, (color,))) for _ in range(others)]
    return _shapes(things + _fillers(count - len(things), split, rng, (shape,)), level, rng)


def _position(topic: Topic, which: int, level: str, split: str, rng: Random) -> Scene:
    """The two shapes some way apart along the axis that is asked about, any way along the other."""
    side, reach = topic.facts[which], LEVELS[level].radius[1]
    distance = rng.uniform(2 * reach + 4, 2 * reach + 70)
    first = rng.uniform(reach, WIDTH - reach - distance)
    along = (first, first + distance)
    if side in ("right", "below"):
        along = along[::-1]
    across = (rng.uniform(reach, WIDTH - reach), rng.uniform(reach, WIDTH - reach))
    places = list(zip(along, across, strict=True))
    if side in ("above", "below"):
        places = [(x, y) for y, x in places]
    fixed = [
        (shape, _color_for(shape, split, rng), place)
        for shape, place in zip(topic.about, places, strict=True)
    ]
    count = _number_of_items(level, rng) - len(fixed)
    return _shapes(_fillers(count, split, rng, topic.about), level, rng, fixed)


def _color(topic: Topic, which: int, level: str, split: str, rng: Random) -> Scene:
    """The shape asked about once; both colors asked about are on other shapes as well."""
    count = _number_of_items(level, rng)
    (shape,) = topic.about
    things = [(shape, topic.facts[which])]
    others = [s for s in SHAPES if s != shape]
    for wanted in (topic.facts[which], topic.facts[1 - which], topic.facts[1 - which]):
        carrier = rng.choice([s for s in others if may_show(("color", wanted, s), split)])
        others.remove(carrier)
        things.append((carrier, wanted))
    used = tuple(name for name, _ in things)
    return _shapes(things + _fillers(count - len(things), split, rng, used), level, rng)


def _shapes(
    things: list[Thing], level: str, rng: Random, fixed: list[Fixed] | None = None
) -> Scene:
    rng.shuffle(things)
    items = scatter(things, LEVELS[level], rng, fixed)
    return Scene(level, rng.getrandbits(32), items)


def _landscape(topic: Topic, which: int, level: str, split: str, rng: Random) -> Scene:
    place, condition = topic.facts[which]
    return Scene(level, rng.getrandbits(32), place=place, condition=condition)


def _text(kind: str) -> Callable[[Topic, int, str, str, Random], Scene]:
    def compose(topic: Topic, which: int, level: str, split: str, rng: Random) -> Scene:
        """The text in front of shapes, of which there are more at higher levels."""
        fact = topic.facts[which]
        phrase = fact if kind == "translation" else None
        number = {"easy": 0, "medium": 4, "hard": 8}[level]
        items = scatter(_fillers(number, split, rng, ()), LEVELS[level], rng)
        text = french(*phrase) if phrase else fact
        return Scene(level, rng.getrandbits(32), items, text, kind, phrase)

    return compose


_COMPOSE: dict[str, Callable[[Topic, int, str, str, Random], Scene]] = {
    "existence": _existence,
    "count": _count,
    "position": _position,
    "color": _color,
    "scene": _landscape,
    "OCR": _text("OCR"),
    "numerical_calculation": _text("sum"),
    "text_translation": _text("translation"),
    "code_reasoning": _text("program"),
}
