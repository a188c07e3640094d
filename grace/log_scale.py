"""Initial scales of a weight that is about to be trained at low bits."""

from __future__ import annotations

import torch
from torch import Tensor

from grace.ops.fake_quant import groups_of
from grace.ops.search_log_scale import log_of, search_log_scale

METHODS = ("mse", "p99", "absmax")

_CHUNK = 1 << 22  # weights in work at once, which bounds the memory


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
      rounded to ``scale_dtype`` before it is judged, as the op will round it
      (`grace.ops.search_log_scale`: one kernel on a GPU);
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
    if method == "mse":
        found = search_log_scale(
            weight, bits=bits, group_size=group_size, scale_dtype=scale_dtype
        ).float()
    else:
        rows = max(1, _CHUNK // max(1, weight.shape[1]))
        shape = (-1, groups, weight.shape[1] // groups)
        parts = [_chunk(p.float().reshape(shape), bits, method) for p in weight.split(rows)]
        found = torch.cat(parts)
    # A weight that is not finite shows in its group's scale: the weight is not read again for it.
    if not bool(found.isfinite().all()):
        raise ValueError("init_log_scale: weight must be finite, got NaN or Inf")
    return found


def _chunk(weight: Tensor, bits: int, method: str) -> Tensor:
    """Log-scales [n, G] of ``weight`` float32 [n, G, g]."""
    top = 2 ** (bits - 1) - 1
    absmax = weight.abs().amax(dim=-1)
    if method == "absmax":
        return log_of(absmax / top)
    percentile = weight.abs().quantile(0.99, dim=-1) / top
    return log_of(torch.where(absmax.isfinite(), percentile, absmax))
