"""Layers of a block quantized together give what each alone gives, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from grace.nn import FakeQuantLinear
from grace.nn import quantize_ahead as module
from grace.nn.quantize_ahead import hold, quantize_ahead, release
from grace.quantization import pack


class Block(nn.Module):
    def __init__(self, bits: int = 4) -> None:
        super().__init__()
        self.up = _layer(32, 48, bits)
        self.down = _layer(48, 32, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Model(nn.Module):
    def __init__(self, checkpointing: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 32)
        self.layers = nn.ModuleList([Block(), Block(3)])
        self.checkpointing = checkpointing

    def forward(self, x: Tensor) -> Tensor:
        for block in self.layers:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointing else block(x)
        return x


def _layer(columns: int, rows: int, bits: int) -> FakeQuantLinear:
    return FakeQuantLinear.from_linear(nn.Linear(columns, rows), bits, group_size=16)


def _gradients(model: Model, x: Tensor, autocast: bool) -> list[Tensor]:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = model(x)
    return [out.detach(), *torch.autograd.grad(out.float().square().sum(), _trained(model))]


def _trained(model: Model) -> list[nn.Parameter]:
    return list(model.layers.parameters())


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many weights each call of fake_quant_many had."""
    seen: list[int] = []
    original = module.fake_quant_many

    def counted(weights: list[Tensor], *args: object, **options: object) -> list[Tensor]:
        seen.append(len(weights))
        return original(weights, *args, **options)

    monkeypatch.setattr(module, "fake_quant_many", counted)
    return seen


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("held", [False, True])
def test_values_and_gradients_are_those_of_single_layers(
    checkpointing: bool, autocast: bool, held: bool, calls: list[int]
) -> None:
    model, x = Model(checkpointing), torch.randn(5, 32)
    expected = _gradients(model, x, autocast)
    quantize_ahead(model.layers)
    if held:
        hold(model.layers, torch.bfloat16 if autocast else None)
    actual = _gradients(model, x, autocast)
    release(model.layers)
    assert len(actual) == 1 + 3 * 4
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)
    # Blocks have layers of two kinds; without `hold` they are made again in the recomputation.
    assert sum(calls) == 4 * (2 if checkpointing and not held else 1)
    assert all(layer.ahead is None for block in model.layers for layer in (block.up, block.down))


def test_layers_alike_share_a_call(calls: list[int]) -> None:
    block = Block(bits=8)
    quantize_ahead([block])
    block(torch.randn(2, 32))
    assert calls == [2]


def test_a_weight_that_changed_is_quantized_anew() -> None:
    model, x = Model(), torch.randn(5, 32)
    quantize_ahead(model.layers)
    with torch.no_grad():
        before = model(x)
        model.layers[0].up.weight.mul_(-3)
        after, alone = model(x), copy.deepcopy(model)
    for handle in [*alone.layers[0]._forward_pre_hooks, *alone.layers[1]._forward_pre_hooks]:
        for block in alone.layers:
            block._forward_pre_hooks.pop(handle, None)
    assert not torch.equal(before, after)
    assert torch.equal(after, alone(x).detach())


def test_nothing_is_left_behind_when_a_block_fails() -> None:
    block = Block()
    quantize_ahead([block])
    with pytest.raises(RuntimeError):
        block(torch.randn(2, 31))
    assert block.up.ahead is None


def test_handles_end_it(calls: list[int]) -> None:
    block = Block()
    for handle in quantize_ahead([block]):
        handle.remove()
    block(torch.randn(2, 32))
    assert calls == []


def test_a_copy_and_a_packed_model_go_their_own_way(calls: list[int]) -> None:
    model, x = Model(), torch.randn(5, 32)
    for layer in (model.layers[1].up, model.layers[0].up):
        layer.bits = 4
    quantize_ahead(model.layers)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.layers[0].up.weight.zero_()
        assert not torch.equal(model(x), other(x))
        calls.clear()
        pack(model)
        model(x)
    assert calls == []


def test_packed_products_are_left_alone(calls: list[int]) -> None:
    block = Block()
    block.up.product = "packed"
    quantize_ahead([block])
    block(torch.randn(2, 32))
    assert calls == [1]
