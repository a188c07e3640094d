from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from conftest import DATA
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from grace.nn import FakeQuantLinear, PackedLinear
from grace.ops import dequant_gemm
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


# --- the deployed layer's kernel in training ----------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (8, -1)])
def test_packed_product_is_the_deployed_layer(bits, group_size, bias, dtype):
    layer = make(bits, group_size, bias, product="packed")
    deployed = PackedLinear.from_codes(
        *layer.quantize(), layer.bias, bits=bits, group_size=group_size
    )
    x = torch.randn(3, 5, 96, dtype=dtype)
    assert torch.equal(layer(x), deployed(x))
    assert layer(x).dtype == dtype


def test_a_packed_product_waits_for_its_weight(monkeypatch):
    """On a GPU a dependent launch would read what quantize_pack is still writing."""
    seen = []

    def watched(*given, **options):
        seen.append(options["settled"])
        return dequant_gemm(*given, **options)

    monkeypatch.setattr("grace.nn.fake_quant_linear.dequant_gemm", watched)
    make(4, 32, False, product="packed")(torch.randn(3, 96))
    assert seen == [False]


@pytest.mark.gpu
@pytest.mark.parametrize("masters", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("bits", "group_size"), [(4, 128), (4, 32), (8, -1)])
@pytest.mark.parametrize("tokens", [1, 16, 300])
def test_packed_product_on_a_gpu(tokens, bits, group_size, masters):
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    linear = nn.Linear(256, 200).to("cuda", masters)
    layer = FakeQuantLinear.from_linear(linear, bits, group_size, product="packed")
    deployed = PackedLinear.from_codes(
        *layer.quantize(), layer.bias, bits=bits, group_size=group_size
    )
    x = torch.randn(tokens, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(tokens, 200, device="cuda", dtype=torch.bfloat16)
    assert torch.equal(layer(x), deployed(x))
    leaves = (x, *layer.parameters())
    packed = torch.autograd.grad(layer(x), leaves, grad)
    layer.product = "dense"
    for a, b in zip(packed, torch.autograd.grad(layer(x), leaves, grad), strict=True):
        assert a.dtype == b.dtype
        assert (a - b).float().norm() <= 2e-2 * b.float().norm()


@pytest.mark.parametrize("frozen", [(), ("weight", "bias"), ("log_scale",), ("x",)])
def test_packed_product_has_the_gradients_of_the_dense_one(frozen):
    layer = make()
    x = torch.randn(2, 7, 96)
    grad = torch.randn(2, 7, 40)
    leaves = {"x": x, **dict(layer.named_parameters())}
    for name, leaf in leaves.items():
        leaf.requires_grad_(name not in frozen)
    trained = [leaf for name, leaf in leaves.items() if name not in frozen]
    expected = torch.autograd.grad(layer(x), trained, grad)
    layer.product = "packed"
    for a, b in zip(torch.autograd.grad(layer(x), trained, grad), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_packed_product_keeps_no_quantized_weight():
    layer = make(product="packed")
    kept = []
    x = torch.randn(4, 96, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x).sum()
    own = {t.data_ptr() for t in (x, layer.weight, layer.log_scale)}
    assert {t.data_ptr() for t in kept} <= own


def test_packed_product_follows_autocast():
    layer, x = make(product="packed"), torch.randn(4, 96)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, layer(x.bfloat16()))
    out.float().sum().backward()
    assert layer.weight.grad.dtype == layer.log_scale.grad.dtype == torch.float32


def test_packed_product_under_gradient_checkpointing():
    layer, x = make(product="packed"), torch.randn(4, 96, requires_grad=True)
    expected = torch.autograd.grad(layer(x).sum(), (x, layer.weight))
    out = checkpoint(layer, x, use_reentrant=False)
    for a, b in zip(torch.autograd.grad(out.sum(), (x, layer.weight)), expected, strict=True):
        assert torch.equal(a, b)


def test_packed_product_compiles_without_breaks():
    layer, x = make(product="packed"), torch.randn(4, 96, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    inputs = (x, layer.weight, layer.log_scale, layer.bias)
    for a, b in zip(
        *(torch.autograd.grad(f(x).sum(), inputs) for f in (compiled, layer)), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_packed_product_wants_bits_that_pack():
    with pytest.raises(ValueError, match="bits must be 4 or 8 with a packed product, got 3"):
        make(3, product="packed")
    with pytest.raises(ValueError, match="product must be dense or packed, got fast"):
        make(product="fast")


@pytest.mark.parametrize("name", ["w4g128", "w8g128"])
@pytest.mark.parametrize("product", ["dense", "packed"])
def test_drop_in_for_the_published_layer(product, name):
    golden = {k: torch.from_numpy(v) for k, v in np.load(DATA / f"fake_quant_{name}.npz").items()}
    rows, columns = golden["weight"].shape
    bits, size = int(golden["bits"]), int(golden["group_size"])
    layer = FakeQuantLinear(
        columns, rows, False, bits=bits, group_size=size, scale_dtype=None, product=product
    )
    layer.load_state_dict({k: golden[k] for k in ("weight", "log_scale")})
    # With the identity as input the output is the weight's transpose, and so is its gradient.
    out = layer(torch.eye(columns)).t()
    out.backward(golden["grad_out"])
    torch.testing.assert_close(out.detach(), golden["fake_quantized"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.weight.grad, golden["grad_weight"], rtol=1e-5, atol=1e-6)
    scales = golden["grad_log_scale"]
    torch.testing.assert_close(layer.log_scale.grad, scales, rtol=1e-4, atol=1e-4)


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
