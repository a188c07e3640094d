"""linear_gated_dkd forward and backward, against full logits from two matrix products."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Benchmark, Case
from grace.ops import gated_dkd, linear_gated_dkd


def full_logits(
    student: Tensor, head: Tensor, teacher: Tensor, teacher_head: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """The same losses with both logits whole in memory."""
    logits = student @ head.t()
    ce = F.cross_entropy(logits.float(), labels)
    return ce, gated_dkd(logits, teacher @ teacher_head.t(), labels)


def setup(device: torch.device, n: int, V: int, ds: int, dt: int) -> Case:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    made = {"device": device, "dtype": dtype}
    student = torch.randn(n, ds, **made).requires_grad_()
    head = (torch.randn(V, ds, **made) / ds**0.5).requires_grad_()
    teacher, teacher_head = torch.randn(n, dt, **made), torch.randn(V, dt, **made) / dt**0.5
    labels = torch.randint(0, V, (n,), device=device)
    fixed = (teacher, teacher_head, labels)

    def side(function):
        def call(_: int) -> Tensor:
            ce, kd = function(student, head, *fixed)
            return torch.autograd.grad(ce + kd, (student, head))[0]

        return call

    def exact() -> Tensor:
        s, h = (t.detach().double().requires_grad_() for t in (student, head))
        ce, kd = full_logits(s, h, teacher.double(), teacher_head.double(), labels)
        return torch.autograd.grad(ce + kd, s)[0]

    products = 2 * n * V * (3 * ds + dt)  # forward of both, backward to hidden states and head
    return Case(
        sides={"grace": side(linear_gated_dkd), "full logits": side(full_logits)},
        exact=exact,
        bytes=2 * V * (2 * ds + dt) * dtype.itemsize,
        flops=products,
        tolerance=3e-2,
    )


BENCHMARK = Benchmark(
    "linear_gated_dkd",
    {
        "cuda": [{"n": n, "V": 151936, "ds": 2048, "dt": 4096} for n in (2048, 8192)],
        "cpu": [{"n": 64, "V": 32064, "ds": 256, "dt": 512}],
    },
    setup,
)
