"""Centered kernel alignment of two sets of rows, image by image.

Of an image's n rows, S̃ and T̃ are the student's and the teacher's, L2-normalized, then centered by
column. HSIC of centered linear Grams is a squared Frobenius norm of products of these rows:

    a = ‖S̃ᵀT̃‖² = ⟨S̃S̃ᵀ, T̃T̃ᵀ⟩    b = ‖S̃ᵀS̃‖² = ‖S̃S̃ᵀ‖²    c = ‖T̃ᵀT̃‖² = ‖T̃T̃ᵀ‖²
    CKA = a / √(b·c)              ∂CKA/∂S̃ = 2/√(b·c) · (T̃T̃ᵀ − (a/b)·S̃S̃ᵀ)·S̃

That gradient passes the centering unchanged (its columns sum to 0) and then the normalization:
∂x = (ĝ − x̂·⟨x̂, ĝ⟩)/‖x‖. A row of zeros stays zero and gets no gradient.

An image counts if it has at least ``min_tokens`` rows and both Grams' norms, √b and √c, exceed
1e-10·n: rows that differ by less than about 1e-5 of their length are equal up to rounding. One that
does not count has value exactly 1 and no gradient.

Source: GRACE (arXiv 2601.22709), relational CKA; linear CKA is arXiv 1905.00414.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
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

_DEGENERATE = 1e-10  # of a Gram's norm, a row

_INPUTS = "Tensor student, Tensor teacher, Tensor cu_seqlens"
_library.define("cka", f"({_INPUTS}, int min_tokens) -> (Tensor value, Tensor saved)")
_library.define("cka_backward", f"(Tensor grad, {_INPUTS}, Tensor saved) -> Tensor")

# Columns of `saved`, one row an image: the three HSIC values, and 1 where the image counts.
HSIC_BOTH = 0
HSIC_STUDENT = 1
HSIC_TEACHER = 2
COUNTED = 3
SAVED_COLUMNS = 4


def cka(student: Tensor, teacher: Tensor, cu_seqlens: Tensor, *, min_tokens: int = 4) -> Tensor:
    """CKA of each image's rows, [B]; differentiable in the student.

    Args:
        student: [T, ds] float32, bfloat16 or float16 (float64 on a CPU), images one after another.
        teacher: [T, dt], same dtype; dt may differ from ds, and no gradient flows to it.
        cu_seqlens: [B + 1] int32: image i is rows cu_seqlens[i] to cu_seqlens[i + 1]. It must not
            decrease and lie in 0..T, which only the host checks. Rows outside get no gradient.
        min_tokens: images with fewer rows do not count.

    Returns:
        [B] float32 (float64 for float64 input); exactly 1, and no gradient, for an image that does
        not count.

    Raises:
        ValueError: for any other shape, dtype, device or setting.
    """
    return cka_and_counted(student, teacher, cu_seqlens, min_tokens=min_tokens)[0]


def cka_and_counted(
    student: Tensor, teacher: Tensor, cu_seqlens: Tensor, *, min_tokens: int = 4
) -> tuple[Tensor, Tensor]:
    """``cka`` and, beside it, which images count, [B] bool. Arguments and errors as there."""
    op = "cka"
    for name, hidden in (("student", student), ("teacher", teacher)):
        require_dims(op, name, hidden, 2)
        require_floating(op, name, hidden)
    require_same_dtype(op, "student", student, "teacher", teacher)
    require_same_rows(op, "student", student, "teacher", teacher)
    require_dims(op, "cu_seqlens", cu_seqlens, 1)
    require(cu_seqlens.dtype == torch.int32, op, "cu_seqlens", "be int32", cu_seqlens.dtype)
    bounds = cu_seqlens.shape[0]
    require(bounds >= 1, op, "cu_seqlens", "have at least 1 element", bounds)
    require_same_device(op, "student", student, "teacher", teacher)
    require_same_device(op, "student", student, "cu_seqlens", cu_seqlens)
    require(min_tokens >= 1, op, "min_tokens", "be at least 1", min_tokens)
    value, saved = torch.ops.grace.cka(
        student.contiguous(), teacher.detach().contiguous(), cu_seqlens.contiguous(), min_tokens
    )
    return value, saved.detach()[:, COUNTED] > 0


def _images(cu_seqlens: Tensor, rows: int) -> Iterator[tuple[int, slice]]:
    """Index and rows of each image; ValueError unless the bounds are within 0..rows, in order."""
    bounds = cu_seqlens.tolist()
    ordered = all(a <= b for a, b in pairwise([0, *bounds, rows]))
    require(ordered, "cka", "cu_seqlens", f"not decrease and lie in 0..{rows}", bounds)
    for image, (start, end) in enumerate(pairwise(bounds)):
        yield image, slice(start, end)


def _unit_rows(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows of length 1 (or 0) in ``dtype``, and the inverse of each norm (0 for a row of zeros)."""
    rows = rows.to(dtype)
    norm = rows.norm(dim=1, keepdim=True)
    inverse = torch.where(norm > 0, 1 / norm, 0.0)
    return rows * inverse, inverse


def _centered(rows: Tensor, dtype: torch.dtype) -> Tensor:
    unit, _ = _unit_rows(rows, dtype)
    return unit - unit.mean(0)


def _hsic(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(a, b, c) through the n×n Grams or the d×d products, whichever are smaller."""
    if s.shape[0] < min(s.shape[1], t.shape[1]):
        student_gram, teacher_gram = s @ s.t(), t @ t.t()
        products = (student_gram * teacher_gram, student_gram.square(), teacher_gram.square())
    else:
        products = ((s.t() @ t).square(), (s.t() @ s).square(), (t.t() @ t).square())
    a, b, c = (product.sum() for product in products)
    return a, b, c


def _direction(s: Tensor, t: Tensor, ratio: Tensor) -> Tensor:
    """(T̃T̃ᵀ − ratio·S̃S̃ᵀ)·S̃, multiplied in the cheaper order."""
    if s.shape[0] < min(s.shape[1], t.shape[1]):
        return (t @ t.t() - ratio * (s @ s.t())) @ s
    return t @ (t.t() @ s) - ratio * (s @ (s.t() @ s))


@_library.reference("cka")
def reference(
    student: Tensor, teacher: Tensor, cu_seqlens: Tensor, min_tokens: int
) -> tuple[Tensor, Tensor]:
    """CKA and ``saved`` in plain PyTorch, an image at a time, in float32 (or float64)."""
    dtype = accumulate_dtype(student.dtype)
    images = cu_seqlens.shape[0] - 1
    value = torch.ones(images, dtype=dtype, device=student.device)
    saved = value.new_zeros(images, SAVED_COLUMNS)
    with torch.autocast(student.device.type, enabled=False):
        for image, rows in _images(cu_seqlens, student.shape[0]):
            n = rows.stop - rows.start
            if n < min_tokens:
                continue
            a, b, c = _hsic(_centered(student[rows], dtype), _centered(teacher[rows], dtype))
            # NaN counts, so that it is seen.
            degenerate = (b.sqrt() <= _DEGENERATE * n) | (c.sqrt() <= _DEGENERATE * n)
            value[image] = torch.where(degenerate, 1.0, a / (b.sqrt() * c.sqrt()))
            saved[image] = torch.stack((a, b, c, (~degenerate).to(dtype)))
    return value, saved


@_library.reference("cka_backward")
def reference_backward(
    grad: Tensor, student: Tensor, teacher: Tensor, cu_seqlens: Tensor, saved: Tensor
) -> Tensor:
    """Gradient of Σ grad·CKA in the student's rows."""
    out = torch.zeros_like(student)
    with torch.autocast(student.device.type, enabled=False):
        for image, rows in _images(cu_seqlens, student.shape[0]):
            a, b, c, counted = saved[image]
            if not counted:
                continue
            unit, inverse = _unit_rows(student[rows], saved.dtype)
            t = _centered(teacher[rows], saved.dtype)
            direction = _direction(unit - unit.mean(0), t, a / b)
            direction = direction * (2 * grad[image] / (b.sqrt() * c.sqrt()))
            along = (unit * direction).sum(1, keepdim=True)
            out[rows] = ((direction - unit * along) * inverse).to(out.dtype)
    return out


@_library.fake("cka")
def _(
    student: Tensor, teacher: Tensor, cu_seqlens: Tensor, min_tokens: int
) -> tuple[Tensor, Tensor]:
    images = cu_seqlens.shape[0] - 1
    value = student.new_empty(images, dtype=accumulate_dtype(student.dtype))
    return value, value.new_empty((images, SAVED_COLUMNS))


@_library.fake("cka_backward")
def _(grad: Tensor, student: Tensor, teacher: Tensor, cu_seqlens: Tensor, saved: Tensor) -> Tensor:
    return torch.empty_like(student)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    student, teacher, cu_seqlens, _ = inputs
    ctx.save_for_backward(student, teacher, cu_seqlens, output[1])


def _backward(ctx: Any, grad: Tensor, _saved: Tensor) -> tuple[Tensor | None, ...]:
    grad_student = torch.ops.grace.cka_backward(grad.contiguous(), *ctx.saved_tensors)
    return grad_student, None, None, None


torch.library.register_autograd("grace::cka", _backward, setup_context=_save_for_backward)
