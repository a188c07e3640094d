"""The formula that gated DKD is timed against is the same loss; the exact gradients are right."""

from __future__ import annotations

import pytest
import torch

from benchmarks import distillation
from benchmarks.harness import Absent, missing
from grace.ops import gated_dkd
from grace.ops.gated_dkd import gated_dkd_rows


@pytest.fixture
def case():
    logits = torch.randn(2, 10, 31, generator=torch.Generator().manual_seed(0))
    return 3 * logits[0], 3 * logits[1], torch.arange(10) % 31


def test_eager_is_the_same_loss(case, monkeypatch):
    monkeypatch.setattr(distillation, "_ROWS", 4)
    torch.testing.assert_close(distillation.eager(*case), gated_dkd(*case))


@pytest.mark.parametrize("with_ce", [False, True])
def test_exact_gradients_are_those_of_the_losses(case, with_ce):
    student = case[0].double().requires_grad_()
    rest = case[1].double(), case[2]
    loss = gated_dkd(student, *rest) + with_ce * gated_dkd_rows(student, *rest)[2].mean()
    (expected,) = torch.autograd.grad(loss, student)

    def chunks():
        return zip(*(tensor.split(3) for tensor in case), strict=True)

    actual = torch.cat(list(distillation.exact_gradients(chunks, 10, with_ce)))
    torch.testing.assert_close(actual, expected)


def test_a_yardstick_that_is_not_there_is_named():
    def gone(_):
        raise Absent("not here")

    assert missing({"gone": gone, "there": lambda _: None}) == {"gone": {"absent": "not here"}}
