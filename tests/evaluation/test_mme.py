"""The folder layout, the parser, the scores and the result files of MME."""

import pytest
from PIL import Image

from grace.evaluation import mme


def write_image(folder, name, lines):
    """One image with its question file, in MME's flat layout."""
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4)).save(folder / f"{name}.png")
    (folder / f"{name}.txt").write_text(lines)


@pytest.fixture
def root(tmp_path):
    write_image(tmp_path / "color", "000", "Is it red?\tYes\nIs it blue?\tNo\n")
    write_image(tmp_path / "color", "001", "Is it red?\tNo\nIs it blue?\tYes\n")
    write_image(tmp_path / "code_reasoning", "0009", "Is it 3?\tYes\r\nIs it 4?\tNo")
    posters = tmp_path / "posters"
    (posters / "images").mkdir(parents=True)
    (posters / "questions_answers_YN").mkdir()
    Image.new("RGB", (4, 4)).save(posters / "images" / "tt1.jpg")
    (posters / "questions_answers_YN" / "tt1.txt").write_text("Is it A?\tYes\nIs it B?\tNo\n")
    return tmp_path


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("Yes", "yes"),
        ("no", "no"),
        ("Yes.", "yes"),
        ("NO, it is not", "no"),
        (" yes", "yes"),
        ("  yes", "other"),  # the official parser does not strip
        ("not", "no"),
        ("Noyes", "no"),
        ("ayes", "yes"),
        ("I know", "other"),
        ("It is yes", "other"),
        ("y", "other"),
        ("", "other"),
    ],
)
def test_parser_is_the_official_one(text, parsed):
    assert mme.parse_answer(text) == parsed


def test_load_reads_both_layouts_in_order(root):
    rows = mme.load(root)
    assert [row.subtask for row in rows] == ["color"] * 4 + ["posters"] * 2 + ["code_reasoning"] * 2
    assert (rows[0].question, rows[0].answer) == ("Is it red?", "Yes")
    assert rows[4].image == root / "posters" / "images" / "tt1.jpg"
    assert all(row.image.is_file() for row in rows)


def test_score_by_hand(root):
    # color: 3 of 4 right, one image with both right; posters: both right; code: "other" is wrong.
    said = ["yes", "No.", "no", "no", "Yes", "No", "yes", "maybe"]
    scores = mme.score(mme.answered(mme.load(root), said), prompt="plain")
    assert scores["subtasks"]["color"] == {
        "acc": 0.75, "acc_plus": 0.5, "score": 125.0, "images": 2, "questions": 4, "other": 0
    }  # fmt: skip
    assert scores["subtasks"]["posters"]["score"] == 200.0
    assert scores["subtasks"]["code_reasoning"]["score"] == 50.0
    assert scores["subtasks"]["code_reasoning"]["other"] == 1
    assert (scores["perception"], scores["cognition"], scores["total"]) == (325.0, 50.0, 375.0)
    assert (scores["questions"], scores["prompt"]) == (8, "plain")


def test_subtasks_are_the_official_fourteen():
    assert (len(mme.PERCEPTION), len(mme.COGNITION), len(set(mme.SUBTASKS))) == (10, 4, 14)


def test_results_are_pairs_of_official_lines_and_score_the_same(root, tmp_path):
    said = ["yes", "No\tway\nreally", "no", "no", "Yes", "No", "yes", "maybe"]
    rows = mme.answered(mme.load(root), said)
    files = mme.write_results(tmp_path / "results", rows)
    assert [file.name for file in files] == ["color.txt", "posters.txt", "code_reasoning.txt"]
    lines = files[0].read_text().splitlines()
    assert lines[0] == "000.png\tIs it red?\tYes\tyes"
    assert lines[1] == "000.png\tIs it blue?\tNo\tNo way really"
    assert [line.split("\t")[0] for line in lines] == ["000.png", "000.png", "001.png", "001.png"]
    assert mme.score(mme.read_results(tmp_path / "results")) == mme.score(rows)


def test_results_keep_pairs_together_when_rows_come_shuffled(root, tmp_path):
    rows = mme.answered(mme.load(root), ["yes"] * 8)
    mme.write_results(tmp_path / "results", [rows[0], rows[2], rows[1], rows[3], *rows[4:]])
    names = [row.image.name for row in mme.read_results(tmp_path / "results")]
    assert names[:4] == ["000.png", "000.png", "001.png", "001.png"]


def test_prompt_variants():
    question = "Is it red? Please answer yes or no."
    assert mme.prompt(question) == question
    assert mme.prompt(question, "plain") == "Is it red?"
    llava = "Is it red?\nAnswer the question using a single word or phrase."
    assert mme.prompt(question, "llava") == llava
    with pytest.raises(ValueError, match="variant must be one of official, llava, plain, got 'x'"):
        mme.prompt(question, "x")


def test_missing_folder_and_missing_image(root):
    with pytest.raises(FileNotFoundError, match=r"mme\.load: root must be a folder, got .*nowhere"):
        mme.load(root / "nowhere")
    (root / "color" / "001.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"001\.txt must have an image"):
        mme.load(root)


def test_empty_folders(tmp_path):
    with pytest.raises(ValueError, match="must hold folders of subtasks, got none"):
        mme.load(tmp_path)
    (tmp_path / "color").mkdir()
    with pytest.raises(ValueError, match=r"color must hold question files \*\.txt, got none"):
        mme.load(tmp_path)
    (tmp_path / "colour").mkdir()
    with pytest.raises(ValueError, match="got 'colour'"):
        mme.load(tmp_path)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("Is it red?\tYes\n", r"000\.txt must have two lines, got 1"),
        ("Is it red?\tYes\nIs it blue? No\n", r"000\.txt line 2 must be question<TAB>Yes\|No"),
        ("Is it red?\tMaybe\nIs it blue?\tNo\n", r"000\.txt line 1 must be .* got .*Maybe"),
        ("\tYes\nIs it blue?\tNo\n", r"000\.txt line 1 must be"),
    ],
)
def test_garbled_question_file(tmp_path, lines, message):
    write_image(tmp_path / "color", "000", lines)
    with pytest.raises(ValueError, match=message):
        mme.load(tmp_path)


def test_question_file_that_is_not_text(tmp_path):
    write_image(tmp_path / "color", "000", "")
    (tmp_path / "color" / "000.txt").write_bytes(b"\xff\xfe\x00\xd8")
    with pytest.raises(ValueError, match=r"000\.txt must be UTF-8 text"):
        mme.load(tmp_path)


def test_score_wants_predictions_and_pairs(root, tmp_path):
    rows = mme.load(root)
    with pytest.raises(ValueError, match=r"mme\.score: row 0 must have a prediction"):
        mme.score(rows)
    with pytest.raises(ValueError, match=r"rows must not be empty"):
        mme.score([])
    with pytest.raises(ValueError, match=r"must be one a row \(8\), got 1"):
        mme.answered(rows, ["yes"])
    single = mme.answered(rows[:3], ["yes"] * 3)
    with pytest.raises(ValueError, match=r"001\.png must have two questions, got 1"):
        mme.write_results(tmp_path / "results", single)
    assert not (tmp_path / "results").exists()
    with pytest.raises(FileNotFoundError, match=r"read_results: .* must hold <subtask>\.txt"):
        mme.read_results(root)
