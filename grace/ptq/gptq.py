"""GPTQ: round column by column, and let the columns that are left make up for each error.

For every row w of a weight, with the layer's inputs x and H = 2/n Σ x xᵀ, GPTQ looks for codes that
make (w − ŵ) H (w − ŵ)ᵀ small. Columns are taken one after another; column i is rounded, and its
error moves the columns after it:

    U = upper Cholesky factor of (H + λI)⁻¹          λ = damping · mean diag H
    e = (w_i − ŵ_i) / U_ii            w_{i+1:} ← w_{i+1:} − e · U_{i,i+1:}

Within a block of columns the update is made at once, the columns behind it are updated when the
block is done. Source: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative
Pre-trained Transformers" (ICLR 2023), algorithm 1.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from grace.ptq.grid import Grid, spread

BLOCK = 128  # columns; those behind a block are updated once, by one product


class Hessian:
    """H = 2/n Σ x xᵀ of a linear's inputs, added up batch by batch.

    Args:
        columns: in_features.
        device: where to add up.
        dtype: float32, or float64 for an oracle.
    """

    def __init__(
        self, columns: int, device: torch.device | str, dtype: torch.dtype = torch.float32
    ) -> None:
        self.sum = torch.zeros(columns, columns, device=device, dtype=dtype)
        self.absolute = torch.zeros(columns, device=device, dtype=dtype)
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        """Inputs [n, columns] of the linear."""
        x = x.to(self.sum.device, self.sum.dtype)
        self.sum.addmm_(x.t(), x)
        self.absolute += x.abs().sum(0)
        self.tokens += x.shape[0]

    def matrix(self, name: str) -> Tensor:
        """H [columns, columns]; zeros where no token came by.

        Raises:
            ValueError: inputs of the linear ``name`` that were not finite.
        """
        if not bool(self.sum.isfinite().all()):
            raise ValueError(f"ptq: calibration inputs of {name} must be finite, got NaN or Inf")
        return self.sum * (2 / max(1, self.tokens))

    def mean_absolute(self) -> Tensor:
        """Mean |x| of every input channel, [columns]."""
        return self.absolute / max(1, self.tokens)


def output_error(difference: Tensor, hessian: Tensor) -> Tensor:
    """Of each row d [K] of ``difference`` [N, K]: d H dᵀ, twice the mean squared output error."""
    return (difference @ hessian * difference).sum(1)


@torch.no_grad()
def solve(
    weight: Tensor,
    hessian: Tensor,
    grid: Grid,
    *,
    damping: float = 0.01,
    act_order: bool = False,
    log_scale: Tensor | None = None,
    block: int = BLOCK,
) -> tuple[Tensor, Tensor]:
    """Codes and steps of a weight by GPTQ, in the dtype of ``hessian``.

    A group's scale is found when its first column is reached, from the weights as they are then.
    With ``act_order`` columns are taken by falling diag H, and all scales are found before the
    first is rounded; codes stand in the weight's own order either way.

    A column without inputs (H_ii = 0) is rounded to nearest, and moves no other.

    Args:
        weight: [N, K].
        hessian: [K, K], float32 or float64; it is not changed.
        grid: bits, groups, scales.
        damping: λ over the mean of diag H.
        act_order: columns with the largest inputs first.
        log_scale: [N, G] float32, scales (steps of the grid) to use instead of finding them.
        block: columns of a block.

    Returns:
        (codes int8 [N, K], log_scale float32 [N, G]), of an asymmetric grid (int16, its steps)

    Raises:
        ValueError: a Hessian that is not finite, or not positive definite after damping.
    """
    work = weight.detach().to(hessian.dtype, copy=True)
    columns = _columns(hessian, act_order)
    factor = _factor(hessian, columns, damping)
    if log_scale is None and act_order:
        log_scale = grid.find(work)
    if log_scale is None:
        codes, log_scale = _solve_groups(work, factor, grid, block)
    else:
        steps = _by_column(grid, log_scale, work)
        ordered = steps[0][:, columns], steps[1][:, columns]
        codes = _solve_columns(work[:, columns], ordered, factor, grid, block)
        codes = codes[:, columns.argsort()]
    return codes.to(grid.code_dtype), log_scale


def _columns(hessian: Tensor, act_order: bool) -> Tensor:
    """In which order columns are rounded."""
    if act_order:
        return hessian.diagonal().argsort(descending=True, stable=True)
    return torch.arange(hessian.shape[0], device=hessian.device)


def _factor(hessian: Tensor, columns: Tensor, damping: float) -> Tensor:
    """U, the upper Cholesky factor of the damped inverse, in the order of ``columns``."""
    if not bool(hessian.isfinite().all()):
        raise ValueError("gptq: hessian must be finite, got NaN or Inf")
    damped = hessian[columns][:, columns]
    diagonal = damped.diagonal()
    dead = diagonal == 0
    mean = diagonal[~dead].mean() if bool((~dead).any()) else torch.ones_like(diagonal[0])
    diagonal += torch.where(dead, mean, damping * mean)
    for dtype in dict.fromkeys((hessian.dtype, torch.float64)):  # double where float32 fails
        lower, failed = torch.linalg.cholesky_ex(damped.to(dtype))
        if int(failed) == 0:
            inverse = torch.cholesky_inverse(lower)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if int(failed) == 0:
                return upper.to(hessian.dtype)
    raise ValueError(
        f"gptq: hessian must be positive definite with damping {damping}, got one that is not"
    )


def _solve_groups(work: Tensor, factor: Tensor, grid: Grid, block: int) -> tuple[Tensor, Tensor]:
    """Codes and steps; a group's scale is of the weights as they are at its start."""
    width, size = work.shape[1], grid.columns(work)
    codes, found = torch.empty_like(work), []
    for group in range(0, width, size):
        part = work[:, group : group + size]
        found.append(replace(grid, group_size=-1).find(part))
        steps = _by_column(grid, found[-1], part)
        # A block is within one group: at a group's start all columns before have moved it.
        for start in range(group, group + size, block):
            stop = min(start + block, group + size)
            _round_block(work, codes, steps, factor, start, stop, group, grid)
    return codes, torch.cat(found, 1)


def _by_column(grid: Grid, found: Tensor, work: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and lowest codes of every column, each [N, K] in the dtype of ``work`` [N, K]."""
    of_groups = grid.scales(found), grid.lows(found)
    scales, lows = (spread(x.to(work.dtype), work.shape[1]) for x in of_groups)
    return scales, lows


def _solve_columns(
    work: Tensor, steps: tuple[Tensor, Tensor], factor: Tensor, grid: Grid, block: int
) -> Tensor:
    """Codes by scales and lowest codes [N, K] that are known before."""
    codes, width = torch.empty_like(work), work.shape[1]
    for start in range(0, width, block):
        _round_block(work, codes, steps, factor, start, min(start + block, width), 0, grid)
    return codes


def _round_block(
    work: Tensor,
    codes: Tensor,
    steps: tuple[Tensor, Tensor],
    factor: Tensor,
    start: int,
    stop: int,
    first: int,
    grid: Grid,
) -> None:
    """Round columns start to stop of ``work`` [N, K] and move those behind them, in place.

    ``steps``, scales and lowest codes, are by column, from column ``first`` on.
    """
    scales, lows = steps
    highs = lows + (2**grid.bits - 1)
    errors = torch.empty_like(work[:, start:stop])
    for i in range(start, stop):
        scale, low, high = (x[:, i - first] for x in (scales, lows, highs))
        code = (work[:, i] / scale).round_().clamp_(low, high)
        codes[:, i] = code
        error = (work[:, i] - code * scale) / factor[i, i]
        work[:, i + 1 : stop].addr_(error, factor[i, i + 1 : stop], alpha=-1)
        errors[:, i - start] = error
    work[:, stop:].addmm_(errors, factor[start:stop, stop:], alpha=-1)
