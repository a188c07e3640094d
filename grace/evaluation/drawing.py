"""Scenes of 4 x 4 cells and the 32 x 32 pixel pictures of them.

A cell holds nothing, a coloured shape, or a white letter, digit or plus sign. Cells are 8 pixels
wide, so that a vision tower with 8-pixel patches sees one cell a token.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

GRID = 4
CELLS = GRID * GRID
CELL_PIXELS = 8
IMAGE_PIXELS = GRID * CELL_PIXELS

COLORS = {
    "red": (225, 45, 45),
    "green": (50, 190, 70),
    "blue": (60, 90, 240),
    "yellow": (235, 220, 60),
    "purple": (165, 60, 205),
    "orange": (240, 140, 35),
    "white": (240, 240, 240),
}
SHAPE_COLORS = tuple(name for name in COLORS if name != "white")

# One row a string of seven pixels, rows from top to bottom.
_SHAPE_ROWS = {
    "circle": "..###.. .#####. ####### ####### ####### .#####. ..###..",
    "square": "####### ####### ####### ####### ####### ####### #######",
    "triangle": "...#... ...#... ..###.. ..###.. .#####. .#####. #######",
    "cross": "##...## ###.### .#####. ..###.. .#####. ###.### ##...##",
    "diamond": "...#... ..###.. .#####. ####### .#####. ..###.. ...#...",
    "ring": "..###.. .#...#. #.....# #.....# #.....# .#...#. ..###..",
    "frame": "####### #.....# #.....# #.....# #.....# #.....# #######",
    "heart": ".##.##. ####### ####### ####### .#####. ..###.. ...#...",
}
_TEXT_ROWS = {
    "A": "..###.. .#...#. .#...#. .#####. .#...#. .#...#. .#...#.",
    "B": ".####.. .#...#. .#...#. .####.. .#...#. .#...#. .####..",
    "C": "..####. .#..... .#..... .#..... .#..... .#..... ..####.",
    "E": ".#####. .#..... .#..... .####.. .#..... .#..... .#####.",
    "H": ".#...#. .#...#. .#...#. .#####. .#...#. .#...#. .#...#.",
    "K": ".#...#. .#..#.. .#.#... .##.... .#.#... .#..#.. .#...#.",
    "L": ".#..... .#..... .#..... .#..... .#..... .#..... .#####.",
    "T": ".#####. ...#... ...#... ...#... ...#... ...#... ...#...",
    "1": "...#... ..##... ...#... ...#... ...#... ...#... ..###..",
    "2": "..###.. .#...#. .....#. ....#.. ...#... ..#.... .#####.",
    "3": ".####.. .....#. .....#. ..###.. .....#. .....#. .####..",
    "4": "....#.. ...##.. ..#.#.. .#..#.. .#####. ....#.. ....#..",
    "5": ".#####. .#..... .####.. .....#. .....#. .#...#. ..###..",
    "+": "....... ...#... ...#... .#####. ...#... ...#... .......",
}
SHAPES = tuple(_SHAPE_ROWS)
LETTERS = tuple(name for name in _TEXT_ROWS if name.isalpha())
DIGITS = tuple(name for name in _TEXT_ROWS if name.isdigit())
THINGS = (*SHAPES, *_TEXT_ROWS)


class Cell(NamedTuple):
    """What one cell shows: a name of `THINGS` in a color of `COLORS`; both empty for no thing."""

    thing: str = ""
    color: str = ""


Scene = tuple[Cell, ...]  # 16 cells, row by row from the top left


def digest(scene: Scene) -> str:
    """SHA-256 of what the cells show; two pictures of one scene have the same digest."""
    return hashlib.sha256("|".join(f"{c.color} {c.thing}" for c in scene).encode()).hexdigest()


def split_of(scene: Scene) -> str:
    """The one split a scene may appear in: "train" (3/4), "validation" or "heldout" (1/8 each).

    It depends on the digest alone, so images of different splits never show the same scene,
    whatever the seeds and sizes.
    """
    part = int(digest(scene)[:2], 16) // 32
    return {0: "heldout", 1: "validation"}.get(part, "train")


def _stencils() -> np.ndarray:
    """[things + 1, 4, 8, 8] in {0, 1}: the glyph at its four places in a cell; last thing: none."""
    rows = {**_SHAPE_ROWS, **_TEXT_ROWS}
    stencils = np.zeros((len(THINGS) + 1, 4, CELL_PIXELS, CELL_PIXELS), np.float32)
    for index, name in enumerate(THINGS):
        glyph = np.array([[pixel == "#" for pixel in row] for row in rows[name].split()])
        for place, (down, right) in enumerate(((0, 0), (0, 1), (1, 0), (1, 1))):
            stencils[index, place, down : down + 7, right : right + 7] = glyph
    return stencils


_STENCILS = _stencils()
_THING_INDEX = {"": len(THINGS)} | {name: index for index, name in enumerate(THINGS)}
_COLOR_INDEX = {"": 0} | {name: index for index, name in enumerate(COLORS)}
_COLOR_VALUES = np.array(list(COLORS.values()), np.float32)


def render(scenes: Sequence[Scene], seed: int) -> np.ndarray:
    """Draw scenes: uint8 [len(scenes), 32, 32, 3].

    Each glyph sits at one of four places in its cell and is a little brighter or darker; the
    background is dark grey and every pixel has noise (standard deviation 6 of 255). All of it
    comes from `seed`.
    """
    rng = np.random.default_rng(seed)
    things = np.array([[_THING_INDEX[c.thing] for c in scene] for scene in scenes])
    colors = np.array([[_COLOR_INDEX[c.color] for c in scene] for scene in scenes])
    masks = _STENCILS[things, rng.integers(0, 4, things.shape)][..., None]
    brightness = rng.uniform(0.85, 1.05, things.shape).astype(np.float32)[..., None]
    ink = (_COLOR_VALUES[colors] * brightness)[:, :, None, None, :]
    cells = 28.0 * (1.0 - masks) + ink * masks  # [n, 16, 8, 8, 3]
    cells = cells.reshape(-1, GRID, GRID, CELL_PIXELS, CELL_PIXELS, 3).swapaxes(2, 3)
    images = cells.reshape(-1, IMAGE_PIXELS, IMAGE_PIXELS, 3)
    images = images + 6.0 * rng.standard_normal(images.shape, np.float32)
    return images.clip(0, 255).round().astype(np.uint8)
