"""The output head at 8 bits, lengths for FlashAttention, layers that stand in, the clock."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from generating import GREEDY, NEW, asked, both, made
from torch import Tensor, nn
from torch.nn import functional as F

from grace.generation import Generator, Timing, quantize_head
from grace.generation.fast import grouped_attention, sequence_lengths
from grace.generation.layers import Layers, replaced, replacements
from grace.nn import PackedLinear


@pytest.mark.parametrize(("hidden", "groups"), [(32, 1), (256, 2)])
def test_a_head_at_8_bits_is_to_nearest(hidden: int, groups: int) -> None:
    model: Any = made("llava", hidden_size=hidden)
    weight = model.lm_head.weight.detach().clone()
    assert quantize_head(model) == "lm_head"
    head = model.lm_head
    assert isinstance(head, PackedLinear)
    codes, scales = head.unpack()
    assert scales.shape == (60, groups)
    assert int(codes.abs().max()) == 127
    step = scales.float().repeat_interleave(hidden // groups, dim=1)
    error = (head.dequantize() - weight).abs()
    inside = weight.abs() <= 127 * step  # bf16 scales may be a little small for the largest
    assert (error[inside] <= 0.5001 * step[inside]).all()
    assert inside.float().mean() > 0.98


def test_a_tied_head_leaves_its_embedding() -> None:
    model: Any = made("qwen3_vl")
    model.lm_head.weight = model.get_input_embeddings().weight
    embedding = model.get_input_embeddings().weight
    was = embedding.detach().clone()
    Generator(model, lm_head_bits=8).generate(**asked("qwen3_vl"), max_new_tokens=2)
    assert torch.equal(embedding, was)
    with pytest.raises(ValueError, match=r"must be an nn.Linear, got PackedLinear"):
        quantize_head(model)


def test_grouped_attention_is_attention() -> None:
    query = torch.randn(2, 6, 1, 8)
    key, value = torch.randn(2, 2, 2, 10, 8)
    mask = torch.arange(10) >= torch.tensor([[3], [0]])
    mask = mask.view(2, 1, 1, 10) & (torch.arange(10) < 7)
    ours, _ = grouped_attention(nn.Identity(), query, key, value, mask)
    each = [t.repeat_interleave(3, dim=1) for t in (key, value)]
    exact = F.scaled_dot_product_attention(query, *each, attn_mask=mask).transpose(1, 2)
    torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-5)


def test_sequences_of_a_mask() -> None:
    """Cut out by the lengths, keys are those that the mask shows."""
    mask = torch.zeros(3, 1, 1, 8, dtype=torch.bool)
    mask[0, ..., 2:5] = mask[1, ..., :6] = mask[2, ..., 7:] = True
    each, starts, counts = sequence_lengths(mask, 2)
    assert {t.dtype for t in (each, starts, counts)} == {torch.int32}
    assert each.tolist() == list(range(7))
    assert int(starts[-1]) == 3 * 2 * 8
    places = mask.expand(3, 2, 1, 8).reshape(6, 8).flatten().nonzero().flatten().tolist()
    pairs = list(zip(starts[:-1].tolist(), counts.tolist(), strict=True))
    assert [start + i for start, count in pairs for i in range(count)] == places


@pytest.mark.parametrize(("kind", "norms"), [("llava", 9), ("qwen3_vl", 17), ("qwen2_vl", 9)])
def test_layers_stand_in_while_steps_run(kind: str, norms: int) -> None:
    """The places where other layers go, with the same formulas from here."""
    calls = {"norm": 0, "rotary": 0}

    def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        calls["norm"] += 1
        return F.rms_norm(x, weight.shape, weight, eps)

    def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        calls["rotary"] += 1

        def turned(x: Tensor) -> Tensor:
            first, second = x.chunk(2, dim=-1)
            return x * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]

        return turned(q), turned(k)

    model, inputs = made(kind), asked(kind)
    generator = Generator(model)
    generator.layers = Layers("torch", replacements(model, norm, rotary), [])
    theirs, ours = both(model, generator, inputs, **GREEDY)
    assert torch.equal(theirs, ours)
    assert calls == {"norm": norms * (NEW - 1), "rotary": 4 * (NEW - 1)}
    assert not any("forward" in vars(module) for module in model.modules())


def test_norms_of_torch() -> None:
    model, inputs = made("qwen2_5_vl"), asked("qwen2_5_vl")
    generator = Generator(model, layers="torch")
    assert generator.layers.prompts == []
    assert len(generator.layers.steps) == 9 + 5  # and those of the tower, which steps do not run
    theirs, ours = both(model, generator, inputs, **GREEDY)
    assert torch.equal(theirs, ours)


def test_what_was_replaced_comes_back_from_an_error() -> None:
    layer = nn.Linear(2, 2)

    def failing() -> None:
        with replaced([(layer, "forward", len)]):
            assert layer.forward is len
            raise RuntimeError("here")

    with pytest.raises(RuntimeError, match="here"):
        failing()
    assert "forward" not in vars(layer)


def test_rates() -> None:
    timing = Timing(rows=4, prompt_tokens=10, new_tokens=11, prefill_ms=50, decode_ms=150)
    assert timing.ms_per_token == 15
    assert timing.tokens_per_second == 220
    assert Timing(1, 1, 1, 2.0, 0.0).ms_per_token == 0
