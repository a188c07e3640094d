"""Descriptions, further questions and the tokenizer of the drawn benchmark."""

from __future__ import annotations

import re
from collections import Counter
from random import Random

import pytest

from grace.evaluation.drawn.describing import DESCRIBE, GRID, description, further_questions
from grace.evaluation.drawn.examples import Example, Examples
from grace.evaluation.drawn.models import make_processor, vocabulary
from grace.evaluation.drawn.scenes import WIDTH
from grace.evaluation.drawn.vocabulary import COLORS, CONDITIONS, SHAPES, held_out
from grace.evaluation.topics import SUFFIX, plural

EXAMPLES = [Examples(5)[index] for index in range(360)]


def _asked(example: Example) -> list[tuple[str, str]]:
    return further_questions(example, 4, Random(example.index))


def _truth(example: Example, question: str) -> str | None:
    """The answer worked out from the scene; None for a wording that is none of these."""
    items = example.scene.items
    if match := re.fullmatch(r"Is there an? (\w+) (\w+) in this image\?", question):
        return "Yes" if any((i.color, i.shape) == match.groups() for i in items) else "No"
    if match := re.fullmatch(r"How many (?:(\w+) )?(\w+) are there in this image\?", question):
        alike = [item for item in items if plural(item.shape) == match[2]]
        return str(sum(match[1] in (None, item.color) for item in alike))
    if match := re.fullmatch(r"What color is the (\w+) in this image\?", question):
        (color,) = [item.color for item in items if item.shape == match[1]]
        return color
    sides = r"Is the (\w+) (?:on the )?(left|right|above|below)(?: of)? the (\w+) in this image\?"
    if match := re.fullmatch(sides, question):
        (one,), (other,) = ([i for i in items if i.shape == name] for name in match.groups()[::2])
        holds = {
            "left": one.x < other.x,
            "right": one.x > other.x,
            "above": one.y < other.y,
            "below": one.y > other.y,
        }
        return "Yes" if holds[match[2]] else "No"
    if match := re.fullmatch(r"Is the word in this image ([A-Z]+)\?", question):
        return "Yes" if match[1] == example.scene.text else "No"
    if match := re.fullmatch(r"Does this image show (?:a )?(\w+?)s?\?", question):
        return "Yes" if match[1] == example.scene.place else "No"
    if match := re.fullmatch(r"Does this image show a place (.+)\?", question):
        return "Yes" if match[1] == CONDITIONS[example.scene.condition] else "No"
    for own in example.questions:  # about a result, a landscape, a phrase: in the same words
        if own.text == question + SUFFIX:
            return own.answer
    return None


def test_answers_to_further_questions_are_exact() -> None:
    checked: Counter[str] = Counter()
    for example in EXAMPLES:
        for question, answer in _asked(example):
            truth = _truth(example, question.removesuffix(SUFFIX))
            if truth is not None:
                assert answer == truth, (question, example.scene)
                checked[example.questions[0].subtask] += 1
            assert question.endswith(SUFFIX) == (answer in ("Yes", "No"))
    for subtask in ("existence", "count", "position", "color", "OCR"):
        assert checked[subtask] == 4 * 40  # all of them
    assert min(checked.values()) > 40


def test_results_asked_about_are_right_or_near() -> None:
    for example in EXAMPLES:
        if example.scene.kind not in ("sum", "program"):
            continue
        result = int(next(q.answer for q in example.questions if q.answer not in ("Yes", "No")))
        for question, answer in _asked(example):
            number = int(re.findall(r"(\d+)\?", question)[0])
            assert (number == result) == (answer == "Yes")
            assert abs(number - result) <= 6


def test_half_of_the_answers_are_yes() -> None:
    said = Counter(a for e in EXAMPLES for _, a in _asked(e) if a in ("Yes", "No"))
    share = said["Yes"] / said.total()
    assert abs(share - 0.5) < 4 * 0.5 / said.total() ** 0.5


def test_nothing_held_out_is_named() -> None:
    color = "|".join(COLORS)
    names = "|".join([*SHAPES])
    for example in EXAMPLES:
        texts = [text for pair in _asked(example) for text in pair]
        for text in [*texts, description(example.scene)] if not example.scene.phrase else []:
            for pair in re.findall(rf"\b({color}) ({names})\b", text):
                assert not held_out(("color", *pair)), text
        for question, answer in _asked(example):
            if match := re.match(r"How many (\w+) (\w+) are", question):
                shape = next(name for name in SHAPES if plural(name) == match[2])
                assert not held_out(("count", int(answer), match[1], shape))
            if match := re.match(r"Is the (\w+) (?:on|above|below).* the (\w+) in", question):
                assert not held_out(("position", *match.groups()))
            if match := re.match(r"Is the word in this image (\w+)\?", question):
                assert not held_out(("OCR", match[1]))


def test_a_description_tells_every_shape_and_its_place() -> None:
    for example in EXAMPLES:
        scene = example.scene
        text = description(scene)
        if scene.text:
            assert text == "text : " + scene.text.replace("\n", " ; ")
        elif scene.items:
            told = re.findall(r"(\d) (\d) (\w+) (\w+)", text)
            assert Counter(told) == Counter(
                (str(int(i.y / WIDTH * GRID)), str(int(i.x / WIDTH * GRID)), i.color, i.shape)
                for i in scene.items
            )
            assert [row for row, *_ in told] == sorted(row for row, *_ in told)


def test_the_tokenizer_spells_what_is_no_word_and_forgets_nothing() -> None:
    tokenizer = make_processor(56).tokenizer
    assert len(tokenizer) == len(vocabulary())
    assert tokenizer.tokenize("KABO 127") == ["K", "##A", "##B", "##O", "1", "##2", "##7"]
    assert tokenizer.decode(tokenizer.encode("KABO 127 heart")) == "KABO 127 heart"
    for word in ("Yes", "No"):
        assert len(tokenizer.encode(word, add_special_tokens=False)) == 1
    for split in ("train", "heldout"):
        examples = Examples(9, split=split)
        for example in (examples[index] for index in range(270)):
            texts = [t for q in example.questions for t in (q.text, q.answer)]
            texts += [description(example.scene), DESCRIBE]
            if split == "train":
                texts += [text for pair in _asked(example) for text in pair]
            for text in texts:
                assert tokenizer.unk_token_id not in tokenizer.encode(text), text


def test_a_patch_must_divide_the_picture() -> None:
    with pytest.raises(ValueError, match="pixels must be a multiple of the patch 14, got 60"):
        make_processor(60)
