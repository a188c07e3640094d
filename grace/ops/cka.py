"""Centered kernel alignment of two sets of rows, image by image.

Of an image's n rows, S̃ and T̃ are the student's and the teacher's, L2-normalized, then centered by
column. HSIC of centered linear Grams is a squared Frobenius norm of products of these rows:

    a = ‖S̃ᵀT̃‖² = ⟨S̃S̃ᵀ, T̃T̃ᵀ⟩    b = ‖S̃ᵀS̃‖² = ‖S̃S̃ᵀ‖²    c = ‖T̃ᵀT̃‖² = ‖T̃T̃ᵀ‖²
    CKA = a / √(b·c)              ∂CKA/∂S̃ = 2/√(b·c) · (T̃T̃ᵀ − (a/b)·S̃S̃ᵀ)·S̃

Forward keeps the centered rows for backward, in float16 for 16-bit inputs: the rounding comes after
the centering, so it is relative to what is left of a row, however large the rows' common mean.

The gradient passes the centering unchanged (its columns sum to 0), then the normalization:
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

_DEGENERATE = 1e-10  # of a Gram's norm, a row

_OUTPUTS = "Tensor saved, Tensor stats, Tensor means, Tensor student_rows, Tensor teacher_rows"
_library.define(
    "cka",
    "(Tensor student, Tensor teacher, Tensor cu_seqlens, int min_tokens)"
    f" -> (Tensor value, {_OUTPUTS})",
)
_library.define(
    "cka_backward",
    f"(Tensor grad, Tensor student, Tensor cu_seqlens, {_OUTPUTS}, int teacher_width) -> Tensor",
)

# Columns of `saved`, one row an image: the three HSIC values, and 1 where the image counts.
HSIC_BOTH = 0
HSIC_STUDENT = 1
HSIC_TEACHER = 2
COUNTED = 3
SAVED_COLUMNS = 4

# Rows of `stats`, a column a token: 1/norm of the student's row, and ⟨mean, centered row⟩ of it.
INVERSE_NORM = 0
ALONG_MEAN = 1


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
    return _run(student, teacher, cu_seqlens, min_tokens)[0]


def cka_and_counted(
    student: Tensor, teacher: Tensor, cu_seqlens: Tensor, *, min_tokens: int = 4
) -> tuple[Tensor, Tensor]:
    """``cka`` and, beside it, which images count, [B] bool. Arguments and errors as there."""
    value, saved = _run(student, teacher, cu_seqlens, min_tokens)
    return value, saved.detach()[:, COUNTED] > 0


def _run(
    student: Tensor, teacher: Tensor, cu_seqlens: Tensor, min_tokens: int
) -> tuple[Tensor, Tensor]:
    """Checks; value and ``saved``."""
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
    value, saved, *_ = torch.ops.grace.cka(
        student.contiguous(), teacher.detach().contiguous(), cu_seqlens.contiguous(), min_tokens
    )
    return value, saved


def _images(cu_seqlens: Tensor, rows: int) -> Iterator[tuple[int, slice]]:
    """Index and rows of each image; ValueError unless the bounds are within 0..rows, in order."""
    bounds = cu_seqlens.tolist()
    ordered = all(a <= b for a, b in pairwise([0, *bounds, rows]))
    require(ordered, "cka", "cu_seqlens", f"not decrease and lie in 0..{rows}", bounds)
    for image, (start, end) in enumerate(pairwise(bounds)):
        yield image, slice(start, end)


def kept_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the centered rows that forward keeps: float16 for 16-bit inputs."""
    return torch.float16 if dtype.itemsize == 2 else dtype


def row_scale(width: int) -> float:
    """What kept rows are multiplied by, 2^⌊log2 √width⌋: their elements are near 1."""
    return 2.0 ** ((width.bit_length() - 1) // 2)


def _pitch(width: int) -> int:
    """Columns of kept rows: zeros up to a multiple of 8."""
    return (width + 7) // 8 * 8


def _keep(rows: Tensor, like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One image's rows of length 1, centered, scaled and rounded as they are kept; the inverse of
    each row's norm (0 for a row of zeros); ⟨mean, centered row⟩; and the mean, as wide as kept."""
    rows = rows.to(accumulate_dtype(rows.dtype))
    norm = rows.norm(dim=1)
    inverse = torch.where(norm > 0, 1 / norm, 0.0)
    unit = rows * inverse[:, None]
    mean = unit.mean(0)
    centered = unit - mean
    scaled = (centered * row_scale(rows.shape[1])).to(like.dtype)
    padding = (0, like.shape[1] - rows.shape[1])
    return F.pad(scaled, padding), inverse, centered @ mean, F.pad(mean, padding)


def _centered(kept: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """The centered rows of length 1, as they were kept."""
    return kept[:, :width].to(dtype) / row_scale(width)


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


def _outputs(student: Tensor, teacher: Tensor, images: int) -> tuple[Tensor, ...]:
    """Empty tensors for what ``cka`` returns."""
    dtype, tokens = accumulate_dtype(student.dtype), student.shape[0]
    value = student.new_empty(images, dtype=dtype)
    kept = (
        x.new_empty((tokens, _pitch(x.shape[1])), dtype=kept_dtype(x.dtype))
        for x in (student, teacher)
    )
    stats = student.new_empty((2, tokens), dtype=dtype)
    means = student.new_empty((images, _pitch(student.shape[1])), dtype=dtype)
    return value, value.new_empty((images, SAVED_COLUMNS)), stats, means, *kept


@_library.reference("cka")
def reference(
    student: Tensor, teacher: Tensor, cu_seqlens: Tensor, min_tokens: int
) -> tuple[Tensor, ...]:
    """CKA in plain PyTorch, an image at a time, in float32 (or float64) of the rows as kept.

    Returns:
        value [B]; saved [B, 4]; stats [2, T]; means of the student's unit rows [B, ds up to a
        multiple of 8]; the centered rows of student and teacher, as wide, times ``row_scale``, in
        float16 for 16-bit inputs. Rows in no image are 0 here and undefined
        where kernels run.
    """
    outputs = _outputs(student, teacher, cu_seqlens.shape[0] - 1)
    value, saved, stats, means, *kept = outputs
    for output in outputs:
        output.zero_()
    value.fill_(1)
    with torch.autocast(student.device.type, enabled=False):
        for image, rows in _images(cu_seqlens, student.shape[0]):
            n = rows.stop - rows.start
            if n == 0:
                continue
            kept[0][rows], *own, means[image] = _keep(student[rows], kept[0])
            kept[1][rows] = _keep(teacher[rows], kept[1])[0]
            stats[:, rows] = torch.stack(own)
            if n < min_tokens:
                continue
            a, b, c = _hsic(
                _centered(kept[0][rows], student.shape[1], value.dtype),
                _centered(kept[1][rows], teacher.shape[1], value.dtype),
            )
            # NaN counts, so that it is seen.
            degenerate = (b.sqrt() <= _DEGENERATE * n) | (c.sqrt() <= _DEGENERATE * n)
            value[image] = torch.where(degenerate, 1.0, a / (b.sqrt() * c.sqrt()))
            saved[image] = torch.stack((a, b, c, (~degenerate).to(value.dtype)))
    return outputs


@_library.reference("cka_backward")
def reference_backward(
    grad: Tensor,
    student: Tensor,
    cu_seqlens: Tensor,
    saved: Tensor,
    stats: Tensor,
    means: Tensor,
    student_rows: Tensor,
    teacher_rows: Tensor,
    teacher_width: int,
) -> Tensor:
    """Gradient of Σ grad·CKA in the student's rows, from what ``reference`` returns."""
    out = torch.zeros_like(student)
    with torch.autocast(student.device.type, enabled=False):
        for image, rows in _images(cu_seqlens, student.shape[0]):
            a, b, c, counted = saved[image]
            if not counted:
                continue
            inverse = stats[INVERSE_NORM, rows, None]
            unit = student[rows].to(saved.dtype) * inverse
            s = _centered(student_rows[rows], student.shape[1], saved.dtype)
            t = _centered(teacher_rows[rows], teacher_width, saved.dtype)
            direction = _direction(s, t, a / b) * (2 * grad[image] / (b.sqrt() * c.sqrt()))
            along = (unit * direction).sum(1, keepdim=True)
            out[rows] = ((direction - unit * along) * inverse).to(out.dtype)
    return out


@_library.fake("cka")
def _(student: Tensor, teacher: Tensor, cu_seqlens: Tensor, min_tokens: int) -> tuple[Tensor, ...]:
    return _outputs(student, teacher, cu_seqlens.shape[0] - 1)


@_library.fake("cka_backward")
def _(
    grad: Tensor,
    student: Tensor,
    cu_seqlens: Tensor,
    saved: Tensor,
    stats: Tensor,
    means: Tensor,
    student_rows: Tensor,
    teacher_rows: Tensor,
    teacher_width: int,
) -> Tensor:
    return torch.empty_like(student)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    student, teacher, cu_seqlens, _ = inputs
    # Of the outputs only the value has a gradient; zeros for the others would be as large as they.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(student, cu_seqlens, *output[1:])
    ctx.teacher_width = teacher.shape[1]


def _backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None, None
    grad_student = torch.ops.grace.cka_backward(
        grad.contiguous(), *ctx.saved_tensors, ctx.teacher_width
    )
    return grad_student, None, None, None


torch.library.register_autograd("grace::cka", _backward, setup_context=_save_for_backward)
