"""The output head at 8 bits, as `grace.pack` makes it; its numbers: tests/generation/test_parts."""

from __future__ import annotations

from typing import Any

import pytest
from generating import asked, made
from torch import nn

import grace
from grace.nn import FusedLinear, PackedLinear


def prepared(**text: Any) -> Any:
    model: Any = made("llava", **text)
    grace.quantize(model, group_size=32, init="absmax")
    return model


@pytest.mark.parametrize("fuse", [False, True])
def test_pack_takes_the_head_too(fuse: bool) -> None:
    inputs = asked("llava")
    plain, model = prepared(), prepared()
    names = grace.pack(plain)
    assert grace.pack(model, fuse=fuse, lm_head_bits=8) == names
    assert isinstance(model.lm_head, PackedLinear)
    assert model.lm_head.bits == 8
    assert any(isinstance(module, FusedLinear) for module in model.modules()) == fuse
    assert model.config.quantization_config == plain.config.quantization_config
    exact, ours = plain(**inputs).logits, model(**inputs).logits
    error = (ours - exact).std() / exact.std()
    assert 1e-4 < error < 0.02


@pytest.mark.parametrize(
    ("bits", "head", "message"),
    [
        (4, None, r"pack: lm_head_bits must be 8, got 4"),
        (8, nn.Identity(), r"pack: the output head must be an nn.Linear, got Identity"),
        (8, nn.Linear(32, 60, device="meta"), r"pack: the output head must be in memory"),
    ],
)
def test_what_cannot_be_packed_leaves_the_model(bits: int, head: Any, message: str) -> None:
    model = prepared()
    if head is not None:
        model.lm_head = head
    was = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=message):
        grace.pack(model, lm_head_bits=bits)
    assert {name: type(module) for name, module in model.named_modules()} == was
