"""Drawn pools: what splits share, how drawing goes on, what a batch holds."""

from __future__ import annotations

import hashlib
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from grace.evaluation.drawn.models import make_processor
from grace.evaluation.drawn.topics import SUBTASKS
from grace.evaluation.packed_questions import block_mask, tokenize
from grace.study import pool
from grace.study.config import MakeConfig, ModelRecipe, StudyConfig
from grace.study.training import DrawnQuestions, as_inputs

CONFIG = StudyConfig(
    benchmark="drawn",
    pixels=56,
    train_images=45,
    heldout_images=4,
    validation_images=4,
    levels=("easy", "hard"),
)


@pytest.fixture(scope="module")
def pools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pools")
    for split in ("train", "validation", "heldout"):
        pool.draw_pool(root / split, pool.spec_of(CONFIG, split))
    return root


def test_models_are_made_from_pictures_that_no_arm_sees(pools: Path, tmp_path: Path) -> None:
    size = ModelRecipe(16, 32, 2, 2, 16, 1, steps=3)
    config = replace(CONFIG, group_size=16, make=MakeConfig(size, size, images=30))
    pool.draw_pool(tmp_path / "p", pool.spec_of(config, pool.MAKING))
    made = pool.Pool(tmp_path / "p")
    assert len(_digests(tmp_path / "p")) == 30
    assert not _digests(tmp_path / "p") & _digests(pools / "train")
    # The rows that would come next, were the arms given more.
    longer = pool.spec_of(replace(CONFIG, train_images=75), "train")
    pool.draw_pool(tmp_path / "longer", longer)
    whole = pool.Pool(tmp_path / "longer")
    assert np.array_equal(whole.pixels[45:], made.pixels)
    rows, bounds = whole.rows()
    assert torch.equal(rows[:, bounds[45] :], made.rows()[0])


def test_answers_err_as_often_as_told(pools: Path) -> None:
    processor = make_processor(56)
    exact = DrawnQuestions(pools / "train", processor).tokens
    wrong = DrawnQuestions(pools / "train", processor, 0.25).tokens
    assert torch.equal(wrong, DrawnQuestions(pools / "train", processor, 0.25).tokens)
    yes, no = (processor.tokenizer.convert_tokens_to_ids(text) for text in ("Yes", "No"))
    ids, labels = exact[0], exact[1]
    answers = (labels == yes) | (labels == no)
    turned = ids != wrong[0]
    assert torch.equal(turned, labels != wrong[1])
    assert torch.equal(exact[2:], wrong[2:])
    assert not (turned & ~answers).any()
    assert (ids[turned] + wrong[0][turned] == yes + no).all()
    count, errors = int(answers.sum()), int(turned.sum())
    assert abs(errors - 0.25 * count) < 4 * (0.25 * 0.75 * count) ** 0.5
    more = DrawnQuestions(pools / "train", processor, 0.4).tokens[0]
    assert (more[turned] == wrong[0][turned]).all()  # more errors are these and others


def _digests(folder: Path) -> set[str]:
    pixels = pool.Pool(folder).pixels
    return {hashlib.sha256(picture.tobytes()).hexdigest() for picture in pixels}


def test_splits_share_no_image_and_no_question(pools: Path) -> None:
    train, validation, heldout = (_digests(pools / s) for s in ("train", "validation", "heldout"))
    assert (len(train), len(validation), len(heldout)) == (45, 72, 72)
    assert not train & validation
    assert not train & heldout
    assert not validation & heldout
    asked = {
        split: {fact["question"] for fact in pool.Pool(pools / split).facts if _names_a_fact(fact)}
        for split in ("validation", "heldout")
    }
    assert min(map(len, asked.values())) > 40
    assert not asked["validation"] & asked["heldout"]


def _names_a_fact(fact: dict[str, Any]) -> bool:
    """Questions about what may be held out; landscapes and results, of which there are few, are
    not."""
    return fact["subtask"] not in ("scene", "numerical_calculation", "code_reasoning")


def test_a_scored_pool_is_made_of_twins(pools: Path) -> None:
    facts = pool.Pool(pools / "heldout").facts
    assert len(facts) == 2 * 9 * 2 * 4
    assert [fact["image"] for fact in facts] == [index // 2 for index in range(len(facts))]
    assert {(f["subtask"], f["level"]) for f in facts} == {
        (subtask, level) for subtask in SUBTASKS for level in ("easy", "hard")
    }
    for start in range(0, len(facts), 4):
        one, other = facts[start : start + 2], facts[start + 2 : start + 4]
        answers = {fact["question"]: fact["answer"] for fact in one}
        assert sorted(answers.values()) == ["No", "Yes"]
        opposite = {"Yes": "No", "No": "Yes"}
        assert {f["question"]: opposite[f["answer"]] for f in other} == answers


def test_drawing_goes_on_where_it_stopped(
    pools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = pool.spec_of(CONFIG, "train")
    real, drawn = pool._draw_part, list[int]()
    monkeypatch.setattr(pool, "_draw_part", _until(real, 32))
    with pytest.raises(KeyboardInterrupt):
        pool.draw_pool(tmp_path / "p", spec)
    with pytest.raises(ValueError, match=r"must be drawn, got no pool.json"):
        pool.Pool(tmp_path / "p")
    done: list[int] = []
    monkeypatch.setattr(pool, "_draw_part", _noting(real, drawn))
    pool.draw_pool(tmp_path / "p", spec, advance=done.append)
    assert drawn == [32]
    assert sum(done) == 45
    whole, again = pool.Pool(pools / "train"), pool.Pool(tmp_path / "p")
    assert np.array_equal(whole.pixels, again.pixels)
    for one, other in zip(whole.rows(), again.rows(), strict=True):
        assert torch.equal(one, other)


def test_processes_draw_the_same(pools: Path, tmp_path: Path) -> None:
    with pool.drawers(2) as executor:
        pool.draw_pool(tmp_path / "p", pool.spec_of(CONFIG, "train"), executor=executor)
    for path in (pools / "train").iterdir():
        assert (tmp_path / "p" / path.name).read_bytes() == path.read_bytes()


def _until(real, last: int):
    def draw(folder: Path, spec: dict, start: int) -> None:
        if start == last:
            raise KeyboardInterrupt
        real(folder, spec, start)

    return draw


def _noting(real, drawn: list[int]):
    def draw(folder: Path, spec: dict, start: int) -> None:
        drawn.append(start)
        real(folder, spec, start)

    return draw


def test_another_pool_in_the_folder_is_named(pools: Path) -> None:
    other = pool.spec_of(replace(CONFIG, seed=1), "train")
    with pytest.raises(ValueError, match=r"must be drawn with seed 1, got 0"):
        pool.draw_pool(pools / "train", other)


def test_a_batch_holds_pictures_and_their_questions(pools: Path) -> None:
    processor = make_processor(56)
    data = DrawnQuestions(pools / "train", processor)
    assert len(data) == 45
    batch = data.collate([7, 3])
    assert batch["pixel_values"].dtype == torch.uint8
    assert np.array_equal(batch["pixel_values"][0].numpy(), data.pool.pixels[7])
    ids, labels, blocks = batch["input_ids"], batch["labels"], batch["blocks"]
    assert ids.shape[1] % 16 == 0
    assert (ids == processor.tokenizer.convert_tokens_to_ids("<image>")).sum() == 2 * 16
    # Three questions of the benchmark, three further ones and a description.
    assert blocks.amax(1).tolist() == [7, 7]
    assert ((blocks < 0) == (ids == 0)).all()
    said = processor.tokenizer.decode(ids[0][(labels[0] != -100)])
    assert "Yes </s>" in said or "Yes</s>" in said
    inputs = as_inputs(batch)
    assert torch.equal(inputs["attention_mask"], block_mask(blocks))
    pixels = inputs["pixel_values"]
    expected = processor.image_processor(images=[data.pool.picture(7)], return_tensors="pt")
    torch.testing.assert_close(pixels[:1], expected["pixel_values"], rtol=0, atol=1e-6)


def test_tokens_are_those_of_the_processor(pools: Path) -> None:
    processor = make_processor(56)
    assert pool.image_tokens(56) == 16
    chat = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Is it red?"}]}
    ]
    text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    whole = processor(images=[pool.Pool(pools / "train").picture(0)], text=[text])["input_ids"][0]
    begin, rest, labels = tokenize(processor, "Is it red?", "Yes", 16)
    assert begin == pool.prefix(processor, 56)
    answer = [label for label in labels if label != -100]
    assert [*begin, *rest][: -len(answer)] == list(whole)


def test_a_pool_is_sent_without_its_pictures(pools: Path) -> None:
    held = pool.Pool(pools / "train")
    sent = pickle.dumps(held)
    assert len(sent) < held.pixels.nbytes / 20
    assert np.array_equal(pickle.loads(sent).pixels, held.pixels)


def test_lost_pictures_are_told(pools: Path, tmp_path: Path) -> None:
    shutil.copytree(pools / "train", tmp_path / "train")
    with (tmp_path / "train" / pool.PIXELS).open("r+b") as file:
        file.seek(44 * 3 * 56**2)
        file.write(bytes(3 * 56**2))
    with pytest.raises(ValueError, match="must hold all pictures, got empty ones"):
        pool.Pool(tmp_path / "train")
