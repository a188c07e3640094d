"""gated_dkd forward and backward, against the formula in eager PyTorch and torch.compile of it."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Benchmark, Case, buffer_sets
from grace.ops import gated_dkd

T, BETA = 2.0, 4.0


def eager(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """Gated DKD with full-size log-softmaxes in float32, as one writes it first."""
    target = F.one_hot(labels, student.shape[1]).bool()
    log_s, log_t = (F.log_softmax(z.float() / T, dim=1) for z in (student, teacher))
    p_s, p_t = (z.exp()[target] for z in (log_s, log_t))
    tckd = p_t * (p_t / p_s).log() + (1 - p_t) * ((1 - p_t) / (1 - p_s)).log()
    rest_s, rest_t = (
        F.log_softmax((z.float() / T).masked_fill(target, -1e9), dim=1) for z in (student, teacher)
    )
    nckd = (rest_t.exp() * (rest_t - rest_s)).masked_fill(target, 0).sum(1)
    full = F.log_softmax(teacher.float(), dim=1)
    gate = (full.exp() * full).sum(1).div(math.log(student.shape[1])).exp()
    return (gate * T**2 * (tckd + BETA * nckd)).sum() / gate.sum()


def setup(device: torch.device, n: int, V: int) -> Case:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    size = n * V * dtype.itemsize
    sets = buffer_sets(size * 2, device)
    student = [torch.randn(n, V, device=device, dtype=dtype).requires_grad_() for _ in range(sets)]
    teacher = [torch.randn(n, V, device=device, dtype=dtype) for _ in range(sets)]
    labels = torch.randint(0, V, (n,), device=device)

    def side(function):
        def call(i: int) -> Tensor:
            return torch.autograd.grad(function(student[i], teacher[i], labels), student[i])[0]

        return call

    exact_student = student[0].detach().double().cpu().requires_grad_()
    arguments = (exact_student, teacher[0].double().cpu(), labels.cpu())
    return Case(
        sides={
            "grace": side(gated_dkd),
            "eager": side(eager),
            "compile": side(torch.compile(eager)),
        },
        exact=lambda: torch.autograd.grad(gated_dkd(*arguments), exact_student)[0].to(device),
        bytes=5 * size,  # both logits twice, the gradient once
        sets=sets,
    )


BENCHMARK = Benchmark(
    "gated_dkd",
    {
        "cuda": [{"n": 2048, "V": 151936}, {"n": 8192, "V": 151936}],
        "cpu": [{"n": 64, "V": 32064}],
    },
    setup,
)
