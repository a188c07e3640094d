"""Answers are decoded as served, and say what `model.generate` says, token for token."""

import logging
from types import SimpleNamespace

import families
import pytest
import torch
import transformers
from generating import asked, made
from PIL import Image

import grace
from grace.evaluation import mme, synthetic, tiny
from grace.evaluation.answer import answer
from grace.evaluation.decoding import Decoder

SIZE = tiny.Size(width=32, inner=64, layers=2, heads=2, vision_width=32, vision_layers=1)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", families.FAMILIES)
def test_every_family_says_the_same_with_and_without_graphs(kind, packed):
    model, inputs = made(kind, packed=packed), asked(kind)
    served, plain = Decoder(model), Decoder(model, graphs=False)
    varied = {"do_sample": False, "no_repeat_ngram_size": 1}
    for options in ({"do_sample": False, "num_beams": 1}, varied):
        wanted = plain(inputs, 6, **options)
        assert wanted.shape == (2, 6)
        assert torch.equal(served(inputs, 6, **options), wanted)
    assert len(set(wanted[0].tolist())) == 6  # one word for ever could be said by luck
    assert served._generator.timing.new_tokens == 6
    assert plain._generator is None
    model.generation_config.eos_token_id = int(wanted[0, 2])
    ended = plain(inputs, 6, **varied)
    assert (ended[0, 3:] == 0).all()
    assert torch.equal(served(inputs, 6, **varied), ended)


def test_answers_of_a_packed_model_are_the_same(tmp_path):
    synthetic.draw(tmp_path / "benchmark", images_per_subtask=2, seed=0)
    rows = mme.load(tmp_path / "benchmark")
    model, processor = tiny.make_model(SIZE, seed=0).eval(), tiny.make_processor()
    grace.quantize(model, group_size=32, init="absmax")
    grace.pack(model, fuse=True)
    decoder = Decoder(model, max_batch_size=5)
    settings = {"batch_size": 5, "max_new_tokens": 7, "progress": False}
    said = answer(model, processor, rows, decoder=decoder, **settings)
    generator = decoder._generator
    assert generator.timing.new_tokens > 1
    plain = Decoder(model, max_batch_size=5, graphs=False)
    assert said == answer(model, processor, rows, decoder=plain, **settings)
    assert len(set(said)) > len(rows) / 4
    answer(model, processor, rows[:3], decoder=decoder, **settings)
    assert decoder._generator is generator  # with its caches and graphs
    assert said == answer(model, processor, rows, **settings)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("kind", families.FAMILIES)
def test_captured_graphs_say_the_same(kind):
    model, inputs = made(kind).cuda(), asked(kind)  # inputs are moved
    served, plain = Decoder(model), Decoder(model, graphs=False)
    for _ in range(2):
        wanted = plain(inputs, 6, do_sample=False, num_beams=1)
        assert torch.equal(served(inputs, 6, do_sample=False, num_beams=1), wanted)
    (steps,) = served._generator._sizes.values()
    assert steps._graphs


def test_what_a_generator_does_not_do_is_left_to_generate(caplog):
    model, inputs = made("llava"), asked("llava")
    prompt = inputs["input_ids"].shape[1]
    decoder = Decoder(model)
    wanted = model.generate(**inputs, max_new_tokens=3, num_beams=2, do_sample=False)[:, prompt:]
    assert torch.equal(decoder(inputs, 3, num_beams=2, do_sample=False), wanted)
    wanted = model.generate(**inputs, max_new_tokens=1, do_sample=False)[:, prompt:]
    assert torch.equal(decoder(inputs, 1, do_sample=False), wanted)
    assert decoder._generator is None
    room = 64 - prompt  # the model's positions
    assert decoder(inputs, room, do_sample=False).shape == (2, room)
    kept = decoder._generator.timing
    assert kept.new_tokens == room
    assert not [record for record in caplog.records if "positions" in record.getMessage()]
    longer = decoder(inputs, room + 1, do_sample=False)
    wanted = model.generate(**inputs, max_new_tokens=room + 1, do_sample=False)[:, prompt:]
    assert torch.equal(longer, wanted)
    assert decoder._generator.timing is kept
    told = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert any("may take 65 tokens, the model has 64 positions" in line for line in told)


def test_an_encoder_decoder_answers_without_its_prompt():
    config = transformers.BartConfig(
        vocab_size=30, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16,
    )  # fmt: skip
    model = transformers.BartForConditionalGeneration(config).eval()
    inputs = {"input_ids": torch.arange(5, 15).view(2, 5)}
    wanted = model.generate(**inputs, max_new_tokens=4, do_sample=False, num_beams=1)
    assert torch.equal(Decoder(model)(inputs, 4, do_sample=False, num_beams=1), wanted)


def test_bad_decoders():
    model, processor = tiny.make_model(SIZE, seed=0), tiny.make_processor()
    with pytest.raises(ValueError, match=r"decode: max_batch_size must be at least 1, got 0"):
        Decoder(model, max_batch_size=0)
    with pytest.raises(ValueError, match=r"at most max_batch_size 1 rows, got 2"):
        Decoder(made("llava"), max_batch_size=1)(asked("llava"), 2)
    rows = [SimpleNamespace(image=Image.new("RGB", (32, 32)), question="Is it ?")] * 3
    small, other = Decoder(model, max_batch_size=2), Decoder(made("llava"))
    with pytest.raises(ValueError, match=r"for 3 rows, got one of the same model for 2"):
        answer(model, processor, rows, decoder=small)
    with pytest.raises(ValueError, match=r"for 3 rows, got one of another model for 64"):
        answer(model, processor, rows, decoder=other)
