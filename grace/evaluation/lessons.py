"""What the tiny models learn from, beside the questions themselves.

Trained on questions alone, models this small stay at chance for thousands of steps: an answer
needs two or three steps (find the shape, read its color, compare) and none pays before all are
there. Two kinds of lessons give each step its own reward:

- *drills* name a thing and want one fact about it from the very next word:
  `How many circles >two hearts >nothing`, `row heart >three`, `color heart red >Yes` (`>two` is
  a word that has to be predicted; at `one>ring` the word is ring, but "one" has to be predicted);
- *early answers*: in a question, every token from the word that decides it on has the answer as
  its label, not only the token in front of the answer; and in a question about two places, the
  words between the two shapes have the row or column of the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

import torch
from torch import Tensor

from .drawing import COLORS, DIGITS, GRID, LETTERS, SHAPE_COLORS, SHAPES, THINGS, Scene, render
from .packed_questions import IGNORE, pack_tokens, tokenize
from .scenes import compose_in, questions
from .tiny import IMAGE_TOKENS, vocabulary
from .topics import NUMBERS, SUBTASKS, SUMS, Question, plural

Block = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # prefix, tokens, labels

_VOCABULARY = vocabulary()
WORDS = {word: index for index, word in enumerate(_VOCABULARY)}
_COUNTS = ("nothing", *NUMBERS)
_SIDE_WORDS = ("left", "right", "above", "below")
_SIDES = {WORDS[word] for word in _SIDE_WORDS}
_DECIDING = {
    WORDS[word] for word in (*COLORS, *THINGS, *map(plural, SHAPES), *map(str, SUMS), "text", "sum")
}


def pixel_values(scenes: list[Scene], rng: Random) -> Tensor:
    """The rendered scenes as the image processor gives them: [n, 3, 32, 32] in [-1, 1]."""
    images = torch.from_numpy(render(scenes, rng.getrandbits(32)))
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def words_of(scenes: list[Scene]) -> Tensor:
    """int64 [n, 16, 2]: the words of what each cell shows, twice "nothing" for an empty one."""
    return torch.tensor(
        [[[WORDS[word or "nothing"] for word in cell] for cell in scene] for scene in scenes]
    )


def drill_batch(images: int, rng: Random) -> dict[str, Tensor]:
    """A training batch of all drills about scenes of two, three or six subtasks."""
    number = rng.choice((2, 3, len(SUBTASKS)))
    # Position brings two shapes that are there once, which most drills are about.
    others = [s for s in SUBTASKS if s != "position"]
    scenes = [
        compose_in("train", rng, subtasks=["position", *rng.sample(others, number - 1)])[0]
        for _ in range(images)
    ]
    prefix = (WORDS["<s>"], WORDS["USER:"], *[WORDS["<image>"]] * IMAGE_TOKENS)
    rows = [[_block(prefix, drill) for drill in drills(scene, rng)] for scene in scenes]
    return pack_tokens(rows, WORDS["<pad>"]) | {"pixel_values": pixel_values(scenes, rng)}


def question_batch(
    processor: Any, split: str, images: int, each: int, rng: Random, *, early: bool = False
) -> tuple[dict[str, Tensor], list[list[Question]]]:
    """A batch of `each` questions about each image, and the questions.

    With `early`, some images show three subtasks only, answers are labelled early, and four drills
    about the image stand behind its questions.
    """
    number = rng.choice((3, len(SUBTASKS))) if early else len(SUBTASKS)
    drawn = [compose_in(split, rng, subtasks=rng.sample(SUBTASKS, number)) for _ in range(images)]
    asked = [questions(facts, rng)[:each] for _, facts in drawn]
    rows = [[tokenize(processor, q.text, q.answer, IMAGE_TOKENS) for q in row] for row in asked]
    if early:
        for row, (scene, _) in zip(rows, drawn, strict=True):
            prefix, texts = row[0][0], drills(scene, rng)
            row[:] = [answered_early(block, scene) for block in row]
            row += [_block(prefix, text) for text in rng.sample(texts, min(4, len(texts)))]
    pixels = pixel_values([scene for scene, _ in drawn], rng)
    return pack_tokens(rows, WORDS["<pad>"]) | {"pixel_values": pixels}, asked


def answered_early(block: Block, scene: Scene) -> Block:
    """The same question, its answer wanted from the word on that decides it."""
    prefix, tokens, labels = block
    wanted = list(labels)
    start = next(i for i, label in enumerate(labels) if label != IGNORE)
    decided = max(i for i in range(start) if tokens[i] in _DECIDING)
    wanted[decided + 1 : start] = [tokens[start]] * (start - decided - 1)
    side = next((i for i in range(decided) if tokens[i] in _SIDES), None)
    if side is not None:
        first = next(i for i in reversed(range(side)) if tokens[i] in _DECIDING)
        place = WORDS[_place(scene, _VOCABULARY[tokens[first]], _VOCABULARY[tokens[side]])]
        wanted[side + 1 : decided + 1] = [place] * (decided - side)
    return prefix, tokens, tuple(wanted)


def _place(scene: Scene, shape: str, side: str) -> str:
    """The row or column, whichever `side` is about, of a shape that is there once."""
    row, column = divmod([cell.thing for cell in scene].index(shape), GRID)
    return _COUNTS[1 + (column if side in ("left", "right") else row)]


def drills(scene: Scene, rng: Random) -> list[str]:
    """The drills about one scene: words, those to be predicted marked with `>`."""
    return [*_shape_drills(scene, rng), *_character_drills(scene, rng)]


def _shape_drills(scene: Scene, rng: Random) -> list[str]:
    names = [cell.thing for cell in scene]
    single = [shape for shape in SHAPES if names.count(shape) == 1]
    colors = {shape: scene[names.index(shape)].color for shape in single}
    counted = [shape for shape in SHAPES if names.count(shape) < len(_COUNTS)]

    def asked(shapes: Sequence[str]) -> list[str]:
        return rng.sample(shapes, min(5, len(shapes)))

    def said(shape: str) -> str:
        color = rng.choice((colors[shape], rng.choice(SHAPE_COLORS)))
        return f"{shape} {color} >{_yes(color == colors[shape])}"

    def after(shape: str) -> str:
        word, fact = rng.choice(
            (("row", _place(scene, shape, "above")), ("column", _place(scene, shape, "left")))
        )
        return f"{shape} {word} >{fact}"

    lists = (
        ("How many", [f"{plural(s)} >{_COUNTS[names.count(s)]}" for s in asked(counted)]),
        ("Is there", [f"{s} >{_yes(s in names)}" for s in asked(SHAPES)]),
        ("What color", [f"{s} >{colors[s]}" for s in asked(single)]),
        ("row", [f"{s} >{_place(scene, s, 'above')}" for s in asked(single)]),
        ("column", [f"{s} >{_place(scene, s, 'left')}" for s in asked(single)]),
        ("the", [after(s) for s in asked(single)]),
        ("color", [said(s) for s in asked(single)]),
        ("of", [_relation(scene, rng.sample(single, 2), rng) for _ in single[1:5]]),
    )
    return [" ".join((head, *facts)) for head, facts in lists if facts]


def _relation(scene: Scene, shapes: list[str], rng: Random) -> str:
    one, other = shapes
    places = {side: (_place(scene, one, side), _place(scene, other, side)) for side in _SIDE_WORDS}
    side = rng.choice([side for side, (first, second) in places.items() if first != second])
    first, second = (_COUNTS.index(place) for place in places[side])
    holds = first < second if side in ("left", "above") else first > second
    return f"{one} {side} {_COUNTS[first]}>{other} >{_yes(holds)}"


def _character_drills(scene: Scene, rng: Random) -> list[str]:
    letters = [cell.thing for cell in scene if cell.thing in LETTERS]
    digits = [cell.thing for cell in scene if cell.thing in DIGITS]
    texts = []
    if letters:
        new = rng.sample(LETTERS, 2)
        tries = [letters, letters, letters[::-1], [letters[0], new[0]], [new[1], letters[1]]]
        rng.shuffle(tries)
        texts.append(f"text >{letters[0]} >{letters[1]}")
        facts = [f"{a} {b} >{_yes([a, b] == letters)}" for a, b in tries]
        texts.append(" ".join(("text or", *facts)))
    if digits:
        texts.append(f"+ >{digits[0]} + >{digits[1]}")
        texts.append(f"sum >{sum(map(int, digits))}")
    return texts


def _yes(true: bool) -> str:
    return "Yes" if true else "No"


def _block(prefix: tuple[int, ...], drill: str) -> Block:
    tokens, labels = [], []
    for word in drill.split():
        label, marked, token = word.rpartition(">")
        tokens.append(WORDS[token])
        labels.append(WORDS[label or token] if marked else IGNORE)
    return prefix, tuple(tokens), tuple(labels)
