"""GPTQ against a float64 oracle that inverts what is left of the Hessian at every column."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from ptq_models import problem
from torch import Tensor

from grace.ptq.gptq import Hessian, output_error, solve
from grace.ptq.grid import Grid, spread

REFERENCE = Path(__file__).parents[1] / "data" / "llmcompressor.npz"


@lru_cache
def oracle(rows: int, columns: int, grid: Grid, damping: float = 0.01) -> tuple[Tensor, Tensor]:
    """Codes and scales of `problem`, one column after another: no Cholesky factor, no blocks."""
    weight, hessian = problem(rows, columns)
    w = weight.clone()
    damped = hessian + damping * hessian.diagonal().mean() * torch.eye(columns, dtype=w.dtype)
    size = columns if grid.group_size == -1 else grid.group_size
    codes, scales = torch.zeros_like(w), []
    for i in range(columns):
        if i % size == 0:
            absmax = w[:, i : i + size].abs().amax(1)
            scale = (absmax / grid.highest).to(torch.bfloat16).double()
            scales.append(scale)
        inverse = torch.linalg.inv(damped[i:, i:])
        codes[:, i] = (w[:, i] / scale).round().clamp(grid.lowest, grid.highest)
        error = (w[:, i] - codes[:, i] * scale) / inverse[0, 0]
        w[:, i:] -= error[:, None] * inverse[0]
    return codes, torch.stack(scales, 1)


def error_of(codes: Tensor, scales: Tensor, weight: Tensor, hessian: Tensor) -> float:
    quantized = codes.double() * spread(scales.double(), weight.shape[1])
    return float(output_error(quantized - weight, hessian).sum())


@pytest.mark.parametrize("block", [128, 24, 1])
@pytest.mark.parametrize(
    ("columns", "group"), [(48, 16), (48, -1), (60, 20), (132, -1), (130, 65), (132, 12)]
)
def test_codes_and_scales_are_the_oracle_s(columns: int, group: int, block: int) -> None:
    weight, hessian = problem(5, columns)
    grid = Grid(4, group, torch.bfloat16, "absmax")
    codes, log_scale = solve(weight, hessian, grid, block=block)
    expected, scales = oracle(5, columns, grid)
    assert torch.equal(grid.scales(log_scale).double(), scales)
    assert torch.equal(codes.double(), expected)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("init", ["mse", "absmax"])
def test_output_error_is_below_that_of_rounding_to_nearest(bits: int, init: str) -> None:
    weight, hessian = problem(16, 96)
    for group in (32, -1):
        grid = Grid(bits, group, torch.bfloat16, init)
        plain = grid.nearest(weight, grid.find(weight)) - weight
        least = float(output_error(plain, hessian).sum())
        for act_order in (False, True):
            codes, log_scale = solve(weight, hessian, grid, act_order=act_order)
            assert int(codes.min()) >= grid.lowest
            assert int(codes.max()) <= grid.highest
            assert error_of(codes, grid.scales(log_scale), weight, hessian) < least


def test_activation_order_is_gptq_of_the_permuted_weight() -> None:
    weight, hessian = problem(6, 64)
    grid = Grid(4, 16, torch.bfloat16)
    codes, log_scale = solve(weight, hessian, grid, act_order=True)
    assert torch.equal(log_scale, grid.find(weight))  # scales are static, of the weight as it was
    order = hessian.diagonal().argsort(descending=True)
    assert not torch.equal(order, torch.arange(64))
    by_column = spread(log_scale, 64)[:, order]  # a group a column
    permuted = Grid(4, 1, torch.bfloat16)
    expected, _ = solve(weight[:, order], hessian[order][:, order], permuted, log_scale=by_column)
    assert torch.equal(codes[:, order], expected)


def test_a_hessian_without_correlations_is_rounding_to_nearest() -> None:
    weight, _ = problem(6, 64)
    grid = Grid(3, 16, torch.bfloat16)
    codes, log_scale = solve(weight, torch.diag(torch.rand(64).double() + 0.1), grid)
    assert torch.equal(log_scale, grid.find(weight))
    assert torch.equal(codes * spread(grid.scales(log_scale), 64), grid.nearest(weight, log_scale))


def test_columns_without_inputs_are_rounded_and_move_nothing() -> None:
    weight, hessian = problem(6, 64)
    hessian, dead = hessian.clone(), torch.tensor([0, 17, 40, 63])
    hessian[dead], hessian[:, dead] = 0, 0
    grid = Grid(4, 16, torch.bfloat16)
    scales = grid.find(weight)
    codes, _ = solve(weight, hessian, grid, log_scale=scales)
    nearest = grid.nearest(weight, scales) / spread(grid.scales(scales), 64)
    torch.testing.assert_close(codes[:, dead].double(), nearest[:, dead])
    other = weight.clone()
    other[:, dead] += 0.3
    again, _ = solve(other, hessian, grid, log_scale=scales)
    live = torch.ones(64, dtype=torch.bool).index_fill(0, dead, False)
    assert torch.equal(again[:, live], codes[:, live])
    nothing, found = solve(weight, torch.zeros_like(hessian), grid)
    assert torch.equal(found, scales)
    torch.testing.assert_close(nothing.double(), nearest)


def test_a_weight_of_zeros_stays_zero() -> None:
    _, hessian = problem(1, 32)
    grid = Grid(4, 16, torch.bfloat16)
    codes, log_scale = solve(torch.zeros(3, 32), hessian.float(), grid)
    assert not codes.any()
    assert log_scale.isfinite().all()


def test_fewer_tokens_than_columns_do() -> None:
    weight, hessian = problem(8, 96, tokens=20)
    grid = Grid(4, 32, torch.bfloat16)
    for dtype in (torch.float32, torch.float64):
        codes, log_scale = solve(weight, hessian.to(dtype), grid)
        plain = output_error(grid.nearest(weight, grid.find(weight)) - weight, hessian).sum()
        assert error_of(codes, grid.scales(log_scale), weight, hessian) < float(plain)


def test_hessians_that_are_none_are_refused() -> None:
    weight, hessian = problem(2, 8)
    grid = Grid(4, 8, None)
    with pytest.raises(ValueError, match="hessian must be finite, got NaN or Inf"):
        solve(weight, hessian * torch.nan, grid)
    with pytest.raises(ValueError, match=r"positive definite with damping 0.01"):
        solve(weight, hessian - 100 * torch.eye(8), grid)


def test_the_hessian_is_the_mean_over_all_tokens() -> None:
    x = torch.randn(30, 6, dtype=torch.float64)
    hessian = Hessian(6, "cpu", torch.float64)
    for part in x.split((7, 20, 3)):
        hessian.add(part)
    torch.testing.assert_close(hessian.matrix("layer"), 2 / 30 * x.t() @ x)
    torch.testing.assert_close(hessian.mean_absolute(), x.abs().mean(0))
    assert not Hessian(6, "cpu").matrix("layer").any()
    hessian.add(torch.full((1, 6), torch.inf, dtype=torch.float64))
    with pytest.raises(ValueError, match="inputs of layer must be finite, got NaN or Inf"):
        hessian.matrix("layer")


@pytest.mark.parametrize(("name", "act_order"), [("gptq", False), ("gptq_act_order", True)])
def test_codes_are_llm_compressor_s(name: str, act_order: bool) -> None:
    """tools/make_ptq_reference.py: the same weight, Hessian and scales, in float32."""
    with np.load(REFERENCE) as made:
        weight, hessian, scale, expected = (
            torch.from_numpy(made[key]) for key in ("weight", "hessian", "scale", name)
        )
    grid = Grid(4, 32, None)
    codes, _ = solve(weight, hessian, grid, log_scale=scale.log(), act_order=act_order)
    assert (codes != expected).float().mean() < 0.002  # sums rounded otherwise may tip a tie
