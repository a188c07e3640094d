"""Cross-entropy and gated DKD straight from hidden states, the logits a chunk of rows at a time.

    logits = hidden · headᵀ      cross_entropy = Σ −log softmax(student logits)_label / items
    gdkd = Σ g·L / Σ g           with L and g of ``gated_dkd`` on the same logits

Forward and backward both compute the logits of ``chunk_size`` rows of student and teacher, use
them and forget them; between the two passes four numbers a row are kept (``saved`` of
``gated_dkd``). The normalizers are taken outside the op, so autograd knows them.

Which rows are computed: labels on the host are read there, and only rows that count are computed.
Labels on a GPU cannot be read without waiting for it, so every row given is computed and those that
do not count add exactly nothing: give only the rows that count, or padding up to a fixed number.

Source: GRACE (arXiv 2601.22709), its two token losses; the chunking over rows is ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from grace import _library
from grace.ops._checks import (
    accumulate_dtype,
    require,
    require_dims,
    require_floating,
    require_same_device,
    require_same_dtype,
    require_same_rows,
)
from grace.ops.gated_dkd import SAVED_COLUMNS, check_labels, check_settings, gated_mean

# Student and teacher logits of one chunk together; their gradient adds half as much again.
_CHUNK_BYTES = 512 * 2**20

_INPUTS = (
    "Tensor student_hidden, Tensor student_head, Tensor teacher_hidden, Tensor teacher_head, "
    "Tensor labels"
)
_SETTINGS = "float temperature, float alpha, float beta, int ignore_index, int chunk_size"
_library.define(
    "linear_gated_dkd",
    f"({_INPUTS}, {_SETTINGS}) -> (Tensor loss, Tensor gate, Tensor ce, Tensor saved)",
    composed=True,
)
_library.define(
    "linear_gated_dkd_backward",
    f"(Tensor grad_loss, Tensor grad_ce, {_INPUTS}, Tensor saved, {_SETTINGS}, "
    "bool hidden_needs_grad, bool head_needs_grad) -> (Tensor, Tensor)",
    composed=True,
)


def linear_gated_dkd(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    labels: Tensor,
    *,
    temperature: float = 2.0,
    alpha: float = 1.0,
    beta: float = 4.0,
    ignore_index: int = -100,
    chunk_size: int | None = None,
    num_items: int | Tensor | None = None,
    gate: bool = True,
) -> tuple[Tensor, Tensor]:
    """(cross_entropy, gdkd); differentiable in the student's hidden states and head.

    Args:
        student_hidden: [n, ds] float32, bfloat16 or float16 (float64 on a CPU).
        student_head: [Vs, ds], same dtype; may be frozen, or tied to the embedding.
        teacher_hidden: [n, dt], same dtype; no gradient flows to it or to the teacher's head.
        teacher_head: [Vt, dt], same dtype. dt and Vt may differ from ds and Vs.
        labels: [n] int64, on the hidden states' device or on the host (see above).
        temperature: T > 0.
        alpha: weight of TCKD.
        beta: weight of NCKD.
        ignore_index: label of rows that take no part.
        chunk_size: rows whose logits exist at a time; None keeps them within 512 MiB.
        num_items: divisor of the cross-entropy sum, for means over several micro-batches or ranks;
            None divides by the number of rows that are not ignored. It does not touch gdkd.
        gate: False weighs all rows of gdkd equally (g = 1).

    Returns:
        Two scalars, float32 (float64 for float64 input); both exactly 0, with zero gradient, where
        every row is ignored, NaN where a label is not a class of the student.

    Raises:
        ValueError: for any other shape, dtype, device or setting.
    """
    op = "linear_gated_dkd"
    _check_side(op, "student", student_hidden, student_head, student_hidden)
    _check_side(op, "teacher", teacher_hidden, teacher_head, student_hidden)
    check_labels(op, labels, "student_hidden", student_hidden)
    on_device = labels.device == student_hidden.device or labels.device.type == "cpu"
    allowed = f"be on {student_hidden.device} or on the host"
    require(on_device, op, "labels", allowed, labels.device)
    check_settings(op, temperature, alpha, beta)
    if chunk_size is None:
        chunk_size = default_chunk_size(student_head, teacher_head)
    require(chunk_size >= 1, op, "chunk_size", "be at least 1", chunk_size)
    loss, gates, cross_entropy, _ = torch.ops.grace.linear_gated_dkd(
        student_hidden,
        student_head,
        teacher_hidden.detach(),
        teacher_head.detach(),
        labels.contiguous(),
        temperature,
        alpha,
        beta,
        ignore_index,
        chunk_size,
    )
    if num_items is None:
        num_items = (labels != ignore_index).sum().clamp_min(1)
    return cross_entropy.sum() / num_items, gated_mean(loss, gates.detach(), gate)


def default_chunk_size(student_head: Tensor, teacher_head: Tensor) -> int:
    """Rows whose logits of student and teacher together take at most 512 MiB, at least 1."""
    row = student_head.shape[0] + teacher_head.shape[0]
    return max(1, _CHUNK_BYTES // (row * student_head.element_size()))


def _check_side(op: str, side: str, hidden: Tensor, head: Tensor, student: Tensor) -> None:
    """Checks one model's hidden states and head, against each other and the student's."""
    for name, tensor in ((f"{side}_hidden", hidden), (f"{side}_head", head)):
        require_dims(op, name, tensor, 2)
        require_floating(op, name, tensor)
        require_same_dtype(op, "student_hidden", student, name, tensor)
        require_same_device(op, "student_hidden", student, name, tensor)
    require_same_rows(op, "student_hidden", student, f"{side}_hidden", hidden)
    features, classes = hidden.shape[1], head.shape[0]
    matches = head.shape[1] == features
    require(matches, op, f"{side}_head", f"have {features} features", head.shape[1])
    require(classes >= 2, op, f"{side}_head", "have at least 2 classes", classes)


def _chunks(labels: Tensor, hidden: Tensor, ignore_index: int, size: int) -> Iterator[Any]:
    """Indices of ``size`` rows at a time: of those that count, where the host knows them."""
    if labels.device.type == "cpu":
        counting = (labels != ignore_index).nonzero().squeeze(1)
        yield from counting.to(hidden.device, non_blocking=True).split(size)
    else:
        yield from (slice(i, i + size) for i in range(0, labels.shape[0], size))


def _no_autocast(tensor: Tensor) -> torch.autocast:
    """The same arithmetic in forward and backward, which runs outside autocast."""
    return torch.autocast(tensor.device.type, enabled=False)


@_library.reference("linear_gated_dkd")
def reference(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    labels: Tensor,
    *settings: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The rows' L, g, cross-entropy and ``saved``; ``gated_dkd`` of the device does each chunk."""
    *row_settings, ignore_index, chunk_size = settings
    outputs = _empty_outputs(student_hidden)
    for output in outputs:
        output.zero_()
    device_labels = labels.to(student_hidden.device, non_blocking=True)
    with _no_autocast(student_hidden):
        for rows in _chunks(labels, student_hidden, ignore_index, chunk_size):
            parts = torch.ops.grace.gated_dkd(
                student_hidden[rows] @ student_head.t(),
                teacher_hidden[rows] @ teacher_head.t(),
                device_labels[rows],
                *row_settings,
                ignore_index,
            )
            for output, part in zip(outputs, parts, strict=True):
                output[rows] = part
    return outputs


@_library.reference("linear_gated_dkd_backward")
def reference_backward(
    grad_loss: Tensor,
    grad_ce: Tensor,
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    labels: Tensor,
    saved: Tensor,
    *settings: Any,
) -> tuple[Tensor, Tensor]:
    """Gradients in student hidden states and head; an empty tensor for one that needs none."""
    *row_settings, ignore_index, chunk_size, hidden_needs_grad, head_needs_grad = settings
    grad_hidden = torch.zeros_like(student_hidden) if hidden_needs_grad else saved.new_empty(0)
    grad_head = torch.zeros_like(student_head, dtype=saved.dtype) if head_needs_grad else None
    device_labels = labels.to(student_hidden.device, non_blocking=True)
    with _no_autocast(student_hidden):
        for rows in _chunks(labels, student_hidden, ignore_index, chunk_size):
            hidden = student_hidden[rows]
            grad_logits = torch.ops.grace.gated_dkd_backward(
                grad_loss[rows],
                grad_ce[rows],
                hidden @ student_head.t(),
                teacher_hidden[rows] @ teacher_head.t(),
                device_labels[rows],
                saved[rows],
                *row_settings,
                ignore_index,
            )
            if hidden_needs_grad:
                grad_hidden[rows] = grad_logits @ student_head
            if grad_head is not None:
                _add_product(grad_head, grad_logits.t(), hidden)
    empty = saved.new_empty(0, dtype=student_head.dtype)
    return grad_hidden, empty if grad_head is None else grad_head.to(student_head.dtype)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a · b, summed in total's dtype whatever the factors' dtype."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        total += torch.mm(a, b, out_dtype=total.dtype)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def _empty_outputs(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = hidden.new_empty(hidden.shape[0], dtype=accumulate_dtype(hidden.dtype))
    saved = rows.new_empty((hidden.shape[0], SAVED_COLUMNS))
    return rows, torch.empty_like(rows), torch.empty_like(rows), saved


@_library.fake("linear_gated_dkd")
def _(student_hidden: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empty_outputs(student_hidden)


@_library.fake("linear_gated_dkd_backward")
def _(
    grad_loss: Tensor, grad_ce: Tensor, student_hidden: Tensor, student_head: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    *_, hidden_needs_grad, head_needs_grad = rest
    needed = ((student_hidden, hidden_needs_grad), (student_head, head_needs_grad))
    grads = [torch.empty_like(x) if needs else x.new_empty(0) for x, needs in needed]
    return grads[0], grads[1]


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, ctx.settings = inputs[:5], inputs[5:]
    ctx.save_for_backward(*tensors, output[3])


def _backward(
    ctx: Any, grad_loss: Tensor, _gate: Tensor, grad_ce: Tensor, _saved: Tensor
) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad[:2]
    # The gradient of a sum is one number, expanded; kernels read rows one after another.
    grads = torch.ops.grace.linear_gated_dkd_backward(
        grad_loss.contiguous(), grad_ce.contiguous(), *ctx.saved_tensors, *ctx.settings, *needs
    )
    found = (grad if needed else None for grad, needed in zip(grads, needs, strict=True))
    return (*found, *(None,) * 8)


torch.library.register_autograd(
    "grace::linear_gated_dkd", _backward, setup_context=_save_for_backward
)
