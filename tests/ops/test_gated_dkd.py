"""gated_dkd: kernels and reference against float64; the formulas, the gradients, the extremes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import Kernels
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_accurate, to_double
from torch import Tensor
from windows import assert_margins_untouched, windowed

from grace.ops import gated_dkd
from grace.ops.gated_dkd import gated_dkd_rows, reference, reference_backward

KERNEL_DTYPES = [torch.float32, torch.bfloat16, torch.float16]
IGNORE = -100
SETTINGS = (2.0, 1.0, 4.0, IGNORE)  # temperature, alpha, beta, ignore_index
OUTPUTS = ("loss", "gate", "cross_entropy", "saved")
# Equal, odd (rows begin anywhere), padded student, padded teacher, the smallest.
VOCABULARIES = [(96, 96), (101, 101), (104, 97), (97, 104), (2, 2), (2, 11), (700, 650)]

Case = tuple[Tensor, Tensor, Tensor]


def make_case(
    n: int = 6, vs: int = 96, vt: int = 96, dtype: torch.dtype = torch.float32, spread: float = 4.0
) -> Case:
    """Logits, and labels that are ignored, shared, or (where there are any) the student's alone."""
    labels = torch.randint(0, min(vs, vt), (n,))
    labels[1::4] = IGNORE
    labels[3::4] = vs - 1
    labels[labels >= vs] = 0
    student, teacher = torch.randn(n, vs), torch.randn(n, vt)
    return (spread * student).to(dtype), (spread * teacher).to(dtype), labels


def gradient(student: Tensor, teacher: Tensor, labels: Tensor, **options: Any) -> Tensor:
    student = student.detach().clone().requires_grad_()
    gated_dkd(student, teacher, labels, **options).backward()
    assert student.grad is not None
    return student.grad


def as_written(student: Tensor, teacher: Tensor, label: int, T: float, a: float, b: float):
    """(L, g) of one row, from the definitions alone."""
    p_s, p_t = (F.softmax(x / T, 0) for x in (student, teacher))
    rest = torch.arange(len(student)) != label
    q_s, q_t = p_s[rest] / p_s[rest].sum(), p_t[rest] / p_t[rest].sum()
    two_s, two_t = (torch.stack([p[label], 1 - p[label]]) for p in (p_s, p_t))
    tckd = (two_t * (two_t / two_s).log()).sum()
    nckd = (q_t * (q_t / q_s).log()).sum()
    entropy = torch.distributions.Categorical(logits=teacher).entropy()
    return T**2 * (a * tckd + b * nckd), torch.exp(-entropy / math.log(len(student)))


@pytest.mark.parametrize(("temperature", "alpha", "beta"), [(2, 1, 4), (1, 0, 1), (3.7, 2, 0.5)])
def test_reference_is_the_formula(temperature, alpha, beta):
    student, teacher, labels = to_double(*make_case(5, 11, 11))
    labels = labels.clamp_min(0)
    loss, gate, cross_entropy = gated_dkd_rows(
        student, teacher, labels, temperature=temperature, alpha=alpha, beta=beta
    )
    for i, label in enumerate(labels.tolist()):
        expected = as_written(student[i], teacher[i], label, temperature, alpha, beta)
        torch.testing.assert_close((loss[i], gate[i]), expected)
    torch.testing.assert_close(cross_entropy, F.cross_entropy(student, labels, reduction="none"))


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize(("vs", "vt"), VOCABULARIES)
def test_kernel_is_accurate(kernels: Kernels, vs, vt, dtype):
    arguments = (*make_case(vs=vs, vt=vt, dtype=dtype), *SETTINGS)
    actual = kernels.gated_dkd(*kernels.put(*arguments))
    exact, working = reference(*to_double(*arguments)), reference(*arguments)
    for name, *values in zip(OUTPUTS, actual, exact, working, strict=True):
        assert_accurate(*values, name=name)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("with_cross_entropy", [False, True])
@pytest.mark.parametrize(("vs", "vt"), VOCABULARIES)
def test_kernel_backward_is_accurate(kernels: Kernels, vs, vt, with_cross_entropy, dtype):
    student, teacher, labels = make_case(vs=vs, vt=vt, dtype=dtype)
    saved = reference(student, teacher, labels, *SETTINGS)[3]
    grads = torch.randn(2, len(labels))
    grads[1] *= with_cross_entropy
    arguments = (*grads, student, teacher, labels, saved, *SETTINGS)
    actual = kernels.gated_dkd_backward(*kernels.put(*arguments))
    exact_saved = reference(*to_double(student, teacher, labels), *SETTINGS)[3]
    exact = reference_backward(*to_double(*grads, student, teacher, labels), exact_saved, *SETTINGS)
    assert_accurate(actual, exact, reference_backward(*arguments), name="grad_student")


def assert_row_accurate(kernels: Kernels, case: Case, *options: float) -> None:
    """Forward, and backward of its own ``saved`` with every row's L and cross-entropy weighed 1."""
    arguments = (*case, *(options or SETTINGS[:3]), IGNORE)
    actual = kernels.gated_dkd(*kernels.put(*arguments))
    exact, working = reference(*to_double(*arguments)), reference(*arguments)
    for name, *values in zip(OUTPUTS, actual, exact, working, strict=True):
        assert_accurate(*values, name=name)
    ones = (torch.ones(len(case[2])), torch.ones(len(case[2])))
    settings = arguments[3:]
    grad = kernels.gated_dkd_backward(*kernels.put(*ones, *case), actual[3], *settings)
    exact = reference_backward(*to_double(*ones, *case), exact[3], *settings)
    assert_accurate(
        grad, exact, reference_backward(*ones, *case, working[3], *settings), name="grad_student"
    )


@pytest.mark.parametrize("temperature", [0.0625, 0.5, 1.0, 3.7, 40.0])
def test_any_temperature(kernels: Kernels, temperature):
    assert_row_accurate(kernels, make_case(vs=101, vt=101), temperature, 0.7, 3.0)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize(("vs", "vt"), [(32064, 32064), (151936, 151936), (40003, 39999)])
def test_large_vocabularies(kernels: Kernels, vs, vt, dtype):
    student, teacher, _ = make_case(3, vs, vt, dtype)
    assert_row_accurate(kernels, (student, teacher, torch.tensor([0, IGNORE, min(vs, vt) - 1])))


def test_one_row_that_counts(kernels: Kernels):
    student, teacher, labels = make_case(5, dtype=torch.bfloat16)
    labels.fill_(IGNORE)
    labels[2] = 95
    assert_row_accurate(kernels, (student, teacher, labels))
    alone = gated_dkd(student[2:3], teacher[2:3], labels[2:3])
    torch.testing.assert_close(gated_dkd(student, teacher, labels), alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_that_grow_along_a_row(kernels: Kernels, dtype):
    """Every sum is rescaled again and again, by a little and by a lot."""
    rising = torch.linspace(-60, 60, 9000).repeat(2, 1)
    student, teacher = rising.to(dtype), rising.roll(4000, 1).to(dtype)
    assert_row_accurate(kernels, (student, teacher, torch.tensor([8999, 17])))


@pytest.mark.parametrize("scale", [1e4, 1e30])
def test_logits_out_of_proportion(kernels: Kernels, scale):
    student, teacher, labels = make_case(vs=37, vt=37)
    arguments = (scale * student, scale * teacher, labels, *SETTINGS)
    exact = reference(*to_double(*arguments))
    for name, actual, truth in zip(
        OUTPUTS, kernels.gated_dkd(*kernels.put(*arguments)), exact, strict=True
    ):
        torch.testing.assert_close(actual.cpu().double(), truth, rtol=1e-5, atol=1e-5, msg=name)


def test_student_may_rule_out_what_the_teacher_does(kernels: Kernels):
    student, teacher, _ = make_case(2, 37, 37)
    teacher[:, 5:20] = student[:, 5:12] = -math.inf
    case = (student, teacher, torch.tensor([0, 36]))
    assert_row_accurate(kernels, case)
    student[1, 20] = -math.inf  # where the teacher sees a chance
    loss = kernels.gated_dkd(*kernels.put(*case, *SETTINGS))[0]
    assert loss.isfinite().tolist() == [True, False]
    assert loss[1] == math.inf


@pytest.mark.parametrize(("vs", "vt"), [(7, 7), (9, 7), (7, 9), (2, 2)])
@pytest.mark.parametrize("gate", [True, False])
def test_gradient_by_finite_differences(vs, vt, gate):
    student, teacher, labels = to_double(*make_case(6, vs, vt, spread=2.0))
    student.requires_grad_()

    def scalar(logits: Tensor) -> Tensor:
        return gated_dkd(logits, teacher, labels, temperature=1.7, alpha=0.7, beta=3, gate=gate)

    def rows(logits: Tensor) -> tuple[Tensor, Tensor]:
        loss, _, cross_entropy = gated_dkd_rows(logits, teacher, labels, temperature=1.7)
        return loss, cross_entropy

    assert torch.autograd.gradcheck(scalar, (student,))
    assert torch.autograd.gradcheck(rows, (student,))


def test_gate_does_not_depend_on_the_student():
    student, teacher, labels = make_case()
    student.requires_grad_()
    _, gate, _ = gated_dkd_rows(student, teacher, labels)
    assert not gate.requires_grad
    torch.testing.assert_close(gated_dkd_rows(-student, teacher, labels)[1], gate, rtol=0, atol=0)


def test_gate_reaches_from_uniform_to_certain():
    teacher = torch.zeros(2, 50)
    teacher[1, 3] = 100.0
    _, gate, _ = gated_dkd_rows(torch.zeros(2, 50), teacher, torch.tensor([3, 3]))
    torch.testing.assert_close(gate, torch.tensor([math.exp(-1), 1.0]))


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_equal_logits_give_zero(kernels: Kernels, dtype):
    logits, _, labels = make_case(vs=101, vt=101, dtype=dtype)
    # Exactly, where the compiler does not choose which multiply-adds to fuse on either side.
    noise = 1e-5 if kernels.device == "cuda" else 0.0
    loss, *_, saved = kernels.gated_dkd(*kernels.put(logits, logits, labels, *SETTINGS))
    assert loss.abs().max() <= noise
    ones, zeros = torch.ones(len(labels)), torch.zeros(len(labels))
    arguments = kernels.put(ones, zeros, logits, logits, labels, saved, *SETTINGS)
    assert kernels.gated_dkd_backward(*arguments).abs().max() <= noise


def test_shifting_logits_changes_nothing():
    student, teacher, labels = to_double(*make_case())
    loss = gated_dkd(student, teacher, labels)
    torch.testing.assert_close(gated_dkd(student + 30, teacher - 70, labels), loss)


def test_confidently_wrong_student_keeps_its_gradient(kernels: Kernels):
    # The teacher is sure of class 0 and the student of class 1: p_s is about e^-40.
    student, teacher = torch.zeros(1, 8), torch.zeros(1, 8)
    student[0, 1], teacher[0, 0] = 40.0, 6.6
    label = torch.zeros(1, dtype=torch.int64)
    grad = gradient(student, teacher, label, temperature=1.0, beta=0.0)
    expected = -teacher.softmax(1)[0, 0].item()
    assert expected == pytest.approx(-0.99, abs=0.005)
    assert grad[0, 0].item() == pytest.approx(expected, rel=1e-6)
    arguments = kernels.put(student, teacher, label, 1.0, 1.0, 0.0, IGNORE)
    saved = kernels.gated_dkd(*arguments)[3]
    ones, zeros = kernels.put(torch.ones(1), torch.zeros(1))
    actual = kernels.gated_dkd_backward(ones, zeros, *arguments[:3], saved, *arguments[3:])
    torch.testing.assert_close(actual.cpu(), grad)


def test_confident_agreement_keeps_its_gradient():
    # Both p round to 1 in float32; their difference must not round to 0.
    student, teacher = torch.zeros(1, 8), torch.zeros(1, 8)
    student[0, 0], teacher[0, 0] = 25.0, 28.0
    label = torch.zeros(1, dtype=torch.int64)
    options = {"temperature": 1.0, "beta": 0.0}
    exact = gradient(*to_double(student, teacher, label), **options)
    assert exact[0, 0].item() < -1e-11
    torch.testing.assert_close(
        gradient(student, teacher, label, **options).double(), exact, rtol=1e-5, atol=0
    )


def extreme_logits(kind: str, n: int, classes: int) -> Tensor:
    index = torch.arange(n) % classes
    if kind == "uniform":
        return torch.zeros(n, classes)
    if kind == "one-hot":
        return torch.full((n, classes), -60.0).scatter(1, index[:, None], 60.0)
    return 60.0 * torch.randn(n, classes).sign()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("teacher_kind", ["uniform", "one-hot", "random"])
@pytest.mark.parametrize("student_kind", ["uniform", "one-hot", "random"])
@pytest.mark.parametrize("classes", [2, 37])
def test_extremes(kernels: Kernels, classes, student_kind, teacher_kind, dtype):
    student = extreme_logits(student_kind, 8, classes).to(dtype)
    teacher = extreme_logits(teacher_kind, 8, classes).to(dtype)
    labels = torch.arange(8).flip(0) % classes
    arguments = (student, teacher, labels, *SETTINGS)
    exact, working = reference(*to_double(*arguments)), reference(*arguments)
    actual = kernels.gated_dkd(*kernels.put(*arguments))
    # A GPU's exponentials and logarithms are good to 2 units; the loss has T²(α + β) = 20 of each.
    ulps = 20 if kernels.device == "cuda" else 1
    for name, *values in zip(OUTPUTS, actual, exact, working, strict=True):
        assert values[0].isfinite().all(), name
        assert_accurate(*values, name=name, ulps=ulps)
    weights = (torch.ones(8), torch.ones(8))
    grad = kernels.gated_dkd_backward(*kernels.put(*weights, *arguments[:3], actual[3], *SETTINGS))
    exact_grad = reference_backward(*to_double(*weights, *arguments[:3]), exact[3], *SETTINGS)
    working_grad = reference_backward(*weights, *arguments[:3], working[3], *SETTINGS)
    assert_accurate(grad, exact_grad, working_grad, name="grad_student")


def test_teacher_may_rule_classes_out(kernels: Kernels):
    student, teacher, labels = make_case(vs=37, vt=37)
    teacher[:, 5:20] = -math.inf
    labels = torch.where(labels == IGNORE, labels, 0)
    arguments = (student, teacher, labels, *SETTINGS)
    exact, working = reference(*to_double(*arguments)), reference(*arguments)
    for name, *values in zip(
        OUTPUTS, kernels.gated_dkd(*kernels.put(*arguments)), exact, working, strict=True
    ):
        assert values[0].isfinite().all(), name
        assert_accurate(*values, name=name)


def test_what_a_label_says(kernels: Kernels):
    labels = torch.tensor([IGNORE, 3, 12, 14, -1, 99])  # of 14 classes, 12 of them shared
    student, teacher, _ = make_case(len(labels), 14, 12)
    case = kernels.put(student, teacher, labels)
    loss, gate, cross_entropy, saved = kernels.gated_dkd(*case, *SETTINGS)
    assert loss.isnan().tolist() == [False, False, False, True, True, True]
    assert cross_entropy.isnan().tolist() == [False, False, False, True, True, True]
    assert (gate > 0).tolist() == [False, True, False, False, False, False]
    assert loss[[0, 2]].tolist() == [0, 0]
    assert cross_entropy[0] == 0
    assert cross_entropy[2] > 0
    ones = torch.ones_like(loss)
    grad = kernels.gated_dkd_backward(ones, ones, *case, saved, *SETTINGS)
    assert grad.isfinite().all()
    assert grad.any(1).tolist() == [False, True, True, False, False, False]
    assert (grad[1, 12:] != 0).all()  # the padding, through the cross-entropy


def test_wrong_label_is_seen_in_the_mean():
    student, teacher, _ = make_case(3, 9, 9)
    assert gated_dkd(student, teacher, torch.tensor([1, 9, 2])).isnan()


def test_all_rows_ignored():
    student, teacher, labels = make_case()
    labels.fill_(IGNORE)
    for gate in (True, False):
        assert gated_dkd(student, teacher, labels, gate=gate).item() == 0.0
        assert gradient(student, teacher, labels, gate=gate).eq(0).all()


def test_ignored_rows_may_hold_anything(kernels: Kernels):
    student, teacher, labels = make_case()
    student[labels == IGNORE] = math.nan
    teacher[labels == IGNORE] = math.inf
    arguments = kernels.put(student, teacher, labels, *SETTINGS)
    outputs = kernels.gated_dkd(*arguments)
    ones = torch.ones_like(outputs[0])
    grad = kernels.gated_dkd_backward(ones, ones, *arguments[:3], outputs[3], *SETTINGS)
    assert all(x.isfinite().all() for x in (*outputs, grad))
    assert gradient(student, teacher, labels).isfinite().all()


@pytest.mark.parametrize("which", [0, 1])
def test_not_a_number_spreads(kernels: Kernels, which):
    case = make_case()
    case[which][0, 7] = math.nan
    loss, *_ = kernels.gated_dkd(*kernels.put(*case, *SETTINGS))
    assert loss.isnan().tolist() == [True] + [False] * 5


def test_mean_is_weighted_by_the_gate():
    student, teacher, labels = make_case()
    loss, gate, _ = gated_dkd_rows(student, teacher, labels)
    valid = gate > 0
    torch.testing.assert_close(
        gated_dkd(student, teacher, labels), (gate * loss).sum() / gate.sum()
    )
    torch.testing.assert_close(gated_dkd(student, teacher, labels, gate=False), loss[valid].mean())


@settings(max_examples=30, deadline=None)
@given(n=st.integers(0, 5), vs=st.integers(2, 40), vt=st.integers(2, 40))
def test_any_shape(n, vs, vt):
    student, teacher, labels = make_case(n, vs, vt)
    shared = min(vs, vt)
    loss = gated_dkd(student, teacher, labels)
    kept = labels < shared
    torch.testing.assert_close(
        gated_dkd(student[kept, :shared], teacher[kept, :shared], labels[kept]), loss
    )
    assert gradient(student, teacher, labels).shape == (n, vs)


def test_no_rows(kernels: Kernels):
    arguments = kernels.put(*make_case(0), *SETTINGS)
    outputs = kernels.gated_dkd(*arguments)
    assert [list(x.shape) for x in outputs] == [[0], [0], [0], [0, 4]]
    grad = kernels.gated_dkd_backward(outputs[0], outputs[2], *arguments[:3], outputs[3], *SETTINGS)
    assert list(grad.shape) == [0, 96]
    assert gated_dkd(*make_case(0)).item() == 0.0


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize(("vs", "vt"), [(101, 101), (104, 97)])
def test_kernels_stay_inside_their_tensors(kernels: Kernels, vs, vt, dtype):
    case = make_case(vs=vs, vt=vt, dtype=dtype)
    cut = [windowed(t) for t in kernels.put(*case)]
    tensors = [inside for inside, _ in cut]
    outputs = kernels.gated_dkd(*tensors, *SETTINGS)
    assert all(x.isfinite().all() for x in outputs)
    ones = torch.ones_like(outputs[0])
    grad = kernels.gated_dkd_backward(ones, ones, *tensors, outputs[3], *SETTINGS)
    assert grad.isfinite().all()
    for _, buffer in cut:
        assert_margins_untouched(buffer)


@pytest.mark.parametrize("offset", [0, 1, 3])
def test_rows_may_begin_anywhere(kernels: Kernels, offset):
    # Student and teacher at different distances from a multiple of 16 bytes.
    student, teacher, labels = kernels.put(*make_case(vs=96, dtype=torch.bfloat16))
    shifted = torch.zeros(student.numel() + offset, dtype=student.dtype, device=student.device)
    view = shifted[offset:].view_as(student).copy_(student)
    actual = kernels.gated_dkd(view, teacher, labels, *SETTINGS)
    expected = kernels.gated_dkd(student, teacher, labels, *SETTINGS)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("width", [1, 8, 13, 40, 200])
@pytest.mark.parametrize(("vs", "vt"), [(101, 101), (104, 97), (97, 104)])
def test_slices_in_place_make_up_the_gradient(kernels: Kernels, vs, vt, width, dtype):
    student, teacher, labels = kernels.put(*make_case(vs=vs, vt=vt, dtype=dtype))
    saved = kernels.gated_dkd(student, teacher, labels, *SETTINGS)[3]
    grads = tuple(torch.randn(2, len(labels)).to(saved.device))
    expected = kernels.gated_dkd_backward(*grads, student, teacher, labels, saved, *SETTINGS)
    for first in range(0, vs, width):
        columns = slice(first, first + width)
        (part, around), (other, _) = (windowed(x[:, columns]) for x in (student, teacher))
        rest = (other, labels, saved, *SETTINGS, first, vs, min(vs, vt))
        assert kernels.gated_dkd_backward_(*grads, part, *rest) is None
        torch.testing.assert_close(part, expected[:, columns])
        assert_margins_untouched(around)


LOSSES = {
    "loss": lambda loss, ce: loss.sum(),
    "ce": lambda loss, ce: ce.sum(),
    "both": lambda loss, ce: loss.sum() + 0.3 * ce.sum(),
}


@pytest.mark.parametrize("compiles", [False, True])
@pytest.mark.parametrize("used", LOSSES)
def test_losses_that_nothing_uses(used, compiles):
    """Their gradients are zeros of a row each; gate and saved have none to be made."""
    torch._dynamo.reset()
    student, teacher, labels = to_double(*make_case())
    student.requires_grad_()

    def function(student: Tensor) -> Tensor:
        loss, _, ce = gated_dkd_rows(student, teacher, labels)
        return LOSSES[used](loss, ce)

    run = torch.compile(function, fullgraph=True, backend="aot_eager") if compiles else function
    (actual,) = torch.autograd.grad(run(student), student)
    saved = torch.ops.grace.gated_dkd(student, teacher, labels, *SETTINGS)[3]
    weights = {"loss": (1.0, 0.0), "ce": (0.0, 1.0), "both": (1.0, 0.3)}[used]
    grads = (torch.full_like(saved[:, 0], weight) for weight in weights)
    expected = reference_backward(*grads, student, teacher, labels, saved, *SETTINGS)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert torch.autograd.gradcheck(function, (student,))


def test_no_gradient_is_made_for_gate_and_saved(zeros_made):
    student, teacher, labels = make_case()
    loss, gate, ce, saved = torch.ops.grace.gated_dkd(
        student.requires_grad_(), teacher, labels, *SETTINGS
    )
    assert (gate.requires_grad, saved.requires_grad) == (False, False)
    with zeros_made() as made:
        torch.autograd.grad(loss.sum() + ce.sum(), student)
    assert made == []


def test_backward_in_place_is_where_the_logits_were():
    student, teacher, labels = make_case()
    expected = gradient(student, teacher, labels)
    logits = student.clone().requires_grad_()
    (grad,) = torch.autograd.grad(gated_dkd(logits, teacher, labels, in_place=True), logits)
    torch.testing.assert_close(grad, expected, rtol=0, atol=0)
    assert grad.data_ptr() == logits.data_ptr()


def test_backward_in_place_works_once():
    student, teacher, labels = make_case()
    loss = gated_dkd(student.requires_grad_(), teacher, labels, in_place=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_repeats_bitwise(kernels: Kernels):
    arguments = kernels.put(*make_case(vs=700, vt=700), *SETTINGS)
    first, second = (kernels.gated_dkd(*arguments) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    ones = torch.ones_like(first[0])
    backward = (ones, ones, *arguments[:3], first[3], *SETTINGS)
    assert torch.equal(*(kernels.gated_dkd_backward(*backward) for _ in range(2)))


def test_opcheck():
    student, teacher, labels = make_case(vs=9, vt=7)
    torch.library.opcheck(
        torch.ops.grace.gated_dkd, (student.requires_grad_(), teacher, labels, *SETTINGS)
    )


def test_opcheck_in_place():
    student, teacher, labels = make_case(vs=9, vt=7)
    saved = reference(student, teacher, labels, *SETTINGS)[3]
    grads = torch.randn(2, len(labels))
    arguments = (*grads, student, teacher, labels, saved, *SETTINGS, 0, 9, 7)
    torch.library.opcheck(torch.ops.grace.gated_dkd_backward_, arguments)


@pytest.mark.parametrize("in_place", [False, True])
def test_compiles_once_for_any_number_of_rows(in_place):
    torch._dynamo.reset()  # the other in_place is another program
    compiled = torch.compile(gated_dkd, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n in (4, 6, 9):
            student, teacher, labels = make_case(n)
            student.requires_grad_()
            actual = compiled(student, teacher, labels, in_place=in_place)
            torch.testing.assert_close(actual, gated_dkd(student, teacher, labels))
            (grad,) = torch.autograd.grad(actual, student)
            torch.testing.assert_close(grad, gradient(student, teacher, labels))


def test_non_contiguous_input():
    student, teacher, labels = make_case()
    expected = gated_dkd(student, teacher, labels)
    strided = student.t().contiguous().t().requires_grad_()
    spaced = labels.repeat_interleave(2)[::2]
    actual = gated_dkd(strided, teacher.t().contiguous().t(), spaced)
    torch.testing.assert_close(actual, expected)
    actual.backward()
    torch.testing.assert_close(strided.grad, gradient(student, teacher, labels))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student_logits": torch.zeros(96)}, r"student_logits must have 2 dimensions, got shape"),
        ({"student_logits": torch.zeros(6, 1)}, r"student_logits must have at least 2 classes"),
        ({"student_logits": torch.zeros(6, 96).int()}, r"student_logits must be one of float32"),
        ({"teacher_logits": torch.zeros(5, 96)}, r"teacher_logits must have 6 rows like student_"),
        ({"teacher_logits": torch.zeros(6, 96).half()}, r"teacher_logits must be torch.float32"),
        ({"labels": torch.zeros(6)}, r"labels must be int64, got torch.float32"),
        ({"labels": torch.zeros(7).long()}, r"labels must have 6 rows like student_logits, got 7"),
        (
            {"labels": torch.zeros(6, 1).long()},
            r"labels must have 1 dimensions, got shape \[6, 1\]",
        ),
        ({"temperature": 0.0}, r"temperature must be positive and finite, got 0.0"),
        ({"temperature": math.nan}, r"temperature must be positive and finite, got nan"),
        ({"alpha": -1.0}, r"alpha must be finite and not negative, got -1.0"),
        ({"beta": math.inf}, r"beta must be finite and not negative, got inf"),
    ],
)
def test_bad_arguments(changes, message):
    names = ("student_logits", "teacher_logits", "labels")
    arguments = dict(zip(names, make_case(), strict=True)) | changes
    with pytest.raises(ValueError, match="gated_dkd: " + message):
        gated_dkd(**arguments)
