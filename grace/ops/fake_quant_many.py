"""`fake_quant` of many weights in a few launches: the same numbers, bit for bit.

A launch takes up to 64 weights, each with blocks of its own; weights whose groups lie differently
in memory (`csrc/ops/fake_quant/kernels.h`) need a launch a kind. Formulas are in
``grace.ops.fake_quant``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from grace import _library
from grace.ops._checks import require
from grace.ops.fake_quant import check_arguments, fake_quant
from grace.ops.fake_quant import reference as _reference_one
from grace.ops.fake_quant import reference_backward as _reference_backward_one

_ARGUMENTS = (
    "Tensor[] weights, Tensor[] log_scales, int bits, int group_size, ScalarType? scale_dtype"
)
_library.define("fake_quant_many", f"({_ARGUMENTS}) -> Tensor[]")
_library.define("fake_quant_many_to", f"({_ARGUMENTS}, ScalarType dtype) -> Tensor[]")
_library.define(
    "fake_quant_many_backward", f"(Tensor[] grads, {_ARGUMENTS}) -> (Tensor[], Tensor[])"
)


def fake_quant_many(
    weights: Sequence[Tensor],
    log_scales: Sequence[Tensor],
    *,
    bits: int = 4,
    group_size: int = 128,
    scale_dtype: torch.dtype | None = torch.bfloat16,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """Quantizes every weight to ``bits`` and back; differentiable in weights and log-scales.

    On a CPU it is `fake_quant` of one after another. Holds every ŵ at once: as many bytes as the
    weights themselves.

    Args:
        weights: each [N, K], of one dtype (float32, bfloat16 or float16) on one device.
        log_scales: for each weight, float32 [N, K / group_size].
        bits: 2 to 8.
        group_size: divides every K, or −1 for one group a row.
        scale_dtype: grid that scales are rounded to: bfloat16, float16, or None for none.
        dtype: of ŵ: None for the weights' own, or, for float32 weights, bfloat16 or float16. Then
            ŵ is rounded once more, as a cast behind would, its gradient comes in that dtype, and
            no float32 ŵ is ever written or read.

    Returns:
        ŵ for every weight.

    Raises:
        ValueError: for any other bits, group size, shape, dtype or number of log-scales.
    """
    _check(weights, log_scales, bits, group_size, scale_dtype)
    _check_dtype(weights, dtype)
    if not weights or not weights[0].is_cuda:
        return [
            fake_quant(w, t, bits=bits, group_size=group_size, scale_dtype=scale_dtype).to(
                dtype or w.dtype
            )
            for w, t in zip(weights, log_scales, strict=True)
        ]
    tensors = [x.contiguous() for x in (*weights, *log_scales)]
    settings = (bits, group_size, scale_dtype)
    if dtype == weights[0].dtype:
        dtype = None
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return _call(tensors, settings, dtype)
    return list(_FakeQuantMany.apply(settings, dtype, *tensors))


def _call(
    tensors: Sequence[Tensor], settings: tuple[Any, ...], dtype: torch.dtype | None
) -> list[Tensor]:
    """The op, of weights and as many log-scales behind them."""
    weights, log_scales = list(tensors[: len(tensors) // 2]), list(tensors[len(tensors) // 2 :])
    if dtype is None:
        return torch.ops.grace.fake_quant_many(weights, log_scales, *settings)
    return torch.ops.grace.fake_quant_many_to(weights, log_scales, *settings, dtype)


class _FakeQuantMany(torch.autograd.Function):
    """The autograd that is registered for the ops. It costs the host less as a Function with flat
    arguments than through lists, and small layers are bound by the host."""

    @staticmethod
    def forward(
        ctx: Any, settings: tuple[Any, ...], dtype: torch.dtype | None, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.settings = settings
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        return tuple(_call(tensors, settings, dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        for_weights, for_log_scales = _gradients(list(grads), ctx.saved_tensors, ctx.settings)
        return (None, None, *for_weights, *for_log_scales)


def _check_dtype(weights: Sequence[Tensor], dtype: torch.dtype | None) -> None:
    if not weights or dtype in (None, weights[0].dtype):
        return
    half = weights[0].dtype == torch.float32 and dtype in (torch.bfloat16, torch.float16)
    allowed = "be the weights' or, of float32 weights, bfloat16 or float16"
    require(half, "fake_quant_many", "dtype", allowed, dtype)


def _check(
    weights: Sequence[Tensor],
    log_scales: Sequence[Tensor],
    bits: int,
    group_size: int,
    scale_dtype: torch.dtype | None,
) -> None:
    op = "fake_quant_many"
    many = len(weights)
    require(len(log_scales) == many, op, "log_scales", f"be {many} like weights", len(log_scales))
    for weight, log_scale in zip(weights, log_scales, strict=True):
        check_arguments(op, weight, log_scale, bits, group_size, scale_dtype)
        first = weights[0]
        require(weight.dtype == first.dtype, op, "weights", f"all be {first.dtype}", weight.dtype)
        on = f"all be on {first.device}"
        require(weight.device == first.device, op, "weights", on, weight.device)


@_library.reference("fake_quant_many")
def reference(
    weights: list[Tensor],
    log_scales: list[Tensor],
    bits: int,
    group_size: int,
    scale_dtype: torch.dtype | None,
) -> list[Tensor]:
    """The reference of fake_quant on one weight after another."""
    settings = (bits, group_size, scale_dtype)
    return [_reference_one(w, t, *settings) for w, t in zip(weights, log_scales, strict=True)]


@_library.reference("fake_quant_many_to")
def reference_to(weights: list[Tensor], log_scales: list[Tensor], *settings: Any) -> list[Tensor]:
    """That of fake_quant_many, cast to the last of its settings."""
    return [w.to(settings[-1]) for w in reference(weights, log_scales, *settings[:-1])]


@_library.reference("fake_quant_many_backward")
def reference_backward(
    grads: list[Tensor],
    weights: list[Tensor],
    log_scales: list[Tensor],
    bits: int,
    group_size: int,
    scale_dtype: torch.dtype | None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients in weights and in log-scales, from gradients of any dtype."""
    settings = (bits, group_size, scale_dtype)
    pairs = [
        _reference_backward_one(g.to(w.dtype), w, t, *settings)
        for g, w, t in zip(grads, weights, log_scales, strict=True)
    ]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


@_library.fake("fake_quant_many")
def _(
    weights: list[Tensor], log_scales: list[Tensor], bits: int, group_size: int, scale_dtype: Any
) -> list[Tensor]:
    return [torch.empty_like(w) for w in weights]


@_library.fake("fake_quant_many_to")
def _(weights: list[Tensor], log_scales: list[Tensor], *settings: Any) -> list[Tensor]:
    return [torch.empty_like(w, dtype=settings[-1]) for w in weights]


@_library.fake("fake_quant_many_backward")
def _(
    grads: list[Tensor],
    weights: list[Tensor],
    log_scales: list[Tensor],
    bits: int,
    group_size: int,
    scale_dtype: Any,
) -> tuple[list[Tensor], list[Tensor]]:
    return [torch.empty_like(w) for w in weights], [torch.empty_like(t) for t in log_scales]


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    weights, log_scales, *ctx.settings = inputs
    ctx.save_for_backward(*weights, *log_scales)  # the optimizer holds them: nothing is kept
    ctx.set_materialize_grads(False)  # a ŵ that nothing used has None


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    return (*_gradients(grads, ctx.saved_tensors, ctx.settings), None, None, None)


def _gradients(
    grads: list[Tensor | None], saved: tuple[Tensor, ...], settings: tuple[Any, ...]
) -> Iterator[list[Tensor | None]]:
    """Of the weights whose ŵ was used; the others have no gradient."""
    weights, log_scales = saved[: len(grads)], saved[len(grads) :]
    used = {i: grad.contiguous() for i, grad in enumerate(grads) if grad is not None}
    made = torch.ops.grace.fake_quant_many_backward(
        list(used.values()),
        [weights[i] for i in used],
        [log_scales[i] for i in used],
        *settings,
    )
    places = (dict(zip(used, of_used, strict=True)) for of_used in made)
    return ([by_place.get(i) for i in range(len(grads))] for by_place in places)


torch.library.register_autograd(
    "grace::fake_quant_many", _backward, setup_context=_save_for_backward
)


def _save_for_backward_to(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    *first, ctx.dtype = inputs
    _save_for_backward(ctx, tuple(first), output)


def _backward_to(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    return (*_backward(ctx, grads), None)


torch.library.register_autograd(
    "grace::fake_quant_many_to", _backward_to, setup_context=_save_for_backward_to
)
