"""What a picture shows, in words and numbers: everything that is drawn follows from a `Scene`."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from dataclasses import dataclass
from random import Random

from .levels import Level
from .vocabulary import Composition

WIDTH = 336  # a scene is 336 x 336 units, whatever the size of its picture
TEXT_KINDS = ("OCR", "translation", "sum", "program")


@dataclass(frozen=True)
class Item:
    """A shape: its center (x, y), half its width, rotation in degrees."""

    shape: str
    color: str
    x: float
    y: float
    radius: float
    angle: float


@dataclass(frozen=True)
class Scene:
    """One picture: shapes, a text or a landscape (`place`, `condition`); later items are on top.

    `kind` says what the text is (of `TEXT_KINDS`), empty where there is none; `phrase` is the
    noun and adjective of a text to be translated. `seed` decides noise, strokes, fonts and
    whatever else is no fact.
    """

    level: str
    seed: int
    items: tuple[Item, ...] = ()
    text: str = ""
    kind: str = ""
    phrase: tuple[str, str] | None = None
    place: str = ""
    condition: str = ""


def compositions(scene: Scene) -> set[Composition]:
    """All compositions of colors, counts, texts and landscapes that a picture shows.

    Which shapes stand beside each other is left out: every picture shows many pairs, and only
    being asked about is held out.
    """
    shown: set[Composition] = {("color", item.color, item.shape) for item in scene.items}
    alike = Counter((item.color, item.shape) for item in scene.items)
    shown |= {("count", number, *kind) for kind, number in alike.items()}
    if scene.phrase:
        shown.add(("translation", *scene.phrase))
    elif scene.kind:
        shown.add((scene.kind, scene.text))
    if scene.place:
        shown.add(("scene", scene.place, scene.condition))
    return shown


def digest(scene: Scene) -> str:
    """SHA-256 of everything a scene says."""
    return hashlib.sha256(repr(scene).encode()).hexdigest()


Fixed = tuple[str, str, tuple[float, float]]  # shape, color, where its center is


def scatter(
    things: list[tuple[str, str]], level: Level, rng: Random, fixed: list[Fixed] | None = None
) -> tuple[Item, ...]:
    """Shapes in (shape, color) at random places, `fixed` ones where they are told to be.

    Shapes keep `level.spacing` from each other; where they do not fit, they become smaller.
    """
    shrink = 1.0
    while True:
        items = _try(things, level, rng, fixed or [], shrink)
        if items is not None:
            rng.shuffle(items)  # which one covers which
            return tuple(items)
        shrink *= 0.95


def _try(
    things: list[tuple[str, str]], level: Level, rng: Random, fixed: list[Fixed], shrink: float
) -> list[Item] | None:
    items: list[Item] = []
    for shape, color, center in fixed:
        items.append(_item(shape, color, center, level, rng, shrink))
    for shape, color in things:
        for _ in range(60):
            reach = level.radius[1]
            center = (rng.uniform(reach, WIDTH - reach), rng.uniform(reach, WIDTH - reach))
            item = _item(shape, color, center, level, rng, shrink)
            if all(_apart(item, other, level.spacing) for other in items):
                items.append(item)
                break
        else:
            return None
    return items


def _item(
    shape: str, color: str, center: tuple[float, float], level: Level, rng: Random, shrink: float
) -> Item:
    radius = shrink * rng.uniform(*level.radius)
    angle = rng.uniform(-level.angle, level.angle)
    return Item(shape, color, round(center[0], 1), round(center[1], 1), round(radius, 1), angle)


def _apart(one: Item, other: Item, spacing: float) -> bool:
    distance = math.hypot(one.x - other.x, one.y - other.y)
    return distance >= spacing * (one.radius + other.radius)
