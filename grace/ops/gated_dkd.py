"""Gated decoupled knowledge distillation of one token a row.

With target t, temperature T, p the probability of t and q the softmax over the other classes, both
of logits / T, and V the classes that student and teacher share:

    TCKD = KL([p, 1−p]_teacher ‖ [p, 1−p]_student)      NCKD = KL(q_teacher ‖ q_student)
    L = T²·(α·TCKD + β·NCKD)                            g = exp(−H / log V)
    ∂L/∂z = T·[α·(p_s − p_t)·(e_t − q_s) + β·(q_s − q_t)]

H is the entropy of the teacher's softmax at temperature 1, so g lies in [1/e, 1] and does not
depend on the student. log p and log(1−p) are log-sigmoids of u = z_t/T − logsumexp over the others:
1−p by subtraction would round away what a confident model gives to the others.

Which rows take part follows from their label alone, without a host synchronization:

    ignore_index            nothing: loss, gate, cross-entropy and gradient are 0
    0 ≤ label < V           everything
    V ≤ label < Vs          cross-entropy only (a class that the teacher lacks): loss and gate 0
    anything else           an error: loss and cross-entropy NaN, gate and gradient 0

Source: GRACE (arXiv 2601.22709), gated decoupled distillation.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
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

_INPUTS = "Tensor student, Tensor teacher, Tensor labels"
_SETTINGS = "float temperature, float alpha, float beta, int ignore_index"
_library.define(
    "gated_dkd",
    f"({_INPUTS}, {_SETTINGS}, bool in_place=False) "
    "-> (Tensor loss, Tensor gate, Tensor ce, Tensor saved)",
)
_library.define(
    "gated_dkd_backward",
    f"(Tensor grad_loss, Tensor grad_ce, {_INPUTS}, Tensor saved, {_SETTINGS}) -> Tensor",
)
# The gradient in the student's place, of whole rows or of the columns `first` and on of logits of
# `classes` classes, `shared` of them the teacher's too. The teacher's columns begin at `first` too.
_library.define(
    "gated_dkd_backward_",
    "(Tensor grad_loss, Tensor grad_ce, Tensor(a!) student, Tensor teacher, Tensor labels, "
    f"Tensor saved, {_SETTINGS}, int first, int classes, int shared) -> ()",
)

# Columns of `saved`: what the backward needs of a row beside the logits themselves.
LOG_REST_STUDENT = 0  # log-sum-exp of the student's non-target logits / T
LOG_REST_TEACHER = 1  # the same of the teacher
LOG_SUM_STUDENT = 2  # log-sum-exp of all the student's logits, at temperature 1
PROBABILITY_GAP = 3  # p_s − p_t
SAVED_COLUMNS = 4


def gated_dkd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 2.0,
    alpha: float = 1.0,
    beta: float = 4.0,
    ignore_index: int = -100,
    gate: bool = True,
    in_place: bool = False,
) -> Tensor:
    """Mean of the rows' L weighted by their gates, Σ g·L / Σ g; differentiable in the student.

    Args:
        student_logits: [n, Vs] float32, bfloat16 or float16 (float64 on a CPU).
        teacher_logits: [n, Vt], same dtype; no gradient flows to it. Vt may differ from Vs (padded
            vocabularies): distillation is over the first min(Vs, Vt) classes of both.
        labels: [n] int64, the target class of each row or ``ignore_index``.
        temperature: T > 0.
        alpha: weight of TCKD.
        beta: weight of NCKD.
        ignore_index: label of rows that take no part.
        gate: False weighs all rows that take part equally (g = 1).
        in_place: the backward puts the gradient where ``student_logits`` are, if they are
            contiguous, and so needs no memory: for logits that nothing else needs by then. Not
            while torch.compile traces. A second backward of such logits is an error.

    Returns:
        Scalar, float32 (float64 for float64 logits); exactly 0, with zero gradient, where no row
        takes part, NaN where a label is not a class of the student.

    Raises:
        ValueError: for any other shape, dtype, device or setting.
    """
    loss, gates, _ = gated_dkd_rows(
        student_logits,
        teacher_logits,
        labels,
        temperature=temperature,
        alpha=alpha,
        beta=beta,
        ignore_index=ignore_index,
        in_place=in_place,
    )
    return gated_mean(loss, gates, gate)


def gated_dkd_rows(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 2.0,
    alpha: float = 1.0,
    beta: float = 4.0,
    ignore_index: int = -100,
    in_place: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(L, g, cross-entropy) of each row, all [n]: what ``gated_dkd`` takes its mean of.

    Cross-entropy is over the student's whole vocabulary at temperature 1, and both it and L are
    differentiable in the student. Arguments and errors are those of ``gated_dkd``.
    """
    op = "gated_dkd"
    check_logits(op, student_logits, teacher_logits, labels)
    check_settings(op, temperature, alpha, beta)
    loss, gates, cross_entropy, _ = torch.ops.grace.gated_dkd(
        student_logits.contiguous(),
        teacher_logits.detach().contiguous(),
        labels.contiguous(),
        temperature,
        alpha,
        beta,
        ignore_index,
        in_place and not torch.compiler.is_compiling(),
    )
    return loss, gates, cross_entropy


def gated_mean(loss: Tensor, gates: Tensor, gate: bool = True) -> Tensor:
    """Σ g·L / Σ g, with g = 1 on every row that takes part if not ``gate``; 0 where none does."""
    weights = gates if gate else (gates > 0).to(gates.dtype)
    # A row that takes part has g ≥ 1/e, so the bound only ever replaces 0.
    return (weights * loss).sum() / weights.sum().clamp_min(torch.finfo(weights.dtype).tiny)


def check_settings(op: str, temperature: float, alpha: float, beta: float) -> None:
    """Raises ValueError, naming ``op``, unless T is positive and the weights are not negative."""
    positive = 0 < temperature < math.inf
    require(positive, op, "temperature", "be positive and finite", temperature)
    for name, weight in (("alpha", alpha), ("beta", beta)):
        require(0 <= weight < math.inf, op, name, "be finite and not negative", weight)


def check_logits(op: str, student: Tensor, teacher: Tensor, labels: Tensor) -> None:
    """Raises ValueError, naming ``op``, unless the tensors are what ``gated_dkd`` takes."""
    for name, logits in (("student_logits", student), ("teacher_logits", teacher)):
        require_dims(op, name, logits, 2)
        require_floating(op, name, logits)
        require(logits.shape[1] >= 2, op, name, "have at least 2 classes", logits.shape[1])
    check_labels(op, labels, "student_logits", student)
    for name, other in (("teacher_logits", teacher), ("labels", labels)):
        require_same_device(op, "student_logits", student, name, other)
    require_same_rows(op, "student_logits", student, "teacher_logits", teacher)
    require_same_dtype(op, "student_logits", student, "teacher_logits", teacher)


def check_labels(op: str, labels: Tensor, like: str, tensor: Tensor) -> None:
    """Raises ValueError unless ``labels`` is int64 [n], n the rows of ``tensor``."""
    require_dims(op, "labels", labels, 1)
    require(labels.dtype == torch.int64, op, "labels", "be int64", labels.dtype)
    require_same_rows(op, like, tensor, "labels", labels)


def _takes_part(labels: Tensor, classes: int, ignore_index: int) -> Tensor:
    return (labels != ignore_index) & (labels >= 0) & (labels < classes)


def _split_at_target(logits: Tensor, target: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """log-sum-exp of the non-target logits / T, and u, the target's logit / T less that."""
    scaled = logits / temperature
    rest = scaled.scatter(1, target, -math.inf).logsumexp(1)
    return rest, scaled.gather(1, target).squeeze(1) - rest


def _target_term(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """TCKD and p_s − p_t from both u."""
    tckd = teacher.sigmoid() * (F.logsigmoid(teacher) - F.logsigmoid(student))
    tckd += (-teacher).sigmoid() * (F.logsigmoid(-teacher) - F.logsigmoid(-student))
    # Where both p are near 1 their difference is that of the complements, which do not cancel.
    near_one = (student > 0) & (teacher > 0)
    complements = (-teacher).sigmoid() - (-student).sigmoid()
    return tckd, torch.where(near_one, complements, student.sigmoid() - teacher.sigmoid())


def _rest_term(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    """NCKD from both log-softmaxes over the non-targets; 0·log 0 = 0."""
    probability = teacher.exp().scatter(1, target, 0.0)
    return torch.where(probability > 0, probability * (teacher - student), 0.0).sum(1)


def _gate(teacher: Tensor) -> Tensor:
    log_probability = teacher.log_softmax(1)
    probability = log_probability.exp()
    entropy = -torch.where(probability > 0, probability * log_probability, 0.0).sum(1)
    return torch.exp(-entropy / math.log(teacher.shape[1]))


@_library.reference("gated_dkd")
def reference(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    temperature: float,
    alpha: float,
    beta: float,
    ignore_index: int,
    in_place: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The rows' L, g, cross-entropy and ``saved`` in plain PyTorch, in float32 (or float64)."""
    classes, shared = student.shape[1], min(student.shape[1], teacher.shape[1])
    student, teacher = (x.to(accumulate_dtype(x.dtype)) for x in (student, teacher))
    target = labels.clamp(0, shared - 1).unsqueeze(1)
    z, w = student[:, :shared], teacher[:, :shared]
    rest_s, u_s = _split_at_target(z, target, temperature)
    rest_t, u_t = _split_at_target(w, target, temperature)
    tckd, gap = _target_term(u_s, u_t)
    log_q_s, log_q_t = z / temperature - rest_s[:, None], w / temperature - rest_t[:, None]
    loss = temperature**2 * (alpha * tckd + beta * _rest_term(log_q_s, log_q_t, target))
    log_sum = student.logsumexp(1)
    own = student.gather(1, labels.clamp(0, classes - 1).unsqueeze(1)).squeeze(1)
    distilled = _takes_part(labels, shared, ignore_index)
    known = _takes_part(labels, classes, ignore_index)
    error = torch.where((labels != ignore_index) & ~known, math.nan, 0.0).to(student.dtype)
    saved = [torch.where(distilled, x, 0.0) for x in (rest_s, rest_t, gap)]
    saved.insert(LOG_SUM_STUDENT, torch.where(known, log_sum, 0.0))
    return (
        torch.where(distilled, loss, error),
        torch.where(distilled, _gate(w), 0.0),
        torch.where(known, log_sum - own, error),
        torch.stack(saved, dim=1),
    )


@_library.reference("gated_dkd_backward")
def reference_backward(
    grad_loss: Tensor,
    grad_ce: Tensor,
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    saved: Tensor,
    *settings: Any,
) -> Tensor:
    """Gradient of Σ grad_loss·L + Σ grad_ce·cross-entropy in the student's logits."""
    classes, shared = student.shape[1], min(student.shape[1], teacher.shape[1])
    inputs = (grad_loss, grad_ce, student, teacher, labels, saved)
    return _gradient(*inputs, *settings, first=0, classes=classes, shared=shared)


@_library.reference("gated_dkd_backward_")
def reference_backward_in_place(
    grad_loss: Tensor,
    grad_ce: Tensor,
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    saved: Tensor,
    *settings: Any,
) -> None:
    """The same in the student's place, of a slice of the columns (see the schema)."""
    *row_settings, first, classes, shared = settings
    inputs = (grad_loss, grad_ce, student, teacher, labels, saved)
    student.copy_(_gradient(*inputs, *row_settings, first=first, classes=classes, shared=shared))


def _gradient(
    grad_loss: Tensor,
    grad_ce: Tensor,
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    saved: Tensor,
    temperature: float,
    alpha: float,
    beta: float,
    ignore_index: int,
    *,
    first: int,
    classes: int,
    shared: int,
) -> Tensor:
    both = min(max(shared - first, 0), student.shape[1])  # of these columns, the teacher's too
    rest_s, rest_t, log_sum, gap = saved.unsqueeze(2).unbind(1)
    z, w = student.to(saved.dtype), teacher[:, :both].to(saved.dtype)
    known = _takes_part(labels, classes, ignore_index).unsqueeze(1)
    distilled = _takes_part(labels, shared, ignore_index).unsqueeze(1)
    target = torch.arange(first, first + student.shape[1], device=labels.device) == labels[:, None]
    scale = temperature * grad_loss.unsqueeze(1)
    q_s = (z[:, :both] / temperature - rest_s).exp()
    q_t = (w / temperature - rest_t).exp()
    rest = scale * (beta * (q_s - q_t) - alpha * gap * q_s)
    distillation = torch.where(target[:, :both], scale * alpha * gap, rest)
    weight = grad_ce.unsqueeze(1)
    grad = weight * (z - log_sum).exp()
    grad = torch.where(target, grad - weight, grad)
    grad[:, :both] += torch.where(distilled, distillation, 0.0)
    return torch.where(known, grad, 0.0).to(student.dtype)


@_library.fake("gated_dkd")
def _(
    student: Tensor, teacher: Tensor, labels: Tensor, *settings: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = student.new_empty(labels.shape, dtype=accumulate_dtype(student.dtype))
    saved = rows.new_empty((labels.shape[0], SAVED_COLUMNS))
    return rows, torch.empty_like(rows), torch.empty_like(rows), saved


@_library.fake("gated_dkd_backward")
def _(grad_loss: Tensor, grad_ce: Tensor, student: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(student)


@_library.fake("gated_dkd_backward_")
def _(*arguments: Any) -> None:
    return None


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    student, teacher, labels, *ctx.settings, ctx.in_place = inputs
    ctx.save_for_backward(student, teacher, labels, output[3])
    only_losses_train(ctx, output)


def only_losses_train(ctx: Any, output: tuple[Tensor, ...]) -> None:
    """Of (loss, gate, ce, saved) gate and saved get no gradient, not even a tensor of zeros; what
    only one of loss and ce gets is None for the other."""
    ctx.mark_non_differentiable(output[1], output[3])
    ctx.set_materialize_grads(False)


def row_gradients(
    grad_loss: Tensor | None, grad_ce: Tensor | None, saved: Tensor
) -> tuple[Tensor, Tensor]:
    """Both, [n] and contiguous as kernels read them, with zeros for one that is None."""
    given = (grad_loss, grad_ce)
    loss, ce = (saved.new_zeros(saved.shape[0]) if g is None else g.contiguous() for g in given)
    return loss, ce


def _backward(
    ctx: Any, grad_loss: Tensor | None, _gate: None, grad_ce: Tensor | None, _saved: None
) -> tuple[Tensor | None, ...]:
    student, *rest = ctx.saved_tensors  # once: a checkpointed layer gives them out a single time
    teacher, _, saved = rest
    grads = row_gradients(grad_loss, grad_ce, saved)
    if ctx.in_place:
        classes, shared = student.shape[1], min(student.shape[1], teacher.shape[1])
        grad = student.detach()
        inputs = (grad, *rest, *ctx.settings)
        torch.ops.grace.gated_dkd_backward_(*grads, *inputs, 0, classes, shared)
    else:
        grad = torch.ops.grace.gated_dkd_backward(*grads, student, *rest, *ctx.settings)
    return (grad, *(None,) * 7)


torch.library.register_autograd("grace::gated_dkd", _backward, setup_context=_save_for_backward)
