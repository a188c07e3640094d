"""Attention of one new token a row over a static cache, from the projections to the output.

    q, k = rotary(norm(q)), rotary(norm(k))         norms only where there are weights for them
    keys[:, :, position], values[:, :, position] = k, v
    y[r, h] = Σ_j softmax_j(scale · q[r, h] · keys[r, h // g, j]) · values[r, h // g, j]

over the cached tokens j < position that the mask shows, and the new one itself; g query heads share
a head of the cache. The rotary embedding turns halves: (a, b) → (a·cos − b·sin, b·cos + a·sin), as
transformers does. What a decode step otherwise spends eight kernels on is one, which reads the
cache once. Inference only: there is no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grace import _library
from grace.ops._checks import (
    accumulate_dtype,
    require,
    require_dims,
    require_floating,
    require_like,
    require_same_device,
)

OP = "decode_attention"
HEAD_DIMS = (64, 128)  # that the CUDA kernel is made for
MOST_GROUP = 16  # query heads a head of the cache, on a GPU

_library.define(
    OP,
    "(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor(a!) keys, Tensor(b!) values, "
    "Tensor position, Tensor mask, Tensor? q_weight, Tensor? k_weight, float eps, float scale, "
    "bool settled=False) -> Tensor",
)


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    mask: Tensor,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    scale: float | None = None,
    settled: bool = False,
) -> Tensor:
    """Puts a new token's key and value in their place in the cache, and attends.

    Args:
        q: [rows, heads, dim], float16 or bfloat16; on a CPU also float32 (and float64). Rows may
            lie apart, as in the fused product of queries, keys and values.
        k: [rows, kv_heads, dim].
        v: [rows, kv_heads, dim].
        cos: [rows, dim] or [1, dim], of the new token's position in the text.
        sin: like ``cos``.
        keys: [rows, kv_heads, length, dim], contiguous; written at ``position``.
        values: like ``keys``.
        position: int64 [1] on the device: where in the cache the new token goes, < length; a value
            outside is undefined, as it is not looked at on the host.
        mask: bool [rows, length], True: seen. Only tokens before ``position`` are asked for.
        q_weight: [dim] of an RMS norm of every query head before the embedding, or None.
        k_weight: the same of the keys.
        eps: of these norms.
        scale: of the products; default dim^-½.
        settled: True promises that ``position``, ``mask`` and what the cache holds before
            ``position`` were written before the last kernel of the stream that is no dependent
            launch: on a GPU the cache is then read while the kernels ahead still run. In a decode
            step of `Generator` that is so, as its tokens are chosen by such kernels.

    Returns:
        [rows, heads · dim] in the dtype of ``q``. Sums are fp32; queries, keys and probabilities
        are rounded to the dtype before they are multiplied. Repeated calls are bitwise equal; in
        which parts a row is summed depends on rows, kv_heads and length, and on nothing else.

    Raises:
        ValueError: for shapes, dtypes or devices outside of the above; on a GPU also for a dim
            other than 64 and 128, or more than 16 query heads a head of the cache.
    """
    _check(q, k, v, keys, values)
    _check_places(q, cos, sin, keys, position, mask)
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is not None:
            require_like(OP, "q", q, name, weight, (q.shape[-1],))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    arguments = (q, k, v, cos.contiguous(), sin.contiguous(), keys, values, position, mask)
    return torch.ops.grace.decode_attention(*arguments, q_weight, k_weight, eps, scale, settled)


def runs_on_gpu(heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> bool:
    """Whether the CUDA kernel takes these."""
    half = dtype in (torch.float16, torch.bfloat16)
    return half and dim in HEAD_DIMS and heads <= MOST_GROUP * kv_heads


def _check(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> None:
    require_floating(OP, "q", q)
    require_dims(OP, "q", q, 3)
    require_dims(OP, "keys", keys, 4)
    (rows, heads, dim), (_, kv_heads, length, _) = q.shape, keys.shape
    if kv_heads == 0 or heads % kv_heads:
        allowed = f"have a number of heads that divides {heads}"
        raise ValueError(f"{OP}: keys must {allowed}, got {kv_heads}")
    require(dim % 2 == 0, OP, "q", "have an even dim", dim)
    for name, tensor in (("keys", keys), ("values", values)):
        require_like(OP, "q", q, name, tensor, (rows, kv_heads, length, dim))
        require(tensor.is_contiguous(), OP, name, "be contiguous", "strides")
    for name, tensor in (("k", k), ("v", v)):
        require_like(OP, "q", q, name, tensor, (rows, kv_heads, dim))
    if q.is_cuda and not runs_on_gpu(heads, kv_heads, dim, q.dtype):
        dims = " or ".join(map(str, HEAD_DIMS))
        allowed = f"be 16-bit with dim {dims} and at most {MOST_GROUP} heads a head of keys"
        got = f"{q.dtype}, dim {dim}, {heads} heads of {kv_heads}"
        raise ValueError(f"{OP}: q must {allowed} on a GPU, got {got}")


def _check_places(
    q: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, position: Tensor, mask: Tensor
) -> None:
    rows, dim, length = q.shape[0], q.shape[-1], keys.shape[2]
    one = cos.dim() == 2 and cos.shape[0] == 1
    for name, tensor in (("cos", cos), ("sin", sin)):
        require_like(OP, "q", q, name, tensor, (1 if one else rows, dim))
    for name, tensor, dtype, shape in (
        ("position", position, torch.int64, (1,)),
        ("mask", mask, torch.bool, (rows, length)),
    ):
        if tensor.dtype != dtype or tensor.shape != shape:
            kind, got = str(dtype).removeprefix("torch."), f"{tensor.dtype} {list(tensor.shape)}"
            raise ValueError(f"{OP}: {name} must be {kind} {list(shape)}, got {got}")
        require_same_device(OP, "q", q, name, tensor)


@_library.reference(OP)
def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    mask: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    scale: float,
    settled: bool = False,
) -> Tensor:
    """decode_attention in plain PyTorch, in float32 (float64 for float64 q)."""
    dtype, compute = q.dtype, accumulate_dtype(q.dtype)
    q = _embedded(q, cos, sin, q_weight, eps)
    keys.index_copy_(2, position, _embedded(k, cos, sin, k_weight, eps)[:, :, None])
    values.index_copy_(2, position, v[:, :, None])
    places = torch.arange(keys.shape[2], device=q.device)
    seen = (mask & (places < position)) | (places == position)
    grouped = q.unflatten(1, (keys.shape[1], -1)).to(compute)
    scores = scale * (grouped @ keys.to(compute).transpose(-1, -2))
    scores = scores.masked_fill(~seen[:, None, None], float("-inf"))
    # Sums of rounded and of exact probabilities differ as the kernel's do.
    weights = (scores - scores.amax(dim=-1, keepdim=True)).exp()
    shown = values.to(compute).masked_fill(~seen[:, None, :, None], 0.0)
    out = weights.to(dtype).to(compute) @ shown / weights.sum(dim=-1, keepdim=True)
    return out.to(dtype).flatten(1)


def _embedded(x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """The norm and the rotary embedding of heads [rows, heads, dim], rounded once."""
    compute = accumulate_dtype(x.dtype)
    y = x.to(compute)
    if weight is not None:
        y = y * (y.square().mean(dim=-1, keepdim=True) + eps).rsqrt() * weight.to(compute)
    low, high = y.chunk(2, dim=-1)
    turned = torch.cat([-high, low], dim=-1)
    return (y * cos[:, None].to(compute) + turned * sin[:, None].to(compute)).to(x.dtype)


@_library.fake(OP)
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    mask: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    scale: float,
    settled: bool = False,
) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1] * q.shape[2])
