"""cka forward and backward, against the formula in eager PyTorch and torch.compile of it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Benchmark, Case
from grace.ops import cka


def eager(student: Tensor, teacher: Tensor, lengths: list[int]) -> Tensor:
    """Centred Grams of every image in float32, n×n in memory."""
    values = []
    for s, t in zip(student.split(lengths), teacher.split(lengths), strict=True):
        n = s.shape[0]
        center = torch.eye(n, device=s.device) - 1.0 / n
        k, m = (center @ (x @ x.t()) @ center for x in (F.normalize(y.float()) for y in (s, t)))
        values.append((k * m).sum() / ((k * k).sum() * (m * m).sum()).sqrt())
    return torch.stack(values)


def setup(device: torch.device, images: int, n: int, ds: int, dt: int) -> Case:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    student = torch.randn(images * n, ds, device=device, dtype=dtype).requires_grad_()
    teacher = torch.randn(images * n, dt, device=device, dtype=dtype)
    cu_seqlens = torch.arange(images + 1, device=device, dtype=torch.int32) * n
    lengths = [n] * images

    def side(function):
        def call(_: int) -> Tensor:
            return torch.autograd.grad(function().sum(), student)[0]

        return call

    def exact() -> Tensor:
        s = student.detach().double().cpu().requires_grad_()
        value = cka(s, teacher.double().cpu(), cu_seqlens.cpu()).sum()
        return torch.autograd.grad(value, s)[0].to(device)

    compiled = torch.compile(eager)
    return Case(
        sides={
            "grace": side(lambda: cka(student, teacher, cu_seqlens)),
            "eager": side(lambda: eager(student, teacher, lengths)),
            "compile": side(lambda: compiled(student, teacher, lengths)),
        },
        exact=exact,
        bytes=images * n * (3 * ds + 2 * dt) * dtype.itemsize,
        flops=images * n * n * (2 * ds + dt + 4 * ds),
        tolerance=3e-2,
    )


BENCHMARK = Benchmark(
    "cka",
    {
        "cuda": [
            {"images": 1, "n": 576, "ds": 4096, "dt": 5120},
            {"images": 8, "n": 576, "ds": 4096, "dt": 5120},
            {"images": 4, "n": 1024, "ds": 2048, "dt": 4096},
            {"images": 1, "n": 4096, "ds": 2048, "dt": 4096},
        ],
        "cpu": [{"images": 2, "n": 196, "ds": 512, "dt": 1024}],
    },
    setup,
)
