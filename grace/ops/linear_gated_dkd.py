"""Cross-entropy and gated DKD straight from hidden states; only some logits exist at a time.

    logits = hidden · headᵀ      cross_entropy = Σ −log softmax(student logits)_label / items
    gdkd = Σ g·L / Σ g           with L and g of ``gated_dkd`` on the same logits

The normalizers are taken outside the op, so autograd knows them. Three ways to the gradient:

    the head trains      The forward keeps four numbers a row (``saved`` of ``gated_dkd``) and the
                         backward makes the logits again, of all rows and a slice of the classes at
                         a time: so the gradient of a slice of the head is one matrix product, and
                         no sum of the head's size is kept in float32.
    the head is frozen   The forward has the logits at hand: it keeps the gradients of a row's L and
                         of its cross-entropy in its hidden state, two vectors a row, and the
                         backward only weighs them.
    logits kept          Asked for by ``keep_logits``: whole logits of both models wait for the
                         backward, which puts the gradient where the student's are. No product is
                         made twice, and memory grows with rows times classes.

Which rows are computed: labels on the host are read there, and only rows that count are computed.
Labels on a GPU cannot be read without waiting for it, so every row given is computed and those that
do not count add exactly nothing: give only the rows that count, or padding up to a fixed number.

Source: GRACE (arXiv 2601.22709), its two token losses; the chunks and slices are ours.
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
from grace.ops.gated_dkd import (
    SAVED_COLUMNS,
    check_labels,
    check_settings,
    gated_dkd_rows,
    gated_mean,
    only_losses_train,
    row_gradients,
)

_OP = "linear_gated_dkd"
# Student and teacher logits together; a gradient beside them adds half as much again.
CHUNK_BYTES = 384 * 2**20
_EVEN = 128  # rows of a chunk and classes of a slice come in multiples of it where they can

_INPUTS = (
    "Tensor student_hidden, Tensor student_head, Tensor teacher_hidden, Tensor teacher_head, "
    "Tensor labels"
)
_SETTINGS = "float temperature, float alpha, float beta, int ignore_index, int chunk_size"
_library.define(
    "linear_gated_dkd",
    f"({_INPUTS}, {_SETTINGS}, bool keep_gradients) "
    "-> (Tensor loss, Tensor gate, Tensor ce, Tensor saved)",
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
    keep_logits: bool = False,
) -> tuple[Tensor, Tensor]:
    """(cross_entropy, gdkd); differentiable in the student's hidden states and head.

    Args:
        student_hidden: [n, ds] float32, bfloat16 or float16 (float64 on a CPU).
        student_head: [Vs, ds], same dtype; may be frozen, tied to the embedding, or a DTensor (of
            FSDP2), which is gathered and whose gradient is the mean over its ranks.
        teacher_hidden: [n, dt], same dtype; no gradient flows to it or to the teacher's head.
        teacher_head: [Vt, dt], same dtype, or a DTensor. dt and Vt may differ from ds and Vs.
        labels: [n] int64, on the hidden states' device or on the host (see above).
        temperature: T > 0.
        alpha: weight of TCKD.
        beta: weight of NCKD.
        ignore_index: label of rows that take no part.
        chunk_size: as many logits as so many rows have exist at a time; None: 384 MiB of them.
        num_items: divisor of the cross-entropy sum, for means over several micro-batches or ranks;
            None divides by the number of rows that are not ignored. It does not touch gdkd.
        gate: False weighs all rows of gdkd equally (g = 1).
        keep_logits: keeps both models' logits of the rows computed from forward to backward, in 16
            bits 2·n·(Vs + min(Vs, Vt)) bytes: no product is made twice. Both losses then share one
            backward; a second one is an error. Where no gradient is needed, nothing is kept.

    Returns:
        Two scalars, float32 (float64 for float64 input); both exactly 0, with zero gradient, where
        every row is ignored, NaN where a label is not a class of the student.

    Raises:
        ValueError: for any other shape, dtype, device or setting.
    """
    student_head, teacher_head = whole_head(student_head), whole_head(teacher_head)
    tensors = (student_hidden, student_head, teacher_hidden.detach(), teacher_head.detach())
    _check_tensors(*tensors, labels)
    check_settings(_OP, temperature, alpha, beta)
    _check_chunk_size(chunk_size, keep_logits)
    if chunk_size is None:
        chunk_size = default_chunk_size(student_head, teacher_head)
    settings = (temperature, alpha, beta, ignore_index)
    trains = [tensor.requires_grad and torch.is_grad_enabled() for tensor in tensors[:2]]
    if keep_logits and any(trains):
        loss, gates, cross_entropy = _rows_of_kept_logits(*tensors, labels, *settings)
    else:
        keep_gradients = trains == [True, False]
        loss, gates, cross_entropy, _ = torch.ops.grace.linear_gated_dkd(
            *tensors, labels.contiguous(), *settings, chunk_size, keep_gradients
        )
    if num_items is None:
        num_items = (labels != ignore_index).sum().clamp_min(1)
    return cross_entropy.sum() / num_items, gated_mean(loss, gates, gate)


def _rows_of_kept_logits(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    labels: Tensor,
    temperature: float,
    alpha: float,
    beta: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(L, g, cross-entropy) of the rows to compute, whose logits autograd keeps."""
    inputs = (student_hidden, teacher_hidden, labels)
    student, teacher, labels = _rows_to_compute(*inputs, ignore_index)
    logits = _Logits.apply(student, student_head)
    with _no_autocast(student):
        teacher_logits = teacher @ teacher_head[: student_head.shape[0]].t()
    return gated_dkd_rows(
        logits,
        teacher_logits,
        labels,
        temperature=temperature,
        alpha=alpha,
        beta=beta,
        ignore_index=ignore_index,
        in_place=True,
    )


def _rows_to_compute(
    student: Tensor, teacher: Tensor, labels: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states and labels of the rows that count, or, where the host does not know them, of
    all, the student's zero where they do not: a row's gradient 0 is multiplied by them."""
    on_device = labels.to(student.device, non_blocking=True)
    if not torch.compiler.is_compiling():  # which cannot know a shape that values decide
        rows = _counting(labels, student, ignore_index)
        if isinstance(rows, Tensor):
            return student.index_select(0, rows), teacher.index_select(0, rows), on_device[rows]
    return torch.where((on_device != ignore_index)[:, None], student, 0.0), teacher, on_device


def default_chunk_size(student_head: Tensor, teacher_head: Tensor) -> int:
    """Rows whose logits of student and teacher together take at most 384 MiB, at least 1."""
    row = student_head.shape[0] + teacher_head.shape[0]
    return max(1, _even(CHUNK_BYTES // (row * student_head.element_size())))


def slice_width(classes: int, rows: int, chunk_size: int) -> int:
    """Classes of a slice: of all rows they are as many logits as ``chunk_size`` whole rows have."""
    most = chunk_size * classes // max(1, rows)
    return classes if most >= classes else _balanced(classes, max(1, _even(most)))


def _even(count: int) -> int:
    return count - count % _EVEN if count > _EVEN else count


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _balanced(total: int, most: int) -> int:
    """Size of the parts where ``total`` is shared by the fewest that are at most ``most`` large."""
    each = _ceil_div(total, max(1, _ceil_div(total, most)))
    return max(1, min(most, _ceil_div(each, _EVEN) * _EVEN))


def whole_head(head: Tensor) -> Tensor:
    """The head itself, or all of one that is sharded over ranks; as FSDP2 does, its gradient is the
    mean of what the ranks find, each in its own tokens."""
    sharded: Any = head
    if not hasattr(sharded, "full_tensor"):
        return head
    from torch.distributed.tensor import Partial

    return sharded.full_tensor(grad_placements=[Partial("avg")] * sharded.device_mesh.ndim)


def _check_tensors(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    labels: Tensor,
) -> None:
    _check_side("student", student_hidden, student_head, student_hidden)
    _check_side("teacher", teacher_hidden, teacher_head, student_hidden)
    check_labels(_OP, labels, "student_hidden", student_hidden)
    on_device = labels.device == student_hidden.device or labels.device.type == "cpu"
    allowed = f"be on {student_hidden.device} or on the host"
    require(on_device, _OP, "labels", allowed, labels.device)


def _check_side(side: str, hidden: Tensor, head: Tensor, student: Tensor) -> None:
    """Checks one model's hidden states and head, against each other and the student's."""
    for name, tensor in ((f"{side}_hidden", hidden), (f"{side}_head", head)):
        require_dims(_OP, name, tensor, 2)
        require_floating(_OP, name, tensor)
        require_same_dtype(_OP, "student_hidden", student, name, tensor)
        require_same_device(_OP, "student_hidden", student, name, tensor)
    require_same_rows(_OP, "student_hidden", student, f"{side}_hidden", hidden)
    features, classes = hidden.shape[1], head.shape[0]
    matches = head.shape[1] == features
    require(matches, _OP, f"{side}_head", f"have {features} features", head.shape[1])
    require(classes >= 2, _OP, f"{side}_head", "have at least 2 classes", classes)


def _check_chunk_size(chunk_size: int | None, keep_logits: bool) -> None:
    if chunk_size is not None:
        require(not keep_logits, _OP, "chunk_size", "be None with keep_logits", chunk_size)
        require(chunk_size >= 1, _OP, "chunk_size", "be at least 1", chunk_size)


def _counting(labels: Tensor, hidden: Tensor, ignore_index: int) -> Tensor | slice:
    """The rows to compute: those that count, where the host knows them, else all."""
    if labels.device.type != "cpu":
        return slice(None)
    counting = (labels != ignore_index).nonzero().squeeze(1)
    return counting.to(hidden.device, non_blocking=True)


def _chunks(labels: Tensor, hidden: Tensor, ignore_index: int, size: int) -> Iterator[Any]:
    """Indices of the rows to compute, at most ``size`` at a time."""
    rows = _counting(labels, hidden, ignore_index)
    if isinstance(rows, Tensor):
        yield from rows.split(_balanced(len(rows), size))
    else:
        size = _balanced(len(labels), size)
        yield from (slice(i, i + size) for i in range(0, len(labels), size))


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
    *row_settings, chunk_size, keep_gradients = settings
    outputs = _empty_outputs(student_hidden, keep_gradients)
    for output in outputs:
        output.zero_()
    device_labels = labels.to(student_hidden.device, non_blocking=True)
    heads = (student_head, teacher_head[: student_head.shape[0]])
    with _no_autocast(student_hidden):
        for rows in _chunks(labels, student_hidden, row_settings[-1], chunk_size):
            inputs = (student_hidden[rows], teacher_hidden[rows], device_labels[rows])
            parts = _chunk(*inputs, heads, row_settings, keep_gradients)
            for output, part in zip(outputs, parts, strict=True):
                output[rows] = part
    return outputs


def _chunk(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    heads: tuple[Tensor, Tensor],
    settings: list[Any],
    keep_gradients: bool,
) -> tuple[Tensor, ...]:
    """The outputs for some rows; their logits are gone when it returns."""
    inputs = (student @ heads[0].t(), teacher @ heads[1].t(), labels)
    *parts, saved = torch.ops.grace.gated_dkd(*inputs, *settings)
    if keep_gradients:
        saved = _row_gradients(inputs, saved, settings, heads[0])
    return (*parts, saved)


def _row_gradients(
    inputs: tuple[Tensor, ...], saved: Tensor, settings: list[Any], head: Tensor
) -> Tensor:
    """[rows, 2, ds]: gradients of L and of the cross-entropy of each row in its hidden state.

    Uses up the student's logits, ``inputs[0]``.
    """
    student, teacher = inputs[:2]
    kept = saved.new_empty(student.shape[0], 2, head.shape[1])
    one, zero = saved.new_ones(student.shape[0]), saved.new_zeros(student.shape[0])
    of_loss = torch.ops.grace.gated_dkd_backward(one, zero, *inputs, saved, *settings)
    kept[:, 0] = _product(of_loss, head, saved.dtype)
    del of_loss
    whole = (0, student.shape[1], teacher.shape[1])
    torch.ops.grace.gated_dkd_backward_(zero, one, *inputs, saved, *settings, *whole)
    kept[:, 1] = _product(student, head, saved.dtype)
    return kept


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
    *row_settings, chunk_size, hidden_needs_grad, head_needs_grad = settings
    index = _counting(labels, student_hidden, row_settings[-1])
    labels = labels.to(student_hidden.device, non_blocking=True)[index]
    # A row that does not count has gradient 0, which its hidden state is multiplied by.
    counts = (labels != row_settings[-1]).unsqueeze(1)
    hidden = torch.where(counts, student_hidden[index], 0.0)
    grads = (grad_loss[index], grad_ce[index])
    rows = (hidden, teacher_hidden[index], labels, saved[index])
    total = saved.new_zeros(hidden.shape if hidden_needs_grad else 0)
    grad_head = student_head.new_empty(student_head.shape if head_needs_grad else 0)
    width = slice_width(student_head.shape[0], hidden.shape[0], chunk_size)
    with _no_autocast(student_hidden):
        for first in range(0, student_head.shape[0], width):
            part = slice(first, first + width)
            grad_logits = _slice(part, rows, (student_head, teacher_head), grads, row_settings)
            if hidden_needs_grad:
                total += _product(grad_logits, student_head[part], total.dtype)
            if head_needs_grad:
                _product(grad_logits.t(), hidden, grad_head.dtype, out=grad_head[part])
            del grad_logits  # before the next slice's logits
    grad_hidden = student_hidden.new_zeros(student_hidden.shape if hidden_needs_grad else 0)
    if hidden_needs_grad:
        grad_hidden[index] = total.to(grad_hidden.dtype)
    return grad_hidden, grad_head


def _slice(
    part: slice,
    rows: tuple[Tensor, Tensor, Tensor, Tensor],
    heads: tuple[Tensor, Tensor],
    grads: tuple[Tensor, Tensor],
    settings: list[Any],
) -> Tensor:
    """Gradient in the student's logits of all rows, at a part of the classes."""
    hidden, teacher_hidden, *rest = rows
    logits, teacher = hidden @ heads[0][part].t(), teacher_hidden @ heads[1][part].t()
    place = (part.start, len(heads[0]), min(len(heads[0]), len(heads[1])))
    torch.ops.grace.gated_dkd_backward_(*grads, logits, teacher, *rest, *settings, *place)
    return logits


def _product(a: Tensor, b: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """a · b, summed in float32 at least and rounded once to ``dtype``; to ``out`` if given."""
    if a.dtype == dtype and (a.is_cuda or dtype.itemsize >= 4):
        return torch.mm(a, b, out=out)
    wide = torch.mm(a, b, out_dtype=dtype) if a.is_cuda else a.float() @ b.float()
    product = wide.to(dtype)
    return product if out is None else out.copy_(product)


class _Logits(torch.autograd.Function):
    """hidden · headᵀ; the products of its gradients are without autocast too."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, head)
        with _no_autocast(hidden):
            return hidden @ head.t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        hidden, head = ctx.saved_tensors
        for_hidden, for_head = ctx.needs_input_grad
        with _no_autocast(grad):
            return (
                _product(grad, head, grad.dtype) if for_hidden else None,
                _product(grad.t(), hidden, grad.dtype) if for_head else None,
            )


def _empty_outputs(hidden: Tensor, keep_gradients: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = hidden.new_empty(hidden.shape[0], dtype=accumulate_dtype(hidden.dtype))
    kept = (2, hidden.shape[1]) if keep_gradients else (SAVED_COLUMNS,)
    saved = rows.new_empty((hidden.shape[0], *kept))
    return rows, torch.empty_like(rows), torch.empty_like(rows), saved


@_library.fake("linear_gated_dkd")
def _(student_hidden: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empty_outputs(student_hidden, rest[-1])


@_library.fake("linear_gated_dkd_backward")
def _(
    grad_loss: Tensor, grad_ce: Tensor, student_hidden: Tensor, student_head: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    *_, hidden_needs_grad, head_needs_grad = rest
    needed = ((student_hidden, hidden_needs_grad), (student_head, head_needs_grad))
    grads = [x.new_empty(x.shape if needs else 0) for x, needs in needed]
    return grads[0], grads[1]


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, ctx.settings, ctx.keep_gradients = inputs[:5], inputs[5:-1], inputs[-1]
    ctx.dtype = tensors[0].dtype
    ctx.save_for_backward(*(() if ctx.keep_gradients else tensors), output[3])
    only_losses_train(ctx, output)


def _backward(
    ctx: Any, grad_loss: Tensor | None, _gate: None, grad_ce: Tensor | None, _saved: None
) -> tuple[Tensor | None, ...]:
    *tensors, saved = ctx.saved_tensors  # once: a checkpointed layer gives them out a single time
    if ctx.keep_gradients:
        grad = _weighed(saved, grad_loss, grad_ce)
        return (None if grad is None else grad.to(ctx.dtype), *(None,) * 11)
    needs = ctx.needs_input_grad[:2]
    grads = torch.ops.grace.linear_gated_dkd_backward(
        *row_gradients(grad_loss, grad_ce, saved),
        *tensors,
        saved,
        *ctx.settings,
        *needs,
    )
    found = (grad if needed else None for grad, needed in zip(grads, needs, strict=True))
    return (*found, *(None,) * 10)


def _weighed(kept: Tensor, grad_loss: Tensor | None, grad_ce: Tensor | None) -> Tensor | None:
    """The two vectors of each row, weighed by its gradients; None where it has none."""
    total = None if grad_ce is None else grad_ce[:, None] * kept[:, 1]
    if grad_loss is None:
        return total
    if total is None:
        return grad_loss[:, None] * kept[:, 0]
    return torch.addcmul(total, grad_loss[:, None], kept[:, 0])


torch.library.register_autograd(
    "grace::linear_gated_dkd", _backward, setup_context=_save_for_backward
)
