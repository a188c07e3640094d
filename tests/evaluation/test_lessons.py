"""Drills and early answers say what is true in the scene."""

from random import Random

import pytest
import torch

from grace.evaluation import drawing, lessons, scenes, tiny
from grace.evaluation.packed_questions import IGNORE, tokenize

NUMBERS = {"nothing": 0, "one": 1, "two": 2, "three": 3, "four": 4}


@pytest.fixture(scope="module")
def processor():
    return tiny.make_processor()


def true(scene, head, words):
    """Whether one drill of one scene is true, read off the scene anew."""
    names = [cell.thing for cell in scene]
    plurals = {scenes_name(name): name for name in drawing.SHAPES}

    def place(shape, axis):
        return divmod(names.index(shape), 4)[axis] + 1

    def holds(one, side, other):
        axis = 1 if side in ("left", "right") else 0
        first, second = place(one, axis), place(other, axis)
        return first < second if side in ("left", "above") else first > second

    if head == "How":
        return all(names.count(plurals[s]) == NUMBERS[n] for s, n in pairs(words[1:], 2))
    if head == "Is":
        return all((s in names) == (a == "Yes") for s, a in pairs(words[1:], 2))
    if head == "What":
        return all(scene[names.index(s)].color == c for s, c in pairs(words[1:], 2))
    if head in ("row", "column"):
        axis = int(head == "column")
        return all(place(s, axis) == NUMBERS[n] for s, n in pairs(words, 2))
    if head == "the":
        return all(place(s, int(w == "column")) == NUMBERS[n] for s, w, n in pairs(words, 3))
    if head == "color":
        found = [(scene[names.index(s)].color == c, a) for s, c, a in pairs(words, 3)]
        return all(fact == (a == "Yes") for fact, a in found)
    if head == "of":
        return all(holds(a, s, b) == (said == "Yes") for a, s, b, said in pairs(words, 4))
    if head == "text" and words[0] != "or":
        return words == [n for n in names if n in drawing.LETTERS]
    if head == "text":
        letters = [n for n in names if n in drawing.LETTERS]
        return all(([a, b] == letters) == (said == "Yes") for a, b, said in pairs(words[1:], 3))
    digits = [n for n in names if n in drawing.DIGITS]
    if head == "+":
        return [words[0], words[2]] == digits
    return int(words[0]) == sum(map(int, digits))


def scenes_name(shape):
    return shape + ("es" if shape == "cross" else "s")


def pairs(words, size):
    return list(zip(*[iter(words)] * size, strict=True))


def test_drills_are_true():
    rng = Random(4)
    for _ in range(200):
        scene = scenes.compose(rng)[0]
        for drill in lessons.drills(scene, rng):
            head, *words = (word.rpartition(">")[2] for word in drill.split())
            assert true(scene, head, words), (drill, scene)


def test_the_word_between_two_shapes_wants_the_place_of_the_first():
    rng = Random(5)
    scene = scenes.compose(rng)[0]
    names = [cell.thing for cell in scene]
    drill = next(d for d in lessons.drills(scene, rng) if d.startswith("of "))
    for one, side, other, _ in pairs(drill.split()[1:], 4):
        row, column = divmod(names.index(one), 4)
        wanted = NUMBERS[other.partition(">")[0]]
        assert wanted == 1 + (column if side in ("left", "right") else row)


def test_early_answers_start_at_the_deciding_word(processor):
    scene, facts = scenes.compose(Random(6))
    vocabulary = tiny.vocabulary()
    for question in scenes.questions(facts, Random(0)):
        block = tokenize(processor, question.text, question.answer, tiny.IMAGE_TOKENS)
        prefix, tokens, labels = lessons.answered_early(block, scene)
        assert (prefix, tokens) == block[:2]
        answer = question.answer.split()[0]
        start = tokens.index(vocabulary.index("ASSISTANT:")) + 1
        assert labels[start:] == block[2][start:]
        words = [vocabulary[label] for label in labels[:start] if label != IGNORE]
        places = [word for word in words if word in NUMBERS and word != answer]
        assert words == places + [answer] * (len(words) - len(places))
        assert len(words) - len(places) >= 2
        assert bool(places) == (question.subtask == "position")


def test_pixels_are_those_of_the_image_processor(processor):
    scene = scenes.compose(Random(7))[0]
    ours = lessons.pixel_values([scene], Random(8))
    image = drawing.render([scene], Random(8).getrandbits(32))
    theirs = processor.image_processor(images=list(image), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def test_training_scenes_come_from_the_training_split(monkeypatch, processor):
    seen = []
    render = lessons.render
    monkeypatch.setattr(lessons, "render", lambda s, seed: seen.extend(s) or render(s, seed))
    lessons.drill_batch(4, Random(0))
    lessons.question_batch(processor, "train", 4, 6, Random(0), early=True)
    assert len(seen) == 8
    assert {drawing.split_of(scene) for scene in seen} == {"train"}
