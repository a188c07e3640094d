"""gated_dkd_loss: the published numbers, the shift to the next token, what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import DATA
from oracle import to_double
from torch import Tensor

from grace.losses import gated_dkd_loss
from grace.ops import gated_dkd

Case = tuple[Tensor, Tensor, Tensor]


def make_case(batch: int = 2, length: int = 5, vs: int = 11, vt: int = 9) -> Case:
    student, teacher = torch.randn(batch, length, vs), torch.randn(batch, length, vt)
    labels = torch.randint(0, min(vs, vt), (batch, length))
    labels[:, :2] = -100
    return student, teacher, labels


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_matches_published_numbers(dtype):
    golden = dict(np.load(DATA / "gated_dkd.npz"))
    student, teacher = (
        torch.from_numpy(golden[f"{name}_logits"]).to(dtype) for name in ("student", "teacher")
    )
    loss = gated_dkd_loss(
        student.requires_grad_(),
        teacher,
        torch.from_numpy(golden["labels"]),
        temperature=float(golden["temperature"]),
        alpha=float(golden["alpha"]),
        beta_dkd=float(golden["beta_dkd"]),
    )
    loss.backward()
    assert loss.item() == pytest.approx(float(golden["loss"]), rel=1e-6)
    grad = torch.from_numpy(golden["grad"]).to(dtype)
    torch.testing.assert_close(student.grad, grad, rtol=1e-5, atol=1e-7)


def test_logits_are_for_the_next_label():
    student, teacher, labels = make_case()
    expected = gated_dkd(
        student[:, :-1].flatten(0, 1), teacher[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    )
    torch.testing.assert_close(gated_dkd_loss(student, teacher, labels), expected)


def test_last_position_and_first_label_do_not_matter():
    student, teacher, labels = make_case()
    expected = gated_dkd_loss(student, teacher, labels)
    student[:, -1] = teacher[:, -1] = float("nan")
    labels[:, 0] = 3
    torch.testing.assert_close(gated_dkd_loss(student, teacher, labels), expected, rtol=0, atol=0)


def test_settings_reach_the_op():
    student, teacher, labels = make_case()
    labels[labels == -100] = 7
    actual = gated_dkd_loss(student, teacher, labels, 3.0, 0.5, 1.5, 7, gate=False)
    expected = gated_dkd(
        student[:, :-1].flatten(0, 1), teacher[:, :-1].flatten(0, 1), labels[:, 1:].flatten(),
        temperature=3.0, alpha=0.5, beta=1.5, ignore_index=7, gate=False,
    )  # fmt: skip
    torch.testing.assert_close(actual, expected)


def test_gradient_may_take_the_logits_place():
    student, teacher, labels = make_case()
    grads = []
    for in_place in (False, True):
        logits = student.clone().requires_grad_()
        loss = gated_dkd_loss(logits, teacher, labels, in_place=in_place)
        grads += torch.autograd.grad(loss, logits)
    torch.testing.assert_close(*grads, rtol=0, atol=0)
    assert grads[1].data_ptr() == logits.data_ptr()


def test_gradient_by_finite_differences():
    student, teacher, labels = to_double(*make_case())
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: gated_dkd_loss(x, teacher, labels), (student,))


def test_teacher_of_another_dtype():
    student, teacher, labels = make_case()
    teacher = teacher.bfloat16()
    expected = gated_dkd_loss(student, teacher.float(), labels)
    torch.testing.assert_close(gated_dkd_loss(student, teacher, labels), expected)


@pytest.mark.parametrize(("batch", "length"), [(0, 5), (2, 0), (2, 1)])
def test_nothing_to_predict(batch, length):
    student, teacher, labels = make_case(batch, length)
    loss = gated_dkd_loss(student.requires_grad_(), teacher, labels)
    loss.backward()
    assert loss.item() == 0.0
    assert student.grad.eq(0).all()


def test_compiles_once_for_any_length():
    compiled = torch.compile(gated_dkd_loss, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (4, 6, 9):
            case = make_case(length=length)
            torch.testing.assert_close(compiled(*case), gated_dkd_loss(*case))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"student_logits": torch.zeros(10, 11)},
            r"gated_dkd_loss: student_logits must have 3 dim",
        ),
        (
            {"teacher_logits": torch.zeros(2, 4, 9)},
            r"teacher_logits must have batch and length \[2",
        ),
        (
            {"labels": torch.zeros(2, 6).long()},
            r"labels must have batch and length \[2, 5\], got \[",
        ),
        ({"labels": torch.zeros(2, 5)}, r"labels must be int64, got torch.float32"),
        ({"temperature": 0.0}, r"temperature must be positive and finite, got 0.0"),
    ],
)
def test_bad_arguments(changes, message):
    names = ("student_logits", "teacher_logits", "labels")
    arguments = dict(zip(names, make_case(), strict=True)) | changes
    with pytest.raises(ValueError, match=message):
        gated_dkd_loss(**arguments)
