"""A control that sees no picture: the drawn benchmark's answers are not in its questions.

Whatever reads the question alone is right on half of them: on the benchmark exactly, since every
question is asked as often where it is true as where it is false; on training rows, which are drawn
without twins, within noise. The readers here are fitted on one half of a large sample and asked
about the other half; that they find a bias where there is one is tested, too.
"""

import math
import re
from collections import Counter, defaultdict
from itertools import pairwise
from random import Random

import pytest

from grace.evaluation import mme
from grace.evaluation.drawn import benchmark, vocabulary
from grace.evaluation.drawn.examples import Examples
from grace.evaluation.drawn.levels import LEVELS
from grace.evaluation.drawn.topics import SUBTASKS

EACH = 1000  # examples a subtask


@pytest.fixture(scope="module", params=vocabulary.SPLITS)
def examples(request):
    drawn = Examples(seed=11, split=request.param)
    return [drawn[index] for index in range(EACH * len(SUBTASKS))]


def closed(example):
    """(true question, false question)."""
    answers = {question.answer: question.text for question in example.questions}
    return answers["Yes"], answers["No"]


def by_subtask(examples):
    found = defaultdict(list)
    for example in examples:
        found[example.questions[0].subtask].append(closed(example))
    return found


# --- readers of questions ------------------------------------------------------------------------


def shape_of(question):
    """The question without what it asks for: numbers, words in capitals, quotations, names."""
    names = "|".join((*vocabulary.COLORS, *vocabulary.SHAPES, *vocabulary.PLACES))
    return re.sub(rf'".*"|\b[A-Z]{{3,}}\b|-?\d+|\b(?:{names})s?\b', "…", question)


def features(question):
    """Words, pairs of words, the whole, the template; of numbers size, parity and last digit."""
    words = re.findall(r"-?\w+", question)
    found = {*words, *pairwise(words), question, ("template", shape_of(question))}
    for number in map(int, re.findall(r"-?\d+", question)):
        found |= {("last", number % 10), ("parity", number % 2), ("size", abs(number).bit_length())}
    for word in re.findall(r"\b[A-Z]{3,}\b", question):
        found |= {("letters", len(word)), ("pair", word[:2]), ("end", word[-1:])}
        found |= {("letter", letter) for letter in word}
    return found


def naive_bayes(pairs):
    """Log odds of yes, fitted on (true, false) questions."""
    seen = defaultdict(lambda: [1, 1])
    for pair in pairs:
        for place, question in enumerate(pair):
            for feature in features(question):
                seen[feature][place] += 1
    odds = {feature: math.log(yes / no) for feature, (yes, no) in seen.items()}
    return lambda question: sum(odds.get(feature, 0.0) for feature in features(question))


def memory(pairs):
    """How much more often a question was true than false: the best there is, where it was seen."""
    counts = Counter()
    for true, false in pairs:
        counts[true] += 1
        counts[false] -= 1
    return lambda question: counts[question]


READERS = {"naive bayes": naive_bayes, "memory": memory}


def shares(pairs, reader):
    """Right answers to single questions, and to "which of the two is true?"; fitted on a half."""
    half = len(pairs) // 2
    score = READERS[reader](pairs[:half])
    single = told = 0.0
    for true, false in pairs[half:]:
        yes, no = score(true), score(false)
        single += ((yes > 0) + 0.5 * (yes == 0) + (no < 0) + 0.5 * (no == 0)) / 2
        told += (yes > no) + 0.5 * (yes == no)
    return single / half, told / half


def noise(pairs):
    """Four standard deviations of a share over half of the pairs."""
    return 4 * 0.5 / math.sqrt(len(pairs) // 2)


# --- training rows -------------------------------------------------------------------------------


@pytest.mark.parametrize("reader", READERS)
def test_no_reader_of_training_questions_is_better_than_chance(examples, reader):
    every = []
    for subtask, pairs in by_subtask(examples).items():
        assert len(pairs) == EACH
        for share in shares(pairs, reader):
            assert abs(share - 0.5) < noise(pairs), subtask
        every += pairs
    Random(0).shuffle(every)  # halves with all subtasks in both
    for share in shares(every, reader):
        assert abs(share - 0.5) < noise(every) < 0.03


@pytest.mark.parametrize("reader", READERS)
def test_a_reader_would_find_a_bias(examples, reader):
    """Were the first of two in the alphabet true two times in three, both would be told."""
    rng, biased = Random(1), []
    for example in examples:
        first, second = sorted(closed(example))
        biased.append((first, second) if rng.random() < 2 / 3 else (second, first))
    rng.shuffle(biased)
    single, told = shares(biased, reader)
    assert min(single, told) > 0.5 + noise(biased)


def test_every_question_is_as_often_true_as_false(examples):
    """Over all questions that come up often, deviations from one half are those of coins."""
    for subtask, pairs in by_subtask(examples).items():
        counts = defaultdict(lambda: [0, 0])
        for pair in pairs:
            for place, question in enumerate(pair):
                words = question.split()
                if subtask == "count":  # of all colors: one color's numbers come up too seldom
                    words = [word for word in words if word not in vocabulary.COLORS]
                counts[" ".join(words)][place] += 1
        often = [count for count in counts.values() if sum(count) >= 20]
        if subtask in ("existence", "count", "color", "scene"):
            assert len(often) > 10, subtask
        squares = sum((yes - no) ** 2 / (yes + no) for yes, no in often)
        # Mean 1 each; variance 2 each, up to twice that where questions come in fixed pairs.
        assert abs(squares - len(often)) <= 4 * math.sqrt(4 * len(often)), subtask


def test_every_template_is_balanced(examples):
    for subtask, pairs in by_subtask(examples).items():
        counts = defaultdict(lambda: [0, 0])
        for pair in pairs:
            for place, question in enumerate(pair):
                counts[shape_of(question)][place] += 1
        assert len(counts) <= 24, subtask  # templates, and not questions
        for template, (yes, no) in counts.items():
            assert abs(yes - no) <= 4 * math.sqrt(yes + no), template


def test_the_first_of_two_that_a_question_offers_is_right_half_of_the_time(examples):
    first = Counter()
    for example in examples:
        (said,) = (q for q in example.questions if q.answer not in ("Yes", "No"))
        if " or " in said.text:
            one, _, _ = said.text.partition(" or ")
            first[said.subtask, bool(re.search(rf"\b{said.answer}\b", one))] += 1
    for subtask in ("existence", "position"):
        assert first[subtask, True] + first[subtask, False] == EACH
        assert abs(first[subtask, True] - first[subtask, False]) < 4 * math.sqrt(EACH)


# --- the benchmark -------------------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS)
def test_the_benchmark_asks_every_question_as_often_with_yes_as_with_no(level, tmp_path):
    """Not about, but exactly: no function of the question is right on more or less than half."""
    for split in ("heldout", "validation"):
        root = tmp_path / split
        benchmark.draw(root, images_per_subtask=16, seed=7, level=level, split=split, pixels=32)
        rows = mme.load(root)
        counts = Counter((row.subtask, row.question, row.answer) for row in rows)
        assert sum(counts.values()) == 9 * 16 * 2
        for subtask, question, _ in list(counts):
            asked = [counts[subtask, question, answer] for answer in ("Yes", "No")]
            assert asked[0] == asked[1] > 0, question
        guesses = [mme.answered(rows, [text] * len(rows)) for text in ("yes", "no")]
        for guessed in guesses:  # and acc+ is 0: a score of 50 in each of the nine
            assert mme.score(guessed)["total"] == 9 * 50.0
