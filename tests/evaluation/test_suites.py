"""POPE, ScienceQA and MMBench from local files; answers that survive an interruption."""

import base64
import io
import json
from types import SimpleNamespace

import pytest
from PIL import Image

from grace.evaluation import choices, pope, resume, suites


def png(color):
    data = io.BytesIO()
    Image.new("RGB", (40, 40), color).save(data, "PNG")
    return data.getvalue()


@pytest.fixture
def pope_root(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.png").write_bytes(png("red"))
    for setting, labels in (("random", "yyyynnnn"), ("adversarial", "yn")):
        lines = []
        for n, letter in enumerate(labels):
            label = {"y": "yes", "n": "no"}[letter]
            row = {"question_id": n, "image": "1.png", "text": f"Is there {n}?", "label": label}
            lines.append(json.dumps(row))
        (tmp_path / f"coco_pope_{setting}.json").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_pope_by_hand(pope_root):
    rows = pope.load(pope_root, pope_root / "images")
    assert [row.setting for row in rows] == ["random"] * 8 + ["adversarial"] * 2
    # random: TP 2, FN 1 and one "other"; FP 1, TN 3. adversarial: nothing said yes.
    said = ["Yes", "There is one.", "It is not", "maybe", "yes", "No", "no", "There isn't"]
    scores = pope.score(rows, [*said, "no", "no"], prompt="llava")
    assert scores["settings"]["random"] == {
        "accuracy": 5 / 8, "precision": 2 / 3, "recall": 2 / 4, "f1": pytest.approx(4 / 7),
        "yes_ratio": 3 / 8, "questions": 8, "other": 1,
    }  # fmt: skip
    nothing = scores["settings"]["adversarial"]
    assert (nothing["accuracy"], nothing["precision"], nothing["f1"]) == (0.5, 0.0, 0.0)
    assert scores["accuracy"] == (5 / 8 + 0.5) / 2
    assert scores["prompt"] == "llava"
    assert suites.table(scores)[1][:3] == ("random", "62.5", "66.7")


def test_pope_bad_files(pope_root):
    with pytest.raises(FileNotFoundError, match=r"image must be a file, got .*nowhere"):
        pope.load(pope_root, pope_root / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"must hold \*_pope_random\.json"):
        pope.load(pope_root / "images", pope_root / "images")
    (pope_root / "coco_pope_random.json").write_text('{"image": "1.png", "text": "?"}\n')
    with pytest.raises(ValueError, match="line 1 must be JSON with image, text and label"):
        pope.load(pope_root, pope_root / "images")
    (pope_root / "coco_pope_random.json").write_text(
        '{"image": "1.png", "text": "?", "label": "maybe"}\n'
    )
    with pytest.raises(ValueError, match="label must be yes or no, got 'maybe'"):
        pope.load(pope_root, pope_root / "images")
    with pytest.raises(ValueError, match="got 0 rows and 1 replies"):
        pope.score([], ["yes"])
    with pytest.raises(ValueError, match="variant must be one of official, llava, got 'plain'"):
        pope.prompt("?", "plain")


@pytest.fixture
def scienceqa(tmp_path):
    problem = {
        "question": "Which?",
        "choices": ["cat", "dog"],
        "hint": "Look.",
        "image": "image.png",
    }
    problems = {
        "1": problem | {"answer": 1, "subject": "natural science", "grade": "grade2"},
        "2": problem | {"answer": 0, "subject": "social science", "grade": "grade9", "hint": ""},
        "3": problem | {"answer": 0, "image": None},
    }
    (tmp_path / "problems.json").write_text(json.dumps(problems))
    (tmp_path / "pid_splits.json").write_text(json.dumps({"test": ["1", "2", "3"], "val": ["3"]}))
    for pid in "12":
        folder = tmp_path / "images" / "test" / pid
        folder.mkdir(parents=True)
        (folder / "image.png").write_bytes(png("blue"))
    return tmp_path


def test_scienceqa_by_hand(scienceqa):
    rows = choices.load_scienceqa(scienceqa)
    assert [row.answer for row in rows] == ["B", "A"]
    assert rows[0].question == "Context: Look.\nWhich?\nA. cat\nB. dog"
    assert rows[1].question == "Which?\nA. cat\nB. dog"
    scores = choices.score(rows, ["The answer is B", "It is the dog"])
    assert (scores["accuracy"], scores["circular"], scores["other"]) == (0.5, 0.5, 0)
    assert scores["groups"] == {
        "subject": {
            "natural science": {"accuracy": 1.0, "questions": 1},
            "social science": {"accuracy": 0.0, "questions": 1},
        },
        "grade": {
            "1-6": {"accuracy": 1.0, "questions": 1},
            "7-12": {"accuracy": 0.0, "questions": 1},
        },
    }


def test_scienceqa_bad_files(scienceqa):
    with pytest.raises(ValueError, match="split must be one of test, val, got 'train'"):
        choices.load_scienceqa(scienceqa, "train")
    with pytest.raises(ValueError, match="val must hold images, got none"):
        choices.load_scienceqa(scienceqa, "val")
    (scienceqa / "images" / "test" / "1" / "image.png").unlink()
    with pytest.raises(FileNotFoundError, match="image must be a file"):
        choices.load_scienceqa(scienceqa)
    (scienceqa / "problems.json").write_text("{}")
    with pytest.raises(ValueError, match=r"problems\.json must hold every question of test"):
        choices.load_scienceqa(scienceqa)


def write_table(file, rows):
    head = ["index", "question", "A", "B", "C", "answer", "category", "image"]
    file.write_text("\n".join("\t".join(row) for row in [head, *rows]) + "\n")
    return file


def test_mmbench_by_hand(tmp_path):
    picture = base64.b64encode(png((0, 0, 255))).decode()
    file = write_table(tmp_path / "dev.tsv", [
        ["7", "Which?", "cat", "dog", "", "A", "animals", picture],
        ["1000007", "Which?", "dog", "cat", "", "B", "animals", "7"],
        ["8", "How many?", "one", "two", "six", "C", "numbers", picture],
    ])  # fmt: skip
    rows = choices.load_mmbench(file)
    assert [row.question_id for row in rows] == ["7", "7", "8"]
    assert list(rows[0].options) == ["A", "B"]
    assert all(row.image.getpixel((0, 0)) == (0, 0, 255) for row in rows)
    scores = choices.score(rows, ["A", "A", "six"])
    assert (scores["accuracy"], scores["circular"]) == (2 / 3, 1 / 2)
    assert scores["groups"]["category"]["animals"] == {"accuracy": 0.5, "questions": 2}
    assert choices.score(rows, ["A", "A or B", "?"])["other"] == 2


def test_mmbench_bad_files(tmp_path):
    picture = base64.b64encode(png("red")).decode()
    row = ["7", "Which?", "cat", "dog", "", "A", "animals", picture]
    with pytest.raises(ValueError, match="answer must be one of A, B, got 'C'"):
        choices.load_mmbench(write_table(tmp_path / "a", [[*row[:5], "C", *row[6:]]]))
    with pytest.raises(ValueError, match="index 7: image must be base64"):
        choices.load_mmbench(write_table(tmp_path / "b", [[*row[:7], "%%"]]))
    with pytest.raises(ValueError, match="must hold rows, got none"):
        choices.load_mmbench(write_table(tmp_path / "c", []))
    (tmp_path / "d").write_text("index\tquestion\n1\t?\n")
    with pytest.raises(ValueError, match="must have a column A, got index, question"):
        choices.load_mmbench(tmp_path / "d")
    with pytest.raises(ValueError, match=r"a \.tsv file must be given, got the folder"):
        choices.load_mmbench(tmp_path)


ROWS = [SimpleNamespace(question=f"Question {n}?") for n in range(10)]


class Asked:
    """Answers with a number a question; stops the run at the given call."""

    def __init__(self, stop=None):
        self.calls, self.stop = [], stop

    def __call__(self, rows):
        if len(self.calls) == self.stop:
            raise KeyboardInterrupt
        self.calls.append([row.question for row in rows])
        return [f"said\n{row.question}" for row in rows]


def test_resumed_answers_are_those_of_a_run_that_was_not_stopped(tmp_path):
    whole, first, second = Asked(), Asked(stop=2), Asked()
    expected = resume.answer_all(whole, ROWS, tmp_path / "whole", {"m": 1}, chunk=3)
    with pytest.raises(KeyboardInterrupt):
        resume.answer_all(first, ROWS, tmp_path / "log", {"m": 1}, chunk=3)
    with (tmp_path / "log").open("a") as file:
        file.write('["cut o')
    assert resume.answer_all(second, ROWS, tmp_path / "log", {"m": 1}, chunk=3) == expected
    assert first.calls + second.calls == whole.calls
    assert (tmp_path / "log").read_bytes() == (tmp_path / "whole").read_bytes()


def test_log_of_another_run_is_refused(tmp_path):
    log = tmp_path / "log"
    resume.answer_all(Asked(), ROWS, log, {"model": "a"})
    with pytest.raises(ValueError, match=r"same run \(model='b'\), got 'a'; remove it"):
        resume.answer_all(Asked(), ROWS, log, {"model": "b"})
    with pytest.raises(ValueError, match="same run \\(questions="):
        resume.answer_all(Asked(), ROWS[:3], log, {"model": "a"})
    log.write_text("hello\n")
    with pytest.raises(ValueError, match="must be a log of answers, got 'hello'"):
        resume.answer_all(Asked(), ROWS, log, {})
    with pytest.raises(ValueError, match="got 0 rows and 256"):
        resume.answer_all(Asked(), [], log, {})
    with pytest.raises(ValueError, match=r"one text a row \(10\), got 1"):
        resume.answer_all(lambda rows: ["x"], ROWS, tmp_path / "new", {})


def test_fingerprint_tells_another_checkpoint(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    before = resume.fingerprint(str(tmp_path))
    assert before == resume.fingerprint(str(tmp_path))
    (tmp_path / "config.json").write_text("{ }")
    assert resume.fingerprint(str(tmp_path)) != before
    assert resume.fingerprint("a/name") == "a/name"


def test_unknown_suite():
    with pytest.raises(ValueError, match="suite must be one of mme, pope, scienceqa, mmbench"):
        suites.suite_named("gqa")
