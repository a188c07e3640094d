"""What drawn scenes are made of, and which compositions of it are held out of training.

A composition is a tuple such as ("color", "red", "star") or ("count", 3, "red", "heart"). Its parts
occur in training (every color, every shape, every number), the held-out compositions themselves
never: neither drawn nor asked about, since a composition that is only ever named would be
"no" (two colors of a house are named where phrases are translated). Sums and programs are not held
out: those that a small model can work out in one step are few. Nor are landscapes: of six skies,
one under which a place is never seen tells of another place.
"""

from __future__ import annotations

import hashlib
from random import Random
from typing import Any

SPLITS = ("train", "validation", "heldout")
HELD_OUT = ("color", "count", "position", "OCR", "translation")  # kinds of compositions

COLORS = {
    "red": (215, 40, 40),
    "orange": (245, 140, 25),
    "yellow": (245, 230, 60),
    "green": (40, 165, 65),
    "blue": (45, 85, 230),
    "purple": (130, 45, 175),
    "pink": (250, 150, 195),
    "white": (245, 245, 245),
}
SHAPES = (
    "circle",
    "square",
    "triangle",
    "diamond",
    "cross",
    "ring",
    "star",
    "heart",
    "moon",
    "arrow",
    "hexagon",
    "house",
)
PLACES = ("beach", "forest", "city", "mountain", "desert", "village")
CONDITIONS = {
    "day": "in daylight",
    "sunset": "at sunset",
    "night": "at night",
    "rain": "in the rain",
    "snow": "in the snow",
    "fog": "in the fog",
}
# French noun: (English, whether it is feminine).
NOUNS = {
    "chat": ("cat", False),
    "chien": ("dog", False),
    "cheval": ("horse", False),
    "livre": ("book", False),
    "train": ("train", False),
    "bateau": ("boat", False),
    "chapeau": ("hat", False),
    "jardin": ("garden", False),
    "pont": ("bridge", False),
    "sac": ("bag", False),
    "couteau": ("knife", False),
    "oiseau": ("bird", False),
    "maison": ("house", True),
    "voiture": ("car", True),
    "table": ("table", True),
    "porte": ("door", True),
    "fleur": ("flower", True),
    "lampe": ("lamp", True),
    "robe": ("dress", True),
    "chaise": ("chair", True),
    "pomme": ("apple", True),
    "route": ("road", True),
    "rue": ("street", True),
    "cuisine": ("kitchen", True),
}
# French adjectives that follow the noun: masculine: (feminine, English).
ADJECTIVES = {
    "rouge": ("rouge", "red"),
    "jaune": ("jaune", "yellow"),
    "noir": ("noire", "black"),
    "vert": ("verte", "green"),
    "blanc": ("blanche", "white"),
    "bleu": ("bleue", "blue"),
    "lourd": ("lourde", "heavy"),
    "rapide": ("rapide", "fast"),
    "propre": ("propre", "clean"),
    "vide": ("vide", "empty"),
}
_CONSONANTS, _VOWELS = "BDFGKLMNPRSTVZ", "AEIOU"

Composition = tuple[Any, ...]


def held_out(composition: Composition) -> bool:
    """Whether `composition` never occurs in training.

    Two colors a shape, two numbers (of 3 to 9, two apart) a color and shape; of words, phrases and
    pairs of shapes the quarter that a hash picks.
    """
    if composition[0] not in HELD_OUT:
        return False
    kind, *parts = composition
    if kind == "color":
        color, shape = list(COLORS).index(parts[0]), SHAPES.index(parts[1])
        return color in (shape % 8, (3 * shape + 1) % 8)
    if kind == "count":
        number, color, shape = parts
        return number - (3 + (SHAPES.index(shape) + list(COLORS).index(color)) % 5) in (0, 2)
    text = "|".join((kind, *sorted(parts))) if kind == "position" else "|".join(composition)
    return hashlib.sha256(text.encode()).digest()[0] % 4 == 0


def may_ask(composition: Composition, split: str) -> bool:
    """Whether a question of `split` may be about it: in "heldout" exactly what is held out, of
    kinds of which something is."""
    return composition[0] not in HELD_OUT or held_out(composition) == (split == "heldout")


def may_show(composition: Composition, split: str) -> bool:
    """Whether a picture of `split` may show it beside what is asked about."""
    return split == "heldout" or not held_out(composition)


def word(rng: Random, letters: int) -> str:
    """A word that can be spoken and is in no dictionary: what cannot be guessed has to be read."""
    start = rng.randrange(2)
    return "".join(rng.choice((_CONSONANTS, _VOWELS)[(start + i) % 2]) for i in range(letters))


def french(noun: str, adjective: str) -> str:
    """`noun` with the adjective in its gender."""
    return f"{noun} {ADJECTIVES[adjective][0] if NOUNS[noun][1] else adjective}"


def english(noun: str, adjective: str) -> str:
    """The translation of `french(noun, adjective)`."""
    return f"{ADJECTIVES[adjective][1]} {NOUNS[noun][0]}"
