"""RMS normalization of the last dimension, in one kernel.

    y = x · (mean(x²) + eps)^-½ · weight

The sum and the products are fp32 and the result is rounded once, where transformers' modules round
before the weight is multiplied too. Inference only: there is no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grace import _library
from grace.ops._checks import accumulate_dtype, require, require_floating, require_like

OP = "rms_norm"

_library.define(OP, "(Tensor x, Tensor weight, float eps) -> Tensor")


def rms_norm(x: Tensor, weight: Tensor, *, eps: float = 1e-6) -> Tensor:
    """The RMS norm of every row of x, times a weight a column.

    Args:
        x: [..., D], float32, bfloat16 or float16; on a CPU also float64. A copy is made where it
            is not contiguous.
        weight: [D] in the dtype of ``x``.
        eps: added to the mean of squares.

    Returns:
        [..., D], contiguous, in the dtype of ``x``. Repeated calls are bitwise equal.

    Raises:
        ValueError: for any other shape or dtype, and for tensors on different devices.
    """
    require_floating(OP, "x", x)
    require(x.dim() > 0, OP, "x", "have shape [..., D]", list(x.shape))
    require_like(OP, "x", x, "weight", weight, x.shape[-1:])
    return torch.ops.grace.rms_norm(x.contiguous(), weight.contiguous(), eps)


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The norm in the dtype of x, which is one to compute in: what references share."""
    return x * (x.square().mean(dim=-1, keepdim=True) + eps).rsqrt() * weight.to(x.dtype)


@_library.reference(OP)
def reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """rms_norm in plain PyTorch, in float32 (float64 for float64 x)."""
    compute = x.to(accumulate_dtype(x.dtype))
    return normed(compute, weight, eps).to(x.dtype).contiguous()


@_library.fake(OP)
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)
