"""The shipped tiny models load like any checkpoint and are what their record says."""

import hashlib
import json
from dataclasses import asdict
from random import Random

import pytest
import torch
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

from grace.evaluation import drawing, make_tiny, mme, scenes, synthetic, tiny, tiny_training, topics
from grace.evaluation.answer import answer
from grace.evaluation.packed_questions import pack_questions

DIRECTORIES = {"teacher": tiny.teacher_dir, "student": tiny.student_dir}


@pytest.fixture(scope="module")
def record():
    return json.loads((tiny.ROOT / "make_tiny.json").read_text())


@pytest.fixture(scope="module", params=sorted(DIRECTORIES))
def name(request):
    return request.param


@pytest.fixture(scope="module")
def model(name):
    return AutoModelForImageTextToText.from_pretrained(DIRECTORIES[name]())


@pytest.fixture(scope="module")
def processor(name):
    return AutoProcessor.from_pretrained(DIRECTORIES[name]())


def test_files_are_those_of_the_record(name, record):
    directory = DIRECTORIES[name]()
    hashes = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in directory.iterdir()}
    assert hashes == record[name]["sha256"]


def test_files_are_small():
    size = sum(path.stat().st_size for path in tiny.ROOT.rglob("*") if path.is_file())
    assert size <= 8_000_000


def test_record_tells_how_it_was_made(name, record):
    made = record[name]
    assert made["parameters"] > 100_000
    assert {"seed", "steps", "device", "threads", "versions", "seconds"} <= set(made)
    assert set(made["heldout"]["subtasks"]) == set(topics.SUBTASKS)
    assert made["heldout"]["questions"] >= 2400
    assert made["recipe"] == asdict(make_tiny.RECIPES[name])


def test_teacher_is_strong_everywhere_and_clearly_better(record):
    teacher, student = (record[n]["heldout"]["subtasks"] for n in ("teacher", "student"))
    assert min(scores["acc"] for scores in teacher.values()) >= 0.95
    assert min(scores["acc"] for scores in student.values()) > 0.55
    mean = [sum(s["acc"] for s in scores.values()) / 6 for scores in (teacher, student)]
    assert 0.75 <= mean[1] <= mean[0] - 0.03
    assert record["teacher"]["parameters"] > 3 * record["student"]["parameters"]


def test_architecture(name, model, record):
    assert isinstance(model, LlavaForConditionalGeneration)
    assert sum(p.numel() for p in model.parameters()) == record[name]["parameters"]
    layers = model.model.language_model.layers
    assert len(layers) >= 3
    linears = [m for m in layers.modules() if isinstance(m, nn.Linear)]
    assert len(linears) == 7 * len(layers)
    group = {"student": 32, "teacher": 16}[name]
    assert all(m.bias is None and m.in_features % group == 0 for m in linears)


def test_scores_are_those_of_the_record(name, model, processor, record, tmp_path):
    """On a fresh sample: the recorded accuracy within four standard errors."""
    synthetic.draw(tmp_path / "sample", images_per_subtask=24, seed=99)
    rows = mme.load(tmp_path / "sample")
    said = answer(model, processor, rows, batch_size=96, max_new_tokens=1, progress=False)
    scores = mme.score(mme.answered(rows, said))
    recorded = record[name]["heldout"]["subtasks"]
    right = sum(s["acc"] for s in scores["subtasks"].values()) / 6
    expected = sum(s["acc"] for s in recorded.values()) / 6
    error = (expected * (1 - expected) / len(rows)) ** 0.5
    assert abs(right - expected) < 4 * error
    assert sum(s["other"] for s in scores["subtasks"].values()) == 0


def test_generate_ends_its_answer(model, processor, tmp_path):
    synthetic.draw(tmp_path / "sample", images_per_subtask=1, seed=5)
    said = answer(model, processor, mme.load(tmp_path / "sample"), max_new_tokens=8, progress=False)
    assert set(said) <= {"Yes", "No"}


def test_packed_forward_equals_forward(model, processor):
    scene, facts = scenes.compose(Random(1))
    image = drawing.render([scene], seed=1)[0]
    asked = [(q.text, q.answer) for q in scenes.questions(facts, Random(2))]
    with torch.no_grad():
        together = model(**pack_questions(processor, [image], [asked])).logits[0]
        start = 18
        for question in asked:
            alone = model(**pack_questions(processor, [image], [[question]])).logits[0, 18:]
            end = start + len(alone)
            torch.testing.assert_close(together[start:end], alone, atol=1e-3, rtol=1e-3)
            start = end


def test_vocabulary_covers_every_question(processor):
    rng = Random(0)
    unknown = processor.tokenizer.unk_token_id
    for _ in range(300):
        for question in scenes.questions(scenes.compose(rng)[1], rng):
            assert unknown not in processor.tokenizer.encode(f"{question.text} {question.answer}")


def test_a_model_is_made_whole_or_not_at_all(tmp_path, monkeypatch):
    size = tiny.Size(width=16, inner=32, layers=1, heads=2, vision_width=16, vision_layers=1)
    small = tiny_training.Recipe(
        size, 0.99, drill=1, early=1, steps=2, cooldown=1, align=1, images=2
    )
    monkeypatch.setattr(make_tiny, "RECIPES", {"student": small})
    monkeypatch.setattr(make_tiny, "HELDOUT_IMAGES", 2)
    monkeypatch.setattr(tiny_training, "REPORT_EVERY", 2)
    lines = []
    made = make_tiny.make("student", tmp_path, seed=1, report=lines.append)
    assert [path.name for path in tmp_path.iterdir()] == ["student"]
    assert made["steps"] == {"align": 1, "drill": 1, "questions": 3}
    assert set(made["sha256"]) == {path.name for path in (tmp_path / "student").iterdir()}
    again = make_tiny.make("student", tmp_path, seed=1, report=lines.append)
    assert again["sha256"] == made["sha256"]
    with pytest.raises(ValueError, match="name must be one of student, got 'parent'"):
        make_tiny.make("parent", tmp_path)


def test_missing_checkpoint_says_how_to_make_it(tmp_path, monkeypatch):
    monkeypatch.setattr(tiny, "ROOT", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"python -m grace\.evaluation\.make_tiny"):
        tiny.student_dir()
