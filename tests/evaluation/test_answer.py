"""Batched greedy answers."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from grace.evaluation import mme, synthetic, tiny, topics
from grace.evaluation.answer import Batch, answer, prepare

SIZE = tiny.Size(width=32, inner=64, layers=2, heads=2, vision_width=32, vision_layers=1)


@pytest.fixture(scope="module")
def model():
    return tiny.make_model(SIZE, seed=0).eval()


@pytest.fixture(scope="module")
def processor():
    return tiny.make_processor()


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    root = tmp_path_factory.mktemp("answer") / "benchmark"
    synthetic.draw(root, images_per_subtask=2, seed=0)
    return mme.load(root)


def alone(model, processor, row, steps):
    """Greedy decoding of one row, a whole forward pass a token."""
    content = [{"type": "image"}, {"type": "text", "text": row.question}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    with Image.open(row.image) as image:
        inputs = processor(images=[image.convert("RGB")], text=[text], return_tensors="pt")
    ids, pixels = inputs["input_ids"], inputs["pixel_values"]
    start = ids.shape[1]
    with torch.no_grad():
        for _ in range(steps):
            new = model(input_ids=ids, pixel_values=pixels).logits[:, -1:].argmax(-1)
            ids = torch.cat([ids, new], -1)
            if new.item() == processor.tokenizer.eos_token_id:
                break
    return processor.tokenizer.decode(ids[0, start:], skip_special_tokens=True).strip()


@pytest.mark.parametrize("steps", [1, 4])
def test_batches_say_what_each_row_says_alone(model, processor, rows, steps):
    said = answer(model, processor, rows, batch_size=7, max_new_tokens=steps, progress=False)
    assert said == [alone(model, processor, row, steps) for row in rows]


def test_prepared_batches_say_the_same_in_the_same_order(model, processor, rows):
    direct = answer(model, processor, rows, batch_size=5, max_new_tokens=1, progress=False)
    batches = prepare(processor, rows, batch_size=5)
    assert all(isinstance(batch, Batch) for batch in batches)
    assert sorted(i for batch in batches for i in batch.indices) == list(range(len(rows)))
    assert answer(model, processor, batches, max_new_tokens=1, progress=False) == direct
    single = answer(model, processor, rows[3:4], max_new_tokens=1, progress=False)
    assert single == direct[3:4]


def test_prompt_changes_what_is_asked(processor, rows):
    batches = prepare(processor, rows[:1], prompt=lambda question: mme.prompt(question, "plain"))
    text = processor.tokenizer.decode(batches[0].inputs["input_ids"][0])
    assert topics.SUFFIX.strip() not in text
    asked = prepare(processor, rows[:1])[0].inputs["input_ids"][0]
    assert topics.SUFFIX.strip() in processor.tokenizer.decode(asked)


def test_images_in_memory(model, processor):
    pixels = np.zeros((32, 32, 3), np.uint8)
    row = SimpleNamespace(image=Image.fromarray(pixels), question="What is the text ?")
    assert len(answer(model, processor, [row], max_new_tokens=2, progress=False)) == 1


def test_model_stays_in_its_mode(model, processor, rows):
    model.train()
    answer(model, processor, rows[:1], max_new_tokens=1, progress=False)
    assert model.training
    model.eval()


def test_bad_input(model, processor, rows, tmp_path):
    with pytest.raises(ValueError, match="answer: rows must not be empty"):
        answer(model, processor, [])
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 2 rows and 0"):
        answer(model, processor, rows[:2], batch_size=0)
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, got 0"):
        answer(model, processor, rows, max_new_tokens=0)
    missing = SimpleNamespace(image=tmp_path / "none.png", question="?")
    with pytest.raises(FileNotFoundError, match=r"none\.png"):
        answer(model, processor, [missing])
