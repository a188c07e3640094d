"""The large drawn benchmark: exact answers, held-out compositions, twins."""

import contextlib
import io
import math
import re
from collections import Counter, defaultdict
from itertools import pairwise
from random import Random

import numpy as np
import pytest
from PIL import Image

from grace.evaluation import mme
from grace.evaluation.drawn import benchmark, vocabulary
from grace.evaluation.drawn.composing import compose
from grace.evaluation.drawn.examples import Examples
from grace.evaluation.drawn.levels import LEVELS
from grace.evaluation.drawn.scenes import compositions, digest
from grace.evaluation.drawn.topics import SUBTASKS, pose

SINGULAR = {"crosses": "cross"}
CONDITIONS = {
    "in daylight": "day",
    "at sunset": "sunset",
    "at night": "night",
    "in the rain": "rain",
    "in the snow": "snow",
    "in the fog": "fog",
}


def printed(code):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(code, {})
    return int(out.getvalue())


def only(scene, shape):
    (item,) = [item for item in scene.items if item.shape == shape]
    return item


def beside(scene, one, other):
    a, b = only(scene, one), only(scene, other)
    return {"left": a.x < b.x, "right": a.x > b.x, "above": a.y < b.y, "below": a.y > b.y}


def in_english(text):
    """Adjective behind the noun and in its gender, in front of it in English."""
    noun, adjective = text.split()
    name, feminine = vocabulary.NOUNS[noun]
    forms = {(fem if feminine else masc): en for masc, (fem, en) in vocabulary.ADJECTIVES.items()}
    return f"{forms[adjective]} {name}"


def truth(scene, subtask, question):
    """The answer, from the scene and the question's words."""
    words = question.split("?")[0].split()
    if subtask == "existence":
        return (words[4], words[3]) in {(item.shape, item.color) for item in scene.items}
    if subtask == "count":
        shape = words[4] if words[2] == "1" else SINGULAR.get(words[4], words[4][:-1])
        alike = [item for item in scene.items if (item.color, item.shape) == (words[3], shape)]
        return len(alike) == int(words[2])
    if subtask == "position":
        holds = beside(scene, words[2], words[-4])
        return holds[next(word for word in words if word in holds)]
    if subtask == "color":
        return only(scene, words[2]).color == words[3]
    if subtask == "scene":
        place, condition = re.search(r"show (?:a )?(\w+) (.*)\?", question).groups()
        shown = (scene.place, scene.condition)
        return shown == (place.removesuffix("s"), CONDITIONS[condition])
    if subtask == "OCR":
        return scene.text == words[-1]
    if subtask == "text_translation":
        return in_english(scene.text) == re.search('"(.*)"', question).group(1)
    asked = int(question.split("?")[0].split()[-1])
    if subtask == "numerical_calculation":
        return eval(scene.text.replace("×", "*")) == asked
    return printed(scene.text) == asked


@pytest.fixture(scope="module", params=tuple(LEVELS))
def drawn(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("drawn") / request.param
    return root, benchmark.draw(root, images_per_subtask=12, seed=5, level=request.param, pixels=64)


@pytest.fixture(scope="module")
def examples():
    return [Examples(seed=1)[index] for index in range(9 * 250)]


def test_layout_is_mme(drawn):
    root, scenes = drawn
    rows = mme.load(root)
    assert len(rows) == 9 * 12 * 2
    assert set(scenes) == set(SUBTASKS) == {row.subtask for row in rows}
    with Image.open(rows[0].image) as image:
        assert (image.size, image.mode, image.format) == ((64, 64), "RGB", "PNG")


def test_answers_follow_from_the_scenes(drawn):
    root, scenes = drawn
    for row in mme.load(root):
        scene = scenes[row.subtask][int(row.image.stem)]
        assert truth(scene, row.subtask, row.question) == (row.answer == "Yes"), (row, scene)


def test_training_answers_follow_from_the_scenes(examples):
    for example in examples:
        closed = [q for q in example.questions if q.answer in ("Yes", "No")]
        assert sorted(q.answer for q in closed) == ["No", "Yes"]
        for question in closed:
            held = truth(example.scene, question.subtask, question.text)
            assert held == (question.answer == "Yes"), example


def test_open_answers_are_those_of_the_true_question(examples):
    for example in examples:
        (said,) = [q.answer for q in example.questions if q.answer not in ("Yes", "No")]
        true, false = sorted(example.questions, key=lambda q: ["Yes", "No"].index(q.answer)
                             if q.answer in ("Yes", "No") else 2)[:2]  # fmt: skip
        assert re.search(rf"\b{re.escape(said)}\b", true.text), example
        assert not re.search(rf"\b{re.escape(said)}\b", false.text), example


def test_images_have_one_yes_and_one_no_and_twins_the_opposite(drawn):
    rows = mme.load(drawn[0])
    for first in range(0, len(rows), 4):
        yes, no, twin_yes, twin_no = rows[first : first + 4]
        assert [r.answer for r in rows[first : first + 4]] == ["Yes", "No", "Yes", "No"]
        assert (yes.question, no.question) == (twin_no.question, twin_yes.question)
        assert yes.image == no.image != twin_yes.image == twin_no.image


def pairs_in(words, firsts, seconds):
    return {(a, b) for a, b in pairwise(words) if a in firsts and b in seconds}


TRANSLATIONS = {
    vocabulary.english(noun, adjective): ("translation", noun, adjective)
    for noun in vocabulary.NOUNS
    for adjective in vocabulary.ADJECTIVES
}


def asked_compositions(example):
    """What the words of training questions and answers are about, parsed anew."""
    asked = set()
    for question in example.questions:
        words = re.findall(r"\w+", question.text.split("?")[0])
        shapes = [s for w in words for s in (SINGULAR.get(w, w), w[:-1]) if s in vocabulary.SHAPES]
        if question.subtask == "existence":
            found = pairs_in(words, vocabulary.COLORS, vocabulary.SHAPES)
            assert found
            asked |= {("color", *pair) for pair in found}
        elif question.subtask == "color":
            asked |= {("color", c, shapes[0]) for c in words if c in vocabulary.COLORS}
        elif question.subtask == "count":
            (color,) = {w for w in words if w in vocabulary.COLORS}
            asked |= {("count", int(w), color, shapes[0]) for w in words if w.isdigit()}
        elif question.subtask == "position":
            asked.add(("position", *shapes))
        elif question.subtask == "OCR":
            asked |= {("OCR", w) for w in (*words, question.answer) if len(w) > 2 and w.isupper()}
        elif question.subtask == "text_translation":
            asked |= {c for phrase, c in TRANSLATIONS.items() if f'"{phrase}"' in question.text}
    return asked


def test_held_out_compositions_never_occur_in_training(examples):
    for example in examples:
        found = compositions(example.scene) | asked_compositions(example)
        assert not [c for c in found if vocabulary.held_out(c)], example


def test_every_part_of_a_held_out_composition_occurs_in_training(examples):
    found = set().union(*(compositions(e.scene) | asked_compositions(e) for e in examples))
    every = {
        "color": (vocabulary.COLORS, vocabulary.SHAPES),
        "scene": (vocabulary.PLACES, vocabulary.CONDITIONS),
        "translation": (vocabulary.NOUNS, vocabulary.ADJECTIVES),
        "count": (range(1, 10), vocabulary.COLORS, vocabulary.SHAPES),
    }
    for kind, parts in every.items():
        for place, names in enumerate(parts):
            assert {c[1 + place] for c in found if c[0] == kind} == set(names), kind


def test_held_out_questions_are_about_held_out_compositions():
    for level in LEVELS:
        for subtask in SUBTASKS:
            for split in vocabulary.SPLITS:
                topic = pose(subtask, level, split, Random(f"{subtask} {level}"))
                held = [vocabulary.held_out(c) for c in topic.asked]
                some = subtask not in ("scene", "numerical_calculation", "code_reasoning")
                assert held == [split == "heldout" and some] * 2, topic


def test_share_of_held_out_compositions():
    pairs = [("color", c, s) for c in vocabulary.COLORS for s in vocabulary.SHAPES]
    assert sum(map(vocabulary.held_out, pairs)) == 24  # two of eight colors a shape
    for shape in vocabulary.SHAPES:
        assert sum(vocabulary.held_out(("color", c, shape)) for c in vocabulary.COLORS) == 2
        for color in vocabulary.COLORS:
            held = [n for n in range(1, 10) if vocabulary.held_out(("count", n, color, shape))]
            assert len(held) == 2
            assert 3 <= held[0] == held[1] - 2 <= 7
        shown = {n for c in vocabulary.COLORS for n in range(1, 10)
                 if not vocabulary.held_out(("count", n, c, shape))}  # fmt: skip
        assert shown == set(range(1, 10))  # in another color
    words = [vocabulary.word(Random(seed), 6) for seed in range(2000)]
    share = np.mean([vocabulary.held_out(("OCR", word)) for word in words])
    assert abs(share - 0.25) < 0.05


def test_splits_share_no_scene():
    seen = {
        split: {digest(Examples(0, split=split)[index].scene) for index in range(90)}
        for split in vocabulary.SPLITS
    }
    assert all(len(scenes) == 90 for scenes in seen.values())
    assert len(set().union(*seen.values())) == 270


def test_absent_pair_has_its_color_and_its_shape_in_the_picture():
    """In existence only the composition tells: each shape twice, each color at least twice."""
    rng = Random(3)
    for split in ("train", "heldout"):
        for number in range(60):
            topic, which = pose("existence", "hard", split, rng), number % 2
            scene = compose(topic, which, "hard", split, rng)
            shapes = Counter(item.shape for item in scene.items)
            colors = Counter(item.color for item in scene.items)
            for color, shape in topic.facts:
                assert shapes[shape] == 2
                assert colors[color] >= 2


def test_what_is_counted_is_seldom_all_of_its_shape():
    rng, alone = Random(9), []
    for number in range(200):
        topic = pose("count", "medium", "train", rng)
        (color, shape), which = topic.about, number % 2
        scene = compose(topic, which, "medium", "train", rng)
        alike = [item.color for item in scene.items if item.shape == shape]
        assert alike.count(color) == topic.facts[which]
        assert len(alike) - alike.count(color) <= 2
        alone.append(len(alike) == alike.count(color))
    assert 0.2 < np.mean(alone) < 0.5


def test_number_of_items_says_nothing_about_the_count():
    rng, items = Random(4), defaultdict(list)
    for _ in range(1500):
        topic = pose("count", "easy", "train", rng)
        scene = compose(topic, 0, "easy", "train", rng)
        items[topic.facts[0]].append(len(scene.items))
    means = [np.mean(of_number) for of_number in items.values()]
    fewest = min(map(len, items.values()))
    assert max(means) - min(means) < 4 * 0.5 * math.sqrt(2 / fewest)
