"""What replies say: hard strings."""

import pytest

from grace.evaluation.replies import option, yes_or_no

OPTIONS = {"A": "red", "B": "dark red", "C": "a dog", "D": "two dogs"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Yes", "yes"),
        ("no.", "no"),
        ("\nyes", "yes"),
        ("**No**, it is", "no"),
        ("<answer>no</answer>", "no"),
        ("It is not", "no"),
        ("It’s not there", "no"),
        ("The answer is yes.", "yes"),
        ("There isn't a dog", "no"),
        ("There is a dog, not a cat", "yes"),
        ("There are no dogs", "no"),
        ("Well, no", "no"),
        ("No doubt there is one", "yes"),
        ("Yes, there is no doubt", "yes"),
        ("That's incorrect", "no"),
        ("I can't see a dog", "no"),
        ("I know", "other"),
        ("Nothing", "other"),
        ("Noyes", "other"),
        ("I don't know", "other"),
        ("I cannot tell", "other"),
        ("I'm not sure", "other"),
        ("Yes and no", "other"),
        ("", "other"),
    ],
)
def test_yes_or_no(text, said):
    assert yes_or_no(text) == said


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("(b)", "B"),
        ("a", "A"),
        ("b. two words", "B"),
        ("**C**", "C"),
        ("D) two dogs", "D"),
        ("The answer is B", "B"),
        ("The answer is B.", "B"),
        ("Answer is\nC", "C"),
        ('The answer is: "C"', "C"),
        ("the answer is c", "C"),
        ("the answer is a dog", "C"),
        ("The correct answer is (D) because A is wrong", "D"),
        ("Option D is right, not option A", "D"),
        ("The answer is not A, it is B", "B"),
        ("Not A, but B", "B"),
        ("The answer is not A", None),
        ("A dog is shown", "C"),
        ("It is dark red", "B"),
        ("It is red", "A"),
        ("It isn't red", None),
        ("The color is red or dark red", None),
        ("A and B", None),
        ("A, B", None),
        ("Both A and C", None),
        ("As an AI model, B", "B"),
        ("A is the correct answer", "A"),
        ("answer", None),
        ("E", None),
        ("None of them", None),
        ("", None),
    ],
)
def test_option(text, letter):
    assert option(text, OPTIONS) == letter


def test_no_options():
    assert option("A", {}) is None
