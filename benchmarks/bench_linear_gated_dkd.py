"""linear_gated_dkd forward and backward, against whole logits from two matrix products: with our op
on them ("whole logits": no product is made twice), and with the formulas in plain PyTorch.

Yardsticks: the op's own matrix products alone, and of Liger-Kernel the fused linear cross-entropy,
which has no teacher, and two divergences of teacher and student (here KL), neither gated nor
decoupled: in Triton, and in compiled chunks with the cross-entropy added.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.distillation import T, compiled, eager, exact_gradients, liger, peer
from benchmarks.harness import Benchmark, Case, Side
from grace.ops import linear_gated_dkd
from grace.ops.gated_dkd import gated_dkd_rows, gated_mean
from grace.ops.linear_gated_dkd import default_chunk_size, slice_width

Losses = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
_ROOM = 120e9  # bytes of a GPU on which graphs of all sides fit beside one another


def fused(student: Tensor, teacher: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Both losses of whole logits in one pass of our op."""
    loss, gates, ce = gated_dkd_rows(student, teacher, labels)
    return ce.mean(), gated_mean(loss, gates)


def plain(distillation: Callable[..., Tensor]) -> Losses:
    """Both losses of whole logits in plain PyTorch."""
    return lambda student, teacher, labels: (
        F.cross_entropy(student.float(), labels),
        distillation(student, teacher, labels),
    )


def whole_logits(losses: Losses) -> Callable[..., tuple[Tensor, Tensor]]:
    """The losses with both logits whole in memory."""
    return lambda student, head, teacher, teacher_head, labels: losses(
        student @ head.t(), teacher @ teacher_head.t(), labels
    )


def too_much(device: torch.device, logits: int) -> dict[str, str]:
    """Peers left out on a GPU that cannot hold them all."""
    small = device.type == "cuda" and torch.cuda.mem_get_info(device)[1] < _ROOM
    return {"compile": "does not fit beside the others"} if small and logits > 10**9 else {}


def products(student: Tensor, head: Tensor, teacher: Tensor, teacher_head: Tensor) -> Side:
    """The matrix products that linear_gated_dkd makes, and nothing else."""
    rows = default_chunk_size(head, teacher_head)
    width = slice_width(len(head), len(student), rows)

    def forward() -> None:
        for s, t in zip(student.split(rows), teacher.split(rows), strict=True):
            logits, _ = s @ head.t(), t @ teacher_head.t()
            if not head.requires_grad:
                logits @ head, logits @ head

    def backward(grad_head: Tensor) -> None:
        slices = (head.split(width), teacher_head.split(width), grad_head.split(width))
        for h, t, g in zip(*slices, strict=True):
            grads, _ = student @ h.t(), teacher @ t.t()
            grads @ h
            torch.mm(grads.t(), student, out=g)

    def call(_: int) -> Tensor:
        with torch.no_grad():
            forward()
            if head.requires_grad:
                backward(torch.empty_like(head))
        return student

    return call


def kept_products(student: Tensor, head: Tensor, teacher: Tensor, teacher_head: Tensor) -> Side:
    """Those that it makes where the logits are kept: none twice."""

    def call(_: int) -> Tensor:
        with torch.no_grad():
            logits, _teacher_logits = student @ head.t(), teacher @ teacher_head.t()
            logits @ head
            if head.requires_grad:
                logits.t() @ student
        return student

    return call


def setup(device: torch.device, n: int, V: int, ds: int, dt: int, head: str) -> Case:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    made = {"device": device, "dtype": dtype}
    student = torch.randn(n, ds, **made).requires_grad_()
    student_head = (torch.randn(V, ds, **made) / ds**0.5).requires_grad_(head == "trains")
    teacher, teacher_head = torch.randn(n, dt, **made), torch.randn(V, dt, **made) / dt**0.5
    labels = torch.randint(0, V, (n,), device=device)
    leaves = (student, student_head) if head == "trains" else (student,)

    def side(function: Callable[..., tuple[Tensor, Tensor]]) -> Side:
        def call(_: int) -> Tensor:
            ce, kd = function(student, student_head, teacher, teacher_head, labels)
            return torch.autograd.grad(ce + kd, leaves)[0]

        return call

    def liger_loss(inputs: tuple[Tensor, ...], name: str, **options: Any) -> Side:
        def call(_: int) -> Tensor:
            return torch.autograd.grad(liger(name, **options)(*inputs), leaves)[0]

        return peer(call)

    def chunks() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        heads = student_head.detach().double().t(), teacher_head.double().t()
        parts = (x.split(256) for x in (student.detach(), teacher, labels))
        for s, t, y in zip(*parts, strict=True):
            yield s.double() @ heads[0], t.double() @ heads[1], y

    def exact() -> Tensor:
        weight = student_head.detach().double()
        return torch.cat([x @ weight for x in exact_gradients(chunks, n, True)])

    models = (student, student_head, teacher, teacher_head)
    trained = len(leaves)  # hidden states; head
    absent = too_much(device, n * V)
    sides = {
        "grace": side(linear_gated_dkd),
        "grace, logits kept": side(partial(linear_gated_dkd, keep_logits=True)),
        "whole logits": side(whole_logits(fused)),
        "eager": side(whole_logits(plain(eager))),
        "compile": side(whole_logits(plain(compiled()))),
    }
    return Case(
        sides={name: call for name, call in sides.items() if name not in absent},
        absent=absent,
        yardsticks={
            "its matrix products": products(*models),
            "its matrix products, logits kept": kept_products(*models),
            "liger linear cross-entropy": liger_loss(
                (student_head, student, labels), "LigerFusedLinearCrossEntropyLoss"
            ),
            "liger linear JSD": liger_loss(
                (*models, labels), "LigerFusedLinearJSD", jsd_beta=0.0, temperature=T
            ),
            "liger linear cross-entropy + JSD": liger_loss(
                (*models, labels),
                "LigerFusedLinearJSDLoss",
                module="chunked_loss",
                beta=0.0,
                temperature=T,
            ),
        },
        exact=exact,
        bytes=2 * V * (2 * ds + dt) * dtype.itemsize,
        flops=2 * n * V * (ds + dt + trained * ds),  # of both logits, and of the gradients
        tolerance=3e-2,
    )


BENCHMARK = Benchmark(
    "linear_gated_dkd",
    {
        "cuda": [
            {"n": n, "V": 151936, "ds": 2048, "dt": 4096, "head": head}
            for head in ("trains", "frozen")
            for n in (2048, 8192)
        ],
        "cpu": [
            {"n": 64, "V": 32064, "ds": 256, "dt": 512, "head": head}
            for head in ("trains", "frozen")
        ],
    },
    setup,
)
