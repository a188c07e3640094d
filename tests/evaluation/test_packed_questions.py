"""Several questions in one row are as if each were asked alone."""

from random import Random

import pytest
import torch

from grace.evaluation import drawing, scenes, tiny
from grace.evaluation.packed_questions import IGNORE, block_mask, pack_questions, pack_tokens

SIZE = tiny.Size(width=32, inner=64, layers=2, heads=2, vision_width=32, vision_layers=1)


@pytest.fixture(scope="module")
def processor():
    return tiny.make_processor()


@pytest.fixture(scope="module")
def drawn():
    rng = Random(0)
    composed = [scenes.compose(rng) for _ in range(3)]
    images = list(drawing.render([scene for scene, _ in composed], seed=0))
    asked = [[(q.text, q.answer) for q in scenes.questions(facts, rng)] for _, facts in composed]
    return images, [asked[0], asked[1][:5], asked[2][:1]]


def conversation(question, answer):
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
    return [user, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]


@pytest.mark.parametrize(
    ("attention", "dtype"),
    [("sdpa", torch.bool), ("sdpa", torch.float32), ("eager", torch.float32)],
)
def test_packed_logits_are_those_of_each_question_alone(processor, drawn, attention, dtype):
    images, asked = drawn
    model = tiny.make_model(SIZE, seed=0).eval()
    model.set_attn_implementation(attention)
    batch = pack_questions(processor, images, asked, mask_dtype=dtype)
    with torch.no_grad():
        packed = model(**batch).logits
        for row, questions in enumerate(asked):
            start = 18
            for question, answer in questions:
                text = processor.apply_chat_template(conversation(question, answer), tokenize=False)
                inputs = processor(images=[images[row]], text=[text], return_tensors="pt")
                alone = model(**inputs).logits[0, 18:]
                end = start + len(alone)
                assert torch.equal(batch["input_ids"][row, start:end], inputs["input_ids"][0, 18:])
                torch.testing.assert_close(packed[row, start:end], alone, atol=2e-5, rtol=1e-4)
                start = end


def test_loss_is_finite_and_padding_harmless(processor, drawn):
    images, asked = drawn
    model = tiny.make_model(SIZE, seed=0)
    short = pack_questions(processor, images, asked)
    long = pack_questions(processor, images, asked, length=short["input_ids"].shape[1] + 9)
    torch.testing.assert_close(model(**short).loss, model(**long).loss)
    model(**long).loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_labels_are_the_answers_and_their_ends(processor, drawn):
    images, asked = drawn
    batch = pack_questions(processor, images, asked)
    for row, questions in enumerate(asked):
        labels = batch["labels"][row]
        said = processor.tokenizer.decode(labels[labels != IGNORE])
        assert said == " ".join(f"{answer} </s>" for _, answer in questions)
        kept = labels != IGNORE
        assert torch.equal(labels[kept], batch["input_ids"][row][kept])


def test_positions_restart_behind_the_prefix():
    rows = [[((7, 8), (1, 2, 3), (IGNORE, 2, 3)), ((7, 8), (4,), (4,))]]
    batch = pack_tokens(rows, pad_id=0, length=8)
    assert batch["input_ids"].tolist() == [[7, 8, 1, 2, 3, 4, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 2, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, -100, 2, 3, 4, -100, -100]]


def test_block_mask_by_hand():
    mask = block_mask(torch.tensor([[0, 1, 1, 2, -1]]))[0, 0].int().tolist()
    assert mask == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 0, 0, 1, 0],
        [0, 0, 0, 0, 1],
    ]


def test_bad_input(processor, drawn):
    images, asked = drawn
    with pytest.raises(ValueError, match="same length above 0, got 0 and 0"):
        pack_questions(processor, [], [])
    with pytest.raises(ValueError, match="same length above 0, got 3 and 1"):
        pack_questions(processor, images, asked[:1])
    with pytest.raises(ValueError, match=r"questions\[1\] must hold a question, got none"):
        pack_questions(processor, images[:2], [asked[0], []])
    with pytest.raises(ValueError, match=r"length must be at least \d+, got 30"):
        pack_questions(processor, images, asked, length=30)
    with pytest.raises(ValueError, match="row 0 must have one prefix, got another in question 1"):
        pack_tokens([[((7,), (1,), (1,)), ((8,), (1,), (1,))]], pad_id=0)
