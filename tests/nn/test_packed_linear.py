from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from grace.nn import FakeQuantLinear, PackedLinear

GROUPS = [16, 32, 64, 128, -1]


def layer_of(
    bits: int = 4, group_size: int = 32, rows: int = 40, columns: int = 128, bias: bool = True
) -> PackedLinear:
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (rows, columns), dtype=torch.int8)
    groups = 1 if group_size == -1 else columns // group_size
    scales = (torch.rand(rows, groups) * 0.1 + 1e-3).bfloat16()
    return PackedLinear.from_codes(
        codes, scales, torch.randn(rows) if bias else None, bits, group_size
    )


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", GROUPS)
def test_unpack_gives_back_codes_and_scales(bits: int, group_size: int):
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (40, 128), dtype=torch.int8)
    scales = torch.rand(40, 1 if group_size == -1 else 128 // group_size).bfloat16() + 0.01
    layer = PackedLinear.from_codes(codes, scales, None, bits, group_size)
    for tensor, expected in zip(layer.unpack(), (codes, scales), strict=True):
        assert torch.equal(tensor, expected)
        assert tensor.dtype == expected.dtype
    product = codes.float().view(40, scales.shape[1], -1) * scales.float().unsqueeze(-1)
    assert torch.equal(layer.dequantize(), product.flatten(1))
    assert torch.equal(layer.dequantize(torch.bfloat16), product.flatten(1).bfloat16())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_multiplies_as_the_layer_it_was_trained_as(bits: int, dtype: torch.dtype):
    trained = FakeQuantLinear.from_linear(nn.Linear(128, 40), bits, 32)
    packed = PackedLinear.from_codes(*trained.quantize(), trained.bias, bits, 32)
    x = torch.randn(2, 3, 128, dtype=dtype)
    exact = x.double() @ packed.dequantize().double().t() + trained.bias.to(dtype).double()
    error = (packed(x).double() - exact).abs().max()
    allowed = 2 * (trained(x).double() - exact).abs().max() + torch.finfo(dtype).eps * exact.max()
    assert error <= allowed
    assert packed(x).dtype == dtype


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", GROUPS)
def test_state_dict_is_compressed_tensors(bits: int, group_size: int):
    layer = layer_of(bits, group_size)
    state = layer.state_dict(prefix="a.")
    assert set(state) == {"a.weight_packed", "a.weight_scale", "a.weight_shape", "a.bias"}
    assert state["a.weight_packed"].shape == (40, 128 * bits // 32)
    empty = PackedLinear(128, 40, True, bits=bits, group_size=group_size)
    model = nn.ModuleDict({"a": empty})
    model.load_state_dict(state)
    assert torch.equal(empty.qweight, layer.qweight)
    assert torch.equal(empty.scales, layer.scales)
    assert torch.equal(empty.bias, layer.bias)
    again = nn.ModuleDict({"a": layer_of(bits, group_size)})  # over other weights, as well
    again.load_state_dict(state)
    assert torch.equal(again["a"].qweight, layer.qweight)


def test_odd_sizes_round_trip():
    layer = layer_of(4, -1, rows=3, columns=13)
    other = PackedLinear(13, 3, True, bits=4, group_size=-1)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.unpack()[0], layer.unpack()[0])
    x = torch.randn(5, 13)
    torch.testing.assert_close(other(x), x @ layer.dequantize().t() + layer.bias)


@pytest.mark.parametrize("lost", ["weight_packed", "weight_scale", "weight_shape"])
def test_missing_tensors_are_named(lost: str):
    layer = layer_of()
    state = {name: tensor for name, tensor in layer.state_dict().items() if name != lost}
    for target in (layer, PackedLinear(128, 40, True, bits=4, group_size=32)):
        with pytest.raises(RuntimeError, match=lost):
            target.load_state_dict(state)


def test_a_layer_of_another_size_or_group_is_refused():
    state = layer_of(group_size=32).state_dict()
    with pytest.raises(ValueError, match=r"weight_scale must be \[40, 2\].*group size 64"):
        PackedLinear(128, 40, True, bits=4, group_size=64).load_state_dict(state)
    with pytest.raises(ValueError, match=r"weight_shape must be \[48, 128\], got \[40, 128\]"):
        PackedLinear(128, 48, True, bits=4, group_size=32).load_state_dict(state)


def test_an_empty_layer_does_not_run():
    with pytest.raises(ValueError, match="weights must be loaded before use"):
        PackedLinear(128, 40)(torch.randn(1, 128))


@pytest.mark.parametrize("group_size", [32, -1])
def test_other_features_are_refused(group_size: int):
    with pytest.raises(ValueError, match="x must have 128 features, got 127"):
        layer_of(group_size=group_size)(torch.randn(2, 127))


def test_scales_keep_their_dtype_when_the_model_is_cast():
    layer = layer_of()
    before = layer.scales.clone()
    layer.half()
    assert layer.scales.dtype == torch.bfloat16
    assert torch.equal(layer.scales, before)
    assert layer.bias.dtype == torch.float16
    assert layer.to("meta").qweight.is_meta


def test_a_residual_is_added_before_the_one_rounding():
    layer = layer_of(bias=False)
    x, residual = torch.randn(5, 128).bfloat16(), torch.randn(5, 40).bfloat16()
    exact = x.double() @ layer.dequantize().double().t() + residual.double()
    torch.testing.assert_close(layer(x, residual), exact.bfloat16(), rtol=2**-8, atol=1e-5)
    assert (layer(x, residual) - exact).abs().max() < (layer(x) + residual - exact).abs().max()
    with pytest.raises(ValueError, match=r"residual must be torch.bfloat16 \[5, 40\]"):
        layer(x, residual[:4])


def test_copies_and_has_nothing_to_train():
    layer = layer_of()
    x = torch.randn(2, 128)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    assert not any(parameter.requires_grad for parameter in layer.parameters())


def test_memory_is_that_of_the_bits():
    layer = layer_of(4, 128, rows=256, columns=512, bias=False)
    held = sum(t.numel() * t.element_size() for t in [*layer.parameters(), *layer.buffers()])
    assert held == 256 * 512 // 2 + 256 * 4 * 2


def test_compiles_without_breaks():
    layer = layer_of()
    x = torch.randn(4, 128)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize(
    ("codes", "scales", "bits", "message"),
    [
        (torch.zeros(4, 64, dtype=torch.int8), torch.ones(4, 3), 4, r"scales must be \[4, 2\]"),
        (torch.zeros(4, 64), torch.ones(4, 2), 4, "codes must be int8"),
        (torch.full((4, 64), 8, dtype=torch.int8), torch.ones(4, 2), 4, "codes must be within"),
        (torch.zeros(64, dtype=torch.int8), torch.ones(4, 2), 4, r"codes must be \[N, K\]"),
        (torch.zeros(4, 64, dtype=torch.int8), torch.ones(4, 2), 2, "bits must be 4 or 8, got 2"),
        (torch.zeros(4, 60, dtype=torch.int8), torch.ones(4, 2), 4, "or divide 60"),
    ],
)
def test_bad_input_is_refused(codes: Tensor, scales: Tensor, bits: int, message: str):
    with pytest.raises(ValueError, match=message):
        PackedLinear.from_codes(codes, scales, None, bits, 32)
