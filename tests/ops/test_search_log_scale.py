"""search_log_scale: no candidate is better than what it found."""

from __future__ import annotations

import importlib

import pytest
import torch
from conftest import Kernels
from torch import Tensor
from windows import assert_margins_untouched, windowed

from grace.ops import search_log_scale
from grace.ops.fake_quant import reference as fake_quant_reference
from grace.ops.fake_quant import scales_from_log
from grace.ops.search_log_scale import RATIOS, log_of, reference

GRIDS = [torch.bfloat16, torch.float16, None]


def errors(weight: Tensor, log_scale: Tensor, bits: int, size: int, grid) -> Tensor:
    """Σ (q·s − w)² of every group, in float64."""
    exact = scales_from_log(log_scale, grid).double().log()  # float64 θ of the very scale
    quantized = fake_quant_reference(weight.double(), exact, bits, size, None)
    return (quantized - weight).square().view(*log_scale.shape, -1).sum(-1)


def make(rows=6, groups=2, size=32, dtype=torch.float32) -> Tensor:
    return (torch.randn(rows, groups * size) * torch.rand(rows, 1)).to(dtype)


@pytest.mark.parametrize("scale_dtype", GRIDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_no_candidate_is_better(kernels: Kernels, bits, dtype, scale_dtype):
    weight = make(dtype=dtype)
    found = kernels.search_log_scale(*kernels.put(weight, bits, 32, scale_dtype)).cpu()
    own = errors(weight, found, bits, 32, scale_dtype)
    absmax = weight.float().view(*found.shape, -1).abs().amax(-1)
    for ratio in RATIOS:
        other = log_of(absmax * (ratio / (2 ** (bits - 1) - 1)))
        assert (own <= 1.00001 * errors(weight, other, bits, 32, scale_dtype)).all()


@pytest.mark.parametrize("group_size", [1, 5, 16, 100, 128, 130, 600])
def test_groups_of_any_length(kernels: Kernels, group_size):
    weight = make(rows=3, size=group_size)
    found = kernels.search_log_scale(*kernels.put(weight, 4, group_size, torch.bfloat16)).cpu()
    expected = reference(weight, 4, group_size, torch.bfloat16)
    assert found.shape == expected.shape == (3, 2)
    own = errors(weight, found, 4, group_size, torch.bfloat16)
    theirs = errors(weight, expected, 4, group_size, torch.bfloat16)
    torch.testing.assert_close(own, theirs, rtol=1e-5, atol=1e-12)


def test_whole_rows_are_minus_one(kernels: Kernels):
    weight = make(rows=4, groups=1, size=96)
    rows, named = (
        kernels.search_log_scale(*kernels.put(weight, 4, size, torch.bfloat16)) for size in (-1, 96)
    )
    assert torch.equal(rows, named)
    assert rows.shape == (4, 1)


def test_zeros_and_tiny_weights_get_the_smallest_scale(kernels: Kernels):
    weight = torch.zeros(3, 64)
    weight[1] = 1e-20
    found = kernels.search_log_scale(*kernels.put(weight, 4, 64, torch.bfloat16)).cpu()
    scales = scales_from_log(found, torch.bfloat16)
    assert scales.tolist() == [[2.0**-17]] * 3


def test_weights_beyond_the_grid_still_get_a_scale(kernels: Kernels):
    weight = torch.full((1, 64), 1e8)  # its scale does not fit float16: no error is finite
    found = kernels.search_log_scale(*kernels.put(weight, 4, 64, torch.float16)).cpu()
    assert found.isfinite().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_shows(kernels: Kernels, value):
    weight = make()
    weight[2, 40] = value
    found = kernels.search_log_scale(*kernels.put(weight, 4, 32, torch.bfloat16)).cpu()
    expected = torch.ones(6, 2, dtype=torch.bool)
    expected[2, 1] = False
    assert torch.equal(found.isfinite(), expected)


def test_reads_nothing_outside_its_weight(kernels: Kernels):
    weight, buffer = windowed(kernels.put(make(rows=5, size=50))[0])
    assert kernels.search_log_scale(weight, 4, 50, torch.bfloat16).isfinite().all()
    assert_margins_untouched(buffer)


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch):
    weight = make(rows=10)
    whole = reference(weight, 4, 32, torch.bfloat16)
    monkeypatch.setattr(importlib.import_module("grace.ops.search_log_scale"), "_CHUNK", 128)
    assert torch.equal(reference(weight, 4, 32, torch.bfloat16), whole)


def test_any_layout_and_no_weights():
    weight = make()
    assert torch.equal(
        search_log_scale(weight.t().contiguous().t(), group_size=32),
        search_log_scale(weight, group_size=32),
    )
    assert search_log_scale(torch.zeros(0, 64), group_size=32).shape == (0, 2)


def test_bad_arguments():
    with pytest.raises(
        ValueError, match=r"search_log_scale: weight must be floating \[N, K\], got"
    ):
        search_log_scale(torch.zeros(4))
    with pytest.raises(ValueError, match=r"search_log_scale: bits must be 2 to 8, got 9"):
        search_log_scale(make(), bits=9)
    with pytest.raises(
        ValueError, match=r"search_log_scale: group_size must divide in_features 64"
    ):
        search_log_scale(make(), group_size=24)
