"""Quantizes a weight and packs its codes in one step: what training hands to ``dequant_gemm``.

    codes, scales = quantize(weight, log_scale)        qweight, packed = pack(codes, scales)

bit for bit, without the codes in between: W is read once and half a byte (4 bits) or a byte (8) a
weight is written. The layout is that of ``grace.packing``. Not differentiable by itself:
``grace.nn.FakeQuantLinear`` has the gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grace import _library
from grace.ops._checks import accumulate_dtype, require
from grace.ops.fake_quant import check_arguments, codes_of, scales_from_log
from grace.packing import arrange, packed_shapes

_library.define(
    "quantize_pack",
    "(Tensor weight, Tensor log_scale, int bits, int group_size, ScalarType? scale_dtype) "
    "-> (Tensor, Tensor)",
)


def quantize_pack(
    weight: Tensor,
    log_scale: Tensor,
    *,
    bits: int = 4,
    group_size: int = 128,
    scale_dtype: torch.dtype | None = torch.bfloat16,
) -> tuple[Tensor, Tensor]:
    """The packed weight and scales of ``grace.ops.dequant_gemm``, on the weight's device.

    Values are not looked at, which would wait for the GPU: unlike ``pack`` this does not refuse
    scales that are infinite or, in bfloat16, 2²⁵ or more, with which ``dequant_gemm`` is undefined;
    so is the code of a weight that is NaN.

    Args:
        weight: [N, K], float32, bfloat16 or float16, K ≥ 1.
        log_scale: float32 [N, K / group_size], log of the scale of each group.
        bits: 4 or 8.
        group_size: divides K, or −1 for one group a row.
        scale_dtype: dtype of the packed scales, and the grid they are rounded to: bfloat16,
            float16, or None for float32.

    Returns:
        qweight: int32 [⌈N/64⌉, ⌈K/64⌉, 128·bits].
        scales: [G, 64·⌈N/64⌉] in ``scale_dtype``.

    Raises:
        ValueError: for any other bits, group size, shape or dtype.
    """
    check_arguments("quantize_pack", weight, log_scale, bits, group_size, scale_dtype)
    require(bits in (4, 8), "quantize_pack", "bits", "be 4 or 8", bits)
    shape = list(weight.shape)
    require(shape[1] > 0, "quantize_pack", "weight", "have at least one column", shape)
    weight, log_scale = weight.detach().contiguous(), log_scale.detach().contiguous()
    return torch.ops.grace.quantize_pack(weight, log_scale, bits, group_size, scale_dtype)


@_library.reference("quantize_pack")
def reference(
    weight: Tensor, log_scale: Tensor, bits: int, group_size: int, scale_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """quantize_pack in plain PyTorch."""
    compute = weight.to(accumulate_dtype(weight.dtype))
    scales = scales_from_log(log_scale, scale_dtype)
    codes = codes_of(compute, scales, bits).to(torch.int8)
    return arrange(codes, scales.to(scale_dtype or torch.float32), bits)


@_library.fake("quantize_pack")
def _(
    weight: Tensor, log_scale: Tensor, bits: int, group_size: int, scale_dtype: Any
) -> tuple[Tensor, Tensor]:
    shape, scales_shape = packed_shapes(weight.shape[0], weight.shape[1], bits, group_size)
    dtype = scale_dtype or torch.float32
    return weight.new_empty(shape, dtype=torch.int32), weight.new_empty(scales_shape, dtype=dtype)
