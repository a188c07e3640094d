"""Random scenes in which the questions of given topics have given answers.

Every scene of the benchmark holds something of all six subtasks, so nothing about a picture tells
which subtask it belongs to. Two scenes composed for one topic, one each way, are *twins*: the same
two questions with opposite answers. A benchmark made of twins cannot be answered from its
questions: whatever the text, half of its answers are yes.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from .drawing import CELLS, DIGITS, GRID, SHAPE_COLORS, SHAPES, Cell, Scene, split_of
from .topics import NUMBERS, SUBTASKS, SUFFIX, Question, Topic, pose

Fact = tuple[Topic, int]  # a topic and which of its two questions is true


def compose(
    rng: Random,
    topic: Topic | None = None,
    which: int = 0,
    subtasks: Sequence[str] = SUBTASKS,
) -> tuple[Scene, list[Fact]]:
    """A random scene in which question `which` of `topic` is true and its other question false.

    Returns the scene and `[(topic, which), ...]` for the `subtasks` that it has something of.
    Scenes of some subtasks only are for lessons: emptier, and without what closes the shortcuts.
    """
    shapes = [s for s in rng.sample(SHAPES, len(SHAPES)) if topic is None or s not in topic.shapes]
    facts = [
        (topic, which)
        if topic is not None and topic.subtask == subtask
        else (pose(subtask, rng, shapes), rng.randrange(2))
        for subtask in subtasks
    ]
    return _Board(rng).fill(facts, fillers=shapes), facts


def compose_in(
    split: str,
    rng: Random,
    topic: Topic | None = None,
    which: int = 0,
    subtasks: Sequence[str] = SUBTASKS,
) -> tuple[Scene, list[Fact]]:
    """`compose`, drawn again until the scene belongs to `split`."""
    while True:
        scene, facts = compose(rng, topic, which, subtasks)
        if split_of(scene) == split:
            return scene, facts


def questions(facts: list[Fact], rng: Random) -> list[Question]:
    """Both yes/no questions and the open-ended one of every topic, in random order."""
    asked = []
    for topic, which in facts:
        for index, text in enumerate(topic.questions):
            answer = "Yes" if index == which else "No"
            asked.append(Question(topic.subtask, text + SUFFIX, answer))
        asked.append(Question(topic.subtask, topic.open_question, topic.open_answers[which]))
    rng.shuffle(asked)
    return asked


class _Board:
    """Sixteen cells being filled at random."""

    def __init__(self, rng: Random) -> None:
        self.rng = rng
        self.cells = [Cell()] * CELLS
        self.free = list(range(CELLS))
        self.rows = rng.sample(range(GRID), GRID)

    def fill(self, facts: list[Fact], fillers: list[str]) -> Scene:
        wanted = {topic.subtask: (topic, topic.values[which]) for topic, which in facts}
        # Drawn before anything else: how full the board is must say nothing about the count.
        occupied = self.rng.randint(13, CELLS) if len(wanted) == len(SUBTASKS) else 0
        for subtask, place in (
            ("OCR", self._write),
            ("numerical_calculation", self._sum),
            ("position", self._apart),
            ("existence", self._one),
            ("count", self._several),
            ("color", self._paint),
        ):
            if subtask in wanted:
                place(*wanted[subtask])
        while CELLS - len(self.free) < occupied:
            self._put(self._anywhere(), self.rng.choice(fillers))
        return tuple(self.cells)

    def _anywhere(self) -> int:
        return self.rng.choice(self.free)

    def _put(self, cell: int, thing: str, color: str = "") -> None:
        self.cells[cell] = Cell(thing, color or self.rng.choice(SHAPE_COLORS))
        self.free.remove(cell)

    def _side_by_side(self, things: list[str]) -> None:
        """White characters in a row of their own."""
        start = self.rows.pop() * GRID + self.rng.randint(0, GRID - len(things))
        for offset, thing in enumerate(things):
            self._put(start + offset, thing, "white")

    def _write(self, topic: Topic, text: str) -> None:
        self._side_by_side(text.split())

    def _sum(self, topic: Topic, total: str) -> None:
        largest = len(DIGITS)
        first = self.rng.randint(max(1, int(total) - largest), min(largest, int(total) - 1))
        self._side_by_side([str(first), "+", str(int(total) - first)])

    def _apart(self, topic: Topic, side: str) -> None:
        """The first shape on `side` of the second.

        They are one column (or row) apart, any row (or column). Where one shape stands then tells
        the answer for the outermost columns only: 2/3 of the answers; with any distance it is 5/6.
        """
        free = self.free
        axis = (lambda c: c % GRID) if side in ("left", "right") else (lambda c: c // GRID)
        pairs = [(a, b) for a in free for b in free if axis(b) - axis(a) == 1]
        cells = self.rng.choice(pairs)
        if side in ("right", "below"):
            cells = cells[::-1]
        for cell, shape in zip(cells, topic.shapes, strict=True):
            self._put(cell, shape)

    def _one(self, topic: Topic, shape: str) -> None:
        self._put(self._anywhere(), shape)

    def _several(self, topic: Topic, number: str) -> None:
        for _ in range(NUMBERS.index(number) + 1):
            self._put(self._anywhere(), topic.shapes[0])

    def _paint(self, topic: Topic, color: str) -> None:
        """The shape asked about; both colors asked about also appear on other shapes."""
        others = [cell for cell, (thing, _) in enumerate(self.cells) if thing in SHAPES]
        chosen = self.rng.sample(others, min(2, len(others)))
        for cell, value in zip(chosen, topic.values, strict=False):
            self.cells[cell] = Cell(self.cells[cell].thing, value)
        self._put(self._anywhere(), topic.shapes[0], color)
