"""The synthetic benchmark: exact answers, no shortcuts, disjoint splits, reproducible files."""

import json
from collections import Counter, defaultdict
from random import Random

import numpy as np
import pytest
from PIL import Image

from grace.evaluation import drawing, mme, scenes, synthetic, topics

NUMBERS = {"one": 1, "two": 2, "three": 3, "four": 4}


def singular(shape):
    return {topics.plural(name): name for name in drawing.SHAPES}.get(shape, shape)


def things(scene):
    return [cell.thing for cell in scene]


def side(scene, one, other):
    """Which of left, right, above, below hold for the only `one` and the only `other`."""
    names = things(scene)
    assert names.count(one) == names.count(other) == 1
    (y, x), (v, u) = (divmod(names.index(name), drawing.GRID) for name in (one, other))
    return {"left": x < u, "right": x > u, "above": y < v, "below": y > v}


def truth(scene, subtask, text):
    """The answer read off the scene by parsing the question anew."""
    words = text.split("?")[0].split()
    names = things(scene)
    if subtask == "existence":
        return words[3] in names
    if subtask == "count":
        return names.count(singular(words[3])) == NUMBERS[words[2]]
    if subtask == "position":
        holds = side(scene, words[2], words[-4])
        return holds[next(w for w in words if w in holds)]
    if subtask == "color":
        assert names.count(words[2]) == 1
        return scene[names.index(words[2])].color == words[3]
    if subtask == "OCR":
        return " ".join(n for n in names if n in drawing.LETTERS) == " ".join(words[6:])
    return sum(int(n) for n in names if n in drawing.DIGITS) == int(words[-1])


@pytest.fixture(scope="module")
def heldout(tmp_path_factory):
    root = tmp_path_factory.mktemp("benchmark") / "heldout"
    return root, synthetic.draw(root, images_per_subtask=60, seed=3)


def test_layout_is_mme(heldout):
    root, drawn = heldout
    rows = mme.load(root)
    assert len(rows) == 6 * 60 * 2
    assert tuple(drawn) == topics.SUBTASKS
    assert all(row.image.name == f"{index // 2 % 60:03d}.png" for index, row in enumerate(rows))
    with Image.open(rows[0].image) as image:
        assert (image.size, image.mode, image.format) == ((32, 32), "RGB", "PNG")


def test_answers_follow_from_the_scenes(heldout):
    root, drawn = heldout
    for row in mme.load(root):
        scene = drawn[row.subtask][int(row.image.stem)]
        assert truth(scene, row.subtask, row.question) == (row.answer == "Yes"), row


def test_text_alone_is_chance(heldout):
    """However a model maps questions to answers, half of the answers are right."""
    answers = defaultdict(Counter)
    for row in mme.load(heldout[0]):
        answers[row.subtask, row.question][row.answer] += 1
    assert all(count["Yes"] == count["No"] for count in answers.values())


def test_every_image_has_one_yes_and_one_no(heldout):
    rows = mme.load(heldout[0])
    for yes, no in zip(rows[::2], rows[1::2], strict=True):
        assert (yes.image, yes.answer, no.answer) == (no.image, "Yes", "No")


def test_color_in_question_appears_elsewhere(heldout):
    root, drawn = heldout
    for row in (row for row in mme.load(root) if row.subtask == "color"):
        shape, color = row.question.split()[2:4]
        scene = drawn["color"][int(row.image.stem)]
        assert any(c.color == color and c.thing != shape for c in scene)


@pytest.fixture(scope="module")
def sample():
    rng = Random(11)
    return [scenes.compose(rng) for _ in range(6000)]


def test_number_of_objects_says_nothing_about_the_count(sample):
    occupied = defaultdict(list)
    for scene, facts in sample:
        topic, which = next(f for f in facts if f[0].subtask == "count")
        occupied[topic.values[which]].append(sum(bool(c.thing) for c in scene))
    means = [np.mean(occupied[number]) for number in NUMBERS]
    assert max(means) - min(means) < 4 * 1.2 / np.sqrt(1500) * np.sqrt(2)


def test_one_shape_alone_says_little_about_the_position(sample):
    """The best guess from where the first shape stands is right in about 2 of 3 cases."""
    seen = defaultdict(Counter)
    for scene, facts in sample:
        topic, which = next(f for f in facts if f[0].subtask == "position")
        seen[things(scene).index(topic.shapes[0]), topic.values[0]][which] += 1
    right = sum(max(count.values()) for count in seen.values()) / len(sample)
    assert 0.5 < right < 0.72


def test_one_digit_alone_says_little_about_the_sum(sample):
    seen = defaultdict(Counter)
    for scene, facts in sample:
        topic, which = next(f for f in facts if f[0].subtask == "numerical_calculation")
        digit = next(c.thing for c in scene if c.thing in drawing.DIGITS)
        seen[digit, topic.values][which] += 1
    right = sum(max(count.values()) for count in seen.values()) / len(sample)
    assert right < 0.75


def test_topics_are_symmetric(sample):
    """Whether the first or the second question is true does not depend on the topic."""
    for subtask in topics.SUBTASKS:
        which = [w for _, facts in sample for topic, w in facts if topic.subtask == subtask]
        assert abs(np.mean(which) - 0.5) < 4 * 0.5 / np.sqrt(len(which))


def test_splits_are_disjoint_whatever_the_seeds(tmp_path):
    digests = {}
    for split in synthetic.SPLITS:
        drawn = synthetic.draw(tmp_path / split, images_per_subtask=40, seed=0, split=split)
        digests[split] = {drawing.digest(scene) for part in drawn.values() for scene in part}
        assert len(digests[split]) == 240
        assert {drawing.split_of(s) for part in drawn.values() for s in part} == {split}
    assert not digests["train"] & digests["heldout"]
    assert not digests["train"] & digests["validation"]
    assert not digests["validation"] & digests["heldout"]


def test_split_shares():
    rng = Random(5)
    share = Counter(drawing.split_of(scenes.compose(rng)[0]) for _ in range(4000))
    assert abs(share["train"] / 4000 - 0.75) < 0.03
    assert abs(share["heldout"] / 4000 - 0.125) < 0.025


def contents(root):
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


def test_seed_decides_every_byte(tmp_path):
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        synthetic.draw(tmp_path / name, images_per_subtask=3, seed=seed)
        synthetic.training_rows(tmp_path / f"{name}-rows", images=3, seed=seed)
    assert contents(tmp_path / "a") == contents(tmp_path / "b") != contents(tmp_path / "c")
    rows = [contents(tmp_path / f"{name}-rows") for name in "abc"]
    assert rows[0] == rows[1] != rows[2]


def test_training_rows(tmp_path):
    rows = synthetic.training_rows(tmp_path, images=20, seed=1, questions_per_image=12)
    assert rows == json.loads((tmp_path / "train.json").read_text())
    assert len(rows) == 20 * 12
    assert set(Counter(row["subtask"] for row in rows).values()) == {40}
    human, reply = rows[0]["conversations"]
    assert human["value"].startswith("<image>\n")
    assert (human["from"], reply["from"]) == ("human", "gpt")
    with Image.open(tmp_path / rows[0]["image"]) as image:
        assert image.size == (32, 32)
    answers = Counter(row["conversations"][1]["value"] for row in rows)
    closed = answers["Yes"] + answers["No"]
    assert 0.5 < closed / len(rows) < 0.8
    assert answers["Yes"] > 0.35 * closed


def test_training_questions_are_worded_as_in_the_benchmark(heldout, tmp_path):
    rows = synthetic.training_rows(tmp_path, images=400, seed=2)
    asked = {row["conversations"][0]["value"].removeprefix("<image>\n") for row in rows}
    numbers = [r.question for r in mme.load(heldout[0]) if r.subtask == "numerical_calculation"]
    assert set(numbers) <= asked


def test_rendering_shows_the_scene():
    """A cell has ink where it holds a thing, and in its color."""
    scene = scenes.compose(Random(0))[0]
    image = drawing.render([scene], seed=1)[0].astype(float)
    cells = image.reshape(4, 8, 4, 8, 3).swapaxes(1, 2).reshape(16, 8, 8, 3)
    for cell, pixels in zip(scene, cells, strict=True):
        ink = pixels.max(-1) > 90
        assert ink.any() == bool(cell.thing)
        if cell.thing:
            assert np.abs(pixels[ink].mean(0) - drawing.COLORS[cell.color]).max() < 45, cell


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match="images_per_subtask must be at least 1, got 0"):
        synthetic.draw(tmp_path / "x", images_per_subtask=0, seed=0)
    with pytest.raises(
        ValueError, match="split must be one of train, validation, heldout, got 't'"
    ):
        synthetic.draw(tmp_path / "x", images_per_subtask=1, seed=0, split="t")
    with pytest.raises(ValueError, match="questions_per_image must be between 1 and 18, got 19"):
        synthetic.training_rows(tmp_path / "x", images=1, seed=0, questions_per_image=19)
    assert not (tmp_path / "x").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="root must be an empty folder"):
        synthetic.draw(tmp_path, images_per_subtask=1, seed=0)
