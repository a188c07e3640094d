from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from grace.nn import FakeQuantLinear
from grace.ops.fake_quant import fake_quant


def make(bits: int = 4, group_size: int = 32, bias: bool = True, **options) -> FakeQuantLinear:
    return FakeQuantLinear.from_linear(nn.Linear(96, 40, bias=bias), bits, group_size, **options)


def test_shares_the_parameters_of_the_linear():
    linear = nn.Linear(96, 40).eval()
    linear.weight.requires_grad_(False)
    layer = FakeQuantLinear.from_linear(linear, 4, 32)
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert layer.log_scale.dtype == torch.float32
    assert layer.log_scale.shape == (40, 3)
    assert not layer.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_forward_is_the_linear_of_the_quantized_weight(dtype: torch.dtype, bias: bool):
    layer = make(bias=bias)  # float32 masters under activations of any dtype
    x = torch.randn(3, 5, 96, dtype=dtype)
    weight = fake_quant(layer.weight, layer.log_scale, bits=4, group_size=32)
    expected = F.linear(x, weight.to(dtype), layer.bias.to(dtype) if bias else None)
    assert torch.equal(layer(x), expected)
    assert layer(x).dtype == dtype


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16, None])
@pytest.mark.parametrize(("bits", "group_size"), [(2, 32), (4, -1), (8, 16), (3, 96)])
def test_codes_times_scales_is_what_it_multiplies_with(bits, group_size, scale_dtype):
    layer = make(bits, group_size, scale_dtype=scale_dtype)
    codes, scales = layer.quantize()
    assert codes.dtype == torch.int8
    assert codes.min() >= -(2 ** (bits - 1))
    assert codes.max() <= 2 ** (bits - 1) - 1
    assert scales.dtype == (scale_dtype or torch.float32)
    product = codes.float().view(40, scales.shape[1], -1) * scales.float().unsqueeze(-1)
    assert torch.equal(product.flatten(1), layer.quantized_weight())


@pytest.mark.parametrize("cast", [nn.Module.bfloat16, nn.Module.half, nn.Module.double])
def test_log_scale_stays_float32_when_the_model_is_cast(cast):
    model = nn.Sequential(make(), nn.LayerNorm(40))
    before = model[0].log_scale.detach().clone()
    model(torch.randn(2, 96)).sum().backward()
    cast(model)
    assert model[0].log_scale.dtype == torch.float32
    assert model[0].log_scale.grad.dtype == torch.float32
    assert torch.equal(model[0].log_scale, before)
    assert isinstance(model[0].log_scale, nn.Parameter)
    assert model[0].weight.dtype == model[0].weight.grad.dtype == model[1].weight.dtype


def test_log_scale_follows_the_device():
    layer = make().to("meta", torch.bfloat16)
    assert layer.log_scale.is_meta
    assert layer.log_scale.dtype == torch.float32
    assert layer.to_empty(device="cpu").log_scale.dtype == torch.float32


def test_gradients_reach_weight_scales_bias_and_input():
    layer = make()
    x = torch.randn(4, 96, requires_grad=True)
    layer(x).square().sum().backward()
    for tensor in (layer.weight, layer.log_scale, layer.bias, x):
        assert tensor.grad is not None
        assert tensor.grad.abs().sum() > 0


def test_state_dict_round_trip_and_copy():
    layer = make()
    other = FakeQuantLinear(96, 40, bits=4, group_size=32)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(2, 96)
    assert torch.equal(other(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    assert set(layer.state_dict()) == {"weight", "log_scale", "bias"}


def test_compiles_without_breaks():
    layer = make()
    x = torch.randn(4, 96)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))


def test_repr_says_what_it_is():
    assert "in_features=96, out_features=40, bias=True, bits=4, group_size=32" in repr(make())
    assert "scale_dtype=float32" in repr(make(scale_dtype=None))


@pytest.mark.parametrize(
    ("bits", "group_size", "message"),
    [(1, 32, "bits must be 2 to 8, got 1"), (4, 36, "group_size must divide in_features 96")],
)
def test_bad_sizes_are_refused(bits: int, group_size: int, message: str):
    with pytest.raises(ValueError, match=message):
        make(bits, group_size)
    with pytest.raises(ValueError, match=message):
        FakeQuantLinear(96, 40, bits=bits, group_size=group_size)
