"""The three levels of difficulty: how much a picture shows and how well."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Level:
    """Ranges from which a scene is drawn; lengths in units of a picture 336 units wide.

    items: shapes in a picture, least and most; radius: of a shape, smallest and largest.
    spacing: two shapes' centers are at least this times the sum of their radii apart; below 1 they
    may cover each other. count: largest number asked for. angle: largest rotation in degrees.
    noise: standard deviation of the noise of a pixel (of 255). clutter: strokes behind everything.
    bars: strokes over everything. fonts: how many of the fonts are used. letters: of a word, least
    and most. text: height of the letters, smallest and largest.
    """

    items: tuple[int, int]
    radius: tuple[int, int]
    spacing: float
    count: int
    angle: float
    noise: float
    clutter: int
    bars: int
    fonts: int
    letters: tuple[int, int]
    text: tuple[int, int]


LEVELS = {
    "easy": Level((8, 9), (28, 36), 1.1, 5, 0, 3, 0, 0, 1, (3, 4), (40, 48)),
    "medium": Level((10, 12), (22, 32), 0.95, 6, 15, 8, 12, 2, 4, (4, 6), (30, 42)),
    "hard": Level((13, 15), (16, 28), 0.8, 9, 25, 12, 30, 5, 10, (5, 8), (24, 34)),
}


def level_named(name: str) -> Level:
    """The level `name`; ValueError for a name that is none."""
    if name not in LEVELS:
        raise ValueError(f"drawn: level must be one of {', '.join(LEVELS)}, got {name!r}")
    return LEVELS[name]
