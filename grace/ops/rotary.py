"""Rotary embedding of queries and keys, their RMS norms before it, and the turn to [heads, tokens].

    y = norm(q) where there is a weight, else q      and (a, b) = y's two halves
    q'[r, h, t] = (a·cos_low − b·sin_low, b·cos_high + a·sin_high)      cos, sin at [r, t]

and the same of k: what transformers does in up to a dozen kernels before an attention, in one that
reads and writes everything once. q and k may be views of one fused product. All is fp32 and rounded
once. Inference only: there is no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grace import _library
from grace.ops._checks import (
    accumulate_dtype,
    require,
    require_floating,
    require_like,
    require_same_device,
    require_same_dtype,
)
from grace.ops.rms_norm import normed

OP = "rotary"

_library.define(
    OP,
    "(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor? q_weight, Tensor? k_weight, float eps) "
    "-> (Tensor, Tensor)",
)


def rotary(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Queries and keys as an attention takes them: normed, embedded and turned.

    Args:
        q: [rows, tokens, heads, dim], float32, bfloat16 or float16 (on a CPU also float64), dim
            even. Rows and tokens may lie apart in any way; a copy is made where the heads of a
            token do not lie one behind the other.
        k: [rows, tokens, kv_heads, dim] in the dtype of ``q``, with strides of its own.
        cos: [rows, tokens, dim] or [1, tokens, dim] in the dtype of ``q``. Its two halves need not
            be equal.
        sin: like ``cos``.
        q_weight: [dim] of an RMS norm of every query head before the embedding, or None for none.
        k_weight: the same of the keys.
        eps: of these norms.

    Returns:
        q' [rows, heads, tokens, dim] and k' [rows, kv_heads, tokens, dim], contiguous, in the dtype
        of ``q``. Repeated calls are bitwise equal.

    Raises:
        ValueError: for any other shape or dtype, and for tensors on different devices.
    """
    require_floating(OP, "q", q)
    require(q.dim() == 4, OP, "q", "have shape [rows, tokens, heads, dim]", list(q.shape))
    require(q.shape[-1] % 2 == 0, OP, "q", "have an even dim", q.shape[-1])
    _check_keys(q, k)
    rows = 1 if cos.dim() == 3 and cos.shape[0] == 1 else q.shape[0]
    for name, tensor in (("cos", cos), ("sin", sin)):
        require_like(OP, "q", q, name, tensor, (rows, q.shape[1], q.shape[-1]))
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is not None:
            require_like(OP, "q", q, name, weight, q.shape[-1:])
    embedding = cos.contiguous(), sin.contiguous()
    weights = (None if weight is None else weight.contiguous() for weight in (q_weight, k_weight))
    return torch.ops.grace.rotary(_in_heads(q), _in_heads(k), *embedding, *weights, eps)


def _check_keys(q: Tensor, k: Tensor) -> None:
    rows, tokens, _, dim = q.shape
    if k.dim() != 4 or (*k.shape[:2], k.shape[3]) != (rows, tokens, dim):
        allowed = f"[{rows}, {tokens}, kv_heads, {dim}]"
        raise ValueError(f"{OP}: k must have shape {allowed}, got {list(k.shape)}")
    require_same_dtype(OP, "q", q, "k", k)
    require_same_device(OP, "q", q, "k", k)


def _in_heads(x: Tensor) -> Tensor:
    """x itself where the heads of a token lie one behind the other, which the kernel needs."""
    heads, dim = x.shape[2:]
    return x if x.stride(3) == 1 and (heads == 1 or x.stride(2) == dim) else x.contiguous()


@_library.reference(OP)
def reference(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """rotary in plain PyTorch, in float32 (float64 for float64 q)."""
    return _embedded(q, cos, sin, q_weight, eps), _embedded(k, cos, sin, k_weight, eps)


def _embedded(x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    y = x.to(accumulate_dtype(x.dtype))
    if weight is not None:
        y = normed(y, weight, eps)
    low, high = y.chunk(2, dim=-1)
    turned = torch.cat([-high, low], dim=-1)
    y = y * cos[:, :, None].to(y.dtype) + turned * sin[:, :, None].to(y.dtype)
    return y.to(x.dtype).transpose(1, 2).contiguous()


@_library.fake(OP)
def _(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    (rows, tokens, heads, dim), kv_heads = q.shape, k.shape[2]
    return q.new_empty(rows, heads, tokens, dim), k.new_empty(rows, kv_heads, tokens, dim)
