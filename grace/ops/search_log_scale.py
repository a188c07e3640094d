"""The scale of least squared error for every group of a weight, by trying many.

    θ = log of the s that minimises Σ_group (q·s − w)²        q = clamp(round(w / s), …)

among 91 candidates r·max|w|/Qp, r = 0.30, 0.31, …, 1.20, Qp = 2^(b−1) − 1, each put on the grid of
``scale_dtype`` before it is judged, as ``fake_quant`` will put it. Not differentiable.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grace import _library
from grace.ops._checks import accumulate_dtype
from grace.ops.fake_quant import MIN_SCALE, groups_of, scales_from_log

RATIOS = tuple(percent / 100 for percent in range(30, 121))  # of absmax / Qp
_CHUNK = 1 << 22  # weights in work at once, which bounds the reference's memory to some 64 MiB

_library.define(
    "search_log_scale",
    "(Tensor weight, int bits, int group_size, ScalarType? scale_dtype) -> Tensor",
)


def search_log_scale(
    weight: Tensor,
    *,
    bits: int = 4,
    group_size: int = 128,
    scale_dtype: torch.dtype | None = torch.bfloat16,
) -> Tensor:
    """Log-scales of least squared error, float32 [N, G] on the weight's device.

    On a GPU one kernel reads the weight and keeps nothing; elsewhere the reference goes through it
    in chunks. Of equally good candidates the smallest is taken. Sums of errors are float32, so
    candidates that differ by less than their rounding are as good as each other, and devices may
    differ in which they take.

    Args:
        weight: [N, K], any float dtype.
        bits: 2 to 8.
        group_size: divides K, or −1 for one group a row.
        scale_dtype: grid of the scales: bfloat16, float16, or None for float32.

    Returns:
        θ; log of 2⁻¹⁷ for a group of zeros, NaN (or an infinity) for a group with a weight that is
        not finite.

    Raises:
        ValueError: for any other bits, group size, shape or dtype.
    """
    if weight.dim() != 2 or not weight.is_floating_point():
        got = f"{weight.dtype} {list(weight.shape)}"
        raise ValueError(f"search_log_scale: weight must be floating [N, K], got {got}")
    groups_of("search_log_scale", weight.shape[1], bits, group_size)
    if weight.is_cuda and weight.dtype == torch.float64:
        weight = weight.float()  # there is no kernel for it
    weight = weight.detach().contiguous()
    return torch.ops.grace.search_log_scale(weight, bits, group_size, scale_dtype)


@_library.reference("search_log_scale")
def reference(
    weight: Tensor, bits: int, group_size: int, scale_dtype: torch.dtype | None
) -> Tensor:
    """search_log_scale in plain PyTorch, in float32 (float64 for a float64 weight)."""
    groups = groups_of("search_log_scale", weight.shape[1], bits, group_size)
    rows = max(1, _CHUNK // max(1, weight.shape[1]))
    compute, shape = accumulate_dtype(weight.dtype), (-1, groups, weight.shape[1] // groups)
    parts = [
        _search(part.to(compute).reshape(shape), bits, scale_dtype) for part in weight.split(rows)
    ]
    return torch.cat(parts)


def log_of(scale: Tensor) -> Tensor:
    """log of a scale, not below that of the smallest there is; rounded to the scale's dtype.

    log is taken in float64 so that its float32 rounding is the same on every device.
    """
    return scale.clamp_min(MIN_SCALE).double().log().to(scale.dtype)


def _search(weight: Tensor, bits: int, scale_dtype: torch.dtype | None) -> Tensor:
    """Log-scales [n, G] of ``weight`` [n, G, g]."""
    top = 2 ** (bits - 1) - 1
    absmax = weight.abs().amax(dim=-1)
    best = log_of(absmax / top)  # stays where no candidate's error is finite
    least = torch.full_like(absmax, torch.inf)
    for ratio in RATIOS:
        log_scale = log_of(absmax * (ratio / top))
        scale = scales_from_log(log_scale, scale_dtype).to(weight.dtype).unsqueeze(-1)
        quantized = (weight / scale).round_().clamp_(-top - 1, top).mul_(scale)
        error = quantized.sub_(weight).square_().sum(dim=-1)
        better = error < least
        least = torch.where(better, error, least)
        best = torch.where(better, log_scale, best)
    return best


@_library.fake("search_log_scale")
def _(weight: Tensor, bits: int, group_size: int, scale_dtype: Any) -> Tensor:
    groups = 1 if group_size == -1 else weight.shape[1] // group_size
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return weight.new_empty(weight.shape[0], groups, dtype=dtype)
