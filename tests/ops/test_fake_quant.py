"""fake_quant: kernels and reference against float64 and the published numbers; properties."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import DATA, Kernels
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_accurate, to_double
from torch import Tensor
from windows import assert_margins_untouched, windowed

from grace.ops import fake_quant
from grace.ops.fake_quant import (
    MIN_SCALE,
    quantize,
    reference,
    reference_backward,
    scales_from_log,
)

KERNEL_DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GRIDS = [torch.bfloat16, torch.float16, torch.float32, None]
# What the CUDA kernels take apart: tiles of 4 to 32 vectors of 16 bytes (32 to 256 elements of 16
# bits), rows of other whole vectors, and elements.
GROUP_SIZES = [5, 8, 16, 32, 64, 96, 100, 128, 256, 320, 512]


def make_case(
    rows: int = 6, groups: int = 3, group_size: int = 32, bits: int = 4, dtype=torch.float32
) -> tuple[Tensor, Tensor]:
    weight = torch.randn(rows, groups * group_size)
    spread = weight.reshape(rows, groups, group_size).abs().amax(-1).clamp_min(1e-6)
    # 0.7: some weights lie beyond the codes, so that the mask of the gradient is at work
    return weight.to(dtype), (0.7 * spread / (2 ** (bits - 1) - 1)).log()


@pytest.mark.parametrize("scale_dtype", GRIDS)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("bits", range(2, 9))
def test_kernel_equals_reference(kernels: Kernels, bits, dtype, scale_dtype):
    weight, log_scale = make_case(bits=bits, dtype=dtype)
    arguments = (weight, log_scale, bits, 32, scale_dtype)
    actual = kernels.fake_quant(*kernels.put(*arguments))
    # Division, rounding and one product: every step is exact or correctly rounded on both sides.
    torch.testing.assert_close(actual.cpu(), reference(*arguments), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_kernel_equals_reference_for_every_group_size(kernels: Kernels, group_size, dtype):
    # 77 groups: tiles and blocks that are not full
    weight, log_scale = make_case(rows=11, groups=7, group_size=group_size, dtype=dtype)
    arguments = (weight, log_scale, 4, group_size, torch.bfloat16)
    actual = kernels.fake_quant(*kernels.put(*arguments))
    torch.testing.assert_close(actual.cpu(), reference(*arguments), rtol=0, atol=0)


@pytest.mark.parametrize("scale_dtype", GRIDS)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_quotients_next_to_ties_round_like_the_reference(kernels: Kernels, bits, scale_dtype):
    # Weights within a few units in the last place of (code + 1/2)·s, where a quotient that is off
    # by one unit gives another code, for scales whose fraction is anything and all ones.
    scale = torch.cat([torch.rand(60).add(0.5), torch.full((4,), 1 - 2.0**-24)])
    log_scale = scale.log().unsqueeze(1)
    exact = scales_from_log(log_scale, scale_dtype)
    ties = torch.arange(-(2 ** (bits - 1)) - 1, 2 ** (bits - 1) + 1) + 0.5
    weight = exact * ties.repeat(8 if bits < 8 else 1)
    for _ in range(3):
        arguments = (weight, log_scale, bits, -1, scale_dtype)
        actual = kernels.fake_quant(*kernels.put(*arguments))
        torch.testing.assert_close(actual.cpu(), reference(*arguments), rtol=0, atol=0)
        weight = weight.nextafter(torch.full_like(weight, torch.inf))


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_weights_off_the_16_byte_grid(kernels: Kernels, dtype):
    weight, log_scale = make_case(rows=4, groups=3, group_size=64, dtype=dtype)
    arguments = (torch.randn_like(weight), weight, log_scale, 4, 64, torch.bfloat16)
    grad, *rest = kernels.put(*arguments)
    shifted = torch.cat([grad.new_zeros(1), grad.flatten()])[1:].view(grad.shape)
    moved = torch.cat([rest[0].new_zeros(1), rest[0].flatten()])[1:].view(weight.shape)
    out = kernels.fake_quant(moved, *rest[1:])
    torch.testing.assert_close(out.cpu(), reference(*arguments[1:]), rtol=0, atol=0)
    exact = reference_backward(*to_double(*arguments))
    working = reference_backward(*arguments)
    for pair in ((shifted, rest[0]), (grad, moved)):
        actual = kernels.fake_quant_backward(*pair, *rest[1:])
        for values in zip(actual, exact, working, strict=True):
            assert_accurate(*values)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_kernel_backward_is_accurate(kernels: Kernels, group_size, dtype):
    weight, log_scale = make_case(rows=7, group_size=group_size, dtype=dtype)
    grad = torch.randn_like(weight)
    arguments = (grad, weight, log_scale, 4, group_size, torch.bfloat16)
    actual = kernels.fake_quant_backward(*kernels.put(*arguments))
    exact = reference_backward(*to_double(*arguments))
    working = reference_backward(*arguments)
    # The mask is exact: a gradient passes whole or not at all.
    torch.testing.assert_close(actual[0].cpu(), working[0], rtol=0, atol=0)
    for name, *values in zip(
        ("grad_weight", "grad_log_scale"), actual, exact, working, strict=True
    ):
        assert_accurate(*values, name=name)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(0, 5),
    groups=st.integers(1, 3),
    group_size=st.integers(1, 40),
    bits=st.integers(2, 8),
)
def test_any_shape(rows, groups, group_size, bits):
    weight, log_scale = make_case(rows, groups, group_size, bits)
    out = fake_quant(weight, log_scale, bits=bits, group_size=group_size)
    codes, scales = quantize(weight, log_scale, bits=bits, group_size=group_size)
    torch.testing.assert_close(
        out, codes * scales.float().repeat_interleave(group_size, 1), rtol=0, atol=0
    )
    torch.testing.assert_close(  # what is on the grid stays there
        fake_quant(out, log_scale, bits=bits, group_size=group_size), out, rtol=0, atol=0
    )


@pytest.mark.parametrize("name", ["w4g128", "w8g128"])
def test_matches_published_numbers(name):
    golden = {k: torch.from_numpy(v) for k, v in np.load(DATA / f"fake_quant_{name}.npz").items()}
    weight = golden["weight"].requires_grad_()
    log_scale = golden["log_scale"].requires_grad_()
    bits, group_size = int(golden["bits"]), int(golden["group_size"])
    out = fake_quant(weight, log_scale, bits=bits, group_size=group_size, scale_dtype=None)
    out.backward(golden["grad_out"])
    torch.testing.assert_close(out.detach(), golden["fake_quantized"], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(weight.grad, golden["grad_weight"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(log_scale.grad, golden["grad_log_scale"], rtol=1e-4, atol=1e-4)


def test_gradient_of_scale_is_the_derivative():
    # ŵ is piecewise constant in q: between code flips, dŵ/dθ = q·s inside and outside alike. The
    # straight-through part (−v·s inside) is checked by its own formula.
    weight, log_scale = make_case()
    grad = torch.randn_like(weight)
    _, actual = reference_backward(*to_double(grad, weight, log_scale), 4, 32, None)
    step = 1e-7
    plus, minus = (
        reference(weight.double(), log_scale.double() + sign * step, 4, 32, None)
        for sign in (1, -1)
    )
    derivative = (grad.double() * (plus - minus) / (2 * step)).reshape(6, 3, 32).sum(-1)
    scale = log_scale.double().exp().repeat_interleave(32, 1)
    inside = (weight.double() / scale).round().clamp(-8, 7) == (weight.double() / scale).round()
    through = (grad * weight * inside).double().reshape(6, 3, 32).sum(-1)
    torch.testing.assert_close(actual.double(), derivative - through, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("repeats", [1, 16, 64])  # short groups, tiles, rows
@pytest.mark.parametrize("bits", range(2, 9))
def test_end_codes_keep_their_gradient(kernels: Kernels, bits, repeats):
    lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    # -2^(b-1) - 1/2 is a tie that rounds to the end code, 2^(b-1) - 1/2 one that leaves the codes.
    codes = [lowest - 0.6, lowest - 0.5, lowest, highest, highest + 0.4, highest + 0.5]
    weight = torch.tensor([[*codes, torch.inf, -torch.inf]]).repeat(1, repeats) * 0.5
    log_scale = torch.full((1, 1), math.log(0.5))
    arguments = (torch.ones_like(weight), weight, log_scale, bits, -1, torch.bfloat16)
    grad, _ = kernels.fake_quant_backward(*kernels.put(*arguments))
    assert grad.tolist() == [[0, 1, 1, 1, 1, 0, 0, 0] * repeats]


def test_ties_round_to_even():
    weight = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, -2.5]])
    out = fake_quant(weight, torch.zeros(1, 1), group_size=-1)
    assert out.tolist() == [[0, 2, 2, 0, -2, -2]]


@pytest.mark.parametrize("group_size", [20, 64, 96])  # elements, tiles, rows
@pytest.mark.parametrize("scale_dtype", GRIDS)
def test_scales_of_any_size(kernels: Kernels, scale_dtype, group_size):
    # From where scales are held at 2^-17, through those by which the kernels cannot multiply
    # instead of divide (2^96), to infinity; and weights from zero to the largest, and of the scale.
    log_scale = torch.tensor([[-100, -11.9, -11.7, 0, 11.0, 66.0, 67.0, 88.0, 88.7, 100]]).t()
    sizes = torch.tensor([0, 1e-45, 1e-30, 1e-5, 1, 1e30, 3e38]).repeat(10, group_size)
    scale = scales_from_log(log_scale, scale_dtype).nan_to_num(posinf=1e38)
    weight = torch.cat([sizes[:, :group_size], scale * torch.randn(10, group_size)], 1)
    weight, log_scale = weight.contiguous(), log_scale.repeat(1, 2).contiguous()
    arguments = (weight, log_scale, 4, group_size, scale_dtype)
    actual = kernels.fake_quant(*kernels.put(*arguments))
    expected = reference(*arguments)
    torch.testing.assert_close(actual.cpu(), expected, rtol=0, atol=0, equal_nan=True)
    arguments = (torch.ones_like(weight), *arguments)
    actual, _ = kernels.fake_quant_backward(*kernels.put(*arguments))
    torch.testing.assert_close(actual.cpu(), reference_backward(*arguments)[0], rtol=0, atol=0)


@pytest.mark.parametrize("log_value", [-80.0, -20.0, 0.0, 20.0])
@pytest.mark.parametrize("fill", [0.0, 1e-30, 1e30])
def test_extremes_stay_finite(kernels: Kernels, fill, log_value):
    weight = torch.full((2, 32), fill)
    log_scale = torch.full((2, 1), log_value)
    out = kernels.fake_quant(*kernels.put(weight, log_scale, 4, 32, torch.bfloat16))
    assert out.isfinite().all()
    grads = kernels.fake_quant_backward(
        *kernels.put(torch.ones_like(weight), weight, log_scale, 4, 32, torch.bfloat16)
    )
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("repeats", [1, 32, 96])  # short groups, tiles, rows
def test_not_a_number_spreads(kernels: Kernels, repeats, dtype):
    weight = torch.tensor([[torch.nan, 1, torch.inf, -torch.inf]]).repeat(1, repeats).to(dtype)
    arguments = (weight, torch.zeros(1, 1), 4, -1, torch.bfloat16)
    out = kernels.fake_quant(*kernels.put(*arguments)).cpu()
    assert out[0].isnan().tolist() == [True, False, False, False] * repeats
    assert out[0].nan_to_num(9).tolist() == [9, 1, 7, -8] * repeats
    grads = kernels.fake_quant_backward(*kernels.put(torch.ones_like(weight), *arguments))
    assert grads[0][0].tolist() == [0, 1, 0, 0] * repeats
    assert grads[1].isnan().all()


def test_scales_are_on_the_grid():
    log_scale = torch.linspace(-15, 3, 4001).reshape(1, -1)
    scales = scales_from_log(log_scale, torch.bfloat16)
    assert scales.min().item() == MIN_SCALE
    for grid in (torch.bfloat16, torch.float16):  # bf16 scales above the floor are exact in fp16
        torch.testing.assert_close(scales.to(grid).float(), scales, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("group_size", [20, 64, 96])
def test_kernels_stay_inside_their_tensors(kernels: Kernels, group_size, dtype):
    weight, log_scale = make_case(rows=5, groups=3, group_size=group_size, dtype=dtype)
    cut = [windowed(t) for t in kernels.put(torch.randn_like(weight), weight, log_scale)]
    (grad, _), (w, _), (theta, _) = cut
    out = kernels.fake_quant(w, theta, 4, group_size, torch.bfloat16)
    grads = kernels.fake_quant_backward(grad, w, theta, 4, group_size, torch.bfloat16)
    assert all(t.isfinite().all() for t in (out, *grads))
    for _, buffer in cut:
        assert_margins_untouched(buffer)


def test_repeats_bitwise(kernels: Kernels):
    weight, log_scale = make_case(rows=40, group_size=128)
    arguments = kernels.put(torch.randn_like(weight), weight, log_scale, 4, 128, torch.bfloat16)
    first, second = (kernels.fake_quant_backward(*arguments) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_opcheck():
    weight, log_scale = make_case()
    arguments = (weight.requires_grad_(), log_scale.requires_grad_(), 4, 32, torch.bfloat16)
    torch.library.opcheck(torch.ops.grace.fake_quant, arguments)


def test_compiles_once_for_all_sizes():
    torch._dynamo.reset()
    compiled = torch.compile(fake_quant, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (4, 6, 9):
            weight, log_scale = make_case(rows)
            actual = compiled(weight, log_scale, group_size=32)
            torch.testing.assert_close(actual, fake_quant(weight, log_scale, group_size=32))


@pytest.mark.parametrize("group_size", [20, 64, 96])  # elements, tiles, rows
@pytest.mark.parametrize("scale_dtype", GRIDS)
def test_what_is_on_the_grid_stays_there(kernels: Kernels, scale_dtype, group_size):
    weight, log_scale = kernels.put(*make_case(group_size=group_size))
    settings = (log_scale, 4, group_size, scale_dtype)
    once = kernels.fake_quant(weight, *settings)
    assert torch.equal(kernels.fake_quant(once, *settings), once)


def test_non_contiguous_input():
    weight, log_scale = make_case(rows=96, groups=2, group_size=48)
    actual = fake_quant(weight.t().contiguous().t(), log_scale.t().contiguous().t(), group_size=48)
    torch.testing.assert_close(actual, fake_quant(weight, log_scale, group_size=48))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 9}, r"fake_quant: bits must be 2 to 8, got 9"),
        ({"group_size": 40}, r"fake_quant: group_size must divide in_features 96 or be -1, got 40"),
        ({"group_size": 0}, r"group_size must divide in_features 96 or be -1, got 0"),
        ({"weight": torch.zeros(96)}, r"weight must have 2 dimensions, got shape \[96\]"),
        ({"weight": torch.zeros(6, 96, dtype=torch.int32)}, r"weight must be one of float32"),
        ({"log_scale": torch.zeros(6, 2)}, r"log_scale must have shape \[6, 3\], got \[6, 2\]"),
        ({"log_scale": torch.zeros(6, 3).half()}, r"log_scale must be float32, got torch.float16"),
        ({"scale_dtype": torch.int8}, r"scale_dtype must be bfloat16, float16, float32 or None"),
    ],
)
def test_bad_arguments(changes, message):
    weight, log_scale = make_case()
    arguments = {"weight": weight, "log_scale": log_scale, "group_size": 32, **changes}
    with pytest.raises(ValueError, match=message):
        fake_quant(arguments.pop("weight"), arguments.pop("log_scale"), **arguments)
