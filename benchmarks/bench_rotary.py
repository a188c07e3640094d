"""Rotary embedding of queries and keys that are parts of a fused product, with and without norms,
against transformers' functions in eager PyTorch, torch.compile of them, and Liger-Kernel's."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from benchmarks.bench_rms_norm import EPS, liger_norm
from benchmarks.bench_rms_norm import eager as norm
from benchmarks.distillation import peer
from benchmarks.harness import Benchmark, Case, Side, buffer_sets, compiled
from grace.ops import rotary
from grace.ops.rotary import reference

DIM = 128
Parts = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]


def eager(*parts: Tensor | None) -> tuple[Tensor, Tensor]:
    """As transformers' attentions do it: norms, turned views, products rounded one by one."""
    q, k, cos, sin, q_weight, k_weight = parts
    if q_weight is not None:
        q, k = norm(q, q_weight), norm(k, k_weight)
    cos, sin = cos[:, None], sin[:, None]
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    return q * cos + _rotate_half(q) * sin, k * cos + _rotate_half(k) * sin


def _rotate_half(x: Tensor) -> Tensor:
    low, high = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat((-high, low), dim=-1)


def of_liger(sets: list[Parts]) -> Side:
    """Its norms want contiguous heads; its embedding makes a copy of what is not."""
    norms: dict[int, torch.nn.Module] = {}

    def normed(x: Tensor, weight: Tensor | None) -> Tensor:
        if weight is None:
            return x
        if id(weight) not in norms:
            norms[id(weight)] = liger_norm(weight)
        return norms[id(weight)](x.contiguous())

    def call(i: int) -> tuple[Tensor, Tensor]:
        embed = importlib.import_module("liger_kernel.transformers").liger_rotary_pos_emb
        q, k, cos, sin, q_weight, k_weight = sets[i]
        q, k = normed(q, q_weight), normed(k, k_weight)
        return embed(q.transpose(1, 2), k.transpose(1, 2), cos, sin)

    return peer(call)


def setup(
    device: torch.device, rows: int, tokens: int, heads: int, kv_heads: int, norms: bool
) -> Case:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def make() -> Parts:
        fused = torch.randn(rows, tokens, (heads + 2 * kv_heads) * DIM, device=device, dtype=dtype)
        q, k, _ = fused.unflatten(-1, (-1, DIM)).split([heads, kv_heads, kv_heads], dim=2)
        angles = torch.randn(rows, tokens, DIM // 2, device=device).repeat(1, 1, 2)
        weights = torch.randn(2, DIM, device=device, dtype=dtype) if norms else (None, None)
        return q, k, angles.cos().to(dtype), angles.sin().to(dtype), *weights

    vectors = rows * tokens * (2 * (heads + kv_heads) + 2)  # q, k read and written; cos, sin
    bytes_moved = vectors * DIM * dtype.itemsize
    sets = [make() for _ in range(buffer_sets(bytes_moved, device))]

    def grace(i: int) -> tuple[Tensor, Tensor]:
        *parts, q_weight, k_weight = sets[i]
        return rotary(*parts, q_weight=q_weight, k_weight=k_weight, eps=EPS)

    function = compiled(eager)
    return Case(
        sides={
            "grace": grace,
            "eager": lambda i: eager(*sets[i]),
            "compile": lambda i: function(*sets[i]),
            "liger": of_liger(sets),
        },
        exact=lambda: reference(*(x if x is None else x.double() for x in sets[0]), EPS)[0],
        bytes=bytes_moved,
        sets=len(sets),
    )


MODELS = [  # LLaVA-1.5-7B, Qwen3-VL-2B
    {"heads": 32, "kv_heads": 32, "norms": False},
    {"heads": 16, "kv_heads": 8, "norms": True},
]
SIZES = [
    {"rows": rows, "tokens": tokens, **model}
    for model in MODELS
    for rows, tokens in ((1, 1), (8, 1), (1, 632), (8, 632))
]
BENCHMARK = Benchmark("rotary", {"cuda": SIZES, "cpu": [SIZES[1], SIZES[5], SIZES[6]]}, setup)
