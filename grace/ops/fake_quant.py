"""Group-wise symmetric fake quantization with learned scales.

    s = exp(θ) rounded to ``scale_dtype``, at least 2⁻¹⁷      v = w / s
    q = clamp(round-half-even(v), −2^(b−1), 2^(b−1)−1)        ŵ = q·s

Gradients are written out, not left to autograd (whose clamp changed at the bounds in torch 2.14):
with m = 1 where round(v) lies within the codes, both end codes included,

    ∂ŵ/∂w = m        ∂ŵ/∂θ = Σ_group ĝ·s·(q − m·v)

and the rounding of s is straight-through. Source: GRACE (arXiv 2601.22709), learned-scale
quantization; the scale grid is ours, so that training and every export format use the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grace import _library
from grace.ops._checks import accumulate_dtype, require, require_dims, require_floating

MIN_SCALE = 2.0**-17  # exact in bf16 and in fp16

_ARGUMENTS = "Tensor weight, Tensor log_scale, int bits, int group_size, ScalarType? scale_dtype"
_library.define("fake_quant", f"({_ARGUMENTS}) -> Tensor")
_library.define("fake_quant_backward", f"(Tensor grad, {_ARGUMENTS}) -> (Tensor, Tensor)")


def fake_quant(
    weight: Tensor,
    log_scale: Tensor,
    *,
    bits: int = 4,
    group_size: int = 128,
    scale_dtype: torch.dtype | None = torch.bfloat16,
) -> Tensor:
    """Quantizes ``weight`` to ``bits`` and back; differentiable in weight and log-scale.

    Args:
        weight: [N, K], float32, bfloat16 or float16.
        log_scale: [N, G] float32, θ = log of the scale of each group, G = K / group_size.
        bits: 2 to 8.
        group_size: weights that share a scale, along K; divides K, or −1 for one group a row.
        scale_dtype: grid that scales are rounded to: bfloat16, float16, or None for none.

    Returns:
        ŵ, [N, K] in weight's dtype.

    Raises:
        ValueError: for any other bits, group size, shape or dtype.
    """
    check_arguments("fake_quant", weight, log_scale, bits, group_size, scale_dtype)
    return torch.ops.grace.fake_quant(
        weight.contiguous(), log_scale.contiguous(), bits, group_size, scale_dtype
    )


def quantize(
    weight: Tensor,
    log_scale: Tensor,
    *,
    bits: int = 4,
    group_size: int = 128,
    scale_dtype: torch.dtype | None = torch.bfloat16,
) -> tuple[Tensor, Tensor]:
    """Codes int8 [N, K] and scales [N, G] in ``scale_dtype``: what ``fake_quant`` multiplies.

    ``codes * scales`` (each scale repeated over its group) equals ``fake_quant`` of the same
    arguments bit for bit. Raises ValueError like ``fake_quant``.
    """
    check_arguments("quantize", weight, log_scale, bits, group_size, scale_dtype)
    scales = scales_from_log(log_scale, scale_dtype)
    codes = codes_of(weight.to(accumulate_dtype(weight.dtype)), scales, bits)
    return codes.to(torch.int8), scales.to(scale_dtype or torch.float32)


def codes_of(weight: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Codes [N, K], in weight's dtype, of a weight [N, K] by its scales [N, G]."""
    return _divide_and_round(weight, _spread(scales, weight).to(weight.dtype), bits)[1]


def scales_from_log(log_scale: Tensor, scale_dtype: torch.dtype | None = torch.bfloat16) -> Tensor:
    """exp(θ) rounded to ``scale_dtype`` and not below 2⁻¹⁷, as float32 [N, G].

    exp is taken in float64 so that its float32 rounding is the same on every device. A float64 θ
    (the oracle's) without a grid keeps float64 scales.
    """
    scales = log_scale.double().exp()
    if scale_dtype is not None:
        scales = scales.float().to(scale_dtype).float()
    elif log_scale.dtype != torch.float64:
        scales = scales.float()
    return scales.clamp_min(MIN_SCALE)


def check_arguments(
    op: str,
    weight: Tensor,
    log_scale: Tensor,
    bits: int,
    group_size: int,
    scale_dtype: torch.dtype | None,
) -> None:
    """Raises ValueError, naming ``op``, unless the arguments are what ``fake_quant`` takes."""
    require_dims(op, "weight", weight, 2)
    require_floating(op, "weight", weight, float64_on_cpu=False)
    groups = groups_of(op, weight.shape[1], bits, group_size)
    expected = (weight.shape[0], groups)
    require(log_scale.dtype == torch.float32, op, "log_scale", "be float32", log_scale.dtype)
    require(
        log_scale.shape == expected, op, "log_scale", f"have shape {list(expected)}",
        list(log_scale.shape),
    )  # fmt: skip
    require(
        log_scale.device == weight.device, op, "log_scale", f"be on {weight.device}",
        log_scale.device,
    )  # fmt: skip
    grids = (None, torch.float32, torch.bfloat16, torch.float16)
    require(
        scale_dtype in grids, op, "scale_dtype", "be bfloat16, float16, float32 or None",
        scale_dtype,
    )  # fmt: skip


def groups_of(op: str, in_features: int, bits: int, group_size: int) -> int:
    """Groups a row, K / group_size; ValueError unless bits and group size are allowed for K."""
    require(2 <= bits <= 8, op, "bits", "be 2 to 8", bits)
    if group_size == -1:
        return 1
    divides = group_size > 0 and in_features % group_size == 0
    allowed = f"divide in_features {in_features} or be -1"
    require(divides, op, "group_size", allowed, group_size)
    return in_features // group_size


def _spread(scales: Tensor, weight: Tensor) -> Tensor:
    """Scales [N, G] repeated over their groups to [N, K]."""
    groups = scales.shape[1]
    return scales.repeat_interleave(weight.shape[1] // groups if groups else 1, dim=1)


def _divide_and_round(weight: Tensor, scale: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    value = weight / scale
    return value, value.round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


@_library.reference("fake_quant")
def reference(
    weight: Tensor, log_scale: Tensor, bits: int, group_size: int, scale_dtype: torch.dtype | None
) -> Tensor:
    """fake_quant in plain PyTorch, in float32 (float64 for a float64 weight)."""
    compute = accumulate_dtype(weight.dtype)
    scale = _spread(scales_from_log(log_scale, scale_dtype), weight).to(compute)
    _, codes = _divide_and_round(weight.to(compute), scale, bits)
    return (codes * scale).to(weight.dtype)


@_library.reference("fake_quant_backward")
def reference_backward(
    grad: Tensor,
    weight: Tensor,
    log_scale: Tensor,
    bits: int,
    group_size: int,
    scale_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """Gradients in weight and log-scale, as the module's formulas say."""
    compute = accumulate_dtype(weight.dtype)
    scale = _spread(scales_from_log(log_scale, scale_dtype), weight).to(compute)
    value, codes = _divide_and_round(weight.to(compute), scale, bits)
    inside = value.round() == codes
    grad = grad.to(compute)
    by_element = grad * scale * torch.where(inside, codes - value, codes)
    groups = log_scale.shape[1]
    size = weight.shape[1] // groups if groups else 0
    by_group = by_element.reshape(*log_scale.shape, size).sum(-1)
    return (grad * inside).to(weight.dtype), by_group.to(log_scale.dtype)


@_library.fake("fake_quant")
def _(weight: Tensor, log_scale: Tensor, bits: int, group_size: int, scale_dtype: Any) -> Tensor:
    return torch.empty_like(weight)


@_library.fake("fake_quant_backward")
def _(
    grad: Tensor, weight: Tensor, log_scale: Tensor, bits: int, group_size: int, scale_dtype: Any
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(weight), torch.empty_like(log_scale)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, log_scale, *ctx.settings = inputs
    ctx.save_for_backward(weight, log_scale)  # both live in the optimizer anyway: nothing is kept


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weight, log_scale = ctx.saved_tensors
    grads = torch.ops.grace.fake_quant_backward(grad.contiguous(), weight, log_scale, *ctx.settings)
    return (*grads, None, None, None)


torch.library.register_autograd("grace::fake_quant", _backward, setup_context=_save_for_backward)
