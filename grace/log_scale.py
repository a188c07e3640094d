"""Initial scales of a weight that is about to be trained at low bits."""

from __future__ import annotations

import torch
from torch import Tensor

from grace.ops.fake_quant import MIN_SCALE, groups_of, scales_from_log

METHODS = ("mse", "p99", "absmax")

_RATIOS = tuple(ratio / 100 for ratio in range(30, 121))  # of absmax / Qp
_CHUNK = 1 << 22  # weights in work at once, which bounds the search's memory to some 64 MiB


@torch.no_grad()
def init_log_scale(
    weight: Tensor,
    bits: int,
    group_size: int,
    method: str = "mse",
    *,
    scale_dtype: torch.dtype | None = torch.bfloat16,
) -> Tensor:
    """Log-scales for `grace.ops.fake_quant`, float32 [N, G] on the weight's device.

    With Qp = 2^(bits-1) - 1, per group of ``group_size`` columns:

    - ``"mse"``: the scale of least squared error among 91 from 0.3 to 1.2 times max|w|/Qp, each
      rounded to ``scale_dtype`` before it is judged, as the op will round it;
    - ``"p99"``: 99th percentile of |w| / Qp (the paper's choice);
    - ``"absmax"``: max|w| / Qp, the usual rounding to nearest.

    A group of zeros gets the smallest scale there is, 2^-17.

    Args:
        weight: [N, K], any float dtype.
        bits: 2 to 8.
        group_size: divides K, or -1 for one group a row.
        method: one of the above.
        scale_dtype: grid on which the op will put the scales; None: float32.

    Raises:
        ValueError: bits, group size or method outside of the above; a weight that is not finite.
    """
    if method not in METHODS:
        raise ValueError(
            f"init_log_scale: method must be one of {', '.join(METHODS)}, got {method}"
        )
    if weight.dim() != 2 or not weight.is_floating_point():
        got = f"{weight.dtype} {list(weight.shape)}"
        raise ValueError(f"init_log_scale: weight must be floating [N, K], got {got}")
    groups = groups_of("init_log_scale", weight.shape[1], bits, group_size)
    rows = max(1, _CHUNK // max(1, weight.shape[1]))
    parts = [
        _chunk(part.float().view(-1, groups, weight.shape[1] // groups), bits, method, scale_dtype)
        for part in weight.split(rows)
    ]
    return torch.cat(parts)


def _chunk(weight: Tensor, bits: int, method: str, scale_dtype: torch.dtype | None) -> Tensor:
    """Log-scales [n, G] of ``weight`` float32 [n, G, g]."""
    if not bool(weight.isfinite().all()):
        raise ValueError("init_log_scale: weight must be finite, got NaN or Inf")
    top = 2 ** (bits - 1) - 1
    if method == "p99":
        return _log(weight.abs().quantile(0.99, dim=-1) / top)
    absmax = weight.abs().amax(dim=-1)
    return _log(absmax / top) if method == "absmax" else _search(weight, absmax, bits, scale_dtype)


def _search(weight: Tensor, absmax: Tensor, bits: int, scale_dtype: torch.dtype | None) -> Tensor:
    top = 2 ** (bits - 1) - 1
    best = torch.empty_like(absmax)
    least = torch.full_like(absmax, torch.inf)
    for ratio in _RATIOS:
        log_scale = _log(absmax * (ratio / top))
        scale = scales_from_log(log_scale, scale_dtype).unsqueeze(-1)
        quantized = (weight / scale).round_().clamp_(-top - 1, top).mul_(scale)
        error = quantized.sub_(weight).square_().sum(dim=-1)
        better = error < least
        least = torch.where(better, error, least)
        best = torch.where(better, log_scale, best)
    return best


def _log(scale: Tensor) -> Tensor:
    return scale.clamp_min(MIN_SCALE).log()
