"""Arguments of every op, for the tests that treat all ops alike (``test_every_op.py``).

Each function takes a dtype and returns the op's positional arguments; floating tensors are in that
dtype, but for those that an op wants in float32 whatever the dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from grace.packing import pack

Arguments = tuple[Any, ...]


def fake_quant(dtype: torch.dtype) -> Arguments:
    weight = torch.randn(6, 96).to(dtype)
    return weight, torch.full((6, 3), -1.5), 4, 32, torch.bfloat16


def fake_quant_backward(dtype: torch.dtype) -> Arguments:
    return torch.randn(6, 96).to(dtype), *fake_quant(dtype)


def fake_quant_many(dtype: torch.dtype) -> Arguments:
    shapes = ((6, 96), (3, 64), (5, 32))
    log_scales = [torch.full((n, k // 32), -1.5) for n, k in shapes]
    return [torch.randn(shape).to(dtype) for shape in shapes], log_scales, 4, 32, torch.bfloat16


def fake_quant_many_to(dtype: torch.dtype) -> Arguments:
    half = torch.bfloat16 if dtype == torch.float32 else dtype
    return *fake_quant_many(dtype), half


def fake_quant_many_backward(dtype: torch.dtype) -> Arguments:
    weights, *rest = fake_quant_many(dtype)
    return [torch.randn_like(weight) for weight in weights], weights, *rest


def search_log_scale(dtype: torch.dtype) -> Arguments:
    return torch.randn(6, 96).to(dtype), 4, 32, torch.bfloat16


def quantize_pack(dtype: torch.dtype) -> Arguments:
    return torch.randn(70, 96).to(dtype), torch.full((70, 3), -1.5), 4, 32, torch.bfloat16


def _rows(dtype: torch.dtype) -> Arguments:
    labels = torch.tensor([3, -100, 16, 0, 7])
    return torch.randn(5, 17).mul(3).to(dtype), torch.randn(5, 19).mul(3).to(dtype), labels


def gated_dkd(dtype: torch.dtype) -> Arguments:
    return *_rows(dtype), 2.0, 1.0, 4.0, -100


def gated_dkd_backward(dtype: torch.dtype) -> Arguments:
    arguments = gated_dkd(dtype)
    saved = torch.ops.grace.gated_dkd(*arguments)[-1]
    grads = torch.randn(2, 5).to(saved.dtype)
    return *grads, *arguments[:3], saved, *arguments[3:]


def _hidden(dtype: torch.dtype) -> Arguments:
    shapes = ((5, 8), (17, 8), (5, 12), (19, 12))
    return *(torch.randn(shape).to(dtype) for shape in shapes), torch.tensor([3, -100, 16, 0, 7])


def linear_gated_dkd(dtype: torch.dtype) -> Arguments:
    return *_hidden(dtype), 2.0, 1.0, 4.0, -100, 2, False


def linear_gated_dkd_backward(dtype: torch.dtype) -> Arguments:
    arguments = linear_gated_dkd(dtype)
    saved = torch.ops.grace.linear_gated_dkd(*arguments)[-1]
    grads = torch.randn(2, 5).to(saved.dtype)
    return *grads, *arguments[:5], saved, *arguments[5:-1], True, True


def cka(dtype: torch.dtype) -> Arguments:
    cu_seqlens = torch.tensor([0, 37, 38, 60], dtype=torch.int32)
    return torch.randn(60, 24).to(dtype), torch.randn(60, 40).to(dtype), cu_seqlens, 4


def cka_backward(dtype: torch.dtype) -> Arguments:
    student, teacher, cu_seqlens, min_tokens = cka(dtype)
    _, saved, *kept = torch.ops.grace.cka(student, teacher, cu_seqlens, min_tokens)
    return torch.randn(3).to(saved.dtype), student, cu_seqlens, saved, *kept, teacher.shape[1]


def dequant_gemm(dtype: torch.dtype) -> Arguments:
    codes = torch.randint(-8, 8, (70, 96), dtype=torch.int8)
    qweight, scales = pack(codes, torch.rand(70, 3).to(torch.bfloat16), 4)
    return torch.randn(5, 96).to(dtype), qweight, scales, torch.randn(70).to(dtype), 4, 32, 70


def rms_norm(dtype: torch.dtype) -> Arguments:
    return torch.randn(5, 96).to(dtype), torch.randn(96).to(dtype), 1e-6


def rotary(dtype: torch.dtype) -> Arguments:
    fused = torch.randn(2, 5, 8 * 32).to(dtype)  # of queries, keys and values
    q, k, _ = fused.unflatten(-1, (8, 32)).split([4, 2, 2], dim=2)
    cos, sin = torch.randn(2, 1, 5, 32).to(dtype)
    return q, k, cos, sin, torch.randn(32).to(dtype), None, 1e-6


EXAMPLES: dict[str, Callable[[torch.dtype], Arguments]] = {
    make.__name__: make
    for make in (
        fake_quant,
        fake_quant_backward,
        fake_quant_many,
        fake_quant_many_to,
        fake_quant_many_backward,
        search_log_scale,
        quantize_pack,
        gated_dkd,
        gated_dkd_backward,
        linear_gated_dkd,
        linear_gated_dkd_backward,
        cka,
        cka_backward,
        dequant_gemm,
        rms_norm,
        rotary,
    )
}
