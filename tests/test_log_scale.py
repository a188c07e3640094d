from __future__ import annotations

import pytest
import torch

from grace.log_scale import METHODS, init_log_scale
from grace.ops.fake_quant import fake_quant, scales_from_log


def error(weight, log_scale, bits, group_size):
    quantized = fake_quant(weight, log_scale, bits=bits, group_size=group_size)
    return (quantized - weight).square().view(*log_scale.shape, -1).sum(-1)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("group_size", [16, 64, -1])
def test_mse_is_the_best_of_its_range(bits: int, group_size: int):
    weight = torch.randn(12, 128) * torch.rand(12, 1)
    found = init_log_scale(weight, bits, group_size)
    own = error(weight, found, bits, group_size)
    absmax = weight.abs().view(*found.shape, -1).amax(-1)
    for percent in range(30, 121):
        other = (absmax * (percent / 100 / (2 ** (bits - 1) - 1))).log()
        assert (own <= 1.00001 * error(weight, other, bits, group_size)).all()


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16, None])
@pytest.mark.parametrize("method", METHODS)
def test_values_are_finite_float32_of_the_right_shape(method: str, scale_dtype):
    weight = torch.randn(6, 96, dtype=torch.bfloat16)
    weight[2, 32:64] = 0
    weight[4] = 1e-20
    found = init_log_scale(weight, 4, 32, method, scale_dtype=scale_dtype)
    assert found.dtype == torch.float32
    assert found.shape == (6, 3)
    assert found.isfinite().all()
    smallest = scales_from_log(found, scale_dtype)[2, 1].item()
    assert smallest == pytest.approx(2.0**-17, rel=1e-6 if scale_dtype is None else 0)
    assert (fake_quant(weight, found, group_size=32)[2, 32:64] == 0).all()


def test_absmax_and_p99_are_what_they_say():
    weight = torch.linspace(0, 1, 101).repeat(2, 1)
    absmax = init_log_scale(weight, 4, -1, "absmax").exp()
    torch.testing.assert_close(absmax, torch.full((2, 1), 1 / 7))
    p99 = init_log_scale(weight, 4, -1, "p99").exp()
    torch.testing.assert_close(p99, weight.abs().quantile(0.99, dim=1, keepdim=True) / 7)
    assert (p99 < absmax).all()


@pytest.mark.parametrize("method", ["p99", "absmax"])
def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch, method: str):
    weight = torch.randn(10, 64)
    whole = init_log_scale(weight, 4, 16, method)
    monkeypatch.setattr("grace.log_scale._CHUNK", 128)
    assert torch.equal(init_log_scale(weight, 4, 16, method), whole)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, 16), "bits must be 2 to 8, got 1"),
        ((9, 16), "bits must be 2 to 8, got 9"),
        ((4, 24), "group_size must divide in_features 64 or be -1, got 24"),
        ((4, 0), "group_size must"),
        ((4, 16, "best"), "method must be one of mse, p99, absmax, got best"),
    ],
)
def test_bad_arguments_are_refused(arguments, message: str):
    with pytest.raises(ValueError, match=message):
        init_log_scale(torch.randn(4, 64), *arguments)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_bad_weights_are_refused(value: float, method: str):
    weight = torch.randn(4, 64)
    weight[1, 2] = value
    with pytest.raises(ValueError, match="weight must be finite"):
        init_log_scale(weight, 4, 16, method)


def test_what_is_no_weight_is_refused():
    with pytest.raises(ValueError, match=r"weight must be floating \[N, K\]"):
        init_log_scale(torch.zeros(4, 64, dtype=torch.int8), 4, 16)
