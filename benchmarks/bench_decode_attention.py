"""A decode step's attention, from projections to output, against what transformers runs for it.

The sides beside ours put keys and values into the cache and then attend: with torch's scaled
dot-product attention and a mask, as transformers does on a static cache; the same compiled; and
with FlashAttention for sequences of unlike lengths, which reads no more than there is.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.harness import Benchmark, Case, buffer_sets, compiled
from grace.generation.fast import flash_attention
from grace.ops import decode_attention
from grace.ops.decode_attention import reference


def prepared(given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Queries and the cache with the new token in it, as transformers' layers make them."""
    q, k = given["q"][:, :, None], given["k"][:, :, None]
    if given["q_weight"] is not None:
        q, k = (
            _norm(x, given[name], given["eps"]) for x, name in ((q, "q_weight"), (k, "k_weight"))
        )
    cos, sin = given["cos"][:, None, None], given["sin"][:, None, None]
    q, k = (x * cos + _turned(x) * sin for x in (q, k))
    given["keys"].index_copy_(2, given["position"], k)
    given["values"].index_copy_(2, given["position"], given["v"][:, :, None])
    return q, given["mask"][:, None, None]


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(dim=-1, keepdim=True) + eps)
    return weight * y.to(x.dtype)


def _turned(x: Tensor) -> Tensor:
    low, high = x.chunk(2, dim=-1)
    return torch.cat([-high, low], dim=-1)


def eager(given: dict[str, Any]) -> Tensor:
    q, mask = prepared(given)
    out = functional.scaled_dot_product_attention(
        q, given["keys"], given["values"], mask, scale=given["scale"], enable_gqa=True
    )
    return out[:, :, 0].flatten(1)


def flash(given: dict[str, Any]) -> Tensor:
    q, mask = prepared(given)
    layer: Any = SimpleNamespace()
    keys, values = given["keys"], given["values"]
    return flash_attention(layer, q, keys, values, mask, given["scale"])[0][:, 0].flatten(1)


def arguments(
    device: torch.device, dtype: torch.dtype, rows: int, heads: int, kv_heads: int, tokens: int
) -> dict[str, Any]:
    """Of a step that finds ``tokens`` in a cache that is a multiple of 256 long."""
    dim, length = 128, -(-(tokens + 1) // 256) * 256
    made: Callable[..., Tensor] = lambda *shape: torch.randn(shape, device=device, dtype=dtype)  # noqa: E731
    return {
        "q": made(rows, heads, dim),
        "k": made(rows, kv_heads, dim),
        "v": made(rows, kv_heads, dim),
        "cos": made(1, dim),
        "sin": made(1, dim),
        "keys": made(rows, kv_heads, length, dim),
        "values": made(rows, kv_heads, length, dim),
        "position": torch.tensor([tokens], device=device),
        "mask": torch.arange(length, device=device).le(tokens).expand(rows, -1).contiguous(),
        "q_weight": made(dim) if heads != kv_heads else None,
        "k_weight": made(dim) if heads != kv_heads else None,
        "eps": 1e-6,
        "scale": dim**-0.5,
    }


def setup(device: torch.device, rows: int, heads: int, kv_heads: int, tokens: int) -> Case:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    size = 2 * rows * kv_heads * (tokens + 1) * 128 * dtype.itemsize
    sets = buffer_sets(size, device)
    given = [arguments(device, dtype, rows, heads, kv_heads, tokens) for _ in range(sets)]
    sides: dict[str, Callable[[int], Any]] = {
        "grace": lambda i: decode_attention(**given[i]),
        "eager": lambda i: eager(given[i]),
    }
    if device.type == "cuda":
        program = compiled(eager)
        sides |= {"compile": lambda i: program(given[i]), "flash": lambda i: flash(given[i])}

    def exact() -> Tensor:
        double = {k: _double(value) for k, value in given[0].items()}
        return reference(*double.values())

    return Case(sides=sides, exact=exact, bytes=size, sets=sets)


def _double(value: Any) -> Any:
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.double() if floating else value


# Heads of LLaVA-1.5-7B, Qwen3-VL-2B and Qwen2-VL-2B; prompts with an image, and long ones.
HEADS = [(32, 32), (16, 8), (12, 2)]
SIZES = [
    {"rows": rows, "heads": heads, "kv_heads": kv_heads, "tokens": tokens}
    for heads, kv_heads in HEADS
    for rows, tokens in ((1, 700), (8, 700), (32, 700), (1, 4000))
]
BENCHMARK = Benchmark("decode_attention", {"cuda": SIZES, "cpu": SIZES[:1]}, setup)
