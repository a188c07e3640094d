"""What a free-text reply says: yes or no, or which option of a multiple-choice question.

Both parsers read words, never characters within words ("answer" holds no option A, "know" no "no"),
mind negations, and say so ("other", None) where a reply commits itself to nothing; that is wrong,
not a guess. MME keeps its official parser (`grace.evaluation.mme.parse_answer`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_MARKUP = re.compile(r"[*_`#]+|</?\w+>")
_UNSURE = re.compile(
    r"\b(?:not (?:sure|certain|clear|possible to)|unsure|unclear|uncertain"
    r"|(?:do not|don't|cannot|can't|could not|couldn't) (?:\w+ )?(?:know|tell|say|determine)"
    r"|yes (?:and|or) no|impossible to)\b"
)
_NO_DOUBT = re.compile(r"\b(?:no|without(?: a| any)?) (?:doubt|question)\b|\bnot only\b")
_NO = re.compile(r"\b(?:no|not|nope|none|never|cannot|false|incorrect|wrong|absent)\b|n't\b")
_YES = re.compile(
    r"\b(?:yes|yeah|yep|true|correct|right|indeed)\b|\b(?:there (?:is|are)|it (?:is|does|has))\b"
    r"|\b(?:no|without(?: a| any)?) (?:doubt|question)\b|\bi (?:can )?see\b"
)


def yes_or_no(text: str) -> str:
    """ "yes", "no", or "other" where a reply says neither.

    A reply that begins with yes or no says that. Otherwise the first clause of its first sentence
    that says anything counts: a negation is no ("It is not", "There isn't one"), else an
    affirmation yes ("The answer is yes", "There is a dog, not a cat"). Doubt ("I don't know",
    "Yes and no") is "other".
    """
    plain = _MARKUP.sub("", text).replace("’", "'").strip().lower()
    sentence = re.split(r"[.!?\n]", plain.lstrip(" .!?\n\"'(["), maxsplit=1)[0]
    if begins := re.match(r"(yes|no)\b(?! (?:doubt|question|and no|or no)\b)", sentence):
        return begins.group(1)
    if _UNSURE.search(sentence):
        return "other"
    for clause in re.split(r"[,;:]", sentence):
        if _NO.search(_NO_DOUBT.sub("", clause)):
            return "no"
        if _YES.search(clause):
            return "yes"
    return "other"


def option(text: str, options: Mapping[str, str]) -> str | None:
    """The letter of the option that a reply names, or None where it names none or several.

    Args:
        text: the reply.
        options: text of each option by its letter ("A", "B", …).

    In this order, the first that finds something:
        1. the reply is a letter, or begins with one that is set off: "B", "(b)", "B. two dogs";
        2. a phrase that points at a letter: "the answer is B", "Option (C)", the last that is not
           negated;
        3. the one option whose text the reply is or holds, negated ones and those within a longer
           one ("red" in "dark red") left out;
        4. the one letter that stands alone in capitals and is no article ("A dog", "I think").
    """
    plain = " ".join(_MARKUP.sub("", text).split())
    letters = "".join(options)
    if not letters:
        return None
    for find in (_begins, _points, _quotes, _stands_alone):
        found = find(plain, letters, options)
        if found is not None:
            return found if found in options else None
    return None


def _begins(text: str, letters: str, options: Mapping[str, str]) -> str | None:
    match = re.match(
        rf"[\"']?(?:[(\[]([{letters}])[)\]]|([{letters}])(?=[.):,;\"']|\s*$))(?![\w'])",
        text,
        re.IGNORECASE,
    )
    if match is None:
        return None
    rest = text[match.end() :].lstrip(".):,;\"' ")
    # "A, B and C": several are named. "b. two dogs" stays B.
    if re.match(rf"(?:(?:and|or)\s+)?[(\[]?[{letters}][)\]]?(?:[.,;)\s]|$)(?!\s*[a-z])", rest):
        return ""
    return (match.group(1) or match.group(2)).upper()


_POINTER = (
    r"\b(?:answer|option|choice|choose|select|pick|letter)\b"
    r"(?:\s+(?:is|would be|must be|should be|not|isn't|option|choice|letter)|\s*[:=])*"
    r"\s*[\"'(\[]*(?P<letter>[{letters}])(?P<after>[\"')\].:,;!]|\s|$)"
)


def _points(text: str, letters: str, options: Mapping[str, str]) -> str | None:
    pattern = _POINTER.format(letters=letters)
    found = [
        match.group("letter").upper()
        for match in re.finditer(pattern, text, re.IGNORECASE)
        if not _negated(text[: match.start("letter")])
        and not _is_article(text, match.start("letter"))
        # A small letter is one only where no word follows: "the answer is a dog".
        and (match.group("letter").isupper() or not match.group("after").isspace())
    ]
    if found:
        return found[-1]
    # "Not A, it is B"
    instead = rf"\b(?:it is|it's|but|rather)\s+[(\[]?([{letters}])[)\]]?(?=[.,;!]|$)"
    later = re.findall(instead, text)
    return later[-1] if later else None


def _negated(before: str) -> bool:
    pattern = r"(?:\bnot|\bnor|\bneither|n't|\bnever)\b[\s\"'(\[a-z]{0,12}$"
    return re.search(pattern, before) is not None


def _is_article(text: str, place: int) -> bool:
    """Whether the letter is a word of English there: "A dog", "I think"."""
    rest = text[place + 1 :]
    if text[place] not in "AI" or not re.match(r"\s+[a-z]", rest):
        return False
    return re.match(r"\s+(?:because|since|as|is|and|or|for|due)\b", rest) is None


def _quotes(text: str, letters: str, options: Mapping[str, str]) -> str | None:
    lower = text.lower()
    exact = [k for k, v in options.items() if _words(v) and _words(v) == _words(text)]
    if len(exact) == 1:
        return exact[0]
    spans: list[tuple[int, int, str]] = []
    for letter, value in options.items():
        wanted = " ".join(value.lower().split()).rstrip(".")
        if wanted:
            found = re.finditer(rf"(?<!\w){re.escape(wanted)}(?!\w)", lower)
            spans += [(*m.span(), letter) for m in found if not _negated(lower[: m.start()])]
    whole = {
        letter
        for start, end, letter in spans
        if not any(a <= start and end <= b and b - a > end - start for a, b, _ in spans)
    }
    if len(whole) == 1:
        return whole.pop()
    return None


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def _stands_alone(text: str, letters: str, options: Mapping[str, str]) -> str | None:
    found = {
        match.group()
        for match in re.finditer(rf"(?<![\w'])[{letters}](?![\w'])", text)
        if not _is_article(text, match.start()) and not _negated(text[: match.start()])
    }
    return found.pop() if len(found) == 1 else None
