"""Pictures of scenes: drawn at twice their size, scaled down, with the noise of their level."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from random import Random
from statistics import NormalDist

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .landscapes import landscape
from .levels import Level, level_named
from .outlines import outline
from .scenes import WIDTH, Scene
from .vocabulary import COLORS

# Of matplotlib's own fonts, those that are read easily first; a level uses the first ones.
FONTS = (
    "DejaVuSans.ttf",
    "DejaVuSerif.ttf",
    "DejaVuSansMono.ttf",
    "DejaVuSans-Bold.ttf",
    "STIXGeneral.ttf",
    "DejaVuSerif-Italic.ttf",
    "STIXGeneralBol.ttf",
    "DejaVuSansMono-Oblique.ttf",
    "STIXGeneralItalic.ttf",
    "DejaVuSerif-BoldItalic.ttf",
)
_FINE = 2  # drawn this much larger
_PAPERS = ((245, 240, 225), (250, 250, 250), (225, 235, 245), (30, 34, 46))


def render(scene: Scene, pixels: int = WIDTH) -> Image.Image:
    """The picture of a scene, `pixels` wide and high, RGB.

    Raises ValueError for fewer than 32 pixels or an unknown level, FileNotFoundError where
    matplotlib is installed without its fonts.
    """
    if pixels < 32:
        raise ValueError(f"drawn.render: pixels must be at least 32, got {pixels}")
    level, rng = level_named(scene.level), Random(scene.seed)
    image = _backdrop(scene, pixels * _FINE, level, rng)
    _draw_items(image, scene, rng)
    if scene.text:
        _draw_text(image, scene, level, rng)
    # Thin over a text: a thick stroke reads as a minus or hides a letter.
    _strokes(image, level.bars, 1.2 if scene.text else 3.5, rng)
    image = image.reduce(_FINE)
    return _with_noise(image, level.noise, rng.getrandbits(32))


def _backdrop(scene: Scene, size: int, level: Level, rng: Random) -> Image.Image:
    if scene.place:
        return landscape(scene.place, scene.condition, size, rng)
    grey = rng.randint(30, 80)
    tint = tuple(grey + rng.randint(-8, 8) for _ in range(3))
    image = Image.new("RGB", (size, size), tint)
    _strokes(image, level.clutter, 2.0, rng)
    return image


def _strokes(image: Image.Image, count: int, width: float, rng: Random) -> None:
    """Grey lines from edge to edge, of a color that no shape has."""
    draw, size = ImageDraw.Draw(image), image.width
    for _ in range(count):
        grey = rng.randint(20, 120)
        ends = [(rng.uniform(0, size), 0.0), (rng.uniform(0, size), float(size))]
        if rng.random() < 0.5:
            ends = [(y, x) for x, y in ends]
        wide = max(1, round(width * size / WIDTH * rng.uniform(0.5, 1)))
        draw.line(ends, fill=(grey, grey, grey), width=wide)


def _draw_items(image: Image.Image, scene: Scene, rng: Random) -> None:
    draw, k = ImageDraw.Draw(image), image.width / WIDTH
    for item in scene.items:
        light = rng.uniform(0.9, 1.04)
        color = tuple(min(255, round(value * light)) for value in COLORS[item.color])
        corners = outline(item.shape, item.x * k, item.y * k, item.radius * k, item.angle)
        draw.polygon(corners, fill=color)


@lru_cache(maxsize=256)
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    import matplotlib

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name
    if not path.is_file():
        raise FileNotFoundError(f"drawn.render: matplotlib must come with its fonts, got no {path}")
    return ImageFont.truetype(path, size)


def _draw_text(image: Image.Image, scene: Scene, level: Level, rng: Random) -> None:
    """The text on paper somewhere in the picture, smaller where it would not fit."""
    k, name = image.width / WIDTH, FONTS[rng.randrange(level.fonts)]
    # The letters' size is rounded to even pixels, so that few fonts are loaded.
    size = 2 * round(rng.uniform(*level.text) * k / 2)
    angle = rng.uniform(-level.angle, level.angle) * (0.4 if scene.kind == "program" else 0.7)
    paper = rng.choice(_PAPERS)
    while True:
        sheet = _sheet(scene.text, _font(name, size), paper).rotate(
            angle, Image.Resampling.BILINEAR, expand=True
        )
        if max(sheet.size) <= image.width or size <= 8:
            break
        size = max(8, size - max(2, size // 10))
    left, top = (rng.randint(0, max(0, image.width - side)) for side in sheet.size)
    image.paste(sheet, (left, top), sheet)


def _sheet(text: str, font: ImageFont.FreeTypeFont, paper: tuple[int, ...]) -> Image.Image:
    dark = sum(paper) < 300
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    left, top, right, bottom = measure.multiline_textbbox((0, 0), text, font)
    margin = max(4, round(0.3 * font.size))
    size = (round(right - left) + 2 * margin, round(bottom - top) + 2 * margin)
    sheet = Image.new("RGBA", size, (*paper, 255))
    ink = (240, 240, 235) if dark else (25, 25, 40)
    ImageDraw.Draw(sheet).multiline_text((margin - left, margin - top), text, ink, font)
    return sheet


def _with_noise(image: Image.Image, deviation: float, seed: int) -> Image.Image:
    values = np.asarray(image, np.int16)
    drawn = np.frombuffer(np.random.default_rng(seed).bytes(values.size), np.uint8)
    noise = _quantiles(deviation)[drawn].reshape(values.shape)
    return Image.fromarray((values + noise).clip(0, 255).astype(np.uint8))


@lru_cache(maxsize=8)
def _quantiles(deviation: float) -> np.ndarray:
    """The normal distribution in 256 steps of the same probability, whole numbers: a byte and a
    look into this table cost a quarter of a normal number."""
    normal = NormalDist(0, max(deviation, 1e-9))
    return np.array([round(normal.inv_cdf((step + 0.5) / 256)) for step in range(256)], np.int16)
