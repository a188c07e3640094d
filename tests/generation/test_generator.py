"""`Generator` says what `model.generate` says on a static cache, token for token."""

from __future__ import annotations

import logging
from typing import Any

import families
import pytest
import torch
from generating import GREEDY, NEW, SAMPLED, asked, both, logits_of, made
from torch import Tensor, nn
from transformers.generation.streamers import BaseStreamer

from grace.generation import Generator


@pytest.mark.parametrize("kind", families.FAMILIES)
def test_every_packed_family_says_the_same(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    model, inputs = made(kind, packed=True), asked(kind)
    generator = Generator(model, length_step=16)
    generator._lag = 1  # as on a GPU: the end is known a step late
    prompt = inputs["input_ids"].shape[1]
    for arguments in (GREEDY, SAMPLED, {"do_sample": False, "repetition_penalty": 1.4}):
        theirs, ours = both(model, generator, inputs, **arguments)
        assert torch.equal(theirs, ours), arguments
        end = int(ours[0, prompt + 2])
        theirs, ours = both(model, generator, inputs, eos_token_id=end, **arguments)
        assert torch.equal(theirs, ours), arguments
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING and "grace" in r.name]


@pytest.mark.parametrize("kind", families.FAMILIES)
def test_logits_of_every_step_are_the_same(kind: str) -> None:
    model, inputs = made(kind), asked(kind)
    generator = Generator(model, length_step=16)
    exact = logits_of(model.generate, inputs)
    ours = logits_of(generator.generate, inputs)
    assert len(ours) == NEW
    torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-5)
    # Neither positions nor masks could be others: both move the logits by far more than that.
    (steps,) = generator._sizes.values()
    load = steps.load
    for key in ("position_ids", "attention_mask"):

        def changed(given: Any, rows: int, key: str = key) -> None:
            load({**given, key: _other(given[key])}, rows)

        steps.load = changed
        off = (logits_of(generator.generate, inputs) - exact)[1:].abs().amax(dim=(1, 2))
        assert (off > 1e-3).all(), key


def _other(given: Any) -> Any:
    """Positions twice as far; masks with a place more that is hidden."""
    if isinstance(given, dict):
        return {key: _other(mask) for key, mask in given.items()}
    if given.dtype == torch.bool:
        return given & (torch.arange(given.shape[-1]) != 5)
    return given * 2


@pytest.mark.parametrize("lag", [0, 1])
def test_an_answer_ends_with_its_last_row(lag: int) -> None:
    model, inputs = made("llava"), asked("llava")
    prompt = inputs["input_ids"].shape[1]
    generator = Generator(model)
    generator._lag = lag
    whole = generator.generate(**inputs, max_new_tokens=NEW, **GREEDY)[:, prompt:]
    ends = [int(whole[0, 1]), int(whole[1, 4])]
    ours = generator.generate(
        **inputs, max_new_tokens=NEW, eos_token_id=ends, pad_token_id=59, **GREEDY
    )[:, prompt:]
    first = [next(i for i, t in enumerate(row.tolist()) if t in ends) for row in whole]
    assert ours.shape[1] == max(first) + 1 < NEW
    for row, length, said in zip(ours, first, whole, strict=True):
        assert row[: length + 1].tolist() == said[: length + 1].tolist()
        assert (row[length + 1 :] == 59).all()
    assert generator.timing is not None
    assert generator.timing.new_tokens == ours.shape[1]


@pytest.mark.parametrize("count", [1, 3, 5])
def test_a_batch_is_filled_up_to_a_power_of_two(count: int) -> None:
    model = made("llava")
    rows = asked("llava", padded=False)
    ids = torch.cat([rows["input_ids"][1:], rows["input_ids"][1:]]).repeat(3, 1)[:count].clone()
    ids[:, -1] = torch.arange(count) + 8
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(int((ids == families.IMAGE).sum()) // 16, 3, 16, 16),
    }
    generator = Generator(model, length_step=8)
    for arguments in (GREEDY, SAMPLED):
        theirs, ours = both(model, generator, inputs, **arguments)
        assert torch.equal(theirs, ours)
    assert next(iter(generator._sizes))[0] == {1: 1, 3: 4, 5: 8}[count]


def test_sizes_share_their_memory_and_leave_no_trace() -> None:
    """A small batch behind a large one, and the other way: all as from a fresh generator."""
    model, inputs = made("qwen2_vl"), asked("qwen2_vl")
    alone = {
        name: value for name, value in asked("qwen2_vl", padded=False).items() if "grid" not in name
    }
    text = {name: alone[name][:1, -4:] for name in ("input_ids", "attention_mask")}
    generator = Generator(model, length_step=8)
    wanted = [model.generate(**given, max_new_tokens=NEW, **GREEDY) for given in (text, inputs)]
    for _ in range(2):
        for given, want in zip((text, inputs), wanted, strict=True):
            assert torch.equal(generator.generate(**given, max_new_tokens=NEW, **GREEDY), want)
    held = generator._storage
    assert held.version == 16  # keys and values of four layers, twice: it grew once
    assert held.bytes == 4 * 2 * 2 * 2 * 8 * 32 * 4  # layers, k and v, rows, heads, dim, length
    layers = [layer for steps in generator._sizes.values() for layer in steps.cache.layers]
    assert len(layers) == 2 * 4
    for layer in layers:  # none holds what was there before it grew
        flat = held._flat[layer.index, "keys"]
        assert layer.keys.data_ptr() == flat.data_ptr()


def test_what_lies_behind_an_answer_does_not_matter() -> None:
    model, inputs = made("llava"), asked("llava")
    generator = Generator(model)
    right = generator.generate(**inputs, max_new_tokens=NEW, **GREEDY)
    for flat in generator._storage._flat.values():
        flat.fill_(torch.nan)  # as an overflow leaves it
    assert torch.equal(right, generator.generate(**inputs, max_new_tokens=NEW, **GREEDY))


class Kept(BaseStreamer):
    def __init__(self) -> None:
        self.calls: list[Any] = []

    def put(self, value: Tensor) -> None:
        self.calls.append(value.tolist())

    def end(self) -> None:
        self.calls.append("end")


@pytest.mark.parametrize("lag", [0, 1])
def test_streams_what_generate_streams(lag: int) -> None:
    model, inputs = made("llava"), asked("llava")
    generator = Generator(model)
    generator._lag = lag
    end = int(generator.generate(**inputs, max_new_tokens=NEW, **GREEDY)[0, -4])
    for arguments in ({}, {"eos_token_id": end}, {"max_new_tokens": 1}):
        theirs, ours = Kept(), Kept()
        both_arguments = {"max_new_tokens": NEW, **GREEDY, **arguments}
        model.generate(**inputs, **both_arguments, streamer=theirs)
        generator.generate(**inputs, **both_arguments, streamer=ours)
        assert ours.calls == theirs.calls


def test_sampling_is_reproducible_and_draws() -> None:
    model, inputs = made("llava"), asked("llava")
    generator = Generator(model)
    said = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        said.append(generator.generate(**inputs, max_new_tokens=NEW, **SAMPLED))
    assert torch.equal(said[0], said[1])
    assert not torch.equal(said[0], said[2])


def test_criteria_and_sequences_and_dictionaries() -> None:
    model, inputs = made("qwen2_5_vl"), asked("qwen2_5_vl", padded=False)
    generator = Generator(model)

    def stop(ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full((len(ids),), ids.shape[1] >= inputs["input_ids"].shape[1] + 4)

    theirs, ours = both(model, generator, inputs, stopping_criteria=[stop], **GREEDY)
    assert torch.equal(theirs, ours)
    assert ours.shape[1] == inputs["input_ids"].shape[1] + 4
    theirs, ours = both(model, generator, inputs, num_return_sequences=2, **SAMPLED)
    assert torch.equal(theirs, ours)
    assert len(ours) == 4
    found = generator.generate(**inputs, max_new_tokens=2, return_dict_in_generate=True, **GREEDY)
    assert found.sequences.shape == (2, inputs["input_ids"].shape[1] + 2)


def test_inference_mode_before_and_after() -> None:
    model, inputs = made("llava"), asked("llava")
    generator = Generator(model)
    with torch.inference_mode():
        first = generator.generate(**inputs, max_new_tokens=NEW, **GREEDY)
    assert torch.equal(first, generator.generate(**inputs, max_new_tokens=NEW, **GREEDY))


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_beams": 2}, r"greedy or sampled, got beam_search"),
        ({"output_logits": True, "return_dict_in_generate": True}, r"output_logits must be off"),
        ({"use_cache": False}, r"use_cache must be on"),
        ({"guidance_scale": 2.0}, r"guidance_scale must be 1, got 2.0"),
        ({"inputs_embeds": torch.zeros(1, 1, 32)}, r"inputs_embeds must not be given"),
        ({"assistant_model": "x"}, r"assistant_model must not be given"),
        ({"max_new_tokens": 60}, r"at most max_length 64, got 103"),
        ({"stop_strings": ["."]}, r"stop_strings must come with tokenizer"),
    ],
)
def test_what_it_does_not_do_is_told(arguments: dict[str, Any], message: str) -> None:
    generator = Generator(made("llava"))
    with pytest.raises(ValueError, match=message):
        generator.generate(**asked("llava"), **{"max_new_tokens": 2, **arguments})


def test_too_many_rows_and_training_mode() -> None:
    model = made("llava")
    with pytest.raises(ValueError, match=r"at most max_batch_size 1 rows, got 2"):
        Generator(model, max_batch_size=1).generate(**asked("llava"), max_new_tokens=1)
    with pytest.raises(ValueError, match=r"eval mode"):
        Generator(model.train()).generate(**asked("llava"), max_new_tokens=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_batch_size": 0}, r"max_batch_size must be a number of at least 1, got 0"),
        ({"length_step": 0}, r"length_step must be"),
        (
            {"attention": "fast"},
            r"attention must be one of sdpa, eager, grouped, flex, flash, got 'fast'",
        ),
        ({"attention": "flash"}, r"16 bits on a GPU"),
        ({"compile": "reduce-overhead"}, r"compile must be True, False or one of"),
        ({"capture": True}, r"capture must be off, got True on cpu"),
        ({"layers": "liger"}, r"layers 'liger' must be on a GPU, got cpu"),
        (
            {"layers": "fast"},
            r"layers must be one of grace, torch, liger, transformers, got 'fast'",
        ),
        ({"lm_head_bits": 4}, r"lm_head_bits must be 8, got 4"),
    ],
)
def test_options_that_are_not_there(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Generator(made("llava"), **arguments)


def test_only_generating_models() -> None:
    with pytest.raises(ValueError, match=r"a generating model of transformers, got Linear"):
        Generator(nn.Linear(2, 2))
