"""Grids with a zero point: the grid itself, GPTQ on it against an oracle, whole models."""

from __future__ import annotations

import copy

import pytest
import torch
from ptq_models import inputs, made, problem
from torch import Tensor, nn

import grace
from grace import quantization
from grace.ptq import awq
from grace.ptq.gptq import output_error, solve
from grace.ptq.grid import AsymmetricGrid, Grid, spread


def _weight(shift: float = 0.0, columns: int = 96) -> Tensor:
    random = torch.Generator().manual_seed(1)
    return torch.randn(7, columns, generator=random, dtype=torch.float64) + shift


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("shift", [0.0, 0.4, 5.0, -5.0])
@pytest.mark.parametrize("init", ["mse", "absmax"])
def test_values_are_codes_of_the_range_times_scales(bits: int, shift: float, init: str) -> None:
    weight, grid = _weight(shift), AsymmetricGrid(bits, 32, torch.bfloat16, init)
    steps = grid.find(weight)
    scales, lows = (spread(x.double(), 96) for x in (grid.scales(steps), grid.lows(steps)))
    codes = grid.nearest(weight, steps) / scales
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-6)
    assert ((codes >= lows - 1e-6) & (codes <= lows + 2**bits - 1 + 1e-6)).all()
    assert ((lows <= 0) & (lows + 2**bits - 1 >= 0)).all()  # zero is a code
    assert torch.equal(scales, scales.bfloat16().double())
    # No code of the range is nearer.
    every = (lows[..., None] + torch.arange(2**bits)) * scales[..., None]
    least = (every - weight[..., None]).abs().amin(-1)
    torch.testing.assert_close((codes * scales - weight).abs(), least)


def test_the_whole_range_is_reached_and_clipped_where_that_is_better() -> None:
    weight = _weight()
    whole, best = (AsymmetricGrid(3, 32, None, init) for init in ("absmax", "mse"))
    steps = whole.find(weight)
    low, high = weight.unflatten(1, (3, 32)).aminmax(dim=-1)
    torch.testing.assert_close(whole.scales(steps).double(), (high - low) / 7)
    errors = [(g.nearest(weight, g.find(weight)) - weight).square().sum() for g in (best, whole)]
    assert errors[0] < errors[1]


def test_a_zero_point_helps_where_weights_are_shifted() -> None:
    for shift, most in ((0.0, 1.05), (3.0, 0.3)):
        weight = _weight(shift)
        ours, symmetric = (
            (g.nearest(weight, g.find(weight)) - weight).square().sum()
            for g in (AsymmetricGrid(4, 32, torch.bfloat16), Grid(4, 32, torch.bfloat16))
        )
        assert ours < most * symmetric


def _oracle(columns: int, grid: AsymmetricGrid, damping: float = 0.01) -> Tensor:
    """Quantized weight of `problem`, one column after another: no Cholesky factor, no blocks."""
    weight, hessian = problem(5, columns)
    w, out = weight.clone(), torch.zeros_like(weight)
    damped = hessian + damping * hessian.diagonal().mean() * torch.eye(columns, dtype=w.dtype)
    most = 2**grid.bits - 1
    for i in range(columns):
        if i % grid.group_size == 0:
            part = w[:, i : i + grid.group_size]
            low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
            scale = ((high - low) / most).to(torch.bfloat16).double()
            lowest = (low / scale).round()
        inverse = torch.linalg.inv(damped[i:, i:])
        out[:, i] = (w[:, i] / scale).round().clamp(lowest, lowest + most) * scale
        w[:, i:] -= ((w[:, i] - out[:, i]) / inverse[0, 0])[:, None] * inverse[0]
    return out


@pytest.mark.parametrize(("bits", "columns", "group"), [(4, 48, 16), (3, 60, 20), (8, 130, 65)])
def test_gptq_is_the_oracle_s(bits: int, columns: int, group: int) -> None:
    weight, hessian = problem(5, columns)
    grid = AsymmetricGrid(bits, group, torch.bfloat16, "absmax")
    codes, steps = solve(weight, hessian, grid)
    assert codes.dtype == torch.int16
    torch.testing.assert_close(grid.product(codes.double(), steps), _oracle(columns, grid))


@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_is_better_than_rounding(act_order: bool) -> None:
    weight, hessian = problem(16, 96)
    for bits in (2, 3, 4, 8):
        grid = AsymmetricGrid(bits, 32, torch.bfloat16)
        codes, steps = solve(weight, hessian, grid, act_order=act_order)
        ours = output_error(grid.product(codes.double(), steps) - weight, hessian).sum()
        plain = output_error(grid.nearest(weight, grid.find(weight)) - weight, hessian).sum()
        assert ours < plain


def test_clipping_is_never_worse_than_the_plain_steps() -> None:
    weight, hessian = problem(16, 96)
    grid = AsymmetricGrid(3, 32, torch.bfloat16)
    weight, hessian = weight.float(), hessian.float()
    errors = [
        output_error(grid.nearest(weight, steps) - weight, hessian)
        for steps in (awq.clip(weight, hessian, grid), grid.find(weight))
    ]
    assert (errors[0] <= errors[1] * 1.0001).all()
    assert errors[0].sum() < 0.95 * errors[1].sum()


@pytest.mark.parametrize("method", grace.ptq.METHODS)
@pytest.mark.parametrize("kind", ["llava", "qwen3_vl"])
def test_linears_stay_and_their_weights_are_on_the_grid(method: str, kind: str) -> None:
    model, batch = made(kind), inputs(kind)
    low = copy.deepcopy(model)
    told: list[tuple[int, int]] = []
    names = grace.ptq.quantize(
        low,
        method,
        None if method == "rtn" else [batch],
        bits=2,
        group_size=16,
        symmetric=False,
        progress=lambda done, of: told.append((done, of)),
    )
    assert names == list(quantization.decoder_linears(model))
    assert told[-1:] == ([] if method == "rtn" else [(len(names), len(names))])
    for name in names:
        linear = low.get_submodule(name)
        assert type(linear) is nn.Linear
        groups = linear.weight.detach().unflatten(1, (-1, 16))
        assert max(len(g.unique()) for row in groups for g in row) <= 4
        assert not torch.equal(linear.weight, model.get_submodule(name).weight)
    assert torch.isfinite(low(**batch).logits).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init": "p99"}, "init must be mse or absmax of an asymmetric grid, got 'p99'"),
        ({"bits": 9}, "bits"),
        ({"group_size": 24}, "group_size"),
    ],
)
def test_bad_arguments(options: dict, message: str) -> None:
    model = made("llava")
    with pytest.raises(ValueError, match=message):
        grace.ptq.quantize(model, **{"group_size": 16, "symmetric": False, **options})
    with pytest.raises(ValueError, match="weight must be finite, got NaN or Inf"):
        AsymmetricGrid(4, 16, None).find(torch.full((2, 16), torch.nan))
