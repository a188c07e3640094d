"""Six places under six skies. Coordinates are units of a scene; `k` is pixels a unit."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import numpy as np
from PIL import Image, ImageDraw

from .scenes import WIDTH

Color = tuple[int, int, int]

# Top and bottom of the sky, and what the condition makes of the colors on the ground.
_SKIES: dict[str, tuple[Color, Color]] = {
    "day": ((95, 170, 245), (200, 230, 250)),
    "sunset": ((85, 60, 135), (250, 135, 60)),
    "night": ((6, 8, 30), (26, 32, 66)),
    "rain": ((85, 95, 108), (140, 150, 158)),
    "snow": ((190, 198, 212), (225, 230, 236)),
    "fog": ((186, 188, 190), (200, 202, 204)),
}
_LIGHT: dict[str, tuple[float, float, float]] = {
    "day": (1.0, 1.0, 1.0),
    "sunset": (0.85, 0.6, 0.5),
    "night": (0.25, 0.28, 0.4),
    "rain": (0.6, 0.65, 0.7),
    "snow": (0.95, 0.97, 1.0),
    "fog": (0.9, 0.9, 0.9),
}


class _Painter:
    """Draws on a picture in units of a scene, in the light of a condition."""

    def __init__(self, image: Image.Image, condition: str, rng: Random) -> None:
        self.draw, self.rng = ImageDraw.Draw(image), rng
        self.k, self.condition = image.width / WIDTH, condition
        self.horizon = rng.uniform(0.45, 0.6) * WIDTH

    def lit(self, color: Color, ground: bool = False) -> Color:
        if self.condition == "snow" and ground:
            color = (235, 240, 245)
        light = self.rng.uniform(0.93, 1.07)
        channels = zip(color, _LIGHT[self.condition], strict=True)
        r, g, b = (min(255, int(value * part * light)) for value, part in channels)
        return r, g, b

    def polygon(self, points: list[tuple[float, float]], color: Color) -> None:
        self.draw.polygon([(x * self.k, y * self.k) for x, y in points], fill=color)

    def box(self, left: float, top: float, right: float, bottom: float, color: Color) -> None:
        self.polygon([(left, top), (right, top), (right, bottom), (left, bottom)], color)

    def disc(self, x: float, y: float, radius: float, color: Color) -> None:
        box = [v * self.k for v in (x - radius, y - radius, x + radius, y + radius)]
        self.draw.ellipse(box, fill=color)

    def ground(self, color: Color, top: float | None = None) -> None:
        self.box(0, self.horizon if top is None else top, WIDTH, WIDTH, self.lit(color, True))


def _beach(p: _Painter) -> None:
    shore = p.horizon + p.rng.uniform(40, 80)
    p.box(0, p.horizon, WIDTH, shore + 30, p.lit((40, 120, 190)))
    wave = [(x, shore + 8 * np.sin(x / 30 + shore)) for x in range(0, WIDTH + 12, 12)]
    p.polygon([*wave, (WIDTH, WIDTH), (0, WIDTH)], p.lit((235, 210, 150), True))
    for _ in range(p.rng.randint(1, 4)):
        x, y = p.rng.uniform(30, 300), p.rng.uniform(shore + 30, 320)
        p.box(x - 1.5, y - 34, x + 1.5, y, p.lit((90, 70, 50)))
        p.polygon([(x - 26, y - 30), (x, y - 52), (x + 26, y - 30)], p.lit((220, 60, 60)))


def _forest(p: _Painter) -> None:
    p.ground((70, 110, 50))
    for y in sorted(p.rng.uniform(p.horizon, 330) for _ in range(p.rng.randint(14, 24))):
        x, size = p.rng.uniform(0, WIDTH), p.rng.uniform(40, 70)
        p.box(x - 4, y - 14, x + 4, y, p.lit((95, 65, 40)))
        green = p.lit((30, 100, 45))
        for step in (0, 1, 2):
            wide, low = size * (0.42 - 0.09 * step), y - 12 - step * size * 0.36
            p.polygon([(x - wide, low), (x, low - size * 0.6), (x + wide, low)], green)


def _city(p: _Painter) -> None:
    p.ground((90, 90, 95))
    x = -p.rng.uniform(0, 20)
    while x < WIDTH:
        wide, top = p.rng.uniform(28, 55), p.horizon - p.rng.uniform(40, 150)
        p.box(x, top, x + wide, p.horizon + 25, p.lit((120, 115, 125)))
        window = (250, 225, 130) if p.condition in ("night", "sunset") else p.lit((190, 210, 225))
        for column in np.arange(x + 5, x + wide - 8, 11):
            for row in np.arange(top + 6, p.horizon + 12, 13):
                if p.rng.random() < 0.8:
                    p.box(column, row, column + 5, row + 7, window)
        x += wide + p.rng.uniform(0, 6)
    p.box(0, p.horizon + 50, WIDTH, p.horizon + 53, p.lit((230, 230, 230)))


def _mountain(p: _Painter) -> None:
    p.ground((95, 125, 80))
    for _ in range(p.rng.randint(3, 6)):
        x, wide, high = p.rng.uniform(0, WIDTH), p.rng.uniform(80, 140), p.rng.uniform(100, 150)
        base, top = p.horizon + 10, p.horizon + 10 - high
        p.polygon([(x - wide, base), (x, top), (x + wide, base)], p.lit((110, 105, 110)))
        cap = [(x - wide * 0.25, top + high * 0.25), (x, top), (x + wide * 0.25, top + high * 0.25)]
        p.polygon([*cap, (x, top + high * 0.33)], p.lit((240, 240, 245)))


def _desert(p: _Painter) -> None:
    for step in range(4):
        phase, top = p.rng.uniform(0, 6), p.horizon + 35 * step
        dune = [(x, top + 14 * np.sin(x / 45 + phase)) for x in range(0, WIDTH + 12, 12)]
        p.polygon([*dune, (WIDTH, WIDTH), (0, WIDTH)], p.lit((225, 180, 110), True))
    for _ in range(p.rng.randint(2, 5)):
        x, y = p.rng.uniform(20, 310), p.rng.uniform(p.horizon + 40, 325)
        green = p.lit((60, 120, 60))
        p.box(x - 5, y - 50, x + 5, y, green)
        p.box(x - 18, y - 32, x + 18, y - 25, green)
        p.box(x - 18, y - 42, x - 12, y - 25, green)
        p.box(x + 12, y - 46, x + 18, y - 25, green)


def _village(p: _Painter) -> None:
    p.ground((110, 150, 70))
    for y in sorted(p.rng.uniform(p.horizon + 20, 320) for _ in range(p.rng.randint(4, 7))):
        x, wide = p.rng.uniform(20, 316), p.rng.uniform(22, 34)
        p.box(x - wide, y - wide * 1.1, x + wide, y, p.lit((235, 215, 180)))
        roof = [(x - wide * 1.2, y - wide), (x, y - wide * 2), (x + wide * 1.2, y - wide)]
        p.polygon(roof, p.lit((170, 70, 50), True))
        p.box(x - 5, y - wide * 0.6, x + 5, y, p.lit((100, 65, 40)))


_PLACES: dict[str, Callable[[_Painter], None]] = {
    "beach": _beach,
    "forest": _forest,
    "city": _city,
    "mountain": _mountain,
    "desert": _desert,
    "village": _village,
}


def _sky(size: int, condition: str) -> Image.Image:
    top, bottom = (np.array(color, np.float32) for color in _SKIES[condition])
    mix = np.linspace(0, 1, size, dtype=np.float32)[:, None, None]
    rows = np.broadcast_to(top + (bottom - top) * mix, (size, size, 3))
    return Image.fromarray(rows.round().astype(np.uint8))


def _lights(p: _Painter) -> None:
    """Sun, moon and stars, clouds: what is behind the place."""
    x = p.rng.uniform(50, 290)
    if p.condition == "day":
        p.disc(x, p.rng.uniform(30, 60), 20, (255, 245, 190))
        for _ in range(p.rng.randint(1, 4)):
            left, y = p.rng.uniform(0, 300), p.rng.uniform(20, 90)
            for step in range(3):
                p.disc(left + 14 * step, y - 5 * (step == 1), 12, (245, 248, 252))
    if p.condition == "sunset":
        p.disc(x, p.horizon - 6, 32, (255, 190, 90))
    if p.condition == "night":
        p.disc(x, p.rng.uniform(30, 60), 14, (235, 235, 215))
        for _ in range(60):
            p.disc(p.rng.uniform(0, WIDTH), p.rng.uniform(0, p.horizon), 1, (220, 220, 230))


def _weather(p: _Painter) -> None:
    """Rain and snow: what is in front of the place."""
    for _ in range(260 if p.condition in ("rain", "snow") else 0):
        x, y = p.rng.uniform(0, WIDTH), p.rng.uniform(0, WIDTH)
        if p.condition == "snow":
            p.disc(x, y, p.rng.uniform(1, 2.4), (255, 255, 255))
        else:
            p.polygon([(x, y), (x + 1.5, y), (x - 4, y + 18), (x - 5, y + 18)], (190, 200, 215))


def landscape(place: str, condition: str, size: int, rng: Random) -> Image.Image:
    """`place` under `condition`, `size` pixels wide and high."""
    image = _sky(size, condition)
    painter = _Painter(image, condition, rng)
    _lights(painter)
    _PLACES[place](painter)
    if condition == "fog":
        image = Image.blend(image, Image.new("RGB", image.size, _SKIES["fog"][1]), 0.62)
        return image
    _weather(painter)
    return image
