"""MME as lmms-eval asks and scores it: the same, apart from three kinds of reply.

tests/data/lmms_mme.json holds what lmms-eval gives (tools/make_lmms_reference.py). Where lmms-eval
is installed its own functions are run, on replies that hypothesis makes.
"""

import importlib.util
import json
from pathlib import Path

import pytest
from conftest import DATA
from hypothesis import given
from hypothesis import strategies as st

from grace.evaluation import mme

REFERENCE = json.loads((DATA / "lmms_mme.json").read_text())

# docs/evaluation.md lists these: the official parser takes each for "other".
WHITE_SPACE = {"  yes": "yes", "\n\n\nNo.": "no", "   no": "no"}
LETTERS = {"y": "yes", "n": "no", "Y": "yes", "N.": "no", " y ": "yes", "y.": "yes"}
FULL_STOPS = {"...yes": "yes", "a. no": "no", "N.o": "no", "y.e.s": "yes"}
DIFFERENT = WHITE_SPACE | LETTERS | FULL_STOPS


def tidied(reply):
    """What lmms-eval does to a reply before it reads it as the official parser does."""
    text = reply.lower().strip().replace(".", "")
    return {"y": "yes", "n": "no"}.get(text, text)


def rows_of(case):
    return [
        mme.Row(subtask, Path(image), f"{number}", answer, reply)
        for number, (subtask, image, answer, reply) in enumerate(case["rows"])
    ]


def test_replies_are_read_the_same_but_for_the_listed_ones():
    found = dict(REFERENCE["replies"])
    assert len(found) == 70
    assert set(found.values()) == {"yes", "no", "other"}
    different = {text: parsed for text, parsed in found.items() if mme.parse_answer(text) != parsed}
    assert different == DIFFERENT
    assert {mme.parse_answer(text) for text in DIFFERENT} == {"other"}
    for text, parsed in found.items():
        assert mme.parse_answer(tidied(text)) == parsed, text


def test_scores_are_the_same():
    """Those of plain replies as they are; those of any once the listed ones are read as there."""
    raised = 0
    for number, case in enumerate(REFERENCE["cases"]):
        rows = rows_of(case)
        wanted = pytest.approx((case["perception"], case["cognition"]), rel=1e-12)
        ours = mme.score(rows)
        odd = any(row.prediction in DIFFERENT for row in rows)
        assert not (odd and number < 6)
        if not odd:
            assert (ours["perception"], ours["cognition"]) == wanted
        said = mme.score(mme.answered(rows, [tidied(row.prediction) for row in rows]))
        assert (said["perception"], said["cognition"]) == wanted
        raised += said["total"] > ours["total"]
    assert raised > 3  # the other parser gives more, never less


def test_questions_are_asked_as_lmms_eval_asks():
    for question, asked in REFERENCE["prompts"]:
        assert mme.prompt(question.strip(), "llava") == asked  # `load` strips, too
    assert any(mme.prompt(q.strip(), "official") != asked for q, asked in REFERENCE["prompts"])


# --- lmms-eval itself ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def task():
    """Its task's own functions, without the rest of the package."""
    spec = importlib.util.find_spec("lmms_eval")
    if spec is None:
        pytest.skip("lmms-eval is not installed")
    file = Path(spec.submodule_search_locations[0]) / "tasks" / "mme" / "utils.py"
    made = importlib.util.spec_from_file_location("lmms_mme_task", file)
    module = importlib.util.module_from_spec(made)
    made.loader.exec_module(module)
    return module


WORDS = st.sampled_from(
    ["yes", "no", "Yes", "NO", "y", "n", " ", ".", "\n", "it is", "a", "ſ", "İ"]
)
REPLIES = st.one_of(st.text(max_size=8), st.lists(WORDS, max_size=5).map("".join))


@given(reply=REPLIES)
def test_parsers_differ_in_what_is_tidied_and_in_nothing_else(task, reply):
    theirs, ours = task.parse_pred_ans(reply), mme.parse_answer(reply)
    assert mme.parse_answer(tidied(reply)) == theirs
    assert ours in (theirs, "other")


@given(replies=st.lists(REPLIES, min_size=8, max_size=8))
def test_scores_of_any_replies(task, replies):
    texts = [tidied(reply) for reply in replies]
    subtasks = ["count", "count", "OCR", "code_reasoning"]
    rows = [
        mme.Row(subtasks[n // 2], Path(f"{n // 2}"), f"{n}", ("Yes", "No")[n % 2], text)
        for n, text in enumerate(texts)
    ]
    kept = {"mme_perception_score": [], "mme_cognition_score": []}
    for row, reply in zip(rows, replies, strict=True):
        doc = {"question_id": row.image.name, "category": row.subtask, "answer": row.answer}
        for name, result in task.mme_process_results(doc, [reply]).items():
            kept[name].append(result)
    ours = mme.score(rows)
    for name in ("perception", "cognition"):
        theirs = task.mme_aggregate_results(kept[f"mme_{name}_score"])
        assert ours[name] == pytest.approx(theirs, rel=1e-12)
